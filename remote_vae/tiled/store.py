"""Where strips wait until they are needed: on the compute device while there is room, else on the store device."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from remote_vae.tiled.memory import tensor_bytes

log = logging.getLogger("remote_vae")

# The C library keeps what is freed for the next who asks, and strips that come and go leave holes in it that may add up to half
# of what is alive. So on a processor it has to give them back whenever so many bytes have been put on shelves. The holes are as
# large as strips are, and matter less in a larger picture. Allocators that were loaded in its place have ways of their own.
_TRIM_EVERY = 64 << 20
_TRIMS_A_SHELF = 4


class Room:
    """How many bytes of waiting strips one run may keep on the compute device.

    Args:
        largest: bytes of the largest picture that will wait.

    Attributes:
        limit: bytes; None is no limit.
        store: where strips go that find no room; None: nowhere, then the limit is what the plan was made for.
    """

    def __init__(self, device: torch.device, limit: int | None, store: torch.device | None, largest: int = 0) -> None:
        self.device = device
        self.limit = limit
        self.store = store
        self.used = 0
        self._since_trim = 0
        self._trim_every = max(_TRIM_EVERY, largest // _TRIMS_A_SHELF)
        has_copies = device.type == "cuda" and store is not None
        self._copies: Any = torch.cuda.Stream(device) if has_copies else None  # type: ignore[no-untyped-call]
        self._pins = has_copies and store is not None and store.type == "cpu"
        self._is_told = False
        self._shelves: list[Shelf] = []

    def open(self, shelf: Shelf) -> None:
        """``shelf`` has its strips here."""
        self._shelves.append(shelf)

    def close(self) -> None:
        """Nothing waits any more, even if an error's frames still see the shelves."""
        if self._copies is not None:
            self._copies.synchronize()
        for shelf in self._shelves:
            shelf.clear()
        self._shelves = []

    def takes(self, size: int) -> bool:
        """Whether ``size`` bytes more may stay on the compute device."""
        return self.store is None or self.limit is None or self.used + size <= self.limit

    def came_in(self, size: int) -> None:
        """``size`` bytes more wait somewhere."""
        self._since_trim += size
        if self._since_trim >= self._trim_every and self.device.type == "cpu":
            self._since_trim = 0
            _trim()

    def put_away(self, strip: torch.Tensor) -> torch.Tensor:
        """A copy on the store device; from a GPU into pinned memory, while the GPU goes on."""
        copies = self._copies
        if copies is None:
            return torch.empty_like(strip, device=self.store).copy_(strip)
        # One strip on its way at a time: it takes up memory until it has arrived.
        copies.synchronize()
        stored = self._room_for(strip)
        copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(copies):
            stored.copy_(strip, non_blocking=stored.is_pinned())
        strip.record_stream(copies)
        return stored

    def _room_for(self, strip: torch.Tensor) -> torch.Tensor:
        if self._pins:
            try:
                return torch.empty_like(strip, device=self.store, pin_memory=True)
            except RuntimeError as error:
                # Systems limit how much may be pinned, WSL to little. A copy to other memory makes the GPU wait.
                if not self._is_told:
                    log.info("no more pinned memory: %s", error)
                self._is_told = True
        return torch.empty_like(strip, device=self.store)

    def fetch(self, stored: torch.Tensor) -> torch.Tensor:
        """Back to the compute device; begins at once, and ``arrived`` has to be called before the strip is used."""
        copies = self._copies
        if copies is None:
            return torch.empty_like(stored, device=self.device).copy_(stored)
        # Not further ahead of the computation than one strip.
        copies.synchronize()
        copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(copies):
            return stored.to(self.device, non_blocking=stored.is_pinned())

    def arrived(self, strip: torch.Tensor) -> torch.Tensor:
        """Make what follows wait for a strip that is being fetched."""
        if self._copies is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)
            strip.record_stream(current)
        return strip


class Shelf:
    """Strips ``[1, C, n, W]`` in the order of their rows. What is read for the last time is let go of at once."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._strips: deque[tuple[torch.Tensor, bool]] = deque()
        room.open(self)

    def append(self, strip: torch.Tensor) -> None:
        """Put the next rows on the shelf."""
        if self._room.takes(tensor_bytes(strip)):
            self._room.used += tensor_bytes(strip)
            self._strips.append((strip, False))
        else:
            self._strips.append((self._room.put_away(strip), True))
        self._room.came_in(tensor_bytes(strip))

    def clear(self) -> None:
        """Let go of everything."""
        while self._strips:
            self._pop()

    def read(self, *, last: bool) -> Iterator[torch.Tensor]:
        """The strips from the top; with ``last`` each is gone from the shelf when it is given out.

        Strips that are appended meanwhile are read too.
        """
        at = 0
        ahead: torch.Tensor | None = None
        while at < len(self._strips):
            strip, is_away = self._pop() if last else self._strips[at]
            at += 0 if last else 1
            if is_away:
                strip = self._room.arrived(self._room.fetch(strip) if ahead is None else ahead)
                # The next one comes while this one is being worked on.
                ahead = self._ahead(at)
            yield strip
            del strip

    def _ahead(self, at: int) -> torch.Tensor | None:
        if self._room.device.type != "cuda" or at >= len(self._strips) or not self._strips[at][1]:
            return None
        return self._room.fetch(self._strips[at][0])

    def _pop(self) -> tuple[torch.Tensor, bool]:
        strip, is_away = self._strips.popleft()
        if not is_away:
            self._room.used -= tensor_bytes(strip)
        return strip, is_away


class Taker:
    """Reads a shelf in portions of its own, whatever the heights of the strips on it are."""

    def __init__(self, strips: Iterator[torch.Tensor]) -> None:
        self._strips = strips
        self._rest: torch.Tensor | None = None

    def take(self, rows: int) -> Iterator[torch.Tensor]:
        """The next ``rows`` rows, in as many pieces as they lie in."""
        while rows:
            rest = next(self._strips) if self._rest is None else self._rest
            count = min(rows, rest.shape[2])
            self._rest = rest[:, :, count:] if count < rest.shape[2] else None
            rows -= count
            yield rest[:, :, :count]


def _trim() -> None:
    give_back = _malloc_trim()
    if give_back is not None:
        give_back(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; others have none."""
    try:
        function = ctypes.CDLL(None).malloc_trim if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return function
