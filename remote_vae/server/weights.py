"""Files of VAE weights, as people have them: in diffusers' names, older ones or ldm's, alone or inside a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from remote_vae.errors import SettingsError, UnsupportedLayout
from remote_vae.vae.families import Family

SUFFIXES = (".safetensors", ".sft")

# Where checkpoints keep their VAE among other weights.
_PREFIXES = ("first_stage_model.", "vae.")
# What else stands beside a VAE's own keys: what its training left there.
_OTHERS = ("loss.", "model_ema.")
# GroupNorm groups of every published VAE of this layout; a state dict does not tell them.
_GROUPS = 32
# Attention as diffusers named it before 0.15.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_BLOCK = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight")
_HEADER_LENGTH = 8
_HEADER_LIMIT = 100_000_000


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of the VAE in the file; those of other models beside it are left out.

    Raises:
        SettingsError: it is no file of weights, and what it is instead.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"--vae {path}: only .safetensors files are read, as a .ckpt or .pt can run code when loaded")
    try:
        _check_file(path)
        state = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingsError(f"--vae {path}: {error}") from None
    for prefix in _PREFIXES:
        part = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if part:
            return part
    return {key: value for key, value in state.items() if not key.startswith(_OTHERS)}


def _check_file(path: Path) -> None:
    """Raises ValueError: what commonly lies there in the place of weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_HEADER_LENGTH)
        begin = start + file.read(64)
        if begin.startswith(b"version https://git-lfs"):
            raise ValueError('this is a Git LFS pointer and not the weights: run "git lfs pull" in its folder')
        if begin.lstrip()[:1] == b"<":
            raise ValueError("this is a web page and not weights: download the file itself, signed in where the site wants it")
        length = int.from_bytes(start, "little")
        if len(start) < _HEADER_LENGTH or length > min(size, _HEADER_LIMIT):
            partly = len(start) == _HEADER_LENGTH and length <= _HEADER_LIMIT
            raise ValueError("only a part of the file was downloaded" if partly else "this is not a safetensors file")
        file.seek(_HEADER_LENGTH)
        header = json.loads(file.read(length))
    ends = (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    whole = _HEADER_LENGTH + length + max(ends, default=0)
    if size < whole:
        raise ValueError(f"only a part of the file was downloaded: {size} of {whole} bytes")


def infer_config(state: Mapping[str, torch.Tensor], family: Family) -> dict[str, Any]:
    """The AutoencoderKL config of a VAE's state dict, in ldm's names or diffusers'.

    Raises:
        UnsupportedLayout: it is not such a VAE, or its norm groups cannot be the usual 32.
    """
    channels: dict[int, int] = {}
    layers = 0
    for key, weight in state.items():
        match = _BLOCK.fullmatch(key)
        if match:
            channels[int(match[1])] = weight.shape[0]
            layers = max(layers, int(match[2]) + 1)
    conv_in = state.get("decoder.conv_in.weight")
    if not channels or conv_in is None:
        raise UnsupportedLayout("the file holds no VAE of the AutoencoderKL layout")
    widths = [channels[index] for index in sorted(channels)]
    if any(width % _GROUPS for width in widths):
        raise UnsupportedLayout(f"widths {widths} do not fit {_GROUPS} norm groups: put its config.json beside it")
    if conv_in.shape[1] != family.latent_channels:
        raise UnsupportedLayout(f"it has {conv_in.shape[1]} latent channels, and {family.label} has {family.latent_channels}")
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": family.latent_channels,
        "norm_num_groups": _GROUPS,
        "scaling_factor": family.scaling_factor,
        "shift_factor": family.shift_factor or None,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": any(".mid.attn_1." in key or ".mid_block.attentions." in key for key in state),
    }


def load_into(vae: Any, state: dict[str, torch.Tensor]) -> None:
    """Load ``state``, in whichever names, into a VAE of diffusers.

    Raises:
        UnsupportedLayout: these are the weights of another VAE.
    """
    wanted = vae.state_dict()
    if any(key.startswith("encoder.down.") for key in state) and "encoder.down_blocks" in "".join(wanted):
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        state = convert_ldm_vae_checkpoint(state, vae.config)
    named = {}
    for key, value in state.items():
        old = _OLD_NAME.fullmatch(key)
        name = f"{old[1]}.{_OLD_ATTENTION[old[2]]}.{old[3]}" if old else key
        if name in wanted and value.shape != wanted[name].shape and value.squeeze().shape == wanted[name].squeeze().shape:
            # Attention as 1 x 1 convolutions, [C, C, 1, 1].
            value = value.reshape(wanted[name].shape)
        named[name] = value
    missing, unknown = sorted(wanted.keys() - named), sorted(named.keys() - wanted)
    if missing or unknown:
        raise UnsupportedLayout(f"not a {type(vae).__name__} as its config says: lacks {missing[:3]}, unknown {unknown[:3]}")
    try:
        vae.load_state_dict(named)
    except RuntimeError as error:
        line = next(iter(str(error).splitlines()[1:2]), str(error)).strip()
        raise UnsupportedLayout(f"not the {type(vae).__name__} of its config: {line}") from None
