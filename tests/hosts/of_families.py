"""The VAE of every family, with a real server of it behind a proxy that fails on demand, and tensors for its calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import diffusers
import torch

from remote_vae.server.models import LoadedVae
from remote_vae.vae.families import family_of
from remote_vae.vae.fingerprint import ROUNDINGS, fingerprint
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.vaes import small_vae

# A video's latent frames.
FRAMES = 2


@cache
def the_vae(name: str) -> Any:
    """One of each kind, not to be changed. ``name``: a key of ``tests.vaes.SMALL``."""
    return small_vae(name)


def loaded(vae: Any, name: str) -> LoadedVae:
    """As a server would have loaded it."""
    names = {rounding: fingerprint(vae.state_dict(), rounding) for rounding in ROUNDINGS}
    return LoadedVae(vae, family_of(vae), name, names)


@contextmanager
def proxies() -> Iterator[Callable[[str], Chaos]]:
    """``proxy(name)``: before the real server of ``the_vae(name)``, which is started when it is first asked for."""
    started: list[Chaos | ServerThread] = []

    @cache
    def of(name: str) -> Chaos:
        # Its own copy: what is attached to ours is not in front of its calls.
        server = ServerThread(loaded(copy.deepcopy(the_vae(name)), name))
        chaos = Chaos(server.url)
        started.extend((server, chaos))
        return chaos

    yield of
    # One after the other they would take a fifth of a second each.
    with ThreadPoolExecutor(max(1, len(started))) as pool:
        list(pool.map(lambda each: each.close(), started))


def is_of_one_frame(vae: Any) -> bool:
    """Whether its convolutions take one frame."""
    return type(vae).__name__ == "AutoencoderKLQwenImage21"


def is_temporal(vae: Any) -> bool:
    """Whether frames are a batch to it."""
    return isinstance(vae, diffusers.AutoencoderKLTemporalDecoder)


def latents_of(vae: Any, frames: int = FRAMES, batch: int = 1) -> torch.Tensor:
    """As the VAE's own decode takes them."""
    family = family_of(vae)
    generator = torch.Generator().manual_seed(1)
    if is_temporal(vae):
        return torch.randn(batch * frames, family.latent_channels, 2, 3, generator=generator)
    axes = (1 if is_of_one_frame(vae) else frames,) if family.video else ()
    return torch.randn(batch, family.latent_channels, *axes, 2, 3, generator=generator)


def pixels_of(vae: Any, frames: int = FRAMES) -> torch.Tensor:
    """As the VAE's own encode takes them."""
    family = family_of(vae)
    count = 1 if is_of_one_frame(vae) else family.frames(frames)
    axes = (count,) if family.video and not is_temporal(vae) else ()
    side = 2 * family.downscale
    return torch.rand(1, family.pixel_channels, *axes, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def arguments(vae: Any, frames: int = FRAMES) -> dict[str, Any]:
    """What its decode is given beside the latents."""
    return {"num_frames": frames} if is_temporal(vae) else {}


def latents_in(encoded: Any) -> torch.Tensor:
    """What an encode gave: a distribution's parameters, or the latents."""
    values = encoded[0]
    return values if isinstance(values, torch.Tensor) else values.parameters
