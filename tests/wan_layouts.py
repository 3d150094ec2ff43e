"""The VAEs of Wan and Qwen-Image in the modules and names of other projects, made of diffusers' own layers.

Sources of the names: Wan-Video/Wan2.1 and Wan2.2 (``wan/modules/vae.py``, ``vae2_2.py``), which ComfyUI and Forge Neo took
over, and Neo's ``backend/nn/wan_vae_2d.py``. They hold layers and compute nothing: what they would give is what diffusers'
VAE gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class CausalConv3d(nn.Conv3d):
    """The original's: frames that are padded in ``_padding``, rows and columns in ``padding``."""

    def __init__(self, own: nn.Conv3d) -> None:
        _, columns, _, rows, frames, _ = own._padding
        super().__init__(own.in_channels, own.out_channels, own.kernel_size, own.stride)
        self._padding, self.padding = frames, (0, rows, columns)
        self.weight, self.bias = own.weight, own.bias


class Named(nn.Module):
    """Layers and plain values under given names."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def original(vae: Any) -> nn.Module:
    """The original's VAE with the layers of diffusers' ``vae`` (Wan 2.1, or 2.2 where it is residual)."""
    coders = {}
    for name, blocks, around in (("encoder", "down_blocks", "downsamples"), ("decoder", "up_blocks", "upsamples")):
        coder = getattr(vae, name)
        middle = coder.mid_block
        coders[name] = Named(
            conv1=CausalConv3d(coder.conv_in),
            middle=nn.Sequential(_resnet(middle.resnets[0]), middle.attentions[0], _resnet(middle.resnets[1])),
            head=nn.Sequential(coder.norm_out, nn.SiLU(), CausalConv3d(coder.conv_out)),
            **{around: nn.Sequential(*(layer for block in getattr(coder, blocks) for layer in _layers(block, around)))},
        )
    return Named(**coders, conv1=CausalConv3d(vae.quant_conv), conv2=CausalConv3d(vae.post_quant_conv)).eval()


def flat(vae: Any) -> nn.Module:
    """Neo's VAE of two dimensions, with the last slice of each convolution of diffusers' ``vae``."""
    for name, module in list(vae.named_modules()):
        if isinstance(module, nn.Conv3d):
            holder = vae.get_submodule(name.rpartition(".")[0])
            if name.endswith("time_conv"):
                del holder.time_conv
                continue
            rows, columns = module.kernel_size[1:]
            conv = nn.Conv2d(module.in_channels, module.out_channels, (rows, columns), padding=(rows // 2, columns // 2))
            conv.weight = nn.Parameter(module.weight[:, :, -1].clone(), requires_grad=False)
            conv.bias = module.bias
            setattr(holder, name.rpartition(".")[2], conv)
    parts = {name: getattr(vae, name) for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")}
    return Named(**parts).eval()


def _layers(block: Any, around: str) -> list[nn.Module]:
    if not hasattr(block, "resnets"):
        return [_layer(block)]
    last = [each for name in ("upsampler", "downsampler") if (each := getattr(block, name, None)) is not None]
    layers = [_layer(each) for each in (*block.resnets, *(getattr(block, "upsamplers", None) or ()), *last)]
    if not hasattr(block, "avg_shortcut"):
        return layers
    return [Named(**{around: nn.Sequential(*layers)}, avg_shortcut=block.avg_shortcut)]


def _layer(module: Any) -> nn.Module:
    if hasattr(module, "norm1"):
        return _resnet(module)
    if hasattr(module, "time_conv"):
        return Named(resample=module.resample, time_conv=CausalConv3d(module.time_conv))
    return module


def _resnet(block: Any) -> nn.Module:
    residual = (block.norm1, nn.SiLU(), CausalConv3d(block.conv1), block.norm2, nn.SiLU(), nn.Dropout(0.0))
    shortcut = block.conv_shortcut
    shortcut = CausalConv3d(shortcut) if isinstance(shortcut, nn.Conv3d) else shortcut
    return Named(residual=nn.Sequential(*residual, CausalConv3d(block.conv2)), shortcut=shortcut)


def clamped(pixels: torch.Tensor) -> torch.Tensor:
    """As diffusers gives them; the original leaves them as they are."""
    return pixels.clamp(-1, 1)
