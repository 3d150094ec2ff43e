"""The VAE of a host UI, for others to use while the UI does not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from remote_vae.server.access import by_token_or_loopback
from remote_vae.server.admission import Limits
from remote_vae.server.app import create_app
from remote_vae.server.catalogue import OneVae
from remote_vae.server.engine import Engine
from remote_vae.vae.at_work import Provider
from remote_vae.wire import THIS_PROCESS


def create_shared_app(
    provider: Provider, queue_lock: AbstractContextManager[Any], token: str = "", limits: Limits | None = None
) -> ASGIApp:
    """The server's app for the VAE of a host. While the user's option is off, every path is a 404.

    Args:
        provider: the host's adapter.
        queue_lock: what the host holds while it generates: calls take turns with it.
        token: other machines must have it; without one, only programs on this machine are served.
        limits: what a request may ask for.
    """
    engine = Engine(OneVae(provider, about={"process": THIS_PROCESS}), limits, turn=queue_lock, batch_pixels=0)
    app = create_app(engine, access=by_token_or_loopback(token))

    async def shared(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not provider.shares():
            off = JSONResponse({"error": "this UI does not share its VAE: Settings, Remote VAE, Share this UI's VAE"}, 404)
            await off(scope, receive, send)
        else:
            await app(scope, receive, send)

    return shared
