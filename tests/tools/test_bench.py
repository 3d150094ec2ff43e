from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from remote_vae.cli import main
from remote_vae.server.admission import Limits
from remote_vae.server.models import LoadedVae
from remote_vae.tools.crowd import Cell, Crowd, Row
from tests.chaos import Chaos
from tests.conftest import ServerThread

SMALL = ("--sizes", "64", "--seconds", "0.05")


def rows_of(printed: str) -> list[list[str]]:
    """The table without its head, by words."""
    return [line.split() for line in printed.splitlines() if line.split()[:1] == ["64"]]


def test_a_line_for_each_size_in_each_format_and_for_each_number_of_clients(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", server.url, *SMALL, "--clients", "4"]) == 0
    rows = rows_of(capsys.readouterr().out)
    alone = [(form, "1") for form in ("raw", "u8", "png", "jpg", "encode")]
    assert [(row[1], row[2]) for row in rows] == [*alone, ("u8", "2"), ("u8", "4")]
    for row in rows:
        rate, median, longest = map(float, row[3:6])
        assert rate > 0
        assert 0 < median <= longest
    by_format = {row[1]: (float(row[6]), float(row[7])) for row in rows}
    # Latents of 8 x 8 in float16; three bytes a pixel, and the pixels of an encode in float32.
    assert by_format["u8"] == pytest.approx((4 * 64 * 2 / 1e6, 3 * 64**2 / 1e6), rel=0.01)
    assert by_format["encode"][0] == pytest.approx(3 * 64**2 * 4 / 1e6, rel=0.01)


def test_those_that_are_refused_are_counted_and_come_home_later(loaded: LoadedVae, capsys: pytest.CaptureFixture[str]) -> None:
    running = ServerThread(loaded, limits=Limits(max_waiting=1))
    main(["bench", running.url, *SMALL, "--formats", "u8", "--clients", "2"])
    running.close()
    alone, both = rows_of(capsys.readouterr().out)
    assert int(alone[8]) == 0
    assert int(both[8]) > 0


def test_what_goes_wrong_is_the_text_of_its_line(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    chaos.reset("400")
    chaos.info = "pass"
    assert main(["bench", chaos.url, *SMALL, "--formats", "u8,png", "--clients", "1"]) == 1
    printed = capsys.readouterr()
    rows = rows_of(printed.out)
    assert [row[1] for row in rows] == ["u8", "png"]
    assert all("400:" in row for row in rows)
    assert "Traceback" not in printed.out + printed.err


def test_a_call_that_fails_among_others_is_counted(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    chaos.reset("400")
    # The first call is not measured.
    chaos.info, chaos.fail_at = "pass", 1
    assert main(["bench", chaos.url, "--sizes", "64", "--seconds", "1", "--formats", "u8", "--clients", "1"]) == 0
    assert "1 failed: " in capsys.readouterr().out


def test_an_endpoint_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http://127.0.0.1:9", *SMALL]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "connection refused" in printed.err


@pytest.mark.skipif(sys.platform == "win32", reason="on Windows os.kill ends the process, whatever the signal")
def test_an_interrupt_prints_what_there_is(
    server: ServerThread, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Crowd.measured

    def interrupted(self: Crowd, cell: Cell) -> Row:
        if cell.form == "u8":
            self._seconds = 20.0
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return measured(self, cell)

    monkeypatch.setattr(Crowd, "measured", interrupted)
    # A shell starts what is to run in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["bench", server.url, *SMALL, "--formats", "raw,u8", "--clients", "1"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert [row[1] for row in rows_of(capsys.readouterr().out)] == ["raw"]


def test_without_tqdm_progress_is_a_line_each(
    server: ServerThread, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    main(["bench", server.url, *SMALL, "--formats", "u8", "--clients", "2"])
    assert capsys.readouterr().err.splitlines() == ["1/2: 64 px, u8, 1 client", "2/2: 64 px, u8, 2 clients"]


def test_without_matplotlib_a_plot_is_refused_before_anybody_is_asked(
    chaos: Chaos, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", chaos.url, *SMALL, "--plot", str(tmp_path / "bench.png")]) == 1
    printed = capsys.readouterr().err
    assert "-m pip install matplotlib" in printed
    assert printed.count("\n") == 1
    assert not chaos.requests


def test_the_plot_is_a_picture(server: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    assert main(["bench", server.url, *SMALL, "--formats", "u8,png", "--clients", "2", "--plot", str(path)]) == 0
    with Image.open(path) as picture:
        assert picture.size == (1200, 840)
    assert main(["bench", server.url, *SMALL, "--plot", str(tmp_path / "no" / "bench.png")]) == 1
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--formats", "u8,gif"), "--formats must be of raw, u8"),
        (("--sizes", "big"), "--sizes must be sides in pixels"),
        (("--sizes", "100000"), "from 8 to 16384"),
        (("--clients", "0"), "--clients must be from 1"),
        (("--seconds", "nan"), "--seconds must be more than 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http://127.0.0.1:9", *arguments]) == 1
    assert words in capsys.readouterr().err
