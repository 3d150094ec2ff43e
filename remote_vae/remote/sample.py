"""For endpoints that say nothing of their VAE: both sides make the same small picture, and the two are compared.

What is sent is a picture made here for the purpose, never the user's.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

import torch

from remote_vae.errors import CallCancelled, EndpointError, MalformedAnswer, RouteFailed
from remote_vae.remote.client import POLL_SECONDS
from remote_vae.vae.fingerprint import ByWeights, Identity
from remote_vae.wire import DecodeAnswer, EncodeAnswer

log = logging.getLogger("remote_vae")

# Of the picture: small enough for a processor.
SIDE = 64
# Root mean square of the difference, in levels of 255, up to which two decoders count as one: half precision makes 0.2, and
# nobody sees three.
SAME_LEVELS = 3.0
# The same for encoders, in standard deviations of the latents: half precision makes 0.004.
SAME_LATENTS = 0.05
# A sample of the posterior is hardly ever so many of its deviations off.
_SAMPLED = 3.0
# Seconds; after that, an endpoint that was started anew with another VAE is noticed.
KEPT_SECONDS = 600.0
# The same where nothing could be told: it may be different in a minute.
UNKNOWN_SECONDS = 60.0

Ask = Callable[[torch.Tensor], "DecodeAnswer | EncodeAnswer"]
Cancelled = Callable[[], bool]


class Work(Protocol):
    """A VAE's own work on the CPU: pixels to moments ``[1, 2 C, h, w]``, or raw latents to pixels."""

    def __call__(self, vae: Any, batch: torch.Tensor, *, cancelled: Cancelled) -> torch.Tensor:
        """Raises CallCancelled when ``cancelled`` says so."""
        ...


@dataclass(frozen=True)
class Sample:
    """A small picture as one VAE makes it, on the CPU.

    Attributes:
        pixels: ``[1, 3, SIDE, SIDE]`` in [-1, 1], 8-bit levels.
        mean, deviation: of the posterior, raw, ``[1, C, h, w]``.
        decoded: the pixels of ``mean``.
    """

    pixels: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    decoded: torch.Tensor

    def agrees(self, answer: DecodeAnswer | EncodeAnswer) -> bool:
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


@dataclass
class _Known:
    """What was found out about one VAE while its weights looked as they do."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    sample: Sample | None = None
    verdicts: dict[str, tuple[float, Optional[bool]]] = field(default_factory=dict)


class Samples:
    """Compares VAEs with endpoints by a sample, and remembers what came of it. May be used from many threads.

    Args:
        encode, decode: how a VAE is run here.
    """

    def __init__(self, encode: Work, decode: Work, clock: Callable[[], float] = time.monotonic) -> None:
        self._encode = encode
        self._decode = decode
        self._clock = clock
        self._known = ByWeights(_Known)

    def compare(self, identity: Identity, op: str, url: str, ask: Ask, cancelled: Cancelled) -> bool | None:
        """Whether the endpoint at ``url`` has the VAE of ``identity``; None where that cannot be told.

        Args:
            ask: has ``op`` done by the endpoint: mean latents to pixels, or pixels to latents.
            cancelled: whether the user wants it to end.

        Raises:
            RouteFailed: the endpoint did not answer; a call would not be answered either. CallCancelled among them.
        """
        try:
            known = self._known.of(identity.vae)
        except Exception as error:  # whatever VAE that is, the call goes on without
            log.debug("nothing to compare %s by: %s", type(identity.vae).__name__, error)
            return None
        until, verdict = known.verdicts.get(url, (-math.inf, None))
        if self._clock() >= until:
            verdict = self._ask(known, identity.vae, op, ask, cancelled)
            kept = UNKNOWN_SECONDS if verdict is None else KEPT_SECONDS
            known.verdicts[url] = self._clock() + kept, verdict
        return verdict

    def forget(self, url: str) -> None:
        """The endpoint at ``url`` failed; it may come back as another one."""
        for known in self._known.all():
            known.verdicts.pop(url, None)

    def _ask(self, known: _Known, vae: Any, op: str, ask: Ask, cancelled: Cancelled) -> bool | None:
        try:
            sample = self._sample(known, vae, cancelled)
        except CallCancelled:
            raise
        except Exception as error:  # as above
            log.debug("no sample of %s: %s", type(vae).__name__, error)
            return None
        try:
            return sample.agrees(ask(sample.mean if op == "decode" else sample.pixels))
        except (EndpointError, MalformedAnswer):
            # So small a picture, or in this form: what the endpoint makes of the call itself is another matter.
            return None
        except RouteFailed:
            raise
        except Exception as error:  # as above
            log.debug("nothing to compare with the sample of %s: %s", type(vae).__name__, error)
            return None

    def _sample(self, known: _Known, vae: Any, cancelled: Cancelled) -> Sample:
        while not known.lock.acquire(timeout=POLL_SECONDS):
            if cancelled():
                raise CallCancelled("interrupted while waiting for the sample", reason="interrupted")
        try:
            if known.sample is None:
                sample = self._made(vae, cancelled)
                self._known.ensure_unchanged(vae, known)
                known.sample = sample
            return known.sample
        finally:
            known.lock.release()

    def _made(self, vae: Any, cancelled: Cancelled) -> Sample:
        pixels = picture()
        mean, logvar = self._encode(vae, pixels, cancelled=cancelled).float().chunk(2, dim=1)
        # As in diffusers' DiagonalGaussianDistribution.
        deviation = torch.exp(0.5 * logvar.clamp(-30, 20))
        decoded = self._decode(vae, mean, cancelled=cancelled).float()
        if not all(bool(torch.isfinite(values).all()) for values in (mean, deviation, decoded)):
            raise ArithmeticError("NaN in the sample")
        return Sample(pixels, mean, deviation, decoded)


def picture() -> torch.Tensor:
    """``[1, 3, SIDE, SIDE]`` in [-1, 1], 8-bit levels: a shaded ball before a sky and a striped floor."""
    line = torch.linspace(-1, 1, SIDE, device="cpu", dtype=torch.float32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    sky = torch.stack([0.2 - 0.5 * y, 0.4 - 0.3 * y, 0.8 + 0.1 * y])
    floor = torch.sign(torch.sin(14 * x / (y + 0.2).clamp(min=0.1))) * _colour(0.5, 0.4, 0.2)
    scene = torch.where(y > 0.3, floor, sky)
    depth = (0.36 - x.square() - (y + 0.1).square()).clamp(min=0).sqrt()
    light = (0.9 * depth - 0.5 * x - 0.6 * y) * _colour(1.6, 0.7, 0.4) - 0.3
    levels = (torch.where(depth > 0, light, scene).clamp(-1, 1) * 127.5 + 127.5).round()
    return (levels / 127.5 - 1).unsqueeze(0)


def _colour(*values: float) -> torch.Tensor:
    return torch.tensor(values, device="cpu", dtype=torch.float32).view(3, 1, 1)


def _rms(difference: torch.Tensor) -> float:
    return difference.double().square().mean().sqrt().item()
