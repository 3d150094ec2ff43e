"""What a VAE call is, and the face that every route has.

A host adapter makes a ``VaeCall``; the router hands it to one route after the other. ``T`` is whatever the host's own VAE call
returns (a tensor, a distribution, diffusers' output class), so that a local result goes back untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar, Union

import torch

from remote_vae.history import Record
from remote_vae.settings import Settings
from remote_vae.vae.families import Family
from remote_vae.vae.fingerprint import Identity
from remote_vae.wire import DecodeAnswer, EncodeAnswer

T = TypeVar("T")
Op = Literal["decode", "encode"]
Remote = Union[DecodeAnswer, EncodeAnswer]


@dataclass(frozen=True)
class Spare(Generic[T]):
    """Another way to do the call on this machine with less memory; ``name`` is for the history."""

    name: str
    run: Callable[[], T]


def silent(_: Any) -> None:
    """Nobody wants to know."""


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _unfinished(result: torch.Tensor) -> Any:  # noqa: ARG001
    raise AssertionError("a call with a VAE needs finish")


@dataclass(frozen=True)
class VaeCall(Generic[T]):
    """One call of a host to its VAE.

    Attributes:
        op: "decode" or "encode".
        tensor: decode: raw (unscaled) latents ``[B, C, h, w]``; encode: pixels ``[B, 3, H, W]`` in [-1, 1]. Never changed.
        family: what the VAE is.
        whole: the host's own call, its result untouched. None: it is known not to fit in memory.
        spares: what to try when the host's own call runs out of memory, best first.
        adopt: turns a remote answer into what the host's own call would return.
        lost: what is lost with the call where that is more than ``tensor``: the latents of the whole batch. Saved in its place.
        vae: the VAE itself, for the exact tiled VAE to work with its layers; None: it is not at hand.
        finish: turns pixels or, for an encode, moments into what the host's own call would return.
        device: where the VAE computes; None: where ``tensor`` is.
        in_parts: whether the host makes a batch in as many parts as its memory wants.
        bring: gets the VAE onto its device in the host's own way, and gives a tensor there in the VAE's dtype.
        identity: which VAE it is, to be compared with the endpoint's. None: not known, and whatever the endpoint has will do.
        truncates: whether the host makes 8-bit levels by rounding down; then an 8-bit transfer does so too.
        cancelled: whether the user wants the waiting to end. Called often, from any thread.
        part: which part of a larger job this is, for the eyes of the user: "2 of 4".
        tell: shown to the user while the call runs: "decoding 2 of 4 on studio:7870". Called from any thread.
        recorded: given the record of the call when it has ended.
    """

    op: Op
    tensor: torch.Tensor
    family: Family
    whole: Callable[[], T] | None
    adopt: Callable[[Remote], T]
    spares: tuple[Spare[T], ...] = ()
    lost: torch.Tensor | None = None
    vae: Any = None
    finish: Callable[[torch.Tensor], T] = _unfinished
    identity: Identity | None = None
    truncates: bool = False
    device: torch.device | None = None
    in_parts: bool = False
    bring: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    cancelled: Callable[[], bool] = lambda: False
    part: str = ""
    tell: Callable[[str], None] = silent
    recorded: Callable[[Record], None] = silent

    @property
    def doing(self) -> str:
        """What goes on, for the eyes of the user."""
        batch = self.tensor.shape[0]
        what = self.part or (f"{batch} pictures" if batch > 1 else "")
        return " ".join(filter(None, ("decoding" if self.op == "decode" else "encoding", what)))

    @property
    def size(self) -> tuple[int, int, int]:
        """B, H, W in pixels."""
        scale = self.family.downscale if self.op == "decode" else 1
        return self.tensor.shape[0], self.tensor.shape[-2] * scale, self.tensor.shape[-1] * scale

    def without_whole(self) -> VaeCall[T]:
        """The same call after the host's own way has run out of memory."""
        return replace(self, whole=None)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a route gives back, with what the history wants to know."""

    value: T
    detail: str = ""
    endpoint: str = ""
    bytes_up: int = 0
    bytes_down: int = 0


class Route(Protocol):
    """One way to answer VAE calls."""

    name: str

    def run(self, call: VaeCall[T], settings: Settings) -> Outcome[T]:
        """Answer ``call``.

        Raises:
            RouteFailed: this route cannot; another one may. Any other exception is the host's own and ends the call.
        """
        ...
