"""How much memory the whole VAE takes, before it is called."""

from __future__ import annotations

from typing import Any

import torch

from remote_vae.call import VaeCall
from remote_vae.tiled.plan import Conv, Plan, Residual
from remote_vae.vae.at_work import is_of

# Of Wan's and Qwen-Image's: times the largest activation. 2900 bytes a pixel and byte of an element in a decode and 1600 in an
# encode were reserved (InvokeAI PR 9305 and 9519), 1743 and 1005 are alive at the peak.
_OF_A_FRAME = 16
# Of a video, beside what the convolutions keep: of the frames that are done at a time, at most 8.2 were alive.
_OF_FRAMES = 9
_MASKED = ("AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15", "AutoencoderKLHunyuanImageRefiner")


def whole_bytes(plan: Plan, shape: torch.Size, dtype: torch.dtype) -> int:
    """What the whole VAE takes at its peak for ``shape`` ``[B, C, H, W]`` or ``[B, C, F, H, W]``.

    That is in the largest residual block: what went in, and the first convolution's result, normalised, activated, and the
    second's. Of a VAE for videos a multiple of the largest activation; of many frames also what each convolution in time keeps
    of the frames before, and the result, which is joined anew with each step.
    """
    batch, frames, (height, width) = shape[0], shape[2] if len(shape) == 5 else 1, shape[-2:]
    if plan.frames is None:
        values = _in_a_block(plan, height, width)
    elif frames == 1 or not plan.frames.together:
        made = plan.sizes(height, width)
        values = frames * _OF_A_FRAME * max(each.channels * each.rows * each.columns for each in made)
    else:
        values = _of_a_video(plan, frames, height, width)
    return batch * values * dtype.itemsize


def mask_bytes(call: VaeCall[Any]) -> int:
    """What the attention of HunyuanVideo's kind takes for one video: a mask of every position of every frame to every other.

    The scores are as large. 0 for other VAEs, and where the VAE works in tiles by itself.
    """
    module, shape = call.vae.module, call.tensor.shape
    if not is_of(module, *_MASKED) or getattr(module, "use_tiling", False):
        return 0
    family = call.vae.family
    frames, rows, columns = shape[2:]
    if call.op == "encode":
        frames, rows, columns = family.latent_frames(frames), rows // family.downscale, columns // family.downscale
    # HunyuanVideo makes its mask of whole numbers, and in float32 first.
    return int((frames * rows * columns) ** 2 * (2 * call.vae.dtype.itemsize + 4))


def _in_a_block(plan: Plan, height: int, width: int) -> int:
    peak = 0
    for made in plan.sizes(height, width):
        if isinstance(made.step, Residual):
            entered = next(part.module.in_channels for part in made.step.main if isinstance(part, Conv))
            peak = max(peak, (entered + 4 * made.channels) * made.rows * made.columns)
    return peak


def _of_a_video(plan: Plan, frames: int, height: int, width: int) -> int:
    step = 1 if plan.frames is None else plan.frames.step
    largest = kept = before = 0
    # A VAE takes one frame first and then a step of them at a time.
    for made in plan.sizes(height, width, step, first=False):
        position = made.channels * made.rows * made.columns
        largest = max(largest, position * made.frames)
        if isinstance(made.step, Conv):
            kept += (made.step.depth - 1) * before
        before = position
    *_, last = plan.sizes(height, width, frames)
    return _OF_FRAMES * largest + kept + 2 * last.channels * last.rows * last.columns * last.frames
