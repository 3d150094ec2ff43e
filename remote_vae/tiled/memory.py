"""What "out of memory" looks like, and how to make room."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
# The CPU's, CUDA's and its libraries', Apple's, Intel's and DirectML's words for it.
_OOM_TEXT = re.compile(
    r"out of memory|can't allocate memory|not enough .{0,20}memory|alloc_cpu|could not allocate|ALLOC_FAILED"
    r"|valid cuDNN algorithm|find an engine|OUT_OF_(DEVICE|HOST)_MEMORY|OUT_OF_RESOURCES",
    re.IGNORECASE,
)


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
    return min(available, _container_memory(available))


def _container_memory(otherwise: int) -> int:
    """Bytes that the limit of the container (cgroup v2) leaves, which psutil does not know of."""
    try:
        limit, used, stat = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
        # The cache of files is let go of when memory is wanted.
        cached = next(int(line.split()[1]) for line in stat.splitlines() if line.startswith("file "))
        return max(0, int(limit) - int(used) + cached)
    except (OSError, ValueError, StopIteration):
        # No container, or none with a limit ("max").
        return otherwise


def forget_frames(error: BaseException) -> None:
    """Let go of what ``error`` and its causes came through: their frames hold the tensors that filled the memory."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            pending += [each.__cause__, each.__context__]


def free_memory() -> None:
    """Give cached device memory back, so that the next attempt starts with all there is."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free_pinned_memory()
    elif hasattr(torch, "mps") and torch.backends.mps.is_available():
        torch.mps.empty_cache()


def free_pinned_memory() -> None:
    """Give back what torch keeps of the host's memory that was pinned for copies: the system cannot swap it out.

    torch before 2.5 keeps it for good.
    """
    empty = getattr(torch._C, "_host_emptyCache", None)  # noqa: SLF001
    if empty is not None:
        empty()


def trim_heap() -> None:
    """Give back to the system what the C library keeps of freed memory."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; others have none, or ways of their own."""
    try:
        function = ctypes.CDLL(None).malloc_trim if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return function


@cache
def is_fast_at_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 (AMX, AVX512-BF16). Without them it is slower than float32."""
    # Their names have no public form; torch before 2.4 does not tell at all.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(test() for test in tests if test is not None)
