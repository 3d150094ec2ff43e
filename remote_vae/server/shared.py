"""The VAE of a host UI, for others to use while the UI does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from remote_vae.server.access import by_token_or_loopback
from remote_vae.server.app import create_app
from remote_vae.server.engine import ClientGone, IsGone, Limits, NoModel, VaeEngine
from remote_vae.vae.at_work import Provider, VaeAtWork
from remote_vae.vae.fingerprint import fingerprint_of
from remote_vae.wire import FINGERPRINT_KEYS, THIS_PROCESS

log = logging.getLogger("remote_vae")


def create_shared_app(
    provider: Provider, queue_lock: AbstractContextManager[Any], token: str = "", limits: Limits | None = None
) -> ASGIApp:
    """The server's app for the VAE of a host. While the user's option is off, every path is a 404.

    Args:
        provider: the host's adapter.
        queue_lock: what the host holds while it generates.
        token: other machines must have it; without one, only programs on this machine are served.
        limits: what a request may ask for.
    """
    return _Switch(provider, create_app(SharedEngine(provider, queue_lock, limits), access=by_token_or_loopback(token)))


class _Switch:
    """Passes requests on while the option is on."""

    def __init__(self, provider: Provider, app: ASGIApp) -> None:
        self._provider = provider
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._provider.shares():
            off = JSONResponse({"error": "this UI does not share its VAE: Settings, Remote VAE, Share this UI's VAE"}, 404)
            await off(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class SharedEngine(VaeEngine):
    """The VAE that a host has loaded at the moment of the call. It takes turns with the host, and is left as it is."""

    def __init__(self, provider: Provider, queue_lock: AbstractContextManager[Any], limits: Limits | None = None) -> None:
        super().__init__(limits)
        self._provider = provider
        self._queue_lock = queue_lock

    def health(self) -> dict[str, Any]:
        """Only that it is there: whether the user generates is nobody's business."""
        return {"status": "ok"}

    def info(self) -> dict[str, Any]:
        vae = self._current()
        family = vae.family
        # None while the host has only the shapes of the weights in memory: then nothing is said.
        found = fingerprint_of(vae.module)
        return {
            "family": family.key,
            "model": vae.model,
            "dtype": str(vae.dtype).removeprefix("torch."),
            "device": vae.device.type,
            "latent_channels": family.latent_channels,
            "downscale": family.downscale,
            "scaling_factor": family.scaling_factor,
            "shift_factor": family.shift_factor,
            **({FINGERPRINT_KEYS[found[0]]: found[1]} if found else {}),
            "limits": {**asdict(self.limits), "max_total_pixels": self.limits.max_total_pixels},
            "posterior": vae.has_posterior,
            "process": THIS_PROCESS,
        }

    def _current(self) -> VaeAtWork:
        vae = self._provider.current()
        if vae is None:
            raise NoModel("no model is loaded in this UI yet: generate something first")
        return vae

    @contextmanager
    def _turn(self, is_gone: IsGone) -> Iterator[VaeAtWork]:
        with self._queue_lock:
            # A generation may have taken minutes.
            if is_gone():
                raise ClientGone("the client hung up")
            yield self._current()

    def _serving(self) -> AbstractContextManager[Any]:
        return self._provider.serving()
