from __future__ import annotations

from pathlib import Path

import pytest

from remote_vae.tokens import auth_headers, is_loopback
from remote_vae.vae.families import find_family

PUBLIC = find_family("flux").decode_endpoint
RENTED = "https://abc.us-east-1.aws.endpoints.huggingface.cloud/"
SPACE = "https://someone.hf.space/decode"
STUDIO = "http://studio:7870/decode"


def sent(url: str, *, public: bool = False) -> str:
    return auth_headers(url, public=public).get("Authorization", "")


def test_without_a_token_nothing_is_sent() -> None:
    assert [sent(url, public=public) for url in (STUDIO, PUBLIC, RENTED) for public in (True, False)] == [""] * 6


@pytest.mark.parametrize(
    ("url", "public", "token"),
    [
        (STUDIO, False, "mine"),
        (STUDIO, True, ""),
        (RENTED, False, "mine"),
        (SPACE, False, "mine"),
        (PUBLIC, True, "hf_x"),
        # Hugging Face's own is not the user's, also where he names it himself.
        (PUBLIC, False, "hf_x"),
        ("https://huggingface.co/api", False, "hf_x"),
        (PUBLIC.replace("https", "http"), False, ""),
        ("https://huggingface.co.evil.example/", False, "mine"),
        (f"https://evil{PUBLIC.removeprefix('https://')}", False, "mine"),
    ],
)
def test_each_token_goes_to_whom_it_belongs_and_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch, url: str, public: bool, token: str
) -> None:
    monkeypatch.setenv("REMOTE_VAE_TOKEN", "mine")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert sent(url, public=public) == (f"Bearer {token}" if token else "")


@pytest.mark.parametrize("url", [STUDIO, RENTED, SPACE, "https://evilhuggingface.co/"])
def test_the_hugging_face_token_goes_to_no_strangers_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert sent(url) == sent(url, public=True) == ""


def test_the_hugging_face_token_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_file\n")
    monkeypatch.delenv("HF_TOKEN_PATH")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert sent(PUBLIC, public=True) == "Bearer hf_file"


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
