from __future__ import annotations

from pathlib import Path

import pytest
import trustme
from diffusers import AutoencoderKL

from remote_vae.cli import main
from remote_vae.remote.trial import try_out
from remote_vae.server.models import LoadedVae
from remote_vae.server.process import Tls
from remote_vae.settings import Settings
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


def test_where_certificate_or_scheme_is_wrong_it_says_so_and_nothing_of_a_firewall(
    loaded: LoadedVae, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trustme.CA().issue_cert("127.0.0.1")
    made.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    running = ServerThread(loaded, tls=Tls(str(tmp_path / "both.pem"), str(tmp_path / "both.pem")))
    plain = running.url.replace("https", "http")
    both = (running.url, plain)
    verdicts = {url: (checked(capsys, "--endpoint", url), try_out(Settings(endpoint=url), None)) for url in both}
    running.close()
    for url, words in ((running.url, "REQUESTS_CA_BUNDLE"), (plain, f"where it speaks https, enter {running.url}")):
        (status, printed), trial = verdicts[url]
        assert status == 1
        assert not trial.is_good
        for advice in (printed.splitlines()[-1], trial.verdict):
            assert words in advice
            assert "firewall" not in advice


def test_https_where_http_is_spoken_is_told_the_address(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = checked(capsys, "--endpoint", server.url.replace("http", "https"))
    assert printed.splitlines()[-1] == f"next: enter {server.url} as its address"


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
