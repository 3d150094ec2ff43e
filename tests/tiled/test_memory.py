from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from remote_vae.tiled import memory
from remote_vae.tiled.memory import available_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="asks the system in the way of POSIX")
def test_the_memory_of_the_cpu_is_some_of_what_the_machine_has() -> None:
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = available_memory(CPU)
    assert available is not None
    # In bytes: a test that runs has more than a megabyte of them.
    assert 1 << 20 < available < everything


def test_without_psutil_the_memory_of_the_cpu_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert available_memory(CPU) is None


@pytest.mark.parametrize("device", ["mps", "xpu", "privateuseone", "meta"])
def test_the_memory_of_other_devices_is_not_known(device: str) -> None:
    assert available_memory(torch.device(device)) is None


def test_on_a_gpu_what_torch_holds_and_does_not_use_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000, 24_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert available_memory(GPU) == 5_400


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 700000\nfile 300000\nkernel 1\n")
    assert memory.available_memory(torch.device("cpu")) == 2_300_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory.available_memory(torch.device("cpu")) or 0) > 2_000_000
