"""Who may ask: by token, or from this machine."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from typing import Optional

from starlette.requests import Request

from remote_vae.tokens import TOKEN_VARIABLE, is_loopback
from remote_vae.wire import HttpResponse, error_response

# The refusal of a request, or None.
Access = Callable[[Request], Optional[HttpResponse]]

# What reverse proxies and tunnels add. Behind one on this machine, everyone comes from loopback.
_FORWARDED = ("forwarded", "via", "x-forwarded", "x-real-ip", "cf-connecting-ip", "true-client-ip")


def by_token(token: str) -> Access:
    """The server's rule: with a ``token``, those who have it; without one, everyone who reaches the port."""

    def refusal(request: Request) -> HttpResponse | None:
        return None if not token or _has_token(request, token) else _unauthorised()

    return refusal


def by_token_or_loopback(token: str) -> Access:
    """The rule of a VAE that a UI shares: those who have the ``token``, and programs on this machine.

    A page in a browser on this machine is no such program, whichever site it is from.
    """

    def refusal(request: Request) -> HttpResponse | None:
        if token and _has_token(request, token):
            return None
        if not _comes_from_loopback(request):
            return _unauthorised() if token else _forbidden(f"other machines need a token: set {TOKEN_VARIABLE} on both")
        if "origin" in request.headers or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _forbidden("a page in a browser may not ask")
        if not _names_loopback(request):
            # A name that a page's owner makes point here (DNS rebinding), or a tunnel that adds no header.
            return _forbidden("ask for localhost or 127.0.0.1, or set a token: " + TOKEN_VARIABLE)
        return None

    return refusal


def _has_token(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _comes_from_loopback(request: Request) -> bool:
    if request.client is None or any(name.startswith(_FORWARDED) for name in request.headers):
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    # A socket for both kinds of addresses sees 127.0.0.1 as ::ffff:127.0.0.1.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _names_loopback(request: Request) -> bool:
    """Whether the Host header is an address of this machine alone, or localhost."""
    try:
        return is_loopback(f"http://{request.headers.get('host', '')}")
    except ValueError:
        return False


def _unauthorised() -> HttpResponse:
    return error_response(401, f"a token is needed: set {TOKEN_VARIABLE} to the server's token where you call from")


def _forbidden(why: str) -> HttpResponse:
    return error_response(403, why)
