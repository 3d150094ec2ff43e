"""Files of VAE weights: a VAE alone or inside a checkpoint, in one file, in shards, or as encoder and decoder apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from remote_vae.errors import SettingsError

SUFFIXES = (".safetensors", ".sft")
INDEX_SUFFIX = ".json"

# Where checkpoints keep their VAE among other weights.
_PREFIXES = ("first_stage_model.", "vae.")
# What else stands beside a VAE's own keys: what its training left there, and ComfyUI's marks of its formats.
_OTHERS = ("loss.", "model_ema.", "audio_vae.", "vocoder.")
_HEADER_LENGTH = 8
_HEADER_LIMIT = 100_000_000
_MAX_SHARDS = 1000


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        state: the weights of the VAE, in the file's own names, on the CPU.
        around: name and shape of everything in the file, other models included, as tensors without data.
        name: the file's name, without its folder.
    """

    state: dict[str, torch.Tensor]
    around: Mapping[str, torch.Tensor] = field(default_factory=dict)
    name: str = ""


def read_weights(path: Path) -> Weights:
    """The weights of the VAE in a .safetensors file; those of other models beside it are left out, unread.

    A TAESD whose encoder and decoder are two files is read from either: the other one must lie beside it.

    Raises:
        SettingsError: it is no file of weights, and what it is instead.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"--vae {path}: only .safetensors files are read, as a .ckpt or .pt can run code when loaded")
    shapes = _names_and_shapes(path)
    prefix = next((start for start in _PREFIXES if any(key.startswith(start) for key in shapes)), "")
    wanted = [key for key in shapes if key.startswith(prefix) and (prefix or not key.startswith(_OTHERS))]
    state = {key[len(prefix) :]: value for key, value in _load(path, wanted).items()}
    half = _half_of_tiny(state)
    if half:
        state = {f"taesd_{half}.{key}": value for key, value in state.items()} | _other_half(path, half)
    return Weights(state, shapes, path.name)


def read_shards(index: Path) -> Weights:
    """The weights of a VAE that lie in several files beside their index, as diffusers saves them.

    Raises:
        SettingsError: the index is none, or a shard is missing or not a file of weights.
    """
    state: dict[str, torch.Tensor] = {}
    for name in shard_names(index):
        state.update(read_weights(index.with_name(name)).state)
    return Weights(state, {}, index.name)


def shard_names(index: Path) -> list[str]:
    """The files that the index names, each once; all of them in its own folder. Raises SettingsError: it is no index."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(entry) for entry in entries})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SettingsError(f"--vae {index}: this is not the index of weights in several files") from None
    if len(names) > _MAX_SHARDS or any(Path(name).name != name or "\\" in name for name in names):
        raise SettingsError(f"--vae {index}: it names files outside its own folder, or more than {_MAX_SHARDS}")
    return names


def _half_of_tiny(state: Mapping[str, torch.Tensor]) -> str:
    """Which half of a TAESD the file is, by the original's names: layers that have only numbers. "": it is none."""
    if not all(key[:1].isdigit() for key in state) or "3.conv.0.weight" not in state:
        return ""
    # The decoder begins with a clamp, which has no weights.
    return "encoder" if "0.weight" in state else "decoder"


def _other_half(path: Path, half: str) -> dict[str, torch.Tensor]:
    other = "decoder" if half == "encoder" else "encoder"
    beside = path.with_name(path.name.replace(half, other))
    if beside == path or not beside.is_file():
        raise SettingsError(f"--vae {path}: this is the {half} of a TAESD alone; put its {other} beside it as {beside.name}")
    state = _load(beside, list(_names_and_shapes(beside)))
    if _half_of_tiny(state) != other:
        raise SettingsError(f"--vae {beside}: this is not the {other} of a TAESD")
    return {f"taesd_{other}.{key}": value for key, value in state.items()}


def _names_and_shapes(path: Path) -> dict[str, torch.Tensor]:
    try:
        header = _header(path)
        return {key: torch.empty(entry["shape"], device="meta") for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise SettingsError(f"--vae {path}: {error}") from None


def _load(path: Path, keys: list[str]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingsError(f"--vae {path}: {error}") from None


def _header(path: Path) -> dict[str, Any]:
    """What stands at the start of the file. Raises ValueError: what commonly lies there in the place of weights."""
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
        header: dict[str, Any] = json.loads(file.read(length))
    ends = (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    whole = _HEADER_LENGTH + length + max(ends, default=0)
    if size < whole:
        raise ValueError(f"only a part of the file was downloaded: {size} of {whole} bytes")
    return header
