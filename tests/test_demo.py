"""make demo, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["name", "op", "route", "endpoint", "ms", "bytes_up", "bytes_down", "max_diff_levels", "fallback_reason"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "remote_vae", "demo", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return out, result.stdout


def runs(demo: tuple[Path, str]) -> dict[tuple[str, str], dict[str, object]]:
    report = json.loads((demo[0] / "report.json").read_text())
    assert list(report) == ["runs"]
    assert all(list(run) == KEYS for run in report["runs"])
    return {(run["name"], run["op"]): run for run in report["runs"]}


def test_remote_runs_go_over_the_wire_and_raw_ones_change_nothing(demo: tuple[Path, str]) -> None:
    found = runs(demo)
    for transfer, worst in (("raw", 0), ("u8", 1), ("png", 1), ("jpg", 40)):
        for op in ("encode", "decode"):
            run = found[f"remote, {transfer}", op]
            assert run["route"] == "remote"
            assert run["bytes_up"] > 0 < run["bytes_down"]  # type: ignore[operator]
            assert run["max_diff_levels"] <= worst  # type: ignore[operator]
            assert str(run["endpoint"]).endswith(f"/{op}")


def test_the_server_dies_in_mid_call_and_the_picture_comes_out_all_the_same(demo: tuple[Path, str]) -> None:
    found = runs(demo)
    killed = found["server killed in mid-call", "decode"]
    assert (killed["route"], killed["max_diff_levels"]) == ("local", 0)
    # A connection that was open from an earlier call is tried anew, and then nobody listens any more.
    assert killed["fallback_reason"] in ("connection lost", "connection refused")
    gone = found["server gone", "encode"]
    assert (gone["route"], gone["max_diff_levels"], gone["fallback_reason"]) == ("local", 0, "connection refused")


def test_switched_off_the_vae_is_the_pipelines_own(demo: tuple[Path, str]) -> None:
    found = runs(demo)
    for op in ("encode", "decode"):
        assert (found["off", op]["route"], found["off", op]["max_diff_levels"]) == ("local", 0)


def test_a_real_pipeline_makes_both_calls(demo: tuple[Path, str]) -> None:
    found = runs(demo)
    for op in ("encode", "decode"):
        run = found["img2img pipeline, raw", op]
        assert run["route"] == "remote"
        assert run["max_diff_levels"] <= 1  # type: ignore[operator]


def test_the_pictures_show_the_photo(demo: tuple[Path, str]) -> None:
    levels = {
        name: np.asarray(Image.open(demo[0] / f"{name}.png")).astype(int)
        for name in ("original", "remote", "fallback", "local", "difference")
    }
    assert {picture.shape for picture in levels.values()} == {(512, 512, 3)}
    # The small VAE brings a photo back at 22 to 24 dB; a wrong scale or channel order is far below.
    error = ((levels["original"] - levels["remote"]) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 20
    assert np.array_equal(levels["fallback"], levels["local"])
    assert np.array_equal(levels["difference"], (np.abs(levels["remote"] - levels["fallback"]) * 64).clip(0, 255))


def test_the_table_has_every_run(demo: tuple[Path, str]) -> None:
    for name, _ in runs(demo):
        assert name in demo[1]
