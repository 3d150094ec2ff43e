"""What this machine's processor is good at."""

from __future__ import annotations

from functools import cache

import torch


@cache
def is_fast_at_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 (AMX, AVX512-BF16). Without them it is slower than float32."""
    # Their names have no public form; torch before 2.4 does not tell at all.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(test() for test in tests if test is not None)
