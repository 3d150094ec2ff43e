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
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, interpolate, linear

from remote_vae.errors import CallCancelled
from remote_vae.tiled.attention import attend
from remote_vae.tiled.moments import Moments
from remote_vae.tiled.plan import Attention, Conv, Norm, Plan, Pointwise, Residual, Step, Upsample, silu
from remote_vae.tiled.store import RowReader, Store
from remote_vae.tiled.weights import borrowed

# A level is small when it has so many times fewer positions than the largest.
_SMALL = 16

Fill = Callable[[torch.Tensor, torch.Tensor], None]


def never() -> bool:
    """Nobody cancels."""
    return False


def no_progress(done: float) -> None:
    """Nobody wants to know the share ``done``."""


class NotFinite(ArithmeticError):
    """A NaN or an infinity came up on the way."""


@dataclass
class Run:
    """One picture on its way through a plan.

    Attributes:
        device, dtype: of the computation.
        strip_bytes: how large a strip should be.
        pixels: rows x columns where there are most of them.
        strip_flops: how much work may be done before ``cancelled`` is asked again.
        store: for strips that wait.
        channels_last: the memory format of strips.
        finite: whether to stop at the first NaN.
        progress: called with the share of the work that is done.
    """

    device: torch.device
    dtype: torch.dtype
    strip_bytes: int
    strip_flops: float
    store: Store
    pixels: int = 0
    channels_last: bool = False
    finite: bool = False
    progress: Callable[[float], None] = no_progress
    cancelled: Callable[[], bool] = never
    work: float = 0.0
    done: float = field(default=0.0, init=False)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def tick(self, flops: float) -> None:
        """A strip is done.

        Raises:
            CallCancelled: and nobody wants the rest.
        """
        self.done += flops
        self.progress(min(1.0, self.done / self.work))
        if self.cancelled():
            raise CallCancelled("the VAE call was interrupted", reason="interrupted")

    def rows(self, width: int, channels: int, flops: float = 0.0) -> int:
        """How many rows of ``channels`` x ``width`` values, which cost ``flops`` each, make a strip."""
        rows = self.strip_bytes / (width * channels * self.dtype.itemsize)
        if flops:
            rows = min(rows, self.strip_flops / flops)
        return max(1, int(rows))


class Rows:
    """A picture that is given row by row: ``[1, channels, height, width]``.

    Attributes:
        work: floating point operations of it and of all that is before it.
    """

    def __init__(self, source: Rows | Run, channels: int, height: int, width: int, work: float = 0.0) -> None:
        self.run: Run = source.run if isinstance(source, Rows) else source
        self.work: float = work + (source.work if isinstance(source, Rows) else 0.0)
        self.channels, self.height, self.width = channels, height, width

    def read(self) -> Iterator[torch.Tensor]:
        """All rows from the top, once, in strips that the reader must not write to."""
        raise NotImplementedError


class Picture(Rows):
    """What goes in."""

    def __init__(self, run: Run, picture: torch.Tensor) -> None:
        super().__init__(run, *picture.shape[1:])
        self._picture = picture

    def read(self) -> Iterator[torch.Tensor]:
        for strip in _pieces(self._picture, self.run.rows(self.width, self.channels)):
            yield strip.to(self.run.device, self.run.dtype)


class Mapped(Rows):
    """A pointwise function, or an upsampling that no convolution follows."""

    def __init__(self, source: Rows, function: Callable[[torch.Tensor], torch.Tensor], scale: int = 1) -> None:
        super().__init__(source, source.channels, source.height * scale, source.width * scale)
        self._source = source
        self._function = function
        self._rows = max(1, self.run.rows(self.width, self.channels) // scale)

    def read(self) -> Iterator[torch.Tensor]:
        for strip in self._source.read():
            for piece in _pieces(strip, self._rows):
                yield self._function(piece)
                del piece
            del strip


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
            yield from _pieces(strip, rows)
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


class Convolved(Rows):
    """A convolution of what ``fill`` makes of the source's strips."""

    def __init__(self, source: Rows, step: Conv, fill: Fill | None, scale: int = 1) -> None:
        height, width = step.size(source.height * scale, source.width * scale)
        super().__init__(source, step.module.out_channels, height, width, _flops(step) * height * width)
        self._source = source
        self._step = step
        self._fill = fill
        self._scale = scale

    def read(self) -> Iterator[torch.Tensor]:
        with _SlidingConv(self.run, self._step, self._source, self._fill, self._scale) as convolution:
            for strip in self._source.read():
                yield from convolution.push(strip)
                del strip


class _SlidingConv:
    """A convolution that is given the rows of its picture bit by bit, and gives those that it can."""

    def __init__(self, run: Run, step: Conv, source: Rows, fill: Fill | None, scale: int = 1) -> None:
        self._run, self._step, self._fill, self._scale = run, step, fill, scale
        self._channels = source.channels
        self._height, self._width = source.height * scale, source.width * scale
        self._out_height, self._out_width = step.size(self._height, self._width)
        self._row_flops = _flops(step) * self._out_width
        rows = run.rows(max(self._width, self._out_width), max(self._channels, step.module.out_channels), self._row_flops)
        self._piece_rows = max(1, rows * step.stride // scale)
        self._received = self._produced = 0
        self._carry: torch.Tensor | None = None
        self._weights = borrowed(step.module, run.device, run.dtype)

    def __enter__(self) -> _SlidingConv:  # noqa: PYI034  # Self came with Python 3.11
        weight, bias = self._weights.__enter__()
        self._weight, self._bias = weight.to(memory_format=self._run.memory_format), bias
        return self

    def __exit__(self, *error: object) -> None:
        self._weights.__exit__(None, None, None)
        del self._weight, self._bias

    def push(self, strip: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows that have become possible."""
        for piece in _pieces(strip, self._piece_rows):
            out = self._next(piece)
            if out is not None:
                flops = self._row_flops * out.shape[2]
                yield out
                del out
                self._run.tick(flops)

    def _next(self, piece: torch.Tensor) -> torch.Tensor | None:
        step = self._step
        left, right, top, _ = step.pad
        kernel, stride = step.kernel[0], step.stride
        if self._fill is None and step.kernel == (1, 1) and stride == 1 and not any(step.pad):
            return conv2d(piece.to(self._run.dtype), self._weight, self._bias, groups=step.module.groups)
        start = self._received
        self._received += piece.shape[2] * self._scale
        ended = self._received == self._height
        possible = self._out_height if ended else max(0, (self._received + top - kernel) // stride + 1)
        first = self._produced * stride - top
        end = max(self._received, (self._out_height - 1) * stride - top + kernel) if ended else self._received
        # Columns are padded by the convolution itself where both sides are alike.
        extra = (left, right) if left != right else (0, 0)
        shape = (1, self._channels, end - first, sum(extra) + self._width)
        window = torch.empty(shape, device=self._run.device, dtype=self._run.dtype, memory_format=self._run.memory_format)
        inside = window[..., extra[0] : extra[0] + self._width]
        if sum(extra):
            window[..., : extra[0]] = 0
            window[..., extra[0] + self._width :] = 0
        if first < 0:
            window[:, :, :-first] = 0
        if end > self._received:
            window[:, :, self._received - first :] = 0
        if self._carry is not None:
            inside[:, :, start - first - self._carry.shape[2] : start - first] = self._carry
        filled = inside[:, :, start - first : self._received - first]
        if self._fill is None:
            filled.copy_(piece)
        else:
            self._fill(piece, filled)
        count = possible - self._produced
        self._produced = possible
        keep_from = max(0, possible * stride - top)
        self._carry = None if ended else inside[:, :, keep_from - first : self._received - first].clone()
        if not count:
            return None
        padding = (0, 0 if sum(extra) else left)
        return conv2d(window, self._weight, self._bias, stride, padding, groups=step.module.groups)


class Branch(Rows):
    """Gives its source's rows on to the main path of a residual, and puts what the shortcut makes of them into ``queue``."""

    def __init__(self, source: Rows, shortcut: Conv | None) -> None:
        own = 0.0 if shortcut is None else _flops(shortcut) * source.height * source.width
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
        with _SlidingConv(self.run, self._shortcut, self._source, None) as convolution:
            for strip in self._source.read():
                for out in convolution.push(strip):
                    self.queue.append(out)
                    del out
                yield strip
                del strip


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
                # The main path ends with a convolution, whose result nobody else has.
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
            rows = Attended(NormInput(rows, step.norm), step)
    if pending is not None:
        raise AssertionError("a norm has to be followed by a convolution")
    return rows


def _residual(step: Residual, rows: Rows) -> Rows:
    shortcut = step.shortcut[0] if step.shortcut else None
    if len(step.shortcut) > 1 or not isinstance(shortcut, (Conv, type(None))):
        raise AssertionError("a shortcut is one convolution at most")
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


def _flops(step: Conv) -> float:
    """Of one position of the result."""
    module = step.module
    rows, columns = step.kernel
    return 2.0 * rows * columns * module.in_channels // module.groups * module.out_channels


def _pieces(strip: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    """``strip`` cut into as few even pieces as have at most ``rows`` rows."""
    height = strip.shape[2]
    count = ceil(height / rows)
    if count <= 1:
        yield strip
        return
    for index in range(count):
        yield strip[:, :, height * index // count : height * (index + 1) // count]
