"""A VAE at work: what one call needs to know of the VAE that it is made to, whoever has loaded it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from remote_vae.vae.families import Family

Op = Literal["decode", "encode"]

# Of the tensors of a video VAE: batch, channels, frames, rows, columns.
VIDEO_DIMENSIONS = 5


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """Nothing has to be brought anywhere."""
    return tensor


# VAEs of diffusers whose encoder gives latents: in an output of their own, or as a distribution that is one point.
_WITHOUT_POSTERIOR = ("AutoencoderTiny", "AutoencoderDC", "AutoencoderKLCosmos")
_TEMPORAL_DECODER = "AutoencoderKLTemporalDecoder"
# The mask of its attention is made for one video, and fails with several (diffusers 0.42).
_OF_ONE_VIDEO = "AutoencoderKLHunyuanVideo15"


def whole_diffusers(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
    """The whole call of a VAE of diffusers: pixels of raw latents; of pixels the moments or, without a posterior, latents.

    A temporal decoder (SVD) takes and gives frames as other video VAEs do: ``[B, C, F, h, w]``.
    """
    if is_of(module, _TEMPORAL_DECODER) and tensor.ndim == VIDEO_DIMENSIONS:
        made = _of_frames(module, op, tensor.movedim(2, 1).flatten(0, 1), tensor.shape[2])
        return made.reshape(tensor.shape[0], -1, *made.shape[1:]).movedim(1, 2)
    if is_of(module, _OF_ONE_VIDEO) and tensor.shape[0] > 1:
        return torch.cat([_called(module, op, video) for video in torch.split(tensor, 1)])
    return _called(module, op, tensor)


def _of_frames(module: Any, op: Op, frames: torch.Tensor, count: int) -> torch.Tensor:
    if op == "encode":
        return _called(module, op, frames)
    pixels: torch.Tensor = module.decode(frames, num_frames=count, return_dict=False)[0]
    return pixels


def _called(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor
    if op == "decode":
        values = module.decode(tensor, return_dict=False)[0]
        return values
    encoded = module.encode(tensor, return_dict=False)[0]
    values = getattr(encoded, "parameters", encoded)
    return values


def has_posterior(module: Any) -> bool:
    """Whether a VAE of diffusers encodes to a distribution."""
    return not is_of(module, *_WITHOUT_POSTERIOR)


def is_of(module: Any, *names: str) -> bool:
    """Whether ``module`` is of a class that is called so, or that was made of one."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


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
            (mean, logvar), unscaled; without a posterior, to raw latents. Of a video VAE with frames in dimension 2.
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
