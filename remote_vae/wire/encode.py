"""An encode: the request and its answer, each as an object that is valid or cannot be made, and as HTTP in both directions.

The protocol is that of diffusers' ``remote_utils``; other servers ignore keys of our own (``family``, ``fingerprint``,
``posterior``, ``sample``, ``form``), and what ``extras`` has is asked of none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Union

import numpy as np
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer, NotFinite
from remote_vae.vae.families import Family
from remote_vae.vae.frames import check_sides
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
    read_head,
    read_tensor,
)
from remote_vae.wire.colours import is_flat
from remote_vae.wire.errors import one_line
from remote_vae.wire.extras import NO_EXTRAS, Extras, compressed_request, request_body
from remote_vae.wire.http import TENSOR_TYPE, Buffer, Expected, HttpRequest, HttpResponse
from remote_vae.wire.latents import PACK, PICTURES, VIDEOS, as_packed
from remote_vae.wire.query import UNSCALED, Query, Scaling, parse_bool, parse_fingerprint, parse_seed, tensor_head
from remote_vae.wire.tensors import dtype_name, is_within, tensor_from_bytes, tensor_to_bytes

# What a picture in a request may have where the receiver sets no limit of its own.
DEFAULT_MAX_PIXELS = 8192 * 8192
MAX_LATENT_CHANNELS = 256
# The latents of trained VAEs stay under a hundred; far beyond is a broken answer.
LATENT_LIMIT = 1e4
# What a query says where packed latents are wanted.
_PACKED = "packed"


@dataclass(frozen=True)
class EncodeRequest:
    """A picture or a video, or a batch of them, to be encoded.

    Attributes:
        image: a PIL image of any mode (made RGB, and sent as PNG), or float ``[B, 3 or 4, H, W]``, of videos
            ``[B, 3 or 4, F, H, W]``, in [-1, 1], any device, any strides. uint8 stands for levels 0 to 255 and is understood by
            our own server only.
        scaling: absent means that raw latents are wanted.
        posterior: ask our own server for mean and logvar ``[B, 2 C, h, w]``, unscaled; other servers return a sample.
        sample: ask our own server for a sample of the posterior by this seed; see ``chosen``.
        family, fingerprint: tell our own server which VAE is wanted.
        packed: ask our own server for latents as transformers take them; see ``latents``.
        alpha: whether a PIL image is sent with its alpha channel, for a VAE of such pictures.
        extras: what the client takes beyond the protocol. With a coding the tensor goes up compressed.

    Raises:
        InvalidRequest: the parts do not make a request.
    """

    image: Union[torch.Tensor, Image.Image]
    scaling: Scaling = UNSCALED
    posterior: bool = False
    family: str | None = None
    packed: bool = False
    alpha: bool = False
    sample: int | None = None
    fingerprint: str | None = None
    extras: Extras = NO_EXTRAS
    _bytes: memoryview = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.image, torch.Tensor):
            object.__setattr__(self, "_bytes", checked_bytes(self.image, "the image tensor", (PICTURES, VIDEOS)))
            if self.image.shape[1] not in PIXEL_CHANNELS:
                raise InvalidRequest(
                    f"the image tensor: got shape {list(self.image.shape)}, expected [B, 3, H, W], of videos [B, 3, F, H, W], "
                    "or 4 channels with alpha"
                )
        elif isinstance(self.image, Image.Image):
            object.__setattr__(self, "image", px.to_rgb(self.image, alpha=self.alpha))
        else:
            raise InvalidRequest(f"the image: got {type(self.image).__name__}, expected a PIL image or a tensor")
        if self.posterior and (self.scaling != UNSCALED or self.packed):
            raise InvalidRequest("a posterior is never scaled or packed: leave scaling_factor, shift_factor and form out")
        if self.sample is not None and (self.posterior or not 0 <= self.sample < 1 << 63):
            raise InvalidRequest("sample: expected a seed from 0 to 2^63 - 1, and not beside posterior")

    @property
    def is_video(self) -> bool:
        return isinstance(self.image, torch.Tensor) and self.image.ndim == VIDEOS

    @property
    def frames(self) -> int:
        """Of each video; 1 for pictures."""
        return self.image.shape[2] if isinstance(self.image, torch.Tensor) and self.is_video else 1

    @property
    def size(self) -> tuple[int, int, int]:
        """B, H, W in pixels."""
        if isinstance(self.image, torch.Tensor):
            return self.image.shape[0], self.image.shape[-2], self.image.shape[-1]
        return 1, self.image.height, self.image.width

    def pixels(self, family: Family) -> torch.Tensor:
        """What the VAE takes: ``[B, 3 or 4, H, W]``, of a video VAE ``[B, 3 or 4, F, H, W]``, in [-1, 1].

        Pictures without alpha are opaque to a VAE of pictures with alpha. float32 for a picture or uint8, else the dtype that
        was sent.

        Raises:
            InvalidRequest: they are not for that VAE.
        """
        channels = family.pixel_channels
        batch, height, width = self.size
        encode_size(tuple(self.image.shape) if isinstance(self.image, torch.Tensor) else (batch, 3, height, width), family)
        if isinstance(self.image, torch.Tensor):
            pixels = self.image
            if pixels.dtype == torch.uint8:
                pixels = pixels.to(torch.float32).div_(127.5).sub_(1.0)
            if pixels.shape[1] < channels:
                pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
        else:
            pixels = px.image_to_pixels(self.image, channels)
        return pixels.unsqueeze(2) if family.video and pixels.ndim == PICTURES else pixels

    def chosen(self, moments: torch.Tensor, *, has_posterior: bool) -> tuple[torch.Tensor, bool]:
        """Of what the VAE gave, what was asked for: the posterior, a sample of it, or else its mode.

        A sample is mean + exp(logvar / 2) * noise in float32, with logvar from -30 to 20. The noise of picture number ``index``
        of the request is ``torch.randn(shape of its latents, generator=g)`` of a generator of the CPU with the seed
        ``(sample + index) % 2^63``: whatever else is made at the same time, the same picture and seed give the same noise.

        Args:
            moments: raw; mean and logvar ``[B, 2 C, ...]``, of a VAE without a posterior its latents.
            has_posterior: which of them.

        Returns:
            Raw latents, or the posterior; and whether it is that.
        """
        if not has_posterior or self.posterior:
            return moments, has_posterior
        mean, logvar = moments.chunk(2, dim=1)
        if self.sample is None:
            return mean, False
        noise = [_noise(mean.shape[1:], (self.sample + index) % (1 << 63)) for index in range(mean.shape[0])]
        deviation = torch.exp(0.5 * logvar.float().clamp(-30.0, 20.0))
        return (mean.float() + deviation * torch.stack(noise).to(mean.device)).to(mean.dtype), False

    def in_form(
        self, latents: torch.Tensor, family: Family, batch_norm: BatchNormed | None = None, *, is_posterior: bool = False
    ) -> torch.Tensor:
        """What the VAE gave, as it is answered: scaled and packed as was asked, with frames where the request had them.

        Args:
            latents: raw ones, or a posterior's mean and logvar.
            family: of the VAE.
            batch_norm: what a VAE of Flux.2 normalises packed latents by.
            is_posterior: whether they are a posterior, which stays as it is.

        Raises:
            InvalidRequest: they cannot be scaled or packed.
        """
        if not is_posterior:
            latents = self.scaling.scale(latents, family)
            if self.packed:
                return as_packed(latents, family, batch_norm)
        return latents.squeeze(2) if latents.ndim == VIDEOS and not self.is_video else latents

    def to_http(self) -> HttpRequest:
        query = self.scaling.to_query()
        if self.posterior:
            query.append(("posterior", "True"))
        if self.sample is not None:
            query.append(("sample", str(self.sample)))
        if self.packed:
            query.append(("form", _PACKED))
        if self.family:
            query.append(("family", self.family))
        if self.fingerprint:
            query.append(("fingerprint", self.fingerprint))
        headers = {"Accept": TENSOR_TYPE, **self.extras.to_headers()}
        if not isinstance(self.image, torch.Tensor):
            return HttpRequest(tuple(query), headers, px.image_to_bytes(self.image, "png"))
        query += [("shape", str(size)) for size in self.image.shape]
        query.append(("dtype", dtype_name(self.image.dtype)))
        return compressed_request(HttpRequest(tuple(query), {"Content-Type": TENSOR_TYPE, **headers}, self._bytes), self.extras)

    @classmethod
    def from_http(
        cls,
        query: Query,
        body: Buffer,
        *,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> EncodeRequest:
        """What a client sent; of its ``headers`` (lower-case names) those of our own matter.

        A picture of more than ``max_pixels`` is not decoded.

        Raises:
            InvalidRequest: not an encode request of the protocol.
        """
        pairs = list(query)
        values = dict(pairs)
        head = tensor_head(pairs)
        image: torch.Tensor | Image.Image
        body = request_body(body, head, headers)
        image = px.image_from_bytes(body, max_pixels=max_pixels) if head is None else read_tensor(body, head)
        return cls(
            image=image,
            scaling=Scaling.from_query(values),
            posterior=parse_bool(values.get("posterior")),
            sample=parse_seed(values, "sample"),
            family=values.get("family") or None,
            fingerprint=parse_fingerprint(values),
            extras=Extras.from_headers(headers),
            packed=_is_packed_form(values.get("form")),
            alpha=True,
        )


@dataclass(frozen=True)
class EncodeAnswer:
    """A checked answer to an encode.

    Attributes:
        latents: ``[B, C, h, w]``, of videos ``[B, C, F, h, w]``, or a posterior's mean and logvar with 2 C channels.
        is_posterior: which of them.
    """

    latents: torch.Tensor
    is_posterior: bool


def encode_size(shape: tuple[int, ...], family: Family) -> tuple[int, int, int, int]:
    """What pixels of ``shape`` are: pictures (or videos), frames of each (1 for pictures), height and width.

    Needs the head of a request only, so that a server can refuse it before it takes memory for the body.

    Raises:
        InvalidRequest: the VAE of ``family`` cannot encode them.
    """
    channels = sorted({min(PIXEL_CHANNELS), family.pixel_channels})
    if len(shape) not in (PICTURES, VIDEOS) or shape[1] not in channels or (len(shape) == VIDEOS and not family.video):
        allowed = f"[B, {' or '.join(map(str, channels))}, {'F, ' if family.video else ''}H, W]"
        raise InvalidRequest(f"the image tensor: got shape {list(shape)}, expected {allowed} for {family.label}")
    check_sides(family, *shape[-2:])
    return shape[0], shape[2] if len(shape) == VIDEOS else 1, shape[-2], shape[-1]


def encode_response(latents: torch.Tensor, *, is_posterior: bool = False) -> HttpResponse:
    """The answer to an encode: latents ``in_form``, or a posterior's with the header ``posterior: True``.

    Raises:
        NotFinite: NaN or infinite latents.
    """
    if not is_within(latents):
        raise NotFinite("the VAE gave NaN or infinite latents for this picture")
    headers = {"Content-Type": TENSOR_TYPE, **head_headers(latents)}
    if is_posterior:
        headers["posterior"] = "True"
    return HttpResponse(200, headers, tensor_to_bytes(latents))


def expect_encode(request: EncodeRequest, headers: Mapping[str, str]) -> Expected[EncodeAnswer]:
    """What a 200 answer to ``request`` with these ``headers`` (lower-case names) may hold.

    Raises:
        MalformedAnswer: it is not the answer to this request.
    """
    check_label(headers, TENSOR_LABELS)
    head = read_head(headers.get("shape"), headers.get("dtype"))
    is_posterior = headers.get("posterior", "").strip().lower() == "true"
    if is_posterior and not request.posterior:
        raise MalformedAnswer("got a posterior, expected latents")
    if not _fits(request, head.shape) or (is_posterior and head.shape[1] % 2):
        raise MalformedAnswer(f"got {head}, expected {_expected(request)}")
    check_float(head)

    def finish(body: np.ndarray) -> EncodeAnswer:
        latents = tensor_from_bytes(body, head)
        check_values(latents, LATENT_LIMIT)
        _check_latents(request, latents.chunk(2, dim=1)[0] if is_posterior else latents)
        return EncodeAnswer(latents, is_posterior)

    return Expected(finish, head.nbytes, exact=head.nbytes)


def latent_sides(pixels: int, downscale: int) -> tuple[int, int]:
    """Latent cells along a side of so many pixels: most VAEs round down, HunyuanVideo's kind up."""
    return pixels // downscale, -(-pixels // downscale)


def _fits(request: EncodeRequest, shape: tuple[int, ...]) -> bool:
    """Whether latents of ``shape`` may be of the request's pixels; which VAE made them is not known here."""
    batch, height, width = request.size
    if request.packed and len(shape) == 3:
        tokens = [(height // scale // PACK) * (width // scale // PACK) for scale in KNOWN_DOWNSCALES]
        return shape[0] == batch and shape[1] in tokens and shape[2] <= MAX_LATENT_CHANNELS
    frames = shape[2] if request.is_video and len(shape) == VIDEOS else 1
    return (
        len(shape) == (VIDEOS if request.is_video and not request.packed else PICTURES)
        and shape[0] == batch
        and shape[1] <= MAX_LATENT_CHANNELS
        and frames <= request.frames
        and any(
            shape[-2] in latent_sides(height, scale) and shape[-1] in latent_sides(width, scale) for scale in KNOWN_DOWNSCALES
        )
    )


def _expected(request: EncodeRequest) -> str:
    """What may come, for messages."""
    batch, height, width = request.size
    sizes = " or ".join(f"{height // scale} x {width // scale}" for scale in KNOWN_DOWNSCALES)
    frames = f"up to {request.frames} frames of " if request.is_video else ""
    return f"{batch} of {'packed ' if request.packed else ''}latents {frames}{sizes}"


def _check_latents(request: EncodeRequest, latents: torch.Tensor) -> None:
    """Raises MalformedAnswer: latents that are the same everywhere (all zero, say), of a picture that varies."""
    channel = 2 if latents.ndim == 3 else 1
    if latents.numel() == latents.shape[0] * latents.shape[channel]:
        return
    flat = is_flat(latents, channel)
    if not flat.any():
        return
    if isinstance(request.image, torch.Tensor):
        image = request.image.detach().cpu()
    else:
        image = px.image_to_pixels(request.image, len(request.image.getbands()))
    if bool((flat & ~is_flat(image, 1)).any()):
        raise MalformedAnswer("got latents that are the same everywhere for a picture that is not")


def _is_packed_form(form: str | None) -> bool:
    if form not in (None, "", _PACKED):
        raise InvalidRequest(
            f"form: got {one_line(form or '', 40)!r}, expected {_PACKED}, or no form for latents as the VAE has them"
        )
    return form == _PACKED


def _noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
