"""The VAEs of random weights that are measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from remote_vae.server.models import LoadedVae

# Widths of Stable Diffusion's VAE, and of one for a processor.
SD = (128, 256, 512, 512)
NARROW = (32, 64, 64, 64)


def random_vae(widths: tuple[int, ...], tile: int = 512) -> Any:
    """Stable Diffusion's VAE in other ``widths``, those of ``SD`` are its own; random weights, float32, on the processor.

    Args:
        widths: channels of its levels.
        tile: side in pixels of its own tiles.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=tile,
    )
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return vae.eval().requires_grad_(False)


def of_the_public_endpoints() -> dict[str, LoadedVae]:
    """The families that public endpoints have, by their keys: as narrow as can be, as their clients ask for large ones."""
    from tests.vaes import loaded, small_kl, small_vae

    narrow: dict[str, object] = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    return {
        "sd1": loaded(small_kl("sd1", **narrow), "sd1"),
        "sdxl": loaded(small_kl("sdxl", **narrow), "sdxl"),
        "flux": loaded(small_kl("flux", use_quant_conv=False, use_post_quant_conv=False, **narrow), "flux"),
        "hunyuan-video": loaded(small_vae("hunyuan-video", **narrow), "hunyuan-video"),
    }
