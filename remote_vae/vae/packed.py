"""Flux.2's packed latents: 2 x 2 cells in 128 channels, normalised by the running statistics of a BatchNorm in the VAE.

diffusers' pipelines undo that before they call the VAE; the modules of ComfyUI and Forge Neo do it within their ``decode`` and
``encode``. What is raw, here and on the wire, are the latents before: what the decoder itself takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

_PATCH = 2


@dataclass(frozen=True)
class BatchNormed:
    """Mean and deviation ``[4 C]`` of the packed channels, of one VAE."""

    mean: torch.Tensor
    deviation: torch.Tensor

    @property
    def channels(self) -> int:
        """Of packed latents."""
        return self.mean.shape[0]

    def raw(self, packed: torch.Tensor) -> torch.Tensor:
        """``[B, 4 C, h, w]`` to raw latents ``[B, C, 2 h, 2 w]``, in the dtype and on the device given.

        As ``Flux2Pipeline`` of diffusers does it, to the last bit.
        """
        mean, deviation = self._like(packed)
        return unpatched(packed * deviation + mean)

    def normed(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents ``[B, C, 2 h, 2 w]`` to ``[B, 4 C, h, w]``; the other way of ``raw``, as there."""
        mean, deviation = self._like(raw)
        return (patched(raw) - mean) / deviation

    def _like(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, deviation = (values.view(1, -1, 1, 1) for values in (self.mean, self.deviation))
        return mean.to(latents.device, latents.dtype), deviation.to(latents.device, latents.dtype)


def batch_norm_of(vae: Any) -> Optional[BatchNormed]:
    """The statistics that a VAE of Flux.2 keeps, in the dtype of its weights; None: it keeps none.

    Args:
        vae: diffusers' AutoencoderKLFlux2, or the module of ComfyUI or Forge Neo.
    """
    norm: Any = getattr(vae, "bn", None)
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or variance is None or mean.is_meta:
        return None
    return BatchNormed(mean.detach(), torch.sqrt(variance.detach() + norm.eps))


def patched(latents: torch.Tensor) -> torch.Tensor:
    """``[B, C, 2 h, 2 w]`` to ``[B, 4 C, h, w]``: the four cells of a patch row by row, in each channel."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * _PATCH**2, height // _PATCH, width // _PATCH)


def unpatched(latents: torch.Tensor) -> torch.Tensor:
    """``[B, 4 C, h, w]`` to ``[B, C, 2 h, 2 w]``, the other way of ``patched``."""
    return torch.nn.functional.pixel_shuffle(latents, _PATCH)
