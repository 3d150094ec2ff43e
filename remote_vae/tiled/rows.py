"""A picture that is given row by row, in strips, and what one run through a plan has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil

import torch

from remote_vae.errors import CallCancelled
from remote_vae.tiled.store import Store


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
        for strip in pieces(self._picture, self.run.rows(self.width, self.channels)):
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
            for piece in pieces(strip, self._rows):
                yield self._function(piece)
                del piece
            del strip


def pieces(strip: torch.Tensor, rows: int, of: int = 1) -> Iterator[torch.Tensor]:
    """``strip`` cut into as few even pieces as have at most ``rows`` rows, in wholes of ``of`` rows, which it must have."""
    height = strip.shape[2] // of
    count = ceil(height / max(1, rows // of))
    if count <= 1:
        yield strip
        return
    for index in range(count):
        yield strip[:, :, of * (height * index // count) : of * (height * (index + 1) // count)]
