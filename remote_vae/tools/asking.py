"""Small calls to an endpoint, for whoever wants to know how it does."""

from __future__ import annotations

import statistics
import time

import torch

from remote_vae.call import NOBODY, Answer, User, VaeCall
from remote_vae.remote.client import Deadlines
from remote_vae.remote.route import RemoteRoute
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import Family

_REPEATS = 3
# No latents of a VAE have fewer cells along a side.
_FEWEST_CELLS = 8


def sample(op: Op, family: Family, side: int, batch: int = 1) -> torch.Tensor:
    """What a call of about ``side`` pixels takes: latents ``[B, C, h, w]`` in float16, or pixels ``[B, C, H, W]`` in [-1, 1].

    With an axis of one frame for a VAE of videos. The pixels are a picture of soft colours, whatever the size.
    """
    cells = max(_FEWEST_CELLS, side // family.downscale)
    if op == "decode":
        made = torch.randn(batch, family.latent_channels, cells, cells, generator=torch.Generator().manual_seed(0)).half()
    else:
        edge = torch.linspace(-1, 1, cells * family.downscale)
        y, x = torch.meshgrid(edge, edge, indexing="ij")
        colours = [x, y, x * y, torch.ones_like(x)][: family.pixel_channels]
        made = torch.stack(colours).unsqueeze(0).repeat(batch, 1, 1, 1)
    return made.unsqueeze(2) if family.video else made


def made(op: Op, tensor: torch.Tensor, family: Family, settings: Settings, user: User = NOBODY) -> None:
    """Have one call done by the endpoint of ``settings``, for nobody. Raises RouteFailed."""

    def adopt(answer: Answer) -> Answer:
        return answer

    RemoteRoute().run(VaeCall(op, tensor, VaeAtWork(None, family), adopt, user=user), settings)


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
