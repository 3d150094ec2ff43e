"""The last resort: latents that nothing could decode are saved with what is needed to decode them later."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family, load_families

FORMAT = "remote-vae-latents-1"
_TENSOR = "latents"


@dataclass(frozen=True)
class Rescued:
    """Raw latents ``[B, C, h, w]`` from a file, and the family that they belong to."""

    latents: torch.Tensor
    family: Family


def default_folder() -> Path:
    """Where latents go when neither the user nor the host says."""
    return Path.home() / "remote-vae-rescue"


def save_latents(latents: torch.Tensor, family: Family, folder: Path, why: str) -> Path:
    """Write raw ``latents`` to a new .safetensors file in ``folder``; ``remote-vae decode FILE`` reads it.

    Raises:
        OSError: the folder cannot be written to.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = _free_name(folder)
    metadata = {
        "format": FORMAT,
        "family": family.key,
        "factors": json.dumps([family.latent_channels, family.downscale, family.scaling_factor, family.shift_factor]),
        "why": why[:500],
    }
    save_file({_TENSOR: latents.detach().to("cpu").contiguous()}, str(path), metadata=metadata)
    return path


def load_latents(path: Path) -> Rescued:
    """Read a file of ``save_latents``.

    Raises:
        InvalidRequest: it is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT or _TENSOR not in list(file.keys()):
                raise InvalidRequest(f"{path} does not hold latents saved by Remote VAE")
            latents = file.get_tensor(_TENSOR)
        channels, downscale, scaling, shift = json.loads(metadata["factors"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
    key = metadata.get("family", "")
    family = load_families().get(key) or Family(key, "custom VAE", channels, downscale, scaling, shift)
    return Rescued(latents, family)


def _free_name(folder: Path) -> Path:
    stem = time.strftime("latents-%Y%m%d-%H%M%S")
    for number in range(1000):
        path = folder / (f"{stem}-{number}.safetensors" if number else f"{stem}.safetensors")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise OSError(f"{folder} already holds a thousand files named {stem}")
