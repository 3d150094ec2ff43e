"""Latents as a VAE gives and takes them and raw ones, where it norms and packs them itself: Flux.2 in ComfyUI and Forge Neo."""

from __future__ import annotations

from typing import Any

import torch

from remote_vae.errors import InvalidRequest, UnsupportedLayout
from remote_vae.tiled.layouts import ldm
from remote_vae.vae.packed import BatchNormed, batch_norm_of, patched, unpatched


def raw_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What ``vae.decoder`` takes of what ``vae.decode`` takes. Raises UnsupportedLayout."""
    norm = _own_norm(vae)
    if norm is None:
        return latents
    if _is_spread(vae):
        _, _, height, width = latents.shape
        latents = patched(torch.nn.functional.pad(latents, (0, width % 2, 0, height % 2)))
    if latents.shape[1] != norm.channels:
        raise InvalidRequest(f"got latents {list(latents.shape)}, expected [B, {norm.channels}, h, w]: normed and packed")
    return norm.raw(latents)


def own_moments(vae: Any, moments: torch.Tensor) -> torch.Tensor:
    """The moments of the latents that ``vae.encode`` gives, from those of raw ones. Raises UnsupportedLayout."""
    norm = _own_norm(vae)
    if norm is None:
        return moments
    if moments.shape[2] % 2 or moments.shape[3] % 2:
        raise InvalidRequest("this VAE packs its latents 2 x 2: the sides of the picture must be multiples of 16")
    mean, logvar = moments.chunk(2, dim=1)
    deviation = norm.deviation.to(moments.device).view(1, -1, 1, 1)
    both = norm.normed(mean), patched(logvar) - 2 * deviation.log().to(logvar.dtype)
    return torch.cat([unpatched(each) for each in both] if _is_spread(vae) else both, dim=1)


def _own_norm(vae: Any) -> BatchNormed | None:
    # Of diffusers' VAE the pipelines undo it.
    if getattr(vae, "bn", None) is None or not ldm.knows(vae.decoder):
        return None
    norm = batch_norm_of(vae)
    if norm is None:
        raise UnsupportedLayout(f"{type(vae).__name__} norms its latents by numbers that are not here")
    return norm


def _is_spread(vae: Any) -> bool:
    """Whether normed latents are not packed outside of it, as Neo has it for Mugen."""
    return bool(getattr(vae, "mugen", False))
