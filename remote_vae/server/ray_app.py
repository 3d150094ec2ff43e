"""The server on many machines: Ray Serve starts, watches and updates the replicas.

    serve run remote_vae.server.ray_app:app vaes=sdxl=/models/sdxl_vae,flux=black-forest-labs/FLUX.1-dev num_gpus=0.5
    serve deploy docs/cluster.yaml

One deployment a VAE, named as in the paths, each of its replicas with the app of ``remote-vae serve``; and the front, to which
every request comes. A deployment's numbers can be given as arguments here or, as for every application of Ray Serve, under
``deployments`` in the YAML.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, TaskCancelledError, WorkerCrashedError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from remote_vae.errors import SettingsError
from remote_vae.server.admission import Limits
from remote_vae.server.app import create_app
from remote_vae.server.catalogue import NoModel, OneVae
from remote_vae.server.config import FAST_MODES, FAST_SIZES, is_name, sizes_of, token_of
from remote_vae.server.engine import Engine, batch_pixels_on
from remote_vae.server.fast import Fast
from remote_vae.server.front import AllBusy, Front, Head, Message, ReplicaGone, Replicas
from remote_vae.server.metrics import metrics

log = logging.getLogger("remote_vae")

FRONT = "front"
# Of the front, which only passes on what it gets.
_FRONT_ONGOING = 1000
# A replica that is told to end may finish what it has begun, and an update waits for that (seconds).
_GOODBYE = 120.0
_HEALTH_EVERY = 5.0
# Pieces of an answer are joined up to so many bytes: each is an object of Ray's.
_PIECE = 8 << 20
_OK = 200


@dataclass(frozen=True)
class Vae:
    """What is said of one VAE, or of all in one place; the numbers are those of Ray Serve's deployments, under their names.

    Attributes:
        source, family, dtype, device, fast, fast_sizes: as of ``remote-vae serve``.
        num_gpus: of each replica; 0.5 puts two on one card, which share its memory.
        num_cpus: of each replica, which computes in so many threads where it has no card.
        min_replicas, max_replicas: between them their number follows the queue.
        target_ongoing_requests: calls at work or waiting, a replica; more of them, and a replica is added.
        max_ongoing_requests: that a replica takes at once, so that it can join them and fetch the next while it computes.
        max_queued_requests: that wait at each front beside those; more are refused.
    """

    source: str = ""
    family: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    fast: str = "exact"
    fast_sizes: str = ",".join(FAST_SIZES)
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 2.0
    max_ongoing_requests: int = 4
    max_queued_requests: int = 64


def app(arguments: Mapping[str, Any]) -> Application:
    """The application, for ``serve run`` and for ``import_path`` in a YAML.

    Args:
        arguments: ``vaes``: a mapping of name to source or to a mapping of ``Vae``, or "NAME=SOURCE,NAME=SOURCE"; ``fronts``:
            how many (1); ``max_pixels``, ``max_video_pixels``, ``token_file``: as of ``remote-vae serve``, the file on each
            machine with a front; all else is said of every VAE.

    Raises:
        SettingsError: an argument that there is not, or that is no number.
    """
    given = dict(arguments)
    vaes = _named(given.pop("vaes", None))
    fronts = _number("fronts", given.pop("fronts", 1), int)
    bounds = {name: _number(name, given.pop(name), int) for name in ("max_pixels", "max_video_pixels") if name in given}
    limits, token_file = Limits(**bounds), given.pop("token_file", None)
    usual = _vae(Vae(), given, "")
    each = {name: _vae(usual, said, f"vaes.{name}.") for name, said in vaes.items()}
    bound = [_deployment(name, vae).bind(name, vae, limits) for name, vae in each.items()]
    front = serve.deployment(_Front).options(
        name=FRONT,
        num_replicas=fronts,
        max_ongoing_requests=_FRONT_ONGOING,
        graceful_shutdown_timeout_s=_GOODBYE,
        health_check_period_s=_HEALTH_EVERY,
        # It computes nothing, and is wanted where all processors are taken.
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(list(each), limits, token_file, *bound)


# --- arguments -----------------------------------------------------------------------------------------------------------


def _named(vaes: object) -> dict[str, Mapping[str, Any]]:
    """What is said of each VAE, by name. Raises SettingsError: none, or two of one name."""
    example = "such as vaes=sdxl=/models/sdxl_vae,flux=black-forest-labs/FLUX.1-dev"
    if isinstance(vaes, str):
        pairs = [pair.strip().partition("=") for pair in vaes.split(",") if pair.strip()]
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise SettingsError(f"vaes: two have the same name in {vaes}")
        vaes = {name: source for name, _, source in pairs}
    if not isinstance(vaes, Mapping) or not vaes:
        raise SettingsError(f"vaes: name at least one VAE, {example}")
    found: dict[str, Mapping[str, Any]] = {}
    for name, said in vaes.items():
        said = {"source": said} if isinstance(said, str) else said
        if not isinstance(said, Mapping) or not said.get("source"):
            raise SettingsError(f"vaes: {name} has no source, {example}")
        if not is_name(str(name)) or name == FRONT:
            raise SettingsError(f"vaes: {name} cannot be the name of a VAE: letters, digits, dots and dashes, and not {FRONT}")
        found[str(name)] = said
    return found


def _vae(usual: Vae, said: Mapping[str, Any], where: str) -> Vae:
    kinds = {field.name: type(getattr(Vae(), field.name)) for field in fields(Vae)}
    for name in said:
        if name not in kinds:
            raise SettingsError(f"{where}{name}: there is no such argument; there are {', '.join(kinds)}")
    changed = {name: _number(where + name, value, kinds[name]) for name, value in said.items()}
    vae = replace(usual, **changed)
    if vae.fast not in FAST_MODES:
        raise SettingsError(f"{where}fast must be one of {', '.join(FAST_MODES)}, not {vae.fast}")
    sizes_of(str(vae.fast_sizes).split(","))
    if vae.max_replicas < vae.min_replicas:
        # One number of them was given.
        vae = replace(vae, max_replicas=vae.min_replicas)
    return vae


def _number(name: str, value: object, kind: type) -> Any:
    """``value``, which of ``serve run`` is a text. Raises SettingsError."""
    if kind not in (int, float):
        return value
    try:
        number = kind(str(value))
    except ValueError:
        raise SettingsError(f"{name} must be a number, not {value}") from None
    if number < 0:
        raise SettingsError(f"{name} must be 0 or more, not {value}")
    return number


def _deployment(name: str, vae: Vae) -> serve.Deployment:
    options = {"num_gpus": vae.num_gpus, "num_cpus": vae.num_cpus}
    scaled = {"min_replicas": vae.min_replicas, "max_replicas": vae.max_replicas}
    return serve.deployment(_Replica).options(
        name=name,
        # Where the number is fixed, nobody has to watch the queue for it.
        **(
            {"autoscaling_config": {**scaled, "target_ongoing_requests": vae.target_ongoing_requests}}
            if vae.max_replicas > vae.min_replicas
            else {"num_replicas": vae.min_replicas}
        ),
        max_ongoing_requests=vae.max_ongoing_requests,
        max_queued_requests=vae.max_queued_requests,
        graceful_shutdown_timeout_s=_GOODBYE,
        health_check_period_s=_HEALTH_EVERY,
        ray_actor_options=options,
    )


# --- the processes -------------------------------------------------------------------------------------------------------


class _Replica:
    """One process of a VAE: the app of a single server, asked through Ray."""

    def __init__(self, name: str, vae: Vae, limits: Limits) -> None:
        # All that is to be done is done before Ray sends calls here: none is loaded later, or put away.
        fast = Fast(vae.fast, sizes_of(str(vae.fast_sizes).split(",")))
        loaded = fast.load(vae.source, family=vae.family, dtype=vae.dtype, device=vae.device)
        batch_pixels = batch_pixels_on([loaded.device])
        self._engine = Engine(OneVae(loaded, name, loaded.about), limits, batch_pixels=batch_pixels, watcher=metrics())
        # The front has let the caller in, and nobody else gets here.
        self._app = create_app(self._engine)

    async def ask(self, head: Head, body: np.ndarray) -> AsyncIterator[Sequence[Message]]:
        """The ASGI messages of the answer to one request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        came = [{"type": "http.request", "body": body.data, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if came:
                return came.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await self._app(head.scope(), receive, messages.put)
            finally:
                messages.put_nowait(None)

        at_work = asyncio.ensure_future(work())
        try:
            while (message := await messages.get()) is not None:
                yield _joined(message, messages)
            await at_work
        finally:
            # The front is gone, or nobody waits there any more: the call ends where it can.
            gone.set()

    async def health(self) -> dict[str, Any]:
        """What the front needs to know of its work."""
        return self._engine.health()

    async def info(self) -> Mapping[str, Any]:
        """What it answers to ``GET /info``; nothing while it cannot."""
        body, status = b"", 0
        async for messages in self.ask(Head("GET", "/info"), np.empty(0, dtype=np.uint8)):
            for message in messages:
                status = message.get("status", status)
                body += message.get("body", b"")
        return json.loads(body) if status == _OK else {}


def _joined(message: Message, more: asyncio.Queue[Message | None]) -> list[Message]:
    """``message`` and what has come behind it, pieces of a body as one."""
    messages: list[Message] = []
    pieces: list[bytes] = []
    size = 0
    waiting: Message | None = message
    while waiting is not None:
        if waiting["type"] == "http.response.body":
            pieces.append(waiting.get("body", b""))
            size += len(pieces[-1])
            last = not waiting.get("more_body", False)
            if last or size >= _PIECE or more.empty():
                messages.append({"type": "http.response.body", "body": b"".join(pieces), "more_body": not last})
                return messages
        else:
            messages.append(waiting)
            if more.empty():
                return messages
        waiting = more.get_nowait()
    more.put_nowait(None)
    if pieces:
        messages.append({"type": "http.response.body", "body": b"".join(pieces), "more_body": True})
    return messages


# What is raised for a call whose process, or whose machine, is no more.
_GONE = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError, TaskCancelledError)


class _Handle:
    """The replicas of one VAE, through Ray. See ``front.Replicas``."""

    def __init__(self, name: str, handle: DeploymentHandle[Any]) -> None:
        self.name = name
        self._handle = handle
        self._asking = handle.options(stream=True, method_name="ask")

    async def ask(self, head: Head, body: bytes | bytearray) -> AsyncIterator[Sequence[Message]]:
        """As ``Replicas.ask``."""
        answer = self._asking.remote(head, np.frombuffer(body, dtype=np.uint8))
        try:
            async for messages in answer:
                yield messages
        except BackPressureError:
            raise AllBusy(f"as many calls as may are waiting for {self.name}; try again later") from None
        except DeploymentUnavailableError as error:
            raise NoModel(f"{self.name} cannot be served: {error}") from None
        except _GONE as error:
            raise ReplicaGone(f"the replica of {self.name} that worked on it has ended: {type(error).__name__}") from error
        except (GeneratorExit, asyncio.CancelledError):
            # Nobody waits for it any more. That it has failed, or never got to a replica, is of no matter.
            with suppress(Exception):
                answer.cancel()
            raise

    async def healths(self) -> Sequence[Mapping[str, Any]]:
        """As ``Replicas.healths``."""
        return await self._all("health")

    async def infos(self) -> Sequence[Mapping[str, Any]]:
        """As ``Replicas.infos``."""
        return await self._all("info")

    async def _all(self, method: str) -> Sequence[Mapping[str, Any]]:
        """What those of all replicas say that say something."""
        said = await self._handle.broadcast(method).results_async(return_exceptions=True)
        return [each for each in said if isinstance(each, Mapping) and each]


class _Front:
    """The process that every request comes to."""

    def __init__(self, names: Sequence[str], limits: Limits, token_file: str | None, *handles: DeploymentHandle[Any]) -> None:
        vaes: list[Replicas] = [_Handle(name, handle) for name, handle in zip(names, handles, strict=True)]
        # Of the file, or of the environment in which Ray was started on this machine: in no argument, as Ray shows those.
        self._front = Front(vaes, token_of(token_file), limits)

    async def __call__(self, request: Request) -> Response:
        del request
        return _Asgi(self._front)


class _Asgi(Response):
    """An answer that is made while it is sent."""

    def __init__(self, front: Front) -> None:
        super().__init__()
        self._front = front

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._front(scope, receive, send)
