"""VAE families: what a VAE looks like on the wire, read from ``settings/families.toml``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from remote_vae.errors import SettingsError
from remote_vae.settings import read_toml

CUSTOM = "custom"

# VAEs of diffusers that latents alone are not enough for, and why.
_NOT_FOR_PICTURES: Mapping[str, str] = {
    "AutoencoderKLTemporalDecoder": "it decodes frames, and wants their number beside the latents",
    "AutoencoderKLAllegro": "it decodes videos in its own tiles only",
    "AutoencoderKLMagvit": "it decodes videos whose latents overlap in time",
}

# As UIs list VAE files.
_FILE_ENDINGS = re.compile(r"\.(safetensors|sft|ckpt|pth?|bin)$")


@dataclass(frozen=True)
class Family:
    """A group of models that share one VAE.

    ``scaling_factor`` and ``shift_factor`` relate the two kinds of latents:
    model latents = (raw latents - shift_factor) * scaling_factor, and raw = model / scaling_factor + shift_factor
    (diffusers' pipelines). ``downscale`` is pixels per latent cell along one side.
    """

    key: str
    label: str
    latent_channels: int
    downscale: int
    scaling_factor: float
    shift_factor: float = 0.0
    vae: str = ""
    files: tuple[str, ...] = ()
    dtype: str = "float16"
    shared_by: tuple[str, ...] = ()
    decode_endpoint: str = ""
    encode_endpoint: str = ""
    video: bool = False

    @property
    def is_known(self) -> bool:
        """Whether families.toml has it; a custom VAE is only sent to the user's own endpoint."""
        return self.key != CUSTOM

    def is_standard_file(self, name: str) -> bool:
        """Whether ``name``, with or without folders and ending, is a usual file name of the family's standard VAE."""
        plain = _FILE_ENDINGS.sub("", re.split(r"[/\\]", name.strip().lower())[-1])
        return plain in self.files or plain.removesuffix(".vae") in self.files

    def public_endpoint(self, op: str) -> str:
        """The public endpoint for ``op`` ("decode" or "encode"), or "" where there is none."""
        return self.decode_endpoint if op == "decode" else self.encode_endpoint


@lru_cache(maxsize=1)
def load_families() -> dict[str, Family]:
    """Every family of families.toml by its key."""
    families = {}
    for key, entry in read_toml("families.toml").items():
        if isinstance(entry, dict):
            lists = {name: tuple(entry.get(name, ())) for name in ("files", "shared_by")}
            families[key] = Family(key=key, **{**entry, **lists})
    return families


def public_max_pixels() -> int:
    """Width x height that the public endpoints take at the most."""
    return int(read_toml("families.toml")["public_max_pixels"])


def find_family(name: str) -> Family:
    """The family called ``name``, or the one whose VAE the model family ``name`` shares.

    Raises:
        SettingsError: no such family; the message lists the known ones.
    """
    wanted = name.strip().lower()
    families = load_families()
    for family in families.values():
        if wanted == family.key or wanted in family.shared_by:
            return family
    known = sorted(set(families).union(*(family.shared_by for family in families.values())))
    raise SettingsError(f"unknown VAE family {name!r}; known are {', '.join(known)}")


def not_for_pictures(name: str) -> str:
    """Why the VAE class ``name`` cannot be asked for a picture of latents; "" where it can."""
    return _NOT_FOR_PICTURES.get(name, "")


def recognise(
    *, latent_channels: int, scaling_factor: float, shift_factor: float | None, downscale: int = 8, video: bool = False
) -> Family:
    """The family with these factors, or a custom one that carries them."""
    shift = shift_factor or 0.0
    for family in load_families().values():
        if (
            family.latent_channels == latent_channels
            and family.video == video
            and family.downscale == downscale
            and math.isclose(family.scaling_factor, scaling_factor, rel_tol=1e-3)
            and math.isclose(family.shift_factor, shift, rel_tol=1e-3)
        ):
            return family
    return Family(CUSTOM, "custom VAE", latent_channels, downscale, scaling_factor, shift, video=video)


def recognise_config(config: Mapping[str, Any]) -> Family | None:
    """The family of a diffusers VAE config, or None where the config lacks what is needed (not a latent-scaling VAE)."""
    channels, scaling = config.get("latent_channels"), config.get("scaling_factor")
    if not isinstance(channels, int) or not isinstance(scaling, (int, float)):
        return None
    video = "temporal_compression_ratio" in config or str(config.get("_class_name", "")).endswith("Video")
    spatial = config.get("spatial_compression_ratio")
    blocks = config.get("block_out_channels") or (0, 0, 0, 0)
    downscale = spatial if isinstance(spatial, int) else 2 ** (len(blocks) - 1)
    return recognise(
        latent_channels=channels,
        scaling_factor=float(scaling),
        shift_factor=config.get("shift_factor"),
        downscale=downscale,
        video=video,
    )
