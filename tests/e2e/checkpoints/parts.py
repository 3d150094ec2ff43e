"""The parts of the checkpoints: real classes with random weights, small, and with latents and pictures of the usual size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers

from remote_vae.vae.families import find_family
from tests.vaes import stirred

# Of tokenizers.clip, and of the one that hosts bring. The last two of each are the start and the end of a text.
VOCABULARY = 514
CLIP_VOCABULARY = 49408
# Of a picture that a VAE makes: most of its values lie between black and white.
PIXEL_STD = 0.4
# exp of it is nothing: the posterior is next to a point.
LOGVAR = -30.0


@dataclass(frozen=True)
class Size:
    """How large a checkpoint of SD 1 is.

    Attributes:
        vae: channels of the VAE's levels, the first one of the picture's size.
        vae_layers: blocks a level.
        unet: channels of the UNet's levels, of one block each.
        attention: at which of them it has attention.
        heads: of its attention.
        text: the text encoder's configuration, as transformers calls it.
    """

    vae: tuple[int, ...]
    vae_layers: int
    unet: tuple[int, ...]
    attention: tuple[bool, ...]
    heads: int
    text: Mapping[str, Any]


def _text(width: int, inner: int, layers: int, heads: int, vocabulary: int = CLIP_VOCABULARY, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
        **more,
    }


# Where the host takes any size.
TINY = Size((32, 64, 64, 64), 1, (32, 64), (True, True), 4, _text(64, 128, 2, 4, VOCABULARY))
# Forge knows an SD 1 by its UNet's width and its text encoder's, and reads the sizes of VAE and text encoder from files.
SMALL = Size(TINY.vae, 1, (320, 320), (False, True), 8, _text(768, 512, 2, 12))
# In ComfyUI the sizes of VAE and text encoder are fixed.
FULL = Size((128, 256, 512, 512), 2, SMALL.unet, SMALL.attention, 8, _text(768, 3072, 12, 12))

# SDXL's second text encoder: the smallest one that OpenCLIP knows by name, and AUTOMATIC1111 names it.
OPEN_CLIP = "ViT-S-32-alt"
OPEN_CLIP_TEXT = _text(256, 1024, 10, 4, hidden_act="gelu")
# SD.Next takes the second text encoder for SDXL's where it is wider than 768.
WIDE_TEXT = _text(1024, 512, 2, 16, VOCABULARY, hidden_act="gelu")
# Channels of each of the six numbers (sizes and place of the crop) that SDXL's UNet is told.
XL_EMBEDDED = 32


@torch.no_grad()
def calibrated(vae: Any) -> Any:
    """``vae`` with latents that have the mean and spread of its family, a posterior next to a point, and pictures in range."""
    stirred(vae)
    vae.eval().requires_grad_(False)
    x = torch.nn.functional.interpolate(torch.randn(2, 3, 12, 12), size=96, mode="bilinear").clamp(-1, 1)
    if "Wan" in type(vae).__name__ or "Qwen" in type(vae).__name__:
        x = x[:, :, None]
    mean, std = _usual_latents(vae)
    last = vae.encoder.conv_out if getattr(vae, "quant_conv", None) is None else vae.quant_conv
    _scale(last, vae.encode(x).latent_dist.mean, mean, std)
    last.weight[len(mean) :] = 0
    last.bias[len(mean) :] = LOGVAR
    _scale(vae.decoder.conv_out, vae.decode(vae.encode(x).latent_dist.mean).sample, torch.zeros(3), torch.full((3,), PIXEL_STD))
    return vae


def _usual_latents(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, which the family's factors make 0 and 1."""
    config = vae.config
    if config.get("latents_std"):
        return torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
    channels = int(config["latent_channels"])
    scaling, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    return torch.full((channels,), shift), torch.full((channels,), 1 / scaling)


def _scale(last: Any, made: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make the first channels of ``last``, a convolution that has made ``made``, have this mean and standard deviation."""
    others = [axis for axis in range(made.ndim) if axis != 1]
    count = len(mean)
    gain = std / made.std(dim=others)
    last.weight[:count] *= gain.reshape(-1, *[1] * (last.weight.ndim - 1))
    last.bias[:count] = (last.bias[:count] - made.mean(dim=others)) * gain + mean


def kl_vae(size: Size, family: str, seed: int) -> Any:
    """An AutoencoderKL of "sd1", "sdxl" or "flux"."""
    torch.manual_seed(seed)
    known = find_family(family)
    has_quant = family != "flux"
    vae = diffusers.AutoencoderKL(
        block_out_channels=size.vae,
        layers_per_block=size.vae_layers,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=known.latent_channels,
        scaling_factor=known.scaling_factor,
        shift_factor=known.shift_factor or None,
        use_quant_conv=has_quant,
        use_post_quant_conv=has_quant,
        sample_size=256,
    )
    return calibrated(vae)


def other_vae(kind: str, seed: int, **config: Any) -> Any:
    """One of another class of diffusers."""
    torch.manual_seed(seed)
    return calibrated(getattr(diffusers, kind)(**config))


def flux2_vae(encoder: tuple[int, ...], decoder: tuple[int, ...], layers: int, seed: int) -> Any:
    return other_vae(
        "AutoencoderKLFlux2",
        seed,
        block_out_channels=encoder,
        decoder_block_out_channels=decoder,
        layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=32,
    )


@torch.no_grad()
def unet(size: Size, seed: int, **more: Any) -> Any:
    """A UNet whose answer has the spread of noise. ``more``: of its configuration."""
    torch.manual_seed(seed)
    kinds = ["CrossAttn" if has else "" for has in size.attention]
    config = {
        "sample_size": 64,
        "block_out_channels": size.unet,
        "layers_per_block": 1,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "cross_attention_dim": size.text["hidden_size"],
        # By mistake it is called so: it is the number of heads.
        "attention_head_dim": size.heads,
        **more,
    }
    model = diffusers.UNet2DConditionModel(**config).eval().requires_grad_(False)
    context = torch.randn(4, 8, config["cross_attention_dim"])
    times = torch.tensor([10, 300, 600, 900])
    # SDXL's is told the size, and the pooled text.
    pooled = config.get("projection_class_embeddings_input_dim", 0) - 6 * XL_EMBEDDED
    added = {"text_embeds": torch.randn(4, max(0, pooled)), "time_ids": torch.full((4, 6), 128.0)}
    noise = model(torch.randn(4, 4, 16, 16), times, context, added_cond_kwargs=added).sample
    model.conv_out.weight *= 1 / noise.std()
    model.conv_out.bias *= 0
    return model


def xl_unet(second: Mapping[str, Any], seed: int) -> Any:
    """SDXL's, of the tiny size, beside the second text encoder that is configured so."""
    pooled = second["hidden_size"]
    return unet(
        TINY,
        seed,
        cross_attention_dim=TINY.text["hidden_size"] + pooled,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=XL_EMBEDDED,
        projection_class_embeddings_input_dim=6 * XL_EMBEDDED + pooled,
    )


def text_encoder(config: Mapping[str, Any], seed: int, *, projected: bool = False) -> Any:
    """Its last norm is stirred like the others: AUTOMATIC1111 divides by the mean of a text, which would be 0."""
    torch.manual_seed(seed)
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    model = kind(transformers.CLIPTextConfig(**config))
    stirred(model)
    return model.eval().requires_grad_(False)
