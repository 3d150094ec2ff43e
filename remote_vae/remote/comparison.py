"""The small test picture by which the VAE here is compared with that of an endpoint that says nothing of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from remote_vae import tiled
from remote_vae.call import Answer
from remote_vae.errors import InvalidRequest, UnsupportedLayout
from remote_vae.local.own import on_cpu
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import Family
from remote_vae.wire import DecodeAnswer

# Of the test picture: small enough for a processor.
SIDE = 64
# Latent cells along its side, at least: a VAE of 32 pixels a cell gets a larger picture.
_CELLS = 4
# Root mean square of the difference, in levels of 255, up to which two decoders count as one: half precision makes 0.2, and
# nobody sees three.
SAME_LEVELS = 3.0
# The same for encoders, in standard deviations of the latents: half precision makes 0.004.
SAME_LATENTS = 0.05
# A sample of the posterior is hardly ever so many of its deviations off.
_SAMPLED = 3.0

Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Comparison:
    """The test picture as one VAE makes it, on the CPU.

    Attributes:
        pixels: ``picture`` of the VAE's family.
        mean, deviation: of the posterior, raw, ``[1, C, h, w]``, of a video VAE ``[1, C, 1, h, w]``; without a posterior the
            latents and 0.
        decoded: the pixels of ``mean``.
    """

    pixels: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    decoded: torch.Tensor

    def agrees(self, answer: Answer) -> bool:
        """Whether ``answer``, to ``mean`` or to ``pixels``, may be of the same VAE."""
        if isinstance(answer, DecodeAnswer):
            difference = answer.pixels("cpu", torch.float32).clamp(-1, 1) - self.decoded.clamp(-1, 1)
            return _rms(difference) * 127.5 <= SAME_LEVELS
        latents = answer.latents.float()
        if answer.is_posterior:
            difference = latents.chunk(2, dim=1)[0] - self.mean
        else:
            difference = ((latents - self.mean).abs() - _SAMPLED * self.deviation).clamp(min=0)
        return _rms(difference) <= SAME_LATENTS * self.mean.std().item()


def picture(family: Family) -> torch.Tensor:
    """A shaded ball before a sky and a striped floor, for a VAE of ``family``.

    Returns:
        ``[1, C, H, W]`` in [-1, 1], of a video VAE ``[1, C, 1, H, W]``: 8-bit levels. An alpha channel fades to one side.
    """
    line = torch.linspace(-1, 1, max(SIDE, _CELLS * family.downscale), device="cpu", dtype=torch.float32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    sky = torch.stack([0.2 - 0.5 * y, 0.4 - 0.3 * y, 0.8 + 0.1 * y])
    floor = torch.sign(torch.sin(14 * x / (y + 0.2).clamp(min=0.1))) * _colour(0.5, 0.4, 0.2)
    scene = torch.where(y > 0.3, floor, sky)
    depth = (0.36 - x.square() - (y + 0.1).square()).clamp(min=0).sqrt()
    light = (0.9 * depth - 0.5 * x - 0.6 * y) * _colour(1.6, 0.7, 0.4) - 0.3
    colours = torch.where(depth > 0, light, scene).clamp(-1, 1)
    channels = torch.cat([colours, x.unsqueeze(0)])[: family.pixel_channels]
    pixels = ((channels * 127.5 + 127.5).round() / 127.5 - 1).unsqueeze(0)
    return pixels.unsqueeze(2) if family.video else pixels


def made_here(vae: VaeAtWork, cancelled: Cancelled) -> Comparison:
    """What ``vae`` makes of the picture, on the CPU in float32: the card has other work."""
    try:
        return _made_by(lambda op, tensor: _tiled(vae, op, tensor, cancelled), vae)
    except (UnsupportedLayout, InvalidRequest):  # a VAE, or an axis of frames, that the tiled VAE does not know
        copied = on_cpu(vae.module)
        return _made_by(lambda op, tensor: vae.whole(copied, op, tensor), vae)


def _tiled(vae: VaeAtWork, op: Op, tensor: torch.Tensor, cancelled: Cancelled) -> torch.Tensor:
    run = tiled.decode if op == "decode" else tiled.encode
    return run(vae.module, tensor, device="cpu", dtype=torch.float32, cancelled=cancelled)


def _made_by(run: Callable[[Op, torch.Tensor], torch.Tensor], vae: VaeAtWork) -> Comparison:
    pixels, has_posterior = picture(vae.family), vae.has_posterior
    with torch.no_grad():
        encoded = run("encode", pixels).float()
        mean, logvar = encoded.chunk(2, dim=1) if has_posterior else (encoded, torch.full_like(encoded, -math.inf))
        # As in diffusers' DiagonalGaussianDistribution.
        deviation = torch.exp(0.5 * logvar.clamp(max=20)) if has_posterior else torch.zeros_like(mean)
        decoded = run("decode", mean).float()
    if not all(bool(torch.isfinite(values).all()) for values in (mean, deviation, decoded)):
        raise ArithmeticError("it gives NaN")
    return Comparison(pixels, mean, deviation, decoded)


def _colour(*values: float) -> torch.Tensor:
    return torch.tensor(values, device="cpu", dtype=torch.float32).view(3, 1, 1)


def _rms(difference: torch.Tensor) -> float:
    return difference.double().square().mean().sqrt().item()
