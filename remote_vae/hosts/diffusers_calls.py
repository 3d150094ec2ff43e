"""What a pipeline of diffusers asks of its VAE, as a call of ours, and the answer in the form that the VAE itself gives.

Pictures cross as ``[B, C, H, W]`` and videos as ``[B, C, F, H, W]``. One VAE has its own way: the decoder of Stable Video
Diffusion (``AutoencoderKLTemporalDecoder``) is given the frames as a batch, and their number beside them.
Nothing of diffusers is imported before the first answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from remote_vae.call import Answer, VaeCall
from remote_vae.errors import UnsupportedLayout
from remote_vae.local.own import own_tiling
from remote_vae.vae.at_work import VIDEO_DIMENSIONS, Op, VaeAtWork, has_posterior, is_of
from remote_vae.vae.families import Family
from remote_vae.wire import DecodeAnswer, EncodeAnswer

# Of AutoencoderKL's decode.
_OF_KL = ("z", "return_dict")


def parameters_of(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a bound ``decode`` or ``encode``, in order; AutoencoderKL's where it does not tell."""
    if found := _named(method):
        return found
    # Older diffusers hide them in a wrapper of (*args, **kwargs) around the class's own function.
    for cell in getattr(inspect.unwrap(getattr(method, "__func__", method)), "__closure__", None) or ():
        within = cell.cell_contents
        if inspect.isfunction(within) and within.__name__ in ("decode", "encode"):
            return _named(within)[1:] or _OF_KL
    return _OF_KL


def _named(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of its parameters; none where it does not tell."""
    try:
        names = {name: each.kind for name, each in inspect.signature(method).parameters.items()}
    except (TypeError, ValueError):
        return ()
    return () if inspect.Parameter.VAR_POSITIONAL in names.values() else tuple(names)


def vae_call(
    vae: VaeAtWork, op: Op, original: Callable[..., Any], names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> VaeCall[Any] | None:
    """The call ``original(*args, **kwargs)`` of a VAE of diffusers; None where it is the VAE's own business.

    Args:
        vae: the VAE; its device and dtype are those of the call.
        op: what ``original`` does.
        original: the VAE's own method, bound to it.
        names: of its parameters, see ``parameters_of``.
        args, kwargs: what it is called with.
    """
    if len(args) > len(names):
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensor = given.pop(names[0], None)
    return_dict = given.pop("return_dict", True)
    # A posterior is drawn from later, and decoders that take a generator do not use it.
    given.pop("generator", None)
    layout = _layout(vae.module, op, given.pop("num_frames", None))
    # An asymmetric VAE's picture and mask, LTX's timestep, LTX-2's causality: what the wire does not carry is the VAE's own.
    carried = isinstance(return_dict, bool) and all(value is None for value in given.values())
    if layout is None or not carried or not layout.takes(op, tensor, vae.family):
        return None
    return _call(vae, op, layout, tensor, return_dict, lambda: original(*args, **kwargs))


def _call(
    vae: VaeAtWork, op: Op, layout: _Layout, tensor: torch.Tensor, return_dict: bool, whole: Callable[[], Any]
) -> VaeCall[Any]:
    vae = replace(vae, device=tensor.device, dtype=tensor.dtype, has_posterior=has_posterior(vae.module))

    def tiled() -> Any:
        with own_tiling(vae.module):
            made = whole()
        if op == "decode":
            _check_size(vae, tensor, made[0])
        return made

    def adopt(answer: Answer) -> Any:
        if isinstance(answer, DecodeAnswer):
            return _decoded(layout.theirs(answer.pixels(tensor.device, tensor.dtype)), return_dict)
        return _encoded(vae, answer, answer.latents.to(tensor.device, tensor.dtype), return_dict)

    return VaeCall(op=op, tensor=layout.ours(tensor), vae=vae, adopt=adopt, whole=whole, own_tiling=tiled)


def _check_size(vae: VaeAtWork, latents: torch.Tensor, pixels: torch.Tensor) -> None:
    """Raises UnsupportedLayout: the VAE's own tiling gives another size, as that of HunyuanImage's refiner does."""
    came = list(pixels.shape[-2:])
    expected = [side * vae.family.downscale for side in latents.shape[-2:]]
    if came != expected:
        raise UnsupportedLayout(f"the own tiling of {type(vae.module).__name__} gave {came} pixels, expected {expected}")


# --- layouts: how the VAE's own tensors lie, and how the router's do -------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The VAE's tensors are the router's.

    Attributes:
        videos: whether they are videos ``[B, C, F, h, w]``; None: what the family says.
    """

    videos: bool | None = None

    def takes(self, op: Op, tensor: Any, family: Family) -> bool:
        """Whether the router knows such a tensor: of the VAE's channels and axes, and no gradient is wanted of it."""
        if not isinstance(tensor, torch.Tensor) or (tensor.requires_grad and torch.is_grad_enabled()):
            return False
        channels = family.latent_channels if op == "decode" else family.pixel_channels
        videos = family.video if self.videos is None else self.videos
        return tensor.ndim == (VIDEO_DIMENSIONS if videos else 4) and tensor.shape[1] == channels

    def ours(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the VAE's call as the router's."""
        return tensor

    def theirs(self, pixels: torch.Tensor) -> torch.Tensor:
        """The router's pixels as the VAE's."""
        return pixels


@dataclass(frozen=True)
class _FramesAsBatch(_Layout):
    """The VAE's are ``[B * F, C, h, w]``, the router's ``[B, C, F, h, w]``. ``frames``: F."""

    videos: bool | None = False
    frames: int = 1

    def takes(self, op: Op, tensor: Any, family: Family) -> bool:
        return super().takes(op, tensor, family) and tensor.shape[0] % self.frames == 0

    def ours(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, self.frames, *tensor.shape[1:]).movedim(2, 1)

    def theirs(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.movedim(1, 2).flatten(0, 1)


def _layout(module: Any, op: Op, frames: Any) -> _Layout | None:
    """How the tensors of a call lie; None: in no way that is known. ``frames``: the number of them, where the call names it."""
    if not is_of(module, "AutoencoderKLTemporalDecoder"):
        return _Layout() if frames is None else None
    if op == "encode":
        return _Layout(videos=False)
    return _FramesAsBatch(frames=frames) if isinstance(frames, int) and frames > 0 else None


# --- answers, in diffusers' own classes ------------------------------------------------------------------------------------


def _decoded(pixels: torch.Tensor, return_dict: bool) -> Any:
    if not return_dict:
        return (pixels,)
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=pixels)


def _encoded(vae: VaeAtWork, answer: EncodeAnswer, latents: torch.Tensor, return_dict: bool) -> Any:
    if vae.has_posterior:
        return _posterior_output(_distribution(latents, is_posterior=answer.is_posterior), return_dict)
    # An endpoint of another kind of VAE, or this VAE's own moments: the mean is what there is of latents in them.
    latents = latents.chunk(2, dim=1)[0] if answer.is_posterior else latents
    if is_of(vae.module, "AutoencoderKLCosmos"):
        from diffusers.models.autoencoders.vae import IdentityDistribution

        return _posterior_output(IdentityDistribution(latents), return_dict)
    if not return_dict:
        return (latents,)
    if is_of(vae.module, "AutoencoderTiny"):
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

        return AutoencoderTinyOutput(latents=latents)
    from diffusers.models.autoencoders.vae import EncoderOutput

    return EncoderOutput(latent=latents)


def _posterior_output(distribution: Any, return_dict: bool) -> Any:
    if not return_dict:
        return (distribution,)
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return AutoencoderKLOutput(latent_dist=distribution)


def _distribution(latents: torch.Tensor, *, is_posterior: bool) -> Any:
    if is_posterior:
        return _gaussian(latents)
    # A sample that is already drawn: whatever is asked of the distribution, this is it.
    return _gaussian(torch.cat([latents, torch.zeros_like(latents)], dim=1), deterministic=True)


def _gaussian(moments: torch.Tensor, *, deterministic: bool = False) -> Any:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(moments, deterministic=deterministic)
