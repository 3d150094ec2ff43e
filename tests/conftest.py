from __future__ import annotations

# Tests run side by side (pytest-xdist), and threads of several processes on the same cores wait for each other.
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from diffusers import AutoencoderKL

from bench.live_bytes import LiveBytes
from remote_vae.server.admission import Limits
from remote_vae.server.catalogue import Catalogue, OneVae
from remote_vae.server.engine import Engine, batch_pixels_on
from remote_vae.server.metrics import metrics
from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.server.process import Tls, make_server
from remote_vae.server.protocol import BoundedProtocol
from remote_vae.server.run import listen
from remote_vae.settings import settings_folder
from tests.chaos import Chaos
from tests.pretend_gpu import Card, pretended
from tests.versions import NO_END_OF_STORAGES

# Its own deadline of 200 ms an example is the machine's, and not a promise of ours.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")

if NO_END_OF_STORAGES:
    # The bytes that are alive cannot be counted.
    LiveBytes.__enter__ = lambda _: pytest.skip(NO_END_OF_STORAGES)  # type: ignore[method-assign]

DEMO_VAE = settings_folder().parent / "assets" / "demo_vae"


def pytest_collection_finish() -> None:
    """The objects of the libraries live to the end: looking through them takes each collection a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No test sees or sends a token of the person who runs it, nor leaves files in a home."""
    for name in ("REMOTE_VAE_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.fixture
def visited_home(tmp_path: Path) -> None:
    """transformers before 5 has been there. Where a home is new it prints that its cache is another since 2022."""
    folder = tmp_path / "home" / ".cache" / "huggingface" / "hub"
    folder.mkdir(parents=True)
    (folder / "version.txt").write_text("1")


@pytest.fixture(scope="session")
def loaded() -> LoadedVae:
    """The small trained VAE in float32 on the CPU."""
    return load_vae(str(DEMO_VAE), dtype="float32", device="cpu")


@pytest.fixture
def vae() -> AutoencoderKL:
    """A VAE of one's own, to attach to."""
    own: AutoencoderKL = AutoencoderKL.from_pretrained(DEMO_VAE, torch_dtype=torch.float32)
    return own


class ServerThread:
    """The real server on a free loopback port, in a thread. ``protocol``: other bounds of its connections."""

    def __init__(
        self,
        loaded: LoadedVae,
        token: str = "",
        limits: Limits | None = None,
        protocol: type[BoundedProtocol] | None = None,
        *,
        catalogue: Catalogue | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.loaded = loaded
        vaes, most = catalogue or OneVae(loaded, about=loaded.about), batch_pixels_on([loaded.device])
        self.engine = Engine(vaes, limits, batch_pixels=most, watcher=metrics())
        listener = listen("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.process = make_server(self.engine, token, protocol=protocol, tls=tls)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.process.serve([listener])), daemon=True)
        self._thread.start()
        while not self.process.started:
            time.sleep(0.01)

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self.process.should_exit = True
        self._thread.join(10)


@pytest.fixture(scope="session")
def server(loaded: LoadedVae) -> Iterator[ServerThread]:
    running = ServerThread(loaded)
    yield running
    running.close()


@pytest.fixture
def chaos(server: ServerThread) -> Iterator[Chaos]:
    """A misbehaving proxy before the real server."""
    proxy = Chaos(server.url)
    yield proxy
    proxy.close()


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1)) * 5


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A GPU that is pretended."""
    with torch.no_grad(), pretended(monkeypatch) as made:
        yield made
