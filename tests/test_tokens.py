from __future__ import annotations

from pathlib import Path

import pytest

from remote_vae.tokens import auth_headers, is_loopback

PUBLIC = "https://abc.us-east-1.aws.endpoints.huggingface.cloud/"


def test_without_a_token_nothing_is_sent() -> None:
    assert auth_headers("http://studio:7870/decode", public=False) == {}
    assert auth_headers(PUBLIC, public=True) == {}


def test_the_users_token_goes_to_the_users_endpoint_and_never_to_a_public_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_VAE_TOKEN", "mine")
    assert auth_headers("http://studio:7870/decode", public=False) == {"Authorization": "Bearer mine"}
    assert auth_headers(PUBLIC, public=True) == {}


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        (PUBLIC, True),
        ("https://someone.hf.space/decode", True),
        (PUBLIC.replace("https", "http"), False),
        ("https://huggingface.cloud.evil.example/", False),
        ("https://evilhuggingface.cloud/", False),
        ("http://studio:7870/decode", False),
    ],
)
def test_the_hugging_face_token_goes_to_hugging_face_over_tls_only(
    monkeypatch: pytest.MonkeyPatch, url: str, sent: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert auth_headers(url, public=False) == ({"Authorization": "Bearer hf_x"} if sent else {})


def test_the_hugging_face_token_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_file\n")
    monkeypatch.delenv("HF_TOKEN_PATH")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert auth_headers(PUBLIC, public=True) == {"Authorization": "Bearer hf_file"}


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:7870", True),
        ("http://127.8.8.8/", True),
        ("http://localhost:1/", True),
        ("http://[::1]:7870/", True),
        ("http://192.168.1.2/", False),
        ("http://localhost.example.com/", False),
        ("http://studio/", False),
    ],
)
def test_loopback_is_told_by_the_address(url: str, loopback: bool) -> None:
    assert is_loopback(url) is loopback
