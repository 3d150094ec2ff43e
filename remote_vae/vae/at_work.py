"""A VAE as the server's engine works with it: the server's own, or the one that a host UI has loaded and shares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from remote_vae.vae.families import Family


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class ServedVae:
    """One VAE, for one call: it is made anew for each, as a host may load another model between two.

    Attributes:
        module: the VAE itself, for the exact tiled VAE to work with its layers. A host's is never changed.
        family: what the VAE is.
        dtype: what it computes in.
        device: where it computes; ``decode`` and ``encode`` are given tensors there, in ``dtype``.
        decode: the whole VAE's call: raw latents ``[B, C, h, w]`` to pixels ``[B, 3, H, W]`` in [-1, 1], on any device.
        encode: the whole VAE's call: pixels ``[B, 3, H, W]`` in [-1, 1] to moments ``[B, 2 C, h, w]`` (mean, logvar), unscaled;
            without a posterior, to raw latents.
        name: what ``GET /info`` calls the model. Everyone who may use it can read it.
        has_posterior: whether ``encode`` gives moments.
        bring: before the exact tiled VAE: gets the VAE onto its device in the host's own way, and gives a tensor there.
        calling: the context of a call, held in the thread that makes it. Not ``inference_mode`` where the host moves weights
            or loads others into them: what it makes of them within cannot be written to later.
    """

    module: Any
    family: Family
    dtype: torch.dtype
    device: torch.device
    decode: Callable[[torch.Tensor], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]
    name: str = ""
    has_posterior: bool = True
    bring: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    calling: Callable[[], AbstractContextManager[Any]] = torch.no_grad


class Provider(Protocol):
    """A host adapter, as far as its VAE is shared. Both are asked at every request, from any thread, and answer at once."""

    def shares(self) -> bool:
        """Whether the user wants the VAE shared."""
        ...

    def current(self) -> ServedVae | None:
        """The VAE that is loaded now; None: none is. Loads nothing."""
        ...
