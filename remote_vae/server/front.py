"""The front of a cluster: picks the VAE that a request is for, and hands it to one of that VAE's replicas.

A replica runs the same app as a single server does, and what it answers goes out as it is. A call changes nothing, so a replica
that dies under one costs a second try, by another replica. Knows nothing of Ray: ``ray_app`` gives it the replicas.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from starlette.requests import Request

from remote_vae.errors import MalformedAnswer, RemoteVaeError
from remote_vae.server.access import by_token
from remote_vae.server.admission import Admission, Busy, ClientGone, Limits, Receive, Stalled, TooLarge, read_body
from remote_vae.server.calls import error_answer
from remote_vae.server.catalogue import NoModel, check_family, named, pick
from remote_vae.server.heads import (
    BASE64_OVERHEAD,
    FILE_BYTES_PER_PIXEL,
    SLACK,
    Send,
    body_length,
    fits_of,
    leaving,
    send_head,
    size_of,
)
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import Family, load_families
from remote_vae.version import __version__
from remote_vae.wire import HttpResponse, TensorHead, error_response, expect_info, tensor_head

log = logging.getLogger("remote_vae")

Message = MutableMapping[str, Any]

_RETRY_AFTER = {"Retry-After": "1"}
# After a replica that died under a call another is asked, once: a call that ends every replica is to end no more of them.
_TRIES = 2
# What is known of a VAE is asked for anew after so many seconds: it may have been updated.
_KNOWN_SECONDS = 10.0
# Whoever asks how busy it is gets what was so this many seconds ago, at the most.
_HEALTH_SECONDS = 0.5
# A replica that does not say it in this time is not ready; one that has said nothing yet is asked again after a while.
_ASK_SECONDS = 2.0
_AGAIN_SECONDS = 1.0
# A call whose VAE has no replica after so long waits no longer: a new one may take minutes, or may never come.
_NONE_SECONDS = 30.0


class ReplicaGone(RemoteVaeError):
    """The replica died before it had answered."""


class AllBusy(RemoteVaeError):
    """As many calls wait for this VAE as may."""


@dataclass(frozen=True)
class Head:
    """A request without its body, as ASGI has it; ``path`` is without the name of the VAE."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    client: tuple[str, int] | None = None

    def scope(self) -> dict[str, Any]:
        """The ASGI scope."""
        return {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
            "method": self.method, "path": self.path, "raw_path": self.path.encode(), "query_string": self.query,
            "headers": list(self.headers), "client": self.client, "server": None,
        }  # fmt: skip


class Replicas(Protocol):
    """The replicas of one VAE."""

    name: str

    def ask(self, head: Head, body: bytes | bytearray) -> AsyncIterator[Sequence[Message]]:
        """The messages of one replica's answer, as they come; to leave the iterator ends the call.

        Raises:
            ReplicaGone, AllBusy. NoModel: it could not be started.
        """
        ...

    async def healths(self) -> Sequence[Mapping[str, Any]]:
        """What each replica that runs says of its work: "running" and "waiting"."""
        ...

    async def infos(self) -> Sequence[Mapping[str, Any]]:
        """What each replica that runs answers to ``GET /info``."""
        ...


@dataclass(frozen=True)
class _Known:
    """What is known of a VAE, as ``catalogue.pick`` wants it; until a replica has said it, its name alone.

    Attributes:
        document: what a replica answered to ``GET /info``.
        at: when (``time.monotonic``).
    """

    name: str
    family: Family | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    document: Mapping[str, Any] | None = None
    at: float = -math.inf

    @property
    def is_known(self) -> bool:
        return self.document is not None


class Front:
    """The ASGI app before the replicas.

    Args:
        vaes: in the order in which a request that names none tries them.
        token: "" lets everyone in.
        limits: of the bodies that are read at once; what a picture may have, the replicas check.
    """

    def __init__(self, vaes: Sequence[Replicas], token: str = "", limits: Limits | None = None) -> None:
        self._vaes = {vae.name: vae for vae in vaes}
        self._known = {vae.name: _Known(vae.name) for vae in vaes}
        self._refusal = by_token(token)
        # How long calls wait is the replicas' matter.
        self._limits = replace(limits or Limits(), max_waiting=1 << 20, max_wait=math.inf)
        self._admission = Admission(self._limits)
        self._took: dict[str, float] = {}
        self._working = 0
        self._health: tuple[float, Mapping[str, Any]] | None = None
        self._health_lock = asyncio.Lock()
        self._asking: asyncio.Future[None] | None = None
        self._asked = -math.inf

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        request = Request(scope)
        path = str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"
        try:
            answer = await self._answered(request, path, receive, send)
        except ClientGone as error:
            log.debug("%s: %s", path, error)
            return
        except ConnectionAbortedError as error:
            log.warning("%s: an answer was cut off: %s", path, error)
            # Ray ends the connection where an answer has begun and is not whole.
            return
        except Exception as error:
            answer = error_answer(error)
            if isinstance(error, (TooLarge, Stalled)):
                answer = _last(answer)
        if answer is not None:
            await _send(answer, send)

    async def _answered(self, request: Request, path: str, receive: Receive, send: Send) -> HttpResponse | None:
        """The answer to a request; None: it has been sent."""
        name, rest = self._split(path)
        refused = self._refusal(request)
        if request.method == "GET" and rest == "/health":
            # How busy it is, is for those who may use it.
            status, health = await self._healthy()
            return _json({"status": health["status"]} if refused else health, status)
        if refused is not None:
            return _last(refused)
        named(list(self._known.values()), name)
        if request.method == "POST" and rest in ("/", "/decode", "/encode"):
            await self._call(request, name, rest, receive, send)
            return None
        if request.method == "GET" and rest == "/info":
            return _json(await self._info(name))
        if request.method == "GET":
            # The page, and whatever else a server has that says nothing of all replicas.
            one = self._vaes[name or next(iter(self._vaes))]
            await self._forward(one, _head(request, rest), b"", receive, send)
            return None
        return error_response(405, f"Method Not Allowed: {request.method} {path}")

    def _split(self, path: str) -> tuple[str | None, str]:
        """The VAE that ``path`` names, if it names one, and what follows."""
        stem = path.rstrip("/") or "/"
        first, slash, rest = stem[1:].partition("/")
        return (first, f"/{rest}") if slash or first in self._vaes else (None, stem)

    # --- calls ---------------------------------------------------------------------------------------------------------

    async def _call(self, request: Request, name: str | None, path: str, receive: Receive, send: Send) -> None:
        op: Op = "encode" if path == "/encode" else "decode"
        head = tensor_head(request.query_params.multi_items())
        known = await self._pick(request, name, op, head)
        vae, limit = self._vaes[known.name], self._limit(known, request, op, head)
        place = self._admission.enter(op, 0, body_length(request, limit))
        self._working += 1
        try:
            body = await read_body(receive, place, limit, self._limits.stall)
            started = time.monotonic()
            await self._forward(vae, _head(request, path), body, receive, send)
            # Each weighs half of the one after it.
            self._took[vae.name] = (self._took.get(vae.name, 0.0) + time.monotonic() - started) / 2
        finally:
            self._working -= 1
            self._admission.leave(place)

    async def _pick(self, request: Request, name: str | None, op: Op, head: TensorHead | None) -> _Known:
        """The VAE of a request: see ``catalogue.pick``. Raises InvalidRequest, SettingsError: there is none of its family."""
        query = dict(request.query_params)
        # One that cannot be started costs the calls of the others nothing.
        await self._ask(of_all=not any(known.is_known for known in self._known.values()))
        fits = fits_of(op, head, query)
        return pick(list(self._known.values()), name, query.get("family"), query.get("fingerprint"), fits)

    def _limit(self, known: _Known, request: Request, op: Op, head: TensorHead | None) -> int:
        """Bytes that the body of a request may have.

        Raises:
            InvalidRequest: more pixels, pictures or frames than the limits allow, or a tensor that is not for this VAE.
        """
        if head is None:
            return self._limits.max_pixels * FILE_BYTES_PER_PIXEL + SLACK
        if known.family is not None:
            check_family(known.family, request.query_params.get("family"))
            self._limits.check(*size_of(op, head, dict(request.query_params), known.family))
        return min(int(head.nbytes * BASE64_OVERHEAD), self._limits.max_bytes) + SLACK

    async def _forward(self, vae: Replicas, head: Head, body: bytes | bytearray, receive: Receive, send: Send) -> None:
        """Send the answer of one of the replicas.

        Raises:
            ClientGone, Busy, NoModel. ReplicaGone: before the answer had begun. ConnectionAbortedError: after that.
        """
        call = asyncio.ensure_future(self._tried(vae, head, body, send))
        gone = asyncio.ensure_future(leaving(receive))
        try:
            wait = partial(asyncio.wait, {call, gone}, timeout=_NONE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            while not (await wait())[0]:
                if not await _has_replicas(vae):
                    raise NoModel(f"no replica of {vae.name} is there; try again in a few minutes")
            if not call.done():
                raise ClientGone("the client hung up")
            call.result()
        finally:
            gone.cancel()
            call.cancel()
            with suppress(BaseException):
                await call

    async def _tried(self, vae: Replicas, head: Head, body: bytes | bytearray, send: Send) -> None:
        for tries_left in reversed(range(_TRIES)):
            begun = False
            try:
                async for messages in vae.ask(head, body):
                    for message in messages:
                        begun = True
                        await send(message)
                return
            except Exception as error:
                if begun:
                    # What follows would be taken for the rest of the answer.
                    raise ConnectionAbortedError(f"{vae.name}: {error}") from error
                if isinstance(error, AllBusy):
                    # By then half of what is waiting now will be done.
                    raise Busy(str(error), self._took.get(vae.name, 2.0) / 2) from None
                if not isinstance(error, ReplicaGone) or not tries_left:
                    raise
                log.warning("%s: a replica died under a call; asked again", vae.name)

    # --- what is known of the VAEs ------------------------------------------------------------------------------------

    async def _ask(self, *, of_all: bool) -> None:
        """Have it known of each VAE what it is, from now or lately; what is a little old is asked for beside the calls.

        Args:
            of_all: wait for what those say of which nothing is known.
        """
        now = time.monotonic()
        is_old = any(now - known.at >= _KNOWN_SECONDS for known in self._known.values())
        is_asking = self._asking is not None and not self._asking.done()
        if is_old and not is_asking and now - self._asked >= _AGAIN_SECONDS:
            self._asking, self._asked = asyncio.ensure_future(self._ask_all()), now
        if of_all and self._asking is not None and not all(known.is_known for known in self._known.values()):
            await asyncio.shield(self._asking)

    async def _ask_all(self) -> None:
        said = await asyncio.gather(*(_soon(vae.infos()) for vae in self._vaes.values()))
        for name, documents in zip(self._vaes, said, strict=True):
            for document in documents[:1]:
                self._known[name] = _known(name, document)

    async def _info(self, name: str | None) -> dict[str, Any]:
        """``GET /info``: the VAEs, and of the first that is there once more what older clients read. Raises NoModel."""
        await self._ask(of_all=True)
        wanted = [each for each in self._known.values() if name in (None, each.name)]
        there = [each.document for each in wanted if each.document is not None]
        if not there:
            raise NoModel(f"no replica of {' or '.join(each.name for each in wanted)} is ready yet; try again in a minute")
        # What they say of the server, and of its one VAE.
        first = {key: value for key, value in there[0].items() if key != "models"}
        return {**first, "server": "remote-vae", "version": __version__, "models": [_model(each) for each in wanted]}

    async def _healthy(self) -> tuple[int, Mapping[str, Any]]:
        """The status and the document of ``GET /health``."""
        async with self._health_lock:
            if self._health is None or time.monotonic() - self._health[0] > _HEALTH_SECONDS:
                self._health = time.monotonic(), await self._asked_health()
        document = self._health[1]
        return (503 if "error" in document else 200), document

    async def _asked_health(self) -> Mapping[str, Any]:
        each = await asyncio.gather(*(_soon(vae.healths()) for vae in self._vaes.values()))
        said = [health for found in each for health in found]
        running = sum(bool(health.get("running")) for health in said)
        waiting = max(sum(int(health.get("waiting", 0)) for health in said), self._working - running, 0)
        replicas = {name: len(found) for name, found in zip(self._vaes, each, strict=True)}
        document = {"status": "ok", "running": running > 0, "waiting": waiting, "replicas": replicas}
        return document if said else {**document, "status": "no model", "error": "no replica is ready; try again in a minute"}


def _head(request: Request, path: str) -> Head:
    client = request.client
    return Head(
        request.method,
        path,
        request.scope["query_string"],
        tuple((bytes(name), bytes(value)) for name, value in request.scope["headers"] if name != b"authorization"),
        (client.host, client.port) if client else None,
    )


async def _has_replicas(vae: Replicas) -> bool:
    """Whether there are any; also where they do not say so in time, as those that work may not."""
    try:
        return bool(await asyncio.wait_for(vae.healths(), _ASK_SECONDS))
    except asyncio.TimeoutError:
        return True
    except Exception as error:  # of whatever has the replicas
        log.debug("%s: %s: %s", vae.name, type(error).__name__, error)
        return False


async def _soon(answers: Awaitable[Sequence[Mapping[str, Any]]]) -> Sequence[Mapping[str, Any]]:
    """What replicas say; nothing, where they do not say it in time, or there are none: those of other VAEs say theirs."""
    try:
        return await asyncio.wait_for(answers, _ASK_SECONDS)
    except Exception as error:  # of whatever has the replicas
        log.debug("the replicas do not say how they are: %s: %s", type(error).__name__, error)
        return []


def _known(name: str, document: Mapping[str, Any]) -> _Known:
    """What a replica says of itself; one that says nonsense is as unknown as before."""
    try:
        info = expect_info({}).finish(np.frombuffer(json.dumps(document).encode(), dtype=np.uint8))
    except MalformedAnswer as error:
        log.warning("%s: %s", name, error)
        return _Known(name)
    family = load_families().get(info.family, info.vae)
    return _Known(name, family, info.fingerprints, document, time.monotonic())


def _model(known: _Known) -> dict[str, Any]:
    """An entry of "models" in ``GET /info``."""
    if known.document is None:
        return {"name": known.name, "loaded": False}
    own = known.document.get("models") or [{}]
    return {**own[0], "name": known.name, "loaded": True}


def _last(answer: HttpResponse) -> HttpResponse:
    """``answer`` as the last over its connection: nobody reads the body that still comes."""
    return replace(answer, headers={**answer.headers, "Connection": "close"})


def _json(document: Mapping[str, Any], status: int = 200) -> HttpResponse:
    later = _RETRY_AFTER if status == 503 else {}
    return HttpResponse(status, {"Content-Type": "application/json", **later}, json.dumps(document).encode())


async def _send(answer: HttpResponse, send: Send) -> None:
    await send_head(answer, send)
    await send({"type": "http.response.body", "body": bytes(answer.body), "more_body": False})
