"""An encode: the request and its answer, each as an object that is valid or cannot be made, and as HTTP in both directions.

The protocol is that of diffusers' ``remote_utils``; keys of our own (``family``, ``posterior``) are ignored by other servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Union

import numpy as np
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer, NotFinite
from remote_vae.wire import pixels as px
from remote_vae.wire.checks import (
    KNOWN_DOWNSCALES,
    TENSOR_LABELS,
    check_float,
    check_label,
    check_values,
    checked_bytes,
    head_headers,
    is_flat,
    read_head,
    read_tensor,
)
from remote_vae.wire.http import TENSOR_TYPE, Buffer, Expected, HttpRequest, HttpResponse
from remote_vae.wire.query import UNSCALED, Query, Scaling, parse_bool, tensor_head
from remote_vae.wire.tensors import dtype_name, is_within, tensor_from_bytes, tensor_to_bytes

# What a picture in a request may have where the receiver sets no limit of its own.
DEFAULT_MAX_PIXELS = 8192 * 8192
MAX_LATENT_CHANNELS = 256
# The latents of trained VAEs stay under a hundred; far beyond is a broken answer.
LATENT_LIMIT = 1e4


@dataclass(frozen=True)
class EncodeRequest:
    """A picture, or a batch of them, to be encoded.

    Attributes:
        image: a PIL image of any mode (made RGB, and sent as PNG), or float ``[B, 3, H, W]`` in [-1, 1], any device, any
            strides. uint8 ``[B, 3, H, W]`` stands for levels 0 to 255 and is understood by our own server only.
        scaling: absent means that raw latents are wanted.
        posterior: ask our own server for mean and logvar ``[B, 2 C, h, w]``, unscaled; other servers return a sample.
        family: tells our own server which VAE is wanted.

    Raises:
        InvalidRequest: the parts do not make a request.
    """

    image: Union[torch.Tensor, Image.Image]
    scaling: Scaling = UNSCALED
    posterior: bool = False
    family: str | None = None
    _bytes: memoryview = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.image, torch.Tensor):
            object.__setattr__(self, "_bytes", checked_bytes(self.image, "the image tensor", (4,)))
            if self.image.shape[1] != 3:
                raise InvalidRequest(f"the image tensor: got shape {list(self.image.shape)}, expected [B, 3, H, W]")
        elif isinstance(self.image, Image.Image):
            object.__setattr__(self, "image", px.to_rgb(self.image))
        else:
            raise InvalidRequest(f"the image: got {type(self.image).__name__}, expected a PIL image or a tensor")
        if self.posterior and (self.scaling != UNSCALED):
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
        image = px.image_from_bytes(body, max_pixels=max_pixels) if head is None else read_tensor(body, head)
        return cls(
            image=image,
            scaling=Scaling.from_query(values),
            posterior=parse_bool(values.get("posterior")),
            family=values.get("family") or None,
        )


@dataclass(frozen=True)
class EncodeAnswer:
    """A checked answer to an encode: latents ``[B, C, h, w]``, or the posterior's mean and logvar ``[B, 2 C, h, w]``."""

    latents: torch.Tensor
    is_posterior: bool


def encode_response(latents: torch.Tensor, *, is_posterior: bool = False) -> HttpResponse:
    """The answer to an encode: ``[B, C, h, w]``, or ``[B, 2 C, h, w]`` with the header ``posterior: True``.

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
    batch, height, width = request.size
    fits = (
        len(head.shape) == 4
        and head.shape[0] == batch
        and head.shape[1] <= MAX_LATENT_CHANNELS
        and any(head.shape[2:] == (height // scale, width // scale) for scale in KNOWN_DOWNSCALES)
    )
    if not fits or (is_posterior and head.shape[1] % 2):
        sizes = " or ".join(f"{height // scale} x {width // scale}" for scale in KNOWN_DOWNSCALES)
        raise MalformedAnswer(f"got {head}, expected {batch} of latents {sizes}")
    check_float(head)

    def finish(body: np.ndarray) -> EncodeAnswer:
        latents = tensor_from_bytes(body, head)
        check_values(latents, LATENT_LIMIT)
        _check_latents(request, latents.chunk(2, dim=1)[0] if is_posterior else latents)
        return EncodeAnswer(latents, is_posterior)

    return Expected(finish, head.nbytes, exact=head.nbytes)


def _check_latents(request: EncodeRequest, latents: torch.Tensor) -> None:
    """Raises MalformedAnswer: latents that are the same everywhere (all zero, say), of a picture that varies."""
    if latents.shape[2] * latents.shape[3] == 1:
        return
    flat = is_flat(latents, 1)
    if not flat.any():
        return
    image = request.image.detach().cpu() if isinstance(request.image, torch.Tensor) else px.image_to_pixels(request.image)
    if bool((flat & ~is_flat(image, 1)).any()):
        raise MalformedAnswer("got latents that are the same everywhere for a picture that is not")
