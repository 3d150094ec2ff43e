"""Checkpoints in one file, with the names that the original authors' files have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.e2e.checkpoints import parts
from tests.e2e.checkpoints.names import text_in_full, text_to_open_clip, unet_to_ldm
from tests.e2e.checkpoints.parts import OPEN_CLIP_TEXT, TINY, Size
from tests.original_names import to_ldm

State = Mapping[str, torch.Tensor]


def sd1(size: Size, seed: int) -> dict[str, torch.Tensor]:
    return {
        **_starting("model.diffusion_model.", _unet(parts.unet(size, seed), size)),
        **_starting("first_stage_model.", kl(parts.kl_vae(size, "sd1", seed))),
        **_starting("cond_stage_model.transformer.", text_in_full(parts.text_encoder(size.text, seed).state_dict())),
    }


def sdxl(seed: int, second: Mapping[str, Any] = OPEN_CLIP_TEXT) -> dict[str, torch.Tensor]:
    """Of the tiny size; ``second``: the configuration of its second text encoder."""
    first = text_in_full(parts.text_encoder(TINY.text, seed).state_dict())
    pooled = text_to_open_clip(parts.text_encoder(second, seed, projected=True).state_dict())
    return {
        **_starting("model.diffusion_model.", _unet(parts.xl_unet(second, seed), TINY)),
        **_starting("first_stage_model.", kl(parts.kl_vae(TINY, "sdxl", seed))),
        **_starting("conditioner.embedders.0.transformer.", first),
        **_starting("conditioner.embedders.1.model.", pooled),
    }


def kl(vae: Any) -> dict[str, torch.Tensor]:
    """An AutoencoderKL alone."""
    return to_ldm(vae.state_dict(), len(vae.config.block_out_channels))


def save(path: Path, state: State, *, half: bool = False) -> Path:
    """Write a file, in float16 if ``half``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {key: value.half() if half and value.is_floating_point() else value for key, value in state.items()}
    save_file({key: value.contiguous() for key, value in stored.items()}, path)
    return path


def _starting(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def _unet(unet: Any, size: Size) -> dict[str, torch.Tensor]:
    return unet_to_ldm(unet.state_dict(), len(size.unet), 1)
