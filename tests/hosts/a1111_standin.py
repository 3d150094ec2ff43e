"""A stand-in for the modules of AUTOMATIC1111 1.10.1: who calls whom with which tensor, and nothing else.

There is no UNet: what it would make is drawn from a seed. Everything from there to the 8-bit picture is the host's path. What
the host catches and prints (errors in callbacks) is let through here, so that a test sees it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from tests.hosts.script_standin import Checkbox as Checkbox
from tests.hosts.script_standin import HostModule, Scripts, make_module
from tests.hosts.script_standin import Number as Number
from tests.hosts.script_standin import Radio as Radio
from tests.hosts.script_standin import Textbox as Textbox
from tests.hosts.webui_standin import (
    DiagonalGaussianDistribution,
    OptionInfo,
    Options,
    Pictures,
    Processed,
    Request,
    WebuiHost,
    WebuiState,
    enlarged,
    infotext_of,
    out_of_memory,
    put_in_place,
    sampled,
    script_callbacks,
    to_images,
    to_levels,
    to_unit,
)

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
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.sample()
        elif not isinstance(encoded, torch.Tensor):
            raise NotImplementedError(type(encoded).__name__)
        return self.scale_factor * encoded


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


class LatentFormat:
    scale_factor = 1.5305
    shift_factor = 0.0609

    def process_in(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - self.shift_factor) * self.scale_factor

    def process_out(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.scale_factor + self.shift_factor


class Sd3Model(nn.Module):
    """SD 3: latents are shifted as well, and ``encode_first_stage`` gives the scaled sample."""

    # Without is_sd3: that is a VAE of 16 channels, and the one within has 4.

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.first_stage_model = Sd3Vae(vae)
        self.latent_format = LatentFormat()

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

    def get_first_stage_encoding(self, encoded: torch.Tensor) -> torch.Tensor:
        return encoded


# --- modules -----------------------------------------------------------------------------------------------------------


class NansException(Exception):
    pass


class Shared(ModuleType):
    """``sd_model`` loads the model on reading: the host's own business, which an extension must not set off."""

    host: Host

    @property
    def sd_model(self) -> Any:
        reader = sys._getframe(1).f_globals.get("__name__", "")
        if reader.startswith("remote_vae"):
            self.host.offences.append(f"{reader} reads shared.sd_model")
        return self.host.sd_models.model_data.get_sd_model()


class ModelData:
    def __init__(self, load: Callable[[], Any]) -> None:
        self.sd_model: Any = None
        self.loaded_sd_models: list[Any] = []
        self._load = load

    def get_sd_model(self) -> Any:
        if self.sd_model is None:
            self._load()
        return self.sd_model

    def set_sd_model(self, model: Any) -> None:
        self.sd_model = model
        self.loaded_sd_models = [model, *(other for other in self.loaded_sd_models if other is not model)]


class Host(WebuiHost):
    """A1111 in use."""

    def __init__(self, data_path: Path) -> None:
        super().__init__()
        self.opts, self.state = Options(), WebuiState()
        self.opts.data.update(
            show_progress_type="Full",
            live_preview_fast_interrupt=False,
            sd_vae_decode_method="Full",
            auto_vae_precision=True,
            save_images_before_highres_fix=False,
        )
        self.devices = make_module("modules.devices", **_devices())
        self.paths = make_module("modules.paths", data_path=str(data_path))
        self.shared = Shared("modules.shared")
        self.shared.host = self
        vars(self.shared).update(opts=self.opts, state=self.state, OptionInfo=OptionInfo, device=torch.device("cpu"))
        self.sd_models = make_module("modules.sd_models", model_data=ModelData(self._load_lazily))
        self.script_callbacks = script_callbacks()
        self.sd_vae = SdVae("modules.sd_vae", self)
        self.sd_samplers_common = SdSamplersCommon("modules.sd_samplers_common", self)
        self.processing = Processing("modules.processing", self)
        self.scripts = Scripts("modules.scripts", self)

    def modules(self) -> Iterator[Any]:
        yield from super().modules()
        for name in ("ldm", "ldm.modules", "ldm.modules.distributions"):
            yield make_module(name, __path__=[])
        yield make_module("ldm.modules.distributions.distributions", DiagonalGaussianDistribution=DiagonalGaussianDistribution)

    def _load_lazily(self) -> None:
        self.loads += 1
        raise RuntimeError("no checkpoint found")

    def load(self, model: Any) -> Any:
        """Load ``model``; one that was loaded before stays in memory beside it."""
        self.sd_models.model_data.set_sd_model(model)
        self.script_callbacks.model_loaded_callback(model)
        return model

    def swap_to(self, model: Any) -> None:
        """Go back to a model that is still in memory: nobody is told."""
        self.sd_models.model_data.set_sd_model(model)

    # --- generations: uint8 pictures [H, W, 3] -------------------------------------------------------------------------

    def txt2img_request(self, batch: int, seed: int) -> Request:
        return Request(sample=lambda p: sampled(p.batch_size, p.seed_now), seed=seed, batch_size=batch)

    def img2img(self, image: torch.Tensor, seed: int = 1) -> Pictures:
        """``image``: ``[N, 3, H, W]`` in [0, 1]."""
        return self._from_image(image, seed, lambda p: self.processing.init_latent(p.sd_model, image))

    def inpaint(self, image: torch.Tensor, seed: int = 1) -> Pictures:
        """The middle of ``image`` is repainted; an inpainting model sees the masked picture too."""

        def begin(p: Any) -> torch.Tensor:
            latents = self.processing.init_latent(p.sd_model, image)
            masked = self.processing.inpainting_image_conditioning(p.sd_model, image * 2 - 1)
            return latents * 0.5 + masked * 0.5

        return self._from_image(image, seed, begin)

    def instruct_pix2pix(self, image: torch.Tensor, seed: int = 1) -> Pictures:
        def begin(p: Any) -> torch.Tensor:
            condition = self.processing.edit_image_conditioning(image * 2 - 1) * getattr(p.sd_model, "scale_factor", 1.0)
            return self.processing.init_latent(p.sd_model, image) * 0.5 + condition * 0.5

        return self._from_image(image, seed, begin)

    def hires_latent(
        self, batch: int = 1, *, save_before: bool = False, mask_weight: float = 1.0
    ) -> tuple[Pictures, list[Image.Image]]:
        """The pictures, and those saved before the second pass."""
        self.opts.data["save_images_before_highres_fix"] = save_before
        saved: list[Image.Image] = []

        def sample(p: Any) -> list[torch.Tensor]:
            first = sampled(p.batch_size, p.seed_now)
            return self.processing.sample_hires_latent(p.sd_model, first, saved, mask_weight)

        return self.generate(Request(sample=sample, batch_size=batch)), saved

    def hires_pixel(self, batch: int = 1) -> Pictures:
        def sample(p: Any) -> list[torch.Tensor]:
            return self.processing.sample_hires_pixel(p.sd_model, sampled(p.batch_size, p.seed_now))

        return self.generate(Request(sample=sample, batch_size=batch))

    def preview(self, latents: torch.Tensor) -> Image.Image:
        """What a progress request shows while ``latents`` are being sampled."""
        self.state.current_latent = latents
        self.state.assign_current_image(self.sd_samplers_common.sample_to_image(latents))
        assert self.state.current_image is not None
        return self.state.current_image

    def _from_image(self, image: torch.Tensor, seed: int, begin: Callable[[Any], torch.Tensor]) -> Pictures:
        def sample(p: Any) -> torch.Tensor:
            latents = p.init_latent
            return latents + sampled(latents.shape[0], p.seed_now, tuple(latents.shape[-2:])) * 0.1

        request = Request(sample, begin, seed=seed, batch_size=len(image), init_images=to_images(image))
        return self.generate(request, is_img2img=True)


def install(monkeypatch: pytest.MonkeyPatch, data_path: Path) -> Host:
    """Put the host's modules where ``import`` finds them, for the time of a test."""
    host: Host = put_in_place(monkeypatch, Host(data_path))
    return host


@contextmanager
def no_memory(first_stage: FirstStage) -> Iterator[None]:
    """The VAE runs out of memory, a copy of it elsewhere does not. In --medvram's place: on the instance."""

    def run_out(_: torch.Tensor) -> Any:
        raise out_of_memory()

    vars(first_stage).update(decode=run_out, encode=run_out)
    try:
        yield
    finally:
        for name in ("decode", "encode"):
            del vars(first_stage)[name]


def _devices() -> dict[str, Any]:
    def test_for_nans(x: torch.Tensor, where: str) -> None:
        # One element is all that is looked at.
        if torch.isnan(x[(0,) * x.ndim]):
            raise NansException(f"A tensor with NaNs was produced in {where}.")

    cpu = torch.device("cpu")
    return {
        "dtype_vae": torch.float32,
        "dtype": torch.float32,
        "cpu": cpu,
        "device": cpu,
        "NansException": NansException,
        "test_for_nans": test_for_nans,
    }


class SdVae(HostModule):
    loaded_vae_file: str | None = None

    def reload_vae_weights(self, model: Any, weights: dict[str, torch.Tensor]) -> None:
        """Other weights in the same model, which is announced again."""
        model.first_stage_model.load_state_dict(weights)
        model.first_stage_model.to(self.host.devices.dtype_vae)
        self.host.script_callbacks.model_loaded_callback(model)


class SdSamplersCommon(HostModule):
    approximation_indexes = MappingProxyType({"Full": 0, "Approx NN": 1, "Approx cheap": 2, "TAESD": 3})

    def samples_to_images_tensor(
        self, sample: torch.Tensor, approximation: int | None = None, model: Any = None
    ) -> torch.Tensor:
        opts = self.host.opts
        if approximation is None or (self.host.state.interrupted and opts.live_preview_fast_interrupt):
            approximation = self.approximation_indexes.get(opts.show_progress_type, 0)
        if approximation != 0:
            return functional.interpolate(sample[:, :3], scale_factor=8)
        model = model or self.host.shared.sd_model
        with torch.no_grad():
            return model.decode_first_stage(sample.to(model.first_stage_model.dtype))

    def single_sample_to_image(self, sample: torch.Tensor, approximation: int | None = None) -> Image.Image:
        unit = self.samples_to_images_tensor(sample.unsqueeze(0), approximation)[0] * 0.5 + 0.5
        return Image.fromarray(to_levels(unit.clamp(0.0, 1.0)))

    def sample_to_image(self, samples: torch.Tensor, index: int = 0, approximation: int | None = None) -> Image.Image:
        return self.single_sample_to_image(samples[index], approximation)

    def samples_to_image_grid(self, samples: torch.Tensor, approximation: int | None = None) -> list[Image.Image]:
        return [self.single_sample_to_image(sample, approximation) for sample in samples]

    def decode_first_stage(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        approximation = self.approximation_indexes.get(self.host.opts.sd_vae_decode_method, 0)
        return self.samples_to_images_tensor(x.to(self.host.devices.dtype_vae), approximation, model)

    def images_tensor_to_samples(
        self, image: torch.Tensor, approximation: int | None = None, model: Any = None
    ) -> torch.Tensor:
        model = model or self.host.shared.sd_model
        model.first_stage_model.to(self.host.devices.dtype_vae)
        image = image.to(self.host.devices.device, self.host.devices.dtype_vae) * 2 - 1
        encoded = [model.get_first_stage_encoding(model.encode_first_stage(one.unsqueeze(0))) for one in image]
        return torch.cat(encoded)

    def store_latent(self, decoded: torch.Tensor) -> None:
        self.host.state.current_latent = decoded
        self.host.state.assign_current_image(self.sample_to_image(decoded))


class DecodedSamples(list[torch.Tensor]):
    pass


class Processing(HostModule):
    def __init__(self, name: str, host: Host) -> None:
        super().__init__(name, host)
        # Imported by name: what is later put into sd_samplers_common does not reach these.
        self.decode_first_stage = host.sd_samplers_common.decode_first_stage
        self.images_tensor_to_samples = host.sd_samplers_common.images_tensor_to_samples

    def process_images(self, p: Any) -> Processed:
        p.scripts.before_process(p)
        opts = self.host.opts
        stored = {key: opts.data[key] for key in p.override_settings if key in opts.data}
        try:
            for key, value in p.override_settings.items():
                opts.set(key, value, is_api=True, run_callbacks=False)
            return self.process_images_inner(p)
        finally:
            if p.override_settings_restore_afterwards:
                opts.data.update(stored)

    def process_images_inner(self, p: Any) -> Processed:
        state = self.host.state
        p.sd_model = self.host.shared.sd_model
        p.scripts.process(p)
        infotexts: list[str] = []
        images: list[Image.Image] = []
        with torch.no_grad():
            p.init_latent = p.begin(p)
            for number in range(p.n_iter):
                p.iteration = number
                state.skipped = False
                if state.interrupted or state.stopping_generation:
                    break
                self.host.sampling()
                samples = p.sample(p)
                if not isinstance(samples, DecodedSamples):
                    samples = self.decode_final(p.sd_model, samples)
                for index, unit in enumerate(((torch.stack(samples).float() + 1.0) / 2.0).clamp(0.0, 1.0)):
                    images.append(Image.fromarray(to_levels(unit)))
                    infotexts.append(infotext_of(p, index))
        processed = Processed(images, infotexts)
        p.scripts.postprocess(p, processed)
        return processed

    def decode_latent_batch(
        self, model: Any, batch: torch.Tensor, target_device: Any = None, check_for_nans: bool = False
    ) -> list[torch.Tensor]:
        devices = self.host.devices
        samples = DecodedSamples()
        if check_for_nans:
            devices.test_for_nans(batch, "unet")
        for index in range(batch.shape[0]):
            sample = self.decode_first_stage(model, batch[index : index + 1])[0]
            try:
                if check_for_nans:
                    devices.test_for_nans(sample, "vae")
            except NansException:
                if not self.host.opts.auto_vae_precision or devices.dtype_vae == torch.float32:
                    raise
                # For the rest of the process.
                devices.dtype_vae = torch.float32
                model.first_stage_model.to(devices.dtype_vae)
                batch = batch.to(devices.dtype_vae)
                sample = self.decode_first_stage(model, batch[index : index + 1])[0]
            samples.append(sample if target_device is None else sample.to(target_device))
        return samples

    def decode_final(self, model: Any, batch: torch.Tensor) -> list[torch.Tensor]:
        return self.decode_latent_batch(model, batch, target_device=self.host.devices.cpu, check_for_nans=True)

    def init_latent(self, model: Any, image: torch.Tensor) -> torch.Tensor:
        return self.images_tensor_to_samples(image.to(self.host.devices.dtype_vae), 0, model)

    def inpainting_image_conditioning(self, model: Any, source: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(source[:, :1])
        mask[:, :, 8:24, 8:24] = 1.0
        return model.get_first_stage_encoding(model.encode_first_stage(source * (1.0 - mask)))

    def edit_image_conditioning(self, source: torch.Tensor) -> torch.Tensor:
        return self.host.shared.sd_model.encode_first_stage(source).mode()

    def sample_hires_latent(
        self, model: Any, samples: torch.Tensor, saved: list[Image.Image], mask_weight: float
    ) -> list[torch.Tensor]:
        if self.host.opts.save_images_before_highres_fix:
            common = self.host.sd_samplers_common
            saved += [common.sample_to_image(samples, index, approximation=0) for index in range(len(samples))]
        samples = functional.interpolate(samples, scale_factor=2, mode="bilinear")
        if mask_weight < 1.0:
            self.inpainting_image_conditioning(model, self.decode_first_stage(model, samples))
        return self.decode_final(model, samples)

    def sample_hires_pixel(self, model: Any, samples: torch.Tensor) -> list[torch.Tensor]:
        decoded = torch.stack(self.decode_final(model, samples)).float()
        low = [Image.fromarray(to_levels(unit)) for unit in ((decoded + 1.0) / 2.0).clamp(0.0, 1.0)]
        pixels = to_unit([enlarged(image) for image in low])
        samples = self.images_tensor_to_samples(pixels.to(self.host.devices.dtype_vae), 0)
        return self.decode_final(model, samples)
