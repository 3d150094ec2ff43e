"""An error of the protocol: JSON by a server, one short line for the user. What others wrote is cleaned here."""

from __future__ import annotations

import html
import json
import re

from remote_vae.wire.http import Buffer, HttpResponse

# Bytes of an error's body that are read at all.
ERROR_LIMIT = 64 * 1024
# Characters of an endpoint's text that are shown, and of our own messages that are sent.
SHOWN_LIMIT = 300
SENT_LIMIT = 1000

# Without "<" inside the brackets each one is tried once: 64 KB of "<" take no longer than any other text.
_TAG = re.compile(r"<[^<>]*>")


def one_line(text: str, limit: int = SHOWN_LIMIT) -> str:
    """``text`` of somebody else as one line of at most ``limit`` characters, for logs, infotext and messages.

    Control characters (line ends, escape sequences, marks that turn the direction of writing) become blanks.
    """
    # Far more than is shown, as much of it may be blanks.
    printable = "".join(letter if letter.isprintable() else " " for letter in text[:ERROR_LIMIT])
    line = " ".join(printable.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def error_response(status: int, message: str) -> HttpResponse:
    """An error; clients call ``response.json()`` on every one."""
    document = {"error": one_line(message, SENT_LIMIT)}
    return HttpResponse(status, {"Content-Type": "application/json"}, json.dumps(document).encode())


def error_detail(body: Buffer) -> str:
    """What an error's body says, in one line of at most 300 characters: the protocol's JSON, or the text of a web page."""
    text = bytes(body[:ERROR_LIMIT]).decode("utf-8", "replace")
    try:
        document = read_json(text)
        if isinstance(document, dict):
            document = document.get("error") or document.get("detail") or document.get("message") or document
        text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)
    except ValueError:
        text = html.unescape(_TAG.sub(" ", text))
    return one_line(text) or "no message"


def read_json(text: str | bytes) -> object:
    """The value that ``text`` is in JSON.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python can follow.
    """
    try:
        value: object = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return value
