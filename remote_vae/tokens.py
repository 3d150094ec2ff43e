"""Which token goes to which endpoint. Tokens come from the environment or the Hugging Face token file, never from options."""

from __future__ import annotations

import ipaddress
import os
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from remote_vae.settings import read_toml

TOKEN_VARIABLE = "REMOTE_VAE_TOKEN"  # noqa: S105  # the name of the variable


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

    The Hugging Face token goes to Hugging Face's own: huggingface.co and the endpoints of families.toml, over https only.
    REMOTE_VAE_TOKEN goes to every other endpoint that the user named, also to one that he rents from Hugging Face; never to one
    that he did not name (``public``).
    """
    if _is_hugging_faces(urlsplit(url).hostname or ""):
        token = _hugging_face_token() if url.lower().startswith("https:") else ""
    else:
        token = "" if public else os.environ.get(TOKEN_VARIABLE, "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


@lru_cache(maxsize=64)
def _is_hugging_faces(host: str) -> bool:
    entries = [entry for entry in read_toml("families.toml").values() if isinstance(entry, dict)]
    urls = [entry.get(key, "") for entry in entries for key in ("decode_endpoint", "encode_endpoint")]
    return host == "huggingface.co" or host in {urlsplit(url).hostname for url in urls}


def _hugging_face_token() -> str:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name, "").strip()
        if token:
            return token
    try:
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        return Path(os.environ.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, ValueError):  # no file, no home, no text
        return ""
