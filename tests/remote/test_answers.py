"""What a client makes of the bytes that come, torn ones above all; no socket needed."""

from __future__ import annotations

import pytest

from remote_vae.errors import EndpointError, EndpointUnreachable, InvalidRequest, MalformedAnswer, RouteFailed
from remote_vae.remote.client import EndpointClient
from tests.remote.canned import BODY, HEAD, REQUEST, Canned, ask, failure


def with_length(length: int, body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % length + body


def chunked(*pieces: bytes, end: bytes = b"0\r\nTrailer: 1\r\n\r\n") -> bytes:
    body = b"".join(b"%x;x=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + end


@pytest.mark.parametrize(
    "answer",
    [
        with_length(192, BODY),
        with_length(192, BODY).replace(b"Content-Length: 192", b"Content-Length: 192, 192"),
        with_length(192, BODY).replace(b"\r\n\r\n", b"\r\nContent-Length: 192\r\n\r\n"),
        chunked(BODY[:100], BODY[100:]),
        HEAD + b"\r\n" + BODY,
        b"HTTP/1.1 100 Continue\r\n\r\n" + with_length(192, BODY),
        b"HTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 103 Wait\r\nLink: x\r\n\r\n" + with_length(192, BODY),
    ],
    ids=["length", "length twice in a line", "length in two lines", "chunked", "until the end", "100", "102 and 103"],
)
def test_a_whole_answer_comes_whole_however_its_end_is_told(answer: bytes) -> None:
    assert ask(answer).answer.tensor.numpy().tobytes() == BODY


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        HEAD + b"A: " + b"x" * 100_000,
        with_length(192, BODY[:-1]),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\nshort",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        chunked(BODY, end=b""),
    ],
)
def test_an_answer_that_is_torn_is_not_taken(answer: bytes) -> None:
    assert isinstance(failure(answer), EndpointUnreachable)


@pytest.mark.parametrize(
    "first",
    [
        b"",
        with_length(192, BODY[:100]),
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\nContent-Length: 21\r\n\r\nInternal Server Error",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<h1>",
    ],
    ids=["nothing", "torn", "cluster", "gateway"],
)
def test_where_a_server_died_under_the_call_it_is_made_once_more(first: bytes) -> None:
    transport = Canned(first, with_length(192, BODY))
    assert EndpointClient("http://studio:7870/decode", transport).decode(REQUEST).bytes_down == len(BODY)
    assert len(transport.sent) == 2
    dying = Canned(first)
    with pytest.raises(RouteFailed):
        EndpointClient("http://studio:7870/decode", dying).decode(REQUEST)
    assert len(dying.sent) == 2


def test_what_a_vae_server_itself_could_not_do_is_not_asked_of_it_again() -> None:
    body = b'{"error": "TypeError"}'
    own = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )
    transport = Canned(own, with_length(192, BODY))
    with pytest.raises(EndpointError, match="TypeError"):
        EndpointClient("http://studio:7870/decode", transport).decode(REQUEST)
    assert len(transport.sent) == 1


@pytest.mark.parametrize("length", range(1, len(HEAD), 13))
def test_a_head_that_is_torn_is_not_taken(length: int) -> None:
    assert failure(HEAD[:length]).reason


def test_every_torn_body_is_not_taken() -> None:
    for whole in (with_length(192, BODY), chunked(BODY, end=b"0\r\n\r\n")):
        for length in range(len(whole) - 192, len(whole) - 5):
            assert failure(whole[:length]).reason


@pytest.mark.parametrize(
    "answer",
    [
        with_length(191, BODY[:-1]),
        with_length(193, BODY + b"x"),
        chunked(BODY[:-1]),
        chunked(BODY, b"x"),
        HEAD + b"\r\n" + BODY + b"x",
        HEAD + b"\r\n" + BODY[:-1],
    ],
)
def test_an_answer_of_another_size_is_not_taken(answer: bytes) -> None:
    error = failure(answer)
    assert isinstance(error, MalformedAnswer)
    assert "expected 192" in error.reason


@pytest.mark.parametrize("lengths", [b"192, 193", b"192\r\nContent-Length: 193", b"many", b"-1", b"9" * 30])
def test_an_answer_whose_end_cannot_be_told_is_not_taken(lengths: bytes) -> None:
    error = failure(HEAD + b"Content-Length: " + lengths + b"\r\n\r\n" + BODY)
    assert "Content-Length" in error.reason


@pytest.mark.parametrize(
    "coding", [b"gzip", b"gzip, chunked", b"banana", b"chunked ", b"\r\n chunked", b"chunked\r\nTransfer-Encoding: gzip"]
)
def test_an_unknown_transfer_encoding_does_not_get_into_the_pixels(coding: bytes) -> None:
    """Beside a Content-Length it was overlooked, and the framing taken for values."""
    error = failure(HEAD + b"Transfer-Encoding: " + coding + b"\r\nContent-Length: 192\r\n\r\n" + BODY)
    assert "transfer encoding" in error.reason


@pytest.mark.parametrize("status", [204, 205, 304])
def test_an_answer_without_a_body_is_an_error_at_once(status: int) -> None:
    error = failure(b"HTTP/1.1 %d Nothing\r\n\r\n" % status)
    assert isinstance(error, EndpointError)
    assert error.status == status


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (with_length(192, BODY), True),
        (chunked(BODY), True),
        (HEAD + b"\r\n" + BODY, False),
        (with_length(192, BODY).replace(b"dtype", b"Connection: close\r\ndtype"), False),
        (with_length(192, BODY).replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (with_length(192, BODY).replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"dtype", b"Connection: keep-alive\r\ndtype"), True),
    ],
)
def test_the_server_says_whether_the_connection_lives(answer: bytes, kept: bool) -> None:
    transport = Canned(answer)
    EndpointClient("http://studio/decode", transport).decode(REQUEST)
    assert transport.kept == [kept]


def test_a_web_page_is_called_so_with_the_endpoints_name() -> None:
    error = failure(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>")
    assert isinstance(error, MalformedAnswer)
    assert str(error).startswith("http://studio:7870/decode: bad answer: got a web page (content type text/html)")
    # The record goes out with the picture, and does not name the machine.
    assert "studio" not in error.reason


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x15\x03\x01\x00\x02\x02\x46", "https is spoken there, not http; enter https://studio:7870 as the address"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "HTTP/2 is spoken there"),
        (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", "HTTP/2 is spoken there"),
        (b"220 ftp\r\n\r\n", "no answer in HTTP; is that the port of a Remote VAE server?"),
    ],
)
def test_another_protocol_is_named(answer: bytes, words: str) -> None:
    assert words in str(failure(answer))


@pytest.mark.parametrize("status", [404, 405])
def test_a_server_without_the_path_is_asked_after_as_another_one(status: int) -> None:
    error = failure(b'HTTP/1.1 %d No\r\nContent-Length: 22\r\n\r\n{"detail":"Not Found"}' % status)
    assert str(error).endswith("Not Found; is that the address of a Remote VAE server?")


def test_control_characters_of_a_header_do_not_reach_the_message() -> None:
    error = failure(HEAD.replace(b"tensor/binary", b"text/\x1b[31mred\x07") + b"Content-Length: 0\r\n\r\n")
    assert error.reason.isprintable()
    assert str(error).isprintable()


def redirect(status: int, to: str) -> bytes:
    return b"HTTP/1.1 %d Elsewhere\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % (status, to.encode())


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize(
    ("to", "goes_to"),
    [
        ("/v2/decode", "http://studio:7870/v2/decode"),
        ("http://studio:7870/decode/?key=a&shape=1&shape=4&shape=1&shape=1&dtype=float32", "http://studio:7870/decode/"),
        ("https://studio/decode", "https://studio/decode"),
    ],
)
def test_a_redirect_on_the_same_host_is_followed_with_the_body(status: int, to: str, goes_to: str) -> None:
    transport = Canned(redirect(status, to), with_length(192, BODY))
    EndpointClient("http://studio:7870/decode", transport).decode(REQUEST)
    assert [sent.url for sent in transport.sent] == ["http://studio:7870/decode", goes_to]
    assert transport.sent[1].body == transport.sent[0].body
    # Most servers redirect with the query, and a shape that stands there twice is none.
    assert transport.sent[1].query.removeprefix("key=a&") == transport.sent[0].query


@pytest.mark.parametrize(
    ("status", "to"),
    [
        (307, "http://elsewhere:7870/decode?key=secret"),
        (308, "http://studio:80/decode"),
        (302, "http://studio:7870/login"),
        (301, "/login"),
    ],
)
def test_another_redirect_is_named_and_gets_nothing(status: int, to: str) -> None:
    transport = Canned(redirect(status, to))
    with pytest.raises(EndpointError, match=r"it redirects to http://.*/(login|decode); if that is the endpoint") as caught:
        EndpointClient("http://studio:7870/decode", transport).decode(REQUEST)
    assert len(transport.sent) == 1
    assert "secret" not in str(caught.value)


def test_a_redirect_in_a_circle_ends() -> None:
    assert "circle" in str(failure(*[redirect(307, "/decode")] * 3))


def test_a_downgrade_to_http_is_not_followed() -> None:
    assert isinstance(failure(redirect(307, "http://studio/decode"), url="https://studio/decode"), EndpointError)


BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: %b\r\nContent-Length: 0\r\n\r\n"


def test_a_busy_server_is_asked_once_more_when_it_wants_to_be() -> None:
    transport = Canned(BUSY % b"0", with_length(192, BODY))
    EndpointClient("http://studio/decode", transport).decode(REQUEST)
    assert len(transport.sent) == 2


@pytest.mark.parametrize("after", [b"100000", b"Fri, 31 Dec 2049 23:59:59 GMT"])
def test_a_busy_server_is_not_waited_for_longer_than_for_an_answer(after: bytes) -> None:
    error = failure(BUSY % after)
    assert isinstance(error, EndpointError)
    assert (error.retry_after or 0) > 10_000


def test_a_server_that_stays_busy_is_asked_only_once_more() -> None:
    assert isinstance(failure(BUSY % b"0", BUSY % b"0"), EndpointError)


@pytest.mark.parametrize("after", [b"", b"soon", b"\xff", b"-1"])
def test_a_retry_after_that_makes_no_sense_is_none(after: bytes) -> None:
    error = failure(BUSY % after)
    assert isinstance(error, EndpointError)
    assert error.retry_after is None


def test_every_request_says_who_asks() -> None:
    transport = Canned(with_length(192, BODY))
    EndpointClient("http://studio/decode", transport).decode(REQUEST)
    assert transport.sent[0].headers["User-Agent"].startswith("remote-vae/")


def test_a_password_in_an_address_is_sent_as_such_and_shown_nowhere() -> None:
    transport = Canned(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(EndpointError) as caught:
        EndpointClient("http://me:p%40ss@studio:7870/decode?key=secret", transport).decode(REQUEST)
    sent = transport.sent[0]
    assert sent.url == "http://studio:7870/decode"
    assert sent.headers["Authorization"] == "Basic bWU6cEBzcw=="
    assert "key=secret" in sent.query
    assert str(caught.value) == "http://studio:7870/decode answered 401: no message"


def test_a_token_of_two_lines_does_not_become_two_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_VAE_TOKEN", "mine\r\nX: 1")
    transport = Canned()
    with pytest.raises(ValueError, match="more than one line"):
        EndpointClient("http://studio/decode", transport).decode(REQUEST)
    assert transport.sent == []


@pytest.mark.parametrize("url", ["studio:7870/decode", "ftp://studio/decode", "", "http//studio"])
def test_what_is_no_address_of_the_web_is_an_invalid_request(url: str) -> None:
    with pytest.raises(InvalidRequest, match="begins with http:// or https://"):
        EndpointClient(url, Canned()).decode(REQUEST)
