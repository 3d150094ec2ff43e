"""How much memory a plan needs, and how to spend what there is."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from remote_vae.errors import OutOfMemory
from remote_vae.tiled.plan import Attention, Conv, Plan

# What is alive beside the strips that wait, in strips and in rows of the widest convolution: the strip that is read,
# normalised, in its window, convolved, and the shortcut's; in the attention also queries and their mixture.
_STRIPS_AT_WORK = 7
_ROWS_AT_WORK = 6
# Half-precision strips are normalised in float32.
_WORK_ITEM = 4


@dataclass(frozen=True)
class Budget:
    """How one picture is worked on.

    Attributes:
        strip_bytes: how large a strip should be.
        waiting: bytes that may wait on the compute device, None: as many as there are.
    """

    strip_bytes: int
    waiting: int | None


def plan_budget(
    plan: Plan, height: int, width: int, dtype: torch.dtype, *, strip_bytes: int, max_bytes: int | None, result_bytes: int
) -> Budget:
    """Divide ``max_bytes`` into the result, strips at work, and strips that wait.

    Args:
        plan: what is done to the picture.
        height, width: of what goes in.
        dtype: of the computation.
        strip_bytes: the size that is fastest.
        max_bytes: None is no limit.
        result_bytes: of the result of the whole batch.

    Raises:
        OutOfMemory: it cannot be done in so little; the message says what would do.
    """
    if max_bytes is None:
        return Budget(strip_bytes, None)
    row = fixed = 0
    for step, channels, rows, columns in plan.sizes(height, width):
        if isinstance(step, Attention):
            # Keys and values of the whole picture.
            fixed = max(fixed, 2 * channels * rows * columns * dtype.itemsize)
        if isinstance(step, Conv):
            row = max(row, max(channels, step.module.in_channels) * columns * _WORK_ITEM)
    fixed += result_bytes + _ROWS_AT_WORK * row
    # A third for work: thinner strips leave more room, but take longer each.
    strip = max(row, min(strip_bytes, (max_bytes - fixed) // (3 * _STRIPS_AT_WORK)))
    waiting = max_bytes - fixed - _STRIPS_AT_WORK * strip
    if waiting < 0:
        needed = fixed + _STRIPS_AT_WORK * row
        raise OutOfMemory(
            f"max_bytes of {max_bytes // 10**6} MB is too little for this picture: {ceil(needed / 1e6)} MB are needed",
            reason="out of memory",
        )
    return Budget(strip, waiting)
