from __future__ import annotations

import http.client
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remote_vae.remote.http1 import Answer, Size, request_head


class Feed:
    """Gives bytes out in pieces of the sizes that the test says."""

    def __init__(self, data: bytes, step: int = 7) -> None:
        self._data = data
        self._step = step
        self.reads = 0

    def fill(self, view: memoryview, least: int) -> int:
        self.reads += 1
        filled = 0
        while filled < least and self._data:
            piece = self._data[: min(self._step, len(view) - filled)]
            view[filled : filled + len(piece)] = piece
            self._data = self._data[len(piece) :]
            filled += len(piece)
        return filled


def body(answer: Answer) -> bytes:
    return b"".join(answer.pieces())


@given(step=st.integers(1, 80))
def test_a_body_with_a_length_comes_whole_however_it_is_cut(step: int) -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nShape: [1]\r\n\r\nhello world"
    answer = Answer(Feed(data, step))
    assert (answer.status, answer.length, answer.headers["shape"], answer.keeps_alive) == (200, 11, "[1]", True)
    assert answer.body().tobytes() == body(Answer(Feed(data, step))) == b"hello world"


@given(
    step=st.integers(1, 70_000),
    usual_head=st.integers(0, 200),
    usual_body=st.integers(0, 60_000),
    length=st.integers(0, 40_000),
)
def test_a_body_is_the_same_whatever_the_last_one_was_like(step: int, usual_head: int, usual_body: int, length: int) -> None:
    sent = random.Random(length).randbytes(length)
    answer = Answer(Feed(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + sent, step), Size(usual_head, usual_body))
    got = answer.body()
    assert got.tobytes() == sent
    assert got.view(np.uint8)[: length // 4 * 4].view(np.float32).flags.aligned
    assert answer.keeps_alive


def test_an_answer_like_the_last_one_is_received_where_it_stays() -> None:
    head, sent = b"HTTP/1.1 200 OK\r\nContent-Length: 30000\r\nX: y\r\n\r\n", bytes(range(250)) * 120
    first = Answer(Feed(head + sent, 4096))
    assert first.size == Size(len(head), len(sent))
    feed = Feed(head + sent, 1 << 20)
    again = Answer(feed, first.size)
    assert feed.reads == 1
    assert again.body().tobytes() == sent
    assert feed.reads == 1


def test_an_interim_answer_does_not_confuse_where_the_body_is() -> None:
    data = b"HTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world"
    for step in (5, 24, 1000):
        assert Answer(Feed(data, step), Size(38, 11)).body().tobytes() == b"hello world"


def test_a_server_that_sends_more_than_it_said_is_left() -> None:
    answer = Answer(Feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello world", 1000))
    assert answer.body().tobytes() == b"hello"
    assert not answer.keeps_alive


def test_a_surplus_behind_a_body_that_is_read_in_pieces_ends_the_connection_too() -> None:
    chunked = b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    for rest in (b"Content-Length: 5\r\n\r\nhello", chunked):
        answer = Answer(Feed(b"HTTP/1.1 200 OK\r\n" + rest, 1000))
        assert (body(answer), answer.keeps_alive) == (b"hello", True)
        answer = Answer(Feed(b"HTTP/1.1 200 OK\r\n" + rest + b"HTTP/1.1", 1000))
        assert (body(answer), answer.keeps_alive) == (b"hello", False)


def test_a_small_body_does_not_keep_the_memory_of_a_large_one() -> None:
    answer = Answer(Feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 1000), Size(38, 1 << 20))
    got = answer.body()
    assert got.base is None
    assert got.tobytes() == b"hello"


def test_a_head_that_comes_at_once_has_the_same_limit() -> None:
    head = b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000 + b"\r\n\r\n"
    with pytest.raises(http.client.LineTooLong):
        Answer(Feed(head, 1 << 20), Size(100, 1 << 20))


@given(step=st.integers(1, 80))
def test_a_chunked_body_comes_whole_however_it_is_cut(step: int) -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6;x=1\r\nhello \r\n5\r\nworld\r\n0\r\nTrailer: 1\r\n\r\n"
    answer = Answer(Feed(data, step))
    assert answer.length is None
    assert answer.keeps_alive
    assert body(answer) == b"hello world"


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    answer = Answer(Feed(b"HTTP/1.1 200 OK\r\n\r\nhello world"))
    assert not answer.keeps_alive
    assert body(answer) == b"hello world"


@pytest.mark.parametrize(
    ("head", "alive"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive", True),
    ],
)
def test_the_server_says_whether_the_connection_lives(head: bytes, alive: bool) -> None:
    assert Answer(Feed(head + b"\r\n\r\n")).keeps_alive is alive


def test_an_interim_answer_is_passed_over() -> None:
    assert Answer(Feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")).status == 503


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nName : x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000,
    ],
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        Answer(Feed(data, 5000))


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 9\r\n\r\nshort",
        *(b"Transfer-Encoding: chunked\r\n\r\n" + chunk for chunk in (b"9\r\nshort", b"x\r\n", b"2\r\nabc\r\n", b"")),
    ],
)
def test_a_body_that_is_cut_or_broken_is_refused(rest: bytes) -> None:
    with pytest.raises(http.client.HTTPException):
        body(Answer(Feed(b"HTTP/1.1 200 OK\r\n" + rest)))


def test_a_request_is_one_line_a_header_and_cannot_be_broken_out_of() -> None:
    assert request_head("h:1", "/d?a=1", {"X": "y"}, 5) == (
        b"POST /d?a=1 HTTP/1.1\r\nHost: h:1\r\nX: y\r\nAccept-Encoding: identity\r\nContent-Length: 5\r\n\r\n"
    )
    assert request_head("h:1", "/info", {}, None) == b"GET /info HTTP/1.1\r\nHost: h:1\r\nAccept-Encoding: identity\r\n\r\n"
    for target, headers in (("/a b", {}), ("/a\r\nX: 1", {}), ("/", {"X": "1\r\nY: 2"}), ("/ü", {})):
        with pytest.raises(ValueError, match=r".+"):
            request_head("h", target, headers, 0)
