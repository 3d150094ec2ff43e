"""Convolutions of a picture whose rows come bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import torch
from torch.nn.functional import conv2d, conv3d

from remote_vae.tiled.norms import Fill
from remote_vae.tiled.plan import Conv, InTime
from remote_vae.tiled.rows import Rows, pieces
from remote_vae.tiled.weights import borrowed

# By which part of it a strip may be larger than it should be.
_SLACK = 5


class Convolved(Rows):
    """A convolution of what ``fill`` makes of the source's strips."""

    def __init__(self, source: Rows, step: Conv, fill: Fill | None, scale: int = 1) -> None:
        height, width = step.size(source.height * scale, source.width * scale)
        super().__init__(source, step.module.out_channels, height, width, flops_of(step, source) * height * width)
        self._source = source
        self._step = step
        self._fill = fill
        self._scale = scale

    def read(self) -> Iterator[torch.Tensor]:
        with SlidingConv(self._step, self._source, self._fill, self._scale) as convolution:
            for strip in self._source.read():
                yield from convolution.push(strip)
                del strip


class SlidingConv:
    """A convolution that is given the rows of its picture bit by bit, and gives those that it can.

    In time it has the frames before those that it is given: zeros, or what it has kept of them itself.
    """

    def __init__(self, step: Conv, source: Rows, fill: Fill | None, scale: int = 1) -> None:
        self._run = run = source.run
        self._step, self._fill, self._scale = step, fill, scale
        self._channels, self._frames = source.channels, source.frames
        self._height, self._width = source.height * scale, source.width * scale
        self._out_height, self._out_width = step.size(self._height, self._width)
        self._before, self._kept = run.past.of(step) if step.depth > 1 else (None, None)
        self._past = _depth(step, source) - 1
        self._row_flops = flops_of(step, source) * self._out_width
        # Neither its window nor what comes out is larger than a strip.
        made = source.rows_of(self._out_width, step.module.out_channels * self._frames, self._row_flops) * step.stride
        window = source.rows_of(self._width, self._channels * (self._past + self._frames))
        self._piece_rows = max(1, min(made, window) // scale)
        # A strip is a few rows larger where those before were smaller: it is not cut for them, save where somebody waits.
        slack = 0 if isfinite(run.policy.strip_flops) and made < window else self._piece_rows // _SLACK
        self._most_rows = self._piece_rows + slack
        self._keeps = source.phase.keeps
        self._pending: list[torch.Tensor] = []
        self._received = self._produced = 0
        self._carry: torch.Tensor | None = None
        self._weights = borrowed(step.module, run.device, run.dtype)

    def __enter__(self) -> SlidingConv:  # noqa: PYI034  # Self came with Python 3.11
        weight, bias = self._weights.__enter__()
        if weight.ndim == 4 or not self._past:
            # Before a single frame are zeros: of the kernel's slices only the last one counts.
            weight = (weight if weight.ndim == 4 else weight[:, :, -1]).to(memory_format=self._run.memory_format)
        self._weight, self._bias = weight, bias
        return self

    def __exit__(self, *error: object) -> None:
        self._weights.__exit__(None, None, None)
        del self._weight, self._bias

    def push(self, strip: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows that have become possible."""
        for piece in pieces(strip, self._most_rows):
            self._pending.append(piece)
            if self._is_waiting_for(piece.shape[2]):
                continue
            out = self._next()
            if out is not None:
                flops = self._row_flops * out.shape[2]
                yield out
                del out
                self._run.tick(flops)

    def _is_waiting_for(self, more: int) -> bool:
        """Whether ``more`` rows may come and still be worked on together with those that are there."""
        if self._is_plain:
            return False
        rows = sum(piece.shape[2] for piece in self._pending)
        return rows + more <= self._most_rows and self._received + rows * self._scale < self._height

    def _next(self) -> torch.Tensor | None:
        """What the rows that are there make possible."""
        given, self._pending = self._pending, []
        step = self._step
        left, right, top, bottom = step.pad
        kernel, stride = step.kernel[0], step.stride
        if self._is_plain:
            (piece,) = given
            return self._convolve(piece.to(self._run.dtype), (0, 0))
        start = self._received
        self._received += sum(piece.shape[2] for piece in given) * self._scale
        ended = self._received == self._height
        # The convolution pads by itself where both sides are alike: columns, and rows where all of them are there.
        columns, extra = (left, (0, 0)) if left == right else (0, (left, right))
        rows = top if ended and not start and top == bottom else 0
        possible = self._out_height if ended else max(0, (self._received + top - kernel) // stride + 1)
        first = 0 if rows else self._produced * stride - top
        end = max(self._received, (self._out_height - 1) * stride - top + kernel) if ended and not rows else self._received
        window = self._window(end - first, sum(extra) + self._width)
        inside = window[..., extra[0] : extra[0] + self._width]
        if sum(extra):
            _clear(window[..., : extra[0]], window[..., extra[0] + self._width :])
        _clear(window[:, :, : max(0, -first)], window[:, :, self._received - first :])
        if self._carry is not None:
            inside[:, :, start - first - self._carry.shape[2] : start - first] = self._carry
            self._carry = None
        while given:
            piece = given.pop(0)
            self._put(piece, inside[:, :, start - first : start - first + piece.shape[2] * self._scale])
            start += piece.shape[2] * self._scale
            del piece
        count = possible - self._produced
        self._produced = possible
        if not ended:
            keep_from = max(0, possible * stride - top)
            carry = inside[:, :, keep_from - first : self._received - first]
            self._carry = carry if self._keeps else carry.clone()
        return self._convolve(window, (rows, columns)) if count else None

    @property
    def _is_plain(self) -> bool:
        """Whether each position is made of itself alone."""
        step = self._step
        return self._fill is None and step.kernel == (1, 1) and step.stride == 1 and not any(step.pad) and not self._past

    def _window(self, rows: int, columns: int) -> torch.Tensor:
        """Memory for ``[past + frames, channels, rows, columns]``."""
        run = self._run
        frames = self._past + self._frames
        if self._past:
            # In the order in which a convolution of three dimensions wants it.
            return torch.empty((self._channels, frames, rows, columns), device=run.device, dtype=run.dtype).transpose(0, 1)
        shape = (frames, self._channels, rows, columns)
        return torch.empty(shape, device=run.device, dtype=run.dtype, memory_format=run.memory_format)

    def _put(self, piece: torch.Tensor, into: torch.Tensor) -> None:
        """``piece``, filled, into its rows of the window, and there the same rows of the frames before."""
        own = into[self._past :]
        if self._fill is None:
            own.copy_(piece)
        else:
            self._fill(piece, own)
        if not self._past:
            return
        if self._before is None:
            into[: self._past] = 0
        else:
            into[: self._past] = self._before.whole(into.shape[2])
        if self._kept is not None:
            self._kept.append(into[-self._past :].clone(memory_format=torch.contiguous_format))

    def _convolve(self, window: torch.Tensor, pad: tuple[int, int]) -> torch.Tensor:
        step, stride = self._step, self._step.stride
        if not self._past:
            return conv2d(window, self._weight, self._bias, stride, pad, groups=step.module.groups)
        video = window.transpose(0, 1).unsqueeze(0)
        made = conv3d(video, self._weight, self._bias, (1, stride, stride), (0, *pad), groups=step.module.groups)
        return made.squeeze(0).transpose(0, 1)


def _clear(*parts: torch.Tensor) -> None:
    for part in parts:
        if part.numel():
            part.zero_()


class ConvolvedInTime(Rows):
    """As many or half as many frames again, by a convolution in time."""

    def __init__(self, source: Rows, step: InTime) -> None:
        self._is_lone = source.run.past.is_lone(source.frames)
        frames = step.frames(source.frames, first=source.run.past.first)
        per_position = 0.0 if self._is_lone else 2.0 * step.module.weight.numel() * frames / (2 if step.up else 1)
        work = per_position * source.height * source.width
        super().__init__(source, source.channels, source.height, source.width, work, frames=frames)
        self._source = source
        self._step = step
        self._row_flops = per_position * source.width

    def read(self) -> Iterator[torch.Tensor]:
        if self._is_lone:
            yield from self._source.read()
            return
        run, step = self.run, self._step
        before, kept = run.past.of(step)
        rows = self.rows_of(self.width, 2 * self.channels * max(self.frames, self._source.frames), self._row_flops)
        with borrowed(step.module, run.device, run.dtype) as (weight, bias):
            for strip in self._source.read():
                for piece in pieces(strip, rows):
                    own = piece.to(run.dtype)
                    past = None if before is None else before.whole(own.shape[2])
                    out, keep = self._make(own, past, weight, bias)
                    if kept is not None:
                        kept.append(keep.clone(memory_format=torch.contiguous_format))
                    flops = self._row_flops * own.shape[2]
                    del piece, own, past, keep
                    yield out
                    del out
                    run.tick(flops)
                del strip

    def _make(
        self, strip: torch.Tensor, past: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What comes out of ``strip``, and what is to be kept of it."""
        step = self._step
        is_first = self.run.past.first
        seen = strip[1:] if is_first and step.up else strip
        if past is None and step.up:
            past = strip.new_zeros(step.past, *strip.shape[1:])
        sequence = seen if past is None else torch.cat((past, seen))
        keep = sequence[-step.past :]
        frames = []
        if is_first:
            frames.append(strip[:1])
        if sequence.shape[0] >= weight.shape[2]:
            stride = (step.module.stride[0], 1, 1)
            made = conv3d(sequence.transpose(0, 1).unsqueeze(0), weight, bias, stride).squeeze(0).transpose(0, 1)
            frames.append(made.reshape(-1, *strip.shape[1:]))
        return torch.cat(frames), keep


def flops_of(step: Conv, source: Rows) -> float:
    """Of one position of the result, for all frames of ``source``."""
    module = step.module
    rows, columns = step.kernel
    depth = _depth(step, source)
    return 2.0 * depth * rows * columns * module.in_channels // module.groups * module.out_channels * source.frames


def _depth(step: Conv, source: Rows) -> int:
    """How many frames have to be there for one."""
    return 1 if source.run.past.is_lone(source.frames) else step.depth
