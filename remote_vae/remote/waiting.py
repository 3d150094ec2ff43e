"""One request and the wait for its answer.

A thread carries the request; the caller's thread waits for it, looks for Interrupt and for the deadlines, and breaks it off by
closing its socket.
"""

from __future__ import annotations

import email.utils
import http.client
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar
from urllib.parse import urljoin, urlsplit

import numpy as np

from remote_vae.errors import CallCancelled, DeadlineExceeded, EndpointError, MalformedAnswer
from remote_vae.remote.addresses import is_same_place, shown
from remote_vae.remote.transport import Answer, Exchange, Sent, Transport
from remote_vae.settings import Settings
from remote_vae.wire import ERROR_LIMIT, Expected, error_detail
from remote_vae.wire.extras import ACCEPT, LATE
from remote_vae.wire.late import DOT, LATE_HEAD_LIMIT, LATE_TYPE, LateHead, read_late_head

A = TypeVar("A")
Expect = Callable[[Mapping[str, str]], Expected[A]]
Cancelled = Callable[[], bool]

# How often the user is asked for Interrupt. The promise is 0.2 s.
POLL_SECONDS = 0.05
# After which a thread that carries requests ends.
_WORKER_SECONDS = 10.0
# The text of an error is worth so many seconds.
_ERROR_SECONDS = 2.0
# While a server says that it works it is asked again after so many seconds.
_HEALTH_EVERY = 5.0
# Dots before a late answer, which comes within hours or not at all.
_MOST_DOTS = 1 << 16
# What proxies answer by themselves.
_BY_PROXIES = (403, 407, 502, 503, 504)
# The settings are for a picture of so many pixels.
USUAL_PIXELS = 1024 * 1024


@dataclass(frozen=True)
class Deadlines:
    """Seconds for one call.

    Attributes:
        connect: until connected.
        first_byte: from the last sent piece to the first byte of the answer. Then ``GET /health`` is asked: a server that
            works is waited for until ``total``, and one that does not answer no longer.
        total: for all of it.
        patience: as ``first_byte``, for an endpoint that has no /health; at least ``first_byte``.
    """

    connect: float
    first_byte: float
    total: float
    patience: float = 0.0

    @classmethod
    def of(cls, settings: Settings, pixels: int = USUAL_PIXELS, expected: float = 0.0) -> Deadlines:
        """The user's, which are for a picture of 1024 x 1024, for a call of ``pixels`` that is ``expected`` to take so long."""
        usual = cls(settings.connect_timeout, settings.first_byte_timeout, settings.total_timeout, settings.first_byte_timeout)
        grown = usual.times(pixels / USUAL_PIXELS)
        return replace(grown, total=max(grown.total, 3.0 * expected), patience=max(grown.patience, 3.0 * expected))

    def times(self, size: float) -> Deadlines:
        """For a call that is so many times as large; for a smaller one they stay as they are."""
        size = max(1.0, size)
        return replace(self, total=self.total * size, patience=self.patience * size)

    @property
    def quick(self) -> Deadlines:
        """For what is small: who has not sent it by the time that its first byte is due does not answer."""
        return replace(self, total=min(self.total, self.connect + self.first_byte), patience=0.0)


@dataclass(frozen=True)
class Received(Generic[A]):
    """A body that has come whole.

    Attributes:
        expected: what it is to be.
        body: uint8 ``[N]``.
        named: the head's headers by lower-case name.
        seconds: from its first byte to its last.
    """

    expected: Expected[A]
    body: np.ndarray
    named: Mapping[str, str]
    seconds: float


class Redirected(Exception):
    """The server sends the request to another of its addresses."""

    def __init__(self, to: str) -> None:
        super().__init__(shown(to))
        self.to = to


class _Workers:
    """Daemon threads, each for one request at a time: to start one costs a quick call a tenth. A stuck one holds up no exit."""

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            # A child process has none of them.
            os.register_at_fork(after_in_child=self._forget)

    def run(self, work: Callable[[], None]) -> None:
        """Have ``work``, which raises nothing, done by a thread that is free or new."""
        with self._lock:
            mine = self._idle.pop() if self._idle else None
        if mine is None:
            mine = SimpleQueue()
            threading.Thread(target=self._work, args=(mine,), name="remote-vae-call", daemon=True).start()
        mine.put(work)

    def _work(self, mine: SimpleQueue[Callable[[], None]]) -> None:
        while True:
            try:
                mine.get(timeout=_WORKER_SECONDS)()
            except Empty:
                with self._lock:
                    if mine in self._idle:
                        self._idle.remove(mine)
                        return
                # Taken this moment: the work is about to come.
                continue
            with self._lock:
                self._idle.append(mine)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[Callable[[], None]]] = []


_workers = _Workers()


@dataclass(frozen=True)
class _Head:
    """Status, headers by lower-case name, and length of the body; None: nobody knows."""

    status: int
    named: Mapping[str, str]
    length: int | None


class Call(Generic[A]):
    """A request that a thread of its own carries."""

    def __init__(self, transport: Transport, sent: Sent, expect: Expect[A], exchange: Exchange, where: str) -> None:
        self.exchange = exchange
        self.where = where
        self.done = threading.Event()
        self.refusal: EndpointError | None = None
        self.error: Exception | None = None
        self.value: Received[A] | None = None
        self._transport = transport
        self._sent = sent
        self._expect = expect
        _workers.run(self._run)

    def _run(self) -> None:
        try:
            with self._transport.open(self._sent, self.exchange) as answer:
                self.value = self._read(answer)
        except Exception as error:  # whatever it is, it belongs to the thread that waits
            self.error = error
        finally:
            self.done.set()

    def _read(self, answer: Answer) -> Received[A]:
        length = answer.length if not answer.chunked else None
        head = _Head(answer.status, answer.named, length)
        if head.status != 200:
            self._refuse(answer, head)
        if not self.exchange.is_sent:
            raise MalformedAnswer("an answer that came before the whole request was sent").by(self.where)
        try:
            if LATE in self._sent.headers.get(ACCEPT, "") and answer.named.get("content-type", "").strip() == LATE_TYPE:
                late = self._late_head(answer)
                head = _Head(late.status, late.headers, late.length)
                if head.status != 200:
                    self._refuse(answer, head)
            expected = self._expect(head.named)
            started = time.monotonic()
            body = _read_body(answer, expected, head.length)
            return Received(expected, body, head.named, time.monotonic() - started)
        except MalformedAnswer as error:
            raise error.by(self.where) from None

    def _late_head(self, answer: Answer) -> LateHead:
        """Hear the dots of an answer that is still being made, until its head comes."""
        self.exchange.moved = time.monotonic()
        self.exchange.is_late = True
        for _ in range(_MOST_DOTS):
            sign = answer.read(1)
            self.exchange.moved = time.monotonic()
            if sign == b"\n":
                line = _read_line(answer, LATE_HEAD_LIMIT)
                self.exchange.is_late = False
                return read_late_head(line)
            if not sign:
                raise http.client.IncompleteRead(b"")
            if sign != DOT:
                raise MalformedAnswer("a late answer without dots")
        raise MalformedAnswer("a late answer that does not come to its head")

    def _refuse(self, answer: Answer, head: _Head) -> None:
        url = f"{self._sent.url}?{self._sent.query}" if self._sent.query else self._sent.url
        location = head.named.get("location", "")
        to = urljoin(url, location) if location else ""
        if head.status in (307, 308) and to and is_same_place(url, to):
            raise Redirected(to)
        status, pause = head.status, _retry_after(head)
        # Who waits need not wait for words that never come.
        self.refusal = EndpointError(status, "no message", self.where, retry_after=pause)
        detail = _read_error(answer)
        if 300 <= status < 400 and to:
            detail = f"it redirects to {shown(to)}; if that is the endpoint, enter it as its address"
        by = by_proxy(self._transport, url) if status in _BY_PROXIES else ""
        if by:
            detail = f"{detail}; it came through{by}"
        if status in (404, 405):
            detail = f"{detail}; is that the address of a Remote VAE server?"
        is_json = head.named.get("content-type", "").startswith("application/json")
        raise EndpointError(status, detail, self.where, retry_after=pause, is_of_the_server=is_json)


class Wait(Generic[A]):
    """The caller's side of a call: the clock, and the user's word."""

    def __init__(
        self, call: Call[A], deadlines: Deadlines, cancelled: Cancelled, works: Callable[[Cancelled], bool | None] | None
    ) -> None:
        self._call = call
        self._exchange = call.exchange
        self._deadlines = deadlines
        self._cancelled = cancelled
        self._works = works
        self._started = time.monotonic()
        self._longer_until = 0.0
        self._refused_at: float | None = None

    def result(self) -> Received[A]:
        """The answer, still to be checked. Raises what stopped it."""
        call = self._call
        try:
            while not call.done.wait(self._pause()):
                self._check()
        except BaseException:
            self._exchange.break_off()
            raise
        if call.error is not None:
            raise call.error
        if call.value is None:
            raise ConnectionError("no answer")
        return call.value

    def _pause(self) -> float:
        return max(0.001, min(POLL_SECONDS, self._next()[0] - time.monotonic()))

    def _check(self) -> None:
        if self._cancelled():
            raise CallCancelled(f"interrupted while waiting for {self._call.where}", reason="interrupted")
        deadline, what = self._next()
        if time.monotonic() < deadline or self._is_worth_waiting(what):
            return
        if self._call.refusal is not None:
            raise self._call.refusal
        raise DeadlineExceeded(f"{self._call.where}: {what}", reason=what)

    def _next(self) -> tuple[float, str]:
        """The next deadline, and what it means."""
        limits, exchange = self._deadlines, self._exchange
        total = self._started + limits.total, f"not done in {limits.total:g} s"
        if self._call.refusal is not None:
            self._refused_at = self._refused_at or time.monotonic()
            return min(total, (self._refused_at + _ERROR_SECONDS, "no message"))
        if exchange.is_answering and not exchange.is_late:
            return total
        if not exchange.is_connected:
            return min(total, (exchange.moved + limits.connect, f"no connection in {limits.connect:g} s"))
        until = max(exchange.moved + limits.first_byte, self._longer_until)
        return min(total, (until, f"no answer in {until - exchange.moved:.3g} s"))

    def _is_worth_waiting(self, what: str) -> bool:
        """Whether the server works on it, asked when the first byte is overdue."""
        if not what.startswith("no answer") or self._works is None:
            return False
        now, asked_for = time.monotonic(), self._exchange.moved
        try:
            works = self._works(lambda: self._cancelled() or self._call.done.is_set())
        except CallCancelled:
            # It came while its server was asked.
            if self._call.done.is_set():
                return True
            raise
        if works is None:
            self._longer_until = asked_for + self._deadlines.patience
            return now < self._longer_until
        if works:
            self._longer_until = time.monotonic() + _HEALTH_EVERY
        # The answer may be on its way from a server that has just finished.
        return works or self._call.done.wait(POLL_SECONDS)


def sleep(seconds: float, url: str, cancelled: Cancelled) -> None:
    """Wait until the server at ``url`` wants to be asked again. Raises CallCancelled."""
    until = time.monotonic() + seconds
    while (rest := until - time.monotonic()) > 0:
        if cancelled():
            raise CallCancelled(f"interrupted while waiting for {shown(url)}", reason="interrupted")
        time.sleep(min(POLL_SECONDS, rest))


def _read_body(answer: Answer, expected: Expected[Any], length: int | None) -> np.ndarray:
    if expected.exact is not None and length is not None and length != expected.exact:
        raise MalformedAnswer(f"{length} bytes, expected {expected.exact} by shape and dtype")
    if length is not None and length > expected.limit:
        raise MalformedAnswer(f"{length} bytes, expected at most {expected.limit}")
    size = length if length is not None else expected.exact
    if size is None:
        return _read_unknown(answer, expected.limit)
    body = np.empty(size, dtype=np.uint8)
    filled = answer.fill(body.data) if size else 0
    if length is not None and filled < size:
        raise http.client.IncompleteRead(b"", size - filled)
    if filled < size or (not answer.isclosed() and answer.read(1)):
        raise MalformedAnswer(f"{'more than ' if filled == size else ''}{filled} bytes, expected {size} by shape and dtype")
    return body


def _read_unknown(answer: Answer, limit: int) -> np.ndarray:
    """A body whose size nobody knows before its end."""
    data = bytearray()
    while piece := answer.read(64 * 1024):
        data += piece
        if len(data) > limit:
            raise MalformedAnswer(f"more than {limit} bytes, which is the most that was expected")
    return np.frombuffer(data, dtype=np.uint8)


def _read_line(answer: Answer, limit: int) -> bytes:
    """The next line, or ``limit`` bytes of it. Raises http.client.IncompleteRead: it is cut off."""
    line = b""
    while not line.endswith(b"\n") and len(line) < limit:
        byte = answer.read(1)
        if not byte:
            raise http.client.IncompleteRead(line)
        line += byte
    return line


def _read_error(answer: Answer) -> str:
    data = b""
    try:
        data = answer.read(ERROR_LIMIT)
    except (OSError, http.client.HTTPException) as error:
        data = getattr(error, "partial", b"")
    return error_detail(data)


def _retry_after(head: _Head) -> float | None:
    """Seconds after which a busy server wants to be asked again."""
    text = head.named.get("retry-after", "").strip()
    if head.status not in (429, 503) or not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def by_proxy(transport: Transport, url: str) -> str:
    """What to say of the proxy before ``url``; "" where there is none."""
    try:
        proxy = transport.proxy_for(url)
    except (ValueError, OSError):
        return ""
    return proxy and f" the proxy {proxy}: if {urlsplit(url).hostname} needs none, add it to the variable no_proxy"
