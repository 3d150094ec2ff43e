"""One endpoint: sends a request of the wire to it and gives back the checked answer.

A thread carries the request; the caller's thread waits for it, looks for Interrupt and for the deadlines, and breaks it off by
closing its socket.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import numpy as np
from urllib3.exceptions import HTTPError

from remote_vae import wire
from remote_vae.errors import (
    CallCancelled,
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    InvalidRequest,
    MalformedAnswer,
)
from remote_vae.remote.reasons import reason_of
from remote_vae.remote.transport import Answer, Exchange, Sent, Transport, Urllib3Transport
from remote_vae.settings import Settings
from remote_vae.tokens import auth_headers
from remote_vae.version import __version__
from remote_vae.wire import ERROR_LIMIT, Expected, HttpRequest, error_detail

A = TypeVar("A")
Expect = Callable[[Mapping[str, str]], Expected[A]]
Cancelled = Callable[[], bool]

# How often the user is asked for Interrupt. The promise is 0.2 s.
POLL_SECONDS = 0.05
# The text of an error is worth so many seconds, and a word on whether the server works, too.
_ERROR_SECONDS = 2.0
_HEALTH_SECONDS = 2.0
# While a server says that it works it is asked again after so many seconds.
_HEALTH_EVERY = 5.0
_HEALTH_LIMIT = 4096
_MAX_REDIRECTS = 3
# What proxies answer by themselves.
_BY_PROXIES = (403, 407, 502, 503, 504)
# The settings are for a picture of so many pixels.
_USUAL_PIXELS = 1024 * 1024


def never() -> bool:
    """Nobody cancels this call."""
    return False


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
    def of(cls, settings: Settings, pixels: int = _USUAL_PIXELS, expected: float = 0.0) -> Deadlines:
        """The user's, which are for a picture of 1024 x 1024, for a call of ``pixels`` that is ``expected`` to take so long."""
        size = max(1.0, pixels / _USUAL_PIXELS)
        patience = max(settings.first_byte_timeout * size, 3.0 * expected)
        total = max(settings.total_timeout * size, 3.0 * expected)
        return cls(settings.connect_timeout, settings.first_byte_timeout, total, patience)

    @property
    def quick(self) -> Deadlines:
        """For what is small: who has not sent it by the time that its first byte is due does not answer."""
        return replace(self, total=min(self.total, self.connect + self.first_byte), patience=0.0)


DEFAULT_DEADLINES = Deadlines(connect=10.0, first_byte=120.0, total=300.0)


@dataclass(frozen=True)
class Reply(Generic[A]):
    """A checked answer, with the bytes of the two bodies."""

    answer: A
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Health:
    """What ``GET /health`` says: whether a call is running or waiting there."""

    is_working: bool


class EndpointClient:
    """The endpoint at one URL, for one kind of call. Cheap to make: connections are the transport's.

    Args:
        url: of the endpoint; a user name and password in it are sent as HTTP's basic authentication, and shown nowhere.
        transport: what carries the requests.
        public: whether it is one of families.toml's, which do not get the user's REMOTE_VAE_TOKEN.
    """

    def __init__(self, url: str, transport: Transport, *, public: bool = False) -> None:
        self.url, self._basic = _without_user(url)
        self._transport = transport
        self._public = public

    def decode(
        self, request: wire.DecodeRequest, deadlines: Deadlines = DEFAULT_DEADLINES, cancelled: Cancelled = never
    ) -> Reply[wire.DecodeAnswer]:
        """Decode ``request.latents`` remotely.

        Raises:
            RouteFailed: unreachable, too slow, cancelled, an error status, or an answer that is not believed.
        """
        return self._ask(request.to_http(), partial(wire.expect_decode, request), deadlines, cancelled)

    def encode(
        self, request: wire.EncodeRequest, deadlines: Deadlines = DEFAULT_DEADLINES, cancelled: Cancelled = never
    ) -> Reply[wire.EncodeAnswer]:
        """Encode ``request.image`` remotely. Raises as ``decode`` does."""
        return self._ask(request.to_http(), partial(wire.expect_encode, request), deadlines, cancelled)

    def info(self, deadlines: Deadlines = DEFAULT_DEADLINES, cancelled: Cancelled = never) -> wire.Info:
        """What the server says of itself; ``url`` is that of its /info. Raises as ``decode`` does."""
        return self._follow(self.url, None, wire.expect_info, deadlines, cancelled).answer

    def health(self, seconds: float = _HEALTH_SECONDS, cancelled: Cancelled = never) -> Health:
        """What the server says of its work, asked beside ``url``. Raises as ``decode`` does."""
        deadlines = Deadlines(seconds, seconds, seconds)
        return self._follow(beside(self.url, "health"), None, _expect_health, deadlines, cancelled).answer

    def _ask(self, request: HttpRequest, expect: Expect[A], deadlines: Deadlines, cancelled: Cancelled) -> Reply[A]:
        started = time.monotonic()
        try:
            return self._follow(self.url, request, expect, deadlines, cancelled)
        except EndpointError as error:
            pause = error.retry_after
            # The user was ready to wait so long for the answer's first byte.
            if pause is None or pause > deadlines.first_byte:
                raise
        _sleep(pause, self.url, cancelled)
        rest = max(0.1, deadlines.total - (time.monotonic() - started))
        return self._follow(self.url, request, expect, replace(deadlines, total=rest), cancelled)

    def _follow(
        self, url: str, request: HttpRequest | None, expect: Expect[A], deadlines: Deadlines, cancelled: Cancelled
    ) -> Reply[A]:
        for _ in range(_MAX_REDIRECTS):
            try:
                return self._once(url, request, expect, deadlines, cancelled)
            except _Redirected as redirected:
                url = redirected.to
        raise EndpointError(310, f"it redirects in a circle, lastly to {shown(url)}", shown(self.url))

    def _once(
        self, url: str, request: HttpRequest | None, expect: Expect[A], deadlines: Deadlines, cancelled: Cancelled
    ) -> Reply[A]:
        exchange = Exchange(deadlines.connect, deadlines.total)
        sent = self._sent(url, request)
        call = _Call(self._transport, sent, expect, exchange, shown(url))
        works = partial(self._works, min(_HEALTH_SECONDS, deadlines.first_byte)) if request is not None else None
        try:
            expected, body = _Wait(call, deadlines, cancelled, works).result()
        except (HTTPError, OSError, http.client.HTTPException, ValueError) as error:
            raise _unreachable(self._transport, url, error) from error
        try:
            answer = expected.finish(body)
        except MalformedAnswer as error:
            raise error.by(shown(url)) from None
        return Reply(answer, len(sent.body or b""), body.nbytes)

    def _sent(self, url: str, request: HttpRequest | None) -> Sent:
        # The token is read anew each time: one that is set after the start of the UI counts.
        headers = {"User-Agent": f"remote-vae/{__version__}", **(request.headers if request else {})}
        headers |= auth_headers(url, public=self._public) or self._basic
        if any("\n" in value or "\r" in value for value in headers.values()):
            raise InvalidRequest(f"{shown(url)}: a token or a header has more than one line")
        target, _, query = (request.url(url) if request else url).partition("#")[0].partition("?")
        return Sent("POST" if request else "GET", target, query, headers, memoryview(request.body) if request else None)

    def _works(self, seconds: float, cancelled: Cancelled) -> bool | None:
        """Whether the server says that it works; None: it says nothing."""
        try:
            return self.health(seconds, cancelled).is_working
        except (EndpointError, MalformedAnswer):
            return None
        except (EndpointUnreachable, DeadlineExceeded):
            return False


def beside(url: str, name: str) -> str:
    """Where the endpoint at ``url`` has its /``name``: beside /decode or /encode, else below ``url``. The query stays."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    folder, _, last = path.rpartition("/")
    base = folder if last in ("decode", "encode") else path
    return urlunsplit(parts._replace(path=f"{base}/{name}"))


def shown(url: str) -> str:
    """``url`` for logs, messages and records: without its query, which may hold a key, and without a user's password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


_transport = Urllib3Transport()


def client_for(url: str, *, public: bool = False) -> EndpointClient:
    """A client for the exact ``url``, over the process's connections."""
    return EndpointClient(url, _transport, public=public)


# --- the thread that carries, and the one that waits ---------------------------------------------------------------------


class _Redirected(Exception):
    def __init__(self, to: str) -> None:
        super().__init__(shown(to))
        self.to = to


class _Call(Generic[A]):
    """A request that a thread of its own carries."""

    def __init__(self, transport: Transport, sent: Sent, expect: Expect[A], exchange: Exchange, where: str) -> None:
        self.exchange = exchange
        self.where = where
        self.done = threading.Event()
        self.refusal: EndpointError | None = None
        self.error: Exception | None = None
        self.value: tuple[Expected[A], np.ndarray] | None = None
        self._transport = transport
        self._sent = sent
        self._expect = expect
        threading.Thread(target=self._run, name="remote-vae-call", daemon=True).start()

    def _run(self) -> None:
        try:
            with self._transport.open(self._sent, self.exchange) as answer:
                self.value = self._read(answer)
        except Exception as error:  # whatever it is, it belongs to the thread that waits
            self.error = error
        finally:
            self.done.set()

    def _read(self, answer: Answer) -> tuple[Expected[A], np.ndarray]:
        if answer.status != 200:
            self._refuse(answer)
        if not self.exchange.is_sent:
            raise MalformedAnswer("an answer that came before the whole request was sent").by(self.where)
        try:
            expected = self._expect(answer.named)
            return expected, _read_body(answer, expected)
        except MalformedAnswer as error:
            raise error.by(self.where) from None

    def _refuse(self, answer: Answer) -> None:
        url = f"{self._sent.url}?{self._sent.query}" if self._sent.query else self._sent.url
        location = answer.named.get("location", "")
        to = urljoin(url, location) if location else ""
        if answer.status in (307, 308) and to and _is_same_place(url, to):
            raise _Redirected(to)
        status, pause = answer.status, _retry_after(answer)
        # Who waits need not wait for words that never come.
        self.refusal = EndpointError(status, "no message", self.where, retry_after=pause)
        detail = _read_error(answer)
        if 300 <= status < 400 and to:
            detail = f"it redirects to {shown(to)}; if that is the endpoint, enter it as its address"
        by = _by_proxy(self._transport, url) if status in _BY_PROXIES else ""
        if by:
            detail = f"{detail}; it came through{by}"
        if status in (404, 405):
            detail = f"{detail}; is that the address of a Remote VAE server?"
        raise EndpointError(status, detail, self.where, retry_after=pause)


class _Wait(Generic[A]):
    """The caller's side of a call: the clock, and the user's word."""

    def __init__(
        self, call: _Call[A], deadlines: Deadlines, cancelled: Cancelled, works: Callable[[Cancelled], bool | None] | None
    ) -> None:
        self._call = call
        self._exchange = call.exchange
        self._deadlines = deadlines
        self._cancelled = cancelled
        self._works = works
        self._started = time.monotonic()
        self._longer_until = 0.0
        self._refused_at: float | None = None

    def result(self) -> tuple[Expected[A], np.ndarray]:
        """What the answer is to be, and its body. Raises what stopped it."""
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
        if exchange.is_answering:
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
        works = self._works(lambda: self._cancelled() or self._call.done.is_set())
        if works is None:
            self._longer_until = asked_for + self._deadlines.patience
            return now < self._longer_until
        if works:
            self._longer_until = time.monotonic() + _HEALTH_EVERY
        # The answer may be on its way from a server that has just finished.
        return works or self._call.done.wait(POLL_SECONDS)


def _sleep(seconds: float, url: str, cancelled: Cancelled) -> None:
    until = time.monotonic() + seconds
    while (rest := until - time.monotonic()) > 0:
        if cancelled():
            raise CallCancelled(f"interrupted while waiting for {shown(url)}", reason="interrupted")
        time.sleep(min(POLL_SECONDS, rest))


# --- bodies --------------------------------------------------------------------------------------------------------------


def _read_body(answer: Answer, expected: Expected[Any]) -> np.ndarray:
    length = answer.length if not answer.chunked else None
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
    if filled < size or (length is None and answer.read(1)):
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


def _read_error(answer: Answer) -> str:
    data = b""
    try:
        data = answer.read(ERROR_LIMIT)
    except (OSError, http.client.HTTPException) as error:
        data = getattr(error, "partial", b"")
    return error_detail(data)


def _expect_health(headers: Mapping[str, str]) -> Expected[Health]:
    del headers
    return Expected(_health, _HEALTH_LIMIT)


def _health(body: np.ndarray) -> Health:
    try:
        entries = json.loads(body.tobytes())
        return Health(entries["running"] is True or int(entries["waiting"]) > 0)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise MalformedAnswer("not what /health of a Remote VAE server says") from None


# --- addresses and words -------------------------------------------------------------------------------------------------


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """``url`` without user name and password, and the header that carries them."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidRequest(f"not an address: {error}") from None
    user, at, netloc = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    header = base64.b64encode(unquote(user).encode()).decode("ascii")
    return urlunsplit(parts._replace(netloc=netloc)), {"Authorization": f"Basic {header}"}


def _is_same_place(url: str, to: str) -> bool:
    """Whether a redirect leads to the same server, or to its https."""
    here, there = urlsplit(url), urlsplit(to)
    if here.netloc == there.netloc:
        return here.scheme == there.scheme
    return here.hostname == there.hostname and (here.scheme, there.scheme) == ("http", "https") and there.port in (None, 443)


def _retry_after(answer: Answer) -> float | None:
    """Seconds after which a busy server wants to be asked again."""
    text = answer.named.get("retry-after", "").strip()
    if answer.status not in (429, 503) or not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _unreachable(transport: Transport, url: str, error: Exception) -> EndpointUnreachable:
    reason, advice = reason_of(error, url)
    by = _by_proxy(transport, url)
    if by:
        reason = f"by a proxy: {reason}"
    return EndpointUnreachable(f"{shown(url)}: {reason}{advice}{by and '; it goes through'}{by}", reason=reason)


def _by_proxy(transport: Transport, url: str) -> str:
    """What to say of the proxy before ``url``; "" where there is none."""
    try:
        proxy = transport.proxy_for(url)
    except (ValueError, OSError):
        return ""
    return proxy and f" the proxy {proxy}: if {urlsplit(url).hostname} needs none, add it to the variable no_proxy"
