"""One POST with deadlines that hold and a wait that can be broken off.

urllib3 keeps the connections alive and does TLS. What it cannot do is done here: a read timeout counts anew for every packet, a
name lookup has none at all, and nothing can break a wait. So the exchange runs on a thread of its own; the caller watches the
clock and the user, and when either says stop it shuts the socket and walks away.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import certifi
import numpy as np
import requests.utils
import urllib3
import urllib3.connection
import urllib3.exceptions
from urllib3.util import Timeout

from remote_vae.auth import is_loopback
from remote_vae.errors import (
    CallCancelled,
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    MalformedAnswer,
    RouteFailed,
)
from remote_vae.wire import Expected, HttpRequest, error_detail
from remote_vae.wire.answers import ERROR_LIMIT

Answer = TypeVar("Answer")

# How often the user is asked for Interrupt. The promise is 0.2 s.
POLL_SECONDS = 0.05
# Pieces of a body: small enough to stay in the processor's cache, and to see an upload move.
_CHUNK = 256 * 1024
_IDLE_CONNECTIONS = 8


@dataclass(frozen=True)
class Deadlines:
    """Seconds: until connected, from the last sent piece to the first byte of the answer, and for the whole call."""

    connect: float
    first_byte: float
    total: float


@dataclass(frozen=True)
class Reply(Generic[Answer]):
    """A checked answer, with the bytes of the two bodies."""

    answer: Answer
    bytes_up: int
    bytes_down: int


class HttpClient:
    """Keep-alive connections to one origin. May be used from many threads."""

    def __init__(self, url: str) -> None:
        self._pool = _make_pool(url)

    def post(
        self,
        url: str,
        request: HttpRequest,
        headers: Mapping[str, str],
        expect: Callable[[Mapping[str, str]], Expected[Answer]],
        deadlines: Deadlines,
        cancelled: Callable[[], bool],
    ) -> Reply[Answer]:
        """Send ``request``; ``expect`` judges the headers of a 200 answer before its body is read.

        Raises:
            EndpointUnreachable, DeadlineExceeded, CallCancelled, EndpointError, MalformedAnswer: no answer, and why.
        """
        exchange = _Exchange(self._pool, url, request, {**request.headers, **headers}, expect, deadlines)
        exchange.start()
        exchange.watch(cancelled)
        expected, body = exchange.result()
        return Reply(expected.finish(body), memoryview(request.body).nbytes, body.nbytes)


class _Exchange(Generic[Answer]):
    """One request on its way: a thread does the work, the caller's thread runs ``watch`` and ``result``."""

    def __init__(
        self,
        pool: urllib3.PoolManager,
        url: str,
        request: HttpRequest,
        headers: dict[str, str],
        expect: Callable[[Mapping[str, str]], Expected[Answer]],
        deadlines: Deadlines,
    ) -> None:
        self._pool = pool
        self._url = request.url(url)
        self._host = urlsplit(url).netloc
        self._body = memoryview(request.body)
        self._headers = {**headers, "Accept-Encoding": "identity", "Content-Length": str(self._body.nbytes)}
        self._expect = expect
        self._deadlines = deadlines
        self._started = time.monotonic()
        self._sent: float | None = None  # when the last piece went out; None while connecting
        self._answering = False
        self._reused = False
        self._aborted = False
        self._connection: Any = None
        self._done = threading.Event()
        self._outcome: tuple[Expected[Answer], np.ndarray] | None = None
        self._error: Exception | None = None

    # --- the caller's thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        # A daemon: a name lookup that hangs must not keep the host from closing.
        threading.Thread(target=self._run, name="remote-vae-exchange", daemon=True).start()

    def watch(self, cancelled: Callable[[], bool]) -> None:
        """Return when the exchange has ended; end it when a deadline passes or the user wants it."""
        while not self._done.wait(min(POLL_SECONDS, max(0.0, self._next_deadline()[0] - time.monotonic()))):
            if cancelled():
                self._abort()
                raise CallCancelled(f"interrupted while waiting for {self._host}", reason="interrupted")
            deadline, what = self._next_deadline()
            if time.monotonic() >= deadline and not self._done.is_set():
                self._abort()
                raise DeadlineExceeded(f"{self._host}: {what}", reason=what)

    def result(self) -> tuple[Expected[Answer], np.ndarray]:
        if self._error is not None:
            raise self._error
        if self._outcome is None:
            raise EndpointUnreachable(f"{self._host}: the exchange ended without a result")
        return self._outcome

    def _next_deadline(self) -> tuple[float, str]:
        limits = self._deadlines
        total = self._started + limits.total, f"not done in {limits.total:g} s"
        sent = self._sent
        if self._answering:
            return total
        if sent is None:
            return min(total, (self._started + limits.connect, f"no connection in {limits.connect:g} s"))
        return min(total, (sent + limits.first_byte, f"no answer in {limits.first_byte:g} s"))

    def _abort(self) -> None:
        self._aborted = True
        sock = getattr(self._connection, "sock", None)
        if sock is not None:
            # Already closed by the other side is as good.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    # --- the exchange's own thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        _current.exchange = self
        try:
            self._outcome = self._talk()
        except RouteFailed as error:
            self._error = error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            self._error = _unreachable(self._host, error)
        except Exception as error:  # must reach the caller whatever it is, or the caller would wait for the deadline
            failure = EndpointUnreachable(f"{self._host}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._error = failure
        finally:
            _current.exchange = None
            self._connection = None
            self._done.set()

    def _talk(self) -> tuple[Expected[Answer], np.ndarray]:
        try:
            return self._attempt()
        except (urllib3.exceptions.ProtocolError, OSError):
            # The server may close an idle connection just as we take it up. Such a request was never seen, and asking twice
            # is harmless: a VAE call changes nothing.
            if self._aborted or not self._reused or self._answering:
                raise
            return self._attempt()

    def _attempt(self) -> tuple[Expected[Answer], np.ndarray]:
        self._sent, self._reused = None, True  # connecting() says otherwise
        limits = self._deadlines
        response = self._pool.urlopen(
            "POST",
            self._url,
            body=self._pieces(),
            headers=self._headers,
            timeout=Timeout(connect=limits.connect, read=limits.total),
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        self._answering = True
        complete = False
        try:
            headers = {key.lower(): value for key, value in response.headers.items()}
            if response.status != 200:
                raise EndpointError(response.status, _read_error(response), self._host)
            expected = self._expect(headers)
            body = _read_body(response, headers, expected)
            complete = True
            return expected, body
        finally:
            if complete:
                response.release_conn()
            else:
                response.close()

    def _pieces(self) -> Iterator[memoryview]:
        for start in range(0, self._body.nbytes, _CHUNK):
            if self._aborted:
                raise ConnectionAbortedError("given up by the caller")
            yield self._body[start : start + _CHUNK]
            self._sent = time.monotonic()

    def connecting(self) -> None:
        """The connection for this exchange has to be made first."""
        self._reused = False

    def using(self, connection: Any) -> None:
        """``connection`` is connected and about to carry this exchange."""
        self._connection = connection
        # urllib3 sends under the connect timeout; a slow upload is not a failure, and a stalled one ends by our deadlines.
        connection.sock.settimeout(self._deadlines.total)
        self._sent = time.monotonic()
        if self._aborted:
            raise ConnectionAbortedError("given up by the caller")


class _Current(threading.local):
    exchange: _Exchange[Any] | None = None


_current = _Current()


class _Watched:
    """Tells the exchange of this thread which connection carries it, so that it can be shut from outside."""

    def connect(self) -> None:
        exchange = _current.exchange
        if exchange is not None:
            exchange.connecting()
        super().connect()  # type: ignore[misc]  # mixed into urllib3's connections

    def putrequest(self, *args: Any, **kwargs: Any) -> None:
        exchange = _current.exchange
        if getattr(self, "sock", None) is None:
            self.connect()
        if exchange is not None:
            exchange.using(self)
        super().putrequest(*args, **kwargs)  # type: ignore[misc]


class _HTTPConnection(_Watched, urllib3.connection.HTTPConnection):
    pass


class _HTTPSConnection(_Watched, urllib3.connection.HTTPSConnection):
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


def _make_pool(url: str) -> urllib3.PoolManager:
    # Certificates and proxies as requests finds them: certifi or REQUESTS_CA_BUNDLE, and *_PROXY / NO_PROXY.
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or certifi.where()
    options: dict[str, Any] = {"maxsize": _IDLE_CONNECTIONS, "cert_reqs": "CERT_REQUIRED"}
    if os.path.isdir(bundle):
        options["ca_cert_dir"] = bundle
    else:
        options["ca_certs"] = bundle
    # A proxy cannot reach this machine's own loopback.
    found = {} if is_loopback(url) else requests.utils.get_environ_proxies(url)
    proxy = requests.utils.select_proxy(url, found)
    pool = urllib3.ProxyManager(_with_scheme(proxy), **options) if proxy else urllib3.PoolManager(**options)
    pool.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    return pool


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def _read_body(response: urllib3.response.BaseHTTPResponse, headers: Mapping[str, str], expected: Expected[Any]) -> np.ndarray:
    length = _content_length(headers)
    if expected.exact is not None and length is not None and length != expected.exact:
        raise MalformedAnswer(f"{length} bytes, and {expected.exact} belong to its shape and dtype")
    if length is not None and length > expected.limit:
        raise MalformedAnswer(f"{length} bytes, and at most {expected.limit} were expected")
    size = expected.exact if expected.exact is not None else length
    if size is None:
        return _read_unknown(response, expected.limit)
    buffer = np.empty(size, dtype=np.uint8)
    view = buffer.data
    filled = 0
    while filled < size:
        count = response.readinto(view[filled : filled + _CHUNK])
        if not count:
            raise MalformedAnswer(f"{filled} bytes came of {size}")
        filled += count
    if length is None and response.read(1):
        raise MalformedAnswer(f"more than the {size} bytes that belong to its shape and dtype")
    return buffer


def _read_unknown(response: urllib3.response.BaseHTTPResponse, limit: int) -> np.ndarray:
    data = bytearray()
    while piece := response.read(_CHUNK):
        data += piece
        if len(data) > limit:
            raise MalformedAnswer(f"more than {limit} bytes")
    return np.frombuffer(data, dtype=np.uint8)


def _read_error(response: urllib3.response.BaseHTTPResponse) -> str:
    try:
        return error_detail(response.read(ERROR_LIMIT) or b"")
    except (urllib3.exceptions.HTTPError, OSError):
        return "the connection broke before the message came"


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _unreachable(host: str, error: Exception) -> EndpointUnreachable:
    reason = _plain_reason(error)
    return EndpointUnreachable(f"{host}: {reason}", reason=reason)


def _plain_reason(error: BaseException) -> str:
    """The cause in the words of a person; urllib3 wraps it in up to three layers."""
    seen: list[BaseException] = []
    layer: BaseException | None = error
    while layer is not None and layer not in seen:
        seen.append(layer)
        inner = getattr(layer, "reason", None) or next((a for a in layer.args if isinstance(a, BaseException)), None)
        layer = inner if isinstance(inner, BaseException) else layer.__cause__ or layer.__context__
    for found in reversed(seen):
        if isinstance(found, ConnectionRefusedError):
            return "connection refused"
        if isinstance(found, socket.gaierror):
            return "unknown host"
        if isinstance(found, (ConnectionError, urllib3.exceptions.ProtocolError)):
            return "connection lost"
        if isinstance(found, (urllib3.exceptions.ConnectTimeoutError, TimeoutError)):
            return "no connection in time"
    for found in seen:
        if isinstance(found, urllib3.exceptions.SSLError) or "ssl" in type(found).__module__:
            return f"TLS failed: {found}"
    return f"{type(error).__name__}: {error}"
