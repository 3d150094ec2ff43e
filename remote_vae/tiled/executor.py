"""Runs a plan over one picture in strips of rows, top to bottom.

Every step is a node that gives its rows lazily, strip by strip, when the next node asks for them. A convolution keeps back the
few rows that its next strip needs, so nothing is computed twice. A GroupNorm must have seen the whole picture before it can
give its first row: there strips wait in a queue, and each is let go of when it has been used. So two activations of the
largest size are alive at the most, where the whole VAE has three, and its temporaries are as small as a strip. A norm of each
position waits for nothing: between two waits only the rows on their way are alive.

A video's strips have all frames that are worked on at a time. Convolutions in time keep what the next frames need of them.

Where that is more than may be taken, strips wait elsewhere (``offload.py``), on a processor in a file. The other way, to
compute rows again from what is before a norm, was here and is gone. A decode in a tenth of the whole VAE's bytes takes so many
times the operations: sd 6.6 at 512 px, 6.4 at 1024 px and 5.7 at 2048 px, small 4.8, 4.1 and 2.8; an encode 1.1 to 3.3.
Measured (small decode 1024 px, one thread, medians of four runs each in turns): rows again 27 s of the processor, RSS rises by
75 MB; files 9.1 s and 76 MB, with 0.5 GB of files at the peak; 11 s where every strip had to reach the disk and be read from
it. One run each of sd encode 512 px: rows again 40 s and 71 MB, files 15 s and 77 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.functional import interpolate, linear

from remote_vae.tiled.attention import attend
from remote_vae.tiled.budget import SMALL
from remote_vae.tiled.convolution import Convolved, ConvolvedInTime, SlidingConv, flops_of
from remote_vae.tiled.linear_attention import LinearlyAttended
from remote_vae.tiled.local_steps import Locally, RmsNormed, SlidingLocal
from remote_vae.tiled.norms import Fill, Function, filler, norm_input, rms_norm
from remote_vae.tiled.plan import (
    Attention,
    Conv,
    InTime,
    LinearAttention,
    Local,
    Norm,
    Plan,
    Pointwise,
    Residual,
    RmsNorm,
    Step,
    Upsample,
)
from remote_vae.tiled.rows import Mapped, Picture, Rows, Run, pieces
from remote_vae.tiled.store import RowReader
from remote_vae.tiled.weights import borrowed

# How large the scores of a portion of attention may be, which torch may compute as a whole: in strips, and in bytes.
_SCORES_STRIPS, _SCORES_BYTES = 8, 64 << 20

Push = Callable[[torch.Tensor], Iterator[torch.Tensor]]
Weights = tuple[torch.Tensor, "torch.Tensor | None"]


class Branch(Rows):
    """Gives its source's rows on to the main path of a residual, and puts what the shortcut makes of them into ``queue``.

    A shortcut that makes more of them works later, when they are taken out.
    """

    def __init__(self, source: Rows, shortcut: Conv | Local | None) -> None:
        own = flops_of(shortcut, source) * source.height * source.width if isinstance(shortcut, Conv) else 0.0
        super().__init__(source, source.channels, source.height, source.width, own)
        self._queue = self.queue()
        self._source = source
        self._shortcut = shortcut
        self._is_late = isinstance(shortcut, Local) and shortcut.up > shortcut.down

    def read(self) -> Iterator[torch.Tensor]:
        with ExitStack() as stack:
            push = self._push(stack)
            for strip in self._source.read():
                for out in push(strip):
                    self._queue.append(out)
                    del out
                yield strip
                del strip

    def shortcut(self) -> Iterator[torch.Tensor]:
        """What the shortcut makes, as far as the rows have come that it needs."""
        if not self._is_late or not isinstance(self._shortcut, Local):
            yield from self._queue.read(last=True)
            return
        push = SlidingLocal(self._shortcut, self._source).push
        for strip in self._queue.read(last=True):
            yield from push(strip)
            del strip

    def _push(self, stack: ExitStack) -> Push:
        if isinstance(self._shortcut, Conv):
            return stack.enter_context(SlidingConv(self._shortcut, self._source, None)).push
        if isinstance(self._shortcut, Local) and not self._is_late:
            return SlidingLocal(self._shortcut, self._source).push
        return lambda strip: iter((strip,))


class Sum(Rows):
    """The main path and, from the branch's queue, the shortcut."""

    def __init__(self, main: Rows, branch: Branch) -> None:
        super().__init__(main, main.channels, main.height, main.width)
        self._main = main
        self._branch = branch
        self._is_small = SMALL * self.height * self.width <= self.run.pixels

    def read(self) -> Iterator[torch.Tensor]:
        shortcut = RowReader(self._branch.shortcut())
        for part in self._main.read():
            # The small levels, where it costs next to nothing, carry what half precision would round away.
            strip = part.float() if self._is_small and part.dtype != torch.float64 else part
            row = 0
            for piece in shortcut.read(strip.shape[2]):
                # The main path ends with what makes a tensor that nobody else has.
                strip[:, :, row : row + piece.shape[2]] += piece
                row += piece.shape[2]
                del piece
            del part
            yield strip
            del strip


class Attended(Rows):
    """Self-attention over the whole picture and the residual. Keys and values are there whole, queries come in strips.

    Of a video, each frame attends to itself alone.
    """

    def __init__(self, source: Rows, step: Attention) -> None:
        work = 4.0 * source.frames * source.channels * (source.height * source.width) ** 2
        waiting = norm_input(source, step.norm)
        super().__init__(waiting, source.channels, source.height, source.width, work)
        self._source = waiting
        self._step = step

    def read(self) -> Iterator[torch.Tensor]:
        step, run = self._step, self.run
        with ExitStack() as stack:
            key = self._weights(stack, step.key, 1)
            value = self._weights(stack, step.value, 2)
            at = 0
            for strip in self._source.read(last=False):
                if not at:
                    # Not before all that comes before is done.
                    keys, values = self._whole(key), self._whole(value)
                for piece in pieces(strip, self.strip_rows):
                    tokens = self._tokens(piece)
                    for whole, weights in ((keys, key), (values, value)):
                        whole[:, :, at : at + tokens.shape[1]] = self._project(tokens, weights)
                    at += tokens.shape[1]
                    del piece, tokens
                    run.tick(0.0)
                del strip
        with ExitStack() as stack:
            query = self._weights(stack, step.query, 0)
            out = stack.enter_context(borrowed(step.out, run.device, run.dtype))
            for strip in self._source.read():
                for piece in pieces(strip, self.strip_rows):
                    queries = self._project(self._tokens(piece), query)
                    yield piece + self._mixed(queries, keys, values, out).reshape(piece.shape)
                    del piece, queries
                del strip

    def _mixed(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: Weights) -> torch.Tensor:
        """``[frames, C, N]`` of some positions."""
        flops, tick = self.run.policy.strip_flops, self.run.tick
        mixed = attend(queries, keys, values, flops=flops, scores_bytes=self._scores_bytes, tick=tick)
        return linear(mixed.transpose(1, 2).flatten(2), out[0].flatten(1), out[1]).transpose(1, 2)

    @property
    def _scores_bytes(self) -> int:
        strip = self.phase.strip_bytes
        return min(_SCORES_STRIPS * strip, max(_SCORES_BYTES, 2 * strip))

    def _weights(self, stack: ExitStack, module: Any, part: int) -> Weights:
        """Of one projection; of one layer for all, its part."""
        weight, bias = stack.enter_context(borrowed(module, self.run.device, self.run.dtype))
        if not self._step.is_fused:
            return weight, bias
        return weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part]

    def _tokens(self, strip: torch.Tensor) -> torch.Tensor:
        """``[frames, C, n, W]`` to normalised ``[frames, n W, C]``."""
        return self._source.normalise(strip).to(self.run.dtype).flatten(2).transpose(1, 2)

    def _whole(self, weights: Weights) -> torch.Tensor:
        """Memory for all positions, ``[frames, heads, H W, C / heads]``."""
        shape = (self.frames, self._step.heads, self.height * self.width, weights[0].shape[0] // self._step.heads)
        return torch.empty(shape, device=self.run.device, dtype=self.run.dtype)

    def _project(self, tokens: torch.Tensor, weights: Weights) -> torch.Tensor:
        """``[frames, N, C]`` to ``[frames, heads, N, C / heads]``."""
        projected = linear(tokens, weights[0].flatten(1), weights[1])
        return projected.reshape(*tokens.shape[:2], self._step.heads, -1).transpose(1, 2)


# --- from a plan to nodes ----------------------------------------------------------------------------------------------


def build(plan: Plan, picture: torch.Tensor, run: Run) -> Rows:
    """The node that gives the result of ``plan`` for ``picture`` ``[frames, C, H, W]``. Sets the run's amount of work."""
    frames, _, height, width = picture.shape
    made = plan.sizes(height, width, frames, first=run.past.first)
    run.pixels = max(each.rows * each.columns for each in made)
    rows = _chain(plan.steps, Picture(run, picture))
    run.work = max(1.0, rows.work)
    return rows


def _chain(steps: tuple[Step, ...], rows: Rows, pending: Fill | None = None) -> Rows:
    """Nodes for ``steps``, one on the other; ``pending`` is what fills the window of the first convolution."""
    scale = 1
    for index, step in enumerate(steps):
        if isinstance(step, (Norm, RmsNorm)):
            if not _feeds_conv(steps, index):
                rows = _normed(step, rows)
                continue
            rows, pending = _filled(step, rows, _activation_after(steps, index))
        elif isinstance(step, Upsample) and _feeds_conv(steps, index):
            scale = step.scale
            pending = _upsampler(scale)
        elif isinstance(step, Conv):
            rows = Convolved(rows, step, pending, scale)
            pending, scale = None, 1
        elif not isinstance(step, Pointwise) or pending is None:
            # A function after a norm belongs to the filling of the convolution's window.
            rows = _node(step, rows)
    return rows


def _node(step: Step, rows: Rows) -> Rows:
    if isinstance(step, Pointwise):
        return Mapped(rows, step.run)
    if isinstance(step, Upsample):
        return Mapped(rows, _nearest(step.scale), step.scale)
    if isinstance(step, Residual):
        return _residual(step, rows)
    if isinstance(step, Local):
        return Locally(rows, step)
    if isinstance(step, InTime):
        return ConvolvedInTime(rows, step)
    if isinstance(step, Attention):
        return Attended(rows, step)
    if isinstance(step, LinearAttention):
        return LinearlyAttended(rows, step)
    raise AssertionError(f"no node for {step}")


def _filled(step: Norm | RmsNorm, rows: Rows, function: Function | None) -> tuple[Rows, Fill]:
    """What a convolution reads after a norm and ``function``, and how it fills its window with it."""
    if isinstance(step, RmsNorm):
        return rows, filler(rms_norm(step, rows.run), function, rows.run)
    source = norm_input(rows, step.module)
    return source, source.fill(function)


def _normed(step: Norm | RmsNorm, rows: Rows) -> Rows:
    if isinstance(step, RmsNorm):
        return RmsNormed(rows, step)
    source = norm_input(rows, step.module)
    return Mapped(source, source.normalise)


def _residual(step: Residual, rows: Rows) -> Rows:
    shortcut = step.shortcut[0] if step.shortcut else None
    if len(step.shortcut) > 1 or not isinstance(shortcut, (Conv, Local, type(None))):
        raise AssertionError("a shortcut is one step at most")
    main, fill = step.main, None
    if isinstance(main[0], Norm) and _feeds_conv(main, 0):
        # The norm's strips wait before the branch, so that they do not wait in its queue as well.
        function = _activation_after(main, 0)
        rows, fill = _filled(main[0], rows, function)
        main = main[1 if function is None else 2 :]
    branch = Branch(rows, shortcut)
    return Sum(_chain(main, branch, fill), branch)


def _activation_after(steps: tuple[Step, ...], index: int) -> Function | None:
    after = steps[index + 1] if index + 1 < len(steps) else None
    return after.run if isinstance(after, Pointwise) else None


def _feeds_conv(steps: tuple[Step, ...], index: int) -> bool:
    """Whether a convolution is what comes next, or after a function that comes next to a norm."""
    at = index + 1
    if at < len(steps) and isinstance(steps[at], Pointwise) and not isinstance(steps[index], Upsample):
        at += 1
    return at < len(steps) and isinstance(steps[at], Conv)


def _upsampler(scale: int) -> Fill:
    def fill(strip: torch.Tensor, window: torch.Tensor) -> None:
        *frames, rows, columns = strip.shape
        # Rows and columns in parts of ``scale``: into them every value is written as often as it is needed.
        window.view(*frames, rows, scale, columns, scale).copy_(strip[:, :, :, None, :, None])

    return fill


def _nearest(scale: int) -> Function:
    return lambda strip: interpolate(strip, scale_factor=float(scale), mode="nearest")
