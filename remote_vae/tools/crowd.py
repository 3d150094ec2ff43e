"""Clients that ask an endpoint for one picture after the other, and what becomes of their calls."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Union

from remote_vae.errors import CallCancelled
from remote_vae.remote.client import Deadlines, EndpointClient, Reply, beside
from remote_vae.remote.transport import Answer, Exchange, Sent, Urllib3Transport
from remote_vae.settings import Settings
from remote_vae.tools.asking import sample
from remote_vae.vae.families import Family
from remote_vae.wire import DecodeAnswer, DecodeRequest, EncodeAnswer, EncodeRequest, Output, one_line

# What a decode answers with; and an encode, whose pixels go up as raw values.
FORMATS = ("raw", "u8", "png", "jpg", "encode")
_OUTPUTS = {"raw": Output.TENSOR, "u8": Output.UINT8, "png": Output.PNG, "jpg": Output.JPG}
# A call that was begun in time is waited for so many times as long, and this long (seconds) at least.
_GRACE, _LEAST_GRACE = 10.0, 30.0
# Who got an error asks again after so many seconds: one that comes at once would be all that is measured.
_AFTER_ERROR = 0.2
_REFUSALS = (429, 503)
_PROBLEM = 160


_Reply = Union[Reply[DecodeAnswer], Reply[EncodeAnswer]]


@dataclass(frozen=True)
class Cell:
    """What is measured: ``clients`` that ask for pictures of ``side`` pixels in a form of ``FORMATS``."""

    side: int
    form: str
    clients: int

    def __str__(self) -> str:
        return f"{self.side} px, {self.form}, {self.clients} client{'s' if self.clients > 1 else ''}"


@dataclass(frozen=True)
class Row:
    """What came of it.

    Attributes:
        milliseconds: of each call that was answered, shortest first; waits after a refusal are in them.
        seconds: from the start to the last answer.
        megabytes_up, megabytes_down: of a picture.
        refused: answers "come back later", most of which came home at their next try.
        failed: calls without an answer; ``problem`` says why the last one was.
    """

    cell: Cell
    milliseconds: Sequence[float] = ()
    seconds: float = 0.0
    megabytes_up: float = 0.0
    megabytes_down: float = 0.0
    refused: int = 0
    failed: int = 0
    problem: str = ""

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return len(self.milliseconds) / self.seconds if self.seconds else 0.0

    def quantile(self, of: float) -> float:
        """Milliseconds that ``of`` of the calls took at most."""
        return self.milliseconds[max(0, math.ceil(of * len(self.milliseconds)) - 1)]


class _Counting(Urllib3Transport):
    """Counts how often the server says that it is busy; the client comes back by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = 0
        self._counting = threading.Lock()

    @contextmanager
    def open(self, sent: Sent, exchange: Exchange) -> Iterator[Answer]:
        with super().open(sent, exchange) as answer:
            if answer.status in _REFUSALS:
                with self._counting:
                    self.refused += 1
            yield answer


class Crowd:
    """Clients of one endpoint.

    Args:
        url: of its /decode.
        family: of its VAE.
        seconds: for which each cell asks.
    """

    def __init__(self, url: str, family: Family, seconds: float) -> None:
        self._url, self._family, self._seconds = url, family, seconds

    def measured(self, cell: Cell) -> Row:
        """Measure ``cell``, after one call in which the server may load and warm up. What goes wrong stands in the row."""
        # Each with connections of its own, as on machines of their own.
        transports, stop = [_Counting() for _ in range(cell.clients)], threading.Event()
        try:
            url = beside(self._url, "encode") if cell.form == "encode" else self._url
            ask = self._asking(cell, stop)
            calls = [partial(ask, EndpointClient(url, transport)) for transport in transports]
            calls[0]()
            transports[0].refused = 0
            tally = self._tallied(calls, stop)
            return tally.row(cell, sum(transport.refused for transport in transports))
        except Exception as error:
            # Whatever it is: the next cell may do better.
            return Row(cell, refused=transports[0].refused, failed=1, problem=_words(error))
        finally:
            stop.set()
            for transport in transports:
                transport.close()

    def _asking(self, cell: Cell, stop: threading.Event) -> Callable[[EndpointClient], _Reply]:
        """One call of ``cell``. Raises InvalidRequest: the protocol has none such."""
        key = self._family.known_key
        deadlines = Deadlines.of(Settings(), cell.side**2)
        if cell.form == "encode":
            encode = EncodeRequest(sample("encode", self._family, cell.side), family=key)
            return lambda client: client.encode(encode, deadlines, stop.is_set)
        decode = DecodeRequest(sample("decode", self._family, cell.side), _OUTPUTS[cell.form], family=key)
        return lambda client: client.decode(decode, deadlines, stop.is_set)

    def _tallied(self, calls: Sequence[Callable[[], _Reply]], stop: threading.Event) -> _Tally:
        """A thread for each of ``calls``, which makes it again and again."""
        tally = _Tally(self._seconds)
        threads = [threading.Thread(target=tally.ask, args=(call, stop), daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        last = time.perf_counter() + self._seconds + max(_LEAST_GRACE, _GRACE * self._seconds)
        try:
            for thread in threads:
                thread.join(max(0.0, last - time.perf_counter()))
        finally:
            # Who is still under way, or interrupted, is broken off.
            stop.set()
            for thread in threads:
                thread.join()
        return tally


class _Tally:
    """What becomes of calls that begin within ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self._started = self._last = time.perf_counter()
        self._until = self._started + seconds
        self._milliseconds: list[float] = []
        self._up = self._down = self._failed = 0
        self._problem = ""

    def row(self, cell: Cell, refused: int) -> Row:
        count = max(1, len(self._milliseconds)) * 1e6
        return Row(
            cell, sorted(self._milliseconds), self._last - self._started, self._up / count, self._down / count,
            refused, self._failed, self._problem,
        )  # fmt: skip

    def ask(self, call: Callable[[], _Reply], stop: threading.Event) -> None:
        """One client: calls, one after the other."""
        while not stop.is_set() and time.perf_counter() < self._until:
            started = time.perf_counter()
            try:
                reply = call()
            except CallCancelled:
                self._fail("no answer in time")
            except Exception as error:
                self._fail(_words(error))
                stop.wait(_AFTER_ERROR)
            else:
                self._take(reply, started)

    def _take(self, reply: _Reply, started: float) -> None:
        now = time.perf_counter()
        with self._lock:
            self._last = max(self._last, now)
            self._milliseconds.append((now - started) * 1000)
            self._up += reply.bytes_up
            self._down += reply.bytes_down

    def _fail(self, problem: str) -> None:
        with self._lock:
            self._failed += 1
            self._problem = problem


def _words(error: Exception) -> str:
    return one_line(str(error) or type(error).__name__, _PROBLEM)
