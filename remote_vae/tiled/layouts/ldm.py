"""The layout of CompVis' ldm, which A1111's and Forge's models have, Stability's sgm and SD 3's too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from remote_vae.errors import UnsupportedLayout
from remote_vae.tiled.plan import (
    DOWN_PAD,
    Attention,
    Plan,
    Pointwise,
    Residual,
    Step,
    Upsample,
    activation,
    complete_plan,
    conv,
    norm,
)


def knows(part: nn.Module) -> bool:
    """Whether ``part`` is an encoder or a decoder of this layout."""
    return hasattr(part, "mid") and hasattr(part, "norm_out") and (hasattr(part, "up") or hasattr(part, "down"))


def decoder_plan(vae: Any) -> Plan:
    """Latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``. Raises UnsupportedLayout."""
    decoder = vae.decoder
    if getattr(decoder, "give_pre_end", False):
        raise UnsupportedLayout("a decoder that stops before its last layers")
    before = getattr(vae, "post_quant_conv", None)
    steps: list[Step] = [] if before is None else [conv(before)]
    steps += [conv(decoder.conv_in), *_mid(decoder.mid)]
    # Level 0 is the one of full size.
    for level in reversed(decoder.up):
        steps += _level(level)
        if hasattr(level, "upsample"):
            steps += [Upsample(), conv(level.upsample.conv)]
    steps += [norm(decoder.norm_out), activation(), conv(decoder.conv_out)]
    if getattr(decoder, "tanh_out", False):
        steps.append(Pointwise(torch.tanh))
    return complete_plan(steps, decoder, before)


def encoder_plan(vae: Any) -> Plan:
    """Pixels ``[B, 3, H, W]`` to moments ``[B, 2 C, h, w]``. Raises UnsupportedLayout."""
    encoder = vae.encoder
    steps: list[Step] = [conv(encoder.conv_in)]
    for level in encoder.down:
        steps += _level(level)
        if hasattr(level, "downsample"):
            steps.append(conv(level.downsample.conv, DOWN_PAD))
    steps += [*_mid(encoder.mid), norm(encoder.norm_out), activation(), conv(encoder.conv_out)]
    after = getattr(vae, "quant_conv", None)
    if after is not None:
        steps.append(conv(after))
    return complete_plan(steps, encoder, after)


def _mid(mid: Any) -> list[Step]:
    attention = getattr(mid, "attn_1", None)
    middle: list[Step] = [] if attention is None or isinstance(attention, nn.Identity) else [_attention(attention)]
    return [_resnet(mid.block_1), *middle, _resnet(mid.block_2)]


def _level(level: Any) -> list[Step]:
    if len(getattr(level, "attn", ())):
        raise UnsupportedLayout("attention outside the middle block")
    return [_resnet(block) for block in level.block]


def _resnet(block: Any) -> Residual:
    main = (norm(block.norm1), activation(), conv(block.conv1), norm(block.norm2), activation(), conv(block.conv2))
    for name in ("nin_shortcut", "conv_shortcut"):
        # A plain flag of the same name says which of the two there is.
        if isinstance(getattr(block, name, None), nn.Module):
            return Residual(main, (conv(getattr(block, name)),))
    return Residual(main)


def _attention(block: Any) -> Attention:
    if not all(isinstance(getattr(block, name, None), nn.Module) for name in ("norm", "q", "k", "v", "proj_out")):
        raise UnsupportedLayout(f"attention of the kind {type(block).__name__}")
    return Attention(norm(block.norm).module, block.q, block.k, block.v, block.proj_out)
