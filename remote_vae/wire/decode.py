"""A decode: the request and its answer, each as an object that is valid or cannot be made, and as HTTP in both directions.

The protocol is the one of diffusers' ``remote_utils``; keys of our own (``family``, ``fingerprint``, ``truncate``) are ignored
by other servers, and what ``extras`` has is asked of none of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Union, cast

import numpy as np
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer, NotFinite
from remote_vae.vae.families import Family
from remote_vae.vae.packed import BatchNormed
from remote_vae.wire import pixels as px
from remote_vae.wire.checks import (
    KNOWN_DOWNSCALES,
    PIXEL_CHANNELS,
    TENSOR_LABELS,
    check_float,
    check_label,
    check_values,
    checked_bytes,
    head_headers,
    media_type,
    read_head,
    read_tensor,
)
from remote_vae.wire.colours import check_colours
from remote_vae.wire.errors import ERROR_LIMIT
from remote_vae.wire.extras import NO_EXTRAS, Extras, expect_compressed
from remote_vae.wire.http import BASE64_TYPE, TENSOR_TYPE, Buffer, Expected, HttpRequest, HttpResponse
from remote_vae.wire.latents import PACK, PICTURES, VIDEOS, as_the_vae_takes_them, is_packed
from remote_vae.wire.legacy import from_base64, to_base64
from remote_vae.wire.query import UNSCALED, Output, Query, Scaling, parse_bool, parse_fingerprint, parse_size, tensor_head
from remote_vae.wire.several import PICTURES_TYPE, joined, parted
from remote_vae.wire.tensors import (
    MAX_SIZE,
    TensorHead,
    dtype_name,
    is_within,
    on_cpu,
    tensor_from_bytes,
    tensor_to_bytes,
)

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
class DecodeRequest:
    """Latents to be decoded.

    Attributes:
        latents: ``[B, C, h, w]``, video ``[B, C, F, h, w]``, one picture's ``[C, h, w]``, packed ``[B, S, 4 C]``, or Flux.2's
            packed ``[B, 4 C, h / 2, w / 2]``; finite values, any device, any strides.
        output: the form of the answer.
        scaling: absent means that the latents are raw, as the VAE's decoder takes them.
        height, width: pixels; needed for packed latents, ignored for 4-D ones.
        family, fingerprint: tell our own server which VAE the latents are for.
        truncate: asks our own server for 8-bit levels rounded down, for a host that does so itself; others round to nearest.
        base64_body, base64_answer: the legacy transport.
        extras: what the client takes beyond the protocol.

    Raises:
        InvalidRequest: the parts do not make a request.
    """

    latents: torch.Tensor
    output: Output = Output.TENSOR
    scaling: Scaling = UNSCALED
    height: int | None = None
    width: int | None = None
    family: str | None = None
    fingerprint: str | None = None
    truncate: bool = False
    base64_body: bool = False
    base64_answer: bool = False
    extras: Extras = NO_EXTRAS
    _bytes: memoryview = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_bytes", checked_bytes(self.latents, "latents", (3, 4, 5)))
        self._check_size()
        self._check_output()

    def _check_size(self) -> None:
        if self.latents.ndim == 3 and not (self.height and self.width):
            raise InvalidRequest("`height` and `width` required for packed latents.")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and not 0 < size <= MAX_SIZE:
                raise InvalidRequest(f"{name}: got {size}, expected 1 to {MAX_SIZE} pixels")

    def _check_output(self) -> None:
        shape, output = list(self.latents.shape), self.output
        if output.is_image and (self.batch > 1 or self.latent_frames > 1) and not self.is_several:
            raise InvalidRequest(
                f"latents {shape} make more than one picture, and a {output.value} answer holds one: "
                "send them one by one, or ask for output_type pt"
            )
        if output is Output.MP4 and not self.is_video:
            raise InvalidRequest(f"latents for mp4: got shape {shape}, expected video latents [B, C, F, h, w]")
        if self.is_video and self.batch > 1 and output is not Output.TENSOR:
            raise InvalidRequest("several videos can only be answered as output_type pt without partial_postprocess")
        if self.base64_answer and not output.is_tensor:
            raise InvalidRequest("a base64 answer must be a tensor: use output_type pt")

    @property
    def is_video(self) -> bool:
        return self.latents.ndim == VIDEOS

    @property
    def latent_frames(self) -> int:
        """Of each video; 1 for pictures."""
        return self.latents.shape[2] if self.is_video else 1

    @property
    def is_packed(self) -> bool:
        return is_packed(tuple(self.latents.shape), self.height, self.width)

    @property
    def batch(self) -> int:
        """Number of pictures (or videos)."""
        return 1 if self.latents.ndim == 3 and not self.is_packed else self.latents.shape[0]

    @property
    def is_several(self) -> bool:
        """Whether the answer is several picture files, in a form of our own."""
        return self.output.is_image and self.extras.pictures and self.batch > 1 and not self.is_video

    def unpacked(self, family: Family, batch_norm: BatchNormed | None = None) -> torch.Tensor:
        """The latents as the VAE takes them: ``[B, C, h, w]``, or ``[B, C, F, h, w]`` for a video VAE.

        Args:
            family: of the VAE.
            batch_norm: what a VAE of Flux.2 normalises packed latents by.

        Raises:
            InvalidRequest: they are not for that VAE, do not fit height and width, or the answer cannot hold what it makes.
        """
        _check_alpha(self.output, family.pixel_channels)
        return as_the_vae_takes_them(self.latents, self.height, self.width, family, batch_norm)

    def to_http(self) -> HttpRequest:
        query = [*self.output.query, *(("shape", str(size)) for size in self.latents.shape)]
        query += [("dtype", dtype_name(self.latents.dtype)), *self.scaling.to_query()]
        if self.height and self.width:
            query += [("height", str(self.height)), ("width", str(self.width))]
        if self.family:
            query.append(("family", self.family))
        if self.fingerprint:
            query.append(("fingerprint", self.fingerprint))
        if self.truncate:
            query.append(("truncate", "True"))
        body: bytes | memoryview = self._bytes
        if self.base64_body:
            body = to_base64(body)
        headers = {
            "Content-Type": BASE64_TYPE if self.base64_body else TENSOR_TYPE,
            "Accept": BASE64_TYPE if self.base64_answer else self.output.accept,
            **self.extras.to_headers(),
        }
        return HttpRequest(tuple(query), headers, body)

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
        legacy = media_type(headers) == BASE64_TYPE
        if legacy:
            try:
                body = from_base64(body)[1]
            except ValueError:
                raise InvalidRequest('a tensor/base64 body: expected the JSON {"inputs": "<base64>"}') from None
        return cls(
            latents=read_tensor(body, head),
            output=Output.from_http(values, accept),
            scaling=Scaling.from_query(values),
            height=parse_size(values, "height"),
            width=parse_size(values, "width"),
            family=values.get("family") or None,
            fingerprint=parse_fingerprint(values),
            truncate=parse_bool(values.get("truncate")),
            base64_body=legacy,
            base64_answer=BASE64_TYPE in accept,
            extras=Extras.from_headers(headers),
        )


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
    _check_alpha(output, pixels.shape[1])
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


def _check_alpha(output: Output, channels: int) -> None:
    """Raises InvalidRequest: the form has no alpha channel, and to drop it would show what is to be transparent."""
    if channels > min(PIXEL_CHANNELS) and not output.has_alpha:
        other = "png" if output.is_image else "output_type pt"
        raise InvalidRequest(f"this VAE's pictures have an alpha channel, which {output.value} cannot hold: ask for {other}")


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
