"""How the tensors of diffusers' VAE classes are shaped, read from their configs: one line a class.

Sources: the classes' own ``__init__``. What they compute with decides, and not what the config says beside it:
``scale_factor_spatial`` of Wan, for one, is 8 in every config that does not name it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """Raw latents ``[B, latent_channels, (F,) H / downscale, W / downscale]`` of pixels ``[B, pixel_channels, (F,) H, W]``.

    Attributes:
        video: whether there is an axis of frames, also for one picture.
        frame_scale: F latent frames make ``(F - 1) * frame_scale + 1`` pixel frames.
    """

    latent_channels: int
    downscale: int
    pixel_channels: int = 3
    video: bool = False
    frame_scale: int = 1


# VAEs of diffusers that cannot be asked for a picture of latents, or make another one than their pipeline.
NOT_FOR_PICTURES: Mapping[str, str] = {
    "AutoencoderKLAllegro": "it decodes videos in its own tiles only",
    "AutoencoderKLMagvit": "it decodes videos whose latents overlap in time",
    "AutoencoderKLMiniMaxH3": "its pixels are normalised by ImageNet's colours, and not from -1 to 1",
    "ConsistencyDecoderVAE": "its decoder is a diffusion of its own, which draws noise",
    "VQModel": "it has a codebook between its latents and its decoder",
}


def shape_of(name: str, config: Config) -> Optional[Shape]:
    """The shape of a VAE of the class ``name`` with this config; None: another class, or the config lacks what it takes."""
    read = _SHAPES.get(name)
    try:
        shape = None if read is None else read(config)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    usable = shape is not None and shape.latent_channels > 0 and shape.downscale > 0 and shape.frame_scale > 0
    return shape if usable else None


def known_classes() -> list[str]:
    """Names of the VAE classes that are known."""
    return sorted(_SHAPES)


def _kl(config: Config, blocks: str = "block_out_channels") -> Shape:
    return Shape(int(config["latent_channels"]), 2 ** (len(config[blocks]) - 1), int(config.get("out_channels", 3)))


def _tiny(config: Config) -> Shape:
    # Every block but the first halves, and the decoder's Upsample layers have this scale.
    downscale = int(config.get("upsampling_scaling_factor", 2)) ** (len(config["decoder_block_out_channels"]) - 1)
    return Shape(int(config["latent_channels"]), downscale, int(config.get("out_channels", 3)))


def _dc(config: Config) -> Shape:
    return Shape(int(config["latent_channels"]), 2 ** (len(config["encoder_block_out_channels"]) - 1))


def _hunyuan_image(config: Config) -> Shape:
    return Shape(int(config["latent_channels"]), int(config["spatial_compression_ratio"]), int(config["out_channels"]))


def _compressed(config: Config) -> Shape:
    """HunyuanVideo's kind and Cosmos, whose layers are made by both ratios."""
    return Shape(
        int(config["latent_channels"]),
        int(config["spatial_compression_ratio"]),
        int(config.get("out_channels", 3)),
        video=True,
        frame_scale=int(config["temporal_compression_ratio"]),
    )


def _wan(config: Config) -> Shape:
    patch = int(config.get("patch_size") or 1)
    return Shape(
        int(config["z_dim"]),
        2 ** (len(config["dim_mult"]) - 1) * patch,
        int(config.get("out_channels", config.get("input_channels", 3))) // patch**2,
        video=True,
        frame_scale=2 ** sum(map(bool, config["temperal_downsample"])),
    )


def _qwen21(config: Config) -> Shape:
    # Its convolutions take one frame and no more.
    return replace(_wan(config), frame_scale=1)


def _ltx(config: Config) -> Shape:
    # Of the decoder: LTX-2's encoder has levels that halve only one of space and time.
    levels = sum(map(bool, config["decoder_spatio_temporal_scaling"]))
    return Shape(
        int(config["latent_channels"]),
        int(config["patch_size"]) * 2**levels,
        int(config.get("out_channels", 3)),
        video=True,
        frame_scale=int(config["patch_size_t"]) * 2**levels,
    )


def _mochi(config: Config) -> Shape:
    return Shape(
        int(config["latent_channels"]),
        math.prod(config["spatial_expansions"]),
        int(config.get("out_channels", 3)),
        video=True,
        frame_scale=math.prod(config["temporal_expansions"]),
    )


def _cogvideox(config: Config) -> Shape:
    kl = _kl(config)
    frame_scale = int(config["temporal_compression_ratio"])
    return Shape(kl.latent_channels, kl.downscale, kl.pixel_channels, video=True, frame_scale=frame_scale)


def _temporal_decoder(config: Config) -> Shape:
    # Its decode takes frames as a batch and their number beside it; here and on the wire they are frames.
    kl = _kl(config)
    return Shape(kl.latent_channels, kl.downscale, kl.pixel_channels, video=True)


_SHAPES: Mapping[str, Callable[[Config], Shape]] = {
    "AsymmetricAutoencoderKL": lambda config: _kl(config, "down_block_out_channels"),
    "AutoencoderDC": _dc,
    "AutoencoderKL": _kl,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLCosmos": _compressed,
    "AutoencoderKLFlux2": _kl,
    "AutoencoderKLHunyuanImage": _hunyuan_image,
    # It refines single pictures.
    "AutoencoderKLHunyuanImageRefiner": lambda config: replace(_compressed(config), frame_scale=1),
    "AutoencoderKLHunyuanVideo": _compressed,
    "AutoencoderKLHunyuanVideo15": _compressed,
    "AutoencoderKLLTX2Video": _ltx,
    "AutoencoderKLLTXVideo": _ltx,
    "AutoencoderKLMochi": _mochi,
    "AutoencoderKLQwenImage": _wan,
    "AutoencoderKLQwenImage21": _qwen21,
    "AutoencoderKLTemporalDecoder": _temporal_decoder,
    "AutoencoderKLWan": _wan,
    "AutoencoderTiny": _tiny,
}
