"""The remote route: which endpoint a call goes to, in which form, and what its failures mean for the next call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Union
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch
from PIL import Image

from remote_vae.call import Answer, Outcome, T, VaeCall
from remote_vae.errors import (
    CallCancelled,
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    InvalidRequest,
    MalformedAnswer,
    NotOffered,
    OneColour,
    OutOfMemory,
    RouteFailed,
)
from remote_vae.remote.breaker import Breakers, Gate
from remote_vae.remote.client import Deadlines, EndpointClient, Reply, client_for, shown
from remote_vae.remote.functions import in_parallel, one_by_one
from remote_vae.remote.same_vae import SameVae
from remote_vae.settings import Settings
from remote_vae.tiled.memory import free_memory, is_out_of_memory
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import Family, public_max_pixels
from remote_vae.wire import DecodeAnswer, DecodeRequest, EncodeAnswer, EncodeRequest, Output
from remote_vae.wire.pixels import to_uint8
from remote_vae.wire.tensors import DTYPES

log = logging.getLogger("remote_vae")

_OUTPUTS = {"raw": Output.TENSOR, "u8": Output.UINT8, "png": Output.PNG, "jpg": Output.JPG}
# Refusals that are about this request; the endpoint itself is well.
_REQUEST_ERRORS = frozenset({400, 409, 413, 415, 422})


class RemoteRoute:
    """Sends calls to the endpoint that the settings name."""

    name = "remote"

    def __init__(self, breakers: Breakers | None = None, same_vae: SameVae | None = None) -> None:
        self._breakers = breakers or Breakers()
        self._same_vae = same_vae or SameVae()

    def run(self, call: VaeCall[T], settings: Settings) -> Outcome[T]:
        """Raises RouteFailed for whatever goes wrong outside the host."""
        url, public = endpoint_for(call.op, call.vae.family, settings)
        if not url:
            raise NotOffered("no endpoint is set for this VAE: Settings, Remote VAE, Endpoint", reason="no endpoint")
        if public:
            _check_public_limits(call)
            # What those servers were seen to take.
            call = replace(call, tensor=call.tensor.to(DTYPES[call.vae.family.dtype]))
        breaker = self._breakers.of(url)
        refusal = breaker.enter(settings.cooldown)
        if refusal is not None:
            raise NotOffered(f"{url}: {refusal}", reason=refusal)
        try:
            return self._asked(call, settings, url, breaker, public=public)
        except RouteFailed:
            raise
        except Exception as error:
            # A name that cannot be looked up, certificates that are not there, no memory for the upload: whatever it is, it is
            # not the host's VAE that went wrong.
            log.exception("the remote route failed")
            breaker.failed(type(error).__name__, answered=True)
            raise RouteFailed(f"{shown(url)}: {type(error).__name__}: {error}", reason=type(error).__name__) from error

    def _asked(self, call: VaeCall[T], settings: Settings, url: str, breaker: Gate, *, public: bool) -> Outcome[T]:
        call.user.tell(f"{call.doing} on {urlsplit(url).netloc.rpartition('@')[2]}")
        try:
            client = client_for(url, public=public)
            ask = partial(_ask_test_picture, client, call, settings)
            note = self._same_vae.admit(call, url, settings, ask, public=public)
            reply = _Asking(client, call, settings.transfer, Deadlines.of(settings)).ask()
        except (CallCancelled, InvalidRequest) as error:
            breaker.left()
            raise _as_route_failure(error) from None
        except RouteFailed as error:
            if _is_about_the_call(error):
                breaker.left()
            else:
                breaker.failed(error.reason, answered=not isinstance(error, (DeadlineExceeded, EndpointUnreachable)))
                self._same_vae.forget(url)
            raise
        except BaseException:
            breaker.left()
            raise
        breaker.succeeded()
        return Outcome(
            _adopted(call, reply.answer),
            self.name,
            detail=", ".join(filter(None, (settings.transfer, note))),
            endpoint=shown(url),
            bytes_up=reply.bytes_up,
            bytes_down=reply.bytes_down,
        )


def endpoint_for(op: Op, family: Family, settings: Settings) -> tuple[str, bool]:
    """The URL for a call, and whether it is a public endpoint; "" where there is none.

    An endpoint without a path is a Remote VAE server: /decode or /encode is added. Otherwise the exact URL counts.
    """
    exact = settings.decode_endpoint if op == "decode" else settings.encode_endpoint
    if exact:
        return exact, False
    if settings.endpoint:
        parts = urlsplit(settings.endpoint)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{op}")), False
    if settings.public_endpoints and family.is_known:
        return family.public_endpoint(op), True
    return "", False


class _Asking:
    """One call on its way to one endpoint, as one request or as one for each picture."""

    def __init__(self, client: EndpointClient, call: VaeCall[T], transfer: str, deadlines: Deadlines) -> None:
        self._client = client
        self._call = call
        self._tensor = call.tensor
        self._ask: Callable[[torch.Tensor], Reply[Answer]] = self._decode if call.op == "decode" else self._encode
        self._family = call.vae.family.key if call.vae.family.is_known else None
        self._transfer = transfer
        self._truncate = call.truncates
        self._deadlines = deadlines
        self._cancelled = call.user.cancelled
        self._failure: BaseException | None = None

    def ask(self) -> Reply[Answer]:
        """The answer, checked. Raises RouteFailed."""
        reply = self._replied()
        _check_answer(self._call, reply.answer)
        return reply

    def _replied(self) -> Reply[Answer]:
        if self._transfer not in ("png", "jpg") or self._tensor.shape[0] == 1:
            return self._ask(self._tensor)
        # The protocol's picture answer holds one picture.
        try:
            replies = in_parallel(self._ask_one, one_by_one(self._tensor))
        except Exception as error:
            raise self._failure or error from None
        return Reply(
            _joined([reply.answer for reply in replies]),
            sum(reply.bytes_up for reply in replies),
            sum(reply.bytes_down for reply in replies),
        )

    def _ask_one(self, tensor: torch.Tensor) -> Reply[Answer]:
        try:
            return self._ask(tensor)
        except Exception as error:
            # One picture that fails takes the batch with it; the others stop waiting, and their errors do not count.
            self._failure = self._failure or error
            raise

    def _stop(self) -> bool:
        return self._failure is not None or self._cancelled()

    def _decode(self, latents: torch.Tensor) -> Reply[Answer]:
        request = DecodeRequest(latents, _OUTPUTS[self._transfer], family=self._family, truncate=self._truncate)
        reply = self._client.decode(request, self._deadlines, self._stop)
        return Reply(reply.answer, reply.bytes_up, reply.bytes_down)

    def _encode(self, pixels: torch.Tensor) -> Reply[Answer]:
        request = EncodeRequest(_upload_form(pixels, self._transfer), posterior=True, family=self._family)
        reply = self._client.encode(request, self._deadlines, self._stop)
        return Reply(reply.answer, reply.bytes_up, reply.bytes_down)


def _ask_test_picture(client: EndpointClient, call: VaeCall[T], settings: Settings, tensor: torch.Tensor) -> Answer:
    """What the endpoint makes of ``tensor``, which stands for the one of ``call``."""
    sample = replace(call, tensor=tensor.to(call.tensor.dtype))
    # In the form that the endpoint is known to take, which must not lose more than VAEs differ by.
    transfer = "png" if settings.transfer == "jpg" else settings.transfer
    return _Asking(client, sample, transfer, Deadlines.of(settings).quick).ask().answer


def _check_answer(call: VaeCall[T], answer: Answer) -> None:
    """Whether the answer is what this VAE would have given; a plain endpoint may have one of another family.

    Raises:
        MalformedAnswer: latents or pixels of another shape.
    """
    family = call.vae.family
    batch, height, width = call.size
    if isinstance(answer, EncodeAnswer):
        channels = family.latent_channels * (2 if answer.is_posterior else 1)
        came: tuple[int, ...] = tuple(answer.latents.shape)
        wanted: tuple[int, ...] = (batch, channels, height // family.downscale, width // family.downscale)
    else:
        came, wanted = answer.size, (height, width)
    if came != wanted:
        raise MalformedAnswer(f"{list(came)} came, and the VAE of {family.label} gives {list(wanted)}")


def _adopted(call: VaeCall[T], answer: Answer) -> T:
    """The answer as the host wants it; even that may not fit beside what the host keeps on its device."""
    try:
        return call.adopt(answer)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    try:
        return call.adopt(answer)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the answer does not fit in memory: {error}", reason="out of memory") from error


def _upload_form(pixels: torch.Tensor, transfer: str) -> Union[torch.Tensor, Image.Image]:
    """``[B, 3, H, W]`` in [-1, 1] as it goes up: raw as it is, u8 in at most float16 (a sixteenth of a level), png 8 bits."""
    if transfer == "raw":
        return pixels
    if transfer == "u8":
        return pixels.to(torch.float16) if pixels.dtype == torch.float32 else pixels
    return Image.fromarray(to_uint8(pixels)[0].cpu().numpy())


def _joined(answers: list[Answer]) -> Answer:
    """The answers of a batch's pictures as one."""
    decoded = [answer for answer in answers if isinstance(answer, DecodeAnswer)]
    if decoded:
        levels = [torch.from_numpy(np.array(answer.payload)) for answer in decoded]
        return DecodeAnswer(Output.UINT8, torch.stack(levels))
    encoded = [answer for answer in answers if isinstance(answer, EncodeAnswer)]
    if len({answer.is_posterior for answer in encoded}) > 1:
        raise MalformedAnswer("posteriors and samples for one batch")
    return EncodeAnswer(torch.cat([answer.latents for answer in encoded]), encoded[0].is_posterior)


def _check_public_limits(call: VaeCall[T]) -> None:
    _, height, width = call.size
    if height * width > public_max_pixels():
        raise NotOffered(
            f"the public endpoints take at most {public_max_pixels()} pixels, and this is {width} x {height}",
            reason="too large for the public endpoint",
        )


def _is_about_the_call(error: RouteFailed) -> bool:
    """Whether the endpoint itself is well."""
    return isinstance(error, (NotOffered, OneColour)) or (isinstance(error, EndpointError) and error.status in _REQUEST_ERRORS)


def _as_route_failure(error: CallCancelled | InvalidRequest) -> RouteFailed:
    return error if isinstance(error, CallCancelled) else NotOffered(str(error))
