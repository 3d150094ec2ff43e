"""Makes the answer of what the VAE gave: levels on the device, then PNG, JPEG, mp4 and compression, in threads of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from remote_vae.server.admission import ClientGone, Place
from remote_vae.server.moving import Mover
from remote_vae.tiled.memory import forget_frames, is_out_of_memory
from remote_vae.vae.families import Family
from remote_vae.vae.packed import BatchNormed
from remote_vae.wire import DecodeRequest, EncodeRequest, HttpResponse, decode_response, encode_response
from remote_vae.wire.extras import compressed_response


@dataclass(frozen=True)
class Facts:
    """What an answer says of the VAE that it is of."""

    family: Family
    batch_norm: BatchNormed | None
    has_posterior: bool


def answer(
    request: DecodeRequest | EncodeRequest, made: torch.Tensor, facts: Facts, mover: Mover, place: Place
) -> HttpResponse:
    """The answer to ``request``.

    Args:
        request: what was asked for.
        made: pixels, or moments, on the device of the VAE; ``mover`` knows that they leave it.
        facts: of the VAE.
        mover: of its device.
        place: of the request.

    Raises:
        ClientGone: nobody wants it any more. And as ``decode_response`` and ``encode_response``.
    """

    def bring(tensor: torch.Tensor) -> torch.Tensor:
        # Before each frame: a film of a thousand takes a minute.
        if place.is_gone():
            raise ClientGone("the client hung up while its answer was made")
        return mover.down(tensor)

    def make(values: torch.Tensor) -> HttpResponse:
        if isinstance(request, DecodeRequest):
            return compressed_response(decode_response(request, values, bring=bring), request.extras)
        return _encoded(request, values, facts, bring)

    with mover.leaving():
        try:
            return make(made)
        except Exception as error:
            if made.is_cpu or not is_out_of_memory(error):
                raise
            forget_frames(error)
        # The calls at work have all of the device's memory; what is made of frames in it is made outside.
        return make(mover.down(made))


def _encoded(
    request: EncodeRequest, made: torch.Tensor, facts: Facts, bring: Callable[[torch.Tensor], torch.Tensor]
) -> HttpResponse:
    latents, is_posterior = request.chosen(made, has_posterior=facts.has_posterior)
    latents = request.in_form(latents, facts.family, facts.batch_norm, is_posterior=is_posterior)
    # Latents come in the dtype that was asked in; a posterior as the VAE made it, as only our own client asks for it.
    if isinstance(request.image, torch.Tensor) and request.image.is_floating_point() and not is_posterior:
        latents = latents.to(request.image.dtype)
    return encode_response(bring(latents), is_posterior=is_posterior)
