"""The legacy transport: a tensor as base64 in JSON."""

from __future__ import annotations

import base64
import json
import re

from remote_vae.wire.errors import read_json
from remote_vae.wire.http import Buffer

# The one long text in the JSON, and what may stand around it.
_INPUTS = re.compile(rb'"inputs"\s*:\s*"([A-Za-z0-9+/=]*)"')
_REST_LIMIT = 4096


def to_base64(body: Buffer, **more: object) -> bytes:
    """The JSON of a body, and what else stands beside it."""
    return json.dumps({"inputs": base64.b64encode(body).decode("ascii"), **more}).encode()


def from_base64(body: Buffer) -> tuple[dict[str, object], bytes]:
    """The JSON without its long text, and the bytes of that text.

    The text never goes through the parser, so that a body of other JSON takes no more memory than its own.

    Raises:
        ValueError: something else.
    """
    inputs = _INPUTS.search(body)
    if inputs is None or len(body) - len(inputs[1]) > _REST_LIMIT:
        raise ValueError("no base64 text")
    document = read_json(bytes(body[: inputs.start(1)]) + bytes(body[inputs.end(1) :]))
    if not isinstance(document, dict) or document.get("inputs") != "":
        raise ValueError("not a JSON object")
    return document, base64.b64decode(inputs[1], validate=True)
