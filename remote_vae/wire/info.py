"""``GET /info``: what an endpoint says of the VAEs it has, checked before it is believed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from remote_vae.errors import MalformedAnswer
from remote_vae.vae.families import CUSTOM, Family
from remote_vae.wire.errors import one_line, read_json
from remote_vae.wire.http import Expected
from remote_vae.wire.query import FINGERPRINT

INFO_LIMIT = 256 * 1024
# VAEs of one server, and words of what it knows beyond the protocol, that are read.
MOST_MODELS = 64
_MOST_EXTRAS = 32
# By this a UI that shares its VAE knows itself behind the address that it was given as its endpoint.
THIS_PROCESS = secrets.token_hex(8)

# The keys of the fingerprints, by the rounding they are made of.
FINGERPRINT_KEYS: Mapping[str, str] = {
    "float16": "fingerprint",
    "bfloat16": "fingerprint_bfloat16",
    "float16_bfloat16": "fingerprint_float16_bfloat16",
}
_NAME_LIMIT = 80
# Of a server's limits those that a client goes by.
_LIMITS = ("max_batch", "max_total_pixels", "max_video_pixels")
_MOST_PIXELS = 1 << 40


@dataclass(frozen=True)
class Info:
    """What an endpoint says of itself; what it leaves out is empty.

    Of one that has several VAEs, ``models`` says which, and all else is said of the first.

    Attributes:
        family: a key of families.toml, or a word of the server's own.
        model: the VAE's name in the server's words, one line.
        fingerprints: of the VAE's weights, by rounding.
        process: ``THIS_PROCESS`` of a UI that shares its VAE.
        vae: a custom family with the shape and the factors that it says its VAE has; None: it does not say them.
        name: of the VAE among those of its server, and in the path ``/<name>/decode``.
        is_loaded: whether the VAE is in memory; the first call of one that is not waits for that.
        extras: what it knows beyond the protocol; see ``extras``.
        limits: what it takes in one request: "max_batch" pictures, "max_total_pixels" of them, "max_video_pixels" of a video.
        models: its VAEs in the order in which it prefers them; none where it does not list them.
    """

    family: str = ""
    model: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    process: str = ""
    vae: Family | None = None
    name: str = ""
    is_loaded: bool = True
    extras: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    models: tuple[Info, ...] = ()


def expect_info(headers: Mapping[str, str]) -> Expected[Info]:
    """What may follow the head of an answer to ``GET /info``, whatever it is labelled as."""
    del headers
    return Expected(_info, INFO_LIMIT)


def _info(body: np.ndarray) -> Info:
    try:
        entries = read_json(body.tobytes())
    except ValueError as error:
        raise MalformedAnswer("GET /info: got something that is not JSON") from error
    if not isinstance(entries, dict):
        raise MalformedAnswer("GET /info: got JSON that is not an object")
    models = entries.get("models", [])
    if not isinstance(models, list) or len(models) > MOST_MODELS or not all(isinstance(each, dict) for each in models):
        raise MalformedAnswer(f"GET /info: got models that are not a list of up to {MOST_MODELS} objects")
    extras = entries.get("extras", [])
    if not isinstance(extras, list):
        raise MalformedAnswer("GET /info: got extras that are not a list")
    words = tuple(one_line(word, _NAME_LIMIT) for word in extras[:_MOST_EXTRAS] if isinstance(word, str))
    of_all: dict[str, Any] = {"extras": words, "limits": _limits(entries.get("limits"))}
    return replace(_of_one(entries), **of_all, models=tuple(replace(_of_one(each), **of_all) for each in models))


def _limits(entries: object) -> dict[str, int]:
    """Those that are whole numbers; one of nonsense is as none."""
    named = entries if isinstance(entries, dict) else {}
    found = {name: _whole(named, name, _MOST_PIXELS) for name in _LIMITS}
    return {name: limit for name, limit in found.items() if limit}


def _of_one(entries: dict[str, Any]) -> Info:
    fingerprints = {rounding: _text(entries, key) for rounding, key in FINGERPRINT_KEYS.items() if key in entries}
    if not all(map(FINGERPRINT.fullmatch, fingerprints.values())):
        raise MalformedAnswer("GET /info: got a fingerprint that is not 8 to 64 hexadecimal digits")
    names = _text(entries, "family"), _text(entries, "model"), fingerprints, _text(entries, "process")
    return Info(*names, _vae(entries), _text(entries, "name"), is_loaded=entries.get("loaded") is not False)


def _vae(entries: dict[str, Any]) -> Family | None:
    channels, downscale = _whole(entries, "latent_channels", 1024), _whole(entries, "downscale", 64)
    pixel_channels, frame_scale = _whole(entries, "pixel_channels", 4, 3), _whole(entries, "frame_scale", 64, 1)
    scaling, shift = (_numbers([entries.get(key)]) for key in ("scaling_factor", "shift_factor"))
    mean, std = (_numbers(entries.get(key, ())) for key in ("latents_mean", "latents_std"))
    if not (channels and downscale and pixel_channels and frame_scale and scaling and shift):
        return None
    if mean is None or std is None or {len(mean), len(std)} not in ({0}, {channels}):
        return None
    return Family(
        CUSTOM, "custom VAE", channels, downscale, scaling[0], shift[0],
        latents_mean=mean, latents_std=std, pixel_channels=pixel_channels, frame_scale=frame_scale,
        video=entries.get("video") is True,
    )  # fmt: skip


def _whole(entries: dict[str, Any], key: str, most: int, otherwise: int = 0) -> int:
    """A whole number from 1 to ``most``; 0: something else. ``otherwise`` where older servers leave it out."""
    value = entries.get(key, otherwise)
    return int(value) if _is_number(value, most) and value >= 1 and value == int(value) else 0


def _numbers(values: Any) -> tuple[float, ...] | None:
    """Numbers of a size that a VAE may have; None: something else."""
    if not isinstance(values, (list, tuple)) or not all(map(_is_number, values)):
        return None
    return tuple(map(float, values))


def _is_number(value: Any, most: float = 1e6) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= most


def _text(entries: dict[str, Any], key: str) -> str:
    value = entries.get(key, "")
    if not isinstance(value, str):
        raise MalformedAnswer(f"GET /info: got {key} that is not a text")
    return one_line(value, _NAME_LIMIT)
