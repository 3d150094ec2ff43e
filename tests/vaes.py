"""Small VAEs of every family with random weights, as a server would have loaded them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from remote_vae.server.models import LoadedVae
from remote_vae.vae.families import find_family
from remote_vae.vae.fingerprint import ROUNDINGS, fingerprint
from tests.versions import before_diffusers, missing, of_diffusers, skip_if

_FOUR_DOWN = ("DownEncoderBlock2D",) * 4
_FOUR_UP = ("UpDecoderBlock2D",) * 4
_WIDTHS = (32, 32, 64, 64)
# What Wan 2.2's VAE is beside Wan 2.1's, whatever its width.
WAN22: dict[str, Any] = {
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


def small_kl(family: str, **changes: object) -> diffusers.AutoencoderKL:
    """An AutoencoderKL with four levels, 32 groups and the factors of ``family``."""
    torch.manual_seed(7)
    known = find_family(family)
    config = {
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "down_block_types": _FOUR_DOWN,
        "up_block_types": _FOUR_UP,
        "latent_channels": known.latent_channels,
        "scaling_factor": known.scaling_factor,
        "shift_factor": known.shift_factor or None,
        "norm_num_groups": 32,
        **changes,
    }
    return diffusers.AutoencoderKL(**config).eval().requires_grad_(False)


def small_vae(name: str, **changes: object) -> Any:
    """A small VAE of ``name``, a key of ``SMALL``: the real class, shapes and factors of the family, fewer channels inside.

    Every weight is random, norms and the numbers of a batch norm as well, so that two that change places are seen.
    """
    torch.manual_seed(7)
    vae = SMALL[name](**changes)
    stirred(vae)
    return vae.eval().requires_grad_(False)


def stirred(vae: torch.nn.Module) -> None:
    """Weights that are made as ones and zeros become others."""
    with torch.no_grad():
        for tensor in vae.state_dict().values():
            if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all()):
                tensor.add_(torch.rand(tensor.shape).mul_(0.4))


def _kl(family: str, **fixed: object) -> Callable[..., torch.nn.Module]:
    return lambda **changes: small_kl(family, **{"block_out_channels": _WIDTHS, **fixed, **changes})


@dataclass(frozen=True)
class _Of:
    """Makes VAEs of a class of diffusers; ``kind`` is its name."""

    kind: str
    config: Mapping[str, object]

    def __call__(self, **changes: object) -> torch.nn.Module:
        if "encoder_out_shortcut" in {**self.config, **changes}:
            skip_if(before_diffusers(0, 35, "encoder_out_shortcut of AutoencoderDC"))
        vae: torch.nn.Module = of_diffusers(self.kind)(**{**self.config, **changes})
        return vae


def _of(kind: str, **config: object) -> _Of:
    return _Of(kind, config)


_flux2: dict[str, object] = {
    "block_out_channels": _WIDTHS,
    "layers_per_block": 1,
    "down_block_types": _FOUR_DOWN,
    "up_block_types": _FOUR_UP,
    "latent_channels": 32,
}
_hunyuan_video = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "latent_channels": 16}
_ltx: dict[str, object] = {
    "latent_channels": 128,
    "block_out_channels": (8, 16, 32, 32),
    "decoder_block_out_channels": (8, 16, 32, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}

# One entry a family of families.toml, and one a kind that has another class or shape ("wan" is the VAE of "qwen-image" in the
# class of Wan 2.1, "flux2-small" that of Flux.2 with the small decoder, "ltx-0.9.5" and so on later weights of "ltx").
SMALL: dict[str, Callable[..., torch.nn.Module]] = {
    "sd1": _kl("sd1"),
    "sdxl": _kl("sdxl"),
    "sd3": _kl("sd3", use_quant_conv=False, use_post_quant_conv=False),
    "flux": _kl("flux", use_quant_conv=False, use_post_quant_conv=False),
    "flux2": _of("AutoencoderKLFlux2", **_flux2),
    "flux2-small": _of("AutoencoderKLFlux2", **_flux2, decoder_block_out_channels=(32, 64, 64, 64)),
    "qwen-image": _of("AutoencoderKLQwenImage", base_dim=8),
    "wan": _of("AutoencoderKLWan", base_dim=8),
    "qwen-image-layered": _of("AutoencoderKLQwenImage", base_dim=8, input_channels=4),
    "wan22-5b": _of(
        "AutoencoderKLWan",
        base_dim=8,
        decoder_base_dim=12,
        **WAN22,
        latents_mean=[index / 48 - 0.5 for index in range(48)],
        latents_std=[index / 48 + 0.5 for index in range(48)],
    ),
    "qwen-image-2.1": _of("AutoencoderKLQwenImage21", base_dim=8, decoder_base_dim=12, num_res_blocks=1),
    "hunyuan-image": _of(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(32, 32, 32, 64, 64, 128),
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=384,
        scaling_factor=0.75289,
    ),
    "sana": _of(
        "AutoencoderDC",
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=(8, 16, 16, 32, 32, 32),
        decoder_block_out_channels=(8, 16, 16, 32, 32, 32),
        encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ),
    "hunyuan-video": _of("AutoencoderKLHunyuanVideo", **_hunyuan_video),
    "hunyuan-video-1.5": _of(
        "AutoencoderKLHunyuanVideo15", block_out_channels=(16, 16, 32, 64, 64), layers_per_block=1, latent_channels=32
    ),
    "hunyuan-image-refiner": _of(
        "AutoencoderKLHunyuanImageRefiner", block_out_channels=(16, 16, 32, 64, 64), layers_per_block=1, latent_channels=32
    ),
    "ltx": _of("AutoencoderKLLTXVideo", **_ltx),
    "ltx2": _of(
        "AutoencoderKLLTX2Video",
        latent_channels=128,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ),
    "mochi": _of(
        "AutoencoderKLMochi",
        encoder_block_out_channels=(32, 32, 32, 64),
        decoder_block_out_channels=(32, 32, 32, 64),
        layers_per_block=(1, 1, 1, 1, 1),
    ),
    "cogvideox": _of(
        "AutoencoderKLCogVideoX",
        block_out_channels=(32, 32, 32, 64),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1,
        latent_channels=16,
    ),
    "cosmos": _of(
        "AutoencoderKLCosmos",
        encoder_block_out_channels=(8, 16, 16, 16),
        decode_block_out_channels=(8, 16, 16, 16),
        num_layers=1,
        latent_channels=16,
    ),
    "svd": _of(
        "AutoencoderKLTemporalDecoder",
        block_out_channels=_WIDTHS,
        down_block_types=_FOUR_DOWN,
        layers_per_block=1,
        latent_channels=4,
    ),
    "asymmetric": _of(
        "AsymmetricAutoencoderKL",
        down_block_types=_FOUR_DOWN,
        down_block_out_channels=_WIDTHS,
        layers_per_down_block=1,
        up_block_types=_FOUR_UP,
        # What is made of picture and mask has as many channels as each level of the real ones.
        up_block_out_channels=(32, 64, 128, 128),
        layers_per_up_block=2,
        latent_channels=4,
    ),
    "taesd": _of("AutoencoderTiny"),
    "taesd3": _of("AutoencoderTiny", latent_channels=16),
    "taef2": _of("AutoencoderTiny", latent_channels=32),
}

# Those that the installed diffusers has, for tests of all of them at once.
SMALL_HERE = [name for name, make in SMALL.items() if not (isinstance(make, _Of) and missing(make.kind))]


def loaded(vae: torch.nn.Module, family: str) -> LoadedVae:
    names = {rounding: fingerprint(vae.state_dict(), rounding) for rounding in ROUNDINGS}
    return LoadedVae(vae, find_family(family), family, names)


def tiny_flux() -> LoadedVae:
    return loaded(small_kl("flux", use_quant_conv=False, use_post_quant_conv=False), "flux")


def tiny_video() -> LoadedVae:
    return loaded(small_vae("hunyuan-video"), "hunyuan-video")
