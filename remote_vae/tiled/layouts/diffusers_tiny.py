"""diffusers' AutoencoderTiny (TAESD): residual blocks without norms, so that nothing has to be known of the whole picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from remote_vae.errors import UnsupportedLayout
from remote_vae.tiled.plan import Plan, Pointwise, Residual, Step, Upsample, activation, complete_plan, conv

_SCALE = 2


def knows(part: nn.Module) -> bool:
    """Whether ``part`` is an encoder or a decoder of this layout."""
    return type(part).__name__ in ("EncoderTiny", "DecoderTiny") and isinstance(getattr(part, "layers", None), nn.Sequential)


def decoder_plan(vae: Any) -> Plan:
    """Latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``. Raises UnsupportedLayout."""
    # The latents are bounded to 3 in a soft way first; the last layer gives [0, 1].
    steps = [Pointwise(lambda x: torch.tanh(x / 3) * 3), *_steps(vae.decoder.layers), Pointwise(lambda x: x.mul(2).sub(1))]
    return complete_plan(steps, vae.decoder)


def encoder_plan(vae: Any) -> Plan:
    """Pixels ``[B, 3, H, W]`` to latents ``[B, C, h, w]``: there is no posterior. Raises UnsupportedLayout."""
    return complete_plan([Pointwise(lambda x: x.add(1).div(2)), *_steps(vae.encoder.layers)], vae.encoder)


def _steps(layers: Iterable[nn.Module]) -> list[Step]:
    steps: list[Step] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            steps.append(conv(layer))
        elif isinstance(layer, nn.Upsample):
            if layer.mode != "nearest" or layer.scale_factor != _SCALE:
                raise UnsupportedLayout(f"upsampling {layer}")
            steps.append(Upsample(_SCALE))
        elif type(layer).__name__ == "AutoencoderTinyBlock":
            steps += _block(layer)
        else:
            steps.append(activation(layer))
    return steps


def _block(block: Any) -> list[Step]:
    shortcut = () if isinstance(block.skip, nn.Identity) else (conv(block.skip),)
    return [Residual(tuple(_steps(block.conv)), shortcut), activation(block.fuse)]
