from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image

from remote_vae.cli import _PANEL_ONLY, main
from remote_vae.rescue import load_latents, save_latents
from remote_vae.server.models import LoadedVae
from remote_vae.settings import load_options
from remote_vae.vae.families import find_family, recognise
from remote_vae.wire.pixels import image_to_pixels, to_uint8
from tests.chaos import Chaos
from tests.conftest import DEMO_VAE, ServerThread
from tests.nearness import out_of_memory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def rescued(tmp_path: Path, loaded: LoadedVae, latents: torch.Tensor) -> Path:
    return save_latents(latents.repeat(2, 1, 1, 1), loaded.family, tmp_path, "out of memory")


def local(loaded: LoadedVae, latents: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return to_uint8(loaded.vae.decode(latents).sample).numpy()


def test_rescued_latents_become_the_pictures_they_would_have_been(
    rescued: Path, server: ServerThread, loaded: LoadedVae, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected = local(loaded, load_latents(rescued).latents)
    for picture, levels in zip(decoded(rescued, ["--endpoint", server.url], capsys, tmp_path), expected, strict=True):
        assert np.array_equal(picture, levels)


def test_rescued_latents_become_the_exact_pictures_in_tiles_by_a_vae_of_this_machine(
    rescued: Path, loaded: LoadedVae, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        whole = loaded.vae.decode(load_latents(rescued).latents).sample
    levels = ((whole / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    # What is here has failed to decode as a whole.
    monkeypatch.setattr(Decoder, "forward", out_of_memory)
    for picture, exact in zip(decoded(rescued, ["--vae", str(DEMO_VAE)], capsys, tmp_path), levels, strict=True):
        # Half a level of rounding, and what 100 dB are of 255 levels.
        assert np.abs(picture - exact).max() <= 0.5 + 0.0026


def decoded(rescued: Path, target: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> list[np.ndarray]:
    """The two pictures that the command makes of ``rescued``."""
    assert main(["decode", str(rescued), "--out", str(tmp_path / "out.png"), *target]) == 0
    written = capsys.readouterr().out.split()
    assert written == [str(tmp_path / "out-0.png"), str(tmp_path / "out-1.png")]
    return [np.asarray(Image.open(path)) for path in written]


def test_a_picture_becomes_latents_and_a_picture_again(
    server: ServerThread, loaded: LoadedVae, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "photo.png")
    endpoint = ["--endpoint", server.url, "--transfer", "raw"]
    assert main(["encode", str(tmp_path / "photo.png"), "--family", "sd1", *endpoint]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file == tmp_path / "photo.safetensors"
    with torch.inference_mode():
        expected = loaded.vae.encode(image_to_pixels(picture)).latent_dist.mode()
    assert torch.equal(load_latents(file).latents, expected)
    assert main(["decode", str(file), *endpoint]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "photo.png")), local(loaded, expected)[0])


def test_check_says_that_an_endpoint_works(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--endpoint", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["decode: works", "encode: works"]


def test_check_says_what_is_wrong_with_an_endpoint(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    chaos.reset("503")
    assert main(["check", "--endpoint", chaos.url]) == 1
    out = capsys.readouterr().out
    assert out.count("failed") == 2
    assert "no replica is ready" in out
    assert main(["check"]) == 1
    assert "--endpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "missing.safetensors", "--endpoint", "http://127.0.0.1:9"], "cannot be read"),
        (["check", "--transfer", "gif"], "transfer"),
        (["check", "--family", "sd77"], "sd77"),
        (["encode", "missing.png", "--family", "sd1"], "cannot be read"),
        (["serve", "--vae", "missing", "--port", "0"], "missing"),
        (["serve", "--vae", "missing", "--host", "203.0.113.7", "--port", "0"], "cannot listen"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("remote-vae: ")
    assert message in error
    assert error.count("\n") == 1


def test_decoding_with_nothing_says_what_to_name(rescued: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", str(rescued)]) == 1
    assert "--endpoint" in capsys.readouterr().err


def test_latents_of_another_vae_are_not_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_latents(
        torch.zeros(1, 16, 4, 4), recognise(latent_channels=16, scaling_factor=1.0, shift_factor=0), tmp_path, ""
    )
    assert main(["decode", str(file), "--vae", str(DEMO_VAE)]) == 1
    assert "16" in capsys.readouterr().err


def test_the_options_of_the_panel_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    text = capsys.readouterr().out
    for key in set(load_options()) - _PANEL_ONLY:
        assert "--" + key.replace("_", "-") in text


def test_serve_prints_its_address_and_answers_there_until_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "remote_vae", "serve", "--vae", str(DEMO_VAE), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Remote VAE serves custom VAE, ")
        assert main(["check", "--endpoint", line.split()[-1]]) == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130, -signal.SIGINT)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_family_of_a_rescued_file_is_told_to_the_server(
    chaos: Chaos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_latents(torch.zeros(1, 4, 8, 8), find_family("sdxl"), tmp_path, "")
    assert main(["decode", str(file), "--endpoint", chaos.url]) == 0
    assert "family=sdxl" in chaos.queries[-1]
