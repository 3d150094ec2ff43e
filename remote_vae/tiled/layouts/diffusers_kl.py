"""diffusers' AutoencoderKL and its kin: SD 1, SD 2, SDXL, SD 3, Flux, Flux.2; the asymmetric one too, without a mask."""

from __future__ import annotations

from typing import Any

from torch import nn

from remote_vae.errors import UnsupportedLayout
from remote_vae.tiled.plan import DOWN_PAD, Attention, Plan, Residual, Step, Upsample, activation, complete_plan, conv, norm


def knows(part: nn.Module) -> bool:
    """Whether ``part`` is an encoder or a decoder of this layout."""
    return hasattr(part, "mid_block") and (hasattr(part, "up_blocks") or hasattr(part, "down_blocks"))


def decoder_plan(vae: Any) -> Plan:
    """Latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]``. Raises UnsupportedLayout."""
    decoder = vae.decoder
    before = getattr(vae, "post_quant_conv", None)
    steps: list[Step] = [] if before is None else [conv(before)]
    steps += [conv(decoder.conv_in), *_mid(decoder.mid_block)]
    for block in decoder.up_blocks:
        steps += _resnets(block)
        for upsampler in getattr(block, "upsamplers", None) or ():
            if getattr(upsampler, "norm", None) is not None or not getattr(upsampler, "interpolate", True):
                raise UnsupportedLayout("an upsampler with a norm or without interpolation")
            steps += [Upsample(), conv(_conv_of(upsampler))]
    steps += _tail(decoder)
    # What the asymmetric decoder has for the picture and the mask of an inpainting, which a plan is not for.
    unused = [decoder.condition_encoder] if type(decoder).__name__ == "MaskConditionDecoder" else []
    return complete_plan(steps, decoder, before, unused=unused)


def encoder_plan(vae: Any) -> Plan:
    """Pixels ``[B, 3, H, W]`` to moments ``[B, 2 C, h, w]``. Raises UnsupportedLayout."""
    encoder = vae.encoder
    steps: list[Step] = [conv(encoder.conv_in)]
    for block in encoder.down_blocks:
        steps += _resnets(block)
        for downsampler in getattr(block, "downsamplers", None) or ():
            if getattr(downsampler, "norm", None) is not None:
                raise UnsupportedLayout("a downsampler with a norm")
            module = _conv_of(downsampler)
            own = getattr(downsampler, "padding", 0)
            steps.append(conv(module, DOWN_PAD if own == 0 else None))
    steps += [*_mid(encoder.mid_block), *_tail(encoder)]
    after = getattr(vae, "quant_conv", None)
    if after is not None:
        steps.append(conv(after))
    return complete_plan(steps, encoder, after)


def _tail(part: Any) -> list[Step]:
    return [norm(part.conv_norm_out), activation(part.conv_act), conv(part.conv_out)]


def _mid(block: Any) -> list[Step]:
    first, *rest = block.resnets
    steps: list[Step] = [_resnet(first)]
    for attention, resnet in zip(block.attentions, rest, strict=True):
        if attention is not None:
            steps.append(_attention(attention))
        steps.append(_resnet(resnet))
    return steps


def _resnets(block: Any) -> list[Step]:
    if len(getattr(block, "attentions", None) or ()):
        raise UnsupportedLayout(f"{type(block).__name__} has attention at full size")
    return [_resnet(resnet) for resnet in block.resnets]


def _resnet(block: Any) -> Residual:
    scale = getattr(block, "output_scale_factor", 1.0)
    if getattr(block, "upsample", None) or getattr(block, "downsample", None) or scale != 1.0:
        raise UnsupportedLayout(f"{type(block).__name__} resamples or scales its output")
    act = activation(block.nonlinearity)
    main = (norm(block.norm1), act, conv(block.conv1), norm(block.norm2), act, conv(block.conv2))
    return Residual(main, () if block.conv_shortcut is None else (conv(block.conv_shortcut),))


def _conv_of(sampler: Any) -> Any:
    module = getattr(sampler, "conv", None)
    return getattr(sampler, "Conv2d_0", None) if module is None else module


def _attention(block: Any) -> Attention:
    if hasattr(block, "to_q"):
        query, key, value, out = block.to_q, block.to_k, block.to_v, block.to_out[0]
        heads = block.heads
        odd = getattr(block, "spatial_norm", None) or getattr(block, "norm_q", None) or getattr(block, "norm_k", None)
        plain = block.residual_connection and not odd
    else:
        # diffusers before 0.17, and the parameter names of checkpoints from then.
        query, key, value, out = block.query, block.key, block.value, block.proj_attn
        heads = getattr(block, "num_heads", 1)
        plain = True
    if not plain or getattr(block, "rescale_output_factor", 1.0) != 1.0:
        raise UnsupportedLayout(f"{type(block).__name__} is more than plain self-attention")
    return Attention(norm(block.group_norm).module, query, key, value, out, heads)
