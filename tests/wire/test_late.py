"""The head of a late answer, and the seconds that an answer says it took."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remote_vae.errors import MalformedAnswer
from remote_vae.wire import HttpResponse
from remote_vae.wire.late import late_head, read_late_head
from remote_vae.wire.timing import read_timing, timing_header

ANSWER = HttpResponse(200, {"Content-Type": "tensor/binary", "shape": "[1, 8, 8, 3]"}, b"abc")


def test_the_head_of_a_late_answer_is_one_line_of_json() -> None:
    before, line, after = late_head(ANSWER).split(b"\n")
    assert before == after == b""
    assert json.loads(line) == {"status": 200, "headers": dict(ANSWER.headers), "length": 3}
    head = read_late_head(line + b"\n")
    assert (head.status, head.length, head.headers) == (200, 3, {"content-type": "tensor/binary", "shape": "[1, 8, 8, 3]"})


def test_no_text_of_an_answer_breaks_the_line() -> None:
    odd = HttpResponse(422, {"a": "x\ny"}, b"")
    assert late_head(odd).count(b"\n") == 2
    assert read_late_head(late_head(odd).strip()).headers == {"a": "x y"}


GOOD = {"status": 200, "headers": {}, "length": 3}


@pytest.mark.parametrize(
    "line",
    [
        b"", b"[]", b"{}", b"null", b"\xff", b"[" * 10_000, b'"status"',
        *(json.dumps({**GOOD, **change}).encode() for change in (
            {"status": "200"}, {"status": 99}, {"status": 600}, {"status": True}, {"status": 2e2}, {"length": -1},
            {"length": None}, {"length": 1 << 41}, {"length": 1.0}, {"headers": []}, {"headers": {"a": 1}}, {"headers": None},
        )),
        *(json.dumps({key: value for key, value in GOOD.items() if key != gone}).encode() for gone in GOOD),
    ],
)  # fmt: skip
def test_a_late_answer_without_a_head_is_refused(line: bytes) -> None:
    with pytest.raises(MalformedAnswer, match="without a head"):
        read_late_head(line)


@given(
    st.binary(max_size=200)
    | st.text().map(lambda text: json.dumps({"status": 200, "headers": {text: text}, "length": 0}).encode())
)
def test_no_line_does_more_than_be_refused(line: bytes) -> None:
    try:
        head = read_late_head(line)
    except MalformedAnswer:
        return
    assert all(value.isprintable() for value in head.headers.values())


def test_seconds_by_stage_arrive() -> None:
    stages = {"read": 0.0123, "queue": 0.0, "predict": 1.5}
    header = timing_header(stages)
    assert header == {"Server-Timing": "read;dur=12.3, queue;dur=0.0, predict;dur=1500.0"}
    assert read_timing({"server-timing": header["Server-Timing"]}) == pytest.approx(stages)
    assert timing_header({}) == {}


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("", {}),
        ("cache;desc=hit, predict;dur=2", {"predict": 0.002}),
        ("predict;dur=nan, queue;dur=-1, read;dur=1e9, answer;dur=", {}),
        ("predict;dur=" + "9" * 20, {}),
        ("x" * 999 + ", predict;dur=1.0", {}),
        ("predict;dur=1;desc=x", {"predict": 0.001}),
    ],
)
def test_what_makes_no_sense_in_a_timing_is_left_out(text: str, stages: dict[str, float]) -> None:
    assert read_timing({"server-timing": text}) == pytest.approx(stages)


@given(st.text(alphabet="predict;=dur, .0123456789e-", max_size=60))
def test_no_timing_is_anything_but_a_number(text: str) -> None:
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in read_timing({"server-timing": text}).values())
