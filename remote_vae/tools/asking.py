"""Small calls to an endpoint, for whoever wants to know how it does."""

from __future__ import annotations

import statistics
import time

import torch

from remote_vae.call import NOBODY, Answer, User, VaeCall
from remote_vae.errors import EndpointError, MalformedAnswer, RouteFailed, SettingsError
from remote_vae.remote.client import Deadlines, beside, client_for, shown
from remote_vae.remote.endpoints import endpoint_for
from remote_vae.remote.trial import family_said
from remote_vae.router import Router
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import Family, find_family
from remote_vae.wire import Info

_REPEATS = 3
# No latents of a VAE have fewer cells along a side.
_FEWEST_CELLS = 8


def sample(op: Op, family: Family, side: int, batch: int = 1) -> torch.Tensor:
    """What a call of about ``side`` pixels takes: latents ``[B, C, h, w]`` in float16, or pixels ``[B, C, H, W]`` in [-1, 1].

    With an axis of one frame for a VAE of videos. The pixels are a picture of soft colours, whatever the size.
    """
    cells = side_of(family, side) // family.downscale
    if op == "decode":
        made = torch.randn(batch, family.latent_channels, cells, cells, generator=torch.Generator().manual_seed(0)).half()
    else:
        edge = torch.linspace(-1, 1, cells * family.downscale)
        y, x = torch.meshgrid(edge, edge, indexing="ij")
        colours = [x, y, x * y, torch.ones_like(x)][: family.pixel_channels]
        made = torch.stack(colours).unsqueeze(0).repeat(batch, 1, 1, 1)
    return made.unsqueeze(2) if family.video else made


def side_of(family: Family, side: int) -> int:
    """The side in pixels that ``sample`` has for ``side``."""
    return max(_FEWEST_CELLS, side // family.downscale) * family.downscale


def info_at(url: str, settings: Settings) -> Info | RouteFailed:
    """What the server says of itself at ``url``, or why it says nothing."""
    try:
        return client_for(url).info(Deadlines.of(settings).quick)
    except RouteFailed as error:
        return error


def family_of(op: Op, named: str | None, settings: Settings, otherwise: str = "") -> Family:
    """The family that was named, else the one that the endpoint says it has, else ``otherwise``.

    Raises:
        SettingsError: no endpoint is set, or it does not say. RouteFailed: it is not reached.
    """
    if named:
        return find_family(named)
    # Any family: only for public endpoints, which do not say theirs, it makes a difference.
    url, _ = endpoint_for(op, find_family("sd1"), settings)
    if not url:
        raise SettingsError("no endpoint is set; use --endpoint http://HOST:7870")
    info = info_at(beside(url, "info"), settings)
    if isinstance(info, RouteFailed) and not isinstance(info, (EndpointError, MalformedAnswer)):
        raise info
    # What else is wrong with the endpoint, the call itself will say.
    found = None if isinstance(info, RouteFailed) else family_said(info)
    if found is not None:
        return found
    if otherwise:
        return find_family(otherwise)
    raise SettingsError(f"{shown(url)} does not say which VAE it has; name it with --family, for example --family sd1")


def made(op: Op, tensor: torch.Tensor, family: Family, settings: Settings, user: User = NOBODY) -> None:
    """Have one call done by the endpoint of ``settings``, for nobody. Raises RouteFailed."""

    def adopt(answer: Answer) -> Answer:
        return answer

    Router().run_remote(VaeCall(op, tensor, VaeAtWork(None, family), adopt, user=user), settings)


def measured_seconds(op: Op, family: Family, side: int, batch: int, endpoint: str) -> float:
    """Seconds of such a call there and back: the median of three, after one that warms the server up.

    Raises:
        RouteFailed: the endpoint does not make it.
    """
    settings = Settings(endpoint=endpoint, transfer="u8", total_timeout=Deadlines.of(Settings()).total * 4)
    tensor = sample(op, family, side, batch)
    made(op, tensor, family, settings)
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        made(op, tensor, family, settings)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
