"""Which token goes to which endpoint. Tokens come from the environment or the Hugging Face token file, never from options."""

from __future__ import annotations

import ipaddress
import os
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

TOKEN_VARIABLE = "REMOTE_VAE_TOKEN"  # noqa: S105  # the name of the variable
_HUGGING_FACE_HOSTS = (".huggingface.cloud", ".huggingface.co", ".hf.space")


def is_loopback(url: str) -> bool:
    """Whether ``url`` names this machine itself."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def auth_headers(url: str, *, public: bool) -> dict[str, str]:
    """The Authorization header for ``url``, or none.

    REMOTE_VAE_TOKEN is for the endpoint that the user named, never for a public one (``public``). The Hugging Face token goes
    to Hugging Face's own hosts over https only.
    """
    token = "" if public else os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token and _is_hugging_face(url):
        token = _hugging_face_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


@lru_cache(maxsize=64)
def _is_hugging_face(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" and (parts.hostname or "").endswith(_HUGGING_FACE_HOSTS)


def _hugging_face_token() -> str:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name, "").strip()
        if token:
            return token
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    try:
        return Path(os.environ.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
