"""Which VAE it is that a comfy-shaped object holds: by the class and the layers of its module, and the model's factors.

What is not known here is refused with what is, and is the host's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from remote_vae.errors import UnsupportedLayout
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import CUSTOM, Family, load_families, recognise

# Classes of Wan's VAE in the hosts, which Qwen-Image has as well: with frames, or made flat for pictures.
_WAN = ("WanVAE", "Qwen2DVAE", "AutoencoderKLWan", "AutoencoderQwen2D")
_WAN_FAMILIES = {16: "qwen-image"}
_KNOWN = "the VAEs of SD 1, SD 2, SDXL, SD 3, Flux, Qwen-Image and Wan 2.1"


def family_of(vae: Any, factors: Any, chosen: Family | None = None) -> Family:
    """The family of the VAE that a host's object holds.

    Args:
        vae: the host's object.
        factors: what has the model's ``scale_factor`` (or ``scaling_factor``) and ``shift_factor``; None: nobody knows them,
            and the family is a custom one, which an endpoint's fingerprint has to confirm.
        chosen: what the user says. It only has to be of the same shape.

    Raises:
        UnsupportedLayout: it is none of those that are known, or not of the shape that the user says.
    """
    seen = _seen(vae, factors)
    if chosen is None:
        return seen
    shapes = [(each.latent_channels, each.downscale, each.video) for each in (seen, chosen)]
    if shapes[0] != shapes[1]:
        raise UnsupportedLayout(f"this VAE is not of {chosen.label}: {_shape(seen)}, expected {_shape(chosen)}")
    return chosen


def _seen(vae: Any, factors: Any) -> Family:
    module, channels = vae.first_stage_model, int(vae.latent_channels)
    name = type(module).__name__
    # A number, or one for each axis of a video.
    ratio = vae.downscale_ratio
    downscale = int(ratio[-1] if isinstance(ratio, (tuple, list)) else ratio)
    if not _is_for_pictures(vae):
        raise UnsupportedLayout(f"{name} is no VAE for pictures")
    if name in _WAN:
        family = load_families().get(_WAN_FAMILIES.get(channels, ""))
        if family is not None and downscale == family.downscale:
            return family
    elif _is_kl(module):
        scaling = getattr(factors, "scale_factor", getattr(factors, "scaling_factor", None))
        if scaling is None:
            return Family(CUSTOM, "custom VAE", channels, downscale, 1.0)
        shift = getattr(factors, "shift_factor", None)
        return recognise(
            latent_channels=channels, scaling_factor=float(scaling), shift_factor=float(shift or 0.0), downscale=downscale
        )
    raise UnsupportedLayout(f"{name} with {channels} latent channels is not known; known are {_KNOWN}")


def _is_for_pictures(vae: Any) -> bool:
    """Whether it decodes to three colours, in as many pixels as it encodes from: not sound, nor twice the size."""
    return (
        getattr(vae, "latent_dim", 2) in (2, 3)
        and getattr(vae, "output_channels", 3) == 3
        and getattr(vae, "decode_upscale", 1) == 1
        and getattr(vae, "conv_out_channels", 3) == 3
        and getattr(getattr(vae.first_stage_model, "config", None), "conv_out_channels", 3) == 3
    )


def _is_kl(module: Any) -> bool:
    """Whether it is an encoder and a decoder of pictures with nothing but a posterior between them."""
    ends = [getattr(getattr(module, part, None), "conv_in", None) for part in ("encoder", "decoder")]
    return (
        all(isinstance(end, nn.Module) for end in ends)
        # Weights of convolutions over frames have a dimension more.
        and all(weight.ndim <= 4 for weight in module.parameters())
        # Stable Video Diffusion's looks at the neighbouring frames.
        and type(module.decoder).__name__ != "VideoDecoder"
        # Flux.2's latents are normed and packed by the module.
        and getattr(module, "bn", None) is None
    )


def _shape(family: Family) -> str:
    return f"{family.latent_channels} latent channels of {family.downscale} px{', with frames' if family.video else ''}"


# --- the module by itself ----------------------------------------------------------------------------------------------


def whole(module: Any, op: Op, tensor: torch.Tensor, *, by_picture: bool = False) -> torch.Tensor:
    """The module's layers, without the host's conversions: pixels of raw latents, or of pixels the moments.

    Args:
        by_picture: whether a module of a video VAE takes pictures, and knows no frames.
    """
    if tensor.ndim == 5:
        return _whole_video(module, op, tensor, by_picture=by_picture)
    around = getattr(module, "post_quant_conv" if op == "decode" else "quant_conv", None)
    made: torch.Tensor
    if op == "decode":
        made = module.decoder(tensor if around is None else around(tensor))
    else:
        made = module.encoder(tensor)
        made = made if around is None else around(made)
    return made


def _whole_video(module: Any, op: Op, tensor: torch.Tensor, *, by_picture: bool) -> torch.Tensor:
    if by_picture:
        pictures = tensor.movedim(2, 1).flatten(0, 1)
        made = _of_wan(module, op, pictures)
        return made.reshape(tensor.shape[0], -1, *made.shape[1:]).movedim(1, 2)
    return _of_wan(module, op, tensor)


def _of_wan(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
    if op == "decode":
        pixels: torch.Tensor = module.decode(tensor)
        return pixels
    # Its encode gives the mean: what comes before that is what its last layer gives.
    last = getattr(module, "conv1", None) or module.quant_conv
    seen: list[torch.Tensor] = []
    handle = last.register_forward_hook(lambda _layer, _given, made: seen.append(made))
    try:
        mean = module.encode(tensor)
    finally:
        handle.remove()
    moments = seen[-1]
    if moments.ndim == mean.ndim:
        return moments
    # Made flat: the frames lie in the batch there.
    if mean.ndim == 5:
        return moments.reshape(mean.shape[0], mean.shape[2], *moments.shape[1:]).movedim(1, 2)
    return moments.squeeze(2)
