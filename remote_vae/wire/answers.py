"""The answers of the protocol: made by the server, and checked by the client before anything is believed.

A client first looks at status and headers (``expect_decode``, ``expect_encode``), which gives an ``Expected``: how many bytes
may come, and how to turn them into the answer. So nothing is allocated for a size that the request does not call for.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar, Union

import numpy as np
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import pixels as px
from remote_vae.wire.requests import (
    BASE64_TYPE,
    TENSOR_TYPE,
    Asked,
    DecodeRequest,
    EncodeRequest,
    Output,
)
from remote_vae.wire.tensors import (
    PACK,
    Buffer,
    TensorHead,
    dtype_name,
    is_within,
    tensor_from_bytes,
    tensor_to_bytes,
)

Answer = TypeVar("Answer")
Payload = Union[torch.Tensor, Image.Image, bytes]

# Pixels per latent cell of any VAE the protocol is used with (TAESD 8, Flux 8, DC-AE 32).
KNOWN_DOWNSCALES = (4, 8, 16, 32)
# Frames that one latent frame may become (HunyuanVideo and Wan 4, LTX 8).
MAX_FRAMES_PER_LATENT = 8
MAX_LATENT_CHANNELS = 256

# A trained VAE overshoots [-1, 1] by tenths and its raw latents stay under a hundred; far beyond is a broken answer. Random
# weights, which tests and demos use, reach tens.
PIXEL_LIMIT = 100.0
LATENT_LIMIT = 1e4
UNIT_LIMIT = 1.01

ERROR_LIMIT = 64 * 1024
_IMAGE_BYTES_PER_PIXEL = 8
_MP4_BYTES_PER_PIXEL = 4
_SLACK = 1 << 20
# Of the head of an answer, what says what its body is; what is longer than so many characters is not worth remembering.
_HEADERS = ("content-type", "content-encoding", "shape", "dtype")
_USUAL_HEAD = 300

# What a body of that sort may be labelled as; no label at all is let through, as shape and length are checked anyway.
_TENSOR_LABELS = frozenset({"", TENSOR_TYPE, "application/octet-stream"})
_IMAGE_LABELS = frozenset({"", "image/png", "image/jpeg", "application/octet-stream"})
_MP4_LABELS = frozenset({"", "text/plain", "video/mp4", "application/octet-stream"})
_JSON_LABELS = frozenset({"", "application/json", BASE64_TYPE, "text/plain"})


@dataclass(frozen=True)
class HttpAnswer:
    """What the server sends back."""

    status: int
    headers: Mapping[str, str]
    body: Union[bytes, memoryview]


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


@dataclass(frozen=True)
class EncodeAnswer:
    """A checked answer to an encode: latents ``[B, C, h, w]``, or the posterior's mean and logvar ``[B, 2 C, h, w]``."""

    latents: torch.Tensor
    is_posterior: bool


@dataclass(frozen=True)
class Expected(Generic[Answer]):
    """What may follow the head of an answer: exactly ``exact`` bytes, or up to ``limit``."""

    finish: Callable[[np.ndarray], Answer]
    limit: int
    exact: int | None = None


# --- the server's side -------------------------------------------------------------------------------------------------


def decode_answer(request: DecodeRequest, pixels: torch.Tensor) -> HttpAnswer:
    """The answer to ``request``; ``pixels`` are ``[B, 3, H, W]`` or ``[B, 3, F, H, W]`` in [-1, 1].

    Raises:
        InvalidRequest: this machine cannot make that form (mp4 without its encoder).
    """
    if request.output is Output.TENSOR:
        return _tensor_answer(request, pixels)
    frames = pixels[0].movedim(1, 0) if request.is_video else pixels
    if request.output is Output.UINT8:
        return _tensor_answer(request, px.to_uint8(frames, truncate=request.truncate))
    if request.output is Output.UNIT:
        return _tensor_answer(request, px.to_unit(frames))
    if request.output is Output.MP4:
        return HttpAnswer(200, {"Content-Type": "video/mp4"}, px.video_to_mp4(px.to_uint8(frames, truncate=request.truncate)))
    image = Image.fromarray(px.to_uint8(frames, truncate=request.truncate)[0].cpu().numpy())
    data = px.image_to_bytes(image, request.output.value)
    return HttpAnswer(200, {"Content-Type": "image/jpeg" if request.output is Output.JPG else "image/png"}, data)


def encode_answer(latents: torch.Tensor, *, is_posterior: bool = False) -> HttpAnswer:
    """The answer to an encode: ``[B, C, h, w]``, or ``[B, 2 C, h, w]`` with the header ``posterior: True``."""
    headers = {"Content-Type": TENSOR_TYPE, **_head_headers(latents)}
    if is_posterior:
        headers["posterior"] = "True"
    return HttpAnswer(200, headers, tensor_to_bytes(latents))


def error_answer(status: int, message: str) -> HttpAnswer:
    """An error; clients call ``response.json()`` on every one."""
    return HttpAnswer(status, {"Content-Type": "application/json"}, json.dumps({"error": message}).encode())


def _tensor_answer(request: DecodeRequest, tensor: torch.Tensor) -> HttpAnswer:
    body = tensor_to_bytes(tensor)
    if not request.base64_answer:
        return HttpAnswer(200, {"Content-Type": TENSOR_TYPE, **_head_headers(tensor)}, body)
    parameters = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
    document = {"inputs": base64.b64encode(body).decode("ascii"), "parameters": parameters}
    return HttpAnswer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())


def _head_headers(tensor: torch.Tensor) -> dict[str, str]:
    return {"shape": json.dumps(list(tensor.shape)), "dtype": dtype_name(tensor.dtype)}


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
        _check_label(label, encoding, _IMAGE_LABELS)
        return Expected(lambda body: _finish_image(asked, body), _max_pixels(asked) * _IMAGE_BYTES_PER_PIXEL + _SLACK)
    if output is Output.MP4:
        _check_label(label, encoding, _MP4_LABELS)
        limit = _max_frames(asked) * _max_pixels(asked) * _MP4_BYTES_PER_PIXEL + _SLACK
        return Expected(lambda body: DecodeAnswer(output, px.check_mp4(body.data)), limit)
    if asked.base64_answer:
        _check_label(label, encoding, _JSON_LABELS)
        # float32 for every value, in base64's 4 bytes for 3, and the JSON around it
        values = asked.batch * 3 * _max_pixels(asked) * (_max_frames(asked) if asked.is_video else 1)
        return Expected(lambda body: _finish_base64(asked, body), values * 4 * 4 // 3 + ERROR_LIMIT)
    _check_label(label, encoding, _TENSOR_LABELS)
    head = _read_head(shape, dtype)
    _check_decode_head(asked, head)
    return Expected(lambda body: _finish_decode(output, body, head), head.nbytes, exact=head.nbytes)


def expect_encode(request: EncodeRequest, headers: Mapping[str, str]) -> Expected[EncodeAnswer]:
    """What a 200 answer to ``request`` with these ``headers`` (lower-case names) may hold.

    Raises:
        MalformedAnswer: it is not the answer to this request.
    """
    label, encoding, shape, dtype = map(headers.get, _HEADERS)
    _check_label(label, encoding, _TENSOR_LABELS)
    head = _read_head(shape, dtype)
    is_posterior = headers.get("posterior", "").lower() == "true"
    if is_posterior and not request.posterior:
        raise MalformedAnswer("a posterior came, and latents were asked for")
    batch, height, width = request.size
    fits = (
        len(head.shape) == 4
        and head.shape[0] == batch
        and head.shape[1] <= MAX_LATENT_CHANNELS
        and any(head.shape[2:] == (height // scale, width // scale) for scale in KNOWN_DOWNSCALES)
    )
    if not fits or (is_posterior and head.shape[1] % 2):
        raise MalformedAnswer(f"{head} is not latents for {batch} picture(s) of {height} x {width}")
    _check_float(head)

    def finish(body: np.ndarray) -> EncodeAnswer:
        latents = tensor_from_bytes(body, head)
        _check_values(latents, LATENT_LIMIT)
        return EncodeAnswer(latents, is_posterior)

    return Expected(finish, head.nbytes, exact=head.nbytes)


def error_detail(body: Buffer) -> str:
    """What an error body says, in one line of at most 300 characters: the protocol's JSON, or the text of a page."""
    text = bytes(body[:ERROR_LIMIT]).decode("utf-8", "replace")
    try:
        document = json.loads(text)
        if isinstance(document, dict):
            text = str(document.get("error") or document.get("detail") or document.get("message") or document)
    except ValueError:
        text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    line = " ".join(text.split())
    return (line[:297] + "...") if len(line) > 300 else line or "no message"


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
        head = _read_head(parameters["shape"], parameters["dtype"])
        data = base64.b64decode(document["inputs"], validate=True)
    except (ValueError, KeyError, TypeError):
        raise MalformedAnswer("the body is not the JSON of a base64 tensor") from None
    _check_decode_head(asked, head)
    return _finish_decode(asked.output, np.frombuffer(data, dtype=np.uint8), head)


def _finish_decode(output: Output, body: np.ndarray, head: TensorHead) -> DecodeAnswer:
    tensor = tensor_from_bytes(body, head)
    if output is not Output.UINT8:
        _check_values(tensor, UNIT_LIMIT if output is Output.UNIT else PIXEL_LIMIT)
    return DecodeAnswer(output, tensor)


def _check_decode_head(asked: Asked, head: TensorHead) -> None:
    shape = head.shape
    if asked.output is Output.UINT8:
        if head.dtype != torch.uint8:
            raise MalformedAnswer(f"{head}, and uint8 was asked for")
        shape = (shape[0], shape[-1], *shape[1:-1])  # [B, H, W, 3] as [B, 3, H, W]
    else:
        _check_float(head)
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


def _read_head(shape: object, dtype: object) -> TensorHead:
    if shape is None or dtype is None:
        raise MalformedAnswer("no shape and dtype beside the tensor")
    try:
        return TensorHead.parse(shape, dtype)
    except ValueError as error:
        raise MalformedAnswer(str(error)) from None


def _check_label(label: str | None, encoding: str | None, allowed: frozenset[str]) -> None:
    label = (label or "").partition(";")[0].strip().lower()
    if label not in allowed:
        raise MalformedAnswer(f"content type {label[:60]}")
    if (encoding or "identity").lower() != "identity":
        raise MalformedAnswer(f"content encoding {(encoding or '')[:20]}, which was not asked for")


def _check_float(head: TensorHead) -> None:
    if head.dtype == torch.uint8:
        raise MalformedAnswer(f"{head}, and floating point values were asked for")


def _check_values(tensor: torch.Tensor, limit: float) -> None:
    if not is_within(tensor_to_bytes(tensor), tensor.dtype, limit):
        low, high = (float(value) for value in torch.aminmax(tensor.float()))
        raise MalformedAnswer(f"values from {low:g} to {high:g}, which no VAE gives")
