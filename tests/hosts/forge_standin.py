"""A stand-in for the modules of stable-diffusion-webui-forge f2.0.1, see ``standin``: the object around the VAE.

Its class, its conversions and the way to its own tiling are the host's. The tiles themselves are not: one is enough.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from remote_vae.hosts import forge_kin
from tests.hosts.standin import CPU, DiagonalGaussianDistribution, Host, make_module, to_levels
from tests.nearness import out_of_memory

# --- the VAE -----------------------------------------------------------------------------------------------------------


class FirstStage(nn.Module):
    """The face of Forge's VAE in front of diffusers' modules. ``calls`` tells what was asked of it."""

    def __init__(self, vae: AutoencoderKL, scaling_factor: float, shift_factor: float) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self.embed_dim = vae.config.latent_channels
        own = vae.requires_grad_(False)
        self.encoder, self.decoder = own.encoder, own.decoder
        self.quant_conv, self.post_quant_conv = own.quant_conv, own.post_quant_conv

    def encode(self, x: torch.Tensor, regulation: Any = None) -> torch.Tensor:
        self.calls.append("encode")
        z = self.encoder(x)
        posterior = DiagonalGaussianDistribution(z if self.quant_conv is None else self.quant_conv(z))
        return posterior.sample() if regulation is None else regulation(posterior)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        self.calls.append("decode")
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


class ModelPatcher:
    """``model_options`` hold the wrappers; a clone has copies of them, and copies of copies of what they hold."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {}

    def clone(self) -> ModelPatcher:
        twin = ModelPatcher(self.model)
        twin.model_options = copy.deepcopy(self.model_options)
        return twin

    def set_model_vae_encode_wrapper(self, wrapper_function: Any) -> None:
        self.model_options["model_vae_encode_wrapper"] = wrapper_function

    def set_model_vae_decode_wrapper(self, wrapper_function: Any) -> None:
        self.model_options["model_vae_decode_wrapper"] = wrapper_function


class VAE:
    """Decode: raw latents ``[B, C, h, w]`` to pixels ``[B, H, W, 3]`` in [0, 1]; encode the other way."""

    downscale_ratio = 8
    device = output_device = CPU
    vae_dtype = torch.float32

    def __init__(self, model: FirstStage, memory: Any) -> None:
        self.first_stage_model, self.latent_channels, self.memory = model.eval(), model.embed_dim, memory
        self.patcher = ModelPatcher(model)
        # Which of its own tilings were begun.
        self.tilings: list[str] = []

    def clone(self) -> VAE:
        twin = copy.copy(self)
        twin.patcher = self.patcher.clone()
        return twin

    def memory_used_decode(self, shape: Any, dtype: torch.dtype) -> int:
        return 2178 * shape[2] * shape[3] * 64 * dtype.itemsize

    def memory_used_encode(self, shape: Any, dtype: torch.dtype) -> int:
        return 1767 * shape[2] * shape[3] * dtype.itemsize

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        wrapper = self.patcher.model_options.get("model_vae_decode_wrapper")
        return self.decode_inner(samples_in) if wrapper is None else wrapper(self.decode_inner, samples_in)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        wrapper = self.patcher.model_options.get("model_vae_encode_wrapper")
        return self.encode_inner(pixel_samples) if wrapper is None else wrapper(self.encode_inner, pixel_samples)

    def decode_inner(self, samples_in: torch.Tensor) -> torch.Tensor:
        if self.memory.VAE_ALWAYS_TILED:
            return self.decode_tiled_(samples_in).movedim(1, -1)
        try:
            self.memory.load_models_gpu(
                [self.patcher], memory_required=self.memory_used_decode(samples_in.shape, self.vae_dtype)
            )
            pixels = self._pixels(samples_in)
        except torch.cuda.OutOfMemoryError:
            pixels = self.decode_tiled_(samples_in)
        return pixels.movedim(1, -1)

    def encode_inner(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        pixels = pixel_samples.movedim(-1, 1)
        if self.memory.VAE_ALWAYS_TILED:
            return self.encode_tiled_(pixels)
        try:
            self.memory.load_models_gpu([self.patcher], memory_required=self.memory_used_encode(pixels.shape, self.vae_dtype))
            return self._latents(pixels)
        except torch.cuda.OutOfMemoryError:
            return self.encode_tiled_(pixels)

    def decode_tiled_(self, samples: torch.Tensor) -> torch.Tensor:
        self.tilings.append("decode")
        return self._pixels(samples)

    def encode_tiled_(self, pixels: torch.Tensor) -> torch.Tensor:
        self.tilings.append("encode")
        return self._latents(pixels)

    def _pixels(self, samples: torch.Tensor) -> torch.Tensor:
        decoded = self.first_stage_model.decode(samples.to(self.vae_dtype)).float()
        return ((decoded + 1.0) / 2.0).clamp(0.0, 1.0)

    def _latents(self, pixels: torch.Tensor) -> torch.Tensor:
        regulation = self.patcher.model_options.get("model_vae_regulation")
        # What is more than a multiple of eight is cut off by the convolutions themselves.
        return self.first_stage_model.encode((2.0 * pixels - 1.0).to(self.vae_dtype), regulation).float()


# As it is before any test has hooked it.
OWN = {VAE: VAE.decode}


# --- engines -----------------------------------------------------------------------------------------------------------


class Engine:
    """A model. Its three sets of parts share one VAE."""

    scaling_factor, shift_factor = 0.18215, 0.0

    vae_class: ClassVar[type[VAE]] = VAE
    first_stage_class: ClassVar[type[FirstStage]] = FirstStage

    def __init__(self, vae: AutoencoderKL, memory: Any) -> None:
        own = self.vae_class(self.first_stage_class(vae, self.scaling_factor, self.shift_factor), memory)
        self.forge_objects = SimpleNamespace(vae=own)
        self.forge_objects_original = copy.copy(self.forge_objects)
        self.forge_objects_after_applying_lora = copy.copy(self.forge_objects)

    @torch.inference_mode()
    def encode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        sample = self.forge_objects.vae.encode(x.movedim(1, -1) * 0.5 + 0.5)
        return ((sample - self.shift_factor) * self.scaling_factor).to(x)

    @torch.inference_mode()
    def decode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        sample = x / self.scaling_factor + self.shift_factor
        return (self.forge_objects.vae.decode(sample).movedim(-1, 1) * 2.0 - 1.0).to(x)


class Sdxl(Engine):
    scaling_factor = 0.13025


class Flux(Engine):
    """16 channels and a shift."""

    scaling_factor, shift_factor = 0.3611, 0.1159


class ForgeHost(Host):
    """``brought`` lists the patchers that were brought to their device."""

    adapter = forge_kin.forge
    vae_class: ClassVar[type[VAE]] = VAE
    inference = torch.inference_mode

    def __init__(self, vae: AutoencoderKL, data_path: Path) -> None:
        super().__init__(vae, data_path)
        self.brought: list[ModelPatcher] = []
        self.memory_management = make_module(
            "backend.memory_management",
            VAE_ALWAYS_TILED=False,
            load_models_gpu=lambda models, memory_required: self.brought.extend(models),
        )
        # What stands where the model is until the first generation loads it.
        self.model_data = SimpleNamespace(sd_model=object(), forge_loading_parameters={})
        self.sd_models = make_module("modules.sd_models", model_data=self.model_data)
        self.nn_vae = make_module("backend.nn.vae", DiagonalGaussianDistribution=DiagonalGaussianDistribution)
        self.patcher_vae = make_module("backend.patcher.vae", VAE=self.vae_class)
        self.load(self.made("sd1"))

    def modules(self) -> Iterator[Any]:
        yield from super().modules()
        yield make_module("backend", __path__=[], memory_management=self.memory_management)
        for name in ("modules_forge", "backend.nn", "backend.patcher"):
            yield make_module(name, __path__=[])

    @property
    def engines(self) -> dict[str, type[Engine]]:
        return {"sd1": Engine, "sdxl": Sdxl, "flux": Flux}

    def made(self, family: str, vae: AutoencoderKL | None = None) -> Engine:
        return self.engines[family](copy.deepcopy(vae or self.vae), self.memory_management)

    def load(self, model: Engine) -> Engine:
        """Nothing of another one stays in memory."""
        self.model_data.sd_model = model
        self.script_callbacks.fire("model_loaded", model)
        return model

    swap_to = load

    @property
    def model(self) -> Any:
        return self.model_data.sd_model

    @property
    def forge_vae(self) -> VAE:
        vae: VAE = self.model.forge_objects.vae
        return vae

    @property
    def module(self) -> torch.nn.Module:
        return self.forge_vae.first_stage_model

    @property
    def calls(self) -> list[str]:
        return self.module.calls

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model.decode_first_stage(latents)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_first_stage(pixels)

    def change_vae(self, weights: Mapping[str, torch.Tensor]) -> None:
        """A new engine."""
        other = copy.deepcopy(self.vae)
        other.load_state_dict(dict(weights))
        self.load(self.made("sd1", other))

    def seam(self) -> Any:
        return self.vae_class.decode

    def put_over(self, notes: list[str], *, chaining: bool = True) -> Any:
        covered = self.seam()

        def theirs(vae: Any, *args: Any, **kwargs: Any) -> Any:
            notes.append("theirs")
            return (covered if chaining else OWN[self.vae_class])(vae, *args, **kwargs)

        self.vae_class.decode = theirs
        return theirs

    def clear_seam(self) -> None:
        self.vae_class.decode = OWN[self.vae_class]

    def places_in_the_model(self) -> list[Any]:
        vae = self.forge_vae
        held = [self.model, vae, vae.patcher, vae.first_stage_model]
        return [*held, *map(type, held), self.vae_class, vae.patcher.model_options]

    # --- what calls the VAE ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _single_sample_to_image(self, sample: torch.Tensor, approximation: Any = None) -> np.ndarray:
        # "Full" is not taken at its word where it is not named.
        pixels = sample.unsqueeze(0)[:, :3] if approximation is None else self.model.decode_first_stage(sample.unsqueeze(0))
        return to_levels(pixels[0])

    def _encoded(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.encode(one.unsqueeze(0) * 2 - 1) for one in image])

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        self.model.forge_objects = copy.copy(self.model.forge_objects_after_applying_lora)
        return self.decode(latents)

    @property
    def _channels(self) -> int:
        return self.forge_vae.latent_channels


@contextmanager
def no_memory(first_stage: FirstStage, times: int = 1) -> Iterator[None]:
    """The next ``times`` calls of the VAE's modules run out of memory; those of its tiles, which follow, do not."""
    left = [times]

    def short_of(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                out_of_memory()
            return getattr(type(first_stage), name)(first_stage, *arguments)

        return call

    names = ("decode", "encode")
    vars(first_stage).update({name: short_of(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            del vars(first_stage)[name]
