"""Runs the VAE for the server: one call at a time, in the order they came."""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from remote_vae import local
from remote_vae.call import Answer, VaeCall
from remote_vae.errors import InvalidRequest, RemoteVaeError
from remote_vae.local.own import own_tiling
from remote_vae.server.models import LoadedVae, describe
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op, VaeAtWork, has_posterior
from remote_vae.vae.families import Family, find_family
from remote_vae.wire import (
    DecodeAnswer,
    DecodeRequest,
    EncodeRequest,
    HttpResponse,
    TensorHead,
    decode_response,
    decode_size,
    encode_response,
)

log = logging.getLogger("remote_vae")

Result = TypeVar("Result")
IsGone = Callable[[], bool]


def never() -> bool:
    """Nobody leaves."""
    return False


@dataclass(frozen=True)
class Limits:
    """What a request may ask for: pixels of one picture, pictures in a batch, frames of a video, calls waiting."""

    max_pixels: int = 4096 * 4096
    max_batch: int = 32
    max_frames: int = 257
    max_waiting: int = 64

    @property
    def max_total_pixels(self) -> int:
        """Pixels of one request, all pictures and frames together: bounds the memory of its body and its answer."""
        return 4 * self.max_pixels


class Busy(RemoteVaeError):
    """As many calls are waiting as are let in."""


class ClientGone(RemoteVaeError):
    """The client hung up before its call's turn came."""


class NoModel(RemoteVaeError):
    """There is no VAE at the moment."""


class VaeEngine(ABC):
    """A VAE and the queue before it.

    Calls run in a thread of the engine's own, so the engine may be made in any thread, and used in any event loop.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._waiting = 0
        self._running = False
        # One thread: two VAE calls at once need twice the memory and finish no sooner.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="remote-vae-engine")
        # Another, as who asks what there is does not wait for the calls.
        self._clerk = ThreadPoolExecutor(1, thread_name_prefix="remote-vae-info")

    # --- what there is -------------------------------------------------------------------------------------------------

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """``GET /info``: who this server is."""

    @abstractmethod
    def _current(self) -> VaeAtWork:
        """The VAE of now."""

    @abstractmethod
    def _serving(self) -> AbstractContextManager[Any]:
        """The context of a call."""

    @contextmanager
    def _turn(self, is_gone: IsGone) -> Iterator[VaeAtWork]:  # noqa: ARG002  # for those who wait for others here
        """The VAE, for as long as it is this call's alone."""
        yield self._current()

    def _own_tiling(self, vae: VaeAtWork) -> AbstractContextManager[Any] | None:  # noqa: ARG002
        """The context in which the VAE works in its own overlapping tiles; None: that is a setting of a host's."""
        return None

    # --- what the app calls --------------------------------------------------------------------------------------------

    async def run(self, work: Callable[[IsGone], Result], leaving: Coroutine[Any, Any, None]) -> Result:
        """Do ``work`` when its turn comes, unless the client is gone by then.

        Args:
            work: called in the engine's thread; what it is given tells whether the client is gone.
            leaving: ends when the client hangs up.

        Raises:
            Busy: too many are waiting. ClientGone: nobody wants the answer. And whatever ``work`` raises.
        """
        if self._waiting >= self.limits.max_waiting:
            leaving.close()
            raise Busy(f"{self._waiting} calls are waiting here; try again later")
        gone = threading.Event()

        def in_turn() -> Result:
            if gone.is_set():
                raise ClientGone("the client hung up")
            self._running = True
            try:
                return work(gone.is_set)
            finally:
                self._running = False

        self._waiting += 1
        watch = asyncio.ensure_future(leaving)
        job = self._executor.submit(in_turn)

        def left(_: object) -> None:
            gone.set()
            # Its place in the queue is free at once; a call that runs cannot be stopped.
            job.cancel()

        watch.add_done_callback(left)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
            raise ClientGone("the client hung up") from None
        finally:
            watch.cancel()
            self._waiting -= 1

    def health(self) -> dict[str, Any]:
        """``GET /health``: whether a call is running, and how many wait behind it."""
        return {"status": "ok", "running": self._running, "waiting": self._waiting - int(self._running)}

    async def ask_info(self) -> dict[str, Any]:
        """``info``, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._clerk, self.info)

    def check_decode(self, head: TensorHead, height: int | None, width: int | None, family: str | None = None) -> None:
        """Refuse latents by their head, before their bytes are read.

        Raises:
            InvalidRequest: more pixels or pictures than the limits allow, or latents for another VAE.
        """
        own = self._current().family
        self._check_size(*decode_size(head.shape, height, width, own.latent_channels, own.downscale))
        _check_family(own, family)

    def check_encode(self, head: TensorHead | None, family: str | None = None) -> None:
        """Refuse pixels by their head, before their bytes are read; None for a picture's file. Raises InvalidRequest."""
        own = self._current().family
        if head is not None:
            if len(head.shape) != 4 or head.shape[1] != 3:
                raise InvalidRequest(f"the image tensor must be [B, 3, H, W], not {list(head.shape)}")
            self._check_size(head.shape[0], 1, head.shape[2], head.shape[3])
        _check_family(own, family)

    # --- what runs in the engine's thread ------------------------------------------------------------------------------

    def decode(self, request: DecodeRequest, is_gone: IsGone = never) -> HttpResponse:
        """Decode, and make the answer's bytes.

        Raises:
            InvalidRequest: these latents are not for this VAE. OutOfMemory: they do not fit, tiled neither.
        """
        with self._turn(is_gone) as vae, self._serving():
            pixels = self._decoded(vae, request)
            # The answer comes in the dtype that was asked in: a half-precision client wants half the bytes.
            dtype = request.latents.dtype if request.latents.is_floating_point() else pixels.dtype
            pixels = pixels.to("cpu", dtype)
        return decode_response(request, pixels)

    def _decoded(self, vae: VaeAtWork, request: DecodeRequest) -> torch.Tensor:
        family = vae.family
        _check_family(family, request.family)
        latents = request.unpacked(family.latent_channels, family.downscale)
        if request.is_video != family.video:
            raise InvalidRequest(
                f"{family.label} takes {'video' if family.video else 'picture'} latents, not {list(latents.shape)}"
            )
        z = request.scaling.unscale(latents.to(vae.device, vae.dtype), family.scaling_factor, family.shift_factor)
        return self._guarded(vae, "decode", z)

    def encode(self, request: EncodeRequest, is_gone: IsGone = never) -> HttpResponse:
        """Encode, and make the answer's bytes. Without a posterior wanted, the answer is its mode. Raises as ``decode``."""
        pixels = request.pixels()
        with self._turn(is_gone) as vae, self._serving():
            latents = self._encoded(vae, request, pixels)
            is_posterior = request.posterior and vae.has_posterior
            # Latents come in the dtype that was asked in; a posterior as the VAE made it, as only our own client asks for it.
            wants_dtype = isinstance(request.image, torch.Tensor) and request.image.is_floating_point() and not is_posterior
            latents = latents.to("cpu", pixels.dtype if wants_dtype else latents.dtype)
        return encode_response(latents, is_posterior=is_posterior)

    def _encoded(self, vae: VaeAtWork, request: EncodeRequest, pixels: torch.Tensor) -> torch.Tensor:
        family = vae.family
        _check_family(family, request.family)
        if min(pixels.shape[-2:]) < family.downscale:
            least = f"{family.downscale} x {family.downscale}"
            raise InvalidRequest(f"a picture must have at least {least} pixels, not {list(pixels.shape[-2:])}")
        if family.video:
            pixels = pixels.unsqueeze(2)
        latents = self._guarded(vae, "encode", pixels.to(vae.device, vae.dtype))
        if not (request.posterior and vae.has_posterior):
            # The mode of the posterior is its mean, the first half of the moments.
            latents = request.scaling.scale(latents.chunk(2, dim=1)[0] if vae.has_posterior else latents)
        return latents.squeeze(2) if family.video else latents

    def _guarded(self, vae: VaeAtWork, op: Op, batch: torch.Tensor) -> torch.Tensor:
        """Pixels of raw latents, or moments of pixels; in float32 if half precision gives NaN. The VAE stays as it is."""

        def whole() -> torch.Tensor:
            return vae.whole(vae.module, op, vae.bring(batch))

        def tiled() -> torch.Tensor:
            with tiling:
                return whole()

        tiling = self._own_tiling(vae) or nullcontext()
        has_tiling = not isinstance(tiling, nullcontext)
        call = VaeCall(op, batch, vae, _values, whole=whole, own_tiling=tiled if has_tiling else None)
        result = local.answer(call, Settings()).value
        if bool(torch.isfinite(result).all()):
            return result
        if vae.dtype != torch.float32:
            log.warning("the VAE gives NaN in %s; this call is done in float32", vae.dtype)
            result = local.answer(call, Settings(), dtype=torch.float32).value
        if not bool(torch.isfinite(result).all()):
            raise RemoteVaeError(f"the VAE gives NaN or infinite values for this {op}, in float32 as well")
        return result

    def _check_size(self, batch: int, frames: int, height: int, width: int) -> None:
        limits = self.limits
        if height * width > limits.max_pixels:
            raise InvalidRequest(f"{width} x {height} pixels; this server takes at most {limits.max_pixels} a picture")
        if batch > limits.max_batch:
            raise InvalidRequest(f"{batch} pictures; this server takes at most {limits.max_batch} at once")
        if frames > limits.max_frames:
            raise InvalidRequest(f"{frames} latent frames; this server takes at most {limits.max_frames}")
        total = batch * frames * height * width
        if total > limits.max_total_pixels:
            raise InvalidRequest(f"{total} pixels in all; this server takes at most {limits.max_total_pixels} in one request")


class Engine(VaeEngine):
    """The server's own VAE."""

    def __init__(self, loaded: LoadedVae, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.loaded = loaded

    def info(self) -> dict[str, Any]:
        limits = {**asdict(self.limits), "max_total_pixels": self.limits.max_total_pixels}
        return {**describe(self.loaded), "limits": limits, "posterior": self._has_posterior}

    def _current(self) -> VaeAtWork:
        loaded = self.loaded
        return VaeAtWork(loaded.vae, loaded.family, loaded.device, loaded.dtype, has_posterior=self._has_posterior)

    def _own_tiling(self, vae: VaeAtWork) -> AbstractContextManager[Any] | None:
        return own_tiling(vae.module)

    def _serving(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    @property
    def _has_posterior(self) -> bool:
        return has_posterior(self.loaded.vae)


def _values(answer: Answer) -> torch.Tensor:
    return answer.tensor if isinstance(answer, DecodeAnswer) else answer.latents


def _check_family(own: Family, name: str | None) -> None:
    if name is None or not own.is_known:
        return
    wanted = find_family(name)
    if wanted.key != own.key:
        raise InvalidRequest(f"this server has the VAE of {own.label}, and the request is for {wanted.label}")
