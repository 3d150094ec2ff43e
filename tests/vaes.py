"""Small VAEs of other families with random weights, as a server would have loaded them."""

from __future__ import annotations

import diffusers
import torch

from remote_vae.server.models import LoadedVae
from remote_vae.vae.families import find_family
from remote_vae.vae.fingerprint import ROUNDINGS, fingerprint


def small_kl(family: str, **changes: object) -> diffusers.AutoencoderKL:
    """An AutoencoderKL with four levels, 32 groups and the factors of ``family``."""
    torch.manual_seed(7)
    known = find_family(family)
    config = {
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": known.latent_channels,
        "scaling_factor": known.scaling_factor,
        "shift_factor": known.shift_factor or None,
        "norm_num_groups": 32,
        **changes,
    }
    return diffusers.AutoencoderKL(**config).eval().requires_grad_(False)


def loaded(vae: torch.nn.Module, family: str) -> LoadedVae:
    names = {rounding: fingerprint(vae.state_dict(), rounding) for rounding in ROUNDINGS}
    return LoadedVae(vae, find_family(family), family, names)


def tiny_flux() -> LoadedVae:
    return loaded(small_kl("flux", use_quant_conv=False, use_post_quant_conv=False), "flux")


def tiny_video() -> LoadedVae:
    torch.manual_seed(7)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(32, 32, 32, 32), layers_per_block=1, norm_num_groups=32, latent_channels=16
    )
    return loaded(vae.eval().requires_grad_(False), "hunyuan-video")
