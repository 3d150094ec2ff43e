"""VAE families: what a VAE looks like on the wire, read from ``settings/families.toml``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from remote_vae.errors import SettingsError, UnsupportedLayout
from remote_vae.settings import read_toml
from remote_vae.vae.shapes import NOT_FOR_PICTURES, Shape, known_classes, shape_of

CUSTOM = "custom"
# The class that several families share: its factors tell them apart.
_KL = "AutoencoderKL"

# As UIs list VAE files.
_FILE_ENDINGS = re.compile(r"\.(safetensors|sft|ckpt|pth?|bin)$")
_LISTS = ("files", "shared_by", "classes", "latents_mean", "latents_std")


@dataclass(frozen=True)
class Family:
    """A group of models that share one VAE.

    ``scaling_factor`` and ``shift_factor`` relate the two kinds of latents, or ``latents_mean`` and ``latents_std``, of each
    channel, do: raw latents = model latents * std / scaling_factor + mean, and the shift in the place of the mean where there
    is none (diffusers' pipelines). ``latent_channels``, ``downscale``, ``pixel_channels``, ``video`` and ``frame_scale``: see
    ``Shape``. ``classes`` are those of diffusers.
    """

    key: str
    label: str
    latent_channels: int
    downscale: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    pixel_channels: int = 3
    video: bool = False
    frame_scale: int = 1
    vae: str = ""
    classes: tuple[str, ...] = (_KL,)
    files: tuple[str, ...] = ()
    dtype: str = "float16"
    shared_by: tuple[str, ...] = ()
    decode_endpoint: str = ""
    encode_endpoint: str = ""

    @property
    def is_known(self) -> bool:
        """Whether families.toml has it; a custom VAE is only sent to the user's own endpoint."""
        return self.key != CUSTOM

    @property
    def known_key(self) -> str | None:
        """By which a server of ours knows it; None: a custom one."""
        return self.key if self.is_known else None

    @property
    def shape(self) -> Shape:
        return Shape(self.latent_channels, self.downscale, self.pixel_channels, self.video, self.frame_scale)

    def frames(self, latent_frames: int) -> int:
        """Pixel frames that so many latent frames make. CogVideoX makes ``frame_scale`` of each of an even number of them."""
        return (latent_frames - 1) * self.frame_scale + 1

    def latent_frames(self, frames: int) -> int:
        """Latent frames that so many pixel frames make."""
        return (frames - 1) // self.frame_scale + 1

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
            lists = {name: tuple(entry[name]) for name in _LISTS if name in entry}
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


def recognise(*, latent_channels: int, scaling_factor: float, shift_factor: float | None, downscale: int = 8) -> Family:
    """The family with these factors of a VAE of AutoencoderKL's kind, or a custom one that carries them."""
    shape = Shape(latent_channels, downscale)
    return _of_shape(_KL, shape, {"scaling_factor": float(scaling_factor), "shift_factor": float(shift_factor or 0.0)})


def family_of(vae: Any) -> Family:
    """The family of a VAE of diffusers, by its class, or the class that it was made of, and its config.

    Raises:
        UnsupportedLayout: it is none that can be done remotely; the message says why, and which can.
    """
    config = getattr(vae, "config", None) or {}
    names = [kind.__name__ for kind in type(vae).__mro__]
    for name in names:
        if name in NOT_FOR_PICTURES:
            raise UnsupportedLayout(f"{name} cannot be done remotely: {NOT_FOR_PICTURES[name]}")
        shape = shape_of(name, config)
        if shape is not None:
            return _of_shape(name, shape, {**_factors(config, shape), **_of_weights(vae, shape)})
    raise UnsupportedLayout(f"{names[0]} is no VAE that can be done remotely. Those are {', '.join(known_classes())}")


def _of_shape(name: str, shape: Shape, factors: Mapping[str, Any]) -> Family:
    """The family of the class ``name`` that has this shape, with these factors."""
    for family in load_families().values():
        if name in family.classes and family.shape == shape and (name != _KL or _are_factors_of(family, factors)):
            return replace(family, **factors)
    if shape.pixel_channels not in (3, 4):
        raise UnsupportedLayout(f"a {name} whose pictures have {shape.pixel_channels} channels, and not 3 or 4")
    return Family(CUSTOM, "custom VAE", **{**vars(shape), **factors}, classes=(name,))


def _are_factors_of(family: Family, factors: Mapping[str, Any]) -> bool:
    if factors.get("latents_mean"):
        return False
    return all(math.isclose(getattr(family, key), factors[key], rel_tol=1e-3) for key in ("scaling_factor", "shift_factor"))


def _factors(config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """What the config says of the latents' scaling. A factor that it leaves open is none."""
    factors: dict[str, Any] = {
        "scaling_factor": float(config.get("scaling_factor") or 1.0),
        "shift_factor": float(config.get("shift_factor") or 0.0),
    }
    mean, std = config.get("latents_mean"), config.get("latents_std")
    # Cosmos has as many as latents of 16 frames have values.
    if mean and std and len(mean) == len(std) == shape.latent_channels:
        factors |= {"latents_mean": tuple(map(float, mean)), "latents_std": tuple(map(float, std))}
    return factors


def _of_weights(vae: Any, shape: Shape) -> dict[str, Any]:
    """LTX keeps mean and deviation of its latents as buffers beside its weights."""
    # Not as attributes, which diffusers looks for in the config as well, with a warning.
    buffers = dict(vae.named_buffers(recurse=False)) if hasattr(vae, "named_buffers") else {}
    found: list[Any] = [buffers.get(name) for name in ("latents_mean", "latents_std")]
    if any(getattr(values, "shape", None) != (shape.latent_channels,) or values.is_meta for values in found):
        return {}
    mean, std = (tuple(values.tolist()) for values in found)
    return {"latents_mean": mean, "latents_std": std}
