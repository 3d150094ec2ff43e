"""What stands in the log of a server: a line a call, whatever a client sends."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remote_vae.server import logs
from remote_vae.server.logs import CallLine

LINE = CallLine(
    "decode", "192.168.1.5", 200, "sdxl", "2 x 1024x1024", batch=4, waited=0.25, took=1.5, received=131072, sent=6_291_456
)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Of the calls' logger, as the process writes it to standard error."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root, level = logging.getLogger(), logs.calls.level
    root.addHandler(handler)
    logs.calls.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    logs.calls.setLevel(level)


def test_a_line_of_text_says_who_asked_for_what_and_how_long_it_took(written: io.StringIO) -> None:
    logs.set_format("text")
    logs.write(LINE)
    day, clock, line = written.getvalue().split(" ", 2)
    assert (len(day), len(clock)) == (10, 8)
    assert line == "decode sdxl 2 x 1024x1024 for 192.168.1.5: 200, 6.3 MB; waited 0.25 s, took 1.50 s, 4 in a batch\n"


def test_a_line_of_json_has_the_same_as_fields(written: io.StringIO) -> None:
    logs.set_format("json")
    logs.write(LINE)
    entries = json.loads(written.getvalue())
    assert {name: entries[name] for name in ("route", "client", "status", "model", "size", "batch")} == {
        "route": "decode", "client": "192.168.1.5", "status": 200, "model": "sdxl", "size": "2 x 1024x1024", "batch": 4,
    }  # fmt: skip
    assert (entries["waited"], entries["took"], entries["received"], entries["sent"]) == (0.25, 1.5, 131072, 6291456)
    assert entries["level"] == "info"
    assert entries["time"].endswith("Z")


def test_an_error_of_the_server_says_where_it_came_from(written: io.StringIO) -> None:
    logs.set_format("json")
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        logging.getLogger("remote_vae").error("the call failed", exc_info=error)
    entries = json.loads(written.getvalue())
    assert entries["message"] == "the call failed"
    assert "test_logs.py" in entries["traceback"]


# What ends lines, colours terminals, turns the direction of writing, or is no character at all.
NASTY = st.text(st.sampled_from('a\n\r\x1b[\u2028\u2029\u202e\x85\x00"\\{}%s\ud800é'))


@given(NASTY, NASTY, st.sampled_from(["text", "json"]))
def test_nothing_that_a_client_sends_makes_two_lines_or_breaks_the_json(path: str, error: str, log_format: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    logs.set_format(log_format)
    logging.getLogger().removeHandler(handler)
    line = CallLine(path, "::1", 404, error=error)
    handler.handle(logging.makeLogRecord({"msg": "%s", "args": (line,), "call": line, "levelno": logging.INFO}))
    text = stream.getvalue()
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert all(letter.isprintable() for letter in text[:-1])
    if log_format == "json":
        assert json.loads(text)["status"] == 404
