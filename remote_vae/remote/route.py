"""The remote route: which endpoint a call goes to, in which form, and what its failures mean for the next call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, Union
from urllib.parse import urlsplit

import torch
from PIL import Image

from remote_vae.call import Answer, Outcome, T, VaeCall
from remote_vae.errors import (
    AnotherVae,
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
    VaeNotConfirmed,
)
from remote_vae.remote.client import Deadlines, EndpointClient, Reply, client_for, shown
from remote_vae.remote.compressing import wanted
from remote_vae.remote.endpoints import DEFAULT_PORT, Endpoints, InPause, Turn, endpoint_for, in_pause
from remote_vae.remote.functions import in_parallel
from remote_vae.remote.same_vae import SameVae
from remote_vae.settings import Settings
from remote_vae.tiled.memory import free_memory, is_out_of_memory
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import Family, public_max_pixels
from remote_vae.vae.fingerprint import fingerprint_of
from remote_vae.wire import DecodeAnswer, DecodeRequest, EncodeAnswer, EncodeRequest, Info, Output
from remote_vae.wire.encode import latent_sides
from remote_vae.wire.extras import FINGERPRINT, Extras
from remote_vae.wire.latents import VIDEOS
from remote_vae.wire.pixels import frames_of, to_uint8
from remote_vae.wire.tensors import DTYPES

log = logging.getLogger("remote_vae")

_OUTPUTS = {"raw": Output.TENSOR, "u8": Output.UINT8, "png": Output.PNG, "jpg": Output.JPG}
_RGB = 3
_SIXTEENTH = 1 / 16
# What a server of ours takes in one request unless it says otherwise: larger batches, as of AnimateDiff, go in parts.
_MOST_PICTURES = 32
_MOST_PIXELS = 4 * 4096 * 4096
# Refusals that are about this request; the endpoint itself is well.
_REQUEST_ERRORS = frozenset({400, 409, 413, 415, 422})
# The endpoint has another VAE than it said.
_OTHER_VAE = 409
# Seconds for the question whether an endpoint that was silent is there again.
_UP_SECONDS = 0.5


class RemoteRoute:
    """Sends calls to the endpoint that the settings name."""

    name = "remote"

    def __init__(self, endpoints: Endpoints | None = None, same_vae: SameVae | None = None) -> None:
        self._endpoints = endpoints or Endpoints()
        self._same_vae = same_vae or SameVae()

    def run(self, call: VaeCall[T], settings: Settings) -> Outcome[T]:
        """Raises RouteFailed for whatever goes wrong outside the host."""
        url, public = endpoint_for(call.op, call.vae.family, settings)
        if not url:
            raise NotOffered("no endpoint is set for this VAE: Settings, Remote VAE, Endpoint", reason="no endpoint is set")
        if public:
            _check_public_limits(call)
            # What those servers were seen to take.
            call = replace(call, tensor=call.tensor.to(DTYPES[call.vae.family.dtype]))
        failures: list[RouteFailed] = []
        for address in self._endpoints.addresses(url):
            try:
                outcome = self._run_at(address, call, settings, public=public)
            except RouteFailed as error:
                failures.append(error)
                if not _may_be_another_port(error):
                    break
            else:
                self._endpoints.found(url, address)
                return outcome
        raise _of_all(failures)

    def forget(self, url: str) -> None:
        """What is known of ``url`` and its machine is found out anew by the next call: a pause is over."""
        for address in self._endpoints.addresses(url):
            self._endpoints.forget(address)
            self._same_vae.forget(address)

    def _run_at(self, url: str, call: VaeCall[T], settings: Settings, *, public: bool) -> Outcome[T]:
        client = client_for(url, public=public)
        turn = self._endpoints.turn(url, settings)
        try:
            turn.enter(partial(_is_up, client, settings))
        except InPause as refusal:
            raise in_pause(url, refusal) from None
        try:
            return self._asked(call, settings, client, turn, public=public)
        except RouteFailed:
            raise
        except Exception as error:
            # No memory for the upload, an answer that the host cannot take: neither the host's VAE went wrong nor the endpoint.
            log.exception("the remote route failed")
            raise RouteFailed(f"{shown(url)}: {type(error).__name__}: {error}", reason=type(error).__name__) from error

    def _asked(self, call: VaeCall[T], settings: Settings, client: EndpointClient, turn: Turn, *, public: bool) -> Outcome[T]:
        url = client.url
        batch, height, width = call.size
        pixels = batch * height * width
        deadlines = Deadlines.of(settings, pixels, self._endpoints.expected(url, pixels))
        try:
            # In here: where the user has given up, a host's own exception ends the call, and the turn has to end with it.
            call.user.tell(f"{call.doing} on {urlsplit(url).netloc}")
            answered = partial(self._answered, call, settings, client, deadlines, public=public)
            try:
                reply, note, seconds = answered()
            except EndpointError as error:
                if error.status != _OTHER_VAE:
                    raise
                # It has got another one since it said which. What it says now decides.
                self._same_vae.forget(url)
                reply, note, seconds = answered()
        except (CallCancelled, InvalidRequest) as error:
            if isinstance(error, CallCancelled) and call.user.gave_up():
                # The user waits no longer, neither now nor with the next picture.
                turn.failed(DeadlineExceeded(str(error), reason="skipped"))
            else:
                turn.left()
            raise _as_route_failure(error) from None
        except RouteFailed as error:
            if _is_about_the_call(error):
                turn.left()
            else:
                turn.failed(error)
                self._same_vae.forget(url)
            raise
        except BaseException:
            turn.left()
            raise
        turn.succeeded()
        self._endpoints.took(url, pixels, seconds)
        self._endpoints.came(url, reply.bytes_down, reply.seconds_down)
        return Outcome(
            _adopted(call, reply.answer),
            self.name,
            detail=", ".join(filter(None, (settings.transfer, note))),
            endpoint=shown(url),
            bytes_up=reply.bytes_up,
            bytes_down=reply.bytes_down,
            vae_ms=1000.0 * reply.stages.get("predict", 0.0),
        )

    def _answered(
        self, call: VaeCall[T], settings: Settings, client: EndpointClient, deadlines: Deadlines, *, public: bool
    ) -> tuple[Reply[Answer], str, float]:
        """The reply, what the record has to say of the VAE there, and seconds that the call itself took."""
        url = client.url
        said = partial(self._same_vae.there, call, url, settings, public=public)
        ask = partial(_ask_test_picture, client, call, settings, said)
        note = self._same_vae.admit(call, url, settings, ask, public=public)
        there = said()
        started = time.monotonic()
        asking = _Asking(client, call, settings.transfer, deadlines, there, self._endpoints.pace(url), public=public)
        return asking.ask(), note, time.monotonic() - started


class _Asking:
    """One call on its way to one endpoint, as one request or in parts, such as one for each picture."""

    def __init__(
        self,
        client: EndpointClient,
        call: VaeCall[T],
        transfer: str,
        deadlines: Deadlines,
        there: Info,
        pace: float | None = None,
        *,
        public: bool = False,
    ) -> None:
        self._client = client
        self._tensor = call.tensor
        self._decodes = call.op == "decode"
        self._ask: Callable[[torch.Tensor], Reply[Answer]] = self._decode if self._decodes else self._encode
        self._family = call.vae.family
        self._form = _form(call, transfer)
        # What a server says that it knows.
        self._extras = wanted(Extras.of(there.extras), _bytes(call, self._form), pace, client.url)
        self._fingerprint = _fingerprint(there, call.vae) if FINGERPRINT in there.extras else None
        self._at_once = 1 if self._is_one_by_one else _at_once(call, there, public=public)
        self._truncate = call.truncates
        self._packed = call.packed
        self._deadlines = deadlines
        self._cancelled = call.user.cancelled

    def ask(self) -> Reply[Answer]:
        """The answer, checked. Raises RouteFailed."""
        parts = _parts(self._tensor, self._at_once)
        if len(parts) == 1:
            return self._ask(self._tensor)
        asked = in_parallel(self._ask_one, parts)
        missing = [index for index, each in enumerate(asked) if not isinstance(each, Reply)]
        if 0 < len(missing) < len(parts) and not any(map(_is_final, asked)):
            # What has arrived is kept, and the rest asked for once more.
            for index, again in zip(missing, in_parallel(self._ask_one, [parts[index] for index in missing]), strict=True):
                asked[index] = again
        replies = [each for each in asked if isinstance(each, Reply)]
        for each in asked:
            if not isinstance(each, Reply):
                raise each
        stages = [reply.stages for reply in replies]
        return Reply(
            _joined([reply.answer for reply in replies]),
            sum(reply.bytes_up for reply in replies),
            sum(reply.bytes_down for reply in replies),
            # They share the network: none of them says how quick it is.
            0.0,
            {name: sum(each.get(name, 0.0) for each in stages) for name in {name for each in stages for name in each}},
        )

    @property
    def _is_one_by_one(self) -> bool:
        """Whether one picture, or one video's levels, is all that an answer or a request holds."""
        if self._tensor.ndim == VIDEOS:
            return self._form != "raw"
        return self._form in ("png", "jpg") and not (self._decodes and self._extras.pictures)

    def _ask_one(self, tensor: torch.Tensor) -> Reply[Answer] | RouteFailed | InvalidRequest:
        """The reply, or why there is none: the other pictures of the batch are wanted all the same."""
        try:
            return self._ask(tensor)
        except (RouteFailed, InvalidRequest) as error:
            return error

    def _decode(self, latents: torch.Tensor) -> Reply[Answer]:
        request = DecodeRequest(
            latents,
            _OUTPUTS[self._form],
            family=self._family.known_key,
            fingerprint=self._fingerprint,
            truncate=self._truncate,
            extras=self._extras,
        )
        reply = self._client.decode(request, self._deadlines, self._cancelled)
        return self._checked(latents, reply, reply.answer)

    def _encode(self, pixels: torch.Tensor) -> Reply[Answer]:
        image = _upload_form(pixels, self._form, compressed=bool(self._extras.codings))
        request = EncodeRequest(
            image,
            posterior=not self._packed,
            packed=self._packed,
            family=self._family.known_key,
            fingerprint=self._fingerprint,
            alpha=True,
            extras=self._extras,
        )
        reply = self._client.encode(request, self._deadlines, self._cancelled)
        answer = reply.answer
        if isinstance(image, Image.Image) and pixels.ndim == VIDEOS:
            # A picture's file has no axis of frames, and neither have its latents.
            answer = replace(answer, latents=answer.latents.unsqueeze(2))
        return self._checked(pixels, reply, answer)

    def _checked(self, tensor: torch.Tensor, reply: Reply[Any], answer: Answer) -> Reply[Answer]:
        try:
            _check_answer(self._family, tensor, answer)
        except MalformedAnswer as error:
            raise error.by(shown(self._client.url)) from None
        return replace(reply, answer=answer)


def _at_once(call: VaeCall[T], there: Info, *, public: bool) -> int:
    """How many pictures, or videos, of the batch one request may have. One too large alone is for the endpoint to refuse."""
    _, height, width = call.size
    said = there.limits.get("max_video_pixels" if call.frames > 1 else "max_total_pixels", _MOST_PIXELS)
    most = public_max_pixels() if public else min(_MOST_PIXELS, said)
    pictures = min(_MOST_PICTURES, there.limits.get("max_batch", _MOST_PICTURES))
    return max(1, min(pictures, most // max(1, call.frames * height * width)))


def _parts(tensor: torch.Tensor, at_once: int) -> list[torch.Tensor]:
    """A batch in as few parts of at most ``at_once`` as there can be, of about the same size."""
    count = -(-tensor.shape[0] // at_once)
    return list(torch.tensor_split(tensor, count))


def _form(call: VaeCall[T], transfer: str) -> str:
    """The form in which the call crosses the wire: ``transfer``, as far as it can hold what the VAE makes."""
    if transfer not in ("png", "jpg"):
        return transfer
    if call.frames > 1 or (call.tensor.ndim == VIDEOS and call.vae.family.public_endpoint(call.op)):
        # Many frames make no picture, and a plain endpoint of videos knows tensors only.
        return "u8"
    return "png" if call.vae.family.pixel_channels > _RGB else transfer


def _ask_test_picture(
    client: EndpointClient, call: VaeCall[T], settings: Settings, there: Callable[[], Info], tensor: torch.Tensor
) -> Answer:
    """What the endpoint makes of ``tensor``, which stands for the one of ``call``."""
    sample = replace(call, tensor=tensor.to(call.tensor.dtype))
    # In the form that the endpoint is known to take, which must not lose more than VAEs differ by.
    transfer = "png" if settings.transfer == "jpg" else settings.transfer
    return _Asking(client, sample, transfer, Deadlines.of(settings).quick, there()).ask().answer


def _check_answer(family: Family, tensor: torch.Tensor, answer: Answer) -> None:
    """Whether the answer is what this VAE would have given; a plain endpoint may have one of another family.

    Raises:
        MalformedAnswer: latents or pixels of another shape.
    """
    batch, frames = tensor.shape[0], tensor.shape[2] if tensor.ndim == VIDEOS else 1
    rows, columns = tensor.shape[-2:]
    allowed: tuple[Collection[int], ...]
    made: Collection[int]
    if isinstance(answer, EncodeAnswer):
        shape = tuple(answer.latents.shape)
        came = shape if len(shape) == VIDEOS else (*shape[:2], 1, *shape[2:])
        channels = family.latent_channels * (2 if answer.is_posterior else 1)
        made = range(max(1, frames // family.frame_scale), family.latent_frames(frames) + 1)
        allowed = (batch,), (channels,), made, *(latent_sides(side, family.downscale) for side in (rows, columns))
    else:
        came = answer.extent
        # CogVideoX makes ``frame_scale`` frames of each of an even number of latent ones.
        made = {family.frames(frames), *([] if frames % 2 else [frames * family.frame_scale])}
        sides = (rows * family.downscale,), (columns * family.downscale,)
        allowed = (batch,), (family.pixel_channels,), made, *sides
    if all(size in sizes for size, sizes in zip(came, allowed, strict=True)):
        return
    wanted = [min(sizes, default=0) for sizes in allowed]
    if tensor.ndim != VIDEOS:
        came, wanted = (*came[:2], *came[3:]), [*wanted[:2], *wanted[3:]]
    raise MalformedAnswer(f"got {list(came)}, expected {wanted} of the VAE of {family.label}")


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


def _bytes(call: VaeCall[T], form: str) -> int:
    """Of what may be compressed of a call: the pixels, where they do not go in a picture's file."""
    if form in ("png", "jpg"):
        return 0
    pictures, height, width = call.size
    each = 1 if form == "u8" else call.tensor.element_size()
    return pictures * height * width * call.vae.family.pixel_channels * each


def _fingerprint(there: Info, vae: VaeAtWork) -> str | None:
    """That of the VAE that is meant, as its server names it, or of several will when it has loaded it; None: it names none.

    With it a server refuses what is for a VAE that it had a minute ago.
    """
    said = next(iter(there.fingerprints.values()), None)
    if said is not None or vae.module is None or not there.name:
        return said
    own = fingerprint_of(vae.module)
    return own[1] if own else None


def _upload_form(pixels: torch.Tensor, form: str, *, compressed: bool) -> Union[torch.Tensor, Image.Image]:
    """Pixels in [-1, 1] as they go up: raw as they are, u8 in at most float16 (a sixteenth of a level), png in 8 bits.

    Compressed, u8 are 8-bit levels where the pixels are within a sixteenth of one, as those of every picture file are.
    """
    if form == "raw":
        return pixels
    if form == "u8" and compressed:
        levels = pixels.detach().float().add(1.0).mul_(127.5)
        nearest = levels.round().clamp_(0, 255)
        if bool((levels - nearest).abs().amax() <= _SIXTEENTH):
            return nearest.to(torch.uint8)
    if form == "u8":
        return pixels.to(torch.float16) if pixels.dtype == torch.float32 else pixels
    return Image.fromarray(to_uint8(next(frames_of(pixels)))[0].cpu().numpy())


def _joined(answers: list[Answer]) -> Answer:
    """The answers of a batch's pictures, or videos, as one."""
    decoded = [answer for answer in answers if isinstance(answer, DecodeAnswer)]
    if decoded:
        if len({answer.extent[1:] for answer in decoded}) > 1:
            raise MalformedAnswer("videos of several lengths for one batch")
        if decoded[0].output is Output.TENSOR:
            return DecodeAnswer(Output.TENSOR, torch.cat([answer.tensor for answer in decoded]), decoded[0].is_video)
        return DecodeAnswer(Output.UINT8, torch.cat([answer.levels for answer in decoded]), decoded[0].is_video)
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


def _is_final(asked: Reply[Answer] | RouteFailed | InvalidRequest) -> bool:
    """Whether asking once more for this picture would bring nothing else."""
    if isinstance(asked, Reply):
        return False
    return isinstance(asked, (CallCancelled, InvalidRequest, DeadlineExceeded)) or _is_about_the_call(asked)


def _may_be_another_port(error: RouteFailed) -> bool:
    """Whether what the user means may listen elsewhere on that machine."""
    not_there = isinstance(error, EndpointError) and error.status in (404, 405)
    # Another server there makes no test picture: the VAE is not confirmed. One with another VAE is a server of VAEs.
    is_unknown = isinstance(error, VaeNotConfirmed) and not isinstance(error, AnotherVae)
    return not_there or is_unknown or isinstance(error, (EndpointUnreachable, DeadlineExceeded, MalformedAnswer, InPause))


def _of_all(failures: list[RouteFailed]) -> RouteFailed:
    """The failure at the address that the user gave, with a word on the other."""
    first = failures[0]
    if len(failures) > 1:
        first.args = (f"{first}; no port is given, and at port {DEFAULT_PORT}: {failures[1].reason}",)
    return first


def _is_up(client: EndpointClient, settings: Settings) -> bool:
    try:
        client.health(min(_UP_SECONDS, settings.connect_timeout))
    except RouteFailed:
        return False
    return True


def _as_route_failure(error: CallCancelled | InvalidRequest) -> RouteFailed:
    return error if isinstance(error, CallCancelled) else NotOffered(str(error))
