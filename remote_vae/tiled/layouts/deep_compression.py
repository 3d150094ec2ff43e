"""diffusers' AutoencoderDC, the deep compression autoencoder of Sana: 32 times smaller, without a posterior."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from remote_vae.errors import UnsupportedLayout
from remote_vae.tiled.layouts.channels import means, repeated
from remote_vae.tiled.plan import (
    LinearAttention,
    Local,
    Plan,
    Residual,
    Step,
    Upsample,
    activation,
    complete_plan,
    conv,
    rms_norm,
)


def knows(part: nn.Module) -> bool:
    """Whether ``part`` is an encoder or a decoder of this layout."""
    return not hasattr(part, "mid_block") and (
        (hasattr(part, "out_shortcut") and hasattr(part, "down_blocks"))
        or (hasattr(part, "in_shortcut") and hasattr(part, "up_blocks"))
    )


def decoder_plan(vae: Any) -> Plan:
    """Latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``. Raises UnsupportedLayout."""
    decoder = vae.decoder
    first = conv(decoder.conv_in)
    steps: list[Step] = [first]
    if decoder.in_shortcut:
        times = decoder.in_shortcut_repeats
        steps = [Residual((first,), (Local(partial(repeated, times=times), first.module.out_channels),))]
    for level in reversed(decoder.up_blocks):
        for block in level:
            steps += _block(block)
    steps += [rms_norm(decoder.norm_out), activation(decoder.conv_act)]
    steps += _upsampler(decoder.conv_out) if _resamples(decoder.conv_out) else [conv(decoder.conv_out)]
    return complete_plan(steps, decoder)


def encoder_plan(vae: Any) -> Plan:
    """Pixels ``[B, 3, H, W]`` to latents ``[B, C, h, w]``: there is no posterior. Raises UnsupportedLayout."""
    encoder = vae.encoder
    steps: list[Step] = _downsampler(encoder.conv_in) if _resamples(encoder.conv_in) else [conv(encoder.conv_in)]
    for level in encoder.down_blocks:
        for block in level:
            steps += _block(block)
    last = conv(encoder.conv_out)
    channels = last.module.out_channels
    steps += [Residual((last,), (Local(partial(means, groups=channels), channels),)) if encoder.out_shortcut else last]
    return complete_plan(steps, encoder)


def _resamples(block: Any) -> bool:
    return hasattr(block, "shortcut")


def _block(block: Any) -> list[Step]:
    if hasattr(block, "downsample"):
        return _downsampler(block)
    if hasattr(block, "interpolate"):
        return _upsampler(block)
    if hasattr(block, "attn"):
        return [_attention(block.attn), _feed_forward(block.conv_out)]
    return [Residual((conv(block.conv1), activation(block.nonlinearity), conv(block.conv2), rms_norm(block.norm)))]


def _upsampler(block: Any) -> list[Step]:
    if block.interpolate and block.interpolation_mode != "nearest":
        raise UnsupportedLayout(f"upsampling by {block.interpolation_mode}")
    layer = conv(block.conv)
    channels = layer.module.out_channels // (1 if block.interpolate else 4)
    main: tuple[Step, ...] = (Upsample(), layer) if block.interpolate else (layer, Local(_shuffled, channels, up=2))
    if not block.shortcut:
        return list(main)
    shortcut = Local(lambda x: _shuffled(repeated(x, times=block.repeats)), channels, up=2)
    return [Residual(main, (shortcut,))]


def _downsampler(block: Any) -> list[Step]:
    layer = conv(block.conv)
    channels = layer.module.out_channels * (4 if block.downsample else 1)
    main: tuple[Step, ...] = (layer, Local(_unshuffled, channels, down=2)) if block.downsample else (layer,)
    if not block.shortcut:
        return list(main)
    shortcut = Local(lambda x: means(_unshuffled(x), groups=channels), channels, down=2)
    return [Residual(main, (shortcut,))]


def _attention(block: Any) -> LinearAttention:
    if not block.residual_connection or type(block.nonlinearity) is not nn.ReLU:
        raise UnsupportedLayout(f"{type(block).__name__} is more than plain linear attention")
    scales = tuple((conv(scale.proj_in), conv(scale.proj_out)) for scale in block.to_qkv_multiscale)
    return LinearAttention(
        block.to_q,
        block.to_k,
        block.to_v,
        scales,
        block.to_out,
        rms_norm(block.norm_out),
        block.attention_head_dim,
        block.eps,
    )


def _feed_forward(block: Any) -> Residual:
    if not block.residual_connection or type(block.nonlinearity) is not nn.SiLU:
        raise UnsupportedLayout(f"{type(block).__name__} is more than a gated convolution")
    inverted, depth, point = (conv(layer) for layer in (block.conv_inverted, block.conv_depth, block.conv_point))
    gate = Local(_gated, point.module.in_channels)
    after = () if block.norm is None else (rms_norm(block.norm),)
    return Residual((inverted, activation(block.nonlinearity), depth, gate, point, *after))


def _gated(x: torch.Tensor) -> torch.Tensor:
    values, gate = x.chunk(2, 1)
    return values * silu(gate)


def _shuffled(x: torch.Tensor) -> torch.Tensor:
    return pixel_shuffle(x, 2)


def _unshuffled(x: torch.Tensor) -> torch.Tensor:
    return pixel_unshuffle(x, 2)
