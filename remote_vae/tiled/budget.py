"""How much memory a plan needs, and how to spend what there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from remote_vae.errors import OutOfMemory
from remote_vae.tiled.plan import (
    Attention,
    Conv,
    InTime,
    LinearAttention,
    Local,
    Made,
    Norm,
    Plan,
    Residual,
    Step,
    Upsample,
    sizes_of,
)
from remote_vae.tiled.policy import Policy

# What is alive beside the strips that wait, in strips: a window, the one before it or what is convolved of it, the window of
# the convolution after that, and what convolutions themselves may need; in the attention also queries and their mixture. And in
# rows of the widest convolution.
_STRIPS_AT_WORK = 4
_STRIPS_OF_ATTENTION = 7
_ROWS_AT_WORK = 6
# Where more convolutions follow each other and nothing waits: for each a strip, and beside them the one that is normalised, and
# its copy, in a window and in the convolution's own order.
_FEW = 2
_STRIPS_OF_ONE = 4
# Half-precision strips are normalised in float32: twice as large, and what comes out too.
_STRIPS_WIDENED = 4
_WORK_ITEM = 4
# In how many phases a strip is used.
_LIVES = 3
# A level is small when it has so many times fewer positions than the largest.
SMALL = 16


@dataclass(frozen=True)
class Phase:
    """From one place where the whole picture waits to the next one.

    Attributes:
        strip_bytes: how large a strip at work should be.
        waiting: bytes that may wait on the compute device of what comes here and until it is done with, None: as many as there
            are.
        keeps: whether convolutions keep their windows, else copies of the rows that they need again.
    """

    strip_bytes: int
    waiting: int | None = None
    keeps: bool = False


@dataclass(frozen=True)
class Budget:
    """How one picture or video is worked on.

    Attributes:
        phases: in order.
        frames: how many frames are worked on at a time; of the first ones, by ``Frames.step`` less than one fewer.
    """

    phases: tuple[Phase, ...]
    frames: int = 1


@dataclass
class _Needs:
    """What is alive at a time in one phase.

    Attributes:
        waiting: bytes that wait.
        row: bytes of a row, which a strip has at least.
        rows: bytes of the rows that are kept.
        keys: bytes of what attention has of the whole picture.
        strips, more: how many strips are at work; ``more`` of them for what changes the size.
        convolutions: that are at work together.
    """

    waiting: int = 0
    row: int = 0
    rows: int = 0
    keys: int = 0
    strips: int = 0
    more: int = 0
    convolutions: int = 0

    @property
    def fixed(self) -> int:
        """Bytes, whatever the strips are like, without those that wait."""
        return self.keys + max(_ROWS_AT_WORK * self.row, self.rows)

    def least(self, policy: Policy) -> int:
        """Bytes with which it can be done."""
        return self.fixed + (self.strips + policy.moving) * self.row

    @property
    def keeps(self) -> bool:
        return self.convolutions <= 1


def whole_values(plan: Plan, height: int, width: int) -> int:
    """How many values are alive at the peak of the whole VAE, of one picture.

    That is in the largest residual block: what went in, and the first convolution's result, normalised, activated, and the
    second's.
    """
    peak = 0
    for made in plan.sizes(height, width):
        if isinstance(made.step, Residual):
            entered = next((part.module.in_channels for part in made.step.main if isinstance(part, Conv)), made.channels)
            peak = max(peak, (entered + 4 * made.channels) * made.rows * made.columns)
    return peak


def plan_budget(
    plan: Plan,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    policy: Policy,
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
        policy: of the compute device.
        max_bytes: None is no limit.
        result_bytes: of the result of the whole batch.

    Raises:
        OutOfMemory: it cannot be done in so little; the message says what would do.
    """
    frames, height, width = size
    step = 1 if plan.frames is None else plan.frames.step
    at_once = frames + step - 1
    if max_bytes is None:
        needs = _phases(plan, frames, height, width, dtype, policy, is_all=True)
        target = None
        if policy.share is not None:
            target = int(policy.share * whole_values(plan, height, width) * frames * dtype.itemsize) - result_bytes
        strips = _evened(_until_used([_unlimited(each, policy, target) for each in needs]))
        return Budget(tuple(Phase(strip, None, each.keeps) for strip, each in zip(strips, needs, strict=True)), at_once)
    least = 0
    for count in _counts(at_once, step):
        needs = _phases(plan, min(count, frames), height, width, dtype, policy, is_all=count == at_once)
        least = result_bytes + max(each.least(policy) for each in needs)
        if least <= max_bytes:
            return Budget(_limited(needs, policy, max_bytes - result_bytes), count)
    raise OutOfMemory(
        f"max_bytes of {max_bytes // 10**6} MB is too little for this picture: {ceil(least / 1e6)} MB are needed",
        reason="out of memory",
    )


def _unlimited(needs: _Needs, policy: Policy, target: int | None) -> int:
    """Bytes of a strip."""
    if target is None:
        return policy.strip_bytes
    room = target - needs.fixed - needs.waiting
    return max(policy.least_bytes, min(policy.strip_bytes, room // needs.strips))


def _limited(needs: list[_Needs], policy: Policy, most: int) -> tuple[Phase, ...]:
    """The phases where ``most`` bytes may be alive."""
    divided = [_divided(each, policy, most - each.fixed) for each in needs]
    strips = _evened(_until_used([strip for strip, _ in divided]))
    phases = []
    for index, (strip, each) in enumerate(zip(strips, needs, strict=True)):
        # Where all fits that will wait by then, nothing has to have gone before.
        later = zip(divided[index + 1 : index + _LIVES], needs[index + 1 :], strict=False)
        waiting = min(divided[index][1], *(left for (_, left), then in later if left < then.waiting), most)
        phases.append(Phase(max(each.row, strip), waiting, each.keeps))
    return tuple(phases)


def _divided(needs: _Needs, policy: Policy, room: int) -> tuple[int, int]:
    """How many of the bytes of ``room`` a strip has, and how many may wait."""
    count, moved = needs.strips, needs.strips + policy.moving
    strip = (room - needs.waiting) // count
    spilled = min(policy.spilled_bytes, room // (policy.work_share * moved))
    if strip < spilled:
        # All would fit with thinner strips alone.
        strip, count = max(needs.row, spilled), moved
    strip = min(policy.strip_bytes, strip)
    return strip, room - count * strip


def _until_used(sizes: Sequence[int]) -> list[int]:
    """The least from each phase to when all that comes in it is used.

    What comes in one phase is read in the next one; what a shortcut has made of it, until the end of the one after that.
    """
    return [min(sizes[index : index + _LIVES]) for index in range(len(sizes))]


def _evened(sizes: list[int]) -> list[int]:
    """No strip only a little larger than those of the next phase, where it would be cut in two."""
    made = sizes[-1:]
    for size in reversed(sizes[:-1]):
        made.append(made[-1] if made[-1] < size < 2 * made[-1] else size)
    return made[::-1]


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


def _phases(
    plan: Plan, frames: int, height: int, width: int, dtype: torch.dtype, policy: Policy, *, is_all: bool
) -> list[_Needs]:
    """For ``frames`` frames at a time, which ``is_all`` that there are, above the result."""
    walk = _Walk(plan, (frames, height, width), dtype, is_all=is_all)
    walk.through(plan.steps)
    more = _STRIPS_WIDENED if policy.widens and dtype.itemsize < _WORK_ITEM else 0
    return [replace(each, strips=each.strips + more) for each in walk.end()]


class _Walk:
    """Down a plan, phase by phase."""

    def __init__(self, plan: Plan, size: tuple[int, int, int], dtype: torch.dtype, *, is_all: bool) -> None:
        frames, height, width = size
        self._is_all = is_all
        self._item = dtype.itemsize
        self._made = Made(plan.steps[0], plan.first_weight.shape[1], height, width, frames)
        self._pixels = max(each.rows * each.columns for each in plan.sizes(height, width, frames, first=is_all))
        self._taken = 0
        self._held = self._before = 0
        self._now = _Needs()
        self._past: list[_Needs] = []

    def through(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            if isinstance(step, Residual):
                self._residual(step)
            else:
                self._one(step)

    def end(self) -> list[_Needs]:
        """Every phase."""
        self._close(0)
        return self._past

    def _residual(self, step: Residual) -> None:
        entered, main = self._bytes(), step.main
        if isinstance(main[0], Norm):
            # Its strips wait before the shortcut's do.
            self._wait()
            main = main[1:]
        *_, last = sizes_of(step.main, self._made, first=self._is_all)
        late = not step.shortcut or (isinstance(step.shortcut[0], Local) and step.shortcut[0].up > step.shortcut[0].down)
        held = entered if late else self._bytes(last)
        self._held += held
        self._now.convolutions += sum(isinstance(each, Conv) for each in step.shortcut)
        self.through(main)
        self._held -= held
        # The shortcut waits for as many rows as the main path keeps back.
        self._now.rows += 2 * self._row() * self._item
        if main is step.main:
            self._now.strips += 1

    def _one(self, step: Step) -> None:
        frames = self._made.frames
        *_, self._made = sizes_of((step,), self._made, first=self._is_all)
        row = self._row()
        if isinstance(step, (Attention, Norm, LinearAttention)):
            self._wait_for(step)
        if isinstance(step, (Conv, InTime, Local)):
            is_lone = self._is_all and self._made.frames == 1 and frames == 1
            taken = max(row, self._taken // frames * (frames + _past(step, is_lone)))
            self._now.row = max(self._now.row, taken * _WORK_ITEM)
            self._now.rows += taken * self._item * (step.kernel[0] - 1 if isinstance(step, Conv) else 1)
            self._now.strips += 1
            self._now.convolutions += 1
        if isinstance(step, (Upsample, Local)):
            # The strips before are a part of the picture that is so much larger; a function copies what it puts elsewhere.
            self._now.more += 1
        self._taken = row

    def _wait_for(self, step: Attention | Norm | LinearAttention) -> None:
        """Everything waits before ``step``."""
        positions = self._made.rows * self._made.columns * self._made.frames
        if isinstance(step, LinearAttention):
            wide = step.inner * self._made.columns * self._made.frames
            self._now.row = max(self._now.row, 3 * wide * _WORK_ITEM)
            self._now.rows += _rows_in_windows(step) * 3 * wide * self._item
            self._now.strips += 1
            self._wait(step.inner * positions * (1 + len(step.scales)) * self._item)
            self._now.row = max(self._now.row, 3 * wide * _WORK_ITEM)
            return
        self._wait()
        if isinstance(step, Attention):
            self._now.keys = 2 * self._made.channels * positions * self._item
            self._now.strips = _STRIPS_OF_ATTENTION - _STRIPS_OF_ONE

    def _wait(self, more: int = 0) -> None:
        """All of what was made last, and ``more`` bytes."""
        waiting = self._bytes() + self._held + more
        self._close(waiting)
        self._before = waiting
        self._now = _Needs(row=self._row() * _WORK_ITEM)

    def _close(self, after: int) -> None:
        now = self._now
        now.waiting = max(self._before, after)
        is_short = now.convolutions <= _FEW and not now.keys
        now.strips = now.more + (_STRIPS_AT_WORK if is_short else now.strips + _STRIPS_OF_ONE)
        self._past.append(now)

    def _bytes(self, made: Made | None = None) -> int:
        made = made or self._made
        positions = made.rows * made.columns
        # Small levels are carried in float32.
        item = max(self._item, _WORK_ITEM) if SMALL * positions <= self._pixels else self._item
        return made.channels * positions * made.frames * item

    def _row(self) -> int:
        return self._made.channels * self._made.columns * self._made.frames
