"""``GET /info``: what an endpoint says of the VAE it has, checked before it is believed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from remote_vae.errors import MalformedAnswer
from remote_vae.wire.errors import one_line, read_json
from remote_vae.wire.http import Expected

INFO_LIMIT = 64 * 1024
# By this a UI that shares its VAE knows itself behind the address that it was given as its endpoint.
THIS_PROCESS = secrets.token_hex(8)

# The keys of the fingerprints, by the rounding they are made of.
FINGERPRINT_KEYS: Mapping[str, str] = {
    "float16": "fingerprint",
    "bfloat16": "fingerprint_bfloat16",
    "float16_bfloat16": "fingerprint_float16_bfloat16",
}
_FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")
_NAME_LIMIT = 80


@dataclass(frozen=True)
class Info:
    """What an endpoint says of itself; what it leaves out is empty.

    Attributes:
        family: a key of families.toml, or a word of the server's own.
        model: the VAE's name in the server's words, one line.
        fingerprints: of the VAE's weights, by rounding.
        process: ``THIS_PROCESS`` of a UI that shares its VAE.
        factors: latent channels, pixels per latent cell along one side, scaling_factor, shift_factor; None: it does not say.
    """

    family: str = ""
    model: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    process: str = ""
    factors: tuple[int, int, float, float] | None = None


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
    fingerprints = {rounding: _text(entries, key) for rounding, key in FINGERPRINT_KEYS.items() if key in entries}
    if not all(map(_FINGERPRINT.fullmatch, fingerprints.values())):
        raise MalformedAnswer("GET /info: got a fingerprint that is not 8 to 64 hexadecimal digits")
    names = _text(entries, "family"), _text(entries, "model"), fingerprints, _text(entries, "process")
    return Info(*names, _factors(entries))


def _factors(entries: dict[str, Any]) -> tuple[int, int, float, float] | None:
    values: list[Any] = [entries.get(key) for key in ("latent_channels", "downscale", "scaling_factor", "shift_factor")]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e6 for value in values):
        return None
    channels, downscale, scaling, shift = values
    if channels not in range(1, 1025) or downscale not in range(1, 65):
        return None
    return int(channels), int(downscale), float(scaling), float(shift)


def _text(entries: dict[str, Any], key: str) -> str:
    value = entries.get(key, "")
    if not isinstance(value, str):
        raise MalformedAnswer(f"GET /info: got {key} that is not a text")
    return one_line(value, _NAME_LIMIT)
