"""Addresses of endpoints: what of them is shown, and what stands beside them."""

from __future__ import annotations

import base64
from urllib.parse import unquote, urlsplit, urlunsplit

from remote_vae.errors import InvalidRequest


def beside(url: str, name: str) -> str:
    """Where the endpoint at ``url`` has its /``name``: beside /decode or /encode, else below ``url``. The query stays."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    folder, _, last = path.rpartition("/")
    base = folder if last in ("decode", "encode") else path
    return urlunsplit(parts._replace(path=f"{base}/{name}"))


def shown(url: str) -> str:
    """``url`` for logs, messages and records: without its query, which may hold a key, and without a user's password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def without_user(url: str) -> tuple[str, dict[str, str]]:
    """``url`` without user name and password, and the header that carries them."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidRequest(f"not an address: {error}") from None
    user, at, netloc = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    header = base64.b64encode(unquote(user).encode()).decode("ascii")
    return urlunsplit(parts._replace(netloc=netloc)), {"Authorization": f"Basic {header}"}


def is_same_place(url: str, to: str) -> bool:
    """Whether a redirect leads to the same server, or to its https."""
    here, there = urlsplit(url), urlsplit(to)
    if here.netloc == there.netloc:
        return here.scheme == there.scheme
    return here.hostname == there.hostname and (here.scheme, there.scheme) == ("http", "https") and there.port in (None, 443)
