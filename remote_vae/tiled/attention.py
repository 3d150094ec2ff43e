"""Attention over a whole picture in portions, so that it can be interrupted, at the speed of one large call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil, isfinite

import torch
from torch.nn.functional import scaled_dot_product_attention

# The blocks of torch's FlashAttention for processors. With fewer than three blocks of queries it makes smaller ones, and is a
# third slower.
_QUERIES, _KEYS, _BLOCKS = 256, 512, 3
# Where a portion is smaller: how many queries a thread takes at a time.
_FEW_QUERIES = 32

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], "tuple[torch.Tensor, torch.Tensor]"]


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    flops: float,
    scores_bytes: int,
    tick: Callable[[float], None],
) -> torch.Tensor:
    """``softmax(queries keys^T / sqrt(d)) values``.

    Args:
        queries: ``[B, heads, n, d]``.
        keys, values: ``[B, heads, N, d]``.
        flops: how many there may be between two ticks.
        scores_bytes: how large the scores of a portion may be, which torch may compute as a whole.
        tick: called with the floating point operations that were done.

    Returns:
        ``[B, heads, n, d]``.
    """
    pictures, heads, positions, channels = keys.shape
    heads *= pictures
    of_a_pair = 4.0 * heads * channels
    threads = torch.get_num_threads()
    mixed = torch.empty_like(queries)
    # In half precision what a part of the keys gives would be rounded once more.
    kernel = _kernel() if keys.device.type == "cpu" and keys.dtype == torch.float32 and isfinite(flops) else None
    # No thread should wait for another.
    if kernel is not None:
        portion = _QUERIES * threads * ceil(_BLOCKS / threads)
    else:
        portion = max(1, int(min(flops / (of_a_pair * positions), scores_bytes / (heads * positions * 4))))
        few = _FEW_QUERIES * threads
        portion -= portion % few if portion > few else 0
    for some, out in zip(torch.split(queries, portion, 2), torch.split(mixed, portion, 2), strict=True):
        if kernel is None:
            out.copy_(scaled_dot_product_attention(some, keys, values))
            tick(of_a_pair * some.shape[2] * positions)
            continue
        # What each part of the keys gives, by its share of the softmax's sum (FlashAttention, arXiv 2205.14135).
        sums = out.zero_().new_full(out.shape[:3], -torch.inf)
        count = max(_KEYS, int(flops / (of_a_pair * some.shape[2])))
        for some_keys, some_values in zip(torch.split(keys, count, 2), torch.split(values, count, 2), strict=True):
            more, more_sums = kernel(some, some_keys, some_values)
            both = torch.logaddexp(sums, more_sums)
            out.mul_((sums - both).exp_().unsqueeze(3)).addcmul_(more, (more_sums - both).exp_().unsqueeze(3))
            sums = both
            tick(of_a_pair * some.shape[2] * some_keys.shape[2])
    return mixed


@cache
def _kernel() -> Kernel | None:
    """FlashAttention of torch for processors, which gives the logarithms of the softmax's sums as well.

    It is not torch's public interface: so it is asked once whether it does that. None where it does not.
    """
    tokens = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    queries, keys, values = tokens.unbind()
    scores = queries @ keys.transpose(2, 3) / 8**0.5
    true = (scores.softmax(3) @ values, scores.logsumexp(3))
    try:
        kernel: Kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
        given = kernel(queries, keys, values)
        right = all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(given, true, strict=True))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return kernel if right else None
