"""A VAE call over HTTP: a place by the head of the request, then its body, then the VAE, then the answer in pieces."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Union

from starlette.requests import Request
from starlette.responses import Response

from remote_vae.errors import InvalidRequest, NotFinite, OutOfMemory, RemoteVaeError, SettingsError
from remote_vae.server import logs
from remote_vae.server.admission import Busy, ClientGone, Place, Receive, Size, Stalled, TooLarge, read_body
from remote_vae.server.catalogue import Entry, Fits, NoModel, OtherVae, UnknownModel, named
from remote_vae.server.engine import Engine
from remote_vae.server.heads import (
    BASE64_OVERHEAD,
    FILE_BYTES_PER_PIXEL,
    SLACK,
    Send,
    asked_size,
    body_length,
    fits_of,
    leaving,
    send_head,
)
from remote_vae.server.late import Late
from remote_vae.server.metrics import Metrics
from remote_vae.vae.at_work import Op
from remote_vae.wire import (
    DecodeRequest,
    EncodeRequest,
    HttpResponse,
    Output,
    TensorHead,
    error_detail,
    error_response,
    tensor_head,
)
from remote_vae.wire.extras import ENCODING, Extras
from remote_vae.wire.http import BASE64_TYPE
from remote_vae.wire.late import late_head
from remote_vae.wire.timing import timing_header

log = logging.getLogger("remote_vae")

Read = Callable[[bytearray], Union[DecodeRequest, EncodeRequest]]

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
# What proxies write where the client hung up before its answer.
_CLIENT_GONE = 499

_STATUS: dict[type[Exception], int] = {
    TooLarge: 413,
    Stalled: 408,
    Busy: 503,
    UnknownModel: 404,
    OtherVae: 409,
    NoModel: 503,
    OutOfMemory: 507,
    NotFinite: 422,
}


class Call(Response):
    """The answer to a request for a VAE call; nothing is done before it is sent, as the body comes in its own time.

    Args:
        engine: the VAEs.
        op: what is asked for.
        refused: what the request is refused with without being looked at.
        name: of the VAE in the path; None: none stands there.
    """

    def __init__(self, engine: Engine, op: Op, refused: HttpResponse | None, name: str | None) -> None:
        super().__init__()
        self._engine = engine
        self._op = op
        self._refused = refused
        self._name = name

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        request = Request(scope)
        refused = self._refused
        if refused is None:
            try:
                self._engine.admission.check()
                named(self._engine.catalogue.entries(), self._name)
                wanted = _admitted(self._engine, request, _HEADS[self._op](self._engine, request, self._name))
            except Exception as error:
                refused = error_answer(error)
        if refused is not None:
            if isinstance(self._engine.watcher, Metrics):
                self._engine.watcher.refused(self._op, refused.status)
            await _refuse(request, refused, receive, send)
            return
        try:
            await self._serve(request, wanted, receive, send)
        finally:
            self._engine.admission.leave(wanted.place)

    async def _serve(self, request: Request, wanted: _Wanted, receive: Receive, send: Send) -> None:
        place, stall, watcher = wanted.place, self._engine.limits.stall, self._engine.watcher
        try:
            body = await read_body(receive, place, wanted.limit, stall)
        except ClientGone as error:
            _note(request, place, _CLIENT_GONE, error=str(error))
            watcher.call_ended(place, _CLIENT_GONE, 0, 0)
            return
        except (TooLarge, Stalled) as error:
            refused = error_answer(error)
            watcher.call_ended(place, refused.status, 0, 0)
            await _refuse(request, refused, receive, send)
            return
        received = len(body)
        late = Late(send, is_wanted=wanted.head.extras.late)
        try:
            answer = await late.until(self._made(wanted, body, receive))
        except ClientGone as error:
            _note(request, place, _CLIENT_GONE, received, error=str(error))
            watcher.call_ended(place, _CLIENT_GONE, received, 0)
            return
        except asyncio.CancelledError:
            if self._engine.admission.closed is None:
                raise
            await _stopped(send, late)
            return
        except Exception as error:
            answer = error_answer(error)
        # A slow reader need not keep what he sent in memory. What he gets, nobody knew before of a picture's file.
        del body
        place.nbytes = len(answer.body)
        answer = replace(answer, headers={**answer.headers, **timing_header(place.stages)})
        said = "" if answer.status == 200 else error_detail(answer.body)
        _note(request, place, answer.status, received, len(answer.body), error=said)
        started = time.monotonic()
        if not await _send(answer, send, stall + _STALL_SLACK, late):
            log.debug("%s does not read its answer", _client(request))
        place.stages["send"] = time.monotonic() - started
        watcher.call_ended(place, answer.status, received, len(answer.body))

    async def _made(self, wanted: _Wanted, body: bytearray, receive: Receive) -> HttpResponse:
        entry = await wanted.entry()
        return await self._engine.run(wanted.place, entry, wanted.head.read, body, leaving(receive))


# --- by the head of the request ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    """What the head of a request says.

    Attributes:
        which: VAE it is for, as ``Engine.pick`` wants it.
        limit: bytes that its body may have.
        sized: by the VAE, what that makes or takes, and how many bytes come of it beside the body; None: nobody knows before
            the body was read. Raises InvalidRequest, NoModel.
        read: reads the body.
        is_packed: whether the body takes more memory than it has bytes, up to the limit.
    """

    op: Op
    which: tuple[str | None, str | None, str | None, Fits | None]
    limit: int
    sized: Callable[[Entry], tuple[Size | None, int]]
    read: Read
    extras: Extras
    is_packed: bool = False


def _decode(engine: Engine, request: Request, name: str | None) -> _Head:
    query = request.query_params.multi_items()
    head = tensor_head(query)
    if head is None:
        raise InvalidRequest("the query lacks shape and dtype; a picture is encoded at /encode")
    values, headers = dict(query), _by_lower_name(request)
    accept = headers.get("accept", "").lower()
    output = Output.from_http(values, accept)
    each = _bytes_per_pixel(output, head) * (BASE64_OVERHEAD if BASE64_TYPE in accept else 1)

    def sized(entry: Entry) -> tuple[Size, int]:
        made = engine.check_decode(entry, head, *asked_size(values), output)
        return made, int(made.pixels * each)

    which = name, values.get("family"), values.get("fingerprint"), fits_of("decode", head, values)
    limit = int(head.nbytes * BASE64_OVERHEAD) + SLACK
    read = partial(DecodeRequest.from_http, query, headers)
    return _Head("decode", which, limit, sized, read, Extras.from_headers(headers))


def _encode(engine: Engine, request: Request, name: str | None) -> _Head:
    query = request.query_params.multi_items()
    head = tensor_head(query)
    limits = engine.limits
    values, headers = dict(query), _by_lower_name(request)
    # What waits is made of whole numbers: as many values of float32.
    more = 4 * head.nbytes if head is not None and not head.dtype.is_floating_point else 0
    which = name, values.get("family"), values.get("fingerprint"), fits_of("encode", head, values)
    limit = (head.nbytes if head is not None else limits.max_pixels * FILE_BYTES_PER_PIXEL) + SLACK
    read = partial(EncodeRequest.from_http, query, max_pixels=limits.max_pixels, headers=headers)
    return _Head(
        "encode",
        which,
        limit,
        lambda entry: (engine.check_encode(entry, head), more),
        read,
        Extras.from_headers(headers),
        is_packed=ENCODING.lower() in headers,
    )


_HEADS: dict[Op, Callable[[Engine, Request, str | None], _Head]] = {"decode": _decode, "encode": _encode}


@dataclass(frozen=True)
class _Wanted:
    """A request that is let in: its place, how long its body may be, and its VAE, which may be loaded for it."""

    head: _Head
    place: Place
    limit: int
    entry: Callable[[], Awaitable[Entry]]


def _admitted(engine: Engine, request: Request, head: _Head) -> _Wanted:
    """By what is known of the VAE; where that is nothing, it is loaded when the body is here, so that the client hears of it.

    Raises:
        InvalidRequest, SettingsError, UnknownModel, NoModel, TooLarge, Busy.
    """
    known = engine.known(*head.which)
    size, more = head.sized(known) if known is not None else (None, 0)
    # Of a tensor for nobody knows what, no more is taken than of all requests together.
    limit = head.limit if known is not None else min(head.limit, engine.limits.max_bytes)
    length = body_length(request, limit)
    if head.is_packed:
        length = limit
    # Of a picture's file nobody knows how much it holds.
    pixels = size.pixels if size is not None else length
    place = engine.admission.enter(head.op, pixels, length + more, known.name if known is not None else "")
    place.size = size

    async def entry() -> Entry:
        if known is not None:
            return known
        found = await engine.pick(*head.which)
        size, more = head.sized(found)
        engine.admission.grow(place, more)
        place.model, place.size = found.name, size
        if size is not None:
            place.pixels = size.pixels
        return found

    return _Wanted(head, place, limit, entry)


def _by_lower_name(request: Request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def _bytes_per_pixel(output: Output, head: TensorHead) -> int:
    """Of a decode's answer, at the most."""
    if output is Output.MP4:
        return _MP4_BYTES_PER_PIXEL
    if output in (Output.TENSOR, Output.UNIT):
        # Whole numbers are answered in the dtype of the VAE.
        return _CHANNELS * (head.dtype.itemsize if head.dtype.is_floating_point else 4)
    return _CHANNELS


# --- the answer ----------------------------------------------------------------------------------------------------------


def error_answer(error: Exception) -> HttpResponse:
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


async def _refuse(request: Request, answer: HttpResponse, receive: Receive, send: Send) -> None:
    """Answer before the body was read. The connection ends with it, so that nobody reads on without an end."""
    # Not the request's URL, which an older Starlette, as A1111 has, cannot make of every Host header.
    path = request.scope["path"]
    logs.write(logs.CallLine(path, _client(request), answer.status, error=error_detail(answer.body)))
    answer = replace(answer, headers={**answer.headers, "Connection": "close"})
    await send_head(answer, send)
    await send({"type": "http.response.body", "body": bytes(answer.body), "more_body": True})
    with suppress(asyncio.TimeoutError):
        # To close at once what still sends would tear the answer down with it.
        await asyncio.wait_for(_discard(receive), _LINGER)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(answer: HttpResponse, send: Send, stall: float, late: Late) -> bool:
    """Send it in pieces. False: a piece was not read in ``stall`` seconds, and the rest is not sent."""
    await _begin(answer, send, late)
    body = memoryview(answer.body)
    for start in range(0, max(len(body), 1), _PIECE):
        piece = bytes(body[start : start + _PIECE])
        message = {"type": "http.response.body", "body": piece, "more_body": start + _PIECE < len(body)}
        try:
            await asyncio.wait_for(send(message), stall)
        except asyncio.TimeoutError:
            return False
    return True


async def _stopped(send: Send, late: Late) -> None:
    """The server goes, and has waited long enough for what had begun: without a wait, in which it would be ended once more."""
    answer = error_answer(Busy("this server was stopped before the call was done; try again"))
    await _begin(answer, send, late)
    await send({"type": "http.response.body", "body": bytes(answer.body)})


async def _begin(answer: HttpResponse, send: Send, late: Late) -> None:
    """The head, or where the answer has begun before it was made, what stands for it."""
    if late.has_begun:
        await send({"type": "http.response.body", "body": late_head(answer), "more_body": True})
    else:
        await send_head(answer, send)


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


def _note(request: Request, place: Place, status: int, received: int = 0, sent: int = 0, *, error: str = "") -> None:
    """The line of a call that came to its end, but for the sending of its answer."""
    client, size, times = _client(request), str(place.size or ""), place.times()
    logs.write(logs.CallLine(place.op, client, status, place.model, size, place.batch, *times, received, sent, error))


def _client(request: Request) -> str:
    return request.client.host if request.client else "someone"
