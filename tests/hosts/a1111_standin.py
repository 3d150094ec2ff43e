"""A stand-in for the modules of AUTOMATIC1111 1.10.1, see ``standin``: its kinds of model, and who calls their VAE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from remote_vae.hosts import a1111
from tests.hosts.standin import DiagonalGaussianDistribution, Host, make_module, to_levels
from tests.nearness import out_of_memory

# --- models ------------------------------------------------------------------------------------------------------------


class FirstStage(nn.Module):
    """A diffusers VAE with ldm's interface. ``calls`` tells what was asked of it, previews included."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.inner = vae.requires_grad_(False)
        self.calls: list[str] = []

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        self.calls.append("decode")
        return self.inner.decode(z, return_dict=False)[0]

    def encode(self, x: torch.Tensor) -> Any:
        self.calls.append("encode")
        return self.drawn(self.inner.encode(x, return_dict=False)[0].parameters)

    def __getattr__(self, name: str) -> Any:
        # Some are laid out as ldm's, and have one of their own.
        if name == "encoder" and name not in self._modules:
            return lambda x: self.inner.encode(x, return_dict=False)[0].parameters
        return super().__getattr__(name)

    def drawn(self, moments: torch.Tensor) -> Any:
        raise NotImplementedError


class LdmVae(FirstStage):
    def drawn(self, moments: torch.Tensor) -> Any:
        return DiagonalGaussianDistribution(moments)


class SgmVae(FirstStage):
    def drawn(self, moments: torch.Tensor) -> Any:
        return DiagonalGaussianDistribution(moments).sample()


class Sd3Vae(FirstStage):
    def drawn(self, moments: torch.Tensor) -> Any:
        mean, logvar = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * torch.randn_like(mean)


class LdmModel(nn.Module):
    """SD 1: ``encode_first_stage`` gives an unscaled distribution."""

    is_sd1 = True
    scale_factor = 0.18215

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.first_stage_model = LdmVae(vae)

    @torch.no_grad()
    def decode_first_stage(self, z: torch.Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> torch.Tensor:
        if predict_cids:
            return torch.full_like(z, 7.0)  # a codebook, which no VAE here has
        return self.first_stage_model.decode(1.0 / self.scale_factor * z)

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor) -> Any:
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoded: Any) -> torch.Tensor:
        return self.scale_factor * encoded.sample()


class SgmModel(nn.Module):
    """SDXL: ``encode_first_stage`` gives the scaled sample."""

    is_sdxl = True
    scale_factor = 0.13025

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.first_stage_model = SgmVae(vae)
        self.conditioner = nn.Module()

    @torch.no_grad()
    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.decode(1.0 / self.scale_factor * z)

    @torch.no_grad()
    def encode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale_factor * self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoded: torch.Tensor) -> torch.Tensor:
        return encoded


class Sd3Model(nn.Module):
    """SD 3: latents are shifted as well, and ``encode_first_stage`` gives the scaled sample."""

    # Without is_sd3: that is a VAE of 16 channels, and the one within has 4.

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.first_stage_model = Sd3Vae(vae)
        scale, shift = 1.5305, 0.0609
        self.latent_format = SimpleNamespace(
            scale_factor=scale,
            shift_factor=shift,
            process_in=lambda latents: (latents - shift) * scale,
            process_out=lambda latents: latents / scale + shift,
        )

    def decode_first_stage(self, latent: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.decode(self.latent_format.process_out(latent))

    def encode_first_stage(self, image: torch.Tensor) -> torch.Tensor:
        return self.latent_format.process_in(self.first_stage_model.encode(image))

    def get_first_stage_encoding(self, encoded: torch.Tensor) -> torch.Tensor:
        return encoded


class UnknownModel(nn.Module):
    """Has the two methods, and says nothing of how it scales."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.first_stage_model = LdmVae(vae)

    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.decode(z)

    def encode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.encode(x).mode()


# --- the host ----------------------------------------------------------------------------------------------------------


class NansException(Exception):
    pass


class A1111Host(Host):
    """``loaded_sd_models`` are those in memory, of which one is in use."""

    adapter = a1111.adapter

    def __init__(self, vae: AutoencoderKL, data_path: Path) -> None:
        super().__init__(vae, data_path)
        self.opts.data.update(live_preview_fast_interrupt=False, sd_vae_decode_method="Full")
        self.model_data = SimpleNamespace(sd_model=None, loaded_sd_models=[])
        self.sd_models = make_module("modules.sd_models", model_data=self.model_data)
        self.sd_vae = make_module("modules.sd_vae", loaded_vae_file=None)
        self.processing.decode_latent_batch = self._decode_latent_batch
        distributions = "ldm.modules.distributions.distributions"
        self.ldm = make_module(distributions, DiagonalGaussianDistribution=DiagonalGaussianDistribution)
        self.load(self.made("sd1"))

    def modules(self) -> Iterator[Any]:
        yield from super().modules()
        for name in ("ldm", "ldm.modules", "ldm.modules.distributions"):
            yield make_module(name, __path__=[])

    def made(self, family: str) -> Any:
        return {"sd1": LdmModel, "sdxl": SgmModel}[family](copy.deepcopy(self.vae))

    def load(self, model: Any) -> Any:
        """One that was loaded before stays in memory beside it."""
        self.swap_to(model)
        self.script_callbacks.fire("model_loaded", model)
        return model

    def swap_to(self, model: Any) -> None:
        """Go back to a model that is still in memory: nobody is told."""
        data = self.model_data
        data.sd_model = model
        data.loaded_sd_models = [model, *(other for other in data.loaded_sd_models if other is not model)]

    @property
    def model(self) -> Any:
        return self.model_data.sd_model

    @property
    def module(self) -> torch.nn.Module:
        return self.model.first_stage_model

    @property
    def calls(self) -> list[str]:
        return self.module.calls

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model.decode_first_stage(latents)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_first_stage_encoding(self.model.encode_first_stage(pixels))

    def change_vae(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Other weights in the same model, which is announced again."""
        self.module.inner.load_state_dict(dict(weights))
        self.script_callbacks.fire("model_loaded", self.model)

    def seam(self) -> Any:
        return self.model.decode_first_stage

    def put_over(self, notes: list[str], *, chaining: bool = True) -> Any:
        model, covered = self.model, self.model.decode_first_stage

        def theirs(z: torch.Tensor) -> torch.Tensor:
            notes.append("theirs")
            return covered(z) if chaining else type(model).decode_first_stage(model, z)

        model.decode_first_stage = theirs
        return theirs

    def clear_seam(self) -> None:
        vars(self.model).pop("decode_first_stage", None)

    def places_in_the_model(self) -> list[Any]:
        return [self.model, type(self.model), self.module, type(self.module)]

    # --- what calls the VAE ---------------------------------------------------------------------------------------------

    def _single_sample_to_image(self, sample: torch.Tensor, approximation: Any = None) -> np.ndarray:
        return to_levels(self.model.decode_first_stage(sample.unsqueeze(0).to(self.module.dtype))[0])

    def _encoded(self, image: torch.Tensor) -> torch.Tensor:
        pixels = image.to(self.devices.dtype_vae) * 2 - 1
        return torch.cat([self.encode(one.unsqueeze(0)) for one in pixels])

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.processing.decode_latent_batch(self.model, latents, check_for_nans=True))

    def _decode_latent_batch(self, model: Any, batch: torch.Tensor, check_for_nans: bool = False) -> list[torch.Tensor]:
        if check_for_nans and batch.isnan().any():
            raise NansException("unet")
        return [self._decoded_one(model, one.unsqueeze(0))[0] for one in batch]

    def _decoded_one(self, model: Any, latents: torch.Tensor) -> torch.Tensor:
        opts, devices, vae = self.opts, self.devices, model.first_stage_model
        hurries = self.state.interrupted and opts.live_preview_fast_interrupt
        if (opts.show_progress_type if hurries else opts.sd_vae_decode_method) != "Full":
            return latents[:, :3]
        latents = latents.to(devices.dtype_vae).to(vae.dtype)
        pixels = model.decode_first_stage(latents)
        if pixels.isnan().any() and devices.dtype_vae != torch.float32:
            # For the rest of the process.
            devices.dtype_vae = torch.float32
            vae.to(torch.float32)
            pixels = model.decode_first_stage(latents.float())
        return pixels


@contextmanager
def no_memory(first_stage: FirstStage) -> Iterator[None]:
    """The VAE runs out of memory, a copy of it elsewhere does not. In --medvram's place: on the instance."""
    vars(first_stage).update(decode=out_of_memory, encode=out_of_memory)
    try:
        yield
    finally:
        for name in ("decode", "encode"):
            del vars(first_stage)[name]


def nan_in_half(first_stage: FirstStage) -> Callable[[torch.Tensor], torch.Tensor]:
    """A ``decode`` that gives NaN in half precision, as SDXL's first VAE does."""
    decode = type(first_stage).decode

    def broken_in_half(z: torch.Tensor) -> torch.Tensor:
        return decode(first_stage, z) * (1.0 if first_stage.dtype == torch.float32 else torch.nan)

    return broken_in_half
