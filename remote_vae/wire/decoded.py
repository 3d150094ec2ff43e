"""The answer to a decode: made by the server, and checked by the client before it is believed. Its request: ``decode``."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Union, cast

import numpy as np
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer, NotFinite
from remote_vae.wire import pixels as px
from remote_vae.wire.checks import (
    KNOWN_DOWNSCALES,
    PIXEL_CHANNELS,
    TENSOR_LABELS,
    check_float,
    check_label,
    check_values,
    head_headers,
    read_head,
)
from remote_vae.wire.colours import check_colours
from remote_vae.wire.decode import DecodeRequest, check_alpha
from remote_vae.wire.errors import ERROR_LIMIT
from remote_vae.wire.extras import expect_compressed
from remote_vae.wire.http import BASE64_TYPE, TENSOR_TYPE, Expected, HttpResponse
from remote_vae.wire.latents import PACK, PICTURES, VIDEOS
from remote_vae.wire.legacy import from_base64, to_base64
from remote_vae.wire.query import Output
from remote_vae.wire.several import PICTURES_TYPE, joined, parted
from remote_vae.wire.tensors import TensorHead, dtype_name, is_within, on_cpu, tensor_from_bytes, tensor_to_bytes

Payload = Union[torch.Tensor, Image.Image, bytes]

# Frames that one latent frame may become (HunyuanVideo and Wan 4, LTX 8).
MAX_FRAMES_PER_LATENT = 8

# A trained VAE overshoots [-1, 1] by tenths; far beyond is a broken answer. Random weights, which tests use, reach tens.
PIXEL_LIMIT = 100.0
UNIT_LIMIT = 1.01

_IMAGE_BYTES_PER_PIXEL = 8
_MP4_BYTES_PER_PIXEL = 4
_SLACK = 1 << 20
# All files of one answer together: a server of ours makes no more than 64 megapixels at once.
_MAX_PICTURES_BYTES = 1 << 29

_IMAGE_LABELS = frozenset({"", "image/png", "image/jpeg", "application/octet-stream"})
_MP4_LABELS = frozenset({"", "text/plain", "video/mp4", "application/octet-stream"})
_JSON_LABELS = frozenset({"", "application/json", BASE64_TYPE, "text/plain"})


@dataclass(frozen=True)
class DecodeAnswer:
    """A checked answer to a decode.

    Attributes:
        output: what form ``payload`` has.
        payload: as there; uint8 levels of several videos are ``[B, F, H, W, 3]``.
        is_video: whether the pictures are frames: pixels are then ``[B, 3, F, H, W]``, also those of one picture.
    """

    output: Output
    payload: Payload
    is_video: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        """The payload of a tensor answer."""
        if not isinstance(self.payload, torch.Tensor):
            raise TypeError(f"a {self.output.value} answer holds no tensor")
        return self.payload

    @property
    def size(self) -> tuple[int, int]:
        """H, W in pixels of a picture answer or a tensor of pictures."""
        return self.extent[-2:]

    @property
    def extent(self) -> tuple[int, int, int, int, int]:
        """B, channels, F (1 for pictures), H, W of what the pixels are."""
        if isinstance(self.payload, Image.Image):
            return 1, len(self.payload.getbands()), 1, self.payload.height, self.payload.width
        shape = tuple(self.tensor.shape)
        if self.output is Output.UINT8:
            shape = (*shape[:-3], shape[-1], *shape[-3:-1])  # channels before H and W, as in the other forms
        if self.output is Output.TENSOR and len(shape) == VIDEOS:
            batch, channels, frames = shape[:3]
        else:
            channels = shape[-3]
            batch, frames = shape[:-3] if len(shape) == VIDEOS else (1, shape[0]) if self.is_video else (shape[0], 1)
        return batch, channels, frames, shape[-2], shape[-1]

    def picture(self, index: int) -> DecodeAnswer:
        """One picture of a batch's tensor answer, as a batch of one; its memory is shared."""
        return replace(self, payload=self.tensor[index : index + 1])

    def pixels(self, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        """``[B, 3, H, W]``, or of videos ``[B, 3, F, H, W]``, in [-1, 1], whatever came over the wire.

        8-bit levels survive rounding and truncating hosts. Beside the payload and the pixels a clip takes no memory.
        """
        return self.tensor.to(device, dtype) if self.output is Output.TENSOR else px.from_uint8(self.levels, dtype, device)

    @property
    def levels(self) -> torch.Tensor:
        """uint8 ``[B, H, W, 3]``, or of videos ``[B, F, H, W, 3]``."""
        if isinstance(self.payload, Image.Image):
            levels = torch.from_numpy(np.array(self.payload)).unsqueeze(0)
        elif self.output is Output.UINT8:
            levels = self.tensor
        else:
            raise TypeError(f"a {self.output.value} answer has no 8-bit levels")
        return levels.unsqueeze(0) if self.is_video and levels.ndim < VIDEOS else levels


# --- the server's side -------------------------------------------------------------------------------------------------


def decode_response(
    request: DecodeRequest, pixels: torch.Tensor, *, bring: Callable[[torch.Tensor], torch.Tensor] = on_cpu
) -> HttpResponse:
    """The answer to ``request``, made frame by frame: beside the pixels and the answer a clip takes no memory.

    Levels are those of the pixels as the VAE made them; other values come in the dtype that was asked in, where that is
    floating point: a half-precision client wants half the bytes.

    Args:
        request: what was asked for.
        pixels: ``[B, 3 or 4, H, W]`` or ``[B, 3 or 4, F, H, W]`` in [-1, 1], any device, any floating point dtype; one frame
            where the latents had no frames.
        bring: gets a part of the answer onto the CPU, in row-major order. What it raises ends the work.

    Raises:
        NotFinite: NaN or infinite pixels, which would be a black picture.
        InvalidRequest: they do not fit into that form, or this machine cannot make it (mp4 without its encoder).
    """
    if not is_within(pixels):
        raise NotFinite("the VAE gave NaN or infinite pixels for these latents")
    output = request.output
    check_alpha(output, pixels.shape[1])
    if pixels.ndim == VIDEOS and not request.is_video:
        pixels = pixels.squeeze(2)
    if pixels.ndim != (VIDEOS if request.is_video else PICTURES):
        raise InvalidRequest(f"latents {list(request.latents.shape)} make pixels {list(pixels.shape)}: send them with frames")
    if output in (Output.TENSOR, Output.UNIT):
        return _tensor_response(request, _as_asked(request, pixels, bring))
    frames = list(px.frames_of(pixels))
    if output.is_image and len(frames) > 1 and not request.is_several:
        raise InvalidRequest(f"these latents make {len(frames)} pictures, and a {output.value} answer holds one")

    def to_levels(frame: torch.Tensor) -> torch.Tensor:
        return bring(px.to_uint8(frame, truncate=request.truncate))

    if output is Output.UINT8:
        return _tensor_response(request, _of_frames(frames, to_levels))
    if output is Output.MP4:
        file = io.BytesIO()
        px.write_mp4((to_levels(frame)[0] for frame in frames), file)
        return HttpResponse(200, {"Content-Type": "video/mp4"}, file.getbuffer())
    files = [px.image_to_bytes(Image.fromarray(to_levels(frame)[0].numpy()), output.value) for frame in frames]
    if request.is_several:
        return HttpResponse(200, {"Content-Type": PICTURES_TYPE}, joined(files))
    return HttpResponse(200, {"Content-Type": "image/jpeg" if output is Output.JPG else "image/png"}, files[0])


def _of_frames(frames: list[torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``make`` of every frame, one after the other, as one batch."""
    first = make(frames[0])
    made = first.new_empty((len(frames), *first.shape[1:]))
    made[:1] = first
    for index, frame in enumerate(frames[1:], start=1):
        made[index : index + 1] = make(frame)
    return made


def _as_asked(request: DecodeRequest, pixels: torch.Tensor, bring: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Floating point values on the CPU, frame by frame: a second copy of a long video would not fit."""
    dtype = request.latents.dtype if request.latents.is_floating_point() else pixels.dtype
    if request.output is Output.UNIT:
        return _of_frames(list(px.frames_of(pixels)), lambda frame: bring(px.to_unit(frame.to(dtype))))
    if pixels.dtype == dtype:
        return bring(pixels)
    made = torch.empty(pixels.shape, dtype=dtype)
    axis = 2 if pixels.ndim == VIDEOS else 0
    for target, source in zip(made.unbind(axis), pixels.unbind(axis), strict=True):
        target.copy_(bring(source.to(dtype)))
    return made


def _tensor_response(request: DecodeRequest, tensor: torch.Tensor) -> HttpResponse:
    body = tensor_to_bytes(tensor)
    if not request.base64_answer:
        return HttpResponse(200, {"Content-Type": TENSOR_TYPE, **head_headers(tensor)}, body)
    parameters = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
    return HttpResponse(200, {"Content-Type": "application/json"}, to_base64(body, parameters=parameters))


# --- the client's side -------------------------------------------------------------------------------------------------


def expect_decode(request: DecodeRequest, headers: Mapping[str, str]) -> Expected[DecodeAnswer]:
    """What a 200 answer to ``request`` with these ``headers`` (lower-case names) may hold.

    Raises:
        MalformedAnswer: it is not the answer to this request.
    """
    if request.is_several:
        return _expect_several(request, headers)
    if request.output.is_tensor and not request.base64_answer:
        return expect_compressed(partial(_expect_one, request), request.extras)(headers)
    return _expect_one(request, headers)


def _expect_one(request: DecodeRequest, headers: Mapping[str, str]) -> Expected[DecodeAnswer]:
    finish: Callable[[np.ndarray], Payload]
    exact = None
    if request.output.is_image:
        check_label(headers, _IMAGE_LABELS)
        finish, limit = partial(_read_image, request), _max_pixels(request) * _IMAGE_BYTES_PER_PIXEL + _SLACK
    elif request.output is Output.MP4:
        check_label(headers, _MP4_LABELS)
        finish, limit = _read_mp4, _max_frames(request) * _max_pixels(request) * _MP4_BYTES_PER_PIXEL + _SLACK
    elif request.base64_answer:
        check_label(headers, _JSON_LABELS)
        # float32 for every value, in base64's 4 bytes for 3, and the JSON around it
        values = request.batch * max(PIXEL_CHANNELS) * _max_pixels(request) * _max_frames(request)
        finish, limit = partial(_read_base64_answer, request), values * 4 * 4 // 3 + ERROR_LIMIT
    else:
        check_label(headers, TENSOR_LABELS)
        head = read_head(headers.get("shape"), headers.get("dtype"))
        _check_head(request, head)
        finish, limit = partial(_read_values, request, head), head.nbytes
        exact = limit

    def believed(body: np.ndarray) -> DecodeAnswer:
        answer = DecodeAnswer(request.output, finish(body), request.is_video)
        check_colours(request, answer)
        return answer

    return Expected(believed, limit, exact)


def _expect_several(request: DecodeRequest, headers: Mapping[str, str]) -> Expected[DecodeAnswer]:
    """Picture files, whose levels are the answer."""
    check_label(headers, frozenset({PICTURES_TYPE}))

    def believed(body: np.ndarray) -> DecodeAnswer:
        try:
            files = parted(body.data, request.batch)
        except ValueError as error:
            raise MalformedAnswer(str(error)) from None
        pictures = [_read_image(request, np.frombuffer(file, dtype=np.uint8)) for file in files]
        levels = [DecodeAnswer(request.output, picture).levels for picture in pictures]
        if len({each.shape for each in levels}) > 1:
            raise MalformedAnswer("got pictures of several sizes for one batch")
        answer = DecodeAnswer(Output.UINT8, torch.cat(levels))
        check_colours(request, answer)
        return answer

    most = request.batch * (_max_pixels(request) * _IMAGE_BYTES_PER_PIXEL + _SLACK)
    return Expected(believed, min(most, _MAX_PICTURES_BYTES))


def _read_image(request: DecodeRequest, body: np.ndarray) -> Payload:
    try:
        image = px.image_from_bytes(body.data, max_pixels=_max_pixels(request))
    except InvalidRequest as error:
        raise MalformedAnswer(str(error)) from None
    if not _fits_picture(request, image.height, image.width):
        raise MalformedAnswer(f"got a picture of {image.height} x {image.width}, expected {_expected_size(request)}")
    return image


def _read_mp4(body: np.ndarray) -> Payload:
    return px.check_mp4(body.data)


def _read_base64_answer(request: DecodeRequest, body: np.ndarray) -> Payload:
    try:
        document, data = from_base64(body.data)
        parameters = cast("dict[str, object]", document["parameters"])
        shape, dtype = parameters["shape"], parameters["dtype"]
    except (ValueError, KeyError, TypeError):
        raise MalformedAnswer("got a body that is not the JSON of a base64 tensor") from None
    head = read_head(shape, dtype)
    _check_head(request, head)
    return _read_values(request, head, np.frombuffer(data, dtype=np.uint8))


def _read_values(request: DecodeRequest, head: TensorHead, body: np.ndarray) -> Payload:
    tensor = tensor_from_bytes(body, head)
    if request.output is not Output.UINT8:
        check_values(tensor, UNIT_LIMIT if request.output is Output.UNIT else PIXEL_LIMIT)
    return tensor


def _check_head(request: DecodeRequest, head: TensorHead) -> None:
    shape = head.shape
    if request.output is Output.UINT8:
        if head.dtype != torch.uint8:
            raise MalformedAnswer(f"got {head}, expected uint8")
        shape = (shape[0], shape[-1], *shape[1:-1])  # [B, H, W, 3] as [B, 3, H, W]
    else:
        check_float(head)
    if request.is_video and request.output is Output.TENSOR:
        fits = len(shape) == VIDEOS and shape[0] == request.batch and shape[2] <= _max_frames(request)
    elif request.is_video:
        fits = len(shape) == PICTURES and shape[0] <= _max_frames(request)
    else:
        fits = len(shape) == PICTURES and shape[0] == request.batch
    if not fits or shape[1] not in PIXEL_CHANNELS or not _fits_picture(request, *shape[-2:]):
        frames = f" x up to {_max_frames(request)} frames" if request.is_video else ""
        raise MalformedAnswer(f"got {head}, expected {request.batch} x 3 or 4 channels{frames} x {_expected_size(request)}")


def _fits_picture(request: DecodeRequest, height: int, width: int) -> bool:
    if request.is_packed:
        return (height, width) == _packed_size(request)
    rows, columns = request.latents.shape[-2:]
    scale, rest = divmod(height, rows)
    return scale in KNOWN_DOWNSCALES and not rest and width == columns * scale


def _packed_size(request: DecodeRequest) -> tuple[int, int]:
    # 16 pixels a token: 1208 px are answered with 1200 (protocol.md's observation of the hosted endpoint).
    cell = 8 * PACK
    return (request.height or 0) // cell * cell, (request.width or 0) // cell * cell


def _expected_size(request: DecodeRequest) -> str:
    """The pixels that may come, for messages."""
    if request.is_packed:
        return "{} x {} pixels".format(*_packed_size(request))
    rows, columns = request.latents.shape[-2:]
    return f"{rows} x {columns} times {', '.join(map(str, KNOWN_DOWNSCALES[:-1]))} or {KNOWN_DOWNSCALES[-1]} pixels"


def _max_pixels(request: DecodeRequest) -> int:
    if request.is_packed:
        return (request.height or 0) * (request.width or 0)
    rows, columns = request.latents.shape[-2:]
    return rows * columns * max(KNOWN_DOWNSCALES) ** 2


def _max_frames(request: DecodeRequest) -> int:
    return request.latent_frames * MAX_FRAMES_PER_LATENT if request.is_video else 1
