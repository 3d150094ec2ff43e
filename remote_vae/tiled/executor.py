"""Runs a plan over one picture in strips of rows, top to bottom.

Every step is a node that gives its rows lazily, strip by strip, when the next node asks for them. A convolution keeps back the
few rows that its next strip needs, so nothing is computed twice. A GroupNorm must have seen the whole picture before it can
give its first row: there strips wait in a queue, and each is let go of when it has been used. So two activations of the
largest size are alive at the most, where the whole VAE has three, and its temporaries are as small as a strip.

Where that is more than may be taken, strips wait elsewhere (``offload.py``), on a processor in a file. The other way, to
compute rows again from what is before a norm, was here and is gone. A decode in a tenth of the whole VAE's bytes takes so many
times the operations: sd 6.6 at 512 px, 6.4 at 1024 px and 5.7 at 2048 px, small 4.8, 4.1 and 2.8; an encode 1.1 to 3.3.
Measured (small decode 1024 px, one thread, medians of four runs each in turns): rows again 27 s of the processor, RSS rises by
75 MB; files 9.1 s and 76 MB, with 0.5 GB of files at the peak; 11 s where every strip had to reach the disk and be read from
it. One run each of sd encode 512 px: rows again 40 s and 71 MB, files 15 s and 77 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.functional import batch_norm, interpolate, linear

from remote_vae.tiled.attention import attend
from remote_vae.tiled.convolution import Convolved, Fill, SlidingConv, flops_of
from remote_vae.tiled.linear_attention import LinearlyAttended
from remote_vae.tiled.local_steps import Locally, RmsNormed, SlidingLocal
from remote_vae.tiled.moments import Moments
from remote_vae.tiled.plan import (
    Attention,
    Conv,
    LinearAttention,
    Local,
    Norm,
    Plan,
    Pointwise,
    Residual,
    RmsNorm,
    Step,
    Upsample,
    silu,
)
from remote_vae.tiled.rows import Mapped, NotFinite, Picture, Rows, Run, pieces
from remote_vae.tiled.store import RowReader
from remote_vae.tiled.weights import borrowed

# A level is small when it has so many times fewer positions than the largest.
_SMALL = 16


class NormInput(Rows):
    """What a GroupNorm is made of, which the whole of has to be seen before its first row can be given: all strips wait here.

    They are given as they are, for those who normalise them piece by piece.
    """

    def __init__(self, source: Rows, norm: nn.GroupNorm) -> None:
        super().__init__(source, source.channels, source.height, source.width)
        self._source = source
        self._queue = self.run.store.queue()
        self._norm = norm
        self._affine: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    def read(self, *, last: bool = True) -> Iterator[torch.Tensor]:
        """As of all ``Rows``; not ``last``: they will be read once more."""
        if self._affine is None:
            self._affine = self._collect()
        rows = self.run.rows(self.width, self.channels)
        for strip in self._queue.read(last=last):
            yield from pieces(strip, rows)
            del strip

    def normalise(self, strip: torch.Tensor) -> torch.Tensor:
        """The rows of ``strip``, normalised, in a new tensor; in float32 where they are of half precision."""
        if self._affine is None:
            raise AssertionError("nothing was read yet")
        mean, variance, weight, bias = self._affine
        # A norm with given statistics: x * (weight / std) + (bias - mean * weight / std), as group_norm computes it.
        return batch_norm(strip.float(), mean, variance, weight, bias, training=False, eps=self._norm.eps)

    def _collect(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Mean, variance, weight and bias of each channel, when all strips have come."""
        moments = Moments(self._norm.num_groups, self.channels, self.run.device)
        for strip in self._source.read():
            moments.add(strip)
            self._queue.append(strip)
            del strip
        if self.run.finite and not moments.are_finite():
            raise NotFinite("a GroupNorm")
        if moments.second_pass():
            for strip in self._queue.read(last=False):
                moments.add(strip)
                del strip
        with borrowed(self._norm, self.run.device, torch.float32) as weights:
            return (*moments.by_channel(), *weights)


class Branch(Rows):
    """Gives its source's rows on to the main path of a residual, and puts what the shortcut makes of them into ``queue``."""

    def __init__(self, source: Rows, shortcut: Conv | Local | None) -> None:
        own = flops_of(shortcut) * source.height * source.width if isinstance(shortcut, Conv) else 0.0
        super().__init__(source, source.channels, source.height, source.width, own)
        self.queue = self.run.store.queue()
        self._source = source
        self._shortcut = shortcut

    def read(self) -> Iterator[torch.Tensor]:
        if self._shortcut is None:
            for strip in self._source.read():
                self.queue.append(strip)
                yield strip
                del strip
            return
        with _sliding(self.run, self._shortcut, self._source) as shortcut:
            for strip in self._source.read():
                for out in shortcut.push(strip):
                    self.queue.append(out)
                    del out
                yield strip
                del strip


def _sliding(run: Run, step: Conv | Local, source: Rows) -> SlidingConv | SlidingLocal:
    return SlidingConv(run, step, source, None) if isinstance(step, Conv) else SlidingLocal(run, step, source)


class Sum(Rows):
    """The main path and, from the branch's queue, the shortcut."""

    def __init__(self, main: Rows, branch: Branch) -> None:
        super().__init__(main, main.channels, main.height, main.width)
        self._main = main
        self._branch = branch
        self._is_small = _SMALL * self.height * self.width <= self.run.pixels

    def read(self) -> Iterator[torch.Tensor]:
        shortcut = RowReader(self._branch.queue.read(last=True))
        for part in self._main.read():
            # The small levels, where it costs next to nothing, carry what half precision would round away.
            strip = part.float() if self._is_small else part
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
    """Self-attention over the whole picture and the residual. Keys and values are there whole, queries come in strips."""

    def __init__(self, source: NormInput, step: Attention) -> None:
        work = 4.0 * source.channels * (source.height * source.width) ** 2
        super().__init__(source, source.channels, source.height, source.width, work)
        self._source = source
        self._step = step

    def read(self) -> Iterator[torch.Tensor]:
        step, run = self._step, self.run
        with borrowed(step.key, run.device, run.dtype) as key, borrowed(step.value, run.device, run.dtype) as value:
            keys, values = self._whole(key), self._whole(value)
            at = 0
            for strip in self._source.read(last=False):
                tokens = self._tokens(strip)
                for whole, weights in ((keys, key), (values, value)):
                    whole[:, :, at : at + tokens.shape[1]] = self._project(tokens, weights)
                at += tokens.shape[1]
                del strip, tokens
                run.tick(0.0)
        with borrowed(step.query, run.device, run.dtype) as query, borrowed(step.out, run.device, run.dtype) as out:
            for strip in self._source.read():
                mixed = attend(
                    self._project(self._tokens(strip), query),
                    keys,
                    values,
                    flops=run.strip_flops,
                    scores_bytes=8 * run.strip_bytes,
                    tick=run.tick,
                )
                mixed = linear(mixed.transpose(1, 2).flatten(2), out[0].flatten(1), out[1])
                yield strip + mixed.transpose(1, 2).reshape(strip.shape)
                del strip, mixed

    def _tokens(self, strip: torch.Tensor) -> torch.Tensor:
        """``[1, C, n, W]`` to normalised ``[1, n W, C]``."""
        return self._source.normalise(strip).to(self.run.dtype).flatten(2).transpose(1, 2)

    def _whole(self, weights: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """Memory for all positions, ``[1, heads, H W, C / heads]``."""
        shape = (1, self._step.heads, self.height * self.width, weights[0].shape[0] // self._step.heads)
        return torch.empty(shape, device=self.run.device, dtype=self.run.dtype)

    def _project(self, tokens: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        """``[1, N, C]`` to ``[1, heads, N, C / heads]``."""
        projected = linear(tokens, weights[0].flatten(1), weights[1])
        return projected.reshape(1, tokens.shape[1], self._step.heads, -1).transpose(1, 2)


# --- from a plan to nodes ----------------------------------------------------------------------------------------------


def build(plan: Plan, picture: torch.Tensor, run: Run) -> Rows:
    """The node that gives the result of ``plan`` for ``picture`` ``[1, C, H, W]``. Sets the run's amount of work."""
    run.pixels = max(rows * columns for _, _, rows, columns in plan.sizes(*picture.shape[2:]))
    rows = _chain(plan.steps, Picture(run, picture))
    run.work = max(1.0, rows.work)
    return rows


def _chain(steps: tuple[Step, ...], rows: Rows, pending: Fill | None = None) -> Rows:
    """Nodes for ``steps``, one on the other; ``pending`` is what fills the window of the first convolution."""
    scale = 1
    for index, step in enumerate(steps):
        before_conv = index + 1 < len(steps) and isinstance(steps[index + 1], Conv)
        if isinstance(step, Norm):
            rows = source = NormInput(rows, step.module)
            pending = _filler(source, _activation_after(steps, index))
        elif isinstance(step, Upsample) and before_conv:
            scale = step.scale
            pending = _upsampler(scale)
        elif isinstance(step, Conv):
            rows = Convolved(rows, step, pending, scale)
            pending, scale = None, 1
        elif isinstance(step, Pointwise):
            # After a norm it belongs to the filling of the convolution's window.
            rows = rows if pending is not None else Mapped(rows, step.run)
        elif isinstance(step, Upsample):
            rows = Mapped(rows, _nearest(step.scale), step.scale)
        elif isinstance(step, Residual):
            rows = _residual(step, rows)
        else:
            rows = _simple(step, rows)
    if pending is not None:
        raise AssertionError("a norm has to be followed by a convolution")
    return rows


def _simple(step: RmsNorm | Local | Attention | LinearAttention, rows: Rows) -> Rows:
    """Those that nothing around them matters to."""
    if isinstance(step, RmsNorm):
        return RmsNormed(rows, step)
    if isinstance(step, Local):
        return Locally(rows, step)
    if isinstance(step, LinearAttention):
        return LinearlyAttended(rows, step)
    return Attended(NormInput(rows, step.norm), step)


def _residual(step: Residual, rows: Rows) -> Rows:
    shortcut = step.shortcut[0] if step.shortcut else None
    if len(step.shortcut) > 1 or not isinstance(shortcut, (Conv, Local, type(None))):
        raise AssertionError("a shortcut is one step at most")
    main, fill = step.main, None
    if isinstance(main[0], Norm):
        # The norm's strips wait before the branch, so that they do not wait in its queue as well.
        rows = source = NormInput(rows, main[0].module)
        function = _activation_after(main, 0)
        fill = _filler(source, function)
        main = main[1 if function is None else 2 :]
    branch = Branch(rows, shortcut)
    return Sum(_chain(main, branch, fill), branch)


def _activation_after(steps: tuple[Step, ...], index: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    after = steps[index + 1] if index + 1 < len(steps) else None
    return after.run if isinstance(after, Pointwise) else None


def _filler(source: NormInput, function: Callable[[torch.Tensor], torch.Tensor] | None) -> Fill:
    def fill(strip: torch.Tensor, window: torch.Tensor) -> None:
        values = source.normalise(strip)
        # Apple's GPUs have written wrong values into a part of a tensor.
        if function is silu and values.dtype == window.dtype and window.device.type in ("cpu", "cuda"):
            torch.ops.aten.silu.out(values, out=window)
        else:
            window.copy_(values if function is None else function(values))

    return fill


def _upsampler(scale: int) -> Fill:
    nearest = _nearest(scale)

    def fill(strip: torch.Tensor, window: torch.Tensor) -> None:
        window.copy_(nearest(strip))

    return fill


def _nearest(scale: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda strip: interpolate(strip, scale_factor=float(scale), mode="nearest")
