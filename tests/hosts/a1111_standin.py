"""A stand-in for the modules of AUTOMATIC1111 1.10.1: who calls whom with which tensor, and nothing else.

There is no UNet: what it would make is drawn from a seed. Everything from there to the 8-bit picture is the host's path. What
the host catches and prints (errors in callbacks) is let through here, so that a test sees it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

SCRIPT = Path(__file__).parents[2] / "scripts" / "remote_vae_extension.py"
PREFIX = "remote_vae_"

# --- models ------------------------------------------------------------------------------------------------------------


class DiagonalGaussianDistribution:
    """ldm's posterior, which draws from the CPU's global generator whatever the device."""

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)

    def sample(self) -> torch.Tensor:
        return self.mean + self.std * torch.randn(self.mean.shape).to(self.parameters.device)

    def mode(self) -> torch.Tensor:
        return self.mean


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

    is_sd3 = True

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


class OptionInfo:
    def __init__(
        self, default: Any = None, label: str = "", component: Any = None, component_args: Any = None, section: Any = None
    ) -> None:
        self.default, self.label, self.component, self.section = default, label, component, section
        self.component_args = component_args
        self.comment_after = ""

    def info(self, text: str) -> OptionInfo:
        self.comment_after += f"<span class='info'>({text})</span>"
        return self


class Options:
    """``data`` is config.json: it may hold anything, and a key before its option is added."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.data_labels: dict[str, OptionInfo] = {}

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("data", {})
        if name in values:
            return values[name]
        raise AttributeError(f"'Options' object has no attribute '{name}'")


class State:
    interrupted = False
    skipped = False
    current_latent: torch.Tensor | None = None
    current_image: Image.Image | None = None

    def interrupt(self) -> None:
        self.interrupted = True

    def skip(self) -> None:
        self.skipped = True

    def assign_current_image(self, image: Image.Image) -> None:
        self.current_image = image


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


class Component:
    """A gradio 3.41 component: takes the arguments named in ``takes`` and no others."""

    takes: tuple[str, ...] = ()

    def __init__(self, *, value: Any = None, label: str = "", **arguments: Any) -> None:
        unknown = set(arguments) - set(self.takes)
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}")


class Checkbox(Component):
    pass


class Radio(Component):
    takes = ("choices",)


class Number(Component):
    takes = ("minimum", "maximum", "step", "precision")


class Textbox(Component):
    takes = ("lines", "max_lines", "placeholder")


class Host:
    """The modules, and what a user does with them. ``offences``: what an extension must not do and did."""

    def __init__(self, data_path: Path) -> None:
        self.offences: list[str] = []
        self.loads = 0
        self.opts, self.state = Options(), State()
        self.opts.data.update(
            show_progress_type="Full",
            live_preview_fast_interrupt=False,
            sd_vae_decode_method="Full",
            auto_vae_precision=True,
            save_images_before_highres_fix=False,
        )
        self.devices = _module("modules.devices", **_devices())
        self.paths = _module("modules.paths", data_path=str(data_path))
        self.shared = Shared("modules.shared")
        self.shared.host = self
        vars(self.shared).update(opts=self.opts, state=self.state, OptionInfo=OptionInfo, device=torch.device("cpu"))
        self.sd_models = _module("modules.sd_models", model_data=ModelData(self._load_lazily))
        self.script_callbacks = _module("modules.script_callbacks", **_script_callbacks())
        self.sd_vae = SdVae("modules.sd_vae", self)
        self.sd_samplers_common = SdSamplersCommon("modules.sd_samplers_common", self)
        self.processing = Processing("modules.processing", self)

    def modules(self) -> Iterator[ModuleType]:
        package = _module("modules", __path__=[])
        for value in vars(self).values():
            if isinstance(value, ModuleType):
                setattr(package, value.__name__.rpartition(".")[2], value)
                yield value
        yield package
        for name in ("ldm", "ldm.modules", "ldm.modules.distributions"):
            yield _module(name, __path__=[])
        yield _module("ldm.modules.distributions.distributions", DiagonalGaussianDistribution=DiagonalGaussianDistribution)
        yield _module("gradio", Checkbox=Checkbox, Radio=Radio, Number=Number, Textbox=Textbox)

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

    def set_options(self, **values: Any) -> None:
        """Options of the extension, by their keys in options.toml."""
        self.opts.data.update({PREFIX + key: value for key, value in values.items()})

    def load_extension(self) -> None:
        """Execute the script as a new module, as at the start."""
        spec = importlib.util.spec_from_file_location(SCRIPT.name, SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    def reload_ui(self) -> None:
        self.script_callbacks.script_unloaded_callback()
        self.script_callbacks.clear_callbacks()
        self.load_extension()
        self.script_callbacks.ui_settings_callback()

    # --- generations: uint8 pictures [H, W, 3] -------------------------------------------------------------------------

    def txt2img(self, batch: int = 1, seed: int = 1) -> list[np.ndarray]:
        return self._finished(self.processing.decode_final(self.shared.sd_model, sampled(batch, seed)))

    def img2img(self, image: torch.Tensor, seed: int = 1) -> list[np.ndarray]:
        """``image``: ``[N, 3, H, W]`` in [0, 1]."""
        latents = self.processing.init_latent(self.shared.sd_model, image)
        return self._sampled_from(latents, seed)

    def inpaint(self, image: torch.Tensor, seed: int = 1) -> list[np.ndarray]:
        """The middle of ``image`` is repainted; an inpainting model sees the masked picture too."""
        model = self.shared.sd_model
        latents = self.processing.init_latent(model, image)
        masked = self.processing.inpainting_image_conditioning(model, image * 2 - 1)
        return self._sampled_from(latents * 0.5 + masked * 0.5, seed)

    def instruct_pix2pix(self, image: torch.Tensor, seed: int = 1) -> list[np.ndarray]:
        model = self.shared.sd_model
        condition = self.processing.edit_image_conditioning(image * 2 - 1) * getattr(model, "scale_factor", 1.0)
        return self._sampled_from(self.processing.init_latent(model, image) * 0.5 + condition * 0.5, seed)

    def hires_latent(
        self, batch: int = 1, *, save_before: bool = False, mask_weight: float = 1.0
    ) -> tuple[list[np.ndarray], list[Image.Image]]:
        """The pictures, and those saved before the second pass."""
        self.opts.data["save_images_before_highres_fix"] = save_before
        saved: list[Image.Image] = []
        decoded = self.processing.sample_hires_latent(self.shared.sd_model, sampled(batch, 1), saved, mask_weight)
        return self._finished(decoded), saved

    def hires_pixel(self, batch: int = 1) -> list[np.ndarray]:
        return self._finished(self.processing.sample_hires_pixel(self.shared.sd_model, sampled(batch, 1)))

    def preview(self, latents: torch.Tensor) -> Image.Image:
        """What a progress request shows while ``latents`` are being sampled."""
        self.state.current_latent = latents
        self.state.assign_current_image(self.sd_samplers_common.sample_to_image(latents))
        assert self.state.current_image is not None
        return self.state.current_image

    def _sampled_from(self, latents: torch.Tensor, seed: int) -> list[np.ndarray]:
        noise = sampled(latents.shape[0], seed, tuple(latents.shape[-2:])) * 0.1
        return self._finished(self.processing.decode_final(self.shared.sd_model, latents + noise))

    def _finished(self, decoded: list[torch.Tensor]) -> list[np.ndarray]:
        unit = ((torch.stack(decoded).float() + 1.0) / 2.0).clamp(0.0, 1.0)
        return [to_levels(picture) for picture in unit]


def install(monkeypatch: pytest.MonkeyPatch, data_path: Path) -> Host:
    """Put the host's modules where ``import`` finds them, for the time of a test."""
    host = Host(data_path)
    for module in host.modules():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return host


def sampled(batch: int, seed: int, size: tuple[int, int] = (4, 6)) -> torch.Tensor:
    """What a UNet would have made: model latents ``[batch, 4, h, w]``."""
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))


def to_levels(unit: torch.Tensor) -> np.ndarray:
    """``[3, H, W]`` in [0, 1] to uint8 ``[H, W, 3]``, cut off and not rounded."""
    return (255.0 * np.moveaxis(unit.cpu().numpy(), 0, 2)).astype(np.uint8)


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


def out_of_memory() -> Exception:
    kind = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    return kind("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


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


def _script_callbacks() -> dict[str, Any]:
    lists: dict[str, list[Callable[..., Any]]] = {"ui_settings": [], "model_loaded": [], "script_unloaded": []}

    def adder(event: str) -> Callable[..., None]:
        def add(callback: Callable[..., Any], *, name: str | None = None) -> None:
            lists[event].append(callback)

        return add

    def fire(name: str, *arguments: Any) -> None:
        callbacks = list(lists[name])
        for callback in reversed(callbacks) if name == "script_unloaded" else callbacks:
            callback(*arguments)

    def clear_callbacks() -> None:
        for callbacks in lists.values():
            callbacks.clear()

    return {
        "callbacks": lists,
        "clear_callbacks": clear_callbacks,
        **{f"on_{name}": adder(name) for name in lists},
        "ui_settings_callback": lambda: fire("ui_settings"),
        "model_loaded_callback": lambda model: fire("model_loaded", model),
        "script_unloaded_callback": lambda: fire("script_unloaded"),
    }


class HostModule(ModuleType):
    """A module of the host. Its methods find each other through the module, where others may have put something else."""

    def __init__(self, name: str, host: Host) -> None:
        super().__init__(name)
        self.host = host


class SdVae(HostModule):
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


class Processing(HostModule):
    def __init__(self, name: str, host: Host) -> None:
        super().__init__(name, host)
        # Imported by name: what is later put into sd_samplers_common does not reach these.
        self.decode_first_stage = host.sd_samplers_common.decode_first_stage
        self.images_tensor_to_samples = host.sd_samplers_common.images_tensor_to_samples

    def decode_latent_batch(
        self, model: Any, batch: torch.Tensor, target_device: Any = None, check_for_nans: bool = False
    ) -> list[torch.Tensor]:
        devices = self.host.devices
        samples = []
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
        high = [np.asarray(image.resize((image.width * 2, image.height * 2))) for image in low]
        pixels = torch.from_numpy(np.stack(high).astype(np.float32) / 255.0).movedim(-1, 1)
        samples = self.images_tensor_to_samples(pixels.to(self.host.devices.dtype_vae), 0)
        return self.decode_final(model, samples)
