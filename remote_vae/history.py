"""The last VAE calls: which route made the pixels, what it cost, and why others did not."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

KEPT = 200


@dataclass(frozen=True)
class Record:
    """One VAE call.

    Attributes:
        op: "decode" or "encode".
        route: the route that made the result: "remote", "local", "tiled", or "failed".
        detail: how, in the route's words: "u8" for a remote transfer, "exact" for the tiled route.
        endpoint: scheme, host and path that were asked, answered or not; "" where none was.
        images, height, width: size of the call in pixels.
        bytes_up, bytes_down: bytes of the two bodies; 0 without a remote answer.
        ms: milliseconds from the host's call to its result, all attempts together.
        fallback_reason: why earlier routes did not answer; "" where the first one did.
        when: seconds since the epoch.
        vae_ms: milliseconds of ``ms`` that the endpoint says its VAE took; 0: it does not say.
    """

    op: str
    route: str
    detail: str
    endpoint: str
    images: int
    height: int
    width: int
    bytes_up: int
    bytes_down: int
    ms: float
    fallback_reason: str
    when: float
    vae_ms: float = 0.0

    def __str__(self) -> str:
        size = f"{self.images} x {self.width}x{self.height}" if self.images > 1 else f"{self.width}x{self.height}"
        how = f"{self.route} ({self.detail})" if self.detail else self.route
        there = f" ({self.vae_ms:.0f} in the VAE)" if self.vae_ms else ""
        parts = [f"{self.op} {size}: {how}, {self.ms:.0f} ms{there}"]
        if self.route == "remote":
            parts.append(f"{self.endpoint}, {self.bytes_up} bytes up, {self.bytes_down} down")
        if self.fallback_reason:
            parts.append(f"fell back: {self.fallback_reason}")
        return "; ".join(parts)


class History:
    """The last ``KEPT`` records, oldest first. May be used from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: deque[Record] = deque(maxlen=KEPT)

    def add(self, record: Record) -> None:
        with self._lock:
            self._records.append(record)

    def records(self) -> list[Record]:
        with self._lock:
            return list(self._records)

    @property
    def last(self) -> Record | None:
        """The newest record, or None."""
        with self._lock:
            return self._records[-1] if self._records else None

    @property
    def last_asked(self) -> Record | None:
        """The newest record of a call that was to be remote, or None."""
        return next((each for each in reversed(self.records()) if each.route == "remote" or each.fallback_reason), None)

    def clear(self) -> None:
        with self._lock:
            self._records.clear()
