"""diffusers' AutoencoderKLHunyuanImage: channels become pixels and back in the place of upsampling and strides."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from remote_vae.errors import UnsupportedLayout
from remote_vae.tiled.layouts.channels import means, repeated
from remote_vae.tiled.plan import Attention, Local, Plan, Residual, Step, activation, complete_plan, conv, norm


def knows(part: nn.Module) -> bool:
    """Whether ``part`` is an encoder or a decoder of this layout."""
    return type(part).__name__ in ("HunyuanImageEncoder2D", "HunyuanImageDecoder2D")


def decoder_plan(vae: Any) -> Plan:
    """Latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``. Raises UnsupportedLayout."""
    decoder = vae.decoder
    first = conv(decoder.conv_in)
    around = Local(partial(repeated, times=decoder.repeat), first.module.out_channels)
    blocks = [_resnet(block) if hasattr(block, "norm1") else _upsampler(block) for block in decoder.up_blocks]
    return complete_plan([Residual((first,), (around,)), *_mid(decoder.mid_block), *blocks, *_tail(decoder)], decoder)


def encoder_plan(vae: Any) -> Plan:
    """Pixels ``[B, 3, H, W]`` to moments ``[B, 2 C, h, w]``. Raises UnsupportedLayout."""
    encoder = vae.encoder
    blocks = [_resnet(block) if hasattr(block, "norm1") else _downsampler(block) for block in encoder.down_blocks]
    moments = encoder.conv_out.out_channels
    last = Residual(tuple(_tail(encoder)), (Local(partial(means, groups=moments), moments),))
    return complete_plan([conv(encoder.conv_in), *blocks, *_mid(encoder.mid_block), last], encoder)


def _tail(part: Any) -> list[Step]:
    return [norm(part.norm_out), activation(part.nonlinearity), conv(part.conv_out)]


def _mid(block: Any) -> list[Step]:
    first, *rest = block.resnets
    steps: list[Step] = [_resnet(first)]
    for attention, resnet in zip(block.attentions, rest, strict=True):
        parts = (attention.to_q, attention.to_k, attention.to_v, attention.proj)
        steps += [Attention(norm(attention.norm).module, *parts), _resnet(resnet)]
    return steps


def _resnet(block: Any) -> Residual:
    if block.conv_shortcut is not None:
        raise UnsupportedLayout(f"{type(block).__name__} changes the number of channels")
    act = activation(block.nonlinearity)
    return Residual((norm(block.norm1), act, conv(block.conv1), norm(block.norm2), act, conv(block.conv2)))


def _upsampler(block: Any) -> Residual:
    wide = conv(block.conv)
    channels = wide.module.out_channels // 4
    shortcut = Local(lambda x: _spread(repeated(x, times=block.repeats)), channels, up=2)
    return Residual((wide, Local(_spread, channels, up=2)), (shortcut,))


def _downsampler(block: Any) -> Residual:
    narrow = conv(block.conv)
    channels = narrow.module.out_channels * 4
    shortcut = Local(lambda x: means(_gathered(x), groups=channels), channels, down=2)
    return Residual((narrow, Local(_gathered, channels, down=2)), (shortcut,))


def _spread(x: torch.Tensor) -> torch.Tensor:
    """``[B, 2 * 2 * C, h, w]`` to ``[B, C, 2 h, 2 w]``: where in its square a value goes is the slowest part of its channel."""
    return pixel_shuffle(_transposed(x, 4), 2)


def _gathered(x: torch.Tensor) -> torch.Tensor:
    """The other way."""
    return _transposed(pixel_unshuffle(x, 2), x.shape[1])


def _transposed(x: torch.Tensor, parts: int) -> torch.Tensor:
    """The channels of so many parts, all parts' first ones first."""
    return x.reshape(x.shape[0], parts, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
