from __future__ import annotations

import re

import pytest

from remote_vae.cli import main
from remote_vae.errors import SettingsError
from remote_vae.tools.costs import call_bytes, cards, measurements, seconds_of
from remote_vae.vae.families import find_family
from tests.conftest import ServerThread


def needed(printed: str) -> int:
    found = re.search(r"Needed: (\d+)", printed)
    assert found is not None, printed
    return int(found[1])


def test_a_thousand_uis_get_a_number_of_cards_a_bandwidth_and_waits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--uis", "1000", "--every", "20", "--size", "1024"]) == 0
    printed = capsys.readouterr().out
    # 50 calls a second of 0.256 s are 12.8 cards at work.
    assert 13 <= needed(printed) <= 15
    assert "50 calls a second" in printed
    # 3 bytes of a million pixels, fifty times a second.
    assert "down 157 MB/s" in printed
    assert f"*{needed(printed):>5}" in printed


def test_what_is_needed_keeps_to_the_wait_that_was_asked_for_and_one_card_less_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--uis", "60", "--every", "10", "--seconds", "0.5", "--wait", "0.4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"[ *]+\d+ +\d+%", line)]
    marked = next(index for index, row in enumerate(rows) if row[0] == "*")
    p95 = [float(row[6 if row[0] == "*" else 5]) for row in rows]
    assert p95[marked] <= 400 < p95[marked - 1]


def test_half_of_the_cards_do_where_a_call_takes_half_as_long(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for seconds in ("0.4", "0.2"):
        assert main(["plan", "--uis", "1000", "--seconds", seconds]) == 0
        found.append(needed(capsys.readouterr().out))
    assert found[0] == pytest.approx(2 * found[1], abs=2)


def test_an_endpoint_can_be_measured_for_it(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--uis", "3", "--size", "64", "--family", "sd1", "--endpoint", server.url]) == 0
    assert f"measured at {server.url}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--uis", "0"], "--uis must be from 1"),
        (["--uis", "10", "--every", "0"], "--every must be"),
        (["--uis", "10", "--seconds", "-1"], "--seconds must be"),
        (["--uis", "10", "--card", "RTX 1"], "RTX 4090"),
        (["--uis", "10", "--family", "wan22-5b"], "--seconds or --endpoint"),
        (["--uis", "10", "--transfer", "gif"], "--transfer must be"),
        (["--uis", "1000", "--line", "1"], "--transfer compressed"),
        (["--uis", "10", "--endpoint", "http://127.0.0.1:9"], "connection refused"),
    ],
)
def test_what_cannot_be_planned_is_one_line_that_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_published_times_are_taken_as_they_are_and_between_them_grow_with_the_picture() -> None:
    sdxl = find_family("sdxl")
    assert seconds_of("decode", sdxl, "rtx 4090", 1024 * 1024) == pytest.approx(0.256)
    assert seconds_of("decode", sdxl, "RTX 4090", 512 * 512) == pytest.approx(0.057)
    assert 0.057 < seconds_of("decode", sdxl, "RTX 4090", 768 * 768) < 0.256
    assert seconds_of("decode", sdxl, "RTX 4090", 2048 * 2048) == pytest.approx(4 * 0.256)
    with pytest.raises(SettingsError):
        seconds_of("decode", find_family("taesd"), "RTX 4090", 1024)
    assert "RTX 4090" in cards("decode")
    assert all(row.seconds > 0 for row in measurements())


def test_bytes_of_a_call_are_those_of_the_wire() -> None:
    flux = find_family("flux")
    assert call_bytes("decode", flux, 1 << 20, "u8") == (16 * (1 << 14) * 2, 3 << 20)
    assert call_bytes("encode", flux, 1 << 20, "u8") == (6 << 20, 2 * 16 * (1 << 14) * 2)
    assert call_bytes("decode", find_family("sdxl"), 1 << 20, "compressed")[1] == 1.8 * (1 << 20)
