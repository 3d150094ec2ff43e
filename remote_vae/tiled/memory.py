"""What this machine's memory is like: what "out of memory" looks like, and how to give memory back.

All that is asked of one platform only stands here, with what it earns.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch

from remote_vae.tiled.pinned import PINNED

# The words of the CPU, CUDA and its libraries, Apple, Intel and DirectML for no memory; then those for what is too large for a
# device or for its kernels' indices, and those of cuDNN, oneDNN and MIOpen, which seldom tell why there is no way.
_OOM_TEXT = re.compile(
    r"out of memory|can't allocate memory|not enough .{0,20}memory|alloc_cpu|could not allocate|ALLOC_FAILED"
    r"|OUT_OF_(DEVICE|HOST)_MEMORY|OUT_OF_RESOURCES"
    r"|invalid buffer size|larger than 4 ?GB|INT_MAX|32.?bit index|canUse32BitIndexMath|total bytes of NDArray"
    r"|valid cuDNN algorithm|find an engine|CUDNN_STATUS_NOT_SUPPORTED|STATUS_NOT_INITIALIZED"
    r"|could not (create|construct|execute) a (primitive|memory)|miopen( error|status)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is torch's or Python's word for no memory left, or for too large, on any device."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError came with torch 2.5; before, there was only CUDA's.
    if isinstance(error, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
        return True
    # The CPU allocator, MPS, XPU and DirectML raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and bool(_OOM_TEXT.search(str(error)))


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
    # DirectML has no cache that could be emptied.
    for name in ("cuda", "xpu", "mps"):
        api: Any = getattr(torch, name, None)
        # A card that has failed says so once more, and others may still have a way.
        with suppress(RuntimeError):
            if api is not None and (torch.backends.mps if name == "mps" else api).is_available():
                api.empty_cache()
    PINNED.give_back()


def trim_heap() -> None:
    """Give back to the system what the C library keeps of freed memory, the holes between what is alive among it.

    Peak RSS of a decode without it and with it: sd 512 px 442 and 359 MB, small 1024 px in 80 MB 114 and 75 MB.
    """
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
