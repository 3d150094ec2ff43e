"""A stand-in for the modules of stable-diffusion-webui-forge f2.0.1: who calls whom with which tensor, and nothing else.

There is no UNet: what it would make is drawn from a seed. The object around the VAE, its wrappers, its conversions and its own
tiling are the host's path, and so is everything up to the 8-bit picture. Errors in callbacks are let through.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional

from tests.hosts.forge_models import VAE, Engine, ModelPatcher
from tests.hosts.forge_models import Flux as Flux
from tests.hosts.forge_models import Sd15 as Sd15
from tests.hosts.forge_models import Sdxl as Sdxl
from tests.hosts.forge_models import no_memory as no_memory
from tests.hosts.script_standin import HostModule, Scripts, make_module
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
    put_in_place,
    sampled,
    script_callbacks,
    to_images,
    to_levels,
    to_unit,
)

# --- modules -----------------------------------------------------------------------------------------------------------


class FakeInitialModel:
    """Stands where the model is until the first generation loads it."""

    cond_stage_model = None


class Shared(ModuleType):
    """``sd_model`` never loads here, and is still not what an extension should read: it may be the fake one."""

    host: Host

    @property
    def sd_model(self) -> Any:
        return self.host.sd_models.model_data.sd_model


class SdModels(HostModule):
    def __init__(self, name: str, host: Host) -> None:
        super().__init__(name, host)
        self.model_data = SimpleNamespace(sd_model=FakeInitialModel(), forge_loading_parameters={}, forge_hash="")

    def forge_model_reload(self) -> tuple[Any, bool]:
        data = self.model_data
        wanted = str(data.forge_loading_parameters)
        if data.forge_hash == wanted:
            return data.sd_model, False
        data.sd_model = None
        if not data.forge_loading_parameters:
            raise ValueError("You do not have any model!")
        self.host.loads += 1
        data.sd_model, data.forge_hash = data.forge_loading_parameters["checkpoint_info"], wanted
        self.host.script_callbacks.model_loaded_callback(data.sd_model)
        return data.sd_model, True


class SdSamplersCommon(HostModule):
    approximation_indexes = MappingProxyType({"Full": 0, "Approx NN": 1, "Approx cheap": 2, "TAESD": 3})

    def samples_to_images_tensor(
        self, sample: torch.Tensor, approximation: int | None = None, model: Any = None
    ) -> torch.Tensor:
        opts = self.host.opts
        if approximation is None or (self.host.state.interrupted and opts.live_preview_fast_interrupt):
            # "Full" is not taken at its word.
            approximation = self.approximation_indexes.get(opts.show_progress_type, 0) or 1
        if approximation != 0:
            return functional.interpolate(sample[:, :3], scale_factor=8)
        return (model or self.host.shared.sd_model).decode_first_stage(sample)

    def single_sample_to_image(self, sample: torch.Tensor, approximation: int | None = None) -> Image.Image:
        unit = self.samples_to_images_tensor(sample.unsqueeze(0), approximation)[0] * 0.5 + 0.5
        [image] = to_images(unit.clamp(0.0, 1.0).unsqueeze(0))
        return image

    def decode_first_stage(self, model: Any, x: torch.Tensor) -> torch.Tensor:
        return self.samples_to_images_tensor(x, self.approximation_indexes.get(self.host.opts.sd_vae_decode_method, 0), model)

    def sample_to_image(self, samples: torch.Tensor, index: int = 0, approximation: int | None = None) -> Image.Image:
        return self.single_sample_to_image(samples[index], approximation)

    def samples_to_image_grid(self, samples: torch.Tensor, approximation: int | None = None) -> list[Image.Image]:
        return [self.single_sample_to_image(sample, approximation) for sample in samples]

    def images_tensor_to_samples(
        self, image: torch.Tensor, approximation: int | None = None, model: Any = None
    ) -> torch.Tensor:
        model = model or self.host.shared.sd_model
        image = image.to(self.host.devices.device, self.host.devices.dtype_vae) * 2 - 1
        return torch.cat([model.get_first_stage_encoding(model.encode_first_stage(one.unsqueeze(0))) for one in image])


class DecodedSamples(list[torch.Tensor]):
    already_decoded = True


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
            p.sd_model, _ = self.host.sd_models.forge_model_reload()
            return self.process_images_inner(p)
        finally:
            if p.override_settings_restore_afterwards:
                opts.data.update(stored)

    def process_images_inner(self, p: Any) -> Processed:
        state = self.host.state
        p.scripts.process(p)
        infotexts: list[str] = []
        images: list[Image.Image] = []
        with torch.inference_mode():
            p.init_latent = p.begin(p)
            for number in range(p.n_iter):
                p.iteration = number
                state.skipped = False
                if state.interrupted or state.stopping_generation:
                    break
                self.host.sd_models.forge_model_reload()
                p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
                p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()
                self.host.sampling()
                samples = p.sample(p)
                if not getattr(samples, "already_decoded", False):
                    samples = self.decode_final(p.sd_model, samples)
                for index, unit in enumerate(((torch.stack(samples).float() + 1.0) / 2.0).clamp(0.0, 1.0)):
                    images.append(Image.fromarray(to_levels(unit)))
                    infotexts.append(infotext_of(p, index))
        processed = Processed(images, infotexts)
        p.scripts.postprocess(p, processed)
        return processed

    def decode_latent_batch(
        self, model: Any, batch: torch.Tensor, target_device: Any = None, check_for_nans: bool = False
    ) -> DecodedSamples:
        return DecodedSamples(self.decode_first_stage(model, batch).to(target_device))

    def decode_final(self, model: Any, batch: torch.Tensor) -> DecodedSamples:
        return self.decode_latent_batch(model, batch, target_device=self.host.devices.cpu, check_for_nans=True)

    def img2img_image_conditioning(self, model: Any, source: torch.Tensor) -> torch.Tensor | None:
        """Of an inpainting model alone: the masked picture, the whole batch in one call."""
        if not model.is_inpaint:
            return None
        mask = torch.zeros_like(source[:, :1])
        mask[:, :, 8:24, 8:24] = 1.0
        return model.get_first_stage_encoding(model.encode_first_stage(source * (1.0 - mask)))

    def sample_hires_latent(
        self, model: Any, samples: torch.Tensor, saved: list[Image.Image], mask_weight: float
    ) -> DecodedSamples:
        if self.host.opts.save_images_before_highres_fix:
            common = self.host.sd_samplers_common
            saved += [common.sample_to_image(samples, index, approximation=0) for index in range(len(samples))]
        samples = functional.interpolate(samples, scale_factor=2, mode="bilinear")
        if mask_weight < 1.0:
            self.img2img_image_conditioning(model, self.decode_first_stage(model, samples))
        return self.decode_final(model, samples)

    def sample_hires_pixel(self, model: Any, samples: torch.Tensor) -> DecodedSamples:
        decoded = torch.stack(self.decode_final(model, samples)).float()
        low = [Image.fromarray(to_levels(unit)) for unit in ((decoded + 1.0) / 2.0).clamp(0.0, 1.0)]
        return self.decode_final(model, self.images_tensor_to_samples(to_unit([enlarged(image) for image in low]), 0))


def _memory_management() -> ModuleType:
    cpu = torch.device("cpu")
    loaded: list[ModelPatcher] = []
    return make_module(
        "backend.memory_management",
        OOM_EXCEPTION=torch.cuda.OutOfMemoryError,
        VAE_ALWAYS_TILED=False,
        loaded=loaded,
        load_models_gpu=lambda models, memory_required=0, hard_memory_preservation=0: loaded.extend(models),
        load_model_gpu=lambda model: loaded.append(model),
        get_free_memory=lambda dev=None, torch_free_too=False: 2**34,
        vae_device=lambda: cpu,
        vae_offload_device=lambda: cpu,
        intermediate_device=lambda: cpu,
        vae_dtype=lambda device=None, allowed_dtypes=(): torch.float32,
        get_torch_device=lambda: cpu,
        soft_empty_cache=lambda force=False: None,
        unload_all_models=loaded.clear,
    )


class Host(WebuiHost):
    """Forge in use. ``memory_management.loaded`` lists the patchers that were brought to their device."""

    def __init__(self, data_path: Path) -> None:
        super().__init__()
        self.opts, self.state = Options(), WebuiState()
        self.opts.data.update(
            show_progress_type="Full",
            live_preview_fast_interrupt=False,
            sd_vae_decode_method="Full",
            sd_vae_encode_method="Full",
            save_images_before_highres_fix=False,
        )
        cpu = torch.device("cpu")
        self.devices = make_module("modules.devices", dtype_vae=torch.float32, dtype=torch.float32, cpu=cpu, device=cpu)
        self.paths = make_module("modules.paths", data_path=str(data_path))
        self.shared = Shared("modules.shared")
        self.shared.host = self
        vars(self.shared).update(opts=self.opts, state=self.state, OptionInfo=OptionInfo, device=cpu)
        self.script_callbacks = script_callbacks()
        self.sd_models = SdModels("modules.sd_models", self)
        self.sd_samplers_common = SdSamplersCommon("modules.sd_samplers_common", self)
        self.processing = Processing("modules.processing", self)
        self.scripts = Scripts("modules.scripts", self)
        self.memory_management = _memory_management()

    def modules(self) -> Iterator[Any]:
        yield from super().modules()
        yield make_module("modules_forge", __path__=[])
        yield make_module("backend", __path__=[], memory_management=self.memory_management)
        yield self.memory_management
        yield make_module("backend.nn", __path__=[])
        yield make_module("backend.nn.vae", DiagonalGaussianDistribution=DiagonalGaussianDistribution)
        yield make_module("backend.patcher", __path__=[])
        yield make_module("backend.patcher.base", ModelPatcher=ModelPatcher)
        yield make_module("backend.patcher.vae", VAE=VAE)

    def load(self, model: Engine) -> Engine:
        """Choose ``model``. Nobody is told before the next generation loads it."""
        self.sd_models.model_data.forge_loading_parameters = {"checkpoint_info": model}
        return model

    def swap_to(self, model: Engine) -> Engine:
        """Go back to a checkpoint: nothing stays in memory, it is loaded into a new engine."""
        return self.load(type(model)(model.made_of))

    def change_vae(self, vae: Any) -> Engine:
        """Choose another VAE: a new engine, too."""
        return self.load(type(self.sd_models.model_data.forge_loading_parameters["checkpoint_info"])(vae))

    def activate(self) -> Any:
        """The model that a generation would use now, loaded and announced."""
        return self.sd_models.forge_model_reload()[0]

    # --- generations: uint8 pictures [H, W, 3] -------------------------------------------------------------------------

    def txt2img_request(self, batch: int, seed: int) -> Request:
        return Request(self._first_pass, seed=seed, batch_size=batch)

    def img2img(self, image: torch.Tensor, seed: int = 1) -> Pictures:
        """``image``: ``[N, 3, H, W]`` in [0, 1]."""
        return self._from_image(image, seed, masked=False)

    def inpaint(self, image: torch.Tensor, seed: int = 1) -> Pictures:
        """The middle of ``image`` is repainted; an inpainting model sees the masked pictures too."""
        return self._from_image(image, seed, masked=True)

    def hires_latent(
        self, batch: int = 1, *, save_before: bool = False, mask_weight: float = 1.0
    ) -> tuple[Pictures, list[Image.Image]]:
        """The pictures, and those saved before the second pass."""
        self.opts.data["save_images_before_highres_fix"] = save_before
        saved: list[Image.Image] = []

        def sample(p: Any) -> DecodedSamples:
            return self.processing.sample_hires_latent(p.sd_model, self._first_pass(p), saved, mask_weight)

        return self.generate(Request(sample, batch_size=batch)), saved

    def hires_pixel(self, batch: int = 1) -> Pictures:
        def sample(p: Any) -> DecodedSamples:
            return self.processing.sample_hires_pixel(p.sd_model, self._first_pass(p))

        return self.generate(Request(sample, batch_size=batch))

    def preview(self, latents: torch.Tensor) -> Image.Image:
        """What a progress request shows while ``latents`` are being sampled."""
        self.state.current_latent = latents
        with torch.inference_mode():
            image = self.sd_samplers_common.sample_to_image(latents)
        self.state.assign_current_image(image)
        return image

    def _first_pass(self, p: Any) -> torch.Tensor:
        return sampled(p.batch_size, p.seed_now, channels=p.sd_model.forge_objects.vae.latent_channels)

    def _from_image(self, image: torch.Tensor, seed: int, masked: bool) -> Pictures:
        def begin(p: Any) -> torch.Tensor:
            latents = self.processing.images_tensor_to_samples(image, 0, p.sd_model)
            condition = self.processing.img2img_image_conditioning(p.sd_model, image * 2 - 1) if masked else None
            return latents if condition is None else latents * 0.5 + condition * 0.5

        def sample(p: Any) -> torch.Tensor:
            count, channels, *size = p.init_latent.shape
            return p.init_latent + sampled(count, p.seed_now, (size[0], size[1]), channels) * 0.1

        request = Request(sample, begin, seed=seed, batch_size=len(image), init_images=to_images(image))
        return self.generate(request, is_img2img=True)


def install(monkeypatch: pytest.MonkeyPatch, data_path: Path) -> Host:
    """Put the host's modules where ``import`` finds them, for the time of a test."""
    host: Host = put_in_place(monkeypatch, Host(data_path))
    return host
