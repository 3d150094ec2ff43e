"""A convolution that is given the rows of its picture bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import conv2d

from remote_vae.tiled.plan import Conv
from remote_vae.tiled.rows import Rows, Run, pieces
from remote_vae.tiled.weights import borrowed

Fill = Callable[[torch.Tensor, torch.Tensor], None]


class Convolved(Rows):
    """A convolution of what ``fill`` makes of the source's strips."""

    def __init__(self, source: Rows, step: Conv, fill: Fill | None, scale: int = 1) -> None:
        height, width = step.size(source.height * scale, source.width * scale)
        super().__init__(source, step.module.out_channels, height, width, flops_of(step) * height * width)
        self._source = source
        self._step = step
        self._fill = fill
        self._scale = scale

    def read(self) -> Iterator[torch.Tensor]:
        with SlidingConv(self.run, self._step, self._source, self._fill, self._scale) as convolution:
            for strip in self._source.read():
                yield from convolution.push(strip)
                del strip


class SlidingConv:
    """A convolution that is given the rows of its picture bit by bit, and gives those that it can."""

    def __init__(self, run: Run, step: Conv, source: Rows, fill: Fill | None, scale: int = 1) -> None:
        self._run, self._step, self._fill, self._scale = run, step, fill, scale
        self._channels = source.channels
        self._height, self._width = source.height * scale, source.width * scale
        self._out_height, self._out_width = step.size(self._height, self._width)
        self._row_flops = flops_of(step) * self._out_width
        rows = run.rows(max(self._width, self._out_width), max(self._channels, step.module.out_channels), self._row_flops)
        self._piece_rows = max(1, rows * step.stride // scale)
        self._received = self._produced = 0
        self._carry: torch.Tensor | None = None
        self._weights = borrowed(step.module, run.device, run.dtype)

    def __enter__(self) -> SlidingConv:  # noqa: PYI034  # Self came with Python 3.11
        weight, bias = self._weights.__enter__()
        self._weight, self._bias = weight.to(memory_format=self._run.memory_format), bias
        return self

    def __exit__(self, *error: object) -> None:
        self._weights.__exit__(None, None, None)
        del self._weight, self._bias

    def push(self, strip: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows that have become possible."""
        for piece in pieces(strip, self._piece_rows):
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


def flops_of(step: Conv) -> float:
    """Of one position of the result."""
    module = step.module
    rows, columns = step.kernel
    return 2.0 * rows * columns * module.in_channels // module.groups * module.out_channels
