"""How near two results are to each other, and runs out of memory on demand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch


def psnr(result: torch.Tensor, expected: torch.Tensor) -> float:
    """In dB of the range that ``expected`` has; pixels in [-1, 1] have 2."""
    error = rmse(result, expected)
    peak = (expected.max() - expected.min()).item()
    # The range of a picture is at most 2: whatever a VAE makes beyond does not make an error smaller.
    return math.inf if error == 0 else 20 * math.log10(min(peak, 2.0) / error)


def psnr_of_moments(result: torch.Tensor, expected: torch.Tensor) -> float:
    """In dB of the standard deviation of ``expected``."""
    error = rmse(result, expected)
    return math.inf if error == 0 else 20 * math.log10(expected.double().std(correction=0).item() / error)


def rmse(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape
    return (result.double() - expected.double()).square().mean().sqrt().item()


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")


def no_room_for_the_whole(monkeypatch: pytest.MonkeyPatch, vae: Any) -> list[str]:
    """The encoder and the decoder of ``vae`` run out of memory when they are called as a whole; notes which was."""
    seen: list[str] = []
    for name in ("encoder", "decoder"):

        def run_out(*args: Any, part: str = name, **kwargs: Any) -> Any:
            seen.append(part)
            out_of_memory()

        monkeypatch.setattr(getattr(vae, name), "forward", run_out)
    return seen
