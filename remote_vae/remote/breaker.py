"""The breaker of an endpoint: after a failure it is left alone for a while, then one call may probe it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Breaker:
    """Whether one endpoint may be asked now. May be used from many threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failed_at: float | None = None
        self._why = ""
        self._probing = False

    def enter(self, cooldown: float) -> str | None:
        """Ask to make a call; ``cooldown`` in seconds. None: go ahead, and report by ``succeeded``, ``failed`` or ``left``.

        Otherwise the text says why not.
        """
        with self._lock:
            if self._failed_at is None:
                return None
            remaining = self._failed_at + cooldown - self._clock()
            if remaining > 0:
                return f"{self._why}; asked again in {remaining:.0f} s"
            if self._probing and cooldown > 0:
                return f"{self._why}; being tried by another call"
            self._probing = True
            return None

    def succeeded(self) -> None:
        """The call was answered."""
        with self._lock:
            self._failed_at, self._probing = None, False

    def failed(self, why: str) -> None:
        """The call was not answered."""
        with self._lock:
            self._failed_at, self._why, self._probing = self._clock(), why, False

    def left(self) -> None:
        """The call says nothing about the endpoint: cancelled by the user, or a request it was right to refuse."""
        with self._lock:
            self._probing = False


class Breakers:
    """The breakers of a process's endpoints, by URL."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_url: dict[str, Breaker] = {}

    def of(self, url: str) -> Breaker:
        with self._lock:
            return self._by_url.setdefault(url, Breaker())
