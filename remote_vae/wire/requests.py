"""The two requests of the protocol: objects that are valid or cannot be made, and HTTP in both directions.

The protocol is the one of diffusers' ``remote_utils``; keys of our own (``family``, ``posterior``, ``truncate``) are ignored by
other servers.
"""

from __future__ import annotations

import base64
import binascii
import enum
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Union
from urllib.parse import urlencode

import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import pixels as px
from remote_vae.wire.tensors import (
    MAX_SIZE,
    PACK,
    Buffer,
    TensorHead,
    dtype_name,
    is_packed,
    is_within,
    tensor_from_bytes,
    tensor_to_bytes,
    unpack_latents,
)

Query = Iterable[tuple[str, str]]

TENSOR_TYPE = "tensor/binary"
BASE64_TYPE = "tensor/base64"

# What a picture in a request may have where the receiver sets no limit of its own.
DEFAULT_MAX_PIXELS = 8192 * 8192


class Output(enum.Enum):
    """What a decode answers with."""

    TENSOR = "tensor"  # float [B, 3, H, W] in [-1, 1]; video [B, 3, F, H, W]
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


@dataclass(frozen=True)
class HttpRequest:
    """What goes into one POST. ``body`` may be a view that keeps a tensor alive."""

    query: tuple[tuple[str, str], ...]
    headers: Mapping[str, str]
    body: Union[bytes, memoryview]

    def url(self, endpoint: str) -> str:
        """``endpoint`` with the query; the shape is one repeated key a dimension."""
        return _with_query(endpoint, self.query)


# A user's calls differ in their values and hardly in anything else.
@lru_cache(maxsize=256)
def _with_query(endpoint: str, query: tuple[tuple[str, str], ...]) -> str:
    return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}" if query else endpoint


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
        factor = _parse_number(values, "scaling_factor")
        legacy = _parse_bool(values.get("do_scaling"))
        return cls(factor, _parse_number(values, "shift_factor"), by_model=legacy and factor is None)

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


class Asked(NamedTuple):
    """A decode request without its values: what its answer is judged by. The attributes are those of ``DecodeRequest``."""

    output: Output
    shape: tuple[int, ...]
    height: int | None
    width: int | None
    base64_answer: bool

    @property
    def is_video(self) -> bool:
        return len(self.shape) == 5

    @property
    def is_packed(self) -> bool:
        return is_packed(self.shape, self.height, self.width)

    @property
    def batch(self) -> int:
        """Number of pictures (or videos)."""
        return 1 if len(self.shape) == 3 and not self.is_packed else self.shape[0]


@dataclass(frozen=True)
class DecodeRequest:
    """Latents to be decoded.

    Attributes:
        latents: ``[B, C, h, w]``, packed ``[B, S, 4 C]``, one picture's ``[C, h, w]``, or video ``[B, C, F, h, w]``;
            finite values, any device, any strides.
        output: the form of the answer.
        scaling: absent means that the latents are raw, as the VAE's decoder takes them.
        height, width: pixels; needed for packed latents, ignored for 4-D ones.
        family: tells our own server which VAE the latents are for.
        truncate: asks our own server for 8-bit levels rounded down, for a host that does so itself; others round to nearest.
        base64_body, base64_answer: the legacy transport.
        asked: all of it but the values, made from the above.

    Raises:
        InvalidRequest: the parts do not make a request.
    """

    latents: torch.Tensor
    output: Output = Output.TENSOR
    scaling: Scaling = Scaling()
    height: int | None = None
    width: int | None = None
    family: str | None = None
    truncate: bool = False
    base64_body: bool = False
    base64_answer: bool = False
    asked: Asked = field(init=False, repr=False, compare=False)
    _bytes: memoryview = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_bytes", _checked_bytes(self.latents, "latents", (3, 4, 5)))
        asked = Asked(self.output, tuple(self.latents.shape), self.height, self.width, self.base64_answer)
        _check_asked(asked)
        object.__setattr__(self, "asked", asked)

    @property
    def is_video(self) -> bool:
        return self.asked.is_video

    @property
    def batch(self) -> int:
        """Number of pictures (or videos)."""
        return self.asked.batch

    def unpacked(self, channels: int, downscale: int) -> torch.Tensor:
        """The latents as the VAE takes them, ``[B, C, h, w]`` or ``[B, C, F, h, w]``.

        Raises:
            InvalidRequest: they do not have ``channels`` channels, or do not fit height and width.
        """
        shape = tuple(self.latents.shape)
        decode_size(shape, self.height, self.width, channels, downscale)
        if self.latents.ndim != 3:
            return self.latents
        if is_packed(shape, self.height, self.width, downscale):
            return unpack_latents(self.latents, self.height or 0, self.width or 0, downscale)
        return self.latents.unsqueeze(0)

    def to_http(self) -> HttpRequest:
        query = _decode_query(
            self.output,
            tuple(self.latents.shape),
            self.latents.dtype,
            self.scaling,
            self.height or 0,
            self.width or 0,
            self.family or "",
            truncate=self.truncate,
        )
        body: bytes | memoryview = self._bytes
        if self.base64_body:
            body = json.dumps({"inputs": base64.b64encode(body).decode("ascii")}).encode()
        headers = {
            "Content-Type": BASE64_TYPE if self.base64_body else TENSOR_TYPE,
            "Accept": BASE64_TYPE if self.base64_answer else _FORMS[self.output][1],
        }
        return HttpRequest(query, headers, body)

    @classmethod
    def from_http(cls, query: Query, headers: Mapping[str, str], body: Buffer) -> DecodeRequest:
        """What a client sent; ``headers`` with lower-case names.

        Raises:
            InvalidRequest: not a decode request of the protocol.
        """
        pairs = list(query)
        values = dict(pairs)
        head = tensor_head(pairs)
        if head is None:
            raise InvalidRequest("the query lacks shape and dtype of the latents")
        accept = headers.get("accept", "").lower()
        legacy = _media_type(headers) == BASE64_TYPE
        if legacy:
            body = _read_base64(body)
        return cls(
            latents=_read_tensor(body, head),
            output=_output(values, accept),
            scaling=Scaling.from_query(values),
            height=_parse_size(values, "height"),
            width=_parse_size(values, "width"),
            family=values.get("family") or None,
            truncate=_parse_bool(values.get("truncate")),
            base64_body=legacy,
            base64_answer=BASE64_TYPE in accept,
        )


# A user's requests are hardly ever of another form.
@lru_cache(maxsize=256)
def _check_asked(asked: Asked) -> None:
    """Raises InvalidRequest: the parts do not make a request."""
    output, shape, height, width, base64_answer = asked
    if len(shape) == 3 and not (height and width):
        raise InvalidRequest("`height` and `width` required for packed latents.")
    for name, size in (("height", height), ("width", width)):
        if size is not None and not 0 < size <= MAX_SIZE:
            raise InvalidRequest(f"{name} must be from 1 to {MAX_SIZE} pixels, not {size}")
    if output.is_image and (asked.batch > 1 or asked.is_video):
        raise InvalidRequest(
            f"latents {list(shape)} make more than one picture, and a {output.value} answer holds one: "
            "send them one by one, or ask for output_type pt"
        )
    if output is Output.MP4 and not asked.is_video:
        raise InvalidRequest(f"mp4 needs video latents [B, C, F, h, w], not {list(shape)}")
    if asked.is_video and asked.batch > 1 and output is not Output.TENSOR:
        raise InvalidRequest("several videos can only be answered as output_type pt without partial_postprocess")
    if base64_answer and not output.is_tensor:
        raise InvalidRequest("a base64 answer must be a tensor: use output_type pt")


@lru_cache(maxsize=256)
def _decode_query(
    output: Output,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scaling: Scaling,
    height: int,
    width: int,
    family: str,
    *,
    truncate: bool,
) -> tuple[tuple[str, str], ...]:
    query = list(_FORMS[output][0])
    query += [("shape", str(size)) for size in shape]
    query.append(("dtype", dtype_name(dtype)))
    query += scaling.to_query()
    if height and width:
        query += [("height", str(height)), ("width", str(width))]
    if family:
        query.append(("family", family))
    if truncate:
        query.append(("truncate", "True"))
    return tuple(query)


@dataclass(frozen=True)
class EncodeRequest:
    """A picture, or a batch of them, to be encoded.

    Attributes:
        image: a PIL image (sent as RGB PNG), or float ``[B, 3, H, W]`` in [-1, 1], any device, any strides. uint8
            ``[B, 3, H, W]`` stands for levels 0 to 255 and is understood by our own server only.
        scaling: absent means that raw latents are wanted.
        posterior: ask our own server for mean and logvar ``[B, 2 C, h, w]``, unscaled; other servers return a sample.
        family: tells our own server which VAE is wanted.

    Raises:
        InvalidRequest: the parts do not make a request.
    """

    image: Union[torch.Tensor, Image.Image]
    scaling: Scaling = Scaling()
    posterior: bool = False
    family: str | None = None
    _bytes: memoryview = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.image, torch.Tensor):
            object.__setattr__(self, "_bytes", _checked_bytes(self.image, "the image tensor", (4,)))
            if self.image.shape[1] != 3:
                raise InvalidRequest(f"the image tensor must be [B, 3, H, W], not {list(self.image.shape)}")
        elif not isinstance(self.image, Image.Image):
            raise InvalidRequest(f"the image must be a PIL image or a tensor, not {type(self.image).__name__}")
        if self.posterior and (self.scaling != Scaling()):
            raise InvalidRequest("a posterior is never scaled: leave scaling_factor and shift_factor out")

    @property
    def size(self) -> tuple[int, int, int]:
        """B, H, W in pixels."""
        if isinstance(self.image, torch.Tensor):
            return self.image.shape[0], self.image.shape[2], self.image.shape[3]
        return 1, self.image.height, self.image.width

    def pixels(self) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1]; float32 for a picture or uint8, else the dtype that was sent."""
        if not isinstance(self.image, torch.Tensor):
            return px.image_to_pixels(self.image)
        if self.image.dtype == torch.uint8:
            return self.image.to(torch.float32) / 127.5 - 1.0
        return self.image

    def to_http(self) -> HttpRequest:
        query = self.scaling.to_query()
        if self.posterior:
            query.append(("posterior", "True"))
        if self.family:
            query.append(("family", self.family))
        if not isinstance(self.image, torch.Tensor):
            return HttpRequest(tuple(query), {"Accept": TENSOR_TYPE}, px.image_to_bytes(self.image, "png"))
        query += [("shape", str(size)) for size in self.image.shape]
        query.append(("dtype", dtype_name(self.image.dtype)))
        headers = {"Content-Type": TENSOR_TYPE, "Accept": TENSOR_TYPE}
        return HttpRequest(tuple(query), headers, self._bytes)

    @classmethod
    def from_http(cls, query: Query, body: Buffer, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> EncodeRequest:
        """What a client sent; its headers do not matter. A picture of more than ``max_pixels`` is not decoded.

        Raises:
            InvalidRequest: not an encode request of the protocol.
        """
        pairs = list(query)
        values = dict(pairs)
        head = tensor_head(pairs)
        image: torch.Tensor | Image.Image
        image = px.image_from_bytes(body, max_pixels=max_pixels) if head is None else _read_tensor(body, head)
        return cls(
            image=image,
            scaling=Scaling.from_query(values),
            posterior=_parse_bool(values.get("posterior")),
            family=values.get("family") or None,
        )


def decode_size(
    shape: tuple[int, ...], height: int | None, width: int | None, channels: int, downscale: int
) -> tuple[int, int, int, int]:
    """What latents of ``shape`` decode to: pictures (or videos), frames (1 for pictures), height and width in pixels.

    Needs the head of a request only, so that a server can refuse it before it takes memory for the body.

    Raises:
        InvalidRequest: a VAE with ``channels`` latent channels cannot decode them.
    """
    if is_packed(shape, height, width, downscale) and shape[2] == channels * PACK * PACK:
        cell = downscale * PACK
        return shape[0], 1, (height or 0) // cell * cell, (width or 0) // cell * cell
    if len(shape) == 3 and not (height and width):
        raise InvalidRequest("`height` and `width` required for packed latents.")
    if len(shape) == 3 and shape[0] == channels:
        return 1, 1, shape[1] * downscale, shape[2] * downscale
    if len(shape) == 3:
        raise InvalidRequest(
            f"3-D latents {list(shape)} are neither packed for {height} x {width} pixels nor [{channels}, h, w]"
        )
    if len(shape) not in (4, 5) or shape[1] != channels:
        raise InvalidRequest(f"this VAE decodes latents with {channels} channels, not {list(shape)}")
    return shape[0], shape[2] if len(shape) == 5 else 1, shape[-2] * downscale, shape[-1] * downscale


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


# Query and Accept of each form of answer. UNIT is what diffusers sends for output_type "pil" with a processor.
_FORMS: dict[Output, tuple[tuple[tuple[str, str], ...], str]] = {
    Output.TENSOR: ((("output_type", "pt"), ("partial_postprocess", "False")), TENSOR_TYPE),
    Output.UINT8: ((("output_type", "pt"), ("partial_postprocess", "True")), TENSOR_TYPE),
    Output.UNIT: ((("output_type", "pil"), ("partial_postprocess", "False")), TENSOR_TYPE),
    Output.JPG: ((("output_type", "pil"), ("image_format", "jpg"), ("partial_postprocess", "False")), "image/jpeg"),
    Output.PNG: ((("output_type", "pil"), ("image_format", "png"), ("partial_postprocess", "False")), "image/png"),
    Output.MP4: ((("output_type", "mp4"), ("partial_postprocess", "False")), "text/plain"),
}


def _output(values: Mapping[str, str], accept: str) -> Output:
    output_type = values.get("output_type") or ("pil" if "image/" in accept else "pt")
    if output_type == "mp4":
        return Output.MP4
    if output_type == "pt":
        return Output.UINT8 if _parse_bool(values.get("partial_postprocess")) else Output.TENSOR
    if output_type != "pil":
        raise InvalidRequest(f"output_type must be pil, pt or mp4, not {output_type!r}")
    if "image/png" in accept:
        return Output.PNG
    if "image/jpeg" in accept:
        return Output.JPG
    if "tensor/" in accept:
        return Output.UNIT
    image_format = values.get("image_format", "jpg")
    if image_format not in ("png", "jpg", "jpeg"):
        raise InvalidRequest(f"image_format must be png or jpg, not {image_format!r}")
    return Output.PNG if image_format == "png" else Output.JPG


def _checked_bytes(tensor: Any, name: str, dimensions: tuple[int, ...]) -> memoryview:
    """The bytes of ``tensor``, if it can be sent. Raises InvalidRequest."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    dtype_name(tensor.dtype)
    if tensor.ndim not in dimensions:
        allowed = " or ".join(f"{count}-D" for count in dimensions)
        raise InvalidRequest(f"{name} must be {allowed}, not {list(tensor.shape)}")
    if not 1 <= min(tensor.shape) <= max(tensor.shape) <= MAX_SIZE:
        raise InvalidRequest(f"{name}: shape {list(tensor.shape)} must have sizes from 1 to {MAX_SIZE}")
    values = tensor_to_bytes(tensor)
    if not is_within(values, tensor.dtype):
        raise InvalidRequest(f"{name}: NaN or infinite values; the generation itself went wrong")
    return values


def _read_tensor(body: Buffer, head: TensorHead) -> torch.Tensor:
    try:
        return tensor_from_bytes(body, head)
    except MalformedAnswer as error:
        raise InvalidRequest(f"the body does not fit the query: {error}") from None


def _read_base64(body: Buffer) -> bytes:
    try:
        return base64.b64decode(json.loads(bytes(body))["inputs"], validate=True)
    except (ValueError, KeyError, TypeError, binascii.Error):
        raise InvalidRequest('a tensor/base64 body must be the JSON {"inputs": "<base64>"}') from None


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _parse_bool(value: str | None) -> bool:
    return (value or "").strip().lower() in ("true", "1")


def _parse_number(values: Mapping[str, str], key: str) -> float | None:
    text = values.get(key)
    if text is None or text in ("", "None"):
        return None
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"{key} must be a number, not {text[:40]!r}") from None


def _parse_size(values: Mapping[str, str], key: str) -> int | None:
    number = _parse_number(values, key)
    if number is None:
        return None
    if not number.is_integer():
        raise InvalidRequest(f"{key} must be a whole number of pixels, not {values[key][:40]!r}")
    return int(number)
