from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from remote_vae.hosts.a1111 import adapter
from tests.hosts import a1111_standin as standin
from tests.hosts.a1111_standin import Host


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """A host with the extension in it, and no model yet."""
    log = logging.getLogger("remote_vae")
    before = list(log.handlers), list(log.filters), log.level, log.propagate
    log.handlers, log.propagate = [], True
    monkeypatch.setattr(adapter, "_problems", ())
    running = standin.install(monkeypatch, tmp_path / "data")
    adapter.router.history.clear()
    adapter.install()
    running.script_callbacks.on_model_loaded(adapter.hook)
    yield running
    adapter.uninstall()
    adapter.router.history.clear()
    log.handlers, log.filters, log.level, log.propagate = before
    assert running.offences == []
    assert adapter._thread.passing == 0
    assert adapter._thread.batch is None


@pytest.fixture
def image() -> torch.Tensor:
    """A source picture ``[1, 3, H, W]`` in [0, 1]."""
    return torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3))
