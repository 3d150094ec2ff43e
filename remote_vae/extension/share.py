"""Shares the VAE of this UI: mounts the server's routes in the UI's own web app."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from typing import Any

from remote_vae.tokens import TOKEN_VARIABLE
from remote_vae.vae.at_work import Provider

log = logging.getLogger("remote_vae")

PATH = "/remote-vae"
_NAME = "remote-vae"


def mount(app: Any, provider: Provider, queue_lock: AbstractContextManager[Any]) -> None:
    """Answer under /remote-vae/ of ``app``, once: whether the user shares the VAE is asked at every request.

    Args:
        app: the host's FastAPI app, as ``on_app_started`` hands it over.
        provider: the host's adapter.
        queue_lock: what the host holds while it generates.
    """
    try:
        from starlette.routing import Mount

        from remote_vae.server.shared import create_shared_app
    except ImportError as error:
        log.warning("the VAE of this UI cannot be shared: %s", error)
        return
    routes = app.router.routes
    if any(getattr(route, "name", "") == _NAME for route in routes):
        return
    shared = create_shared_app(provider, queue_lock, os.environ.get(TOKEN_VARIABLE, "").strip())
    # In front, as gradio answers to every path.
    routes.insert(0, Mount(PATH, app=shared, name=_NAME))
