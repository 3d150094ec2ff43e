"""A stand-in for the modules of SD.Next (058a7f0cf): who calls whom with which tensor, and nothing else.

The VAE is a real ``diffusers.AutoencoderKL``. There is no UNet: what it would make is drawn from a seed. Encodes for img2img,
inpaint and pixel hires are made by the pipeline itself, as diffusers' do it; decodes are the host's. Errors in callbacks and
scripts are let through; those in the VAE and the pipeline are logged and cost the pictures, as in the host.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional

from tests.hosts.script_standin import AxisOption, HostModule, Script, ScriptRunner, Scripts, make_module, xyz_module
from tests.hosts.sdnext_parts import FluxPipeline as FluxPipeline
from tests.hosts.sdnext_parts import ModelData, Options, SdnextOptionInfo, State, with_vae
from tests.hosts.sdnext_parts import PipelineHolder as PipelineHolder
from tests.hosts.sdnext_parts import StableDiffusionPipeline as StableDiffusionPipeline
from tests.hosts.sdnext_parts import StableDiffusionXLPipeline as StableDiffusionXLPipeline
from tests.hosts.sdnext_parts import calls_of as calls_of
from tests.hosts.webui_standin import (
    Pictures,
    Processed,
    Request,
    WebuiHost,
    enlarged,
    infotext_of,
    put_in_place,
    script_callbacks,
    to_images,
    to_unit,
)

log = logging.getLogger("sdnext")

# --- modules ---------------------------------------------------------------------------------------------------------


class Shared(ModuleType):
    """``sd_model`` and ``sd_refiner`` load on reading: the host's own business, which an extension must not set off."""

    host: Host

    def read(self, name: str, reader: str) -> Any:
        if reader.startswith("remote_vae"):
            self.host.offences.append(f"{reader} reads shared.{name}")
        model = getattr(self.host.modeldata.model_data, name)
        if model is None:
            self.host.loads += 1
        return model

    @property
    def sd_model(self) -> Any:
        return self.read("sd_model", _reader())

    @property
    def sd_refiner(self) -> Any:
        return self.read("sd_refiner", _reader())

    @property
    def sd_loaded(self) -> bool:
        return self.host.modeldata.model_data.sd_model is not None

    @property
    def sd_model_type(self) -> str:
        name = type(self.host.modeldata.model_data.sd_model).__name__
        kinds = {"StableDiffusionXL": "sdxl", "StableDiffusion": "sd", "Flux": "f1", "NoneType": "none"}
        return next((kind for part, kind in kinds.items() if part in name), name)


def _reader() -> str:
    return str(sys._getframe(2).f_globals.get("__name__", ""))


class ProcessingVae(HostModule):
    def full_vae_decode(self, latents: torch.Tensor, model: Any) -> Any:
        devices = self.host.devices
        config = model.vae.config
        latents = latents.to(devices.device) / config.get("scaling_factor", 1.0)
        if config.get("shift_factor", None):
            latents = latents + config.shift_factor
        quant = getattr(model.vae, "post_quant_conv", None)
        latents = latents.to(model.vae.dtype if quant is None else quant.bias.dtype)
        try:
            with devices.inference_context():
                return model.vae.decode(latents, return_dict=False)[0]
        except Exception as error:
            log.error("VAE decode: %s", error)
            return []

    def full_vae_encode(self, image: torch.Tensor, model: Any) -> torch.Tensor:
        return model.vae.encode(image.to(model.vae.device, model.vae.dtype)).latent_dist.sample()

    def vae_postprocess(self, tensor: Any, model: Any, output_type: str = "np") -> Any:
        if not torch.is_tensor(tensor):
            return tensor
        return model.image_processor.postprocess(tensor.detach(), output_type=output_type)

    def vae_decode(
        self,
        latents: Any,
        model: Any,
        output_type: str = "np",
        vae_type: str = "Full",
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
    ) -> Any:
        state = self.host.state
        model = with_vae(model or self.host.shared.sd_model)
        if latents is None or not torch.is_tensor(latents):
            return latents
        if state.interrupted or state.skipped or not hasattr(model, "vae"):
            return []
        job = state.begin("VAE Decode")
        latents = latents.unsqueeze(0) if latents.ndim == 3 else latents
        images = self.vae_postprocess(self.full_vae_decode(latents, model), model, output_type)
        state.end(job)
        return images

    def vae_encode(self, image: Image.Image, model: Any, vae_type: str = "Full") -> Any:
        devices, state = self.host.devices, self.host.state
        job = state.begin("VAE Encode")
        if state.interrupted or state.skipped:
            return []
        tensor = to_unit([image.convert("RGB")]).to(devices.device, devices.dtype_vae) * 2 - 1
        latents = self.full_vae_encode(tensor, with_vae(self.host.shared.sd_model))
        state.end(job)
        return latents


class SdSamplersCommon(HostModule):
    queue_lock = threading.Lock()

    def single_sample_to_image(self, sample: torch.Tensor, approximation: str | None = None) -> Image.Image:
        with self.queue_lock:
            if (approximation or self.host.opts.show_progress_type) != "Full":
                [unit] = functional.interpolate(sample[None, :3] * 0.5 + 0.5, scale_factor=8)
            else:
                # The decoder of this version gives [H, W, 3], which is taken for something that is no picture.
                unit = self.host.processing.decode_first_stage(self.host.shared.sd_model, sample.unsqueeze(0))[0]
            if unit.shape[0] >= 4:
                return Image.new(mode="RGB", size=(512, 512))
            return to_images(unit.clamp(0, 1).unsqueeze(0))[0]

    def sample_to_image(self, samples: torch.Tensor, index: int = 0, approximation: str | None = None) -> Image.Image:
        return self.single_sample_to_image(samples[index], approximation)

    def samples_to_image_grid(self, samples: torch.Tensor, approximation: str | None = None) -> Image.Image:
        images = [self.single_sample_to_image(sample, approximation) for sample in samples]
        return images[0]


@dataclass
class SdnextRequest(Request):
    sample: Any = None
    vae_type: str = "Full"
    mask: torch.Tensor | None = None
    upscaler: str = "None"
    refine: bool = False
    save_before: bool = False


class ProcessingDiffusers(HostModule):
    """``saved`` are the pictures saved before the second pass."""

    saved: tuple[Image.Image, ...] = ()

    def process_diffusers(self, p: SdnextRequest) -> list[Any]:
        state = self.host.state
        output = self.run_pipeline(p, "Base", image=p.init_images or None, mask=p.mask)
        for enabled, step in ((p.upscaler != "None", self.process_hires), (p.refine, self.process_refine)):
            if state.interrupted or state.skipped:
                return []
            if output is not None and enabled:
                output = step(p, output)
        if state.interrupted or state.skipped:
            return []
        return self.process_decode(p, output)

    def run_pipeline(self, p: SdnextRequest, title: str, model: Any = None, **arguments: Any) -> Any:
        state = self.host.state
        jobs = [state.begin(title), state.begin("Inference")]
        try:
            return (model or self.host.shared.sd_model)(batch=p.batch_size, seed=p.seed_now, **arguments)
        except (ValueError, RuntimeError) as error:
            state.interrupted = True
            log.error("Processing: step=%s %s", title, error)
            return None
        finally:
            for job in jobs:
                state.end(job)

    def process_hires(self, p: SdnextRequest, output: Any) -> Any:
        vae_decode, model = self.host.processing_vae.vae_decode, self.host.shared.sd_model
        latents = output.images
        if p.save_before:
            self.saved = tuple(vae_decode(latents=latents, model=model, output_type="pil", vae_type=p.vae_type))
        if p.upscaler.lower().startswith("latent"):
            image: Any = functional.interpolate(latents, scale_factor=2, mode="bilinear")
        else:
            low = vae_decode(latents=latents, model=model, vae_type=p.vae_type, output_type="pil")
            image = [enlarged(one) for one in low]
        return self.run_pipeline(p, "Hires", image=image)

    def process_refine(self, p: SdnextRequest, output: Any) -> Any:
        return self.run_pipeline(p, "Refine", self.host.shared.sd_refiner, image=output.images)

    def process_decode(self, p: SdnextRequest, output: Any) -> list[Any]:
        if output is None:
            return []
        model = with_vae(self.host.shared.sd_refiner if p.refine else self.host.shared.sd_model)
        return list(self.host.processing_vae.vae_decode(latents=output.images, model=model, vae_type=p.vae_type))


class Processing(HostModule):
    def process_images(self, p: Any) -> Processed | None:
        host, opts = self.host, self.host.opts
        if host.shared.sd_model is None:
            return None
        p.scripts.before_process(p)
        stored = {key: getattr(opts, key, None) for key in p.override_settings}
        try:
            for key, value in p.override_settings.items():
                setattr(opts, key, value)
            host.script_callbacks.before_process_callback(p)
            return self.process_images_inner(p)
        finally:
            host.script_callbacks.after_process_callback(p)
            if p.override_settings_restore_afterwards:
                for key, value in stored.items():
                    setattr(opts, key, value)

    def process_images_inner(self, p: Any) -> Processed:
        host, state = self.host, self.host.state
        p.scripts.process(p)
        infotexts: list[str] = []
        images: list[Image.Image] = []
        job = state.begin("Process")
        with host.devices.inference_context():
            for number in range(p.n_iter):
                p.iteration = number
                if state.interrupted:
                    break
                if state.skipped:
                    state.skipped = False
                    continue
                samples = host.processing_diffusers.process_diffusers(p)
                for index, sample in enumerate([] if state.interrupted else samples):
                    images.append(Image.fromarray(self.validate_sample(sample)))
                    infotexts.append(infotext_of(p, index))
        processed = Processed(images, infotexts)
        if not (state.interrupted or state.skipped):
            p.scripts.postprocess(p, processed)
        state.end(job)
        return processed

    def validate_sample(self, sample: np.ndarray) -> np.ndarray:
        """To 8 bits, cut off and not rounded: only a decode to ``pil`` rounds."""
        return np.nan_to_num(255.0 * sample).astype(np.uint8)

    def decode_first_stage(self, model: Any, x: torch.Tensor) -> Any:
        if hasattr(with_vae(model), "vae"):
            return self.host.processing_vae.vae_decode(latents=x, model=model, output_type="np")
        return x


# --- scripts -----------------------------------------------------------------------------------------------------------


class SdnextRunner(ScriptRunner):
    """Calls scripts that have arguments, with those that the request named: nothing is filled up."""

    def __init__(self, scripts: Any, is_img2img: bool, leaves_out: Callable[[Script], bool] = lambda _: False) -> None:
        super().__init__(scripts, is_img2img, leaves_out)
        self.alwayson_scripts = [script for script in self.alwayson_scripts if script.args_to != script.args_from]

    def args_of(self, p: Any, script: Script) -> list[Any]:
        return p.per_script_args.get(script.title(), super().args_of(p, script))


class ScriptsManager(Scripts):
    """``modules.scripts_manager``, of which ``modules.scripts`` is a copy made for extensions."""

    ScriptRunner = SdnextRunner
    scripts_control: ScriptRunner | None = None

    def load_extension(self) -> None:
        # What a script prints while it is loaded goes to the log.
        with contextlib.redirect_stdout(io.StringIO()):
            super().load_extension()

    def registers(self, member: Any) -> bool:
        return type(member) is type

    def create_ui(self) -> None:
        safe = self.host.installer.control_extensions
        self.scripts_txt2img = SdnextRunner(self, is_img2img=False)
        self.scripts_img2img = SdnextRunner(self, is_img2img=True)
        self.scripts_control = SdnextRunner(self, is_img2img=False, leaves_out=lambda script: script.title() not in safe)


class SdnextAxisOption(AxisOption):
    def __init__(
        self,
        label: str,
        tipe: Any,
        apply: Any,
        fmt: Any = lambda p, opt, x: f"{opt.label}: {x}",
        confirm: Any = None,
        cost: float = 0.0,
        choices: Any = None,
    ) -> None:
        super().__init__(label, tipe, apply, fmt, confirm, cost, choices)


class Host(WebuiHost):
    """SD.Next in use. With ``control_tab`` it is used through its Control tab, which leaves the scripts of extensions out."""

    axis_option = SdnextAxisOption

    def __init__(self, data_path: Path) -> None:
        super().__init__()
        self.control_tab = False
        self.opts, self.state = Options(), State()
        self.opts.data.update(show_progress_type="Full")
        cpu = torch.device("cpu")
        self.devices = make_module(
            "modules.devices",
            dtype_vae=torch.float32,
            dtype=torch.float32,
            cpu=cpu,
            device=cpu,
            inference_context=torch.no_grad,
            torch_gc=lambda force=False, reason="": None,
        )
        self.paths = make_module("modules.paths", data_path=str(data_path), script_path=str(data_path))
        self.logger = make_module("modules.logger", log=log)
        self.installer = make_module("installer", control_extensions=["NudeNet", "IP Adapters", "Remove background"])
        self.modeldata = make_module("modules.modeldata", model_data=ModelData(), ModelData=ModelData)
        self.shared = Shared("modules.shared")
        self.shared.host = self
        vars(self.shared).update(opts=self.opts, state=self.state, OptionInfo=SdnextOptionInfo, device=cpu)
        self.shared.restricted_opts = {"outdir_samples"}
        self.sd_models = make_module(
            "modules.sd_models",
            model_data=self.modeldata.model_data,
            move_model=lambda model, device=None, force=False: model.to(device),
        )
        self.script_callbacks = script_callbacks(takes_name=False, more_events=("before_process", "after_process"))
        self.sd_samplers_common = SdSamplersCommon("modules.sd_samplers_common", self)
        self.processing_vae = ProcessingVae("modules.processing_vae", self)
        self.processing_diffusers = ProcessingDiffusers("modules.processing_diffusers", self)
        self.processing = Processing("modules.processing", self)
        self.scripts = ScriptsManager("modules.scripts_manager", self)

    def modules(self) -> Iterator[Any]:
        yield from super().modules()
        yield self.installer
        names = ("Script", "ScriptRunner", "ScriptClassData", "AlwaysVisible", "scripts_data")
        yield make_module("modules.scripts", **{name: getattr(self.scripts, name) for name in names})
        for name in ("modules.shared_options", "modules.sd_vae_approx", "ldm", "backend", "modules_forge"):
            yield name, None

    def xyz_modules(self) -> list[ModuleType]:
        """Two plots with one list of axes."""
        [plot] = super().xyz_modules()
        return [plot, xyz_module("xyz_grid_on.py", plot.axis_options, SdnextAxisOption)]

    def load(self, model: Any) -> Any:
        """Load ``model``. What was loaded before is gone."""
        self.modeldata.model_data.sd_model = model
        self._announce(model)
        return model

    def load_refiner(self, model: Any) -> Any:
        self.modeldata.model_data.sd_refiner = model
        self._announce(model)
        return model

    def _announce(self, model: Any) -> None:
        with_vae(model).sampling = self.sampling
        self.script_callbacks.model_loaded_callback(model)

    def swap_to(self, model: Any) -> Any:
        """Go back to a checkpoint: it is loaded again, into a new pipeline, and announced."""
        return self.load(type(model)(model.vae))

    def change_vae(self, vae: AutoencoderKL) -> None:
        """Put another VAE into the pipeline: nobody is told."""
        model = self.modeldata.model_data.sd_model
        model.original_vae, model.vae = model.vae, vae

    def runner(self, is_img2img: bool) -> Any:
        runner = super().runner(is_img2img)
        return self.scripts.scripts_control if self.control_tab else runner

    def fill_in(self, request: Request) -> None:
        for key in self.shared.restricted_opts & set(request.override_settings):
            del request.override_settings[key]
        for title, args in self.alwayson.items():
            request.per_script_args[request.scripts.find(title).title()] = args

    # --- generations: uint8 pictures [H, W, 3] -------------------------------------------------------------------------

    def txt2img_request(self, batch: int, seed: int) -> Request:
        return SdnextRequest(seed=seed, batch_size=batch)

    def img2img(self, image: torch.Tensor, seed: int = 1) -> Pictures:
        """``image``: ``[N, 3, H, W]`` in [0, 1]."""
        request = SdnextRequest(seed=seed, batch_size=len(image), init_images=to_images(image))
        return self.generate(request, is_img2img=True)

    def inpaint(self, image: torch.Tensor, seed: int = 1) -> Pictures:
        """The middle of ``image`` is repainted; the masked picture is encoded as well."""
        mask = torch.zeros(1, 1, *image.shape[-2:])
        mask[:, :, 8:24, 8:24] = 1.0
        request = SdnextRequest(seed=seed, batch_size=len(image), init_images=to_images(image), mask=mask)
        return self.generate(request, is_img2img=True)

    def hires_latent(self, batch: int = 1, *, save_before: bool = False) -> tuple[Pictures, list[Image.Image]]:
        """The pictures, and those saved before the second pass."""
        self.processing_diffusers.saved = ()
        pictures = self.generate(SdnextRequest(batch_size=batch, upscaler="Latent", save_before=save_before))
        return pictures, list(self.processing_diffusers.saved)

    def hires_pixel(self, batch: int = 1) -> Pictures:
        return self.generate(SdnextRequest(batch_size=batch, upscaler="Lanczos"))

    def refine(self, batch: int = 1) -> Pictures:
        """With the refiner, whose VAE makes the pictures."""
        return self.generate(SdnextRequest(batch_size=batch, refine=True))

    def encode(self, image: torch.Tensor) -> Any:
        """The host's own encode of one picture ``[1, 3, H, W]`` in [0, 1], which no pipeline asked for."""
        [picture] = to_images(image)
        return self.processing_vae.vae_encode(picture, self.shared.sd_model)

    @torch.no_grad()
    def preprocess(self, vae: AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
        """What a preprocessor of Control does with a VAE of its own."""
        latents = vae.encode(image * 2 - 1).latent_dist.mode()
        return vae.decode(latents).sample

    def preview(self, latents: torch.Tensor) -> Image.Image:
        """What a progress request shows while ``latents`` are being sampled, made by a thread of its own."""
        shown: list[Image.Image] = []

        def show() -> None:
            with torch.no_grad():
                shown.append(self.sd_samplers_common.samples_to_image_grid(latents))

        thread = threading.Thread(target=show)
        thread.start()
        thread.join()
        self.state.assign_current_image(shown[0])
        return shown[0]


def install(monkeypatch: pytest.MonkeyPatch, data_path: Path) -> Host:
    """Put the host's modules where ``import`` finds them, for the time of a test."""
    host: Host = put_in_place(monkeypatch, Host(data_path))
    return host
