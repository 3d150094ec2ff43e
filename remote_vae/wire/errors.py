"""An error of the protocol: JSON by a server, one line for the user."""

from __future__ import annotations

import html
import json
import re

from remote_vae.wire.message import HttpResponse
from remote_vae.wire.tensors import Buffer

ERROR_LIMIT = 64 * 1024


def error_response(status: int, message: str) -> HttpResponse:
    """An error; clients call ``response.json()`` on every one."""
    return HttpResponse(status, {"Content-Type": "application/json"}, json.dumps({"error": message}).encode())


def error_detail(body: Buffer) -> str:
    """What an error body says, in one line of at most 300 characters: the protocol's JSON, or the text of a page."""
    text = bytes(body[:ERROR_LIMIT]).decode("utf-8", "replace")
    try:
        document = json.loads(text)
        if isinstance(document, dict):
            text = str(document.get("error") or document.get("detail") or document.get("message") or document)
    except ValueError:
        text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    line = " ".join(text.split())
    return (line[:297] + "...") if len(line) > 300 else line or "no message"
