"""Deadlines, interrupts and broken peers, over real sockets."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme
from urllib3 import connectionpool
from urllib3.util import is_connection_dropped

from remote_vae.errors import (
    CallCancelled,
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    MalformedAnswer,
    RouteFailed,
)
from remote_vae.remote import environment, transport, waiting
from remote_vae.remote.client import Deadlines, EndpointClient, Reply, client_for, never
from remote_vae.remote.transport import Urllib3Transport
from remote_vae.server.admission import Limits
from remote_vae.server.models import LoadedVae
from remote_vae.wire import DecodeAnswer, DecodeRequest, EncodeRequest, Output
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.remote.canned import BODY, HEAD, REQUEST

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
            own = Urllib3Transport()
            stack.callback(own.close)
            return EndpointClient(url, own)

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


@pytest.mark.parametrize("host", ["studio..local:7870", f"{'a' * 70}.local"])
def test_an_address_that_cannot_even_be_looked_up_is_an_endpoint_that_cannot_be_reached(
    request_: DecodeRequest, host: str
) -> None:
    with pytest.raises(EndpointUnreachable, match="the name of the host cannot be looked up"):
        client_for(f"http://{host}").decode(request_, QUICK)


def test_certificates_that_are_not_there_are_named(
    request_: DecodeRequest, monkeypatch: pytest.MonkeyPatch, fresh: Fresh
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with pytest.raises(
        EndpointUnreachable,
        match=r"certificates cannot be read: those that REQUESTS_CA_BUNDLE names: /nowhere/ca\.pem: No such file",
    ):
        fresh("https://certificates.invalid").decode(request_, QUICK)


# --- connections that are kept -------------------------------------------------------------------------------------------

ANSWER_HEAD = HEAD + b"Content-Length: 192\r\n\r\n"


def take_request(connection: socket.socket) -> bytes:
    """One request to its end; b"" where the client has left."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += connection.recv(65536)
    return head


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket, int], None], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that has ``serve`` talk to each connection, with its number, on a thread of its own."""
    closing = threading.Event()

    def talk(connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            serve(connection, number)
            closing.wait(20)
        connection.close()

    def accept() -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count():
                threading.Thread(target=talk, args=(listener.accept()[0], number), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"{'https' if context else 'http'}://localhost:{listener.getsockname()[1]}/decode"
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ssl.SSLContext:
    """The TLS of a server whose authority the user has named."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


def levels(reply: Reply[DecodeAnswer]) -> bytes:
    return reply.answer.tensor.numpy().tobytes()


@pytest.mark.parametrize("ending", ["end", "reset"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_kept_connection_that_has_died_is_made_anew(ending: str, secure: bool, trusted: ssl.SSLContext, fresh: Fresh) -> None:
    numbers = []

    def serve(connection: socket.socket, number: int) -> None:
        while take_request(connection):
            numbers.append(number)
            connection.sendall(ANSWER_HEAD + BODY)
            if number == 0:
                # It dies when the next request is already on its way.
                connection.recv(1)
                if ending == "reset":
                    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                else:
                    take_request(connection)
                connection.close()

    with listening(serve, trusted if secure else None) as url:
        endpoint = fresh(url)
        for _ in range(2):
            assert levels(endpoint.decode(REQUEST, QUICK)) == BODY
    assert numbers == [0, 1]


def test_a_server_that_dies_of_a_request_is_asked_again_and_not_for_ever(fresh: Fresh) -> None:
    requests = []

    def serve(connection: socket.socket, number: int) -> None:
        while take_request(connection):
            requests.append(number)
            if len(requests) > 1:
                connection.close()
                return
            connection.sendall(ANSWER_HEAD + BODY)

    with listening(serve) as url:
        endpoint = fresh(url)
        endpoint.decode(REQUEST, QUICK)
        with pytest.raises(EndpointUnreachable, match="connection lost"):
            endpoint.decode(REQUEST, QUICK)
    # Over the kept connection, over a new one as that may have been closed before, and once more as the server died.
    assert requests == [0, 0, 1, 2]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_stray_late_answer_is_not_the_answer_to_the_next_request(secure: bool, trusted: ssl.SSLContext, fresh: Fresh) -> None:
    stray_sent = threading.Event()

    def serve(connection: socket.socket, number: int) -> None:
        while take_request(connection):
            connection.sendall(ANSWER_HEAD + (BODY if number == 0 else BODY[::-1]))
            if number == 0:
                time.sleep(0.1)
                connection.sendall(ANSWER_HEAD + bytes(192))
                stray_sent.set()

    with listening(serve, trusted if secure else None) as url:
        endpoint = fresh(url)
        assert levels(endpoint.decode(REQUEST, QUICK)) == BODY
        assert stray_sent.wait(5)
        assert levels(endpoint.decode(REQUEST, QUICK)) == BODY[::-1]


@pytest.mark.parametrize("status", [b"200 OK", b"408 Timeout"])
def test_a_stray_answer_that_comes_while_the_next_request_is_sent_is_none(status: bytes, fresh: Fresh) -> None:
    # More than the buffers of a loopback connection take in.
    large = DecodeRequest(torch.zeros(64, 65536, 1, 1), Output.UINT8)
    body = BODY * 64

    def serve(connection: socket.socket, number: int) -> None:
        take_request(connection)
        if number == 1:
            connection.sendall(HEAD.replace(b"[1,", b"[64,") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            return
        connection.sendall(ANSWER_HEAD + BODY)
        connection.recv(1)
        connection.sendall(ANSWER_HEAD.replace(b"200 OK", status) + BODY)

    with listening(serve) as url:
        endpoint = fresh(url)
        assert levels(endpoint.decode(REQUEST, QUICK)) == BODY
        assert levels(endpoint.decode(large, QUICK)) == body


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_refusal_is_seen_while_the_request_is_still_being_sent(secure: bool, trusted: ssl.SSLContext, fresh: Fresh) -> None:
    """A server that has read the head, refuses, and neither reads on nor hangs up."""

    def serve(connection: socket.socket, _: int) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too large\r\nContent-Length: 4\r\n\r\nsize")

    with listening(serve, trusted if secure else None) as url, pytest.raises(EndpointError, match="413: size"):
        fresh(url).encode(EncodeRequest(torch.zeros(1, 3, 2048, 2048)), Deadlines(2.0, 10.0, 20.0))


def test_an_answer_to_a_request_that_was_not_through_is_not_believed(fresh: Fresh) -> None:
    def serve(connection: socket.socket, _: int) -> None:
        connection.sendall(ANSWER_HEAD + BODY)

    big = replace(REQUEST, latents=torch.zeros(1, 4, 2048, 2048))
    with listening(serve) as url, pytest.raises(MalformedAnswer, match="before the whole request was sent"):
        fresh(url).decode(big, QUICK)


def test_the_text_of_an_error_that_never_comes_is_not_waited_for(fresh: Fresh) -> None:
    def serve(connection: socket.socket, _: int) -> None:
        take_request(connection)
        connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\nno")

    with listening(serve) as url, pytest.raises(EndpointError, match="503: no message"):
        fresh(url).decode(REQUEST, Deadlines(2.0, 30.0, 60.0))


def closed_by_client(idle: float, monkeypatch: pytest.MonkeyPatch, fresh: Fresh, *, server_closes: bool) -> bool:
    """Whether the client hangs up by itself after a call."""
    monkeypatch.setattr(transport, "SWEEP_SECONDS", 0.05)
    monkeypatch.setattr(transport, "IDLE_SECONDS", idle)
    hung_up = threading.Event()

    def serve(connection: socket.socket, _: int) -> None:
        take_request(connection)
        connection.sendall(ANSWER_HEAD + BODY)
        if server_closes:
            connection.shutdown(socket.SHUT_WR)
        if not connection.recv(1):
            hung_up.set()

    with listening(serve) as url:
        fresh(url).decode(REQUEST, QUICK)
        return hung_up.wait(2.0)


def test_idle_connections_go(monkeypatch: pytest.MonkeyPatch, fresh: Fresh) -> None:
    # One that the server has closed would stay in CLOSE_WAIT.
    assert closed_by_client(100.0, monkeypatch, fresh, server_closes=True)
    assert closed_by_client(0.1, monkeypatch, fresh, server_closes=False)
    assert not closed_by_client(100.0, monkeypatch, fresh, server_closes=False)


def test_a_connection_that_is_being_taken_up_is_not_closed_as_an_idle_one(
    monkeypatch: pytest.MonkeyPatch, fresh: Fresh
) -> None:
    numbers = []

    def serve(connection: socket.socket, number: int) -> None:
        while take_request(connection):
            numbers.append(number)
            connection.sendall(ANSWER_HEAD + BODY)

    def while_it_is_swept(connection: Any) -> bool:
        monkeypatch.setattr(transport, "SWEEP_SECONDS", 0.0)
        monkeypatch.setattr(transport, "IDLE_SECONDS", 0.0)
        sweeper = threading.Thread(target=transport._idle._sweep, daemon=True)
        sweeper.start()
        sweeper.join(0.2)
        return is_connection_dropped(connection)

    with listening(serve) as url:
        endpoint = fresh(url)
        endpoint.decode(REQUEST, QUICK)
        monkeypatch.setattr(connectionpool, "is_connection_dropped", while_it_is_swept)
        endpoint.decode(REQUEST, QUICK)
    assert numbers == [0, 0]


def test_threads_carry_one_request_after_the_other_and_end_when_there_are_none(
    chaos: Chaos, request_: DecodeRequest, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())

    def carriers() -> int:
        return sum(thread.name == "remote-vae-call" for thread in set(threading.enumerate()) - before)

    monkeypatch.setattr(waiting, "_workers", waiting._Workers())
    monkeypatch.setattr(waiting, "_WORKER_SECONDS", 0.5)
    client = fresh(f"{chaos.url}/decode")
    for _ in range(5):
        client.decode(request_)
    # The one before may not be back yet.
    assert 1 <= carriers() <= 2
    limit = time.monotonic() + 10
    while carriers():
        assert time.monotonic() < limit
        time.sleep(0.05)
    client.decode(request_)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_process_has_threads_of_its_own(chaos: Chaos, request_: DecodeRequest) -> None:
    client_for(f"{chaos.url}/decode").decode(request_)
    child = os.fork()
    if not child:
        # Torch's own threads do not outlive a fork: no VAE is run here, the answer is only carried.
        try:
            client_for(f"{chaos.url}/info").info(QUICK)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_file_descriptors_beyond_a_thousand_are_as_good_as_others(chaos: Chaos, request_: DecodeRequest, fresh: Fresh) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in (-1, resource.RLIM_INFINITY) and hard < 2048:
        pytest.skip("this machine opens fewer files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                stack.enter_context(open(os.devnull, "rb"))
            endpoint = fresh(f"{chaos.url}/decode")
            for _ in range(2):
                assert endpoint.decode(request_, QUICK).bytes_down == 64 * 96 * 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- a server that takes long --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("health", "patience", "answered"),
    [("working", 0.0, True), ("404 html", 10.0, True), ("404 html", 0.0, False), ("pass", 10.0, False), ("hang", 10.0, False)],
    ids=["it says that it works", "it says nothing", "nothing, and time is up", "it has nothing to do", "it hangs"],
)
def test_a_server_that_works_is_waited_for(
    chaos: Chaos, request_: DecodeRequest, health: str, patience: float, answered: bool
) -> None:
    chaos.reset("late" if answered else "hang")
    chaos.info = health
    deadlines = Deadlines(5.0, 0.2, 10.0, patience)
    if answered:
        assert client(chaos).decode(request_, deadlines).bytes_down > 0
    else:
        with pytest.raises(DeadlineExceeded, match=r"no answer in 0\.2 s"):
            client(chaos).decode(request_, deadlines)
    assert chaos.infos == ["/health"]


def test_an_answer_that_comes_while_the_server_is_asked_whether_it_works_is_taken(fresh: Fresh) -> None:
    asked = threading.Event()

    def serve(connection: socket.socket, _: int) -> None:
        if take_request(connection).startswith(b"GET /health"):
            asked.set()
        else:
            asked.wait(5)
            connection.sendall(ANSWER_HEAD + BODY)

    with listening(serve) as url:
        assert levels(fresh(url).decode(REQUEST, Deadlines(5.0, 0.2, 10.0))) == BODY
    assert asked.is_set()


def test_the_user_ends_the_wait_for_a_server_that_says_it_works(chaos: Chaos, request_: DecodeRequest) -> None:
    chaos.reset("hang")
    chaos.info = "working"
    with pytest.raises(CallCancelled):
        client(chaos).decode(request_, Deadlines(5.0, 0.1, 20.0), lambda: bool(chaos.infos))


def test_the_user_ends_the_wait_for_a_connection(full_backlog: str, request_: DecodeRequest) -> None:
    with pytest.raises(CallCancelled):
        client_for(full_backlog).decode(
            request_, Deadlines(20.0, 20.0, 20.0), itertools.chain([False], itertools.repeat(True)).__next__
        )


# --- proxies -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def through(proxy: str) -> None:
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("https_proxy", proxy)
        monkeypatch.setenv("no_proxy", "")

    return through


def test_https_goes_through_the_tunnel_of_a_proxy(
    trusted: ssl.SSLContext, proxied: Callable[[str], None], fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "is_loopback", lambda url: False)
    asked = []

    def proxy(connection: socket.socket, _: int) -> None:
        asked.append(take_request(connection).decode())
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        inner = trusted.wrap_socket(connection, server_side=True)
        with inner:
            while take_request(inner):
                inner.sendall(ANSWER_HEAD + BODY)

    with listening(proxy) as url:
        proxied(url.replace("//", "//me:pass@").removesuffix("/decode"))
        endpoint = fresh("https://localhost:1/decode")
        for _ in range(2):
            assert levels(endpoint.decode(REQUEST, QUICK)) == BODY
    assert len(asked) == 1
    assert asked[0].startswith("CONNECT localhost:1 ")
    assert "basic bWU6cGFzcw==" in asked[0].replace("Basic", "basic")


def test_a_proxy_that_does_not_answer_is_named_without_its_password_and_no_proxy_proposed(
    proxied: Callable[[str], None], fresh: Fresh
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    proxied(f"http://me:secret@127.0.0.1:{port}")
    for scheme in ("http", "https"):
        with pytest.raises(EndpointUnreachable) as caught:
            fresh(f"{scheme}://studio.lan:7870/decode").decode(REQUEST, QUICK)
        assert caught.value.reason == "by a proxy: connection refused"
        assert f"the proxy http://127.0.0.1:{port}: if studio.lan needs none, add it to the variable no_proxy" in str(
            caught.value
        )
        assert "secret" not in str(caught.value)


def test_what_a_proxy_refuses_is_said_to_be_the_proxys(chaos: Chaos, proxied: Callable[[str], None], fresh: Fresh) -> None:
    chaos.reset("503")
    proxied(chaos.url)
    with pytest.raises(EndpointError, match=r"no replica is ready; it came through the proxy http://127.* no_proxy"):
        fresh("http://studio.lan:7870/decode").decode(REQUEST, QUICK)


@pytest.mark.parametrize("proxy", ["::garbage::", "http://a..b:1", "http://[::1:7", "ftp://host:1", "http://host:99999"])
def test_garbage_for_a_proxy_is_said_to_be_that(proxy: str, proxied: Callable[[str], None], fresh: Fresh) -> None:
    proxied(proxy)
    with pytest.raises(EndpointUnreachable, match=r"proxy"):
        fresh("http://studio.lan:7870/decode").decode(REQUEST, QUICK)


def test_socks_without_its_package_is_a_clear_no(
    proxied: Callable[[str], None], fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socks", None)
    monkeypatch.delitem(sys.modules, "urllib3.contrib.socks", raising=False)
    proxied("socks5://127.0.0.1:1080")
    with pytest.raises(EndpointUnreachable, match="pip install pysocks"):
        fresh("http://studio.lan:7870/decode").decode(REQUEST, QUICK)


# --- secrets -------------------------------------------------------------------------------------------------------------


def test_a_key_in_a_query_is_sent_and_reaches_no_log(
    chaos: Chaos, request_: DecodeRequest, fresh: Fresh, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        fresh(f"{chaos.url}/decode?key=secret").decode(request_, QUICK)
    assert "key=secret" in chaos.queries[0]
    assert "shape=1" in chaos.queries[0]
    assert "secret" not in caplog.text


def test_a_user_name_is_not_in_the_host_header(chaos: Chaos, request_: DecodeRequest, fresh: Fresh) -> None:
    hosts: list[tuple[str, str]] = []
    original = chaos._answer

    def noting(handler: Any) -> None:
        hosts.append((handler.headers["Host"], handler.headers["Authorization"]))
        original(handler)

    chaos._answer = noting  # type: ignore[method-assign]
    fresh(f"{chaos.url.replace('//', '//me:pass@')}/decode").decode(request_, QUICK)
    assert hosts == [(chaos.url.removeprefix("http://"), "Basic bWU6cGFzcw==")]
