"""The process of a server: uvicorn around the app, bounded in all that a client may ask of it, and its end."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import uvicorn

from remote_vae.errors import SettingsError
from remote_vae.server.admission import Closed
from remote_vae.server.app import create_app
from remote_vae.server.engine import Engine
from remote_vae.server.protocol import BoundedProtocol

log = logging.getLogger("remote_vae")

# A connection is kept for the next call: a generation may take minutes (seconds).
_KEEP_ALIVE = 600
# A request's head has a shape and a few headers.
_HEAD_BYTES = 32 * 1024
# What has begun when the server is stopped may take so long to end (seconds), and then its answer to be read.
_GOODBYE = 30.0
_LAST_BYTES = 5


class Tls(NamedTuple):
    """Files in PEM: the certificate with its chain, and its key."""

    cert: str
    key: str

    def check(self) -> None:
        """Raises SettingsError: no server can speak https with them."""

        def no_password() -> str:
            raise SettingsError(f"--tls-key {self.key} has a password: name one without, readable by the server alone")

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, no_password)
        except SettingsError:
            raise
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            raise SettingsError(f"--tls-cert {self.cert} and --tls-key {self.key} cannot be used: {why}") from None


def make_server(
    engine: Engine,
    token: str = "",
    *,
    protocol: type | None = None,
    addresses: Sequence[str] = (),
    tls: Tls | None = None,
) -> Server:
    """The uvicorn around the app of ``engine``.

    Args:
        engine: the VAEs.
        token: that clients must have; "": none.
        protocol: other bounds of connections.
        addresses: under which it is reached.
        tls: speak https.
    """
    config = uvicorn.Config(
        create_app(engine, token, endpoints=addresses),
        http=protocol or BoundedProtocol,
        ssl_certfile=tls.cert if tls else None,
        ssl_keyfile=tls.key if tls else None,
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
        timeout_graceful_shutdown=_LAST_BYTES,
        h11_max_incomplete_event_size=_HEAD_BYTES,
    )
    return Server(config, engine)


class Server(uvicorn.Server):  # type: ignore[misc]  # of a module whose types are not read
    """At the first signal it lets nobody in any more, and goes when those who are in have an answer; at the second at once."""

    def __init__(self, config: Any, engine: Engine) -> None:
        super().__init__(config)
        self._admission = engine.admission
        self._until: float | None = None

    @property
    def is_stopping(self) -> bool:
        return self._until is not None or bool(self.should_exit)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGINT, SIGTERM, on Windows Ctrl+Break as well."""
        del sig, frame
        if self._until is not None:
            self.should_exit = self.force_exit = True
        else:
            self.stop()

    def stop(self) -> None:
        """End what has begun, as far as it takes no longer than half a minute, and go. Nobody is let in meanwhile."""
        self._admission.closed = Closed("stopping", "this server is being stopped")
        self._until = time.monotonic() + _GOODBYE

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to go."""
        is_time: bool = await super().on_tick(counter)
        if is_time or self._until is None:
            return is_time
        if time.monotonic() > self._until:
            log.warning("stopped with calls that have not ended in %.0f s", _GOODBYE)
            return True
        return self._admission.is_empty
