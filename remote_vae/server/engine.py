"""Runs the VAE for the server: one call at a time, in the order they came."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from remote_vae.errors import InvalidRequest, RemoteVaeError
from remote_vae.families import find_family
from remote_vae.routes import Op, Spare
from remote_vae.server.models import LoadedVae, describe
from remote_vae.tiled.ladder import exact_ways, first_that_fits, whole_fits
from remote_vae.tiled.spares import own_tiling
from remote_vae.wire import (
    DecodeRequest,
    EncodeRequest,
    HttpAnswer,
    TensorHead,
    decode_answer,
    decode_size,
    encode_answer,
)

log = logging.getLogger("remote_vae.server")

Result = TypeVar("Result")


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


class Engine:
    """One loaded VAE and the queue before it."""

    def __init__(self, loaded: LoadedVae, limits: Limits | None = None) -> None:
        self.loaded = loaded
        self.limits = limits or Limits()
        self._waiting = 0
        self._running = False
        self._turn = asyncio.Lock()
        # One thread: two VAE calls at once need twice the memory and finish no sooner.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="remote-vae-engine")

    # --- what the app calls --------------------------------------------------------------------------------------------

    async def run(self, work: Callable[[], Result], is_gone: Callable[[], Awaitable[bool]]) -> Result:
        """Do ``work`` when its turn comes, unless the client ``is_gone`` by then.

        Raises:
            Busy: too many are waiting. ClientGone: nobody wants the answer. And whatever ``work`` raises.
        """
        if self._waiting >= self.limits.max_waiting:
            raise Busy(f"{self._waiting} calls are waiting here; try again later")
        self._waiting += 1
        try:
            async with self._turn:
                if await is_gone():
                    raise ClientGone("the client hung up")
                self._running = True
                try:
                    return await asyncio.get_running_loop().run_in_executor(self._executor, work)
                finally:
                    self._running = False
        finally:
            self._waiting -= 1

    def health(self) -> dict[str, Any]:
        """``GET /health``: whether a call is running, and how many wait behind it."""
        return {"status": "ok", "running": self._running, "waiting": self._waiting - int(self._running)}

    def info(self) -> dict[str, Any]:
        """``GET /info``: who this server is."""
        limits = {**asdict(self.limits), "max_total_pixels": self.limits.max_total_pixels}
        return {**describe(self.loaded), "limits": limits, "posterior": self._has_posterior}

    def check_decode(self, head: TensorHead, height: int | None, width: int | None) -> None:
        """Refuse latents by their head, before their bytes are read.

        Raises:
            InvalidRequest: more pixels or pictures than the limits allow.
        """
        family = self.loaded.family
        self._check_size(*decode_size(head.shape, height, width, family.latent_channels, family.downscale))

    def check_encode(self, head: TensorHead) -> None:
        """Refuse pixels by their head, before their bytes are read. Raises InvalidRequest."""
        if len(head.shape) != 4 or head.shape[1] != 3:
            raise InvalidRequest(f"the image tensor must be [B, 3, H, W], not {list(head.shape)}")
        self._check_size(head.shape[0], 1, head.shape[2], head.shape[3])

    # --- what runs in the engine's thread ------------------------------------------------------------------------------

    def decode(self, request: DecodeRequest) -> HttpAnswer:
        """Decode, and make the answer's bytes.

        Raises:
            InvalidRequest: these latents are not for this VAE. OutOfMemory: they do not fit, tiled neither.
        """
        self._check_family(request.family)
        family, vae = self.loaded.family, self.loaded.vae
        latents = request.unpacked(family.latent_channels, family.downscale)
        if request.is_video != family.video:
            raise InvalidRequest(
                f"{family.label} takes {'video' if family.video else 'picture'} latents, not {list(latents.shape)}"
            )

        z = request.scaling.unscale(latents.to(vae.device, vae.dtype), family.scaling_factor, family.shift_factor)
        pixels = self._guarded("decode", z)
        # The answer comes in the dtype that was asked in: a half-precision client wants half the bytes.
        dtype = request.latents.dtype if request.latents.is_floating_point() else pixels.dtype
        return decode_answer(request, pixels.to("cpu", dtype))

    def encode(self, request: EncodeRequest) -> HttpAnswer:
        """Encode, and make the answer's bytes. Without a posterior wanted, the answer is its mode. Raises as ``decode``."""
        self._check_family(request.family)
        vae = self.loaded.vae
        pixels = request.pixels()
        least = self.loaded.family.downscale
        if min(pixels.shape[-2:]) < least:
            raise InvalidRequest(f"a picture must have at least {least} x {least} pixels, not {list(pixels.shape[-2:])}")
        if self.loaded.family.video:
            pixels = pixels.unsqueeze(2)

        latents = self._guarded("encode", pixels.to(vae.device, vae.dtype))
        is_posterior = request.posterior and self._has_posterior
        if not is_posterior:
            # The mode of the posterior is its mean, the first half of the moments.
            mode = latents.chunk(2, dim=1)[0] if self._has_posterior else latents
            latents = request.scaling.scale(mode)
        if self.loaded.family.video:
            latents = latents.squeeze(2)
        # Latents come in the dtype that was asked in; a posterior as the VAE made it, as only our own client asks for it.
        wants_dtype = isinstance(request.image, torch.Tensor) and request.image.is_floating_point() and not is_posterior
        return encode_answer(latents.to("cpu", pixels.dtype if wants_dtype else latents.dtype), is_posterior=is_posterior)

    def _guarded(self, op: Op, batch: torch.Tensor) -> torch.Tensor:
        """Pixels of raw latents, or moments of pixels; in float32 if half precision gives NaN."""
        result = self._in_memory(op, batch)
        if self.loaded.dtype == torch.float32 or bool(torch.isfinite(result).all()):
            return result
        log.warning("the VAE gives NaN in %s; it runs in float32 from now on", self.loaded.dtype)
        self.loaded.vae.to(torch.float32)
        return self._in_memory(op, batch.float())

    def _in_memory(self, op: Op, batch: torch.Tensor) -> torch.Tensor:
        """The whole VAE where it fits, else tiled."""
        with torch.inference_mode():
            return first_that_fits(self._ways(op, batch), f"a {op} of {list(batch.shape)}")[1]

    def _ways(self, op: Op, batch: torch.Tensor) -> Iterator[Spare[torch.Tensor]]:
        vae = self.loaded.vae

        def whole() -> torch.Tensor:
            if op == "decode":
                pixels: torch.Tensor = vae.decode(batch, return_dict=False)[0]
                return pixels
            encoded = vae.encode(batch)
            moments: torch.Tensor = encoded.latent_dist.parameters if self._has_posterior else encoded.latents
            return moments

        def tiled_its_own_way() -> torch.Tensor:
            with own_tiling(vae):
                return whole()

        if batch.ndim != 4 or whole_fits(vae, op, batch):
            yield Spare("the whole VAE", whole)
        if batch.ndim == 4:
            yield from exact_ways(vae, op, batch)
        yield Spare("the VAE's own tiling", tiled_its_own_way)

    @property
    def _has_posterior(self) -> bool:
        # AutoencoderTiny is the one that encodes to latents and not to a distribution.
        return not type(self.loaded.vae).__name__.endswith("Tiny")

    def _check_family(self, name: str | None) -> None:
        own = self.loaded.family
        if name is None or not own.is_known:
            return
        if find_family(name).key != own.key:
            raise InvalidRequest(f"this server has the VAE of {own.label}, and the request is for {find_family(name).label}")

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
