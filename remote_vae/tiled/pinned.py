"""Pinned memory of the host, taken once a process: to pin takes as long as to copy, and no system has it without end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, Timer

import torch

from remote_vae.tiled.host_memory import available_host_memory

log = logging.getLogger("remote_vae")

# What is pinned at a time, and at the most: the system cannot swap it out.
_SLAB_BYTES = 128 << 20
_MOST_SHARE = 3
_MOST_BYTES = 4 << 30
_ALIGNED = 512
# What has to stay free of the host's memory.
RESERVE = 512 << 20
# After so many seconds without a call it is given back.
_IDLE_SECONDS = 60.0


@dataclass
class Slab:
    """Memory in one piece; ``free`` are its (start, end) that nobody has, in order."""

    memory: torch.Tensor
    free: list[tuple[int, int]] = field(default_factory=list)

    def take(self, size: int) -> int | None:
        """Where ``size`` bytes begin that nobody has."""
        for index, (start, end) in enumerate(self.free):
            if end - start >= size:
                self.free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        joined = (start, start + size)
        kept = []
        for each in self.free:
            if each[1] == joined[0]:
                joined = (each[0], joined[1])
            elif each[0] == joined[1]:
                joined = (joined[0], each[1])
            else:
                kept.append(each)
        self.free = sorted([*kept, joined])


@dataclass(frozen=True)
class Piece:
    """Bytes of a slab."""

    slab: Slab
    start: int
    size: int

    def like(self, strip: torch.Tensor) -> torch.Tensor:
        """Memory for ``strip``, in its shape, dtype and order."""
        values = self.slab.memory[self.start : self.start + strip.nbytes].view(strip.dtype)
        if strip.is_contiguous(memory_format=torch.channels_last) and not strip.is_contiguous():
            frames, channels, rows, columns = strip.shape
            return values.view(frames, rows, columns, channels).permute(0, 3, 1, 2)
        return values.view(strip.shape)


class PinnedMemory:
    """Slabs of pinned memory for all calls of this process."""

    def __init__(self) -> None:
        self._slabs: list[Slab] = []
        self._lock = Lock()
        self._users = 0
        self._timer: Timer | None = None
        self._is_refused = False

    @contextmanager
    def used(self) -> Iterator[PinnedMemory]:
        """Within, it is not given back; some time after the last one has left, it is."""
        with self._lock:
            self._users += 1
            if self._timer is not None:
                self._timer.cancel()
        try:
            yield self
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._slabs:
                    self._timer = Timer(_IDLE_SECONDS, self.give_back)
                    self._timer.daemon = True
                    self._timer.start()

    def take(self, size: int, *, pin: bool) -> Piece | None:
        """``size`` bytes, or None where there are no more. Not ``pin``: for a card that a processor plays."""
        size = -(-size // _ALIGNED) * _ALIGNED
        with self._lock:
            for slab in self._slabs:
                start = slab.take(size)
                if start is not None:
                    return Piece(slab, start, size)
            made = self._new(max(size, _SLAB_BYTES), pin=pin)
            if made is None:
                return None
            self._slabs.append(made)
            return Piece(made, made.take(size) or 0, size)

    def give(self, piece: Piece) -> None:
        with self._lock:
            piece.slab.give(piece.start, piece.size)

    def give_back(self) -> None:
        """To the system what no call has a part of."""
        empty = getattr(torch._C, "_host_emptyCache", None)  # noqa: SLF001
        has_card = torch.cuda.is_available()
        with self._lock:
            self._is_refused = False
            if has_card and empty is None:
                # A torch such as 2.1 would keep it, where the next call could not count on it.
                return
            self._slabs = [slab for slab in self._slabs if slab.free != [(0, slab.memory.nbytes)]]
        if has_card and empty is not None:
            empty()

    def _new(self, size: int, *, pin: bool) -> Slab | None:
        if self._is_refused or sum(slab.memory.nbytes for slab in self._slabs) + size > _most_bytes():
            return None
        available = available_host_memory()
        if available is not None and available < size + RESERVE:
            return None
        try:
            return Slab(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin), [(0, size)])
        except RuntimeError as error:
            # Systems limit how much may be pinned, WSL to little. A copy to other memory makes the GPU wait.
            log.info("no more pinned memory: %s", error)
            self._is_refused = True
            return None


def _most_bytes() -> int:
    try:
        # The web UIs ship it.
        import psutil

        return int(psutil.virtual_memory().total) // _MOST_SHARE
    except ImportError:
        return _MOST_BYTES


PINNED = PinnedMemory()
