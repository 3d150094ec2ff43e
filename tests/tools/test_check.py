from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import AutoencoderKL

from remote_vae.cli import main
from remote_vae.server.models import LoadedVae
from tests.chaos import Chaos
from tests.conftest import DEMO_VAE, ServerThread


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["check", *arguments])
    return status, capsys.readouterr().out


def test_the_vae_there_is_compared_with_one_of_this_machine(
    server: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = checked(capsys, "--endpoint", server.url, "--vae", str(DEMO_VAE))
    assert status == 0
    assert "yours: the same" in printed
    other = AutoencoderKL.from_pretrained(DEMO_VAE)
    other.decoder.conv_out.bias.data += 1.0
    other.save_pretrained(tmp_path)
    status, printed = checked(capsys, "--endpoint", server.url, "--vae", str(tmp_path))
    assert status == 1
    assert "yours: another one" in printed
    assert "next: serve the VAE that your UI uses" in printed


def test_how_quick_the_line_is_comes_of_a_large_picture_there_and_back(
    server: ServerThread, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remote_vae.tools.check._LARGE_SIDE", 256)
    # However slow this machine is.
    monkeypatch.setattr("remote_vae.tools.check._QUICK", 100.0)
    status, printed = checked(capsys, "--endpoint", server.url)
    line = next(line for line in printed.splitlines() if line.startswith("line: "))
    assert status == 0
    assert "down " in line
    assert "MB" in line


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("503", "try again in a minute"),
        ("refused", "remote-vae serve"),
    ],
)
def test_what_is_wrong_says_what_to_do_next(chaos: Chaos, fault: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9" if fault == "refused" else chaos.url
    if fault != "refused":
        chaos.reset(fault)
    status, printed = checked(capsys, "--endpoint", url)
    assert status == 1
    assert words in printed.splitlines()[-1]


def test_a_server_that_wants_a_token_says_so(loaded: LoadedVae, capsys: pytest.CaptureFixture[str]) -> None:
    running = ServerThread(loaded, "secret")
    status, printed = checked(capsys, "--endpoint", running.url)
    running.close()
    assert status == 1
    assert "set REMOTE_VAE_TOKEN" in printed.splitlines()[-1]


def test_a_plain_endpoint_works_and_says_nothing_of_itself(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    chaos.info = "404 html"
    status, printed = checked(capsys, "--endpoint", chaos.url)
    assert printed.startswith("decode: works")
    assert status == 0
