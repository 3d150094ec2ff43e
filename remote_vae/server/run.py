"""Starts the server: uvicorn around the app, on a socket that is bound before the first line is printed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from remote_vae.errors import SettingsError
from remote_vae.server.addresses import endpoints
from remote_vae.server.admission import Limits
from remote_vae.server.app import create_app
from remote_vae.server.catalogue import OneVae
from remote_vae.server.engine import Engine
from remote_vae.server.metrics import metrics
from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.tokens import TOKEN_VARIABLE, is_loopback

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
    """Load the VAE and answer requests until interrupted.

    Prints that it loads, and when it is ready a line for each address, as it is typed into the UI.

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
        print(f"loading {vae} ...", flush=True)
        loaded = load_vae(vae, family=family, dtype=dtype, device=device)
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        addresses = endpoints(listener, host)
        server = make_server(loaded, token, limits, addresses=addresses)
        print("\n".join(_ready(loaded, addresses, token)), flush=True)
        server.run(sockets=[listener])
    finally:
        listener.close()


def _ready(loaded: LoadedVae, addresses: Sequence[str], token: str) -> Iterator[str]:
    """What is printed when clients can call."""
    name = f"{loaded.family.label}, {str(loaded.dtype).removeprefix('torch.')} on {loaded.device.type}"
    yield f"Remote VAE serves {name}. Enter in your UI, under Settings, Remote VAE{', one of these' if addresses[1:] else ''}:"
    for address in addresses:
        yield f"Endpoint: {address}"
    if all(map(is_loopback, addresses)):
        yield "Only programs on this machine reach it; for other machines add --host 0.0.0.0"
    elif not token:
        yield f"Whoever reaches this machine can use it; to ask for a token, set {TOKEN_VARIABLE} here and where your UI runs"
    if token:
        yield f"It asks for the token in {TOKEN_VARIABLE}: set the same where your UI runs"


def make_server(
    loaded: LoadedVae,
    token: str = "",
    limits: Limits | None = None,
    protocol: type | None = None,
    addresses: Sequence[str] = (),
) -> Any:
    """The uvicorn around the app, bounded in all that a client may ask of it.

    Args:
        loaded, token, limits: as in ``serve``.
        protocol: other bounds of connections.
        addresses: under which it is reached.
    """
    import uvicorn

    from remote_vae.server.protocol import BoundedProtocol

    engine = Engine(OneVae(loaded, about=loaded.about), limits, watcher=metrics())
    config = uvicorn.Config(
        create_app(engine, token, endpoints=addresses),
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
