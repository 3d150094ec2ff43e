"""What stands in a query beside the output: shape and dtype, and the scaling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.wire.tensors import TensorHead

Query = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Scaling:
    """Which scaling the server applies. Decode: z / factor + shift. Encode: (z - shift) * factor. None: not at all."""

    factor: float | None = None
    shift: float | None = None
    by_model: bool = False  # legacy do_scaling=True: the server's own factors

    def __post_init__(self) -> None:
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 0):
            raise InvalidRequest(f"scaling_factor must be a positive number, not {self.factor}")
        if self.shift is not None and not math.isfinite(self.shift):
            raise InvalidRequest(f"shift_factor must be a finite number, not {self.shift}")
        if self.by_model and self.factor is not None:
            raise InvalidRequest("scaling_factor and do_scaling exclude each other: pass scaling_factor alone")

    @classmethod
    def from_query(cls, values: Mapping[str, str]) -> Scaling:
        factor = parse_number(values, "scaling_factor")
        legacy = parse_bool(values.get("do_scaling"))
        return cls(factor, parse_number(values, "shift_factor"), by_model=legacy and factor is None)

    def to_query(self) -> list[tuple[str, str]]:
        items = []
        if self.factor is not None:
            items.append(("scaling_factor", repr(float(self.factor))))
        if self.shift is not None:
            items.append(("shift_factor", repr(float(self.shift))))
        if self.by_model:
            items.append(("do_scaling", "True"))
        return items

    def unscale(self, latents: torch.Tensor, own_factor: float, own_shift: float) -> torch.Tensor:
        """Model latents to raw latents, the decode's direction; ``own_*`` are the server's factors for ``by_model``."""
        factor, shift = (own_factor, own_shift) if self.by_model else (self.factor, self.shift)
        if factor is not None:
            latents = latents / factor
        return latents + shift if shift else latents

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents to model latents, the encode's direction."""
        if self.shift:
            latents = latents - self.shift
        return latents * self.factor if self.factor is not None else latents


UNSCALED = Scaling()


def tensor_head(query: Query) -> TensorHead | None:
    """Shape and dtype in a query, so that a server knows the size of the body before it reads it; None for a picture.

    Raises:
        InvalidRequest: a shape without a dtype, or one that makes no sense.
    """
    pairs = list(query)
    shape = [value for key, value in pairs if key == "shape"]
    dtype = dict(pairs).get("dtype")
    if not shape and dtype is None:
        return None
    try:
        return TensorHead.parse(shape, dtype)
    except ValueError as error:
        raise InvalidRequest(f"shape and dtype in the query: {error}") from None


def parse_bool(value: str | None) -> bool:
    """A flag as the protocol's clients write it."""
    return (value or "").strip().lower() in ("true", "1")


def parse_number(values: Mapping[str, str], key: str) -> float | None:
    """A number; None where it is missing. Raises InvalidRequest."""
    text = values.get(key)
    if text is None or text in ("", "None"):
        return None
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"{key} must be a number, not {text[:40]!r}") from None


def parse_size(values: Mapping[str, str], key: str) -> int | None:
    """A number of pixels; None where it is missing. Raises InvalidRequest."""
    number = parse_number(values, key)
    if number is None:
        return None
    if not number.is_integer():
        raise InvalidRequest(f"{key} must be a whole number of pixels, not {values[key][:40]!r}")
    return int(number)
