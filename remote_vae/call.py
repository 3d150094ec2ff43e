"""What a VAE call is, and what comes of it.

A host adapter makes a ``VaeCall``; the router has it answered. ``T`` is whatever the host's own VAE call returns (a tensor, a
distribution, diffusers' output class), so that a local result goes back untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Union

import torch

from remote_vae.history import Record
from remote_vae.vae.at_work import VIDEO_DIMENSIONS, Op, VaeAtWork
from remote_vae.wire import DecodeAnswer, EncodeAnswer, Output

T = TypeVar("T")
Answer = Union[DecodeAnswer, EncodeAnswer]


def nothing(_: Any) -> None:
    """Nobody wants to know."""


def no_room(_wanted: int, _least: int) -> int:
    """Nothing can be put away."""
    return 0


def never() -> bool:
    """Nobody presses anything."""
    return False


@dataclass(frozen=True)
class User:
    """Who waits for a call.

    Attributes:
        cancelled: whether the waiting for an endpoint is to end. Called often, from any thread.
        gave_up: whether it ends because the endpoint takes too long (Skip), and not because the picture is not wanted.
        tell: shows a text while the call runs: "decoding 2 of 4 on studio:7870". Called from any thread.
        recorded: given the record of the call when it has ended.
        part: which part of a larger job this is: "2 of 4".
    """

    cancelled: Callable[[], bool] = never
    gave_up: Callable[[], bool] = never
    tell: Callable[[str], None] = nothing
    recorded: Callable[[Record], None] = nothing
    part: str = ""


NOBODY = User()


@dataclass(frozen=True)
class VaeCall(Generic[T]):
    """One call of a host to its VAE.

    Attributes:
        op: "decode" or "encode".
        tensor: decode: raw (unscaled) latents ``[B, C, h, w]``, of a video VAE ``[B, C, F, h, w]``; encode: pixels
            ``[B, 3 or 4, H, W]`` in [-1, 1], of a video VAE ``[B, 3 or 4, F, H, W]``. Never changed.
        vae: the VAE that the host would use.
        adopt: an answer, of an endpoint or made here, as what the host's own call would return.
        whole: the host's own call, its result untouched. None: only an endpoint is asked.
        own_tiling: the host's own call in the VAE's own overlapping tiles; None: it has none.
        saved: the latents to save if all fails, where that is more than ``tensor``: those of the whole batch.
        make_room: ``make_room(wanted, least)`` has the host put other models away until ``wanted`` bytes more are free on the
            VAE's device; where not even ``least`` would come of it, nothing is moved. It gives the bytes that were freed and
            never raises. After the call the host brings them back.
        in_parts: whether the host makes a batch in as many parts as its memory wants.
        truncates: whether the host makes 8-bit levels by rounding down; then an 8-bit transfer does so too.
        packed: encode: whether latents are wanted as Flux.2's transformer takes them, normed and packed, which a server of ours
            does. ``vae.family`` is then as those latents are.
        user: who waits.
    """

    op: Op
    tensor: torch.Tensor
    vae: VaeAtWork
    adopt: Callable[[Answer], T]
    whole: Callable[[], T] | None = None
    own_tiling: Callable[[], T] | None = None
    saved: torch.Tensor | None = None
    make_room: Callable[[int, int], int] = no_room
    in_parts: bool = False
    truncates: bool = False
    packed: bool = False
    user: User = NOBODY

    @property
    def doing(self) -> str:
        """What goes on, for the eyes of the user."""
        pictures = self.size[0]
        several = f"{pictures} frames" if self.frames > 1 else f"{pictures} pictures" if pictures > 1 else ""
        what = self.user.part or several
        return " ".join(filter(None, ("decoding" if self.op == "decode" else "encoding", what)))

    @property
    def frames(self) -> int:
        """Pixel frames of each item of the batch."""
        if self.tensor.ndim != VIDEO_DIMENSIONS:
            return 1
        count = self.tensor.shape[2]
        return self.vae.family.frames(count) if self.op == "decode" else count

    @property
    def size(self) -> tuple[int, int, int]:
        """Pictures, H, W in pixels; every frame is a picture."""
        scale = self.vae.family.downscale if self.op == "decode" else 1
        return self.tensor.shape[0] * self.frames, self.tensor.shape[-2] * scale, self.tensor.shape[-1] * scale

    def adopt_local(self, result: torch.Tensor) -> T:
        """What the VAE's layers gave here, as what the host's own call would return."""
        if self.op == "decode":
            return self.adopt(DecodeAnswer(Output.TENSOR, result))
        return self.adopt(EncodeAnswer(result, is_posterior=self.vae.has_posterior))


@dataclass(frozen=True)
class Way(Generic[T]):
    """One way to answer a call on this machine; ``route`` and ``detail`` are for the history."""

    route: str
    detail: str
    run: Callable[[], T]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """An answered call, with what the history wants to know.

    Attributes:
        value: what the host gets.
        route: "remote", "local" (the whole VAE of this machine) or "tiled".
        detail: how: "u8" for a transfer, "exact" for the tiled VAE.
        endpoint: scheme, host and path that answered; "" on this machine.
        bytes_up, bytes_down: bytes of the two bodies.
        because: why the ways before it did not answer.
        vae_ms: milliseconds of it that the endpoint says its VAE took; 0: it does not say.
    """

    value: T
    route: str
    detail: str = ""
    endpoint: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    because: str = ""
    vae_ms: float = 0.0
