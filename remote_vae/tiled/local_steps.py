"""Steps that look at one position, or a few that lie together, and at nothing else of the picture."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from remote_vae.tiled.plan import Local, RmsNorm
from remote_vae.tiled.rows import Rows, pieces
from remote_vae.tiled.weights import borrowed


class RmsNormed(Rows):
    """An RMS norm over the channels of each position."""

    def __init__(self, source: Rows, step: RmsNorm) -> None:
        super().__init__(source, source.channels, source.height, source.width)
        self._source = source
        self._step = step

    def read(self) -> Iterator[torch.Tensor]:
        run = self.run
        with borrowed(self._step.module, run.device, wide(run.dtype)) as weights:
            for strip in self._source.read():
                for piece in pieces(strip, self.strip_rows):
                    yield rms_normalised(piece.to(wide(run.dtype)), *weights, self._step.eps).to(run.dtype)
                    del piece
                del strip


class Locally(Rows):
    """What a function makes of each few rows and columns on their own."""

    def __init__(self, source: Rows, step: Local) -> None:
        frames = step.frames(source.frames, first=source.run.past.first)
        super().__init__(source, step.channels, *step.size(source.height, source.width), frames=frames)
        self._source = source
        self._step = step

    def read(self) -> Iterator[torch.Tensor]:
        sliding = SlidingLocal(self._step, self._source)
        for strip in self._source.read():
            yield from sliding.push(strip)
            del strip


class SlidingLocal:
    """A function that is given the rows of its picture bit by bit, and gives those that it can."""

    def __init__(self, step: Local, source: Rows) -> None:
        run = source.run
        self._step = step
        width = source.width // step.down * step.up
        frames = max(1, step.frames(source.frames, first=False))
        made = source.rows_of(width, step.channels * frames) // step.up * step.down
        self._rows = max(step.down, min(made, source.strip_rows))
        self._before = step.frames_down - 1 if run.past.first else 0
        self._left_out = step.frames_up - 1 if run.past.first else 0
        self._rest: torch.Tensor | None = None

    def push(self, strip: torch.Tensor) -> Iterator[torch.Tensor]:
        """What has become possible."""
        down = self._step.down
        if self._rest is not None:
            strip = torch.cat((self._rest, strip), 2)
        whole = strip.shape[2] // down * down
        self._rest = strip[:, :, whole:].clone() if whole < strip.shape[2] else None
        if whole:
            for piece in pieces(strip[:, :, :whole], self._rows, down):
                yield self._made(piece)
                del piece

    def _made(self, piece: torch.Tensor) -> torch.Tensor:
        if self._before:
            piece = torch.cat((piece.new_zeros(self._before, *piece.shape[1:]), piece))
        return self._step.run(piece)[self._left_out :]


def rms_normalised(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``[frames, C, n, W]`` normalised over its channels, in a new tensor."""
    mean: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_().div_(x.shape[1])
    result = (x * mean.add_(eps).rsqrt_()).mul_(weight.view(1, -1, 1, 1))
    return result if bias is None else result.add_(bias.view(1, -1, 1, 1))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in where half precision is too little; of float64 nothing is lost."""
    return torch.promote_types(dtype, torch.float32)
