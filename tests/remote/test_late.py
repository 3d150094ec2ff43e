"""Answers that begin before they are made: what a client makes of the bytes, and how long it waits."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from remote_vae.errors import CallCancelled, DeadlineExceeded, EndpointError, EndpointUnreachable, MalformedAnswer, RouteFailed
from remote_vae.remote.client import Deadlines, EndpointClient, Reply, client_for, never
from remote_vae.remote.waiting import Cancelled
from remote_vae.wire import DecodeAnswer
from remote_vae.wire.extras import Extras
from tests.remote.canned import BODY, REQUEST, Canned

ASKED = replace(REQUEST, extras=Extras(late=True))
LATE = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.remote-vae.late\r\n"
GOOD = {"Content-Type": "tensor/binary", "shape": "[1, 8, 8, 3]", "dtype": "uint8"}


def line(status: int = 200, headers: dict[str, str] | None = None, length: int = 192) -> bytes:
    return (
        b"\n"
        + json.dumps({"status": status, "headers": GOOD if headers is None else headers, "length": length}).encode()
        + b"\n"
    )


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return LATE + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + end


def ask(answer: bytes) -> tuple[Reply[DecodeAnswer], Canned]:
    transport = Canned(answer)
    return EndpointClient("http://studio:7870/decode", transport).decode(ASKED), transport


def failure(answer: bytes) -> RouteFailed:
    try:
        ask(answer)
    except RouteFailed as error:
        return error
    raise AssertionError("the answer was taken")


@pytest.mark.parametrize(
    "answer",
    [
        chunked(b".", b".", b".", line(), BODY),
        chunked(line(), BODY),
        chunked(b"..." + line() + BODY),
        chunked(*(bytes([value]) for value in b".." + line() + BODY)),
        LATE + b"\r\n." + line() + BODY,
        LATE + b"Content-Length: %d\r\n\r\n." % (1 + len(line()) + 192) + line() + BODY,
    ],
    ids=["dots", "no dot", "one chunk", "a byte a chunk", "until the end", "with a length"],
)
def test_a_late_answer_is_the_answer(answer: bytes) -> None:
    reply, transport = ask(answer)
    assert reply.answer.tensor.numpy().tobytes() == BODY
    assert reply.bytes_down == 192
    assert transport.sent[0].headers["X-Remote-VAE-Accept"] == "late"
    assert transport.kept == [b"\r\n\r\n." + line() not in answer or b"Content-Length" in answer]


def test_every_late_answer_that_is_cut_off_is_refused() -> None:
    whole = chunked(b".", b".", line(), BODY)
    for length in range(len(LATE), len(whole) - 5):
        assert isinstance(failure(whole[:length]), EndpointUnreachable), whole[:length]


@pytest.mark.parametrize(
    "answer",
    [
        chunked(b"x"),
        chunked(b"..x" + line() + BODY),
        chunked(b".\nnonsense\n", BODY),
        chunked(b".\n" + b"x" * 100_000),
        chunked(b"." * 70_000),
        chunked(b".", line(length=193), BODY + b"x"),
        chunked(b".", line(length=191), BODY[:-1]),
        chunked(b".", line(), BODY + b"x"),
        chunked(b".", line(length=1 << 39), BODY),
        chunked(b".", line(headers={}), BODY),
        chunked(b".", line(headers={**GOOD, "Content-Type": "text/html"}), BODY),
        chunked(b".", line(headers={**GOOD, "Content-Type": "application/vnd.remote-vae.late"}), b"." + line() + BODY),
    ],
)
def test_a_late_answer_of_something_else_is_refused(answer: bytes) -> None:
    assert isinstance(failure(answer), MalformedAnswer)


def test_who_has_not_asked_for_a_late_answer_does_not_take_one() -> None:
    with pytest.raises(MalformedAnswer, match="content type"):
        EndpointClient("http://studio:7870/decode", Canned(chunked(b".", line(), BODY))).decode(REQUEST)


def test_an_error_that_comes_late_is_that_error() -> None:
    body = b'{"error": "the VAE has no memory left"}'
    error = failure(chunked(b".", line(507, {"Content-Type": "application/json"}, len(body)), body))
    assert isinstance(error, EndpointError)
    assert (error.status, error.detail) == (507, "the VAE has no memory left")


def test_a_busy_server_may_say_so_late() -> None:
    busy = chunked(b".", line(503, {"Retry-After": "0"}, 2), b"{}")
    transport = Canned(busy, chunked(line(), BODY))
    reply = EndpointClient("http://studio/decode", transport).decode(ASKED)
    assert reply.answer.tensor.numpy().tobytes() == BODY


# --- over real sockets -----------------------------------------------------------------------------------------------------


@contextmanager
def server(*pieces: bytes, every: float, health: bytes = b"") -> Iterator[tuple[str, threading.Event]]:
    """Answers the first POST with these pieces, one after the other in the time; and every GET with ``health`` or not at all.

    Gives its address, and the event of a connection that was closed on it.
    """
    closed = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            head = connection.recv(65536)
            if head.startswith(b"GET"):
                if health:
                    connection.sendall(health)
                closed.wait(5)
                return
            try:
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(every)
                connection.settimeout(5)
                if not connection.recv(1):
                    closed.set()
            except OSError:
                closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", closed


def dotted(count: int, *rest: bytes) -> tuple[bytes, ...]:
    head = LATE + b"Transfer-Encoding: chunked\r\n\r\n"
    return (head, *[b"1\r\n.\r\n"] * count, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in rest), b"0\r\n\r\n")


def decode(url: str, deadlines: Deadlines, cancelled: Cancelled = never) -> Reply[DecodeAnswer]:
    return client_for(f"{url}/decode").decode(ASKED, deadlines, cancelled)


def test_a_dot_is_a_sign_of_life_that_nobody_asks_health_beside() -> None:
    """Ten dots take twice as long as the first byte may; GET /health would hang for a second."""
    with server(*dotted(10, line(), BODY), every=0.1) as (url, _):
        assert decode(url, Deadlines(2.0, 0.5, 20.0)).answer.tensor.numpy().tobytes() == BODY


def test_dots_that_stop_are_a_server_that_is_gone() -> None:
    with server(*dotted(2)[:-1], every=0.02) as (url, closed):
        with pytest.raises(DeadlineExceeded, match=r"no answer in 0\.3 s"):
            decode(url, Deadlines(2.0, 0.3, 20.0))
        assert closed.wait(5)


def test_dots_do_not_outlive_the_deadline_of_the_whole_call() -> None:
    with server(*dotted(1000), every=0.02) as (url, closed):
        with pytest.raises(DeadlineExceeded) as caught:
            decode(url, Deadlines(2.0, 5.0, 0.5))
        assert caught.value.reason == "not done in 0.5 s"
        assert closed.wait(5)


def test_interrupt_ends_the_wait_between_two_dots() -> None:
    pressed = threading.Event()
    with server(*dotted(1), *itertools.repeat(b"", 2), every=3.0) as (url, closed):
        threading.Timer(0.2, pressed.set).start()
        started = time.monotonic()
        with pytest.raises(CallCancelled):
            decode(url, Deadlines(2.0, 20.0, 20.0), pressed.is_set)
        # Far from the next dot: what is tested is what ended it.
        assert time.monotonic() - started < 2.0
        del closed


def test_a_server_that_dies_between_two_dots_is_a_fallback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            # It is asked once more.
            for _ in range(2):
                connection, _ = listener.accept()
                connection.recv(65536)
                connection.sendall(b"".join(dotted(2)[:-1]))
                connection.close()

        threading.Thread(target=die, daemon=True).start()
        with pytest.raises(EndpointUnreachable) as caught:
            decode(f"http://127.0.0.1:{listener.getsockname()[1]}", Deadlines(2.0, 5.0, 20.0))
        assert caught.value.reason == "connection lost"
