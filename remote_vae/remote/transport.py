"""Carries one request to a server and its answer back, over urllib3's connections.

urllib3 (1.26 and 2, which come with requests in every host) connects, speaks TLS, goes through proxies and keeps connections;
where requests would look for proxies and certificates is looked here. Added is what a VAE call needs on top: a socket that
somebody else can close, an answer that is seen while the request is still being sent, and idle connections that go.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from urllib3.exceptions import ClosedPoolError, HTTPError
from urllib3.util import Timeout, is_connection_dropped

from remote_vae.remote.environment import new_manager, proxy_for
from remote_vae.wire import one_line

# Of a body that is sent: whoever watches hears of each, so an upload that moves at all moves by one of these.
PIECE = 256 * 1024
# How long one send may block before it is looked whether the server has answered already, in seconds.
_SEND_SECONDS = 0.1
# Of an answer to an earlier request, or to none: on a kept connection it comes before the whole request was sent.
_STRAY = (200, 408)
# Seconds after which an idle connection is closed, and how often the idle ones are looked at.
IDLE_SECONDS = 60.0
SWEEP_SECONDS = 2.0


@dataclass(frozen=True)
class Sent:
    """A request. ``url`` without its query, which may hold a key and would reach urllib3's log."""

    method: str
    url: str
    query: str
    headers: Mapping[str, str]
    body: memoryview | None = None


class Exchange:
    """One request on its way: shared by the thread that carries it and the one that waits for it.

    Attributes:
        connect_seconds, total_seconds: after which the socket gives up by itself, should nobody break it off before.
        is_connected, is_answering: how far it has come.
        is_late: whether the answer has begun before it is made; ``moved`` is then its last sign of life.
        is_sent: whether the whole request was.
        moved: when it was connected, or last sent a piece (``time.monotonic``).
    """

    def __init__(self, connect_seconds: float = 10.0, total_seconds: float = 300.0) -> None:
        self.connect_seconds = connect_seconds
        self.total_seconds = total_seconds
        self.is_connected = False
        self.is_answering = False
        self.is_late = False
        self.is_sent = False
        self.moved = time.monotonic()
        self._lock = threading.Lock()
        self._socket: Any = None
        self._is_broken_off = False

    def begin(self) -> None:
        """It starts, or starts anew."""
        self.is_connected = self.is_answering = self.is_late = self.is_sent = False
        self.moved = time.monotonic()

    def use(self, sock: Any) -> None:
        """It goes over ``sock``. Raises ConnectionAbortedError: nobody waits for it any more."""
        with self._lock:
            self._socket = sock
            if self._is_broken_off:
                raise ConnectionAbortedError("nobody waits for this request any more")
        self.is_connected = True
        self.moved = time.monotonic()

    def leave(self) -> None:
        """It has done with its socket."""
        with self._lock:
            self._socket = None

    def break_off(self) -> None:
        """End it from another thread: whoever reads or writes its socket gets an error."""
        with self._lock:
            self._is_broken_off = True
            if self._socket is not None:
                # Not the TLS socket's own method, which takes the TLS away from under the thread that uses it.
                with contextlib.suppress(Exception):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    @property
    def is_broken_off(self) -> bool:
        return self._is_broken_off


class Answer(http.client.HTTPResponse):
    """The head of an answer, and its body, still to be read.

    Attributes:
        named: the headers by lower-case name.
    """

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        reader = _taken_reader()
        if reader is not None:
            self.fp.close()
            self.fp = reader
        self.named: dict[str, str] = {}

    def begin(self) -> None:
        """Read the head. Raises http.client.HTTPException: it cannot be told where the answer ends."""
        super().begin()
        while 101 < self.status < 200:  # 102, 103: an interim answer before the answer
            self.headers = self.msg = None  # type: ignore[assignment]  # as it was before the first
            super().begin()
        codings = self.headers.get_all("transfer-encoding", [])
        # http.client takes the framing for content wherever the word is not the bare one.
        if [coding.lower() for coding in codings] not in ([], ["identity"], ["chunked"]):
            raise http.client.HTTPException(f"transfer encoding {codings[0][:40]!r}, which was not asked for")
        lengths = {length.strip() for value in self.headers.get_all("content-length", []) for length in value.split(",")}
        if len(lengths) > 1 or not all(length.isascii() and length.isdigit() and len(length) < 16 for length in lengths):
            raise http.client.HTTPException("more than one Content-Length, or none that is a number")
        if lengths and self.length is None and not self.chunked:  # one length, named twice
            self.length = int(lengths.pop())
        self.named = {name.lower(): value if value.isprintable() else one_line(value) for name, value in self.headers.items()}
        carried = _Carrying.now()
        if carried is not None:
            carried.answer = self
            carried.exchange.is_answering = True

    def fill(self, view: memoryview) -> int:
        """Receive into ``view`` until it is full or the body ends. Returns the number of bytes."""
        filled = 0
        while filled < view.nbytes:
            count = self.readinto(view[filled:])
            if not count:
                break
            filled += count
        return filled

    @property
    def is_whole(self) -> bool:
        """Whether the body was read to its end, so that the connection can carry another request."""
        return self.isclosed() and not self.will_close


class Transport(Protocol):
    """What carries requests; a test swaps it for one that needs no server."""

    def open(self, sent: Sent, exchange: Exchange) -> AbstractContextManager[Answer]:
        """Send ``sent`` and give the head of the answer; at the end of the context the connection is kept or closed."""
        ...

    def proxy_for(self, url: str) -> str:
        """The proxy before ``url``, without its password; "" for none."""
        ...


class Urllib3Transport:
    """Keeps connections to any number of servers. May be used from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._managers: dict[tuple[str, str], tuple[Any, str]] = {}

    @contextmanager
    def open(self, sent: Sent, exchange: Exchange) -> Iterator[Answer]:
        """As ``Transport.open``. Raises urllib3's HTTPError, OSError, http.client.HTTPException, ValueError."""
        try:
            carried = _Carrying(sent, exchange)
            with carried.noted():
                response = self._respond(sent, carried)
            answer = carried.answer
            if answer is None:
                raise http.client.HTTPException("no answer")
            try:
                yield answer
            finally:
                exchange.leave()
                if not (answer.is_whole and exchange.is_sent):
                    response.close()
                _idle.note(carried.connection)
                response.release_conn()
        finally:
            exchange.leave()

    def proxy_for(self, url: str) -> str:
        """The proxy that the environment names for ``url``, without its password; "" for none."""
        proxy = self._manager(url)[1]
        return urlsplit(proxy)._replace(netloc=urlsplit(proxy).netloc.rpartition("@")[2]).geturl()

    def close(self) -> None:
        """Close the idle connections; the transport can still be used."""
        with self._lock:
            managers, self._managers = self._managers, {}
        for manager, _ in managers.values():
            manager.clear()

    def _respond(self, sent: Sent, carried: _Carrying) -> Any:
        exchange = carried.exchange
        manager, _ = self._manager(sent.url)
        # The wait is ended from outside, by the deadlines; these are for a thread that nobody waits for any more.
        timeout = Timeout(connect=exchange.connect_seconds + 1.0, read=exchange.total_seconds + 1.0)
        while True:
            exchange.begin()
            try:
                response = manager.urlopen(
                    sent.method, sent.url, body=sent.body, headers=dict(sent.headers), retries=False, redirect=False,
                    timeout=timeout, preload_content=False, decode_content=False,
                )  # fmt: skip
                if carried.is_fresh or exchange.is_sent or response.status not in _STRAY:
                    return response
                exchange.leave()
                response.close()
            except ClosedPoolError:
                continue
            except (HTTPError, OSError, http.client.HTTPException):
                # The server may close a kept connection just as it is taken up. Such a request was never seen, and asking twice
                # is harmless: a VAE call changes nothing.
                if carried.is_fresh or exchange.is_broken_off:
                    raise
            manager.clear()
            carried.answer = None

    def _manager(self, url: str) -> tuple[Any, str]:
        parts = urlsplit(url)
        origin = parts.scheme, parts.netloc
        with self._lock:
            if origin not in self._managers:
                proxy = proxy_for(url)
                manager = new_manager(proxy, secure=parts.scheme == "https")
                pools = manager.pool_classes_by_scheme
                manager.pool_classes_by_scheme = {scheme: _watched_pool(pool) for scheme, pool in pools.items()}
                self._managers[origin] = manager, proxy
            return self._managers[origin]


# --- what is added to urllib3's connections ----------------------------------------------------------------------------


class _Carrying:
    """The request that this thread is carrying, for the connection that urllib3 chooses for it."""

    _here = threading.local()

    def __init__(self, sent: Sent, exchange: Exchange) -> None:
        self.sent = sent
        self.exchange = exchange
        self.connection: Any = None
        self.is_fresh = False
        self.answer: Answer | None = None

    @classmethod
    def now(cls) -> _Carrying | None:
        return getattr(cls._here, "carried", None)

    @contextmanager
    def noted(self) -> Iterator[None]:
        self._here.carried = self
        try:
            yield
        finally:
            self._here.carried = None


def _taken_reader() -> Any:
    """The reader through which an early answer was looked for; it may hold the beginning of the answer."""
    carried = _Carrying.now()
    if carried is None or carried.connection is None or carried.connection.reader is None:
        return None
    reader, carried.connection.reader = carried.connection.reader, None
    return reader


class _Watched:
    """Before urllib3's own connection class: reports to the exchange, sends in pieces, looks for an early answer."""

    response_class = Answer
    sock: Any
    reader: Any = None
    idle_since: float | None = None
    _is_connecting = False
    _head = b""

    def connect(self) -> None:
        carried = _Carrying.now()
        if carried is not None:
            carried.is_fresh = True
        self._is_connecting = True
        try:
            super().connect()  # type: ignore[misc]  # of the connection class behind this one
        finally:
            self._is_connecting = False
        if carried is not None:
            carried.exchange.use(self.sock)

    def request(self, *args: Any, **kwargs: Any) -> None:
        carried = _Carrying.now()
        if carried is not None:
            carried.connection = self
            if self.sock is not None:
                carried.exchange.use(self.sock)
        super().request(*args, **kwargs)  # type: ignore[misc]
        if carried is not None:
            carried.exchange.is_sent = True

    def putrequest(self, method: str, url: str, *args: Any, **kwargs: Any) -> None:
        carried = _Carrying.now()
        query = carried.sent.query if carried is not None else ""
        super().putrequest(method, f"{url}?{query}" if query else url, *args, **kwargs)  # type: ignore[misc]

    def send(self, data: Any) -> None:
        carried = _Carrying.now()
        if self._is_connecting or carried is None:
            super().send(data)  # type: ignore[misc]
            return
        if self.sock is None:
            self.connect()
        if self.reader is None:
            self.reader = self.sock.makefile("rb")
            if carried.sent.body:
                # A head in a packet of its own wakes the server for nothing.
                self._head = data
                return
        view = memoryview(data)
        head, self._head = self._head, b""
        if head:
            self._send(memoryview(head + view[:PIECE]), carried.exchange)
            view = view[PIECE:]
        self._send(view, carried.exchange)

    def _send(self, view: memoryview, exchange: Exchange) -> None:
        start = 0
        while start < view.nbytes:
            if self._has_answer():
                # urllib3 takes this one for what it is: the server has said all, and wants no more.
                raise BrokenPipeError("the server has answered before it had the whole request")
            try:
                start += self.sock.send(view[start : start + PIECE])
            except TimeoutError:
                continue
            except ConnectionError as error:
                raise BrokenPipeError(str(error)) from error
            exchange.moved = time.monotonic()

    def _has_answer(self) -> bool:
        self.sock.settimeout(0)
        try:
            return bool(self.reader.peek(1))
        except OSError:  # nothing there yet; anything else is met by the next send
            return False
        finally:
            self.sock.settimeout(_SEND_SECONDS)

    def close(self) -> None:
        reader, self.reader = self.reader, None
        if reader is not None:
            reader.close()
        super().close()  # type: ignore[misc]


class _WatchedPool:
    """Before urllib3's own pool class: what is taken out of it is idle no longer, at once and before it is looked at."""

    def _get_conn(self, *args: Any, **kwargs: Any) -> Any:
        with _idle.lock:
            connection = super()._get_conn(*args, **kwargs)  # type: ignore[misc]
            connection.idle_since = None
            return connection


@functools.cache
def _watched_pool(pool: Any) -> Any:
    connection = type("_WatchedConnection", (_Watched, pool.ConnectionCls), {})
    return type("_WatchedPool", (_WatchedPool, pool), {"ConnectionCls": connection})


class _Idle:
    """Closes connections that nobody uses: those that the server has closed within seconds, others after a minute."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_sweeping = False

    def note(self, connection: Any) -> None:
        """``connection`` has nothing to do from now on."""
        if connection is None or connection.sock is None:
            return
        with self.lock:
            connection.idle_since = time.monotonic()
            self._connections.add(connection)
            if not self._is_sweeping:
                self._is_sweeping = True
                threading.Thread(target=self._sweep, name="remote-vae-idle", daemon=True).start()

    def _sweep(self) -> None:
        while True:
            time.sleep(SWEEP_SECONDS)
            with self.lock:
                for connection in list(self._connections):
                    since = connection.idle_since
                    if since is not None and (time.monotonic() - since > IDLE_SECONDS or is_connection_dropped(connection)):
                        connection.close()
                        self._connections.discard(connection)
                if not self._connections:
                    self._is_sweeping = False
                    return


_idle = _Idle()
