"""Loads the VAE that the server serves: a diffusers folder, a .safetensors file, or a Hugging Face model id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remote_vae.errors import SettingsError, UnsupportedLayout
from remote_vae.vae.families import Family, find_family, recognise_config
from remote_vae.vae.fingerprint import ROUNDINGS, fingerprint
from remote_vae.wire import FINGERPRINT_KEYS
from remote_vae.wire.tensors import DTYPES

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CLASS = re.compile(r"\w*Autoencoder\w*")
# Where checkpoints keep their VAE among other weights.
_PREFIXES = ("first_stage_model.", "vae.")
# GroupNorm groups of every published VAE; a state dict does not tell them.
_GROUPS = 32


@dataclass(frozen=True)
class LoadedVae:
    """A VAE ready to run: in eval mode, on its device, with what ``GET /info`` says of it.

    ``fingerprints`` are of its weights as they were stored, by rounding.
    """

    vae: Any
    family: Family
    source: str
    fingerprints: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return self.fingerprints["float16"]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vae.device
        return device


def load_vae(source: str, *, family: str | None = None, dtype: str = "auto", device: str = "auto") -> LoadedVae:
    """Load the VAE at ``source``; weights come from safetensors only, never from a pickle.

    Args:
        source: a folder with a diffusers VAE (or a pipeline with a ``vae`` folder), a .safetensors file with a VAE alone or
            inside a checkpoint, or a hub id such as "stabilityai/sd-vae-ft-mse".
        family: a key of families.toml; needed for a .safetensors file, whose factors are not in it.
        dtype: "float32", "float16", "bfloat16", or "auto": float16 on a GPU, else float32.
        device: a torch device, or "auto": the first GPU, else the CPU.

    Raises:
        SettingsError: nothing there, not a VAE, or the family is needed and missing.
    """
    chosen = torch.device(_auto_device() if device == "auto" else device)
    known = find_family(family) if family else None
    path = Path(source).expanduser()
    if path.is_file():
        vae = _from_file(path, known)
    elif path.is_dir():
        vae = _from_pretrained(str(path))
    elif _HUB_ID.fullmatch(source) and not source.startswith("."):
        vae = _from_pretrained(source)
    else:
        raise SettingsError(f"--vae {source}: no such folder or file, and not a model id such as stabilityai/sd-vae-ft-mse")
    found = known or recognise_config(vae.config)
    if found is None:
        raise SettingsError(f"--vae {source}: {type(vae).__name__} has no scaling factor; name its family with --family")
    state = vae.state_dict()
    names = {rounding: fingerprint(state, rounding) for rounding in ROUNDINGS}
    # Not diffusers' own to(), which warns of modules to keep in float32 that a VAE does not have.
    vae = nn.Module.to(vae, chosen, _dtype(dtype, chosen)).eval().requires_grad_(False)
    return LoadedVae(vae, found, source, names)


def _auto_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES or name == "uint8":
        raise SettingsError(f"--dtype must be auto, float32, float16 or bfloat16, not {name}")
    return DTYPES[name]


def _from_pretrained(source: str) -> Any:
    import diffusers

    failure: Exception | None = None
    for subfolder in (None, "vae"):
        try:
            config = diffusers.AutoencoderKL.load_config(source, subfolder=subfolder)
        except (OSError, ValueError) as error:
            failure = failure or error
            continue
        kind = config.get("_class_name", "")
        if _CLASS.fullmatch(kind) and hasattr(diffusers, kind):
            try:
                return getattr(diffusers, kind).from_pretrained(source, subfolder=subfolder, use_safetensors=True)
            except (OSError, ValueError) as error:
                raise SettingsError(f"--vae {source}: its weights cannot be loaded from safetensors ({error})") from error
        failure = failure or ValueError(f"{kind or 'its config'} is not a VAE")
    raise SettingsError(f"--vae {source}: no VAE found there or in its folder vae ({failure})") from failure


def _from_file(path: Path, family: Family | None) -> Any:
    from diffusers import AutoencoderKL
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise SettingsError(f"--vae {path}: only .safetensors files are read, as a .ckpt or .pt can run code when loaded")
    config_file = path.with_name("config.json")
    if config_file.is_file():
        return _from_pretrained(str(path.parent))
    if family is None:
        raise SettingsError(
            f"--vae {path}: a single file does not say which family it is; add --family, for example --family sd1"
        )
    try:
        state = _vae_part(load_file(str(path)))
        config = infer_config(state, family)
    except (SafetensorError, UnsupportedLayout) as error:
        raise SettingsError(f"--vae {path}: {error}") from error
    vae = AutoencoderKL.from_config(config)
    result = vae.load_state_dict(_diffusers_names(state, config), strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise SettingsError(
            f"--vae {path}: not an AutoencoderKL; missing {result.missing_keys[:3]}, unknown {result.unexpected_keys[:3]}"
        )
    return vae


def _vae_part(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _PREFIXES:
        part = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if part:
            return part
    return {
        key: value
        for key, value in state.items()
        if key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    }


def infer_config(state: Mapping[str, torch.Tensor], family: Family) -> dict[str, Any]:
    """The AutoencoderKL config of a VAE's state dict, in ldm's names or diffusers'.

    Raises:
        UnsupportedLayout: it is not such a VAE, or its norm groups cannot be the usual 32.
    """
    first = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight")
    channels: dict[int, int] = {}
    layers = 0
    for key, weight in state.items():
        match = first.fullmatch(key)
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


def _diffusers_names(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    if any(key.startswith("encoder.down_blocks.") for key in state):
        return state
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    converted: dict[str, torch.Tensor] = convert_ldm_vae_checkpoint(state, config)
    return converted


def describe(loaded: LoadedVae) -> dict[str, Any]:
    """The part of ``GET /info`` that is about the VAE."""
    family = loaded.family
    return {
        "family": family.key,
        "model": _public_name(loaded.source),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "latent_channels": family.latent_channels,
        "downscale": family.downscale,
        "scaling_factor": family.scaling_factor,
        "shift_factor": family.shift_factor,
        **{key: loaded.fingerprints[rounding] for rounding, key in FINGERPRINT_KEYS.items()},
    }


def _public_name(source: str) -> str:
    """A hub id as it is; of a path the last part only, as the rest is nobody's business."""
    path = Path(source).expanduser()
    return path.name if path.exists() else source
