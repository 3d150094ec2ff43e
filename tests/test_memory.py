from __future__ import annotations

import os
import sys

import pytest
import torch

from remote_vae.memory import available_memory

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


def test_memory_that_is_taken_is_no_longer_available() -> None:
    before = available_memory(CPU)
    taken = torch.ones(256 << 20, dtype=torch.uint8)
    after = available_memory(CPU)
    assert before is not None
    assert after is not None
    # Other programs come and go meanwhile.
    assert before - after > taken.numel() // 4
