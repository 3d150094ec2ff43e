"""What happens when so many UIs share so many cards: a simulation of events. Needs neither torch nor a server.

A UI makes a picture, has its VAE call done, and begins the next picture when it has the answer. Its request goes over the
servers' line, which all share, waits for the first free card in the order of arrival, and its answer goes over the line again.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

# The beginning, when no queue has formed yet, is not counted.
_WARM_UP = 0.2


@dataclass(frozen=True)
class Load:
    """What is asked of the servers.

    Attributes:
        uis: how many ask.
        every: seconds that a UI takes on average from one answer to its next call. They are spread exponentially, which is the
            most irregular that independent people are.
        bytes_up, bytes_down: of one call.
    """

    uis: int
    every: float
    bytes_up: float = 0.0
    bytes_down: float = 0.0

    @property
    def rate(self) -> float:
        """Calls a second, were every answer there at once."""
        return self.uis / self.every


@dataclass(frozen=True)
class Servers:
    """What answers.

    Attributes:
        cards: replicas, each with one call at work.
        seconds: that a call keeps a card. Of several, each call takes one of them by chance, as calls of several kinds do.
        bytes_per_second: of the line of all servers together, each way; 0 for one that is never full.
        beside: seconds of a call in which it waits for nobody and keeps no card: the way there and back, the making of files.
    """

    cards: int
    seconds: Sequence[float]
    bytes_per_second: float = 0.0
    beside: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What was seen, once the queue had formed.

    Attributes:
        waits: seconds of each call beyond what it takes alone, in ascending order.
        utilisation: share of the time in which a card works.
        rate: calls a second.
    """

    waits: Sequence[float]
    utilisation: float
    rate: float

    def wait(self, share: float) -> float:
        """Seconds within which this share of the calls got its turn: 0.5 is the median."""
        return quantile(self.waits, share)

    def longer_than(self, seconds: float) -> float:
        """Share of the calls that waited longer."""
        return sum(wait > seconds for wait in self.waits) / max(1, len(self.waits))


def quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that this share of ``ascending`` does not exceed; 0 of none."""
    if not ascending:
        return 0.0
    return ascending[min(len(ascending) - 1, max(0, round(share * len(ascending)) - 1))]


@dataclass
class _Call:
    ui: int
    asked: float
    alone: float
    seconds: float


# What the next event of a call is.
_ASKED, _ARRIVED, _MADE = range(3)


def simulate(load: Load, servers: Servers, calls: int = 30_000, seed: int = 0) -> Outcome:
    """Play ``calls`` calls, the first fifth of which only fill the queue. The same ``seed`` gives the same outcome."""
    chance = random.Random(seed)
    up, down = _Line(servers.bytes_per_second), _Line(servers.bytes_per_second)
    free = [0.0] * servers.cards
    events: list[tuple[float, int, int, _Call]] = []
    number = 0

    def ask(ui: int, now: float) -> None:
        seconds = chance.choice(servers.seconds)
        alone = up.seconds(load.bytes_up) + seconds + down.seconds(load.bytes_down)
        push(now + chance.expovariate(1.0 / load.every), _ASKED, _Call(ui, 0.0, alone, seconds))

    def push(at: float, kind: int, call: _Call) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (at, number, kind, call))

    for ui in range(load.uis):
        ask(ui, 0.0)
    ended, counted_from, busy = 0, 0.0, 0.0
    waits: list[float] = []
    now = 0.0
    while ended < calls:
        now, _, kind, call = heapq.heappop(events)
        if kind == _ASKED:
            call.asked = now
            push(up.over(now, load.bytes_up), _ARRIVED, call)
        elif kind == _ARRIVED:
            made = max(now, heapq.heappop(free)) + call.seconds
            heapq.heappush(free, made)
            push(made, _MADE, call)
        else:
            answered = down.over(now, load.bytes_down)
            ended += 1
            if ended > calls * _WARM_UP:
                counted_from = counted_from or now
                busy += call.seconds
                waits.append(max(0.0, answered - call.asked - call.alone))
            ask(call.ui, answered + servers.beside)
    span = max(now - counted_from, 1e-9)
    return Outcome(sorted(waits), min(1.0, busy / (span * servers.cards)), len(waits) / span)


class _Line:
    """One way of the line: bytes go over it one call after the other."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free = 0.0

    def seconds(self, nbytes: float) -> float:
        return nbytes / self._rate if self._rate else 0.0

    def over(self, now: float, nbytes: float) -> float:
        """When ``nbytes`` that come now are over."""
        self._free = max(now, self._free) + self.seconds(nbytes)
        return self._free
