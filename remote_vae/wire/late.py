"""An answer that begins before it is made, so that nothing between client and server takes the call for dead.

Where a client says that it takes a late answer, and its call is not answered after ten seconds, the server begins: 200, content
type ``application/vnd.remote-vae.late``, a dot every five seconds. When the answer is made there come a line end, one line of
JSON ``{"status", "headers", "length"}`` that stands for the head, and the body: so many bytes, and nothing after them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from remote_vae.errors import MalformedAnswer
from remote_vae.wire.errors import one_line, read_json
from remote_vae.wire.http import HttpResponse

LATE_TYPE = "application/vnd.remote-vae.late"
# Seconds after which a server begins, and between two dots.
LATE_AFTER = 10.0
LATE_EVERY = 5.0
DOT = b"."
# Bytes of the line of JSON.
LATE_HEAD_LIMIT = 16 * 1024

_MAX_LENGTH = 1 << 40


@dataclass(frozen=True)
class LateHead:
    """The head of an answer that came late: status, headers with lower-case names, bytes of the body."""

    status: int
    headers: Mapping[str, str]
    length: int


def late_head(response: HttpResponse) -> bytes:
    """What comes between the last dot and the body of ``response``."""
    document = {"status": response.status, "headers": dict(response.headers), "length": len(response.body)}
    return b"\n" + json.dumps(document).encode() + b"\n"


def read_late_head(line: bytes) -> LateHead:
    """The line of JSON. Raises MalformedAnswer."""
    try:
        document = read_json(line)
        if not isinstance(document, dict):
            raise TypeError
        status, length, headers = document["status"], document["length"], document["headers"]
        if not (_is_whole(status, 100, 599) and _is_whole(length, 0, _MAX_LENGTH) and isinstance(headers, dict)):
            raise TypeError
        if not all(isinstance(value, str) for value in headers.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise MalformedAnswer("a late answer without a head") from None
    named = {name.lower(): value if value.isprintable() else one_line(value) for name, value in headers.items()}
    return LateHead(status, named, length)


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
