"""multidiffusion's Tiled VAE (pkuliyi2015/multidiffusion-upscaler-for-automatic1111, ``scripts/tilevae.py``) on diffusers' VAE.

Its file expects A1111 around it and ldm's decoder in front of it. Stand-ins take the place of A1111's modules; ``_Ldm`` shows
diffusers' coder under ldm's names. The arithmetic is the peer's own, with two changes: attention is PyTorch's, as in the other
methods, and the number of groups, 32 in its source, is the VAE's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

# What its user interface recommends where there is no GPU: latents, pixels.
DECODER_TILE = 64
ENCODER_TILE = 512

_HOST = (
    "gradio",
    "modules",
    "modules.devices",
    "modules.processing",
    "modules.scripts",
    "modules.sd_vae_approx",
    "modules.shared",
    "modules.ui",
    "modules.ui_components",
    "ldm",
    "ldm.modules",
    "ldm.modules.diffusionmodules",
    "ldm.modules.diffusionmodules.model",
    "tile_utils",
    "tile_utils.attn",
    "tile_utils.typing",
)


def find(folder: Path) -> Path | None:
    """The peer's file in ``folder`` or below it."""
    return next(iter(sorted(folder.rglob("tilevae.py"))), None)


def hooks(folder: Path, vae: Any, *, fast: bool) -> tuple[Any, Any]:
    """The peer's encoder and decoder for ``vae``, to be called as those of ``vae`` are."""
    peer = _module(folder, vae)
    kwargs = {"fast_decoder": fast, "fast_encoder": fast, "color_fix": False}
    encoder = peer.VAEHook(_Ldm(vae.encoder), ENCODER_TILE, is_decoder=False, **kwargs)
    return encoder, peer.VAEHook(_Ldm(vae.decoder), DECODER_TILE, is_decoder=True, **kwargs)


def _module(folder: Path, vae: Any) -> ModuleType:
    path = find(folder)
    if path is None:
        raise FileNotFoundError(f"no tilevae.py below {folder}")
    device = next(vae.parameters()).device
    with_host = {name: MagicMock() for name in _HOST}
    for name, module in with_host.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(with_host[parent], child, module)
    with_host["modules.devices"].device = device
    with_host["modules.scripts"].Script = object
    with_host["modules.shared"].state.interrupted = False
    # Its preview for an interrupted call is not wanted; it catches what goes wrong there.
    with_host["modules.sd_vae_approx"].cheap_approximation.side_effect = NotImplementedError
    with_host["tile_utils.attn"].get_attn_func = lambda: _attention
    sys.modules.update(with_host)
    spec = importlib.util.spec_from_file_location("peer_tilevae_source", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    # Its progress bar and its notes.
    peer.tqdm, peer.print = MagicMock(), MagicMock()
    statistics, normalise, groups = peer.get_var_mean, peer.custom_group_norm, vae.config.norm_num_groups
    peer.get_var_mean = lambda x, _, *rest: statistics(x, groups, *rest)
    peer.custom_group_norm = lambda x, _, *rest: normalise(x, groups, *rest)
    return peer


class _Ldm(nn.Module):
    """diffusers' Encoder or Decoder, as the peer wants to see it."""

    def __init__(self, coder: Any) -> None:
        super().__init__()
        self.coder = coder
        self.give_pre_end = self.tanh_out = False
        self.original_forward = coder.forward
        self.conv_in, self.norm_out, self.conv_out = coder.conv_in, coder.conv_norm_out, coder.conv_out
        middle = coder.mid_block
        first, second = (_block(resnet) for resnet in middle.resnets)
        self.mid = SimpleNamespace(block_1=first, attn_1=_attn(middle.attentions[0]), block_2=second)
        if hasattr(coder, "up_blocks"):
            # ldm counts its levels from the finest, also on the way up.
            levels = self.up = [_level(block, "upsample", block.upsamplers) for block in reversed(coder.up_blocks)]
            self.num_res_blocks = len(levels[0].block) - 1
        else:
            levels = self.down = [_level(block, "downsample", block.downsamplers) for block in coder.down_blocks]
            self.num_res_blocks = len(levels[0].block)
        self.num_resolutions = len(levels)


def _level(block: Any, name: str, resamplers: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"block": [_block(resnet) for resnet in block.resnets], name: resamplers and resamplers[0]})


def _block(resnet: Any) -> SimpleNamespace:
    return SimpleNamespace(
        in_channels=resnet.in_channels,
        out_channels=resnet.out_channels,
        use_conv_shortcut=False,
        nin_shortcut=resnet.conv_shortcut,
        norm1=resnet.norm1,
        conv1=resnet.conv1,
        norm2=resnet.norm2,
        conv2=resnet.conv2,
    )


def _attn(attention: Any) -> SimpleNamespace:
    return SimpleNamespace(norm=attention.group_norm, attention=attention)


def _attention(net: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    """``[B, C, h, w]``, already normalised; the peer adds the residual itself."""
    attention, tokens = net.attention, x.flatten(2).transpose(1, 2)
    query, key, value = (to(tokens)[:, None] for to in (attention.to_q, attention.to_k, attention.to_v))
    tokens = attention.to_out[0](nn.functional.scaled_dot_product_attention(query, key, value)[:, 0])
    return tokens.transpose(1, 2).reshape(x.shape)
