"""The request of a decode: an object that is valid or cannot be made, and HTTP in both directions. Its answer: ``decoded``.

The protocol is the one of diffusers' ``remote_utils``; keys of our own (``family``, ``fingerprint``, ``truncate``) are ignored
by other servers, and what ``extras`` has is asked of none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family
from remote_vae.vae.packed import BatchNormed
from remote_vae.wire.checks import PIXEL_CHANNELS, checked_bytes, media_type, read_tensor
from remote_vae.wire.extras import NO_EXTRAS, Extras
from remote_vae.wire.http import BASE64_TYPE, TENSOR_TYPE, Buffer, HttpRequest
from remote_vae.wire.latents import VIDEOS, as_the_vae_takes_them, is_packed
from remote_vae.wire.legacy import from_base64, to_base64
from remote_vae.wire.query import UNSCALED, Output, Query, Scaling, parse_bool, parse_fingerprint, parse_size, tensor_head
from remote_vae.wire.tensors import MAX_SIZE, dtype_name


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
        check_alpha(self.output, family.pixel_channels)
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


def check_alpha(output: Output, channels: int) -> None:
    """Raises InvalidRequest: the form has no alpha channel, and to drop it would show what is to be transparent."""
    if channels > min(PIXEL_CHANNELS) and not output.has_alpha:
        other = "png" if output.is_image else "output_type pt"
        raise InvalidRequest(f"this VAE's pictures have an alpha channel, which {output.value} cannot hold: ask for {other}")
