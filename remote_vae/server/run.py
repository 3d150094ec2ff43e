"""``remote-vae serve``: a socket that is bound before the first line is printed, the VAEs, and the process around them."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from remote_vae.errors import SettingsError
from remote_vae.server.addresses import endpoints
from remote_vae.server.admission import Closed
from remote_vae.server.config import ServerConfig
from remote_vae.server.engine import Engine, batch_pixels_on
from remote_vae.server.fast import Fast
from remote_vae.server.metrics import metrics
from remote_vae.server.models import LoadedVae, devices_of
from remote_vae.server.own import OwnVaes
from remote_vae.server.page import lines_to_enter
from remote_vae.server.process import Server, Tls, make_server
from remote_vae.tokens import TOKEN_VARIABLE, is_loopback
from remote_vae.vae.families import load_families

log = logging.getLogger("remote_vae")

_LOADING = Closed("loading", "this server is loading its VAE")
# For threads to end that have nothing left to do (seconds).
_END_SECONDS = 5.0


def serve(config: ServerConfig) -> None:
    """Load the VAEs and answer requests until interrupted.

    While they are loaded it already answers, that it is not ready yet. Prints that it loads, and when it is ready a line for
    each address, as it is typed into the UI.

    Raises:
        SettingsError: a VAE cannot be loaded, the address cannot be listened on, or what was said makes no sense.
    """
    token, tls = config.token(), _tls(config)
    listener = listen(config.host, config.port)
    try:
        devices = devices_of(",".join(config.device))
        fast = Fast(config.fast, config.sizes)
        vaes = OwnVaes(config.vaes, devices=devices, load=partial(_loaded, fast, shows_device=len(devices) > 1))
        batch_pixels = batch_pixels_on(devices) if config.batch_pixels is None else config.batch_pixels
        engine = Engine(vaes, config.limits, batch_pixels=batch_pixels, batch_wait=config.batch_wait, watcher=metrics())
        engine.admission.closed = _LOADING
        addresses = endpoints(listener, config.host, "https" if tls else "http")
        server = make_server(engine, token, addresses=addresses, tls=tls)
        start = _Start(config, vaes, engine, server, fast)
        start.after(lambda: print("\n".join(_ready(engine, config, addresses, token)), flush=True))
        server.run(sockets=[listener])
        start.check()
        _end(engine, vaes)
    finally:
        listener.close()


class _Start:
    """Loads what is to be loaded at the start, beside the server, which answers that it is not ready yet."""

    def __init__(self, config: ServerConfig, vaes: OwnVaes, engine: Engine, server: Server, fast: Fast) -> None:
        self._config, self._vaes, self._engine, self._server, self._fast = config, vaes, engine, server, fast
        self._error: Exception | None = None

    def after(self, ready: Any) -> None:
        """Begin, and call ``ready`` when it is done."""
        # No thread that the process waits for: who interrupts it means it.
        threading.Thread(target=self._run, args=(ready,), name="remote-vae-start", daemon=True).start()

    @property
    def _loads_all(self) -> bool:
        # Nobody is to wait for a compiler.
        return self._config.preload or self._config.fast == "compile"

    def _run(self, ready: Any) -> None:
        while not self._server.started and not self._server.is_stopping:
            # From then on a signal ends it well, and who asks hears that it loads.
            time.sleep(0.01)
        try:
            self._vaes.start(preload=self._loads_all)
            self._fast.is_starting = False
            if self._engine.admission.closed is _LOADING:
                self._engine.admission.closed = None
                ready()
        except Exception as error:
            self._error = error
            self._server.should_exit = True

    def check(self) -> None:
        """Raises what has kept it from being ready."""
        if self._error is not None:
            raise self._error


def _loaded(fast: Fast, source: str, *, shows_device: bool, **options: Any) -> LoadedVae:
    """As ``fast.load``; who watches the start sees what it is at."""
    if fast.is_starting:
        where = f" on {options['device']}" if shows_device else ""
        more = ", and compiling it, which takes minutes" if fast.mode == "compile" else ""
        print(f"loading {source}{where}{more} ...", flush=True)
    return fast.load(source, **options)


def _end(engine: Engine, vaes: OwnVaes) -> None:
    """End the threads; those that still load a VAE, or work for nobody any more, end with the process."""

    def close() -> None:
        vaes.close()
        engine.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(_END_SECONDS)
    if closing.is_alive() or any(map(vaes.is_loading, vaes.entries())):
        log.warning("stopped while a VAE was at work, or being loaded")
        logging.shutdown()
        # The interpreter would wait for them.
        os._exit(0)


def _tls(config: ServerConfig) -> Tls | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    tls = Tls(config.tls_cert, config.tls_key)
    tls.check()
    return tls


def _ready(engine: Engine, config: ServerConfig, addresses: Sequence[str], token: str) -> Iterator[str]:
    """What is printed when clients can call."""
    models = engine.info()["models"]
    names = ", ".join(map(_named, models)) if models[1:] else _described(models[0])
    yield f"Remote VAE serves {names}. Enter in your UI, under Settings, Remote VAE{', one of these' if addresses[1:] else ''}:"
    yield from lines_to_enter(addresses)
    if models[1:]:
        yield "It picks the VAE of your model. For one of them alone, whatever a client names:"
        for model in models:
            yield from lines_to_enter(addresses, model["name"])
    yield from _who_may(config, addresses, token)


def _who_may(config: ServerConfig, addresses: Sequence[str], token: str) -> Iterator[str]:
    if config.tls_cert:
        yield "It speaks https: enter a name or an address that its certificate is made for"
    if all(map(is_loopback, addresses)):
        yield "Only programs on this machine reach it; for other machines add --host 0.0.0.0"
    elif not token:
        yield f"Whoever reaches this machine can use it; to ask for a token, set {TOKEN_VARIABLE} here and where your UI runs"
    if token and config.token_file:
        yield f"It asks for the token in {config.token_file}: set {TOKEN_VARIABLE} to it where your UI runs"
    elif token:
        yield f"It asks for the token in {TOKEN_VARIABLE}: set the same where your UI runs"


def _named(model: dict[str, Any]) -> str:
    return f"{model['name']} ({_described(model)})"


def _described(model: dict[str, Any]) -> str:
    """Of one that was never loaded no more than a few things are known."""
    known = load_families().get(model.get("family", ""))
    label = known.label if known else "custom VAE" if "family" in model else ""
    where = f"{model['dtype']} on {model['device']}" if "dtype" in model else "loaded when it is asked for"
    return ", ".join(filter(None, (label, where)))


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
