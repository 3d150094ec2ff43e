"""What the head of a request says of its body and its tensor, and the head of an answer: of a server and a cluster's front."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request

from remote_vae.errors import InvalidRequest
from remote_vae.server.admission import Receive, TooLarge
from remote_vae.server.catalogue import Fits
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import Family
from remote_vae.wire import HttpResponse, TensorHead, decode_size, encode_size

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# JSON and base64 around the values of a legacy body.
BASE64_OVERHEAD = 4 / 3
SLACK = 4096
# A PNG of noise is a little larger than its values, which are 3 or 4.
FILE_BYTES_PER_PIXEL = 4


def asked_size(query: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Height and width of a query, in pixels; None: it has none, or none that is one."""
    return _whole(query.get("height")), _whole(query.get("width"))


def size_of(op: Op, head: TensorHead, query: Mapping[str, str], family: Family) -> tuple[int, int, int, int]:
    """What a request makes or takes: pictures, or videos, frames, height, width. Raises InvalidRequest: not for ``family``."""
    return encode_size(head.shape, family) if op == "encode" else decode_size(head.shape, *asked_size(query), family)


def fits_of(op: Op, head: TensorHead | None, query: Mapping[str, str]) -> Fits | None:
    """Whether a request's tensor is one for a VAE of a family; None: it has a picture's file, which is one for many."""
    if head is None:
        return None

    def fits(family: Family) -> bool:
        with suppress(InvalidRequest):
            return bool(size_of(op, head, query, family))
        return False

    return fits


def body_length(request: Request, limit: int) -> int:
    """Bytes of the body, as far as the head says them. Raises TooLarge."""
    declared = request.headers.get("content-length", "")
    if not (declared.isascii() and declared.isdigit()):
        return limit if "transfer-encoding" in request.headers else 0
    if len(declared) > len(str(limit)) or int(declared) > limit:
        raise TooLarge(f"a body of {declared[:20]} bytes, and at most {limit} belong to this request")
    return int(declared)


async def leaving(receive: Receive) -> None:
    """Ends when the client hangs up; to be awaited after the body was read.

    Not ``request.is_disconnected``, which never tells behind the middleware of the web UIs (Starlette's BaseHTTPMiddleware).
    """
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_head(answer: HttpResponse, send: Send) -> None:
    """The head of an answer whose body follows, as long as it is now."""
    headers = {**answer.headers, "Content-Length": str(len(answer.body))}
    raw = [(name.lower().encode("latin1"), value.encode("latin1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 6 else None
