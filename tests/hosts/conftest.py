"""A host with the extension, a real server with the same VAE, and a proxy between them that fails on demand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae.server.models import LoadedVae
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.hosts.a1111_standin import A1111Host
from tests.hosts.forge_kin_standin import ErsatzHost, NeoHost, ReforgeHost
from tests.hosts.forge_standin import ForgeHost
from tests.hosts.of_families import proxies
from tests.hosts.sdnext_standin import SdnextHost
from tests.hosts.standin import OWN, Host, Pictures, put_in_place, source

# Of those that came of Forge, whose adapters are one, the one that people use now keeps the whole contract.
HOSTS: dict[str, type[Host]] = {"a1111": A1111Host, "neo": NeoHost, "sdnext": SdnextHost}
FORGES: dict[str, type[Host]] = {"forge": ForgeHost, "neo": NeoHost, "ersatz": ErsatzHost, "reforge": ReforgeHost}
ALL = {**HOSTS, **FORGES}
# One picture; a batch; a batch of one source.
WAYS = {
    "txt2img": lambda host: host.txt2img(),
    "batch": lambda host: host.txt2img(batch=3),
    "img2img": lambda host: host.img2img(source(3)),
}


@dataclass(frozen=True)
class Made:
    """What a generation gave: the pictures, the lines below them, and where the global generator was afterwards."""

    pictures: Pictures
    infotexts: list[str]
    rng: torch.Tensor


def make(host: Host, way: str) -> Made:
    """One generation, from a known state of the global generator."""
    torch.manual_seed(5)
    pictures = WAYS[way](host)
    return Made(pictures, list(host.infotexts), torch.get_rng_state())


class Endpoint(Chaos):
    """With one more ``mode``: "shape" answers with the bytes of a picture that lies on its side."""

    def _send(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        if self.mode == "shape" and handler.command == "POST":
            *head, high, wide = headers["shape"].strip("[]").split(", ")
            headers = {**headers, "shape": f"[{', '.join([*head, wide, high])}]"}
        super()._send(handler, status, headers, body)


@pytest.fixture(scope="module", params=HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(name: str, loaded: LoadedVae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """What the host makes without the extension, by the names of ``WAYS``."""
    with pytest.MonkeyPatch.context() as patch:
        host = ALL[name](loaded.vae, tmp_path_factory.mktemp(name))
        put_in_place(patch, host)
        return {way: make(host, way) for way in WAYS}


@pytest.fixture
def bare(name: str, loaded: LoadedVae, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """A host before its extensions are loaded; afterwards nothing of ours may be left in it."""
    log = logging.getLogger("remote_vae")
    before = list(log.handlers), list(log.filters), log.level, log.propagate
    # Where somebody listens already, the extension adds no handler; and pytest listens at the root.
    log.handlers, log.propagate = [logging.NullHandler()], True
    log.setLevel(logging.INFO)
    host = ALL[name](loaded.vae, tmp_path)
    put_in_place(monkeypatch, host)
    monkeypatch.setattr(host.adapter, "_problems", ())
    host.adapter.router.history.clear()
    yield host
    host.adapter.uninstall()
    host.adapter.router.history.clear()
    log.handlers, log.filters, log.level, log.propagate = before
    own = {op: vars(AutoencoderKL)[op] for op in OWN}
    for op, function in OWN.items():
        setattr(AutoencoderKL, op, function)
    assert own == OWN
    assert not [place for place, value in host.callables().items() if hasattr(value, "remote_vae_adapter")]
    assert host.shared.reads == 0
    thread = host.adapter._thread
    assert (thread.generation, getattr(thread, "batch", None)) == (None, None)
    assert not host.adapter.own_calls.are_passed_on


@pytest.fixture
def host(bare: Host) -> Host:
    """A host with the extension in it, as its own script loads it."""
    bare.load_extension()
    return bare


# One that lives for the whole file: to stop one takes half a second.
@pytest.fixture(scope="module")
def proxy(server: ServerThread) -> Iterator[Endpoint]:
    running = Endpoint(server.url)
    yield running
    running.close()


@pytest.fixture
def endpoint(proxy: Endpoint) -> Iterator[Endpoint]:
    """The way to the real server. Whether it says who it is does not fail with its VAE calls."""
    proxy.released, proxy.info, proxy.drops = threading.Event(), "pass", ()
    proxy.reset("pass")
    yield proxy
    proxy.released.set()


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], Chaos]]:
    with proxies() as proxy:
        yield proxy


@pytest.fixture
def served(servers: Callable[[str], Chaos], family: str) -> Iterator[Chaos]:
    """The way to the real server of that ``family``'s VAE."""
    proxy = servers(family)
    proxy.reset("pass")
    yield proxy
    proxy.reset("pass")
