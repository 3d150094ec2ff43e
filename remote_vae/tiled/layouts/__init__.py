"""Plan builders: one file for each way in which VAEs arrange their modules."""

from __future__ import annotations

from typing import Any

from remote_vae.errors import UnsupportedLayout
from remote_vae.tiled.layouts import deep_compression, diffusers_kl, diffusers_tiny, hunyuan_image, ldm, wan
from remote_vae.tiled.plan import Plan

_BUILDERS = (wan, hunyuan_image, deep_compression, diffusers_kl, diffusers_tiny, ldm)


def decoder_plan(vae: Any) -> Plan:
    """How ``vae`` makes pixels of raw latents: what its decoder takes, also where its own ``decode`` takes normed ones.

    Raises:
        UnsupportedLayout: no builder knows it.
    """
    return _plan(vae, "decoder")


def encoder_plan(vae: Any) -> Plan:
    """How ``vae`` makes moments of pixels (AutoencoderTiny: latents). Raises UnsupportedLayout."""
    return _plan(vae, "encoder")


def _plan(vae: Any, part: str) -> Plan:
    module = getattr(vae, part, None)
    if getattr(vae, "quantize", None) is not None:
        raise UnsupportedLayout(f"{type(vae).__name__} has a codebook between its latents and its decoder")
    for builder in _BUILDERS:
        if module is not None and builder.knows(module):
            try:
                plan: Plan = getattr(builder, f"{part}_plan")(vae)
            except UnsupportedLayout:
                raise
            except Exception as error:  # a part is missing or is something else: whatever that leads to
                raise UnsupportedLayout(f"{type(vae).__name__}: {error}") from error
            return plan
    raise UnsupportedLayout(f"{type(vae).__name__} is a VAE of a layout that the tiled VAE does not know")
