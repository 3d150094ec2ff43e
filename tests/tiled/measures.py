"""How far one result is from another."""

from __future__ import annotations

import math

import torch


def psnr(ours: torch.Tensor, theirs: torch.Tensor, peak: float = 2.0) -> float:
    """Of pixels in [-1, 1]; infinite for equal ones."""
    error = rmse(ours, theirs)
    return 20 * math.log10(peak / error) if error else math.inf


def psnr_of_moments(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Against the deviation of ``theirs``."""
    return psnr(ours, theirs, theirs.double().std(correction=0).item() or 1.0)


def rmse(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).square().mean().sqrt().item()
