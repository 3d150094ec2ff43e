"""Channels made more and fewer, as the shortcuts of several VAEs have it."""

from __future__ import annotations

import torch


def repeated(x: torch.Tensor, *, times: int) -> torch.Tensor:
    """``[F, times * C, h, w]`` of ``[F, C, h, w]``: each channel so many times, one after the other."""
    return x.repeat_interleave(times, dim=1)


def means(x: torch.Tensor, *, groups: int) -> torch.Tensor:
    """``[F, groups, h, w]``: of the channels of each of so many groups."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:]).mean(2)
