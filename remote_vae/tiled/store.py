"""Strips that wait until they are needed: on the compute device while there is room, else elsewhere (``offload.py``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from remote_vae.tiled.memory import trim_heap
from remote_vae.tiled.offload import HostMemory, TemporaryFiles
from remote_vae.tiled.policy import Policy

# Strips that come and go leave holes in the C library's heap, which may add up to half of what is alive: on a processor it has
# to give them back whenever so many bytes have been added (``trim_heap`` has the numbers). The holes are as large as strips
# are, and matter less in a larger picture.
_TRIM_EVERY = 64 << 20
_TRIMS_A_PICTURE = 4


class Store:
    """How many bytes of waiting strips one run may keep on the compute device.

    Args:
        limit: bytes; None is no limit.
        largest: bytes of the largest picture that will wait.
    """

    def __init__(self, device: torch.device, policy: Policy, limit: int | None, largest: int = 0) -> None:
        self.limit = limit
        self.used = 0
        # Their stored forms are their own, hence Any.
        self.elsewhere: Any = TemporaryFiles() if policy.files else HostMemory(device, policy)
        self._trims = policy.files
        self._since_trim = 0
        self._trim_every = max(_TRIM_EVERY, largest // _TRIMS_A_PICTURE)
        self._queues: list[StripQueue] = []

    def queue(self, limit: int | None = None) -> StripQueue:
        """A new queue with its strips here; ``limit``: how many bytes may wait in all when one is added (None: as always)."""
        queue = StripQueue(self, self.limit if limit is None else limit)
        self._queues.append(queue)
        return queue

    def close(self) -> None:
        """Nothing waits any more, even if an error's frames still see the queues."""
        self.elsewhere.close()
        for queue in self._queues:
            queue.clear()
        self._queues = []
        self.elsewhere.leave()

    def added(self, size: int) -> None:
        """``size`` bytes more wait somewhere."""
        self._since_trim += size
        if self._trims and self._since_trim >= self._trim_every:
            self._since_trim = 0
            trim_heap()


class StripQueue:
    """Strips ``[1, C, n, W]`` in the order of their rows. What is read for the last time is let go of at once."""

    def __init__(self, store: Store, limit: int | None) -> None:
        self._store = store
        self._limit = limit
        # The strip, or what the store's elsewhere has made of it; and whether that is so.
        self._strips: deque[tuple[Any, bool]] = deque()

    def append(self, strip: torch.Tensor) -> None:
        """The next rows."""
        if self._limit is None or self._store.used + strip.nbytes <= self._limit:
            self._store.used += strip.nbytes
            self._strips.append((strip, False))
        else:
            self._strips.append((self._store.elsewhere.put(strip), True))
        self._store.added(strip.nbytes)

    def clear(self) -> None:
        """Let go of everything."""
        while self._strips:
            self._drop(*self._strips.popleft())

    def read(self, *, last: bool) -> Iterator[torch.Tensor]:
        """The strips from the top; with ``last`` each is gone from the queue when it is given out.

        Strips that are appended meanwhile are read too.
        """
        at = 0
        ahead: torch.Tensor | None = None
        elsewhere = self._store.elsewhere
        while at < len(self._strips):
            strip, is_away = stored = self._strips[at]
            if is_away:
                strip = elsewhere.arrived(elsewhere.fetch(strip) if ahead is None else ahead)
            if last:
                self._strips.popleft()
                self._drop(*stored)
            else:
                at += 1
            del stored
            # The next one comes while this one is being worked on.
            ahead = self._ahead(at) if is_away else None
            yield strip
            del strip

    def _ahead(self, at: int) -> torch.Tensor | None:
        elsewhere = self._store.elsewhere
        if not elsewhere.fetches_ahead or at >= len(self._strips) or not self._strips[at][1]:
            return None
        ahead: torch.Tensor = elsewhere.fetch(self._strips[at][0])
        return ahead

    def _drop(self, strip: Any, is_away: bool) -> None:
        if is_away:
            self._store.elsewhere.drop(strip)
        else:
            self._store.used -= strip.nbytes


class RowReader:
    """Reads strips in portions of its own, whatever their heights are."""

    def __init__(self, strips: Iterator[torch.Tensor]) -> None:
        self._strips = strips
        self._rest: torch.Tensor | None = None

    def read(self, rows: int) -> Iterator[torch.Tensor]:
        """The next ``rows`` rows, in as many pieces as they lie in."""
        while rows:
            rest = next(self._strips) if self._rest is None else self._rest
            count = min(rows, rest.shape[2])
            self._rest = rest[:, :, count:] if count < rest.shape[2] else None
            rows -= count
            yield rest[:, :, :count]

    def whole(self, rows: int) -> torch.Tensor:
        """The next ``rows`` rows in one piece."""
        parts = list(self.read(rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
