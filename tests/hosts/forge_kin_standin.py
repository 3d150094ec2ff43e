"""Stand-ins for those that came of Forge, see ``standin``: what each has of its own around the VAE.

Forge Neo: Haoming02/sd-webui-forge-classic, branch neo, 2.26. ersatzForge: DenOfEquity/ersatzForge, fca12a2. reForge:
Panchovix/stable-diffusion-webui-reForge, 3b56b268. Their conversions, and the way to their own tiling, are the hosts'.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL

from remote_vae.hosts import forge_kin
from tests.hosts.forge_standin import OWN, VAE, Engine, FirstStage, Flux, ForgeHost, Sdxl
from tests.hosts.standin import DiagonalGaussianDistribution, make_module

# --- Forge Neo and ersatzForge -------------------------------------------------------------------------------------------


class NeoFirstStage(FirstStage):
    """Its factors are in the format of the latents; its encode knows no regulation."""

    def __init__(self, vae: AutoencoderKL, scaling_factor: float, shift_factor: float) -> None:
        super().__init__(vae, scaling_factor, shift_factor)
        del self.scaling_factor, self.shift_factor
        self.latent_format = SimpleNamespace(scale_factor=scaling_factor)
        if shift_factor:
            self.latent_format.shift_factor = shift_factor

    def encode(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.calls.append("encode")
        z = self.encoder(x)
        return DiagonalGaussianDistribution(z if self.quant_conv is None else self.quant_conv(z)).sample()


class NeoVAE(VAE):
    """Its methods have no wrappers around them."""

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        if self.memory.VAE_ALWAYS_TILED:
            return self.decode_tiled(samples_in)
        try:
            self._load(self.memory_used_decode(samples_in.shape, self.vae_dtype))
            return self._pixels(samples_in).movedim(1, -1)
        except torch.cuda.OutOfMemoryError:
            tile = True
        assert tile
        return self.decode_tiled(samples_in)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        if self.memory.VAE_ALWAYS_TILED:
            return self.encode_tiled(pixel_samples)
        pixels = pixel_samples.movedim(-1, 1)
        try:
            self._load(self.memory_used_encode(pixels.shape, self.vae_dtype))
            return self._latents(pixels)
        except torch.cuda.OutOfMemoryError:
            tile = True
        assert tile
        return self.encode_tiled(pixel_samples)

    def decode_tiled(self, samples: torch.Tensor, tile_x: int = 64, tile_y: int = 64) -> torch.Tensor:
        return self.decode_tiled_(samples).movedim(1, -1)

    def encode_tiled(
        self, pixel_samples: torch.Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64
    ) -> torch.Tensor:
        return self.encode_tiled_(pixel_samples.movedim(-1, 1))

    def _load(self, bytes_needed: int) -> None:
        self.memory.load_models_gpu([self.patcher], memory_required=bytes_needed)

    def _latents(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.encode((pixels * 2.0 - 1.0).to(self.vae_dtype)).float()


class NeoEngine(Engine):
    vae_class, first_stage_class = NeoVAE, NeoFirstStage


class NeoSdxl(Sdxl):
    vae_class, first_stage_class = NeoVAE, NeoFirstStage


class NeoFlux(Flux):
    vae_class, first_stage_class = NeoVAE, NeoFirstStage


class NeoHost(ForgeHost):
    adapter = forge_kin.neo
    vae_class = NeoVAE
    engines: ClassVar[Any] = {"sd1": NeoEngine, "sdxl": NeoSdxl, "flux": NeoFlux}

    def modules(self) -> Iterator[Any]:
        yield from super().modules()
        yield make_module("backend.nn._vae", ProcessLatent=object())


class ErsatzFirstStage(NeoFirstStage):
    """Its factors are its own."""

    def __init__(self, vae: AutoencoderKL, scaling_factor: float, shift_factor: float) -> None:
        super().__init__(vae, scaling_factor, shift_factor)
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        del self.latent_format


class ErsatzVAE(NeoVAE):
    """Its tiled methods are parts of the others: the colours come first in them."""

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        if not self.memory.VAE_ALWAYS_TILED:
            try:
                self._load(self.memory_used_decode(samples_in.shape, self.vae_dtype))
                return self._pixels(samples_in).movedim(1, -1)
            except torch.cuda.OutOfMemoryError:
                pass
        return self.decode_tiled(samples_in).movedim(1, -1)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        pixels = pixel_samples.movedim(-1, 1)
        if not self.memory.VAE_ALWAYS_TILED:
            try:
                self._load(self.memory_used_encode(pixels.shape, self.vae_dtype))
                return self._latents(pixels)
            except torch.cuda.OutOfMemoryError:
                pass
        return self.encode_tiled(pixels)

    def decode_tiled(self, samples: torch.Tensor, tile_x: int = 64, tile_y: int = 64) -> torch.Tensor:
        return self.decode_tiled_(samples)

    def encode_tiled(
        self, pixel_samples: torch.Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64
    ) -> torch.Tensor:
        return self.encode_tiled_(pixel_samples)


class ErsatzEngine(Engine):
    vae_class, first_stage_class = ErsatzVAE, ErsatzFirstStage


class ErsatzSdxl(Sdxl):
    vae_class, first_stage_class = ErsatzVAE, ErsatzFirstStage


class ErsatzFlux(Flux):
    vae_class, first_stage_class = ErsatzVAE, ErsatzFirstStage


class ErsatzHost(ForgeHost):
    adapter = forge_kin.ersatz
    vae_class = ErsatzVAE
    engines: ClassVar[Any] = {"sd1": ErsatzEngine, "sdxl": ErsatzSdxl, "flux": ErsatzFlux}

    def modules(self) -> Iterator[Any]:
        yield from super().modules()
        yield make_module("backend.nn.vae_wan")


# --- reForge ---------------------------------------------------------------------------------------------------------------


class ReforgeFirstStage(NeoFirstStage):
    """Knows no factors; its encode gives the mean."""

    def __init__(self, vae: AutoencoderKL, scaling_factor: float, shift_factor: float) -> None:
        super().__init__(vae, scaling_factor, shift_factor)
        del self.latent_format

    def encode(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.calls.append("encode")
        z = self.encoder(x)
        return DiagonalGaussianDistribution(z if self.quant_conv is None else self.quant_conv(z)).mode()


class ReforgeVAE(NeoVAE):
    """Cuts pictures to multiples of eight, in the middle."""

    def decode(self, samples_in: torch.Tensor, vae_options: Any = {}) -> torch.Tensor:  # noqa: B006
        try:
            self._load(self.memory_used_decode(samples_in.shape, self.vae_dtype))
            pixels = self._pixels(samples_in, **vae_options)
        except torch.cuda.OutOfMemoryError:
            pixels = self.decode_tiled_(samples_in)
        return pixels.movedim(1, -1)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        pixels = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)
        try:
            self._load(self.memory_used_encode(pixels.shape, self.vae_dtype))
            return self._latents(pixels)
        except torch.cuda.OutOfMemoryError:
            return self.encode_tiled_(pixels)

    def vae_encode_crop_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        for axis in (1, 2):
            size = pixels.shape[axis]
            pixels = pixels.narrow(axis, size % 8 // 2, size // 8 * 8)
        return pixels

    def decode_tiled(self, samples: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.decode_tiled_(samples).movedim(1, -1)

    def encode_tiled(self, pixel_samples: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.encode_tiled_(self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1))


class ReforgeEngine(Engine):
    """The factors are those of the UNet's config."""

    vae_class, first_stage_class = ReforgeVAE, ReforgeFirstStage

    def __init__(self, vae: AutoencoderKL, memory: Any) -> None:
        super().__init__(vae, memory)
        latent_format = SimpleNamespace(scale_factor=self.scaling_factor, shift_factor=self.shift_factor)
        unet = SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(latent_format=latent_format)))
        for parts in (self.forge_objects, self.forge_objects_original, self.forge_objects_after_applying_lora):
            parts.unet = unet


class ReforgeSdxl(ReforgeEngine):
    scaling_factor = Sdxl.scaling_factor


class ReforgeFlux(ReforgeEngine):
    scaling_factor, shift_factor = Flux.scaling_factor, Flux.shift_factor


class ReforgeHost(ForgeHost):
    adapter = forge_kin.reforge
    vae_class = ReforgeVAE
    engines: ClassVar[Any] = {"sd1": ReforgeEngine, "sdxl": ReforgeSdxl, "flux": ReforgeFlux}

    def modules(self) -> Iterator[Any]:
        yield from (module for module in super().modules() if not module.__name__.startswith("backend"))
        yield make_module("ldm_patched", __path__=[])
        yield make_module("ldm_patched.modules", __path__=[])
        yield make_module("ldm_patched.modules.sd", VAE=self.vae_class)
        yield make_module("ldm_patched.modules.model_management", load_models_gpu=self.memory_management.load_models_gpu)
        yield make_module("modules.sd_vae", loaded_vae_file=None)


OWN.update({kind: kind.decode for kind in (NeoVAE, ErsatzVAE, ReforgeVAE)})
