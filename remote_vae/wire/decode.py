"""A decode: the request and its answer, each as an object that is valid or cannot be made, and as HTTP in both directions.

The protocol is the one of diffusers' ``remote_utils``; keys of our own (``family``, ``truncate``) are ignored by other servers.
"""

from __future__ import annotations

import base64
import binascii
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Union

import numpy as np
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import pixels as px
from remote_vae.wire.errors import ERROR_LIMIT
from remote_vae.wire.message import (
    BASE64_TYPE,
    KNOWN_DOWNSCALES,
    TENSOR_LABELS,
    TENSOR_TYPE,
    Expected,
    HttpRequest,
    HttpResponse,
    check_float,
    check_label,
    check_values,
    checked_bytes,
    head_headers,
    read_head,
    read_tensor,
)
from remote_vae.wire.query import UNSCALED, Query, Scaling, parse_bool, parse_size, tensor_head
from remote_vae.wire.tensors import (
    MAX_SIZE,
    PACK,
    Buffer,
    TensorHead,
    dtype_name,
    is_packed,
    tensor_from_bytes,
    tensor_to_bytes,
    unpack_latents,
)

Payload = Union[torch.Tensor, Image.Image, bytes]

# Frames that one latent frame may become (HunyuanVideo and Wan 4, LTX 8).
MAX_FRAMES_PER_LATENT = 8

# A trained VAE overshoots [-1, 1] by tenths and its raw latents stay under a hundred; far beyond is a broken answer. Random
# weights, which tests and demos use, reach tens.
PIXEL_LIMIT = 100.0
UNIT_LIMIT = 1.01

_IMAGE_BYTES_PER_PIXEL = 8
_MP4_BYTES_PER_PIXEL = 4
_SLACK = 1 << 20
# Of the head of an answer, what says what its body is; what is longer than so many characters is not worth remembering.
_HEADERS = ("content-type", "content-encoding", "shape", "dtype")
_USUAL_HEAD = 300

_IMAGE_LABELS = frozenset({"", "image/png", "image/jpeg", "application/octet-stream"})
_MP4_LABELS = frozenset({"", "text/plain", "video/mp4", "application/octet-stream"})
_JSON_LABELS = frozenset({"", "application/json", BASE64_TYPE, "text/plain"})


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
    scaling: Scaling = UNSCALED
    height: int | None = None
    width: int | None = None
    family: str | None = None
    truncate: bool = False
    base64_body: bool = False
    base64_answer: bool = False
    asked: Asked = field(init=False, repr=False, compare=False)
    _bytes: memoryview = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_bytes", checked_bytes(self.latents, "latents", (3, 4, 5)))
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
            latents=read_tensor(body, head),
            output=_output(values, accept),
            scaling=Scaling.from_query(values),
            height=parse_size(values, "height"),
            width=parse_size(values, "width"),
            family=values.get("family") or None,
            truncate=parse_bool(values.get("truncate")),
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
class DecodeAnswer:
    """A checked answer to a decode. ``payload``'s form is what ``output`` says."""

    output: Output
    payload: Payload

    @property
    def tensor(self) -> torch.Tensor:
        """The payload of a tensor answer."""
        if not isinstance(self.payload, torch.Tensor):
            raise TypeError(f"a {self.output.value} answer holds no tensor")
        return self.payload

    @property
    def size(self) -> tuple[int, int]:
        """H, W in pixels of a picture answer or a tensor of pictures."""
        if isinstance(self.payload, Image.Image):
            return self.payload.height, self.payload.width
        shape = self.tensor.shape
        return (shape[-3], shape[-2]) if self.output is Output.UINT8 else (shape[-2], shape[-1])

    def picture(self, index: int) -> DecodeAnswer:
        """One picture of a batch's tensor answer, as a batch of one; its memory is shared."""
        return DecodeAnswer(self.output, self.tensor[index : index + 1])

    def pixels(self, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """``[B, 3, H, W]`` in [-1, 1], whatever came over the wire; 8-bit levels survive rounding and truncating hosts."""
        if self.output is Output.TENSOR:
            return self.tensor.to(device, dtype)
        if self.output is Output.UINT8:
            return px.from_uint8(self.tensor.to(device), dtype)
        if isinstance(self.payload, Image.Image):
            levels = torch.from_numpy(np.array(self.payload)).unsqueeze(0)
            return px.from_uint8(levels.to(device), dtype)
        raise TypeError(f"a {self.output.value} answer is not pixels in [-1, 1]")


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
        return Output.UINT8 if parse_bool(values.get("partial_postprocess")) else Output.TENSOR
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


def _read_base64(body: Buffer) -> bytes:
    try:
        return base64.b64decode(json.loads(bytes(body))["inputs"], validate=True)
    except (ValueError, KeyError, TypeError, binascii.Error):
        raise InvalidRequest('a tensor/base64 body must be the JSON {"inputs": "<base64>"}') from None


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


# --- the server's side -------------------------------------------------------------------------------------------------


def decode_response(request: DecodeRequest, pixels: torch.Tensor) -> HttpResponse:
    """The answer to ``request``; ``pixels`` are ``[B, 3, H, W]`` or ``[B, 3, F, H, W]`` in [-1, 1].

    Raises:
        InvalidRequest: this machine cannot make that form (mp4 without its encoder).
    """
    if request.output is Output.TENSOR:
        return _tensor_response(request, pixels)
    frames = pixels[0].movedim(1, 0) if request.is_video else pixels
    if request.output is Output.UINT8:
        return _tensor_response(request, px.to_uint8(frames, truncate=request.truncate))
    if request.output is Output.UNIT:
        return _tensor_response(request, px.to_unit(frames))
    if request.output is Output.MP4:
        return HttpResponse(200, {"Content-Type": "video/mp4"}, px.video_to_mp4(px.to_uint8(frames, truncate=request.truncate)))
    image = Image.fromarray(px.to_uint8(frames, truncate=request.truncate)[0].cpu().numpy())
    data = px.image_to_bytes(image, request.output.value)
    return HttpResponse(200, {"Content-Type": "image/jpeg" if request.output is Output.JPG else "image/png"}, data)


def _tensor_response(request: DecodeRequest, tensor: torch.Tensor) -> HttpResponse:
    body = tensor_to_bytes(tensor)
    if not request.base64_answer:
        return HttpResponse(200, {"Content-Type": TENSOR_TYPE, **head_headers(tensor)}, body)
    parameters = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
    document = {"inputs": base64.b64encode(body).decode("ascii"), "parameters": parameters}
    return HttpResponse(200, {"Content-Type": "application/json"}, json.dumps(document).encode())


# --- the client's side -------------------------------------------------------------------------------------------------


def expect_decode(request: DecodeRequest, headers: Mapping[str, str]) -> Expected[DecodeAnswer]:
    """What a 200 answer to ``request`` with these ``headers`` (lower-case names) may hold.

    Raises:
        MalformedAnswer: it is not the answer to this request.
    """
    parts = tuple(map(headers.get, _HEADERS))
    if sum(len(part) for part in parts if part) > _USUAL_HEAD:
        return _expected.__wrapped__(request.asked, *parts)
    return _expected(request.asked, *parts)


# The answers to a user's calls are hardly ever of another form.
@lru_cache(maxsize=256)
def _expected(
    asked: Asked, label: str | None, encoding: str | None, shape: str | None, dtype: str | None
) -> Expected[DecodeAnswer]:
    output = asked.output
    if output.is_image:
        check_label(label, encoding, _IMAGE_LABELS)
        return Expected(lambda body: _finish_image(asked, body), _max_pixels(asked) * _IMAGE_BYTES_PER_PIXEL + _SLACK)
    if output is Output.MP4:
        check_label(label, encoding, _MP4_LABELS)
        limit = _max_frames(asked) * _max_pixels(asked) * _MP4_BYTES_PER_PIXEL + _SLACK
        return Expected(lambda body: DecodeAnswer(output, px.check_mp4(body.data)), limit)
    if asked.base64_answer:
        check_label(label, encoding, _JSON_LABELS)
        # float32 for every value, in base64's 4 bytes for 3, and the JSON around it
        values = asked.batch * 3 * _max_pixels(asked) * (_max_frames(asked) if asked.is_video else 1)
        return Expected(lambda body: _finish_base64(asked, body), values * 4 * 4 // 3 + ERROR_LIMIT)
    check_label(label, encoding, TENSOR_LABELS)
    head = read_head(shape, dtype)
    _check_decode_head(asked, head)
    return Expected(lambda body: _finish_decode(output, body, head), head.nbytes, exact=head.nbytes)


def _finish_image(asked: Asked, body: np.ndarray) -> DecodeAnswer:
    try:
        image = px.image_from_bytes(body.data, max_pixels=_max_pixels(asked))
    except InvalidRequest as error:
        raise MalformedAnswer(str(error)) from None
    if not _fits_picture(asked, image.height, image.width):
        raise MalformedAnswer(f"a picture of {image.height} x {image.width} for {_name(asked)}")
    return DecodeAnswer(asked.output, image)


def _finish_base64(asked: Asked, body: np.ndarray) -> DecodeAnswer:
    try:
        document = json.loads(bytes(body))
        parameters = document["parameters"]
        head = read_head(parameters["shape"], parameters["dtype"])
        data = base64.b64decode(document["inputs"], validate=True)
    except (ValueError, KeyError, TypeError):
        raise MalformedAnswer("the body is not the JSON of a base64 tensor") from None
    _check_decode_head(asked, head)
    return _finish_decode(asked.output, np.frombuffer(data, dtype=np.uint8), head)


def _finish_decode(output: Output, body: np.ndarray, head: TensorHead) -> DecodeAnswer:
    tensor = tensor_from_bytes(body, head)
    if output is not Output.UINT8:
        check_values(tensor, UNIT_LIMIT if output is Output.UNIT else PIXEL_LIMIT)
    return DecodeAnswer(output, tensor)


def _check_decode_head(asked: Asked, head: TensorHead) -> None:
    shape = head.shape
    if asked.output is Output.UINT8:
        if head.dtype != torch.uint8:
            raise MalformedAnswer(f"{head}, and uint8 was asked for")
        shape = (shape[0], shape[-1], *shape[1:-1])  # [B, H, W, 3] as [B, 3, H, W]
    else:
        check_float(head)
    if asked.is_video and asked.output is Output.TENSOR:
        fits = len(shape) == 5 and shape[0] == asked.batch and shape[2] <= _max_frames(asked)
    elif asked.is_video:
        fits = len(shape) == 4 and shape[0] <= _max_frames(asked)
    else:
        fits = len(shape) == 4 and shape[0] == asked.batch
    if not fits or shape[1] != 3 or not _fits_picture(asked, *shape[-2:]):
        raise MalformedAnswer(f"{head} for {_name(asked)}")


def _fits_picture(asked: Asked, height: int, width: int) -> bool:
    if asked.is_packed:
        # 16 pixels a token: 1208 px are answered with 1200 (protocol.md's observation of the hosted endpoint).
        cell = 8 * PACK
        return (height, width) == ((asked.height or 0) // cell * cell, (asked.width or 0) // cell * cell)
    rows, columns = asked.shape[-2:]
    scale, rest = divmod(height, rows)
    return scale in KNOWN_DOWNSCALES and not rest and width == columns * scale


def _max_pixels(asked: Asked) -> int:
    if asked.is_packed:
        return (asked.height or 0) * (asked.width or 0)
    rows, columns = asked.shape[-2:]
    return rows * columns * max(KNOWN_DOWNSCALES) ** 2


def _max_frames(asked: Asked) -> int:
    return asked.shape[2] * MAX_FRAMES_PER_LATENT


def _name(asked: Asked) -> str:
    return f"latents {list(asked.shape)}"
