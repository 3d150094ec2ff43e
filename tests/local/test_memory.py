"""What is free on a device, and what limits it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from remote_vae.local import memory
from remote_vae.local.memory import available_memory
from remote_vae.tiled import host_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def raising(*_: object) -> object:
    raise RuntimeError("the driver has gone away")


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


def test_psutil_that_cannot_tell_leaves_the_memory_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", raising)
    assert available_memory(CPU) is None


@pytest.mark.parametrize("question", ["mem_get_info", "memory_reserved"])
def test_a_card_that_cannot_tell_leaves_the_memory_unknown(monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000, 24_000))
    monkeypatch.setattr(torch.cuda, question, raising)
    assert available_memory(GPU) is None


@pytest.mark.parametrize("device", ["mps", "privateuseone", "meta"])
def test_the_memory_of_other_devices_is_not_known(device: str) -> None:
    assert available_memory(torch.device(device)) is None


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_on_a_gpu_what_torch_holds_and_does_not_use_counts_as_free(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # torch 2.1 has no torch.xpu.
    card = getattr(torch, kind, SimpleNamespace())
    monkeypatch.setattr(torch, kind, card, raising=False)
    monkeypatch.setattr(card, "mem_get_info", lambda device: (5_000, 24_000), raising=False)
    monkeypatch.setattr(card, "memory_reserved", lambda device: 700, raising=False)
    monkeypatch.setattr(card, "memory_allocated", lambda device: 300, raising=False)
    assert available_memory(torch.device(kind, 0)) == 5_400


def test_a_card_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(device: torch.device) -> tuple[int, int]:
        # As torch 2.1.
        if device.index is None:
            raise ValueError("Expected a torch.device with a specified index or an integer, but got:cuda")
        return 5_000 + device.index, 24_000

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert available_memory(torch.device("cuda")) == 5_001


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 700000\nfile 300000\nkernel 1\n")
    assert memory.available_memory(torch.device("cpu")) == 2_300_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory.available_memory(torch.device("cpu")) or 0) > 2_000_000


# --- what limits it --------------------------------------------------------------------------------------------------------


def card(monkeypatch: pytest.MonkeyPatch, kind: str = "cuda", *, fraction: float | None = None) -> None:
    """One of 24,000 bytes, of which others have 4,000; this process has taken 9,000 and uses 6,000."""
    # torch 2.1 has no torch.xpu.
    api = getattr(torch, kind, SimpleNamespace())
    monkeypatch.setattr(torch, kind, api, raising=False)
    faces = {
        "mem_get_info": lambda device: (11_000, 24_000),
        "memory_reserved": lambda device: 9_000,
        "memory_allocated": lambda device: 6_000,
        "current_device": lambda: 0,
    }
    for name, face in faces.items():
        monkeypatch.setattr(api, name, face, raising=False)
    if fraction is None:
        monkeypatch.delattr(api, "get_per_process_memory_fraction", raising=False)
    else:
        monkeypatch.setattr(api, "get_per_process_memory_fraction", lambda device: fraction, raising=False)


@pytest.mark.parametrize(
    ("fraction", "available"),
    [
        (1.0, 14_000),
        # 12,000 may be taken, 3,000 more than are; and what is taken and not used.
        (0.5, 3_000 + 3_000),
        # It was set when more than that was taken.
        (0.25, 3_000),
    ],
)
@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_fraction_that_a_process_is_held_to_counts_as_the_size_of_the_card(
    monkeypatch: pytest.MonkeyPatch, kind: str, fraction: float, available: int
) -> None:
    card(monkeypatch, kind, fraction=fraction)
    assert available_memory(torch.device(kind, 0)) == available


OLD = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU {card} has a total capacty of 23.69 GiB of which 22.00 GiB is free. "
    "Including non-PyTorch memory, this process has 1.20 GiB memory in use. {limit}Of the allocated memory 1.00 KiB is "
    "allocated by PyTorch, and 3.00 KiB is reserved by PyTorch but unallocated."
)


def test_before_torch_tells_the_fraction_it_is_what_an_error_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.1 to 2.6."""
    monkeypatch.setattr(memory, "_heard", memory._Limits())
    card(monkeypatch)
    assert available_memory(GPU) == 14_000
    memory.heard_out_of_memory(torch.cuda.OutOfMemoryError(OLD.format(card=0, limit="10.00 KiB allowed; ")))
    assert available_memory(GPU) == 10 * 1024 - 9_000 + 3_000
    assert available_memory(torch.device("cuda")) == available_memory(GPU)
    assert available_memory(torch.device("cuda", 1)) == 14_000
    memory.heard_out_of_memory(RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"))
    assert available_memory(GPU) == 10 * 1024 - 9_000 + 3_000
    # Somebody has taken the limit away.
    memory.heard_out_of_memory(torch.cuda.OutOfMemoryError(OLD.format(card=0, limit="")))
    assert available_memory(GPU) == 14_000


def test_an_allocator_that_knows_no_fraction_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, fraction=0.5)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", raising)
    assert available_memory(GPU) == 14_000


def test_of_an_intel_card_that_does_not_tell_what_is_free_all_that_is_not_taken_is(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "xpu", fraction=1.0)
    monkeypatch.setattr(torch.xpu, "mem_get_info", raising)

    class Properties:
        total_memory = 24_000

    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties, raising=False)
    assert available_memory(torch.device("xpu", 0)) == 24_000 - 6_000


@pytest.mark.parametrize(
    ("ratio", "free", "available"),
    [
        (None, 1 << 40, 16_000 - 6_000),
        # It lets the system swap, or is no limit at all.
        ("1.7", 1 << 40, 16_000 - 6_000),
        ("0.0", 1 << 40, 16_000 - 6_000),
        ("0.5", 1 << 40, 8_000 - 6_000),
        # Other programs have the rest.
        (None, 700, 700 + 1_000),
        ("0.25", 1 << 40, 1_000),
    ],
)
def test_of_apples_memory_there_is_what_metal_recommends_and_other_programs_leave(
    monkeypatch: pytest.MonkeyPatch, ratio: str | None, free: int, available: int
) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16_000, raising=False)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7_000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 6_000)

    class Memory:
        available = free

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    if ratio is None:
        monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    else:
        monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", ratio)
    assert available_memory(torch.device("mps")) == available


@pytest.mark.parametrize(
    ("platform", "device", "hip", "expected"),
    [
        ("win32", "cuda", None, True),
        ("win32", "cuda", "6.2", False),
        ("win32", "xpu", None, False),
        ("win32", "cpu", None, False),
        ("linux", "cuda", None, False),
    ],
)
def test_on_windows_nvidias_driver_goes_on_in_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch, platform: str, device: str, hip: str | None, expected: bool
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert memory.spills(torch.device(device)) is expected
