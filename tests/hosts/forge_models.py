"""The models of the stand-in for Forge: the object around the VAE with its wrappers and its own tiling, and the engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from tests.hosts.webui_standin import DiagonalGaussianDistribution, out_of_memory
from tests.layouts import IntegratedAutoencoderKL

# --- the VAE -----------------------------------------------------------------------------------------------------------


class FirstStage(nn.Module):
    """The face of Forge's VAE in front of another's modules. ``calls`` tells what was asked of it.

    ``vae`` is diffusers', whose weights a server can have too, or that of ``tests.layouts.forge_vae``, whose modules are
    Forge's own and become this one's.
    """

    def __init__(self, vae: Any, scaling_factor: float, shift_factor: float) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self.config = SimpleNamespace(latent_channels=vae.config.latent_channels, down_block_types=vae.config.down_block_types)
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

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent - self.shift_factor) * self.scaling_factor

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / self.scaling_factor + self.shift_factor


class ModelPatcher:
    """``model_options`` hold the wrappers; a clone has copies of them, and copies of copies of what they hold."""

    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.current_device = offload_device
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        twin = ModelPatcher(self.model, self.load_device, self.offload_device)
        twin.model_options = copy.deepcopy(self.model_options)
        return twin

    def is_clone(self, other: Any) -> bool:
        return getattr(other, "model", None) is self.model

    def set_model_vae_encode_wrapper(self, wrapper_function: Any) -> None:
        self.model_options["model_vae_encode_wrapper"] = wrapper_function

    def set_model_vae_decode_wrapper(self, wrapper_function: Any) -> None:
        self.model_options["model_vae_decode_wrapper"] = wrapper_function

    def set_model_vae_regulation(self, vae_regulation: Any) -> None:
        self.model_options["model_vae_regulation"] = vae_regulation


class VAE:
    """Decode: raw latents ``[B, C, h, w]`` to pixels ``[B, H, W, 3]`` in [0, 1]; encode the other way."""

    def __init__(self, model: Any = None, device: Any = None, dtype: Any = None, no_init: bool = False) -> None:
        if no_init:
            return
        from backend import memory_management

        self.downscale_ratio = int(2 ** (len(model.config.down_block_types) - 1))
        self.latent_channels = int(model.config.latent_channels)
        self.device = device or memory_management.vae_device()
        self.vae_dtype = dtype or memory_management.vae_dtype()
        self.output_device = memory_management.intermediate_device()
        self.first_stage_model = model.eval().to(self.vae_dtype)
        self.patcher = ModelPatcher(model, self.device, memory_management.vae_offload_device())

    def clone(self) -> VAE:
        twin = VAE(no_init=True)
        vars(twin).update(vars(self))
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
        from backend import memory_management

        if memory_management.VAE_ALWAYS_TILED:
            return self.decode_tiled(samples_in).to(self.output_device)
        try:
            batch = self._load(self.memory_used_decode(samples_in.shape, self.vae_dtype))
            height, width = (side * self.downscale_ratio for side in samples_in.shape[2:])
            pixels = torch.empty((samples_in.shape[0], 3, height, width), device=self.output_device)
            for start in range(0, samples_in.shape[0], batch):
                part = samples_in[start : start + batch].to(self.vae_dtype).to(self.device)
                decoded = self.first_stage_model.decode(part).to(self.output_device).float()
                pixels[start : start + batch] = ((decoded + 1.0) / 2.0).clamp(0.0, 1.0)
        except memory_management.OOM_EXCEPTION:
            pixels = self.decode_tiled_(samples_in)
        return pixels.to(self.output_device).movedim(1, -1)

    def encode_inner(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        from backend import memory_management

        if memory_management.VAE_ALWAYS_TILED:
            return self.encode_tiled(pixel_samples)
        regulation = self.patcher.model_options.get("model_vae_regulation")
        pixels = pixel_samples.movedim(-1, 1)
        try:
            batch = self._load(self.memory_used_encode(pixels.shape, self.vae_dtype))
            height, width = (side // self.downscale_ratio for side in pixels.shape[2:])
            samples = torch.empty((pixels.shape[0], self.latent_channels, height, width), device=self.output_device)
            for start in range(0, pixels.shape[0], batch):
                part = (2.0 * pixels[start : start + batch] - 1.0).to(self.vae_dtype).to(self.device)
                encoded = self.first_stage_model.encode(part, regulation)
                samples[start : start + batch] = encoded.to(self.output_device).float()
        except memory_management.OOM_EXCEPTION:
            samples = self.encode_tiled_(pixels)
        return samples

    def _load(self, memory_used: int) -> int:
        """Bring the VAE to its device; how many pictures it then does at a time."""
        from backend import memory_management

        memory_management.load_models_gpu([self.patcher], memory_required=memory_used)
        return max(1, int(memory_management.get_free_memory(self.device) / memory_used))

    def decode_tiled(self, samples: torch.Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> torch.Tensor:
        from backend import memory_management

        memory_management.load_model_gpu(self.patcher)
        return self.decode_tiled_(samples, tile_x, tile_y, overlap).movedim(1, -1)

    def encode_tiled(
        self, pixel_samples: torch.Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64
    ) -> torch.Tensor:
        from backend import memory_management

        memory_management.load_model_gpu(self.patcher)
        return self.encode_tiled_(pixel_samples.movedim(-1, 1), tile_x, tile_y, overlap)

    def decode_tiled_(self, samples: torch.Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> torch.Tensor:
        def decode(z: torch.Tensor) -> torch.Tensor:
            return (self.first_stage_model.decode(z.to(self.vae_dtype).to(self.device)) + 1.0).float()

        passes = _three_passes(samples, decode, (tile_y, tile_x), overlap, self.downscale_ratio, 3)
        return (passes / 2.0).clamp(0.0, 1.0).to(self.output_device)

    def encode_tiled_(self, pixels: torch.Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64) -> torch.Tensor:
        def encode(x: torch.Tensor) -> torch.Tensor:
            return self.first_stage_model.encode((2.0 * x - 1.0).to(self.vae_dtype).to(self.device)).float()

        scale = 1 / self.downscale_ratio
        return _three_passes(pixels, encode, (tile_y, tile_x), overlap, scale, self.latent_channels)


def _three_passes(
    samples: torch.Tensor, work: Any, tile: tuple[int, int], overlap: int, scale: float, channels: int
) -> torch.Tensor:
    """The mean of three pictures of blended tiles: of the asked shape, of tall tiles and of wide ones."""
    high, wide = tile
    shapes = ((high * 2, wide // 2), (high // 2, wide * 2), tile)
    return sum(_blended(samples, work, shape, overlap, scale, channels) for shape in shapes) / 3.0


def _blended(
    samples: torch.Tensor, work: Any, tile: tuple[int, int], overlap: int, scale: float, channels: int
) -> torch.Tensor:
    sides = [round(side * scale) for side in samples.shape[2:]]
    out = torch.zeros(samples.shape[0], channels, *sides)
    weights = torch.zeros_like(out)
    feather = max(1, round(overlap * scale))
    starts = (range(0, side, length - overlap) for side, length in zip(samples.shape[2:], tile, strict=True))
    places = list(product(*starts))
    for index, (top, left) in product(range(samples.shape[0]), places):
        top, left = (max(0, min(s - overlap, at)) for s, at in zip(samples.shape[2:], (top, left), strict=True))
        done = work(samples[index : index + 1, :, top : top + tile[0], left : left + tile[1]])
        rows, columns = (torch.arange(side) for side in done.shape[2:])
        mask = _ramp(rows, feather)[:, None] * _ramp(columns, feather)
        y, x = round(top * scale), round(left * scale)
        place = (slice(index, index + 1), slice(None), slice(y, y + len(rows)), slice(x, x + len(columns)))
        out[place] += done * mask
        weights[place] += mask
    return out / weights


def _ramp(positions: torch.Tensor, feather: int) -> torch.Tensor:
    rising = ((positions + 1) / feather).clamp(max=1.0)
    return rising * rising.flip(0)


# --- engines -----------------------------------------------------------------------------------------------------------


class ForgeObjects:
    def __init__(self, unet: Any, clip: Any, vae: VAE, clipvision: Any) -> None:
        self.unet, self.clip, self.vae, self.clipvision = unet, clip, vae, clipvision

    def shallow_copy(self) -> ForgeObjects:
        return ForgeObjects(self.unet, self.clip, self.vae, self.clipvision)


class Engine:
    """A model. Its three ForgeObjects share one VAE. Makers: ``Sd15(vae)``, ``Sdxl(vae)``, ``Flux(vae)``."""

    scaling_factor, shift_factor = 0.18215, 0.0
    # What A1111's hijackers look for, and fail to find.
    first_stage_model = None
    cond_stage_model = None
    is_sd1 = is_sd2 = is_sdxl = is_sd3 = False
    is_inpaint = False
    use_distilled_cfg_scale = False

    def __init__(self, vae: AutoencoderKL | IntegratedAutoencoderKL) -> None:
        self.made_of = vae
        self.extra_generation_params: dict[str, Any] = {}
        own = VAE(FirstStage(vae, self.scaling_factor, self.shift_factor))
        self.forge_objects = ForgeObjects(unet=object(), clip=object(), vae=own, clipvision=None)
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()

    @property
    def calls(self) -> list[str]:
        """What was asked of the modules of the VAE, tiles included."""
        return self.forge_objects.vae.first_stage_model.calls

    def get_first_stage_encoding(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.inference_mode()
    def encode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        sample = self.forge_objects.vae.encode(x.movedim(1, -1) * 0.5 + 0.5)
        return self.forge_objects.vae.first_stage_model.process_in(sample).to(x)

    @torch.inference_mode()
    def decode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        sample = self.forge_objects.vae.first_stage_model.process_out(x)
        return (self.forge_objects.vae.decode(sample).movedim(-1, 1) * 2.0 - 1.0).to(x)


class Sd15(Engine):
    is_sd1 = True


class Sdxl(Engine):
    scaling_factor, is_sdxl = 0.13025, True


class Flux(Engine):
    """16 channels, and the host has no ``is_…`` for it."""

    scaling_factor, shift_factor = 0.3611, 0.1159
    use_distilled_cfg_scale = True


@contextmanager
def no_memory(model: Engine, times: int = 1) -> Iterator[None]:
    """The next ``times`` calls of the VAE's modules run out of memory; those of its tiles, which follow, do not."""
    first_stage = model.forge_objects.vae.first_stage_model
    left = [times]

    def short_of(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                raise out_of_memory()
            return getattr(FirstStage, name)(first_stage, *arguments)

        return call

    names = ("decode", "encode")
    vars(first_stage).update({name: short_of(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            del vars(first_stage)[name]
