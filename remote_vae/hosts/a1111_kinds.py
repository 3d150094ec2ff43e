"""The kinds of model that A1111 loads, and what their VAE calls take and return.

ldm (SD 1, SD 2): decode takes latents times scale_factor; encode returns an unscaled distribution.
sgm (SDXL): decode the same; encode returns the scaled sample.
SD 3: latents are shifted and scaled by ``latent_format``; encode returns the scaled sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch


class Kind(ABC):
    """How one kind of model relates what crosses its VAE calls to the VAE's raw latents."""

    scaling_factor: float
    shift_factor: float = 0.0

    @abstractmethod
    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Model latents to raw latents, with the model's own arithmetic, so that the last bit agrees."""

    @abstractmethod
    def from_moments(self, moments: torch.Tensor) -> Any:
        """What ``encode_first_stage`` returns for the posterior ``[B, 2 C, h, w]`` (mean, logvar), unscaled."""

    @abstractmethod
    def from_sample(self, latents: torch.Tensor) -> Any:
        """What ``encode_first_stage`` returns for raw latents ``[B, C, h, w]`` that are already drawn."""

    def moments(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The posterior ``[B, 2 C, h, w]`` (mean, logvar), unscaled, that ``vae.encode`` draws its sample from."""
        hidden = vae.encoder(pixels)
        moments: torch.Tensor = hidden if getattr(vae, "quant_conv", None) is None else vae.quant_conv(hidden)
        return moments


class Ldm(Kind):
    """ldm's LatentDiffusion."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def scaling_factor(self) -> float:  # type: ignore[override]  # read anew: a checkpoint swap may change it
        return float(self._model.scale_factor)

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        raw: torch.Tensor = 1.0 / self._model.scale_factor * latents
        return raw

    def from_moments(self, moments: torch.Tensor) -> Any:
        return _distribution(moments)

    def from_sample(self, latents: torch.Tensor) -> Any:
        # A distribution without spread: callers take .sample(), .mode() or .mean of it, and all are these latents.
        return _distribution(torch.cat([latents, latents], dim=1), deterministic=True)

    def moments(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        parameters: torch.Tensor = vae.encode(pixels).parameters
        return parameters


class Sgm(Ldm):
    """sgm's DiffusionEngine."""

    def moments(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        return Kind.moments(self, vae, pixels)

    def from_moments(self, moments: torch.Tensor) -> Any:
        mean, std = _mean_and_std(moments)
        # As sgm's distribution draws: from the CPU's global generator, whatever the device.
        # Its noise is float32, and so the sample of a half-precision VAE is as well.
        return self._model.scale_factor * (mean + std * torch.randn(mean.shape).to(mean.device))

    def from_sample(self, latents: torch.Tensor) -> Any:
        return self._model.scale_factor * latents.float()


class Sd3(Kind):
    """A1111's SD3Inferencer, whose VAE draws its sample with ``randn_like``."""

    def __init__(self, model: Any) -> None:
        self._format = model.latent_format
        self.scaling_factor = float(self._format.scale_factor)
        self.shift_factor = float(self._format.shift_factor)

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        raw: torch.Tensor = self._format.process_out(latents)
        return raw

    def from_moments(self, moments: torch.Tensor) -> Any:
        mean, std = _mean_and_std(moments)
        return self._format.process_in(mean + std * torch.randn_like(mean))

    def from_sample(self, latents: torch.Tensor) -> Any:
        return self._format.process_in(latents)


def kind_of(model: Any) -> Kind | None:
    """The kind of ``model`` by what it has, or None."""
    if not callable(getattr(model, "decode_first_stage", None)) or not callable(getattr(model, "encode_first_stage", None)):
        return None
    if hasattr(model, "latent_format"):
        return Sd3(model)
    if not hasattr(model, "scale_factor"):
        return None
    # sgm's engine has a conditioner where ldm's model has a cond_stage_model of its own.
    return Sgm(model) if hasattr(model, "conditioner") else Ldm(model)


def _distribution(moments: torch.Tensor, *, deterministic: bool = False) -> Any:
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(moments, deterministic=deterministic)


def _mean_and_std(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the posterior ``[B, 2 C, h, w]``; the bounds of logvar are those of all the implementations."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
