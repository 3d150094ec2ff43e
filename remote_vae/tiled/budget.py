"""How much memory a plan needs, and how to spend what there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import torch

from remote_vae.errors import OutOfMemory
from remote_vae.tiled.plan import Attention, Conv, InTime, LinearAttention, Local, Norm, Plan, Residual

# What is alive beside the strips that wait, in strips and in rows of the widest convolution: the strip that is read,
# normalised, in its window, convolved, and the shortcut's; in the attention also queries and their mixture.
_STRIPS_AT_WORK = 7
_ROWS_AT_WORK = 6
# Of a chain in which nothing waits: the strip that is normalised, and its copy, in a window and in the convolution's own order.
_STRIPS_OF_ONE = 4
# Half-precision strips are normalised in float32.
_WORK_ITEM = 4


@dataclass(frozen=True)
class Budget:
    """How one picture or video is worked on.

    Attributes:
        strip_bytes: how large a strip should be.
        waiting: bytes that may wait on the compute device, None: as many as there are.
        frames: how many frames are worked on at a time; of the first ones, by ``Frames.step`` less than one fewer.
    """

    strip_bytes: int
    waiting: int | None
    frames: int = 1


@dataclass(frozen=True)
class _Needs:
    """What is alive at a time.

    Attributes:
        fixed: bytes, whatever the strips are like.
        row: bytes of a row, which a strip has at least.
        strips: how many strips.
    """

    fixed: int
    row: int
    strips: int

    @property
    def least(self) -> int:
        return self.fixed + self.strips * self.row


def plan_budget(
    plan: Plan,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    strip_bytes: int,
    max_bytes: int | None,
    result_bytes: int,
) -> Budget:
    """Divide ``max_bytes`` into the result, strips at work, and strips that wait.

    All frames are worked on at once where that is possible, else as many as are: then what convolutions keep of the frames
    before has to wait as well.

    Args:
        plan: what is done to the picture.
        size: frames, height and width of what goes in.
        dtype: of the computation.
        strip_bytes: the size that is fastest.
        max_bytes: None is no limit.
        result_bytes: of the result of the whole batch.

    Raises:
        OutOfMemory: it cannot be done in so little; the message says what would do.
    """
    frames, height, width = size
    step = 1 if plan.frames is None else plan.frames.step
    at_once = frames + step - 1
    if max_bytes is None:
        return Budget(strip_bytes, None, at_once)
    least = 0
    for count in _counts(at_once, step):
        needs = _needs(plan, min(count, frames), height, width, dtype, is_all=count == at_once)
        needs = replace(needs, fixed=needs.fixed + result_bytes)
        # A third for work: thinner strips leave more room, but take longer each.
        strip = max(needs.row, min(strip_bytes, (max_bytes - needs.fixed) // (3 * needs.strips)))
        waiting = max_bytes - needs.fixed - needs.strips * strip
        if waiting >= 0:
            return Budget(strip, waiting, count)
        least = needs.least
    raise OutOfMemory(
        f"max_bytes of {max_bytes // 10**6} MB is too little for this picture: {ceil(least / 1e6)} MB are needed",
        reason="out of memory",
    )


def _counts(at_once: int, step: int) -> Iterator[int]:
    """All frames, half of them, and so on down to one step."""
    count = at_once
    while count > step:
        yield count
        count = max(step, count // 2 // step * step)
    yield count


def _past(step: Conv | InTime | Local, is_lone: bool) -> int:
    """How many frames of those before a strip at work has beside its own."""
    if is_lone or isinstance(step, Local):
        return 0
    return step.depth - 1 if isinstance(step, Conv) else step.past


def _rows_in_windows(step: LinearAttention) -> int:
    """How many rows of queries, keys and values its convolutions keep beside those that they work on."""
    return sum(each.kernel[0] - 1 for scale in step.scales for each in scale)


def _needs(plan: Plan, frames: int, height: int, width: int, dtype: torch.dtype, *, is_all: bool) -> _Needs:
    """For ``frames`` frames at a time, which ``is_all`` that there are, above the result."""
    row = keys = rows = most_rows = strips = most_strips = before = 0
    taken_frames = frames
    for step, channels, high, wide, made in plan.sizes(height, width, frames, first=is_all):
        size = channels * wide * made
        if isinstance(step, LinearAttention):
            row = max(row, 3 * step.inner * wide * made * _WORK_ITEM)
            rows += _rows_in_windows(step) * 3 * step.inner * wide * made * dtype.itemsize
            most_rows, most_strips = max(most_rows, rows), max(most_strips, strips + 1)
        if isinstance(step, (Attention, LinearAttention, Norm)):
            # Here everything waits, and what comes before is done.
            rows = strips = 0
        if isinstance(step, Attention):
            # Keys and values of the whole picture.
            keys = max(keys, 2 * size * high * dtype.itemsize)
        if isinstance(step, (Conv, InTime, Local)):
            taken = max(size, before // taken_frames * (taken_frames + _past(step, is_all and frames == 1)))
            row = max(row, taken * _WORK_ITEM)
            rows += taken * dtype.itemsize * (step.kernel[0] - 1 if isinstance(step, Conv) else 1)
            strips += 1
        if isinstance(step, Residual):
            # The shortcut waits for as many rows as the main path keeps back.
            rows += 2 * size * dtype.itemsize
            strips += 1
        most_rows, most_strips = max(most_rows, rows), max(most_strips, strips)
        before, taken_frames = size, made
    fixed = keys + max(_ROWS_AT_WORK * row, most_rows)
    return _Needs(fixed, row, max(_STRIPS_AT_WORK, most_strips + _STRIPS_OF_ONE))
