"""A stand-in for the modules of SD.Next (058a7f0cf), see ``standin``: pipelines around a real ``diffusers.AutoencoderKL``.

Encodes are made by the pipeline itself, as diffusers' do it; decodes are the host's. Errors in either are logged and cost the
pictures, as in the host.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from remote_vae.hosts import sdnext
from tests.hosts.standin import (
    OWN,
    SCALES,
    Host,
    OptionInfo,
    Options,
    Pictures,
    Processed,
    Request,
    State,
    make_module,
    to_levels,
)

log = logging.getLogger("sdnext")


class Pipeline:
    """What diffusers' pipelines do around their UNet."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae

    def __call__(self, p: Request) -> torch.Tensor:
        """A generator for each picture: so the pictures are encoded one by one."""
        channels = self.vae.config.latent_channels
        if p.image is None:
            return p.sampled(channels)
        drawn = [self.vae.encode(one.unsqueeze(0) * 2 - 1).latent_dist.sample() for one in p.image]
        return p.sampled(channels, torch.cat(drawn) * self.vae.config.scaling_factor)


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


class SdnextHost(Host):
    adapter = sdnext.adapter
    fills_up = False
    make_state = State

    def __init__(self, vae: AutoencoderKL, data_path: Path) -> None:
        super().__init__(vae, data_path)
        # A default is not stored: it is asked of the label.
        self.opts = Options(stores_defaults=False, sd_vae="Automatic")
        vars(self.shared).update(opts=self.opts, OptionInfo=SdnextOptionInfo, restricted_opts={"outdir"})
        self.model_data = SimpleNamespace(sd_model=None, sd_refiner=None)
        self.modeldata = make_module("modules.modeldata", model_data=self.model_data)
        self.errors = make_module("modules.errors", display=lambda error, task: log.error("%s: %s", task, error))
        # Decodes that went to Hugging Face's public endpoints.
        self.sent_elsewhere = 0
        # VAEs that were moved to the card.
        self.moved: list[Any] = []
        self.sd_models = make_module("modules.sd_models", move_model=self._move_model)
        self.sd_hijack_vae = make_module("modules.sd_hijack_vae", init_hijack=self._init_hijack)
        # The scripts that the Control tab shows.
        self.installer = make_module("installer", control_extensions=["IP Adapters"])
        self.processing_vae = make_module("modules.processing_vae", vae_decode=self._vae_decode)
        self.processing_diffusers = make_module("modules.processing_diffusers", process_diffusers=self._process_diffusers)
        self.load(self.made("sd1"))

    def made(self, family: str) -> Any:
        vae = copy.deepcopy(self.vae)
        vae.register_to_config(scaling_factor=SCALES[family])
        vae.asked = []
        vae.encoder.register_forward_hook(lambda *_: vae.asked.append("encode"))
        vae.decoder.register_forward_hook(lambda *_: vae.asked.append("decode"))
        return Pipeline(vae)

    def _move_model(self, model: Any, device: torch.device) -> None:
        self.moved.append(model)
        model.to(device)

    def _init_hijack(self, pipe: Any) -> None:
        """Stand in front of the VAE of ``pipe``, once. An error costs what was asked for."""
        for op in ("decode", "encode"):
            if not hasattr(pipe.vae, f"orig_{op}"):
                setattr(pipe.vae, f"orig_{op}", getattr(pipe.vae, op))
                setattr(pipe.vae, op, self._hijack(op))

    def _hijack(self, op: str) -> Any:
        def theirs(*args: Any, **kwargs: Any) -> Any:
            vae = self.model.vae
            try:
                self.sd_models.move_model(vae, self.devices.device)
                tensor = args[0].to(device=self.devices.device, dtype=vae.dtype)
                return getattr(vae, f"orig_{op}")(tensor, *args[1:], **kwargs)
            except Exception as error:
                self.errors.display(error, "vae")
                return None

        return theirs

    def load(self, model: Any) -> Any:
        """What was loaded before is gone."""
        self.model_data.sd_model = model
        self.script_callbacks.fire("model_loaded", model)
        return model

    swap_to = load

    @property
    def model(self) -> Any:
        return self.model_data.sd_model

    @property
    def module(self) -> torch.nn.Module:
        return self.model.vae

    @property
    def calls(self) -> list[str]:
        return self.module.asked

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.module.decode(latents / self.module.config.scaling_factor, return_dict=False)[0]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.module.encode(pixels).latent_dist.sample() * self.module.config.scaling_factor

    def change_vae(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Another VAE in the pipeline: nobody is told."""
        other = self.made("sd1").vae
        other.load_state_dict(dict(weights))
        self.model.vae = other

    def seam(self) -> Any:
        return AutoencoderKL.decode

    def put_over(self, notes: list[str], *, chaining: bool = True) -> Any:
        covered = AutoencoderKL.decode

        def theirs(vae: Any, *args: Any, **kwargs: Any) -> Any:
            # The server of these tests lives in the same process.
            if vae is self.module:
                notes.append("theirs")
            return covered(vae, *args, **kwargs) if chaining else OWN["decode"](vae, *args, **kwargs)

        AutoencoderKL.decode = theirs
        return theirs

    def clear_seam(self) -> None:
        AutoencoderKL.decode = OWN["decode"]

    def places_in_the_model(self) -> list[Any]:
        return [self.model, type(self.model), self.module]

    # --- what calls the VAE ---------------------------------------------------------------------------------------------

    def _process_images_inner(self, p: Request) -> Processed:
        state = self.state
        self.within(p)
        pictures: Pictures = []
        infotexts: list[str] = []
        state.begin("Process")
        for iteration in range(p.n_iter):
            p.iteration = iteration
            if state.interrupted:
                break
            if state.skipped:
                state.skipped = False
                continue
            made = self.processing_diffusers.process_diffusers(p)
            for index, picture in enumerate([] if state.interrupted else made):
                pictures.append(picture)
                infotexts.append(p.infotext(index))
        return Processed(pictures, infotexts)

    @torch.no_grad()
    def _process_diffusers(self, p: Request) -> Pictures:
        state = self.state
        state.begin("Base")
        try:
            latents = self.model(p)
        except (ValueError, RuntimeError):
            log.exception("the pipeline")
            state.interrupted = True
            return []
        self.while_sampling()
        if state.interrupted or state.skipped:
            return []
        return list(self.processing_vae.vae_decode(latents, self.model, vae_type=p.vae_type))

    def _vae_decode(self, latents: torch.Tensor, model: Any, output_type: str = "np", vae_type: str = "Full") -> Any:
        if vae_type == "Remote":
            self.sent_elsewhere += 1
            return [np.zeros((latents.shape[-2] * 8, latents.shape[-1] * 8, 3), np.uint8) for _ in latents]
        self.state.begin("VAE Decode")
        try:
            latents = (latents / model.vae.config.scaling_factor).to(model.vae.dtype)
            pixels = model.vae.decode(latents, return_dict=False)[0]
        except Exception:
            log.exception("VAE decode")
            return []
        if output_type == "pil":
            # Rounded; an array is cut off to 8 bits later.
            return [np.asarray(image) for image in VaeImageProcessor().postprocess(pixels, output_type="pil")]
        return [to_levels(one) for one in pixels]

    def _single_sample_to_image(self, sample: torch.Tensor, approximation: Any = None) -> np.ndarray:
        return to_levels(self.decode(sample.unsqueeze(0))[0])

    def _encoded(self, image: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    _decoded = _encoded
