"""The exact tiled VAE: the picture of the whole VAE in a fraction of its memory.

Exact means the same arithmetic: GroupNorm over the whole picture, attention over the whole latent, convolutions with all the
rows that they reach. In float32 the result is as near to the whole VAE's as two memory formats of the whole VAE are to each
other (PSNR above 100 dB).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, Union

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.tiled.budget import Budget, plan_budget
from remote_vae.tiled.executor import build
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.tiled.normed import own_moments, raw_latents
from remote_vae.tiled.plan import Plan
from remote_vae.tiled.policy import Policy, policy_of
from remote_vae.tiled.rows import NotFinite, Past, Rows, Run, never, no_progress
from remote_vae.tiled.store import Store
from remote_vae.tiled.weights import bring_in

log = logging.getLogger("remote_vae")

Device = Union[torch.device, str]
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Limits:
    """How much memory a call may take, and where and in which precision it is computed.

    Attributes:
        max_bytes: live bytes on the compute device above what there is at the start, the result included; None: as many as are
            fastest. Strips get thinner; then they wait elsewhere: a GPU's in the host's memory, a processor's in a file in
            TMPDIR, /var/tmp or the system's temporary folder, the first that is no memory.
        device: where to compute; None: where the input is, and the host is asked to bring the VAE there. Else each layer's
            weights are copied there when they are needed.
        dtype: what to compute in; None: the dtype of the VAE's weights, or autocast's. Half precision that gives NaN is done
            again in float32.
        policy: None: that of the device.
    """

    max_bytes: int | None = None
    device: Device | None = None
    dtype: torch.dtype | None = None
    policy: Policy | None = None


def decode(
    vae: Any,
    latents: torch.Tensor,
    *,
    max_bytes: int | None = None,
    progress: Callable[[float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What ``vae.decode(latents)`` gives, in less memory.

    Args:
        vae: one of diffusers, ldm, sgm, Forge or ComfyUI that ``layouts`` knows. It is not changed; other threads may
            use it meanwhile, unless accelerate takes its layers away after each use.
        latents: raw (unscaled) ``[B, C, h, w]``, of any size that the VAE itself takes. Of a VAE for videos
            ``[B, C, F, h, w]``, or ``[B, C, h, w]``, which is one frame of each. A VAE that undoes norm and patches of
            latents itself (Flux.2 in ComfyUI and Neo) takes them as its own ``decode`` does.
        max_bytes, device, dtype: see ``Limits``.
        progress: called after every strip with the share of the work that is done, up to 1.
        cancelled: asked after every strip; True ends the call.

    Returns:
        Pixels ``[B, 3, H, W]``, nominally in [-1, 1], on the device of ``latents``, in the dtype that the VAE gives. Of
        videos ``[B, 3 or 4, F', H, W]``.

    Raises:
        UnsupportedLayout: the VAE's modules are of a kind that is not known.
        OutOfMemory: ``max_bytes`` cannot be met; the message says what would do.
        CallCancelled: ``cancelled`` said so.
    """
    limits = Limits(max_bytes, device, dtype)
    return run(decoder_plan(vae), vae, raw_latents(vae, latents), limits, progress=progress, cancelled=cancelled)


def encode(
    vae: Any,
    pixels: torch.Tensor,
    *,
    max_bytes: int | None = None,
    progress: Callable[[float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The moments that the VAE's encoder and ``quant_conv`` make of ``pixels``, in less memory.

    Args:
        vae: as for ``decode``.
        pixels: ``[B, 3, H, W]`` in [-1, 1], of any size that the VAE itself takes; of a VAE for videos also
            ``[B, 3 or 4, F, H, W]``.
        max_bytes, progress, cancelled, device, dtype: as for ``decode``.

    Returns:
        Moments ``[B, 2 C, h, w]``: mean and logvar, unscaled, for the caller to make the posterior of. AutoencoderTiny and
        AutoencoderDC have none: their latents ``[B, C, h, w]``. Of videos ``[B, 2 C, F', h, w]``. Raises as ``decode`` does.
    """
    limits = Limits(max_bytes, device, dtype)
    moments = run(encoder_plan(vae), vae, pixels, limits, progress=progress, cancelled=cancelled)
    return own_moments(vae, moments)


def run(
    plan: Plan,
    vae: Any,
    batch: torch.Tensor,
    limits: Limits,
    *,
    progress: Callable[[float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """``decode`` or ``encode`` by a plan that ``layouts.decoder_plan`` or ``encoder_plan`` has made of ``vae`` before."""
    videos = _videos(plan, batch)
    device = torch.device(limits.device or batch.device)
    own, autocast = _own_dtype(plan, batch), _autocast_dtype(device.type)
    # Autocast leaves float64 alone.
    given = own if autocast is None or own == torch.float64 else autocast

    def attempt(dtype: torch.dtype) -> torch.Tensor:
        work = _Work(plan, limits, limits.policy or policy_of(device), device, dtype, progress, cancelled or never)
        result = work.result_of(videos)
        if dtype in _HALVES and not torch.isfinite(result).all():
            raise NotFinite("the last convolution")
        return result

    # Not all devices know autocast, not even that it should be off.
    plain = nullcontext() if autocast is None else torch.autocast(device.type, enabled=False)
    with torch.no_grad(), plain:
        # On a device that the caller names, layers are copied one by one, and the VAE need not be brought to one that is full.
        if limits.device is None:
            bring_in(vae)
        result = None
        try:
            result = attempt(limits.dtype or given)
        except NotFinite as error:
            log.warning("NaN (%s): once more in float32", error)
        # Not within the except clause, which keeps the strips of the failed attempt alive.
        if result is None:
            result = attempt(torch.float32)
    result = result.to(batch.device, given)
    return result if batch.ndim == result.ndim else result.squeeze(2)


def check_frames(plan: Plan, batch: torch.Tensor) -> None:
    """Whether ``plan`` takes pictures or videos of this form.

    Raises:
        InvalidRequest: these are no pictures, or no videos of this VAE.
    """
    frames = plan.frames
    form = "[B, C, H, W]" if frames is None else "[B, C, F, H, W] or [B, C, H, W]"
    if batch.ndim not in ((4,) if frames is None else (4, 5)) or 0 in batch.shape:
        raise InvalidRequest(f"the tiled VAE takes {form}, not {list(batch.shape)}")
    if frames is not None and not frames.several and batch.ndim == 5 and batch.shape[2] > 1:
        raise InvalidRequest(f"this VAE takes one frame, not {batch.shape[2]}")


def _videos(plan: Plan, batch: torch.Tensor) -> torch.Tensor:
    """``[B, C, F, H, W]``, with as many frames as the VAE takes of them. Raises InvalidRequest."""
    check_frames(plan, batch)
    videos = batch if batch.ndim == 5 else batch.unsqueeze(2)
    step = 1 if plan.frames is None else plan.frames.step
    return videos[:, :, : 1 + (videos.shape[2] - 1) // step * step]


@dataclass(frozen=True)
class _Work:
    """How the pictures or videos of a batch are worked on, one after the other."""

    plan: Plan
    limits: Limits
    policy: Policy
    device: torch.device
    dtype: torch.dtype
    progress: Callable[[float], None] | None
    cancelled: Callable[[], bool]

    def result_of(self, videos: torch.Tensor) -> torch.Tensor:
        """``[B, C', F', H', W']`` of ``[B, C, F, H, W]``."""
        batch, _, frames, height, width = videos.shape
        together = self.plan.frames is not None and self.plan.frames.together
        if not together and frames > 1:
            apart = videos.transpose(1, 2).flatten(0, 1).unsqueeze(2)
            made = self.result_of(apart)
            return made.reshape(batch, frames, *made.shape[1:2], *made.shape[3:]).transpose(1, 2)
        # Refuses sizes that the VAE does not take.
        *_, last = self.plan.sizes(height, width, frames)
        shape = (batch, last.channels, last.frames, last.rows, last.columns)
        budget = self._budget(videos, result_bytes=prod(shape) * self.dtype.itemsize)
        result = torch.empty(shape, device=self.device, dtype=self.dtype)
        for index, video in enumerate(videos):
            self._copy(video.transpose(0, 1), result[index].transpose(0, 1), budget, index, batch)
        return result

    def _copy(self, video: torch.Tensor, result: torch.Tensor, budget: Budget, index: int, count: int) -> None:
        """The result for ``video`` ``[F, C, H, W]`` into ``result`` ``[F', C', H', W']``."""
        frames, _, height, width = video.shape
        # The first frame comes alone, and then ``step`` at a time.
        step = 1 if self.plan.frames is None else self.plan.frames.step
        largest = max(each.channels * each.rows * each.columns for each in self.plan.sizes(height, width))
        waiting = min((each.waiting for each in budget.phases if each.waiting is not None), default=None)
        with closing(Store(self.device, self.policy, waiting, largest * budget.frames * self.dtype.itemsize)) as store:
            past = Past(store)
            start = made = 0
            while start < frames:
                end = min(frames, start + budget.frames if start else budget.frames - step + 1)
                past.first, past.last = start == 0, end == frames
                report = _share(self.progress, (index + start / frames) / count, (end - start) / frames / count)
                rows = build(self.plan, video[start:end], self._run(store, past, budget, report))
                _copy_rows(rows, result[made : made + rows.frames])
                made += rows.frames
                start = end

    def _budget(self, videos: torch.Tensor, result_bytes: int) -> Budget:
        _, _, frames, height, width = videos.shape
        return plan_budget(
            self.plan,
            (frames, height, width),
            self.dtype,
            policy=self.policy,
            max_bytes=self.limits.max_bytes,
            result_bytes=result_bytes,
        )

    def _run(self, store: Store, past: Past, budget: Budget, report: Callable[[float], None]) -> Run:
        half = self.dtype in _HALVES
        return Run(
            device=self.device,
            dtype=self.dtype,
            policy=self.policy,
            phases=iter(budget.phases),
            store=store,
            past=past,
            channels_last=half and self.device.type in ("cpu", "cuda"),
            finite=half and self.policy.looks,
            progress=report,
            cancelled=self.cancelled,
        )


def _copy_rows(rows: Rows, result: torch.Tensor) -> None:
    at = 0
    for strip in rows.read():
        result[:, :, at : at + strip.shape[2]] = strip
        at += strip.shape[2]
        del strip


def _share(progress: Callable[[float], None] | None, start: float, share: float) -> Callable[[float], None]:
    return no_progress if progress is None else lambda done: progress(start + done * share)


def _own_dtype(plan: Plan, batch: torch.Tensor) -> torch.dtype:
    """What the VAE computes in: the dtype of its weights, or of its input where each layer casts them (Forge, float8)."""
    own = plan.first_weight.dtype
    casts = getattr(next(plan.modules()), "parameters_manual_cast", False)
    return own if not casts and own in (*_HALVES, torch.float32, torch.float64) else batch.dtype


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast would compute convolutions in, or None."""
    try:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    except TypeError:
        # torch before 2.4, which has functions for each device that can.
        names = {"cuda": ("is_autocast_enabled", "get_autocast_gpu_dtype")}
        others = (f"is_autocast_{device_type}_enabled", f"get_autocast_{device_type}_dtype")
        is_enabled, dtype = (getattr(torch, name, None) for name in names.get(device_type, others))
        return dtype() if is_enabled is not None and dtype is not None and is_enabled() else None
    except RuntimeError:
        # A device that autocast does not know.
        return None
