"""Starts the server: uvicorn around the app, on a socket that is bound before the first line is printed."""

from __future__ import annotations

import logging
import os
import socket

from remote_vae.errors import SettingsError
from remote_vae.server.app import create_app
from remote_vae.server.engine import Engine, Limits
from remote_vae.server.models import load_vae
from remote_vae.tokens import TOKEN_VARIABLE, is_loopback

log = logging.getLogger("remote_vae")


def serve(
    vae: str,
    *,
    family: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = 7870,
    limits: Limits | None = None,
) -> None:
    """Load the VAE and answer requests until interrupted. Prints one line with the address when it is ready.

    Args:
        vae, family, dtype, device: see ``load_vae``.
        host: address to listen on; 0.0.0.0 for every network of this machine.
        port: 0 for any free port.

    Raises:
        SettingsError: the VAE cannot be loaded, or the address cannot be listened on.
    """
    import uvicorn

    listener = _listen(host, port)
    try:
        loaded = load_vae(vae, family=family, dtype=dtype, device=device)
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        address = f"http://{_url_host(host)}:{listener.getsockname()[1]}"
        if not token and not is_loopback(address):
            log.warning("anyone who reaches this machine can use the server; set %s to ask for a token", TOKEN_VARIABLE)
        server = uvicorn.Server(uvicorn.Config(create_app(Engine(loaded, limits or Limits()), token), log_level="warning"))
        name = f"{loaded.family.label}, {str(loaded.dtype).removeprefix('torch.')} on {loaded.device.type}"
        print(f"Remote VAE serves {name} on {address}", flush=True)
        server.run(sockets=[listener])
    finally:
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # From here on clients queue instead of being refused, so the printed line can be relied on.
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port") from None
    return listener


def _url_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
