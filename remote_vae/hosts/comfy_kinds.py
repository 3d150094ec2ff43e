"""Which VAE it is that a comfy-shaped object holds: by the class and the layers of its module, and the model's factors.

What is not known here is refused with what is, and is the host's own.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from remote_vae.errors import UnsupportedLayout
from remote_vae.vae.at_work import VIDEO_DIMENSIONS, Op
from remote_vae.vae.families import CUSTOM, Family, load_families, recognise
from remote_vae.vae.packed import batch_norm_of

# Classes of Wan's VAE in the hosts, which Qwen-Image has as well: with frames, or made flat for pictures.
_WAN = ("WanVAE", "Qwen2DVAE", "AutoencoderKLWan", "AutoencoderKLWan22", "AutoencoderQwen2D")
_WAN_FAMILIES = {16: "qwen-image", 48: "wan22-5b"}
_FLUX2 = "flux2"
_KNOWN = "the VAEs of SD 1, SD 2, SDXL, SD 3, Flux, Flux.2, Qwen-Image and Wan"


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
    family: Family | None = None
    if name in _WAN:
        family = load_families().get(_WAN_FAMILIES.get(channels, ""))
    elif _is_kl(module):
        if getattr(module, "bn", None) is not None:
            channels, downscale = _of_batch_norm(module)
        family = _kl_family(channels, downscale, factors)
    if family is None or family.downscale != downscale:
        raise UnsupportedLayout(f"{name} with {channels} latent channels of {downscale} px is not known; known are {_KNOWN}")
    return family


def _of_batch_norm(module: Any) -> tuple[int, int]:
    """Channels and downscale of the raw latents of a module that norms and packs them."""
    batch_norm = batch_norm_of(module)
    levels = getattr(module.encoder, "down", getattr(module.encoder, "down_blocks", None))
    if batch_norm is None or levels is None:
        raise UnsupportedLayout(f"the numbers of {type(module).__name__} are not here")
    return batch_norm.channels // 4, 2 ** (len(levels) - 1)


def _kl_family(channels: int, downscale: int, factors: Any) -> Family:
    flux2 = load_families()[_FLUX2]
    if (channels, downscale) == (flux2.latent_channels, flux2.downscale):
        return flux2
    scaling = getattr(factors, "scale_factor", getattr(factors, "scaling_factor", None))
    if scaling is None:
        return Family(CUSTOM, "custom VAE", channels, downscale)
    shift = getattr(factors, "shift_factor", None)
    return recognise(
        latent_channels=channels, scaling_factor=float(scaling), shift_factor=float(shift or 0.0), downscale=downscale
    )


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
    )


def _shape(family: Family) -> str:
    return f"{family.latent_channels} latent channels of {family.downscale} px{', with frames' if family.video else ''}"


# --- the module by itself ----------------------------------------------------------------------------------------------


class Raw(nn.Module):
    """The layers of a module that norms and packs its latents between them (Flux.2's), without that.

    All its weights are there, so that its fingerprint is the module's.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = module.encoder, module.decoder
        self.quant_conv, self.post_quant_conv = (getattr(module, name, None) for name in ("quant_conv", "post_quant_conv"))
        self.statistics = module.bn


# One for each module, as what is known of a VAE is kept by its module.
_raw: weakref.WeakKeyDictionary[Any, Raw] = weakref.WeakKeyDictionary()


def raw_module(module: Any) -> Any:
    """The module whose layers take and give raw latents: itself, or ``Raw``."""
    if getattr(module, "bn", None) is None:
        return module
    found = _raw.get(module)
    if found is None or (found.encoder, found.decoder, found.statistics) != (module.encoder, module.decoder, module.bn):
        found = _raw[module] = Raw(module)
    return found


def whole(module: Any, op: Op, tensor: torch.Tensor, *, by_picture: bool = False) -> torch.Tensor:
    """The module's layers, without the host's conversions: pixels of raw latents, or of pixels the moments.

    Args:
        module: of ``raw_module``, or a copy.
        op, tensor: for a video VAE, pictures without an axis of frames are answered so.
        by_picture: whether the module of a video VAE takes pictures, and knows no frames.
    """
    if type(module).__name__ not in _WAN:
        around = getattr(module, "post_quant_conv" if op == "decode" else "quant_conv", None)
        made: torch.Tensor = tensor
        if op == "decode":
            return module.decoder(made if around is None else around(made))  # type: ignore[no-any-return]
        made = module.encoder(made)
        return made if around is None else around(made)
    if tensor.ndim == VIDEO_DIMENSIONS and by_picture:
        made = _of_wan(module, op, tensor.movedim(2, 1).flatten(0, 1))
        return made.reshape(tensor.shape[0], -1, *made.shape[1:]).movedim(1, 2)
    if tensor.ndim < VIDEO_DIMENSIONS and not by_picture:
        return _of_wan(module, op, tensor.unsqueeze(2)).squeeze(2)
    return _of_wan(module, op, tensor)


def _of_wan(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
    if op == "decode":
        pixels: torch.Tensor = module.decode(tensor)
        return pixels
    # Its encode gives the mean alone: the moments are what its last layer gave.
    last = module.conv1 if hasattr(module, "conv1") else module.quant_conv
    seen: list[torch.Tensor] = []
    handle = last.register_forward_hook(lambda _layer, _given, made: seen.append(made))
    try:
        mean = module.encode(tensor)
    finally:
        handle.remove()
    moments = seen[-1]
    if moments.ndim == mean.ndim:
        return moments
    if mean.ndim < VIDEO_DIMENSIONS:
        return moments.squeeze(2)
    # Made flat: the frames lie in the batch there.
    return moments.reshape(mean.shape[0], mean.shape[2], *moments.shape[1:]).movedim(1, 2)
