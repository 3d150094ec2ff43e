"""Runs the VAE for the server: one call at a time, in the order they came."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.server.admission import Admission, ClientGone, Limits, Place, Size
from remote_vae.server.calling import made
from remote_vae.server.catalogue import Catalogue, Entry, Fits, check_family
from remote_vae.server.moving import moved
from remote_vae.vae.at_work import VIDEO_DIMENSIONS, Op, VaeAtWork
from remote_vae.vae.frames import check_cells, check_frames, check_latent_frames
from remote_vae.vae.packed import BatchNormed, batch_norm_of
from remote_vae.wire import (
    DecodeRequest,
    EncodeRequest,
    HttpResponse,
    Output,
    TensorHead,
    decode_response,
    decode_size,
    encode_response,
    encode_size,
)


class Watcher(Protocol):
    """Is told what happens; called from any thread."""

    def call_ended(self, place: Place, status: int, bytes_in: int, bytes_out: int) -> None:
        """A request has its answer, or the client is gone (status 499). Called by whoever sends it."""
        ...

    def batch_done(self, model: str, op: Op, pictures: int, seconds: float) -> None:
        """The VAE has made so many pictures, or videos, at once."""
        ...

    def out_of_memory(self, model: str, op: Op) -> None:
        """A call did not fit as it was."""
        ...


class Nobody:
    """A watcher that does nothing."""

    def call_ended(self, place: Place, status: int, bytes_in: int, bytes_out: int) -> None: ...

    def batch_done(self, model: str, op: Op, pictures: int, seconds: float) -> None: ...

    def out_of_memory(self, model: str, op: Op) -> None: ...


class Engine:
    """The VAEs of a server and the queue before them.

    Calls run in threads of the engine's own, so the engine may be made in any thread, and used in any event loop.

    Args:
        catalogue: the VAEs.
        limits: what requests may ask for.
        turn: held while the VAE works: what a host holds while it generates itself.
        watcher: is told what happens.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits | None = None,
        *,
        turn: AbstractContextManager[Any] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.limits = limits or Limits()
        self.admission = Admission(self.limits)
        self.watcher = watcher or Nobody()
        self._turn: AbstractContextManager[Any] = turn or nullcontext()
        self._since = time.time()
        self._made: Counter[Op] = Counter()
        self._queued = 0
        self._running = False
        # One thread: two VAE calls at once need twice the memory and finish no sooner.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="remote-vae-engine")
        # Another, as who asks what there is does not wait for the calls.
        self._clerk = ThreadPoolExecutor(1, thread_name_prefix="remote-vae-info")

    # --- what the app calls --------------------------------------------------------------------------------------------

    async def pick(
        self, name: str | None = None, family: str | None = None, fingerprint: str | None = None, fits: Fits | None = None
    ) -> Entry:
        """The VAE that a request is for, whose family is known: see ``Catalogue.pick``. It may be loaded first.

        Raises:
            NoModel: there is none, or it cannot be loaded; the message says why. And as there.
        """
        return self.catalogue.pick(name, family, fingerprint, fits)

    async def run(
        self,
        place: Place,
        entry: Entry,
        request: Callable[[bytearray], DecodeRequest | EncodeRequest],
        body: bytearray,
        leaving: Coroutine[Any, Any, None],
    ) -> HttpResponse:
        """Answer a request when its turn comes, unless the client is gone by then.

        Args:
            place: of the request.
            entry: whose call it is.
            request: reads the body. Called in another thread.
            body: is let go of once it is read.
            leaving: ends when the client hangs up.

        Raises:
            ClientGone: nobody wants the answer. InvalidRequest, NoModel, OutOfMemory, NotFinite. And what the VAE raises.
        """

        def work() -> HttpResponse:
            asked = request(body)
            return self.decode(asked, place, entry) if isinstance(asked, DecodeRequest) else self.encode(asked, place, entry)

        def in_turn() -> HttpResponse:
            if place.is_gone():
                raise ClientGone("the client hung up")
            self._running = True
            try:
                return work()
            finally:
                self._running = False

        self._queued += 1
        watch = asyncio.ensure_future(leaving)
        job = self._executor.submit(in_turn)

        def left(_: object) -> None:
            # A call that runs ends where it can; see ``calling``.
            place.leave()
            # Its place in the queue is free at once.
            job.cancel()

        watch.add_done_callback(left)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if not place.is_gone():
                raise
            raise ClientGone("the client hung up") from None
        finally:
            watch.cancel()
            self._queued -= 1

    def health(self) -> dict[str, Any]:
        """``GET /health``: whether a call is running, and how many wait behind it."""
        return {"status": "ok", "running": self._running, "waiting": self._queued - int(self._running)}

    def problem(self) -> str:
        """Why no VAE can be had at the moment; "" where one can."""
        return next(iter(problems), "") if all(problems := [entry.problem for entry in self.catalogue.entries()]) else ""

    def status(self) -> dict[str, Any]:
        """What the page of ``GET /`` says of its work: of ``health``, since when (seconds of the epoch), and how many calls."""
        made = {f"{op}s": self._made[op] for op in ("decode", "encode")}
        return {**self.health(), "since": self._since, **made}

    async def ask_info(self) -> dict[str, Any]:
        """``info``, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._clerk, self.info)

    def info(self) -> dict[str, Any]:
        """``GET /info``: the VAEs, what may be asked of them, and of the first one once more what older clients read.

        Raises:
            NoModel: the only one is not there.
        """
        entries = self.catalogue.entries()
        models = [{"name": entry.name, "loaded": entry.is_loaded, **entry.info()} for entry in entries]
        first = {key: value for key, value in models[0].items() if key not in ("name", "loaded")}
        return {**first, "limits": self.limits.published(), "models": models}

    def check_decode(self, entry: Entry, head: TensorHead, height: int | None, width: int | None, output: Output) -> Size:
        """Refuse latents by their head, before their bytes are read.

        Returns:
            What they make.

        Raises:
            InvalidRequest: more pixels, pictures or frames than the limits allow, latents for another VAE, or an answer that
                this machine cannot make. NoModel.
        """
        own = entry.current().family
        batch, frames, rows, columns = decode_size(head.shape, height, width, own)
        self.limits.check(batch, frames, rows, columns)
        check_latent_frames(own, own.latent_frames(frames))
        check_cells(own, rows // own.downscale, columns // own.downscale)
        # Before the VAE has worked for minutes.
        if output is Output.MP4 and importlib.util.find_spec("av") is None:
            raise InvalidRequest("this server cannot make mp4: install the package av there, or ask for output_type pt")
        return Size(batch, frames, rows, columns)

    def check_encode(self, entry: Entry, head: TensorHead | None) -> Size | None:
        """Refuse pixels by their head; None for a picture's file, of which nothing is known yet. Raises as above."""
        own = entry.current().family
        if head is None:
            return None
        batch, frames, rows, columns = encode_size(head.shape, own)
        self.limits.check(batch, frames, rows, columns)
        check_frames(own, frames)
        return Size(batch, frames, rows, columns)

    # --- what runs in the engine's thread ------------------------------------------------------------------------------

    def decode(self, request: DecodeRequest, place: Place, entry: Entry) -> HttpResponse:
        """Decode, and make the answer's bytes.

        Raises:
            InvalidRequest: these latents are not for this VAE. OutOfMemory: they do not fit, tiled neither. NotFinite, NoModel.
        """
        with self._at_work(place, entry) as vae:
            family = vae.family
            check_family(family, request.family)
            latents = request.unpacked(family, _norm(vae))

            def raw(dtype: torch.dtype) -> torch.Tensor:
                return request.scaling.unscale(moved(latents, vae.device, dtype), family)

            # The answer comes in the dtype that was asked in: a half-precision client wants half the bytes. Levels are those of
            # what the VAE made.
            wants_dtype = request.output in (Output.TENSOR, Output.UNIT) and request.latents.is_floating_point()
            pixels = made(vae, "decode", raw, place)
            pixels = moved(pixels, "cpu", request.latents.dtype if wants_dtype else pixels.dtype)
        return decode_response(request, pixels)

    def encode(self, request: EncodeRequest, place: Place, entry: Entry) -> HttpResponse:
        """Encode, and make the answer's bytes. Without a posterior wanted, the answer is its mode. Raises as ``decode``."""
        with self._at_work(place, entry) as vae:
            family = vae.family
            check_family(family, request.family)
            pixels = request.pixels(family)
            place.size = Size(pixels.shape[0], pixels.shape[2] if pixels.ndim == VIDEO_DIMENSIONS else 1, *pixels.shape[-2:])
            place.pixels = place.size.pixels
            latents = made(vae, "encode", lambda dtype: moved(pixels, vae.device, dtype), place)
            is_posterior = request.posterior and vae.has_posterior
            if not is_posterior and vae.has_posterior:
                # The mode of the posterior is its mean, the first half of the moments.
                latents = latents.chunk(2, dim=1)[0]
            latents = request.in_form(latents, family, _norm(vae), is_posterior=is_posterior)
            # Latents come in the dtype that was asked in; a posterior as the VAE made it, as only our own client asks for it.
            wants_dtype = isinstance(request.image, torch.Tensor) and request.image.is_floating_point() and not is_posterior
            latents = latents.to("cpu", pixels.dtype if wants_dtype else latents.dtype)
        return encode_response(latents, is_posterior=is_posterior)

    @contextmanager
    def _at_work(self, place: Place, entry: Entry) -> Iterator[VaeAtWork]:
        """The VAE, for as long as it is this call's alone."""
        with self._turn:
            # A generation of the host may have taken minutes.
            if place.is_gone():
                raise ClientGone("the client hung up")
            vae = entry.current()
            place.begin()
            try:
                with entry.serving():
                    yield vae
            finally:
                place.end()
        self.admission.measure(place)
        self._made[place.op] += 1


def _norm(vae: VaeAtWork) -> BatchNormed | None:
    return batch_norm_of(vae.module)
