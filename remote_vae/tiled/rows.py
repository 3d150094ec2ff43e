"""Rows of a picture, or of some frames of a video, strip by strip, and the run that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil

import torch

from remote_vae.errors import CallCancelled
from remote_vae.tiled.budget import Phase
from remote_vae.tiled.moments import Constants
from remote_vae.tiled.policy import Policy
from remote_vae.tiled.store import RowReader, Store, StripQueue


def never() -> bool:
    """Nobody cancels."""
    return False


def no_progress(done: float) -> None:
    """Nobody wants to know the share ``done``."""


class NotFinite(ArithmeticError):
    """A NaN or an infinity came up on the way."""


class Past:
    """What convolutions in time keep of the frames before those that are worked on: rows of a few frames each, in the store.

    Attributes:
        first, last: whether the first and the last frame of all are among those that are worked on.
    """

    def __init__(self, store: Store) -> None:
        self.first = self.last = True
        self._store = store
        self._kept: dict[int, StripQueue] = {}

    def of(self, step: object) -> tuple[RowReader | None, StripQueue | None]:
        """For one step of the plan: what it has kept (None: nothing is before), and where it keeps (None: nothing follows)."""
        before = self._kept.pop(id(step), None)
        kept = None if self.last else self._store.queue()
        if kept is not None:
            self._kept[id(step)] = kept
        return None if before is None else RowReader(before.read(last=True)), kept

    def is_lone(self, frames: int) -> bool:
        """Whether ``frames`` are one frame, and all that there is."""
        return frames == 1 and self.first and self.last


@dataclass
class Run:
    """One picture, or frames of one video, on the way through a plan.

    Attributes:
        device, dtype: of the computation.
        policy: of the device.
        phases: of the budget, in order.
        constants: that its norms have in common.
        pixels: rows x columns where there are most of them.
        store: for strips that wait.
        past: of the frames before.
        channels_last: the memory format of strips.
        finite: whether to stop at the first NaN.
        progress: called with the share of the work that is done.
    """

    device: torch.device
    dtype: torch.dtype
    policy: Policy
    phases: Iterator[Phase]
    store: Store
    past: Past
    constants: Constants = field(default_factory=Constants)
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

    def next_phase(self) -> Phase:
        """Nodes are made in the order of the plan: here everything waits."""
        return next(self.phases)


class Rows:
    """A picture that is given row by row: ``[frames, channels, height, width]``.

    Attributes:
        phase: in which it is read.
        work: floating point operations of it and of all that is before it.
    """

    def __init__(
        self,
        source: Rows | Run,
        channels: int,
        height: int,
        width: int,
        work: float = 0.0,
        *,
        frames: int | None = None,
        phase: Phase | None = None,
    ) -> None:
        self.run: Run = source.run if isinstance(source, Rows) else source
        self.work: float = work + (source.work if isinstance(source, Rows) else 0.0)
        self.phase: Phase = phase or (source.phase if isinstance(source, Rows) else source.next_phase())
        self.channels, self.height, self.width = channels, height, width
        self.frames: int = frames or (source.frames if isinstance(source, Rows) else 1)

    def read(self) -> Iterator[torch.Tensor]:
        """All rows from the top, once, in strips that the reader must not write to."""
        raise NotImplementedError

    @property
    def strip_rows(self) -> int:
        """How many rows make a strip."""
        return self.rows_of(self.width, self.channels * self.frames)

    def rows_of(self, width: int, channels: int, flops: float = 0.0) -> int:
        """How many rows of ``channels`` (of all frames) x ``width`` values, which cost ``flops`` each, make a strip."""
        rows = self.phase.strip_bytes / (width * channels * self.run.dtype.itemsize)
        if flops:
            rows = min(rows, self.run.policy.strip_flops / flops)
        return max(1, int(rows))

    def queue(self) -> StripQueue:
        """For strips of it that wait."""
        return self.run.store.queue(self.phase.waiting)


class Picture(Rows):
    """What goes in."""

    def __init__(self, run: Run, picture: torch.Tensor) -> None:
        super().__init__(run, *picture.shape[1:], frames=picture.shape[0])
        self._picture = picture

    def read(self) -> Iterator[torch.Tensor]:
        for strip in pieces(self._picture, self.strip_rows):
            yield strip.to(self.run.device, self.run.dtype)


class Mapped(Rows):
    """A function of each position, or an upsampling that no convolution follows."""

    def __init__(self, source: Rows, function: Callable[[torch.Tensor], torch.Tensor], scale: int = 1) -> None:
        super().__init__(source, source.channels, source.height * scale, source.width * scale)
        self._source = source
        self._function = function
        self._rows = max(1, self.strip_rows // scale)

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
    # All of them alike but the last.
    size = of * ceil(height / count)
    for at in range(0, strip.shape[2], size):
        yield strip[:, :, at : at + size]
