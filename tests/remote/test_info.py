from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from remote_vae.errors import CallCancelled, DeadlineExceeded, EndpointUnreachable, RouteFailed
from remote_vae.remote.client import Deadlines, never
from remote_vae.remote.info import Infos, info_url
from remote_vae.server.models import LoadedVae
from remote_vae.wire import Info
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.remote.conftest import Clock

QUICK = Deadlines(connect=2.0, first_byte=5.0, total=20.0)


def ask(infos: Infos, chaos: Chaos, path: str = "/decode") -> Info:
    return infos.of(chaos.url + path, QUICK, never)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:7870/decode", "http://h:7870/info"),
        ("http://h/encode", "http://h/info"),
        ("http://h/some/where/decode/", "http://h/some/where/info"),
        ("http://h/decode?key=a", "http://h/info?key=a"),
        ("http://h", "http://h/info"),
        ("http://h/", "http://h/info"),
        ("https://h/vae/", "https://h/vae/info"),
        ("https://h/my-decode", "https://h/my-decode/info"),
    ],
)
def test_info_is_beside_the_call_or_below_the_endpoint(url: str, expected: str) -> None:
    assert info_url(url) == expected


def test_a_server_says_who_it_is(chaos: Chaos, loaded: LoadedVae) -> None:
    info = ask(Infos(), chaos)
    assert (info.family, info.model) == ("custom", "demo_vae")
    assert info.fingerprints == loaded.fingerprints


def test_it_is_asked_once_a_minute_for_both_kinds_of_calls(chaos: Chaos) -> None:
    clock = Clock()
    infos = Infos(clock)
    assert ask(infos, chaos) is ask(infos, chaos, "/encode")
    clock.now += 59
    ask(infos, chaos)
    assert chaos.infos == ["/info"]
    clock.now += 2
    ask(infos, chaos)
    assert chaos.infos == ["/info"] * 2
    assert not chaos.requests


def test_an_endpoint_that_failed_is_asked_anew(chaos: Chaos) -> None:
    infos = Infos()
    ask(infos, chaos)
    infos.forget(f"{chaos.url}/encode")
    ask(infos, chaos)
    assert len(chaos.infos) == 2


def test_the_token_goes_along(loaded: LoadedVae, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ServerThread(loaded, token="secret")
    try:
        infos = Infos()
        url = f"{server.url}/decode"
        assert infos.of(url, QUICK, never) == Info()
        monkeypatch.setenv("REMOTE_VAE_TOKEN", "secret")
        assert infos.of(url, QUICK, never).fingerprints == loaded.fingerprints
    finally:
        server.close()


@pytest.mark.parametrize(
    ("mode", "asked"), [("404 html", 1), ("200 html", 1), ("nan", 1), ("redirect", 1), ("short", 1), ("503", 2)]
)
def test_an_answer_that_says_nothing_is_remembered_unless_it_may_say_more_next_time(
    chaos: Chaos, mode: str, asked: int
) -> None:
    chaos.info = mode
    infos = Infos()
    assert ask(infos, chaos) == ask(infos, chaos) == Info()
    assert len(chaos.infos) == asked


@pytest.mark.parametrize(
    ("mode", "deadlines", "error"),
    [
        ("drop", QUICK, EndpointUnreachable),
        ("cut", QUICK, EndpointUnreachable),
        ("hang", Deadlines(2.0, 0.3, 20.0), DeadlineExceeded),
        ("slow", Deadlines(2.0, 5.0, 0.3), DeadlineExceeded),
    ],
)
def test_an_endpoint_that_does_not_answer_is_a_failed_route(
    chaos: Chaos, mode: str, deadlines: Deadlines, error: type[RouteFailed]
) -> None:
    chaos.info = mode
    infos = Infos()
    with pytest.raises(error):
        infos.of(f"{chaos.url}/decode", deadlines, never)
    chaos.info = "pass"
    assert ask(infos, chaos).model == "demo_vae"


def test_the_user_ends_the_wait(chaos: Chaos) -> None:
    chaos.info = "hang"
    pressed = threading.Event()
    threading.Timer(0.2, pressed.set).start()
    with pytest.raises(CallCancelled):
        Infos().of(f"{chaos.url}/decode", Deadlines(5.0, 20.0, 20.0), pressed.is_set)


class Flood:
    """A server that answers everything with one head, and then sends for as long as somebody takes it."""

    def __init__(self, head: bytes, piece: bytes) -> None:
        self.sent = 0
        flood = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while self.rfile.readline().strip():
                    pass
                try:
                    self.wfile.write(head)
                    while flood.sent < 1 << 30:
                        self.wfile.write(piece)
                        flood.sent += len(piece)
                except OSError:
                    flood.ended.set()

        self.ended = threading.Event()
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/decode"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def flood() -> Iterator[Callable[[bytes, bytes], Flood]]:
    with ExitStack() as stack:

        def make(head: bytes, piece: bytes) -> Flood:
            server = Flood(head, piece)
            stack.callback(server.close)
            return server

        yield make


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"Content-Length: 1073741824\r\n\r\n", b"x" * 65536),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
        (b"Connection: close\r\n\r\n", b'{"a": ' * 10000),
    ],
)
def test_a_gigabyte_is_not_taken_in_and_says_nothing(flood: Callable[[bytes, bytes], Flood], head: bytes, piece: bytes) -> None:
    server = flood(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + head, piece)
    assert Infos().of(server.url, QUICK, never) == Info()
    assert server.ended.wait(10)
    # What was under way in the buffers of the two sockets; a gigabyte is a hundred times that.
    assert server.sent < 16 << 20
