"""Connections: none waits for ever, none keeps another out, and what is no HTTP is answered in JSON."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from remote_vae.errors import SettingsError
from remote_vae.server.models import LoadedVae
from remote_vae.server.protocol import BoundedProtocol
from remote_vae.server.run import listen
from tests.conftest import ServerThread
from tests.server.asking import TIMEOUT, Raw, wait_until

INFO = b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def serving(loaded: LoadedVae) -> Iterator[Callable[..., ServerThread]]:
    """Makes servers with bounds of their connections."""
    running: list[ServerThread] = []

    def make(**bounds: Any) -> ServerThread:
        running.append(ServerThread(loaded, protocol=type("Bounded", (BoundedProtocol,), bounds)))
        return running[-1]

    yield make
    for each in running:
        each.close()


def test_an_answer_leaves_at_once(serving: Callable[..., ServerThread]) -> None:
    """With Nagle's delay on the sockets that are accepted, small answers wait for 40 ms."""
    delays = []

    def connection_made(self: BoundedProtocol, transport: asyncio.Transport) -> None:
        delays.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        BoundedProtocol.connection_made(self, transport)

    requests.get(f"{serving(connection_made=connection_made).url}/info", timeout=TIMEOUT)
    assert delays
    assert all(delays)


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 2\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_a_400_in_json(server: ServerThread, text: bytes) -> None:
    with Raw(server) as connection:
        status, headers, answer = connection.send(text).answer()
        assert (status, headers["content-type"]) == (400, "application/json")
        assert "Invalid HTTP" in json.loads(answer)["error"]
        assert connection.is_closed()


def test_a_head_without_an_end_is_cut_off(server: ServerThread) -> None:
    with Raw(server) as connection:
        status, _, answer = connection.send(b"GET / HTTP/1.1\r\nX: " + b"x" * 60_000).answer()
        assert status == 400
        assert json.loads(answer)["error"]


def test_a_silent_connection_is_closed_without_a_word(serving: Callable[..., ServerThread]) -> None:
    with Raw(serving(head_seconds=0.2)) as connection:
        assert connection.is_closed()


def test_a_head_that_drips_is_a_408(serving: Callable[..., ServerThread]) -> None:
    with Raw(serving(head_seconds=0.2)) as connection:
        status, headers, answer = connection.send(b"GET /info HTTP/1.1\r\nX-A: ").answer()
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(answer)["error"]


def test_a_connection_is_kept_open_for_the_next_call(serving: Callable[..., ServerThread]) -> None:
    """The deadline of the head begins with its first byte."""
    server = serving(head_seconds=0.2)
    with Raw(server) as kept:
        assert kept.send(INFO).answer()[0] == 200
        with Raw(server) as silent:
            assert silent.is_closed()
        assert kept.send(INFO).answer()[0] == 200
        # And it begins: half a head is not waited for.
        assert kept.send(INFO[:20]).answer()[0] == 408


def test_who_waits_for_nothing_makes_room_for_who_asks(serving: Callable[..., ServerThread]) -> None:
    server = serving(max_connections=3)
    silent = [Raw(server) for _ in range(3)]
    with Raw(server) as asking:
        assert asking.send(INFO).answer()[0] == 200
        assert silent[0].is_closed()
        assert asking.send(INFO).answer()[0] == 200
    for each in silent:
        each.socket.close()


def test_connections_that_are_at_work_are_not_closed_for_another(serving: Callable[..., ServerThread]) -> None:
    server = serving(max_connections=2)
    uploads = [Raw(server).post("/decode", (1, 4, 8, 8), 1024, 0, "Expect: 100-continue\r\n") for _ in range(2)]
    for each in uploads:
        # So its head has been read.
        assert each.socket.recv(100).startswith(b"HTTP/1.1 100 ")
    with Raw(server) as another:
        status, _, answer = another.send(INFO).answer()
        assert status == 503
        assert "connections" in json.loads(answer)["error"]
    for each in uploads:
        assert each.send(bytes(1024)).answer()[0] == 200
        each.socket.close()


def test_an_answer_that_nobody_reads_ends_with_its_connection(serving: Callable[..., ServerThread]) -> None:
    lost = []

    def connection_made(self: BoundedProtocol, transport: asyncio.Transport) -> None:
        # As if the answer were as large as no kernel holds for a connection.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        BoundedProtocol.connection_made(self, transport)

    def connection_lost(self: BoundedProtocol, exc: Exception | None) -> None:
        lost.append(self)
        BoundedProtocol.connection_lost(self, exc)

    server = serving(stall_seconds=0.2, connection_made=connection_made, connection_lost=connection_lost)
    with Raw(server, receive_bytes=4096) as connection:
        connection.post("/decode", (1, 4, 32, 32), 16_384)
        wait_until(lambda: bool(lost))
    with Raw(server) as reader:
        assert len(reader.post("/decode", (1, 4, 32, 32), 16_384).answer()[2]) == 3 * 256 * 256 * 4


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 99999), ("127.0.0.1", -1), ("no.such.host.invalid", 0), ("256.1.1.1", 0)]
)
def test_an_address_that_cannot_be_listened_on_is_one_line(host: str, port: int) -> None:
    with pytest.raises(SettingsError, match="cannot listen"):
        listen(host, port)


def test_a_port_that_is_taken_is_one_line(server: ServerThread) -> None:
    with pytest.raises(SettingsError, match="in use"):
        listen("127.0.0.1", server.port)
