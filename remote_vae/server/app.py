"""The HTTP face of the server: a place first, then the body, then the VAE; JSON on every error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Union

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from remote_vae.errors import InvalidRequest, NotFinite, OutOfMemory, RemoteVaeError, SettingsError
from remote_vae.server.access import Access, by_token
from remote_vae.server.admission import Busy, ClientGone, Place, Receive, Stalled, TooLarge, read_body
from remote_vae.server.catalogue import Entry, NoModel, UnknownModel
from remote_vae.server.engine import Engine
from remote_vae.server.page import HEADERS, closed_page, status_page
from remote_vae.vae.families import Family
from remote_vae.version import __version__
from remote_vae.wire import (
    DecodeRequest,
    EncodeRequest,
    HttpResponse,
    Output,
    TensorHead,
    decode_size,
    encode_size,
    error_detail,
    error_response,
    tensor_head,
)
from remote_vae.wire.http import BASE64_TYPE

log = logging.getLogger("remote_vae")
# A line a call: ``remote-vae serve`` shows them.
calls = logging.getLogger("remote_vae.calls")

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Read = Callable[[bytearray], Union[DecodeRequest, EncodeRequest]]

# JSON and base64 around the values of a legacy body.
_BASE64_OVERHEAD = 4 / 3
_SLACK = 4096
# A PNG of noise is a little larger than its values, which are 3 or 4.
_IMAGE_BYTES_PER_PIXEL = 4
# Of noise, at the quality that is made; a film takes a tenth of it.
_MP4_BYTES_PER_PIXEL = 2
# Of pixels, at the most: with alpha.
_CHANNELS = 4
# An answer goes out in such pieces: what a client has not read yet of it waits here once, and not in the connection again.
_PIECE = 512 * 1024
# A client that is refused before its body was read gets so long (seconds) to read why.
_LINGER = 2.0
# The server's own connections end with a stalled answer; under a host's this does it, a little later.
_STALL_SLACK = 5.0

_STATUS: dict[type[Exception], int] = {
    TooLarge: 413,
    Stalled: 408,
    Busy: 503,
    UnknownModel: 404,
    NoModel: 503,
    OutOfMemory: 507,
    NotFinite: 422,
}


def create_app(engine: Engine, token: str = "", access: Access | None = None, endpoints: Sequence[str] = ()) -> Starlette:
    """The server's app. With ``token``, every path but / and /health wants ``Authorization: Bearer <token>``.

    Args:
        engine: the VAE.
        token: "" lets everyone in.
        access: another rule than that of the token, which then has no meaning.
        endpoints: under which it is reached, for the page at /, where that is known.
    """
    refusal = access or by_token(token)

    async def page(request: Request) -> Response:
        refused = refusal(request)
        if refused is not None:
            return HTMLResponse(closed_page(error_detail(refused.body)), headers=HEADERS)
        with_vae = None
        with suppress(NoModel):
            with_vae = await engine.ask_info()
        return HTMLResponse(status_page(with_vae, engine.status(), endpoints), headers=HEADERS)

    async def health(request: Request) -> Response:
        # How busy it is, is for those who may use it.
        return JSONResponse({"status": "ok"} if refusal(request) else engine.health())

    async def info(request: Request) -> Response:
        refused = refusal(request)
        if refused is not None:
            return _starlette(refused)
        try:
            return JSONResponse({"server": "remote-vae", "version": __version__, **await engine.ask_info()})
        except Exception as error:
            return _starlette(_error(error))

    decode, encode = _Call(engine, refusal, _decode), _Call(engine, refusal, _encode)
    routes = [Route("/", page, methods=["GET"])]
    for slash in ("", "/"):
        routes += [
            Route(f"/health{slash}", health, methods=["GET"]),
            Route(f"/info{slash}", info, methods=["GET"]),
            Route(f"/decode{slash}", decode, methods=["POST"]),
            Route(f"/encode{slash}", encode, methods=["POST"]),
        ]
    # A Hugging Face endpoint has no path; its clients are pointed at one URL and decode there.
    routes.append(Route("/", decode, methods=["POST"]))
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


@dataclass(frozen=True)
class _Wanted:
    """What a request wants, by its head: what it takes, how long its body may be, and how that is read."""

    place: Place
    limit: int
    entry: Entry
    read: Read


async def _decode(engine: Engine, request: Request) -> _Wanted:
    query = request.query_params.multi_items()
    head = tensor_head(query)
    if head is None:
        raise InvalidRequest("the query lacks shape and dtype; a picture is encoded at /encode")
    values = dict(query)
    headers = {name.lower(): value for name, value in request.headers.items()}
    accept = headers.get("accept", "").lower()
    output = Output.from_http(values, accept)
    size = _whole(values.get("height")), _whole(values.get("width"))
    entry = await engine.pick(None, values.get("family"), values.get("fingerprint"), partial(_decodes, head, *size))
    made = engine.check_decode(entry, head, *size, output)
    answer = made.pixels * _bytes_per_pixel(output, head) * (_BASE64_OVERHEAD if BASE64_TYPE in accept else 1)
    limit = int(head.nbytes * _BASE64_OVERHEAD) + _SLACK
    place = engine.admission.enter("decode", made.pixels, _length(request, limit) + int(answer))
    place.size, place.model = made, entry.name
    return _Wanted(place, limit, entry, partial(DecodeRequest.from_http, query, headers))


async def _encode(engine: Engine, request: Request) -> _Wanted:
    query = request.query_params.multi_items()
    head = tensor_head(query)
    limits = engine.limits
    values = dict(query)
    fits = partial(_encodes, head) if head is not None else None
    entry = await engine.pick(None, values.get("family"), values.get("fingerprint"), fits)
    taken = engine.check_encode(entry, head)
    limit = (head.nbytes if head is not None else limits.max_pixels * _IMAGE_BYTES_PER_PIXEL) + _SLACK
    length = _length(request, limit)
    # Of a picture's file nobody knows how much it holds.
    place = engine.admission.enter("encode", taken.pixels if taken else length, length)
    place.size, place.model = taken, entry.name
    return _Wanted(place, limit, entry, partial(EncodeRequest.from_http, query, max_pixels=limits.max_pixels))


def _decodes(head: TensorHead, height: int | None, width: int | None, family: Family) -> bool:
    """Whether latents are for a VAE of ``family``."""
    with suppress(InvalidRequest):
        decode_size(head.shape, height, width, family)
        return True
    return False


def _encodes(head: TensorHead, family: Family) -> bool:
    """Whether pixels are for a VAE of ``family``."""
    with suppress(InvalidRequest):
        encode_size(head.shape, family)
        return True
    return False


def _bytes_per_pixel(output: Output, head: TensorHead) -> int:
    """Of a decode's answer, at the most."""
    if output is Output.MP4:
        return _MP4_BYTES_PER_PIXEL
    if output in (Output.TENSOR, Output.UNIT):
        # Whole numbers are answered in the dtype of the VAE.
        return _CHANNELS * (head.dtype.itemsize if head.dtype.is_floating_point else 4)
    return _CHANNELS


@dataclass(frozen=True)
class _Call:
    """The ASGI app of a path that does VAE calls."""

    engine: Engine
    refusal: Access
    wanted: Callable[[Engine, Request], Awaitable[_Wanted]]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        request = Request(scope)
        refused = self.refusal(request)
        if refused is None:
            try:
                wanted = await self.wanted(self.engine, request)
            except Exception as error:
                refused = _error(error)
        if refused is not None:
            await self._refuse(request, refused, receive, send)
            return
        try:
            await self._serve(request, wanted, receive, send)
        finally:
            self.engine.admission.leave(wanted.place)

    async def _serve(self, request: Request, wanted: _Wanted, receive: Receive, send: Send) -> None:
        place, stall = wanted.place, self.engine.limits.stall
        try:
            body = await read_body(receive, place, wanted.limit, stall)
        except ClientGone as error:
            log.debug("%s: %s", _who(request), error)
            return
        except (TooLarge, Stalled) as error:
            await self._refuse(request, _error(error), receive, send)
            return
        try:
            answer = await self.engine.run(place, wanted.entry, wanted.read, body, _leaving(receive))
        except ClientGone as error:
            _note(request, place, str(error))
            return
        except Exception as error:
            answer = _error(error)
        # A slow reader need not keep what he sent in memory. What he gets, nobody knew before of a picture's file.
        del body
        place.nbytes = len(answer.body)
        size = f"{len(answer.body) / 1e6:.1f} MB" if answer.status == 200 else error_detail(answer.body)
        _note(request, place, f"{answer.status}, {size}")
        if not await _send(answer, send, stall + _STALL_SLACK):
            log.debug("%s does not read its answer", _who(request))

    async def _refuse(self, request: Request, answer: HttpResponse, receive: Receive, send: Send) -> None:
        """Answer before the body was read. The connection ends with it, so that nobody reads on without an end."""
        # Not the request's URL, which an older Starlette, as A1111 has, cannot make of every Host header.
        calls.info("%s for %s: %d, %s", request.scope["path"], _who(request), answer.status, error_detail(answer.body))
        answer = replace(answer, headers={**answer.headers, "Connection": "close"})
        await _send_head(answer, send)
        await send({"type": "http.response.body", "body": bytes(answer.body), "more_body": True})
        with suppress(asyncio.TimeoutError):
            # To close at once what still sends would tear the answer down with it.
            await asyncio.wait_for(_discard(receive), _LINGER)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(answer: HttpResponse, send: Send, stall: float) -> bool:
    """Send it in pieces. False: a piece was not read in ``stall`` seconds, and the rest is not sent."""
    await _send_head(answer, send)
    body = memoryview(answer.body)
    for start in range(0, max(len(body), 1), _PIECE):
        piece = bytes(body[start : start + _PIECE])
        message = {"type": "http.response.body", "body": piece, "more_body": start + _PIECE < len(body)}
        try:
            await asyncio.wait_for(send(message), stall)
        except asyncio.TimeoutError:
            return False
    return True


async def _send_head(answer: HttpResponse, send: Send) -> None:
    headers = {**answer.headers, "Content-Length": str(len(answer.body))}
    raw = [(name.lower().encode("latin1"), value.encode("latin1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


async def _leaving(receive: Receive) -> None:
    """Ends when the client hangs up; to be awaited after the body was read.

    Not ``request.is_disconnected``, which never tells behind the middleware of the web UIs (Starlette's BaseHTTPMiddleware).
    """
    while (await receive())["type"] != "http.disconnect":
        pass


def _length(request: Request, limit: int) -> int:
    """Bytes of the body, as far as the head says them. Raises TooLarge."""
    declared = request.headers.get("content-length", "")
    if not declared.isdigit():
        return limit if "transfer-encoding" in request.headers else 0
    if len(declared) > len(str(limit)) or int(declared) > limit:
        raise TooLarge(f"a body of {declared[:20]} bytes, and at most {limit} belong to this request")
    return int(declared)


def _error(error: Exception) -> HttpResponse:
    """The answer to a request that failed so."""
    if isinstance(error, RecursionError):
        return error_response(400, "the body is nested too deeply")
    if isinstance(error, (InvalidRequest, SettingsError)):
        return error_response(400, str(error))
    if not isinstance(error, RemoteVaeError):
        log.error("the call failed", exc_info=error)
        return error_response(500, f"{type(error).__name__}: {error}")
    answer = error_response(_STATUS.get(type(error), 500), str(error))
    if isinstance(error, Busy):
        return replace(answer, headers={**answer.headers, "Retry-After": str(error.retry_after)})
    return answer


def _note(request: Request, place: Place, what: str) -> None:
    """The line of a call that came to its end."""
    size = f" {place.size}" if place.size else ""
    calls.info("%s%s for %s: %s; waited %.2f s, took %.2f s", place.op, size, _who(request), what, *place.times())


def _who(request: Request) -> str:
    return request.client.host if request.client else "someone"


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 6 else None


def _starlette(answer: HttpResponse) -> Response:
    return Response(bytes(answer.body), status_code=answer.status, headers=dict(answer.headers))


async def _http_error(request: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", str(error))
    return _starlette(error_response(status, f"{detail}: {request.method} {request.scope['path']}"))
