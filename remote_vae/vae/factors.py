"""The two kinds of latents, the model's and the raw ones that its VAE takes: one into the other by the VAE's own numbers.

Each family's formula is that of its pipelines in diffusers, operation by operation: the results are equal to the last bit.
"""

from __future__ import annotations

from typing import Optional

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family

# Pipelines that divide by 1 / std and multiply with it (WanPipeline and WanVideoToVideoPipeline, QwenImage's too),
# where the others take std itself. Those that edit with the VAE of Qwen-Image encode as the others, which rounds otherwise.
_BY_RECIPROCAL_STD = frozenset({"AutoencoderKLWan", "AutoencoderKLQwenImage"})
# CogVideoXPipeline multiplies with 1 / scaling_factor.
_BY_RECIPROCAL_FACTOR = frozenset({"AutoencoderKLCogVideoX"})
# CosmosTextToWorldPipeline divides by a number of its scheduler, which no VAE knows.
_BY_SCHEDULER = frozenset({"AutoencoderKLCosmos"})

Statistics = tuple[torch.Tensor, torch.Tensor]


def raw_of(latents: torch.Tensor, family: Family) -> torch.Tensor:
    """Model latents ``[B, C, h, w]`` or ``[B, C, F, h, w]`` to raw ones, in their own dtype.

    Raises:
        InvalidRequest: the VAE does not know all the numbers.
    """
    statistics = _statistics(latents, family)
    if statistics is not None:
        mean, std = statistics
        if _is_of(family, _BY_RECIPROCAL_STD):
            return latents / (1.0 / std) + mean
        return latents * std / family.scaling_factor + mean
    if _is_of(family, _BY_RECIPROCAL_FACTOR):
        return 1 / family.scaling_factor * latents
    latents = latents / family.scaling_factor
    return latents + family.shift_factor if family.shift_factor else latents


def model_of(raw: torch.Tensor, family: Family) -> torch.Tensor:
    """Raw latents to model latents, the other way of ``raw_of``. Raises as there."""
    statistics = _statistics(raw, family)
    if statistics is not None:
        mean, std = statistics
        if _is_of(family, _BY_RECIPROCAL_STD):
            return (raw - mean) * (1.0 / std)
        return (raw - mean) * family.scaling_factor / std
    return (raw - family.shift_factor if family.shift_factor else raw) * family.scaling_factor


def _statistics(latents: torch.Tensor, family: Family) -> Optional[Statistics]:
    """Mean and deviation of the channels, in the dtype and on the device of ``latents``; None: the VAE has none."""
    if _is_of(family, _BY_SCHEDULER):
        raise InvalidRequest(f"latents of {family.label} are scaled by its scheduler: scale them there, and send raw latents")
    if not (family.latents_mean and family.latents_std):
        return None
    shape = 1, -1, *(1,) * (latents.ndim - 2)
    mean, std = (torch.tensor(values).view(shape) for values in (family.latents_mean, family.latents_std))
    return mean.to(latents.device, latents.dtype), std.to(latents.device, latents.dtype)


def _is_of(family: Family, classes: frozenset[str]) -> bool:
    return not classes.isdisjoint(family.classes)
