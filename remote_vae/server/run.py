"""Starts the server: uvicorn around the app, on a socket that is bound before the first line is printed."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from remote_vae.errors import SettingsError
from remote_vae.server.admission import Limits
from remote_vae.server.app import create_app
from remote_vae.server.engine import Engine
from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.tokens import TOKEN_VARIABLE, is_loopback

log = logging.getLogger("remote_vae")

# A connection is kept for the next call: a generation may take minutes (seconds).
_KEEP_ALIVE = 600
# A request's head has a shape and a few headers.
_HEAD_BYTES = 32 * 1024
# Calls that run when the server is stopped may end (seconds).
_GOODBYE = 10


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
        limits: what requests may ask for.

    Raises:
        SettingsError: the VAE cannot be loaded, or the address cannot be listened on.
    """
    listener = listen(host, port)
    try:
        loaded = load_vae(vae, family=family, dtype=dtype, device=device)
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        address = f"http://{_url_host(host)}:{listener.getsockname()[1]}"
        if not token and not is_loopback(address):
            log.warning("anyone who reaches this machine can use the server; set %s to ask for a token", TOKEN_VARIABLE)
        name = f"{loaded.family.label}, {str(loaded.dtype).removeprefix('torch.')} on {loaded.device.type}"
        server = make_server(loaded, token, limits)
        print(f"Remote VAE serves {name} on {address}", flush=True)
        server.run(sockets=[listener])
    finally:
        listener.close()


def make_server(loaded: LoadedVae, token: str = "", limits: Limits | None = None, protocol: type | None = None) -> Any:
    """The uvicorn around the app, bounded in all that a client may ask of it. ``protocol``: other bounds of connections."""
    import uvicorn

    from remote_vae.server.protocol import BoundedProtocol

    engine = Engine(loaded, limits, about=loaded.about)
    config = uvicorn.Config(
        create_app(engine, token),
        http=protocol or BoundedProtocol,
        log_config=None,
        ws="none",
        lifespan="off",
        # What it has to say is an answer of 400 for the client, or a client that hung up.
        log_level="error",
        access_log=False,
        # Who calls is in the log, and a client must not be able to choose what stands there.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GOODBYE,
        h11_max_incomplete_event_size=_HEAD_BYTES,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SettingsError: the address is taken, or is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's delay off only where the protocol is named: without, every small answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name != "nt":
            # On Windows this would let another program take the same port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # From here on clients queue instead of being refused, so the printed line can be relied on.
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"cannot listen on {host} port {port}: {why}; choose another with --port") from None
    return listener


def _url_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
