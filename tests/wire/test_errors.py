from __future__ import annotations

import json

import pytest

from remote_vae.wire import error_detail, error_response, one_line


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": "no replica"}', "no replica"),
        (b'{"error": {"code": 3}}', '{"code": 3}'),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'"asleep"', "asleep"),
        (b"<html><h1>502</h1> Bad&nbsp;Gateway</html>", "502 Bad Gateway"),
        (b"", "no message"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 5000, "x" * 297 + "..."),
        (b"[" * 60_000, "[" * 297 + "..."),
        (b'{"error": ' * 6_000, '{"error": ' * 29 + '{"error...'),
        (b"<" * 64_000, "<" * 297 + "..."),
        (b'{"error": "a\\u001b[31mb\\u202ec\\nd"}', "a [31mb c d"),
    ],
)
def test_an_error_body_becomes_one_short_line(body: bytes, text: str) -> None:
    assert error_detail(body) == text


def test_a_line_has_nothing_that_moves_a_cursor_or_turns_the_writing() -> None:
    assert one_line(" a\r\nb\t\x00\x1b[2J\x7f\u2028\u200f\ud800 c  ") == "a b [2J c"
    assert one_line("abcdef", 5) == "ab..."


def test_every_error_is_the_protocols_json_in_one_line() -> None:
    response = error_response(400, 'a "bad"\nshape' + "x" * 70_000)
    document = json.loads(bytes(response.body))
    assert document.keys() == {"error"}
    assert document["error"].startswith('a "bad" shape')
    assert len(document["error"]) == 1000
    assert response.headers["Content-Type"] == "application/json"
