"""How long the whole VAE takes, and the sizes at which it turned out to take far longer than that.

A driver that puts what finds no room into the host's memory, a system that swaps, a card that has got too hot: none of them
raises an error. The call takes minutes, and the next one of its size would, too.
"""

from __future__ import annotations

import csv
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from remote_vae.call import T, VaeCall
from remote_vae.settings import settings_folder

log = logging.getLogger("remote_vae")

# A call is slow that takes so many times what was to be expected, and at least so many seconds: before a first call libraries
# are loaded and weights are moved.
_TIMES = 10
_SECONDS = 5.0
# So many times the memory that was free at a slow call, and it may be another matter.
_MORE_FREE = 1.25
# After so many times what it took it is tried again: what was slow for once is not held to it, and where it is slow every time,
# a twentieth of the time is lost.
_TRIED_AFTER = 20


@cache
def card_name(device: torch.device) -> str:
    """The name of a card; "" where it has none."""
    try:
        return str(getattr(torch, device.type).get_device_name(device))
    except Exception as error:
        log.debug("%s has no name: %s", device, error)
        return ""


@dataclass
class _Slow:
    """A call of so many ``pixels`` was slow; then so many bytes were ``free``, None: that was not known.

    ``until`` the clock says so, it counts.
    """

    pixels: int
    free: int | None
    until: float


@dataclass
class _Known:
    """Of one VAE on one device. ``quickest``: seconds a pixel."""

    quickest: float | None = None
    slow: _Slow | None = None


@dataclass
class Pace:
    """What this process has seen of its VAEs. For many threads.

    Args:
        clock: in seconds.
        card: gives the name of a device.
    """

    clock: Callable[[], float] = time.perf_counter
    card: Callable[[torch.device], str] = card_name
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _by_module: weakref.WeakKeyDictionary[Any, dict[tuple[str, ...], _Known]] = field(default_factory=weakref.WeakKeyDictionary)

    def seconds(self, call: VaeCall[Any]) -> float | None:
        """How long the whole VAE takes for ``call``: by what it took before, else by what was published of its card.

        None: nothing is known of it.
        """
        with self._lock:
            quickest = self._known(call).quickest
        pixels = _pixels(call)
        if quickest is not None:
            return quickest * pixels
        return _published(call.op, call.vae.family.key, self.card(call.vae.device), pixels)

    def is_too_slow(self, call: VaeCall[Any], free: int | None) -> bool:
        """Whether a call of the size of ``call``, or a smaller one, was far slower than expected with no less memory free."""
        with self._lock:
            slow = self._known(call).slow
        if slow is None or _pixels(call) < slow.pixels or self.clock() >= slow.until:
            return False
        return free is None or slow.free is None or free < _MORE_FREE * slow.free

    def timed(self, call: VaeCall[T], whole: Callable[[], T], free: int | None) -> T:
        """What ``whole`` gives, the whole VAE's answer to ``call``; ``free`` bytes are free before. Raises what it raises."""
        expected = self.seconds(call)
        start = self.clock()
        result = whole()
        _wait_for(call.vae.device)
        self._took(call, self.clock() - start, expected, free)
        return result

    def _took(self, call: VaeCall[Any], seconds: float, expected: float | None, free: int | None) -> None:
        pixels = _pixels(call)
        with self._lock:
            known = self._known(call)
            if expected is not None and seconds > max(_SECONDS, _TIMES * expected):
                if call.vae.device.type == "cpu":
                    # Other programs were at work: a call that would not fit is not begun, and tiles would have been as slow.
                    return
                known.slow = _Slow(pixels, free, self.clock() + _TRIED_AFTER * seconds)
                log.warning(
                    "the whole VAE took %.0f s where %.1f s were expected; for a while, %ss of this size are made in tiles",
                    seconds,
                    expected,
                    call.op,
                )
                return
            known.quickest = min(filter(None, (known.quickest, seconds / pixels)), default=None)
            if known.slow is not None and pixels >= known.slow.pixels:
                known.slow = None

    def _known(self, call: VaeCall[Any]) -> _Known:
        if call.vae.module is None:
            return _Known()
        by_call = self._by_module.setdefault(call.vae.module, {})
        return by_call.setdefault((call.op, str(call.vae.device), str(call.vae.dtype)), _Known())


pace = Pace()


def _pixels(call: VaeCall[Any]) -> int:
    pictures, height, width = call.size
    return pictures * height * width


def _wait_for(device: torch.device) -> None:
    """A card has only been told what to do when the call returns."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@cache
def _rows() -> tuple[tuple[str, str, str, int, float], ...]:
    """Of vae_cost.csv: operation, family, card, pixels, seconds. Nothing where it cannot be read."""
    try:
        with (settings_folder() / "vae_cost.csv").open(encoding="utf-8", newline="") as file:
            return tuple(
                (row["op"], row["family"], row["gpu"], int(row["width"]) * int(row["height"]), float(row["time_s"]))
                for row in csv.DictReader(file)
                if row["time_s"]
            )
    except (OSError, KeyError, ValueError) as error:
        log.debug("no published times: %s", error)
        return ()


def _published(op: str, family: str, card: str, pixels: int) -> float | None:
    """Of the longest name that the card's ends with; by the row that is nearest in pixels."""
    known = [row for row in _rows() if row[:2] == (op, family) and card.endswith(row[2])]
    if not known:
        return None
    longest = max(len(row[2]) for row in known)
    nearest = min((row for row in known if len(row[2]) == longest), key=lambda row: abs(row[3] - pixels))
    return nearest[4] * pixels / nearest[3]
