"""The VAEs of Wan 2.1 and 2.2, Qwen-Image and Qwen-Image-2.1: diffusers', the original (ComfyUI, Forge Neo), Neo's 2-D one.

Nothing in it is of the whole picture but the attention in the middle, of each frame by itself. In time its convolutions are
causal: of one frame each takes the last of its slices, and a video comes in the VAE's own order, one frame and then more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from remote_vae.errors import UnsupportedLayout
from remote_vae.tiled.plan import (
    DOWN_PAD,
    Attention,
    Conv,
    Frames,
    Local,
    Plan,
    Pointwise,
    Residual,
    RmsNorm,
    Step,
    Upsample,
    activation,
    causal_conv,
    complete_plan,
    conv,
    in_time,
)

# Frames of pixels come one at first, and then so many at a time (diffusers' ``_encode``; ComfyUI's gives the same).
_PIXEL_FRAMES = 4
# Of the original: what wan2.2's pixels are patched by. diffusers has it in the config.
_PATCH = 2


def knows(part: nn.Module) -> bool:
    """Whether ``part`` is an encoder or a decoder of this layout."""
    return hasattr(getattr(part, "norm_out", None), "gamma") or _is_original(part)


def decoder_plan(vae: Any) -> Plan:
    """Latents ``[B, C, F, h, w]`` to pixels ``[B, 3 or 4, F', H, W]``. Raises UnsupportedLayout."""
    decoder = vae.decoder
    original = _is_original(decoder)
    before = vae.conv2 if original else vae.post_quant_conv
    steps: list[Step] = [_conv(before)]
    if original:
        steps += [_conv(decoder.conv1), *_all(decoder.middle), *_all(decoder.upsamples), *_all(decoder.head)]
    else:
        steps += [_conv(decoder.conv_in), *_mid(decoder.mid_block), *_all(decoder.up_blocks), *_tail(decoder)]
    patch = _patch(vae, decoder)
    if patch > 1:
        steps.append(Local(_unpatched(patch), _last(steps).module.out_channels // patch**2, up=patch))
    if not original:
        steps.append(Pointwise(lambda x: x.clamp(-1, 1)))
    return complete_plan(steps, decoder, before, frames=_frames(vae, 1), unused=_unused(decoder))


def encoder_plan(vae: Any) -> Plan:
    """Pixels ``[B, 3 or 4, F, H, W]`` to moments ``[B, 2 C, F', h, w]``. Raises UnsupportedLayout."""
    encoder = vae.encoder
    original = _is_original(encoder)
    first = _conv(encoder.conv1 if original else encoder.conv_in)
    patch = _patch(vae, encoder)
    steps: list[Step] = [Local(_patched(patch), first.module.in_channels, down=patch)] if patch > 1 else []
    steps.append(first)
    if original:
        steps += [*_all(encoder.downsamples), *_all(encoder.middle), *_all(encoder.head)]
    else:
        steps += [*_all(encoder.down_blocks), *_mid(encoder.mid_block), *_tail(encoder)]
    after = vae.conv1 if original else vae.quant_conv
    steps.append(_conv(after))
    return complete_plan(steps, encoder, after, frames=_frames(vae, _PIXEL_FRAMES), unused=_unused(encoder))


def _is_original(part: Any) -> bool:
    return hasattr(part, "conv1") and hasattr(part, "middle") and hasattr(part, "head")


def _frames(vae: Any, step: int) -> Frames:
    """How ``vae`` takes frames, pixels ``step`` at a time."""
    first = vae.conv2 if hasattr(vae, "conv2") else vae.post_quant_conv
    if isinstance(first, nn.Conv3d):
        # With more halvings a step of frames would make none: diffusers' encoder fails there.
        halvings = sum(isinstance(getattr(part, "time_conv", None), nn.Conv3d) for part in vae.encoder.modules())
        return Frames(several=step == 1 or 2**halvings <= step, step=step)
    if hasattr(first, "_padding"):
        # A frame is folded away: there is no second one (Qwen-Image-2.1).
        return Frames(several=False)
    return Frames(together=False)


def _patch(vae: Any, part: nn.Module) -> int:
    """By how many pixels along each side one position of the last or first convolution is one."""
    if not _is_original(part):
        return getattr(getattr(vae, "config", None), "patch_size", None) or 1
    return _PATCH if any(hasattr(each, "avg_shortcut") for each in part.modules()) else 1


def _unused(part: nn.Module) -> list[nn.Module]:
    """Convolutions in time that are two-dimensional: nothing ever gets to them."""
    in_time = (getattr(each, "time_conv", None) for each in part.modules())
    return [each for each in in_time if isinstance(each, nn.Conv2d)]


def _last(steps: list[Step]) -> Conv:
    last = steps[-1]
    if not isinstance(last, Conv):
        raise UnsupportedLayout("a decoder that does not end with a convolution")
    return last


# --- parts -------------------------------------------------------------------------------------------------------------


def _all(modules: Iterable[nn.Module]) -> list[Step]:
    return [step for module in modules for step in _steps(module)]


def _steps(module: Any) -> list[Step]:
    """Of anything that stands in a list of layers."""
    for name, make in _KINDS.items():
        if hasattr(module, name):
            return make(module)
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        return [_conv(module)]
    if isinstance(module, nn.Dropout):
        return []
    return [activation(module)]


def _block(block: Any) -> list[Step]:
    """A block of a level: residual blocks, then perhaps a change of size, and in Wan 2.2 a shortcut around all."""
    if hasattr(block, "resnets"):
        last = getattr(block, "upsampler", None) or getattr(block, "downsampler", None)
        lasts = getattr(block, "upsamplers", None) or ([] if last is None else [last])
        steps = [*_all(block.resnets), *_all(lasts)]
    else:
        steps = _all(block.upsamples if hasattr(block, "upsamples") else block.downsamples)
    shortcut = getattr(block, "avg_shortcut", None)
    return steps if shortcut is None else [Residual(tuple(steps), _around(shortcut))]


def _around(shortcut: Any) -> tuple[Step, ...]:
    """Of Wan 2.2: means of neighbouring channels and positions, or repeated ones."""
    channels, frames, scale = shortcut.out_channels, shortcut.factor_t, shortcut.factor_s
    if hasattr(shortcut, "repeats"):
        return (Local(_duplicated(shortcut.repeats, frames, scale), channels, up=scale, frames_up=frames),)
    if channels == shortcut.in_channels and shortcut.factor == 1:
        return ()
    return (Local(_averaged(channels, frames, scale), channels, down=scale, frames_down=frames),)


def _mid(block: Any) -> list[Step]:
    first, *rest = block.resnets
    steps = _resnet(first)
    for attention, resnet in zip(block.attentions, rest, strict=True):
        steps += [*([] if attention is None else _attention(attention)), *_resnet(resnet)]
    return steps


def _tail(part: Any) -> list[Step]:
    return [_norm(part.norm_out), activation(getattr(part, "nonlinearity", None)), _conv(part.conv_out)]


def _resnet(block: Any) -> list[Step]:
    if hasattr(block, "residual"):
        main, shortcut = _all(block.residual), block.shortcut
    else:
        act = activation(getattr(block, "nonlinearity", None))
        main = [_norm(block.norm1), act, _conv(block.conv1), _norm(block.norm2), act, _conv(block.conv2)]
        shortcut = block.conv_shortcut
    return [Residual(tuple(main), () if isinstance(shortcut, nn.Identity) else (_conv(shortcut),))]


def _attention(block: Any) -> list[Step]:
    return [Attention(_norm(block.norm), block.to_qkv, block.to_qkv, block.to_qkv, block.proj)]


def _resample(block: Any) -> list[Step]:
    if isinstance(block.resample, nn.Identity):
        return []
    first, last = block.resample
    time = getattr(block, "time_conv", None)
    in_3d = isinstance(time, nn.Conv3d)
    if isinstance(first, nn.Upsample):
        if first.mode not in ("nearest", "nearest-exact") or set(_pair(first.scale_factor)) != {2.0}:
            raise UnsupportedLayout(f"upsampling {first}")
        return [*([in_time(time, up=True)] if in_3d else []), Upsample(), conv(last)]
    if not isinstance(first, nn.ZeroPad2d) or tuple(first.padding) != DOWN_PAD:
        raise UnsupportedLayout(f"downsampling after {first}")
    return [conv(last, DOWN_PAD), *([in_time(time, up=False)] if in_3d else [])]


def _pair(scale: Any) -> tuple[float, ...]:
    return tuple(scale) if isinstance(scale, tuple) else (scale,)


def _norm(module: Any) -> RmsNorm:
    channels = module.gamma.numel()
    if not getattr(module, "channel_first", True) or abs(module.scale - channels**0.5) > 1e-6 * module.scale:
        raise UnsupportedLayout(f"a norm of another kind: {type(module).__name__}")
    # F.normalize: a norm of the vector of 1e-12 at least.
    return RmsNorm(module, 1e-24 / channels)


def _conv(module: Any) -> Conv:
    if isinstance(module, nn.Conv3d):
        return causal_conv(module)
    # Qwen-Image-2.1's pad themselves: left, right, top, bottom.
    return conv(module, getattr(module, "_padding", None))


_KINDS: dict[str, Callable[[Any], list[Step]]] = {
    "avg_shortcut": _block,
    "resnets": _block,
    "resample": _resample,
    "to_qkv": _attention,
    "residual": _resnet,
    "norm1": _resnet,
    "gamma": lambda module: [_norm(module)],
}


# --- functions of blocks of positions, [F, C, H, W] --------------------------------------------------------------------


def _patched(patch: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Channels of the columns of a patch, and within them of its rows."""

    def run(x: torch.Tensor) -> torch.Tensor:
        frames, channels, height, width = x.shape
        x = x.reshape(frames, channels, height // patch, patch, width // patch, patch)
        return x.permute(0, 1, 5, 3, 2, 4).flatten(1, 3)

    return run


def _unpatched(patch: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        frames, channels, height, width = x.shape
        x = x.reshape(frames, channels // patch**2, patch, patch, height, width)
        return x.permute(0, 1, 4, 3, 5, 2).reshape(frames, -1, height * patch, width * patch)

    return run


def _averaged(channels: int, frames: int, scale: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        count, taken, height, width = x.shape
        high, wide = height // scale, width // scale
        x = x.reshape(count // frames, frames, taken, high, scale, wide, scale).permute(0, 2, 1, 4, 6, 3, 5)
        return x.reshape(count // frames, channels, -1, high, wide).mean(dim=2)

    return run


def _duplicated(repeats: int, frames: int, scale: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        count, _, height, width = x.shape
        x = x.repeat_interleave(repeats, dim=1).reshape(count, -1, frames, scale, scale, height, width)
        x = x.permute(0, 2, 1, 5, 3, 6, 4)
        return x.reshape(count * frames, -1, height * scale, width * scale)

    return run
