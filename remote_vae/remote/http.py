"""One POST or GET with deadlines that hold and a wait that can be broken off.

A VAE answer is megabytes that should land in their final buffer, and a read must be able to stop when a deadline passes or the
user wants it. urllib3 offers neither: a thread around it costs three times the transfer itself (bench/client_overhead.py). So
http.client makes the connections, and what it does not do stands here: keep-alive, and sockets that look up from every wait.
Proxies and certificates are found as requests finds them.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar, Union, cast
from urllib.parse import unquote, urlsplit

import certifi
import numpy as np
import requests.utils

from remote_vae.errors import (
    CallCancelled,
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    InvalidRequest,
    MalformedAnswer,
)
from remote_vae.remote.http1 import Answer, Size, request_head
from remote_vae.settings import Settings
from remote_vae.tokens import is_loopback
from remote_vae.wire import ERROR_LIMIT, Expected, HttpRequest, error_detail

A = TypeVar("A")
_Connection = Union[http.client.HTTPConnection, http.client.HTTPSConnection]

# How often the user is asked for Interrupt. The promise is 0.2 s.
POLL_SECONDS = 0.05
# Pieces of a body: an upload that moves at all moves by one of these.
_CHUNK = 256 * 1024
_IDLE_CONNECTIONS = 8
_FRESH_SECONDS = 1.0
_REMEMBERED_FORMS = 64


@dataclass(frozen=True)
class Deadlines:
    """Seconds: until connected, from the last sent piece to the first byte of the answer, and for the whole call."""

    connect: float
    first_byte: float
    total: float

    @classmethod
    def of(cls, settings: Settings) -> Deadlines:
        """The user's."""
        return cls(settings.connect_timeout, settings.first_byte_timeout, settings.total_timeout)

    @property
    def quick(self) -> Deadlines:
        """For what is small: who has not sent it by the time that its first byte is due does not answer."""
        return replace(self, total=min(self.total, self.connect + self.first_byte))


@dataclass(frozen=True)
class Reply(Generic[A]):
    """A checked answer, with the bytes of the two bodies."""

    answer: A
    bytes_up: int
    bytes_down: int


class HttpClient:
    """Keep-alive connections to one origin. May be used from many threads."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._proxy = _proxy_for(url)
        self._proxy_headers = _proxy_headers(self._proxy)
        # One context for all connections: loading the certificates takes 15 ms.
        self._context = _tls_context() if self._secure else None
        self._lock = threading.Lock()
        self._idle: list[tuple[float, _Connection]] = []
        # By the head of a request, which says much of what its answer will be like.
        self._usual: dict[bytes, Size] = {}

    def post(
        self,
        url: str,
        request: HttpRequest,
        headers: Mapping[str, str],
        expect: Callable[[Mapping[str, str]], Expected[A]],
        deadlines: Deadlines,
        cancelled: Callable[[], bool],
    ) -> Reply[A]:
        """Send ``request``; ``expect`` judges the headers of a 200 answer before its body is read.

        Raises:
            EndpointUnreachable, DeadlineExceeded, CallCancelled, EndpointError, MalformedAnswer: no answer, and why.
        """
        body = memoryview(request.body)
        message = _Message(self._head(url, request, headers, body.nbytes), body)
        return self._reply(message, expect, _Watch(_host(url), deadlines, cancelled))

    def get(
        self,
        url: str,
        headers: Mapping[str, str],
        expect: Callable[[Mapping[str, str]], Expected[A]],
        deadlines: Deadlines,
        cancelled: Callable[[], bool],
    ) -> Reply[A]:
        """Ask for ``url``; the rest, and what is raised, as with ``post``."""
        message = _Message(self._head(url, HttpRequest((), {}, b""), headers, None), memoryview(b""))
        return self._reply(message, expect, _Watch(_host(url), deadlines, cancelled))

    def close(self) -> None:
        """Close the idle connections; the client can still be used."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def _head(self, url: str, request: HttpRequest, headers: Mapping[str, str], length: int | None) -> bytes:
        fields = {**request.headers, **headers, **({} if self._secure else self._proxy_headers)}
        try:
            host, target = _host_and_target(url)
            # A plain proxy is asked for the whole address.
            address = url if self._proxy and not self._secure else target
            return request_head(host, request.url(address), fields, length)
        except ValueError as error:
            raise InvalidRequest(f"{_host(url)}: {error}") from None

    def _reply(self, message: _Message, expect: Callable[[Mapping[str, str]], Expected[A]], watch: _Watch) -> Reply[A]:
        try:
            expected, answer = self._exchange(message, expect, watch)
        except (OSError, http.client.HTTPException) as error:
            reason = _plain_reason(error)
            raise EndpointUnreachable(f"{watch.host}: {reason}", reason=reason) from error
        return Reply(expected.finish(answer), message.body.nbytes, answer.nbytes)

    def _exchange(
        self, message: _Message, expect: Callable[[Mapping[str, str]], Expected[A]], watch: _Watch
    ) -> tuple[Expected[A], np.ndarray]:
        connection = self._take_idle()
        if connection is not None:
            try:
                return self._talk(connection, message, expect, watch)
            except (ConnectionError, http.client.BadStatusLine):
                # The server may close an idle connection just as we take it up. Such a request was never seen, and asking
                # twice is harmless: a VAE call changes nothing.
                if watch.answering:
                    raise
                watch.restart()
        return self._talk(self._connect(watch), message, expect, watch)

    def _talk(
        self,
        connection: _Connection,
        message: _Message,
        expect: Callable[[Mapping[str, str]], Expected[A]],
        watch: _Watch,
    ) -> tuple[Expected[A], np.ndarray]:
        sock = cast(_WatchedSocket, connection.sock)
        sock.watch = watch
        complete = False
        try:
            answer = message.send(sock, self._usual.get(message.head))
            watch.answering = True
            if answer.status != 200:
                raise EndpointError(answer.status, _read_error(answer), watch.host)
            expected = expect(answer.headers)
            body = _read_body(answer, expected)
            self._remember(message, answer.size)
            complete = answer.keeps_alive
            return expected, body
        finally:
            if complete:
                self._give_back(connection)
            else:
                connection.close()

    def _remember(self, message: _Message, size: Size) -> None:
        if self._usual.get(message.head) != size:
            with self._lock:
                if len(self._usual) >= _REMEMBERED_FORMS:
                    del self._usual[next(iter(self._usual))]
                self._usual[message.head] = size

    def _take_idle(self) -> _Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                since, connection = self._idle.pop()
            # Something to read where nothing was asked for: the server has closed it. Hardly within a second.
            if time.monotonic() - since < _FRESH_SECONDS or not select.select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()

    def _give_back(self, connection: _Connection) -> None:
        with self._lock:
            if len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append((time.monotonic(), connection))
                return
        connection.close()

    def _connect(self, watch: _Watch) -> _Connection:
        """A new connection. Made on a thread of its own, as nothing can break off a name lookup."""
        attempt = _Attempt(lambda: self._new_connection(watch.deadlines.connect))
        while not attempt.done.wait(watch.poll()):
            try:
                watch.check()
            except BaseException:
                attempt.abandon()
                raise
        connection = attempt.result()
        connection.sock = _WatchedSocket(connection.sock, watch)
        watch.connected()
        return connection

    def _new_connection(self, timeout: float) -> _Connection:
        host, port = self._host, self._port
        if self._proxy:
            proxy = urlsplit(self._proxy)
            host, port = proxy.hostname or "", proxy.port or 80
        connection: _Connection
        if self._context is not None:
            connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout)
        if self._proxy and self._secure:
            connection.set_tunnel(self._host, self._port, self._proxy_headers)
        connection.connect()
        return connection


@dataclass(frozen=True)
class _Message:
    """A request, ready to be written."""

    head: bytes
    body: memoryview

    def send(self, sock: _WatchedSocket, usual: Size | None) -> Answer:
        """Write it, and read the head of the answer; ``usual`` is for ``Answer``."""
        try:
            # Together, as a head in a packet of its own wakes the server for nothing.
            sock.sendall(self.head + self.body[:_CHUNK])
            if self.body.nbytes > _CHUNK:
                sock.sendall(self.body[_CHUNK:])
        except ConnectionError:
            # A server that refuses by the head alone answers and hangs up, while the body is still on its way.
            with contextlib.suppress(OSError, http.client.HTTPException):
                return Answer(sock)
            raise
        return Answer(sock, usual)


class _Watch:
    """The clock of one call, and the user's word."""

    def __init__(self, host: str, deadlines: Deadlines, cancelled: Callable[[], bool]) -> None:
        self.host = host
        self.deadlines = deadlines
        self.answering = False
        self._cancelled = cancelled
        self._started = time.monotonic()
        self._look_at = self._started + POLL_SECONDS / 2
        self._is_connected = True
        self._progress = self._started

    def restart(self) -> None:
        """The connection has to be made anew; the total goes on."""
        self._is_connected = False

    def connected(self) -> None:
        self._is_connected = True
        self.moved()

    def moved(self) -> None:
        """A piece of the request went out."""
        self._progress = time.monotonic()

    def poll(self) -> float:
        """Seconds that may pass before the next ``check``."""
        return max(0.001, min(POLL_SECONDS, self._next()[0] - time.monotonic()))

    def check(self) -> None:
        """Raises CallCancelled or DeadlineExceeded when the wait is over. Looks up twice a poll, not on every packet."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + POLL_SECONDS / 2
        deadline, what = self._next()
        if now >= deadline:
            raise DeadlineExceeded(f"{self.host}: {what}", reason=what)
        if self._cancelled():
            raise CallCancelled(f"interrupted while waiting for {self.host}", reason="interrupted")

    def _next(self) -> tuple[float, str]:
        limits = self.deadlines
        total = self._started + limits.total, f"not done in {limits.total:g} s"
        if self.answering:
            return total
        if not self._is_connected:
            return min(total, (self._started + limits.connect, f"no connection in {limits.connect:g} s"))
        return min(total, (self._progress + limits.first_byte, f"no answer in {limits.first_byte:g} s"))


class _WatchedSocket:
    """A connected socket that looks up from every wait to ask the call's watch."""

    def __init__(self, sock: socket.socket, watch: _Watch) -> None:
        self.watch = watch
        self._sock = sock
        _end_waits(sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def sendall(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        start = 0
        while start < view.nbytes:
            try:
                start += self._sock.send(view[start : start + _CHUNK])
            except (TimeoutError, BlockingIOError):
                self.watch.check()
            else:
                self.watch.moved()

    def fill(self, view: memoryview, least: int) -> int:
        """Receive at least ``least`` bytes into ``view``; fewer only at the end of the connection. Returns their number."""
        receive, check = self._sock.recv_into, self.watch.check
        filled = 0
        while filled < least:
            check()
            try:
                count = receive(view[filled:])
            except (TimeoutError, BlockingIOError):
                continue
            if not count:
                break
            filled += count
        return filled


def _end_waits(sock: socket.socket) -> None:
    """Let every wait of ``sock`` end after POLL_SECONDS.

    Linux does it by itself; elsewhere, and under TLS, Python polls before each packet, which is a system call more.
    """
    sock.settimeout(POLL_SECONDS)
    if sys.platform == "linux" and not isinstance(sock, ssl.SSLSocket):
        timeout = struct.pack("@ll", 0, int(POLL_SECONDS * 1e6))
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            sock.settimeout(None)


class _Attempt:
    """A connection being made on a daemon thread, which a hanging name lookup may keep for as long as it likes."""

    def __init__(self, connect: Callable[[], _Connection]) -> None:
        self.done = threading.Event()
        self._connect = connect
        self._lock = threading.Lock()
        self._abandoned = False
        self._connection: _Connection | None = None
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="remote-vae-connect", daemon=True).start()

    def abandon(self) -> None:
        """Nobody waits any more: what still comes of it is closed."""
        with self._lock:
            self._abandoned = True
            if self._connection is not None:
                self._connection.close()

    def result(self) -> _Connection:
        if self._error is not None:
            raise self._error
        if self._connection is None:
            raise ConnectionError("no connection")
        return self._connection

    def _run(self) -> None:
        try:
            connection = self._connect()
            with self._lock:
                self._connection = connection
                if self._abandoned:
                    connection.close()
        except Exception as error:  # whatever it is, it belongs to the thread that waits
            self._error = error
        finally:
            self.done.set()


@lru_cache(maxsize=64)
def _host_and_target(url: str) -> tuple[str, str]:
    """For the head of a request: host and port, and path with query."""
    parts = urlsplit(url)
    return parts.netloc, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _host(url: str) -> str:
    return _host_and_target(url)[0]


def _tls_context() -> ssl.SSLContext:
    # As requests does: certifi's certificates, or the file or folder that REQUESTS_CA_BUNDLE names. Verification is on.
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or certifi.where()
    if os.path.isdir(bundle):
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def _proxy_for(url: str) -> str:
    """The URL of the proxy that the environment names for ``url``, or "". None can reach this machine's own loopback."""
    if is_loopback(url):
        return ""
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or ""
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _proxy_headers(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if not parts.username:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode("ascii")}


def _read_body(answer: Answer, expected: Expected[Any]) -> np.ndarray:
    length = answer.length
    if expected.exact is not None and length is not None and length != expected.exact:
        raise MalformedAnswer(f"{length} bytes, and {expected.exact} belong to its shape and dtype")
    if length is not None and length > expected.limit:
        raise MalformedAnswer(f"{length} bytes, and at most {expected.limit} were expected")
    if length is None:
        return _read_unknown(answer, expected)
    return answer.body()


def _read_unknown(answer: Answer, expected: Expected[Any]) -> np.ndarray:
    """A body without a length (chunked, or until the end of the connection)."""
    data = bytearray()
    for piece in answer.pieces():
        data += piece
        if len(data) > expected.limit:
            raise MalformedAnswer(f"more than the {expected.limit} bytes that were expected")
    if expected.exact is not None and len(data) != expected.exact:
        raise MalformedAnswer(f"{len(data)} bytes, and {expected.exact} belong to its shape and dtype")
    return np.frombuffer(data, dtype=np.uint8)


def _read_error(answer: Answer) -> str:
    data = bytearray()
    with contextlib.suppress(OSError, http.client.HTTPException):
        for piece in answer.pieces():
            data += piece
            if len(data) >= ERROR_LIMIT:
                break
    return error_detail(data)


def _plain_reason(error: BaseException) -> str:
    """What went wrong, in the words of a person."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return "unknown host"
    if isinstance(error, TimeoutError):
        return "no connection in time"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    if isinstance(error, (ConnectionError, http.client.HTTPException)):
        return "connection lost"
    return str(error) or type(error).__name__
