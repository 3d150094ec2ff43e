"""The text that a report of a problem is to have in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from remote_vae.diagnosis import diagnosis
from remote_vae.history import Record
from remote_vae.settings import Settings
from remote_vae.version import __version__


def record(endpoint: str, because: str = "") -> Record:
    route = "local" if because else "remote"
    return Record("decode", route, "u8", endpoint, 1, 512, 768, 10, 20, 30.0, because, 0.0)


def test_it_has_versions_changed_settings_and_the_last_calls() -> None:
    text = diagnosis(
        Settings(enabled=True, endpoint="http://192.168.1.20:7870", cooldown=5.0),
        ["AUTOMATIC1111 v1.10.1: hooked"],
        [record("http://192.168.1.20:7870/decode"), record("", "503")],
    )
    assert text.startswith(f"Remote VAE {__version__}")
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "AUTOMATIC1111 v1.10.1: hooked" in text
    assert "settings: enabled = True, endpoint = http://192.168.1.20:7870, cooldown = 5.0" in text
    assert "decode 768x512: remote (u8)" in text
    assert "fell back: 503" in text


def test_no_token_no_user_name_no_public_host_and_no_key_of_an_address_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_VAE_TOKEN", "secret-token")
    monkeypatch.setenv("HTTPS_PROXY", "http://someone:password@proxy.company.example:3128")
    home = str(Path.home())
    text = diagnosis(
        Settings(endpoint="https://vae.company.example/path?key=secret-key", rescue_folder=f"{home}/rescued"),
        [f"loaded from {home}/webui", "state: on: vae.company.example:8443, same VAE"],
        [record("https://vae.company.example/path/decode", "https://vae.company.example:8443 answered 503")],
    )
    for secret in ("secret", "company", "someone", "password", home):
        assert secret not in text
    assert "REMOTE_VAE_TOKEN, HTTPS_PROXY" in text
    assert "endpoint = https://HOST/path" in text
    assert "https://HOST:8443 answered" in text
    assert "state: on: HOST:8443, same VAE" in text


def test_without_settings_and_calls_it_is_still_of_use() -> None:
    assert "no calls yet" in diagnosis()


@pytest.mark.parametrize("host", ["studio", "localhost", "10.0.0.3", "[fd00::1]", "127.0.0.1"])
def test_addresses_that_lead_nowhere_from_outside_stay(host: str) -> None:
    assert f"http://{host}:7870" in diagnosis(Settings(endpoint=f"http://{host}:7870"))
