"""The three hosts as the contract's tests see them: one face, behind it what is named otherwise in each."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae.hosts import a1111, forge, sdnext
from remote_vae.hosts.base import WebUi
from tests.chaos import Chaos
from tests.hosts import a1111_standin, forge_standin, sdnext_standin
from tests.hosts.script_standin import Script, ScriptRunner
from tests.hosts.sdnext_parts import with_vae
from tests.hosts.webui_standin import Pictures, Request

TITLE = "Remote VAE"
# As they are before any test has hooked them.
OWN = {op: vars(AutoencoderKL)[op] for op in ("decode", "encode")}
SCALES = {"sd1": 0.18215, "sdxl": 0.13025}


class Ui(ABC):
    """A host with a small real VAE in an SD 1 model. The extension is not in it before ``host.load_extension()``."""

    adapter: ClassVar[WebUi]
    standin: ClassVar[Any]

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data_path: Path, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.host = self.standin.install(monkeypatch, data_path)
        self.model = self.host.load(self.made("sd1"))
        self.before = self.callables()

    # --- what is named otherwise in each ---------------------------------------------------------------------------------

    @abstractmethod
    def made(self, family: str) -> Any:
        """A model of ``family`` with a copy of the VAE."""

    @property
    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The VAE of the model in use."""

    @property
    @abstractmethod
    def calls(self) -> list[str]:
        """What was asked of that VAE on this machine."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The call that another extension makes, outside any generation."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same: ``[B, 3, H, W]`` in [-1, 1] to latents that are drawn."""

    @abstractmethod
    def change_vae(self, weights: Mapping[str, torch.Tensor]) -> None:
        """The user picks a VAE with ``weights``."""

    @abstractmethod
    def seam(self) -> Any:
        """What stands in front of a decode of the model in use."""

    @abstractmethod
    def put_over(self, notes: list[str], *, chaining: bool) -> Any:
        """The hook of another extension, around what is there or, not ``chaining``, in its place."""

    @abstractmethod
    def clear_seam(self) -> None:
        """Take away whatever stands there."""

    @abstractmethod
    def places_in_the_model(self) -> dict[str, Mapping[str, Any]]:
        """Where a hook could be left on the model in use."""

    # --- what is the same ------------------------------------------------------------------------------------------------

    def callables(self) -> dict[str, Any]:
        """Every function wherever one of ours could be left."""
        host = self.host
        places: dict[str, Mapping[str, Any]] = {
            "state": vars(host.state),
            "class of state": vars(type(host.state)),
            "AutoencoderKL": vars(AutoencoderKL),
            **self.places_in_the_model(),
        }
        for module in vars(host).values():
            if isinstance(module, ModuleType):
                places |= {module.__name__: vars(module), f"class of {module.__name__}": vars(type(module))}
        return {f"{place}.{key}": value for place, held in places.items() for key, value in held.items() if callable(value)}

    def turn_on(self, endpoint: str, **options: Any) -> None:
        """No pause after a failure, so that every request that an adapter would make is made."""
        values = {"enabled": True, "endpoint": endpoint, "transfer": "raw", "cooldown": 0.0, "first_byte_timeout": 20.0}
        self.host.set_options(**{**values, **options})

    def records(self) -> list[Any]:
        return self.adapter.router.history.records()

    def routes(self) -> list[str]:
        return [f"{record.op} {record.route}" for record in self.records()]

    def runner_without_ours(self) -> ScriptRunner:
        """The scripts as a face detailer filters them."""
        scripts = self.host.scripts
        leaves_out: Callable[[Script], bool] = lambda script: script.title() == TITLE  # noqa: E731
        return scripts.ScriptRunner(scripts, False, leaves_out)

    def detail(self, seed: int = 9) -> tuple[Any, Any]:
        """A generation within a generation, by scripts without ours: its ``p`` and what it gave."""
        request: Request = self.host.txt2img_request(1, seed)
        request.scripts = self.runner_without_ours()
        request.script_args = request.scripts.script_args({})
        return request, self.host.processing.process_images(request)


class A1111Ui(Ui):
    adapter = a1111.adapter
    standin = a1111_standin

    def made(self, family: str) -> Any:
        kinds = {"sd1": a1111_standin.LdmModel, "sdxl": a1111_standin.SgmModel}
        return kinds[family](copy.deepcopy(self.vae))

    @property
    def module(self) -> torch.nn.Module:
        return self.host.sd_models.model_data.sd_model.first_stage_model

    @property
    def calls(self) -> list[str]:
        return self.module.calls

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.host.sd_models.model_data.sd_model.decode_first_stage(latents)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        model = self.host.sd_models.model_data.sd_model
        return model.get_first_stage_encoding(model.encode_first_stage(pixels))

    def change_vae(self, weights: Mapping[str, torch.Tensor]) -> None:
        inner = {f"inner.{name}": value for name, value in weights.items()}
        self.host.sd_vae.reload_vae_weights(self.host.sd_models.model_data.sd_model, inner)

    def seam(self) -> Any:
        return self.model.decode_first_stage

    def put_over(self, notes: list[str], *, chaining: bool) -> Any:
        model, covered = self.model, self.model.decode_first_stage

        def theirs(z: torch.Tensor) -> torch.Tensor:
            notes.append("theirs")
            return covered(z) if chaining else type(model).decode_first_stage(model, z)

        model.decode_first_stage = theirs
        return theirs

    def clear_seam(self) -> None:
        vars(self.model).pop("decode_first_stage", None)

    def places_in_the_model(self) -> dict[str, Mapping[str, Any]]:
        model = self.host.sd_models.model_data.sd_model
        held = {
            "model": model,
            "its class": type(model),
            "VAE": model.first_stage_model,
            "VAE's": type(model.first_stage_model),
        }
        return {name: vars(owner) for name, owner in held.items()}


class InpaintSd15(forge_standin.Sd15):
    """Forge looks at the masked picture for an inpainting model alone."""

    is_inpaint = True


class ForgeUi(Ui):
    adapter = forge.adapter
    standin = forge_standin

    def made(self, family: str) -> Any:
        kinds = {"sd1": InpaintSd15, "sdxl": forge_standin.Sdxl}
        return kinds[family](copy.deepcopy(self.vae))

    @property
    def module(self) -> torch.nn.Module:
        return self.host.activate().forge_objects.vae.first_stage_model

    @property
    def calls(self) -> list[str]:
        return self.module.calls

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.host.activate().decode_first_stage(latents)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.host.activate().encode_first_stage(pixels)

    def change_vae(self, weights: Mapping[str, torch.Tensor]) -> None:
        other = copy.deepcopy(self.vae)
        other.load_state_dict(dict(weights))
        self.host.change_vae(other)

    @property
    def _options(self) -> dict[str, Any]:
        return self.model.forge_objects.vae.patcher.model_options

    def seam(self) -> Any:
        return self._options.get("model_vae_decode_wrapper")

    def put_over(self, notes: list[str], *, chaining: bool) -> Any:
        covered = self.seam()

        def theirs(inner: Any, z: torch.Tensor) -> torch.Tensor:
            notes.append("theirs")
            return inner(z) if covered is None or not chaining else covered(inner, z)

        self.model.forge_objects.vae.patcher.set_model_vae_decode_wrapper(theirs)
        return theirs

    def clear_seam(self) -> None:
        self._options.pop("model_vae_decode_wrapper", None)

    def places_in_the_model(self) -> dict[str, Mapping[str, Any]]:
        model = self.host.activate()
        vae = model.forge_objects.vae
        held = {"model": model, "VAE": vae, "patcher": vae.patcher, "first stage": vae.first_stage_model}
        places: dict[str, Mapping[str, Any]] = {name: vars(owner) for name, owner in held.items()}
        places |= {f"class of {name}": vars(type(owner)) for name, owner in held.items()}
        return {**places, "patcher's options": vae.patcher.model_options}


class SdnextUi(Ui):
    adapter = sdnext.adapter
    standin = sdnext_standin

    def made(self, family: str) -> Any:
        kinds = {"sd1": sdnext_standin.StableDiffusionPipeline, "sdxl": sdnext_standin.StableDiffusionXLPipeline}
        vae = copy.deepcopy(self.vae)
        vae.register_to_config(scaling_factor=SCALES[family])
        vae.asked = sdnext_standin.calls_of(vae)
        return kinds[family](vae)

    @property
    def module(self) -> torch.nn.Module:
        return with_vae(self.host.modeldata.model_data.sd_model).vae

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
        other = self.made("sd1").vae
        other.load_state_dict(dict(weights))
        self.host.change_vae(other)

    def seam(self) -> Any:
        return AutoencoderKL.decode

    def put_over(self, notes: list[str], *, chaining: bool) -> Any:
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

    def places_in_the_model(self) -> dict[str, Mapping[str, Any]]:
        model = self.host.modeldata.model_data.sd_model
        return {"model": vars(model), "its class": vars(type(model)), "VAE": vars(self.module)}


UIS: dict[str, type[Ui]] = {"a1111": A1111Ui, "forge": ForgeUi, "sdnext": SdnextUi}


# --- ways to make pictures -----------------------------------------------------------------------------------------------


def source(count: int = 1, height: int = 32, width: int = 48) -> torch.Tensor:
    """One picture, ``count`` times, ``[count, 3, H, W]`` in [0, 1]."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3)).repeat(count, 1, 1, 1)


@dataclass(frozen=True)
class Way:
    """One kind of generation: how it is run, how many pictures it gives, and what an endpoint is asked."""

    run: Callable[[Any], Pictures]
    pictures: int
    requests: tuple[str, ...]


WAYS = {
    "txt2img": Way(lambda host: host.txt2img(), 1, ("/decode",)),
    "batch of 3": Way(lambda host: host.txt2img(batch=3), 3, ("/decode",)),
    "img2img": Way(lambda host: host.img2img(source()), 1, ("/encode", "/decode")),
    "img2img, batch of 3": Way(lambda host: host.img2img(source(3)), 3, ("/encode", "/decode")),
    "inpaint": Way(lambda host: host.inpaint(source()), 1, ("/encode", "/encode", "/decode")),
    "hires, latent": Way(lambda host: host.hires_latent()[0], 1, ("/decode",)),
    "hires, pixel": Way(lambda host: host.hires_pixel(), 1, ("/decode", "/encode", "/decode")),
}


@dataclass(frozen=True)
class Made:
    """What a generation gave: the pictures, the lines below them, and where the global generator was afterwards."""

    pictures: Pictures
    infotexts: list[str]
    rng: torch.Tensor


def make(ui: Ui, way: str) -> Made:
    """One generation, from a known state of the global generator."""
    torch.manual_seed(5)
    pictures = WAYS[way].run(ui.host)
    return Made(pictures, list(ui.host.infotexts), torch.get_rng_state())


def same(pictures: Pictures, others: Pictures) -> bool:
    return len(pictures) == len(others) and all(np.array_equal(a, b) for a, b in zip(pictures, others, strict=True))


def levels_apart(pictures: Pictures, others: Pictures) -> int:
    assert len(pictures) == len(others)
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(pictures, others, strict=True))


# --- endpoints -----------------------------------------------------------------------------------------------------------


class Endpoint(Chaos):
    """With one more ``mode``: "shape" answers with the bytes of a picture that lies on its side."""

    def _send(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        if self.mode == "shape" and handler.command == "POST":
            *head, high, wide = headers["shape"].strip("[]").split(", ")
            headers = {**headers, "shape": f"[{', '.join([*head, wide, high])}]"}
        super()._send(handler, status, headers, body)


class Without(ModuleType):
    """A module, or a class in it, that has all but one attribute."""

    def __init__(self, whole: Any, missing: str) -> None:
        super().__init__(whole.__name__)
        self._whole, self._missing = whole, missing

    def __getattr__(self, name: str) -> Any:
        if name == self._missing:
            raise AttributeError(name)
        return getattr(self._whole, name)


def without(whole: Any, path: str) -> Without:
    """``whole`` less the attribute at ``path``, such as "ModelPatcher.clone"."""
    name, _, rest = path.partition(".")
    if not rest:
        return Without(whole, name)
    proxy = Without(whole, "")
    setattr(proxy, name, without(getattr(whole, name), rest))
    return proxy


def hooks_in(function: Any) -> int:
    """How many of our hooks a call goes through."""
    count = 0
    while function is not None:
        count += hasattr(function, "remote_vae_adapter")
        function = getattr(function, "__wrapped__", None)
    return count
