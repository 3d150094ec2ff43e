"""A VAE at work: what one call needs to know of the VAE that it is made to, whoever has loaded it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from remote_vae.vae.families import Family

Op = Literal["decode", "encode"]


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """Nothing has to be brought anywhere."""
    return tensor


def whole_diffusers(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
    """The whole call of a VAE of diffusers: pixels of raw latents; of pixels the moments or, without a posterior, latents."""
    if op == "decode":
        pixels: torch.Tensor = module.decode(tensor, return_dict=False)[0]
        return pixels
    encoded = module.encode(tensor)
    latents: torch.Tensor = encoded.latent_dist.parameters if has_posterior(module) else encoded.latents
    return latents


def has_posterior(module: Any) -> bool:
    """Whether a VAE of diffusers encodes to a distribution. AutoencoderTiny is the one that gives latents."""
    return not type(module).__name__.endswith("Tiny")


@dataclass(frozen=True)
class VaeAtWork:
    """The VAE of one call: a host's, the server's own, or one that a UI shares.

    Made anew for each call, as a host may load another model between two.

    Attributes:
        module: the torch module, of any project; it is never changed. None: it is not at hand (the command line).
        family: what the VAE is.
        device: where it computes.
        dtype: what it computes in.
        whole: ``whole(module, op, tensor)`` is the whole call of the module, or of a copy of it, without the host around it.
            Raw latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]`` in [-1, 1], or such pixels to moments ``[B, 2 C, h, w]``
            (mean, logvar), unscaled; without a posterior, to raw latents.
        bring: gets the VAE onto its device in the host's own way, and gives a tensor there, in its dtype.
        picked: name of the VAE file that the user picked in the UI; "" for the model's own.
        model: what ``GET /info`` calls it. Everyone who may use it can read it.
        has_posterior: whether an encode gives moments.
    """

    module: Any
    family: Family
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    whole: Callable[[Any, Op, torch.Tensor], torch.Tensor] = whole_diffusers
    bring: Callable[[torch.Tensor], torch.Tensor] = as_it_is
    picked: str = ""
    model: str = ""
    has_posterior: bool = True


class Provider(Protocol):
    """A host adapter, as far as its VAE is shared. ``shares`` and ``current`` are asked from any thread, and answer at once."""

    def shares(self) -> bool:
        """Whether the user wants the VAE shared."""
        ...

    def current(self) -> VaeAtWork | None:
        """The VAE that is loaded now; None: none is. Loads nothing."""
        ...

    def serving(self) -> AbstractContextManager[Any]:
        """The context of a call for another UI, held in the thread that makes it."""
        ...
