"""The breaker of an endpoint: after a failure it is left alone for a while, then one call may probe it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit


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


class Gate:
    """The breaker of one URL behind that of its machine: who does not answer at one path is not waited for at another."""

    def __init__(self, machine: Breaker, url: Breaker) -> None:
        self._machine, self._url = machine, url

    def enter(self, cooldown: float) -> str | None:
        """As ``Breaker.enter``."""
        refusal = self._machine.enter(cooldown)
        if refusal is None:
            refusal = self._url.enter(cooldown)
            if refusal is not None:
                self._machine.left()
        return refusal

    def succeeded(self) -> None:
        """The call was answered."""
        self._machine.succeeded()
        self._url.succeeded()

    def failed(self, why: str, *, answered: bool) -> None:
        """The call failed; ``answered``: by an answer that was of no use."""
        if answered:
            self._machine.succeeded()
            self._url.failed(why)
        else:
            self._machine.failed(why)
            self._url.left()

    def left(self) -> None:
        """The call says nothing about the endpoint."""
        self._machine.left()
        self._url.left()


class Breakers:
    """The breakers of a process's endpoints, by URL, and of their machines, by origin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_url: dict[str, Breaker] = {}
        self._machines: dict[str, Breaker] = {}

    def of(self, url: str) -> Gate:
        machine = urlunsplit((*urlsplit(url)[:2], "", "", ""))
        with self._lock:
            return Gate(self._machines.setdefault(machine, Breaker()), self._by_url.setdefault(url, Breaker()))
