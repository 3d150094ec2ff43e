"""What stands in a query: the form of the answer, shape and dtype of the body, and the scaling."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.vae.factors import model_of, raw_of
from remote_vae.vae.families import Family
from remote_vae.wire.errors import one_line
from remote_vae.wire.http import TENSOR_TYPE
from remote_vae.wire.tensors import TensorHead, is_within

Query = Iterable[tuple[str, str]]

FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")
_SEED = re.compile(r"[0-9]{1,19}")

# The models that the protocol is used with have factors from 0.13 (SDXL) to 1.53 (SD 3), and shifts up to 0.12. Far beyond no
# latents stay finite: 1 / 1e-30 does not even fit into float16.
MIN_FACTOR = 1e-3
MAX_FACTOR = 1e3
MAX_SHIFT = 1e3


class Output(enum.Enum):
    """What a decode answers with."""

    TENSOR = "tensor"  # float [B, 3, H, W] in [-1, 1]; video [B, 3, F, H, W]; 4 channels in the place of 3 with alpha
    UINT8 = "uint8"  # uint8 [B, H, W, 3]; video [F, H, W, 3]
    UNIT = "unit"  # float [B or F, 3, H, W] in [0, 1]
    JPG = "jpg"  # one JPEG file
    PNG = "png"  # one PNG file
    MP4 = "mp4"  # one MP4 file

    @property
    def is_tensor(self) -> bool:
        """Whether the answer is raw values with shape and dtype headers."""
        return self in (Output.TENSOR, Output.UINT8, Output.UNIT)

    @property
    def is_image(self) -> bool:
        """Whether the answer is one picture file."""
        return self in (Output.JPG, Output.PNG)

    @property
    def has_alpha(self) -> bool:
        """Whether it can hold an alpha channel."""
        return self not in (Output.JPG, Output.MP4)

    @property
    def query(self) -> tuple[tuple[str, str], ...]:
        """What a query says of it."""
        return _FORMS[self][0]

    @property
    def accept(self) -> str:
        """The Accept header that goes with it."""
        return _FORMS[self][1]

    @classmethod
    def from_http(cls, values: Mapping[str, str], accept: str) -> Output:
        """What a client wants. Raises InvalidRequest: nothing that there is."""
        output_type = values.get("output_type") or ("pil" if "image/" in accept else "pt")
        if output_type == "mp4":
            return cls.MP4
        if output_type == "pt":
            return cls.UINT8 if parse_bool(values.get("partial_postprocess")) else cls.TENSOR
        if output_type != "pil":
            raise InvalidRequest(f"output_type: got {one_line(output_type, 40)!r}, expected pil, pt or mp4")
        for word, output in (("image/png", cls.PNG), ("image/jpeg", cls.JPG), ("tensor/", cls.UNIT)):
            if word in accept:
                return output
        image_format = values.get("image_format", "jpg")
        if image_format not in ("png", "jpg", "jpeg"):
            raise InvalidRequest(f"image_format: got {one_line(image_format, 40)!r}, expected png or jpg")
        return cls.PNG if image_format == "png" else cls.JPG


# Query and Accept of each form of answer. UNIT is what diffusers sends for output_type "pil" with a processor.
_FORMS: dict[Output, tuple[tuple[tuple[str, str], ...], str]] = {
    Output.TENSOR: ((("output_type", "pt"), ("partial_postprocess", "False")), TENSOR_TYPE),
    Output.UINT8: ((("output_type", "pt"), ("partial_postprocess", "True")), TENSOR_TYPE),
    Output.UNIT: ((("output_type", "pil"), ("partial_postprocess", "False")), TENSOR_TYPE),
    Output.JPG: ((("output_type", "pil"), ("image_format", "jpg"), ("partial_postprocess", "False")), "image/jpeg"),
    Output.PNG: ((("output_type", "pil"), ("image_format", "png"), ("partial_postprocess", "False")), "image/png"),
    Output.MP4: ((("output_type", "mp4"), ("partial_postprocess", "False")), "text/plain"),
}


@dataclass(frozen=True)
class Scaling:
    """Which scaling the server applies. Decode: z / factor + shift. Encode: (z - shift) * factor. None: not at all.

    Raises:
        InvalidRequest: a factor outside 0.001 to 1000 or a shift beyond 1000, which no model has.
    """

    factor: float | None = None
    shift: float | None = None
    by_model: bool = False  # legacy do_scaling=True: the server's own factors

    def __post_init__(self) -> None:
        if self.factor is not None and not MIN_FACTOR <= self.factor <= MAX_FACTOR:
            raise InvalidRequest(f"scaling_factor: got {self.factor:g}, expected {MIN_FACTOR:g} to {MAX_FACTOR:g}")
        if self.shift is not None and not abs(self.shift) <= MAX_SHIFT:
            raise InvalidRequest(f"shift_factor: got {self.shift:g}, expected {-MAX_SHIFT:g} to {MAX_SHIFT:g}")
        if self.by_model and self.factor is not None:
            raise InvalidRequest("got scaling_factor and do_scaling, expected one of them: pass scaling_factor alone")

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

    def unscale(self, latents: torch.Tensor, family: Family) -> torch.Tensor:
        """Model latents to raw latents, the decode's direction; ``family`` has the numbers for ``by_model``.

        Raises:
            InvalidRequest: they are not finite in the dtype of ``latents``, or the VAE does not know the numbers.
        """
        if self.by_model:
            latents = raw_of(latents, family)
        else:
            if self.factor is not None:
                latents = latents / self.factor
            if self.shift:
                latents = latents + self.shift
        if not is_within(latents):
            dtype = str(latents.dtype).removeprefix("torch.")
            raise InvalidRequest(f"the unscaled latents are too large for the VAE's {dtype}: check scaling_factor")
        return latents

    def scale(self, latents: torch.Tensor, family: Family) -> torch.Tensor:
        """Raw latents to model latents, the encode's direction; ``family`` has the numbers for ``by_model``.

        Raises:
            InvalidRequest: the VAE does not know the numbers.
        """
        if self.by_model:
            return model_of(latents, family)
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
    """A finite number; None where it is missing. Raises InvalidRequest."""
    text = values.get(key)
    if text is None or text in ("", "None"):
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRequest(f"{key}: got {one_line(text, 40)!r}, expected a number")
    return number


def parse_size(values: Mapping[str, str], key: str) -> int | None:
    """A number of pixels; None where it is missing. Raises InvalidRequest."""
    number = parse_number(values, key)
    if number is None:
        return None
    if not number.is_integer():
        raise InvalidRequest(f"{key}: got {number:g}, expected a whole number of pixels")
    return int(number)


def parse_fingerprint(values: Mapping[str, str]) -> str | None:
    """The fingerprint of the client's VAE; None where there is none. Raises InvalidRequest."""
    text = values.get("fingerprint", "").strip().lower()
    if text and not FINGERPRINT.fullmatch(text):
        raise InvalidRequest(f"fingerprint: got {one_line(text, 40)!r}, expected 8 to 64 hexadecimal digits")
    return text or None


def parse_seed(values: Mapping[str, str], key: str) -> int | None:
    """A seed of torch; None where it is missing. Raises InvalidRequest."""
    text = values.get(key, "")
    if not text:
        return None
    if not _SEED.fullmatch(text) or int(text) >= 1 << 63:
        raise InvalidRequest(f"{key}: got {one_line(text, 40)!r}, expected a whole number from 0 to 2^63 - 1")
    return int(text)
