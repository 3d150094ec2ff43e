"""What "out of memory" looks like, and how to make room."""

from __future__ import annotations

import gc
import re

import torch

_OOM_TEXT = re.compile(r"out of memory|can't allocate memory|not enough memory|alloc_cpu", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is torch's or Python's word for no memory left, on any device."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError came with torch 2.5; before, there was only CUDA's.
    if isinstance(error, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
        return True
    # The CPU allocator, MPS, XPU and DirectML raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and bool(_OOM_TEXT.search(str(error)))


def available_memory(device: torch.device) -> int | None:
    """Bytes that a computation on ``device`` could still get, or None where that cannot be told."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        # What torch has taken and does not use is free as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        # The web UIs ship it; without it the memory is found out by trying.
        import psutil
    except ImportError:
        return None
    available: int = psutil.virtual_memory().available
    return available


def free_memory() -> None:
    """Give cached device memory back, so that the next attempt starts with all there is."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif hasattr(torch, "mps") and torch.backends.mps.is_available():
        torch.mps.empty_cache()
