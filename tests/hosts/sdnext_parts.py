"""Parts of the stand-in for SD.Next: pipelines around a real ``diffusers.AutoencoderKL``, the options and the state."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from tests.hosts.webui_standin import OptionInfo, sampled

# --- pipelines ---------------------------------------------------------------------------------------------------------


class StableDiffusionPipeline:
    """What diffusers' pipelines do around their UNet. The host goes by the name of the class."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.image_processor = VaeImageProcessor()
        self.sd_checkpoint_info = SimpleNamespace(name="standin", filename="standin.safetensors")
        self.sampling: Callable[[], None] = lambda: None

    @torch.no_grad()
    def __call__(self, batch: int, seed: int, image: Any = None, mask: torch.Tensor | None = None) -> SimpleNamespace:
        """``image``: None, latents, or pictures; ``mask`` ``[1, 1, H, W]`` is 1 where it is repainted."""
        generator = [torch.Generator().manual_seed(seed + index) for index in range(batch)]
        channels = self.vae.config.latent_channels
        if image is None:
            latents = sampled(batch, seed, channels=channels)
        elif isinstance(image, torch.Tensor):
            latents = image + sampled(batch, seed, tuple(image.shape[-2:]), channels) * 0.1
        else:
            pixels = self.image_processor.preprocess(image).to(self.vae.dtype)
            latents = self._encode_vae_image(pixels, generator)
            if mask is not None:
                masked = self._encode_vae_image(pixels * (mask < 0.5), generator)
                latents = latents * 0.5 + masked * 0.5
            latents = latents + sampled(batch, seed, tuple(latents.shape[-2:]), channels) * 0.1
        self.sampling()
        return SimpleNamespace(images=latents)

    def _encode_vae_image(self, image: torch.Tensor, generator: list[torch.Generator]) -> torch.Tensor:
        """A generator for each picture: so the pictures are encoded one by one."""
        encoded = [self.vae.encode(image[index : index + 1]).latent_dist.sample(own) for index, own in enumerate(generator)]
        latents = torch.cat(encoded)
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor


class StableDiffusionXLPipeline(StableDiffusionPipeline):
    pass


class FluxPipeline(StableDiffusionPipeline):
    """16 channels and a shift. Its latents are left unpacked."""


class PipelineHolder:
    """Has no ``vae``, but a ``pipe`` that has one."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.pipe = pipe
        self.sd_checkpoint_info = pipe.sd_checkpoint_info

    def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return self.pipe(*args, **kwargs)


def calls_of(vae: AutoencoderKL) -> list[str]:
    """A list that grows with what is asked of the modules of ``vae`` from now on."""
    calls: list[str] = []
    vae.encoder.register_forward_hook(lambda *_: calls.append("encode"))
    vae.decoder.register_forward_hook(lambda *_: calls.append("decode"))
    return calls


# --- what the modules hold ----------------------------------------------------------------------------------------------


class Options:
    """An option that nobody knows raises. A default is not in ``data``: it is asked of the label."""

    def __init__(self) -> None:
        super().__setattr__("data", {})
        super().__setattr__("data_labels", {})

    def __getattr__(self, item: str) -> Any:
        if item in self.data:
            return self.data[item]
        if item in self.data_labels:
            return self.data_labels[item].default
        return super().__getattribute__(item)

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.data_labels or key in self.data:
            self.data[key] = value
        else:
            super().__setattr__(key, value)

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info

    def set(self, key: str, value: Any, force: bool = False) -> bool:
        info = self.data_labels[key]
        if self.data.get(key, info.default) == value and not force:
            return False
        setattr(self, key, value)
        if info.onchange is not None:
            info.onchange()
        return True


class SdnextOptionInfo(OptionInfo):
    """It takes whatever it does not know, and makes nothing of it."""

    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        onchange: Any = None,
        section: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(default, label, component, component_args, onchange, section)


class State:
    """Every step of a generation begins a job of its own, and with it Interrupt, Skip and ``textinfo`` are forgotten."""

    interrupted = False
    skipped = False
    paused = False
    job = ""
    current_latent: torch.Tensor | None = None
    current_image: Image.Image | None = None
    textinfo: str | None = None

    def begin(self, title: str = "", task_id: Any = 0, api: bool | None = None) -> str:
        self.job = title
        self.interrupted = self.skipped = False
        self.current_latent = self.current_image = self.textinfo = None
        return title

    def end(self, task_id: Any = None, api: bool | None = None) -> None:
        self.job = ""
        self.paused = False

    def interrupt(self) -> None:
        self.interrupted = True

    def skip(self) -> None:
        self.skipped = True

    def assign_current_image(self, image: Image.Image) -> None:
        self.current_image = image


class ModelData:
    def __init__(self) -> None:
        self.sd_model: Any = None
        self.sd_refiner: Any = None
        self.locked = False


def with_vae(model: Any) -> Any:
    return model.pipe if not hasattr(model, "vae") and hasattr(model, "pipe") else model
