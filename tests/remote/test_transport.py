"""Deadlines, interrupts and broken peers, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme

from remote_vae.errors import (
    CallCancelled,
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    MalformedAnswer,
    RouteFailed,
)
from remote_vae.remote.client import Deadlines, EndpointClient, client_for, never
from remote_vae.remote.transport import Urllib3Transport
from remote_vae.server.engine import Limits
from remote_vae.server.models import LoadedVae
from remote_vae.wire import DecodeRequest, EncodeRequest, Output
from tests.chaos import Chaos
from tests.conftest import ServerThread

Fresh = Callable[[str], EndpointClient]
QUICK = Deadlines(connect=2.0, first_byte=5.0, total=20.0)


@pytest.fixture
def request_(latents: torch.Tensor) -> DecodeRequest:
    return DecodeRequest(latents, Output.UINT8)


@pytest.fixture
def fresh() -> Iterator[Fresh]:
    """Makes clients with connections, proxies and certificates of their own, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(url: str) -> EndpointClient:
            transport = Urllib3Transport()
            stack.callback(transport.close)
            return EndpointClient(url, transport)

        yield make


def client(chaos: Chaos) -> EndpointClient:
    return client_for(f"{chaos.url}/decode")


def test_an_answer_comes_with_the_bytes_of_both_bodies(chaos: Chaos, request_: DecodeRequest) -> None:
    reply = client(chaos).decode(request_, QUICK)
    assert reply.bytes_up == 4 * 8 * 12 * 4
    assert reply.bytes_down == 64 * 96 * 3
    assert reply.answer.tensor.shape == (1, 64, 96, 3)


@pytest.mark.parametrize(
    ("mode", "error", "reason"),
    [
        ("503", EndpointError, "503"),
        ("404 html", EndpointError, "404"),
        ("redirect", EndpointError, "302"),
        ("200 html", MalformedAnswer, "content type text/html"),
        ("drop", EndpointUnreachable, "connection lost"),
        ("cut", EndpointUnreachable, "connection lost"),
        ("short", MalformedAnswer, "bytes"),
    ],
)
def test_a_broken_peer_is_a_failed_route_with_its_reason(
    chaos: Chaos, request_: DecodeRequest, mode: str, error: type[RouteFailed], reason: str
) -> None:
    chaos.reset(mode)
    with pytest.raises(error) as caught:
        client(chaos).decode(request_, QUICK)
    assert reason in caught.value.reason


def test_nan_in_a_raw_answer_is_a_failed_route(chaos: Chaos, request_: DecodeRequest) -> None:
    chaos.reset("nan")
    with pytest.raises(MalformedAnswer, match="nan"):
        client(chaos).decode(replace(request_, output=Output.TENSOR), QUICK)


def test_the_servers_own_words_reach_the_user(chaos: Chaos, request_: DecodeRequest) -> None:
    chaos.reset("503")
    with pytest.raises(EndpointError, match="no replica is ready"):
        client(chaos).decode(request_, QUICK)


def test_nobody_listening_is_refused_at_once(request_: DecodeRequest) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointUnreachable) as caught:
        client_for(f"http://127.0.0.1:{port}/").decode(request_, QUICK)
    assert caught.value.reason == "connection refused"


def test_a_host_without_an_address_is_unknown(request_: DecodeRequest) -> None:
    with pytest.raises(RouteFailed) as caught:
        client_for("http://nowhere.invalid/").decode(request_, QUICK)
    assert "unknown host" in caught.value.reason or "no connection" in caught.value.reason


def test_a_peer_without_tls_is_told_apart(chaos: Chaos, request_: DecodeRequest) -> None:
    with pytest.raises(EndpointUnreachable, match="TLS failed"):
        client_for(chaos.url.replace("http:", "https:")).decode(request_, QUICK)


@pytest.mark.parametrize(
    ("mode", "deadlines", "reason"),
    [
        ("hang", Deadlines(5.0, 0.3, 5.0), "no answer in 0.3 s"),
        ("hang", Deadlines(5.0, 5.0, 0.3), "not done in 0.3 s"),
        ("slow", Deadlines(5.0, 5.0, 0.6), "not done in 0.6 s"),
    ],
)
def test_a_deadline_ends_the_wait(chaos: Chaos, request_: DecodeRequest, mode: str, deadlines: Deadlines, reason: str) -> None:
    chaos.reset(mode)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        client(chaos).decode(request_, deadlines)
    assert caught.value.reason == reason
    # Far from any other deadline: what is tested is which one ended it, not how fast this machine is.
    assert time.monotonic() - started < 3.0


@pytest.fixture
def full_backlog() -> Iterator[str]:
    """A port that takes no connection and refuses none: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        time.sleep(0.1)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for filler in fillers:
            filler.close()


def test_the_connect_deadline_ends_a_connection_that_never_stands(full_backlog: str, request_: DecodeRequest) -> None:
    with pytest.raises(RouteFailed) as caught:
        client_for(full_backlog).decode(request_, Deadlines(0.3, 5.0, 10.0))
    assert caught.value.reason in ("no connection in 0.3 s", "no connection in time")


def test_an_upload_that_stalls_ends_by_the_first_byte_deadline(chaos: Chaos) -> None:
    # More than the buffers of a loopback connection take in from a peer that does not read.
    chaos.reset("hang")
    request = EncodeRequest(torch.zeros(1, 3, 2048, 2048))
    with pytest.raises(DeadlineExceeded) as caught:
        client(chaos).encode(request, Deadlines(5.0, 0.5, 30.0))
    assert caught.value.reason == "no answer in 0.5 s"


@pytest.mark.parametrize("mode", ["hang", "slow"])
def test_the_user_ends_the_wait(chaos: Chaos, request_: DecodeRequest, mode: str) -> None:
    chaos.reset(mode)
    pressed = threading.Event()
    threading.Timer(0.3, pressed.set).start()
    with pytest.raises(CallCancelled) as caught:
        client(chaos).decode(request_, Deadlines(5.0, 20.0, 20.0), pressed.is_set)
    assert caught.value.reason == "interrupted"


def test_a_wait_that_was_ended_gives_the_server_its_connection_back(request_: DecodeRequest) -> None:
    closed = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            while connection.recv(65536):
                pass
            closed.set()

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(DeadlineExceeded):
            client_for(url).decode(request_, Deadlines(5.0, 0.2, 5.0))
        assert closed.wait(2.0)


def test_a_connection_that_the_server_closed_meanwhile_is_made_anew(
    request_: DecodeRequest, server: ServerThread, fresh: Fresh
) -> None:
    """The race between an idle connection's end and the next request on it."""
    accepted: list[socket.socket] = []
    target = int(server.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                accepted.append(near)
                far = socket.create_connection(("127.0.0.1", target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()

        def pump(source: socket.socket, sink: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    if len(accepted) == 1 and source is accepted[0] and served.is_set():
                        # The second request arrives on the first connection: reset it unread.
                        source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        source.close()
                        return
                    sink.sendall(data)
            except OSError:
                return

        served = threading.Event()
        threading.Thread(target=relay, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/decode"
        endpoint = fresh(url)
        first = endpoint.decode(request_, QUICK)
        served.set()
        second = endpoint.decode(request_, QUICK)
    assert len(accepted) == 2
    assert torch.equal(first.answer.tensor, second.answer.tensor)


def test_connections_are_kept_alive_between_calls(request_: DecodeRequest, chaos: Chaos) -> None:
    endpoint = client(chaos)
    peers = set()
    original = chaos._answer

    def noting(handler: object) -> None:
        peers.add(handler.client_address)  # type: ignore[attr-defined]
        original(handler)  # type: ignore[arg-type]

    chaos._answer = noting  # type: ignore[method-assign,assignment]
    for _ in range(3):
        endpoint.decode(request_, QUICK)
    assert len(peers) == 1


def test_many_threads_share_one_client(chaos: Chaos, request_: DecodeRequest) -> None:
    endpoint = client(chaos)
    results: list[torch.Tensor] = []

    def work() -> None:
        results.append(endpoint.decode(request_, QUICK, never).answer.tensor)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_proxy_stands_between_this_machine_and_itself(
    monkeypatch: pytest.MonkeyPatch, chaos: Chaos, request_: DecodeRequest
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert client(chaos).decode(request_, QUICK).bytes_down > 0


def test_a_refusal_that_comes_before_the_body_is_through_is_understood(loaded: LoadedVae) -> None:
    """A server that refuses by the head hangs up while megabytes are still on their way."""
    server = ServerThread(loaded, limits=Limits(max_pixels=4096))
    try:
        with pytest.raises(EndpointError, match="at most 4096") as caught:
            client_for(f"{server.url}/encode").encode(EncodeRequest(torch.zeros(1, 3, 1024, 1024)), QUICK)
        assert caught.value.status == 400
    finally:
        server.close()


@pytest.fixture
def tls() -> Iterator[tuple[str, trustme.CA]]:
    """A TLS endpoint on loopback with a certificate of an authority of its own; its answer is stripes."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    body = bytes(range(256)) * 72
    head = f"Content-Type: tensor/binary\r\nshape: [1, 64, 96, 3]\r\ndtype: uint8\r\nContent-Length: {len(body)}"

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                length = 0
                while line := self.rfile.readline().strip():
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                self.rfile.read(length)
                self.wfile.write(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def get_request(self) -> tuple[socket.socket, object]:
            connection, address = super().get_request()
            return context.wrap_socket(connection, server_side=True), address

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_address[1]}/", authority
        server.shutdown()


def test_tls_works_with_an_authority_that_the_user_names(
    tls: tuple[str, trustme.CA], request_: DecodeRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: Fresh
) -> None:
    url, authority = tls
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    endpoint = fresh(url)
    for _ in range(2):
        assert endpoint.decode(request_, QUICK).bytes_down == 64 * 96 * 3


def test_a_certificate_of_an_unknown_authority_is_not_accepted(
    tls: tuple[str, trustme.CA], request_: DecodeRequest, fresh: Fresh
) -> None:
    why = r"TLS failed: certificate not accepted: unable to get local issuer certificate; .* REQUESTS_CA_BUNDLE"
    with pytest.raises(EndpointUnreachable, match=why):
        fresh(tls[0]).decode(request_, QUICK)


def test_a_certificate_for_another_name_is_not_accepted(
    tls: tuple[str, trustme.CA], request_: DecodeRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: Fresh
) -> None:
    url, authority = tls
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    other = url.replace("localhost", "127.0.0.1")
    with pytest.raises(EndpointUnreachable, match="TLS failed"):
        fresh(other).decode(request_, QUICK)


def test_a_proxy_of_the_environment_is_asked_for_the_whole_address(
    chaos: Chaos, request_: DecodeRequest, monkeypatch: pytest.MonkeyPatch, fresh: Fresh
) -> None:
    monkeypatch.setenv("http_proxy", chaos.url.replace("http://", "http://me:pass@"))
    monkeypatch.setenv("no_proxy", "")
    seen: list[tuple[str, str]] = []
    original = chaos._answer

    def noting(handler: Any) -> None:
        seen.append((handler.path.partition("?")[0], handler.headers["Proxy-Authorization"]))
        original(handler)

    chaos._answer = noting  # type: ignore[method-assign]
    url = "http://studio.invalid/decode"
    assert fresh(url).decode(request_, QUICK).bytes_down == 64 * 96 * 3
    assert seen == [(url, "Basic bWU6cGFzcw==")]
