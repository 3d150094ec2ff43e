"""What the whole VAE takes of a device, before it is called.

What its layers keep alive at a time is counted from its plan. A card's allocator needs more than that: convolutions have
workspaces, and free memory has holes. How much more is known of a few VAEs and cards: ``settings/vae_memory.toml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from remote_vae.call import VaeCall
from remote_vae.settings import read_toml
from remote_vae.tiled.budget import whole_values
from remote_vae.tiled.plan import Conv, Plan
from remote_vae.vae.at_work import Op, is_of

_DATA = "vae_memory.toml"
# Of Wan's and Qwen-Image's: times the largest activation, of which 9.1 to 11.5 were alive.
_OF_A_FRAME = 12
# Of a video, beside what the convolutions keep: of the frames that are done at a time, at most 8.2 were alive.
_OF_FRAMES = 9
_MASKED = ("AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15", "AutoencoderKLHunyuanImageRefiner")


@dataclass(frozen=True)
class Need:
    """Bytes that a whole call takes of its device, beside the weights.

    Attributes:
        counted: what its layers keep alive at a time; what the shares of the tiled VAE are of.
        least: the least that such a VAE was seen to take: in less it cannot be done.
        likely: with workspaces and holes: in more it is done.
    """

    counted: int
    least: int
    likely: int

    def of(self, pictures: int) -> Need:
        """Of so many pictures or videos at once."""
        return Need(pictures * self.counted, pictures * self.least, pictures * self.likely)


def whole_need(op: Op, plan: Plan, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Need:
    """What the whole VAE takes for ``shape`` ``[B, C, H, W]`` or ``[B, C, F, H, W]`` on ``device``, in ``dtype``.

    Raises:
        InvalidRequest: the VAE takes no such size.
    """
    counted, data = whole_bytes(plan, shape, dtype), read_toml(_DATA)
    devices = data["devices"]
    if device.type == "cpu":
        taken = int(devices["cpu"] * counted)
        return Need(counted, taken, taken)
    kind = "pictures" if plan.frames is None else "frame" if _is_apart(plan, shape) else "frames"
    known = data[kind][op]
    factor = _backend(device) / known["counted"]
    reserved = known["single" if dtype.itemsize > 2 else "half"]
    return Need(counted, int(counted * known["least"] * factor), int(counted * reserved * factor))


def reserved_bytes(call: VaeCall[Any]) -> int:
    """What is reserved for the whole call of a VAE whose layers are not counted; 0 where nobody has told."""
    of_classes = read_toml(_DATA)["classes"]
    known = next((of_classes[kind.__name__] for kind in type(call.vae.module).__mro__ if kind.__name__ in of_classes), None)
    if known is None or call.vae.device.type == "cpu" or getattr(call.vae.module, "use_tiling", False):
        return 0
    frames = min(call.frames, known.get("frames", call.frames))
    pictures, height, width = call.size
    at_once = pictures // call.frames * frames
    return int(known[call.op] * at_once * height * width * call.vae.dtype.itemsize * _backend(call.vae.device))


def usual_bytes(op: Op, pixels: int, dtype: torch.dtype, device: torch.device) -> int:
    """What most VAEs take for so many pixels, those of AutoencoderKL's kind: where nothing is known of the one in question."""
    known, devices = read_toml(_DATA)["pictures"][op], read_toml(_DATA)["devices"]
    if device.type == "cpu":
        each = devices["cpu"] * known["counted"]
    else:
        each = known["single" if dtype.itemsize > 2 else "half"] * _backend(device)
    return int(each * pixels * dtype.itemsize)


def whole_bytes(plan: Plan, shape: torch.Size, dtype: torch.dtype) -> int:
    """What the layers of the whole VAE keep alive at their peak for ``shape`` ``[B, C, H, W]`` or ``[B, C, F, H, W]``.

    That is in the largest residual block: what went in, and the first convolution's result, normalised, activated, and the
    second's. Of a VAE for videos a multiple of the largest activation; of many frames also what each convolution in time keeps
    of the frames before, and the result, which is joined anew with each step.
    """
    batch, frames, (height, width) = shape[0], _frames(shape), shape[-2:]
    if plan.frames is None:
        values = whole_values(plan, height, width)
    elif _is_apart(plan, shape):
        made = plan.sizes(height, width)
        values = frames * _OF_A_FRAME * max(each.channels * each.rows * each.columns for each in made)
    else:
        values = _of_a_video(plan, frames, height, width)
    return batch * values * dtype.itemsize


def _frames(shape: torch.Size) -> int:
    return shape[2] if len(shape) == 5 else 1


def _is_apart(plan: Plan, shape: torch.Size) -> bool:
    """Whether every frame is done as one that is alone."""
    return _frames(shape) == 1 or not (plan.frames and plan.frames.together)


def _backend(device: torch.device) -> float:
    rocm: float = read_toml(_DATA)["devices"]["rocm"]
    # torch's name for AMD's cards is "cuda", too.
    return rocm if device.type == "cuda" and torch.version.hip is not None else 1.0


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
