"""A stand-in for the modules of ComfyUI that a node pack meets: its VAE class, its jobs with their cache, its server.

The VAE's conversions, the cache by inputs, the context of a node and what Interrupt raises are ComfyUI's. There is no UNet:
latents are drawn from a seed.
"""

from __future__ import annotations

import contextvars
import copy
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Optional

import torch
from diffusers import AutoencoderKL
from torch import nn

from tests.hosts.standin import CPU, DiagonalGaussianDistribution, make_module

PACK = Path(__file__).parents[2]


class FirstStage(nn.Module):
    """ComfyUI's face of an AutoencoderKL. ``calls`` tells what was asked of it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.calls: list[str] = []
        own = vae.requires_grad_(False)
        self.encoder, self.decoder = own.encoder, own.decoder
        self.quant_conv, self.post_quant_conv = own.quant_conv, own.post_quant_conv

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append("encode")
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x))).mode()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        self.calls.append("decode")
        return self.decoder(self.post_quant_conv(z))


class ModelPatcher:
    def __init__(self, model: nn.Module, load_device: Any = CPU, offload_device: Any = CPU) -> None:
        self.model = model
        self.patches: dict[str, Any] = {}
        self.object_patches: dict[str, Any] = {}


class VAE:
    """Of 0.33. ``sd`` is a module here; an empty one leaves the object as ComfyUI does where it finds no weights."""

    def __init__(self, sd: Any = None) -> None:
        self.downscale_ratio: Any = 8
        self.upscale_ratio: Any = 8
        self.latent_channels, self.latent_dim, self.output_channels = 4, 2, 3
        self.not_video, self.crop_input, self.disable_offload = False, True, False
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.memory_used_decode = self.memory_used_encode = lambda shape, dtype: 1
        self.first_stage_model = None
        if not sd:
            return
        self.first_stage_model = sd.eval()
        self.device = self.output_device = CPU
        self.vae_dtype = torch.float32
        self.patcher = ModelPatcher(sd)

    def throw_exception_if_invalid(self) -> None:
        if self.first_stage_model is None:
            raise RuntimeError("ERROR: VAE is invalid: None")

    def vae_output_dtype(self) -> torch.dtype:
        return torch.float32

    def vae_encode_crop_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        ratio = self.downscale_ratio
        ratio = ratio[-1] if isinstance(ratio, tuple) else ratio
        for dim in (1, 2):
            size = pixels.shape[dim] // ratio * ratio
            pixels = pixels.narrow(dim, pixels.shape[dim] % ratio // 2, size)
        return pixels[..., : self.output_channels]

    def _load(self) -> None:
        sys.modules["comfy.model_management"].load_models_gpu([self.patcher], memory_required=1)

    def decode(self, samples_in: torch.Tensor, vae_options: Any = {}) -> torch.Tensor:  # noqa: B006  # ComfyUI's own
        self.throw_exception_if_invalid()
        try:
            self._load()
            pixels = self.process_output(self.first_stage_model.decode(samples_in.to(self.vae_dtype)))
        except torch.cuda.OutOfMemoryError:
            pixels = self.decode_tiled_(samples_in)
        return pixels.movedim(1, -1)

    def decode_tiled(self, samples: torch.Tensor, **tiles: Any) -> torch.Tensor:
        self._load()
        return self.decode_tiled_(samples).movedim(1, -1)

    def decode_tiled_(self, samples: torch.Tensor) -> torch.Tensor:
        """Two tiles that know nothing of each other."""
        halves = samples.chunk(2, dim=-1)
        return self.process_output(torch.cat([self.first_stage_model.decode(each.contiguous()) for each in halves], dim=-1))

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        self.throw_exception_if_invalid()
        self._load()
        pixels = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)
        return self.first_stage_model.encode(self.process_input(pixels).to(self.vae_dtype))

    def encode_tiled(self, pixel_samples: torch.Tensor, **tiles: Any) -> torch.Tensor:
        return self.encode(pixel_samples)

    def get_sd(self) -> Any:
        return self.first_stage_model.state_dict()

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio if isinstance(self.upscale_ratio, int) else self.upscale_ratio[-1]


OWN = {name: vars(VAE)[name] for name in ("decode", "encode", "decode_tiled", "encode_tiled")}


# --- nodes and jobs ------------------------------------------------------------------------------------------------------


class Node:
    """One of ComfyUI's own: what it does is a function of its inputs."""

    FUNCTION = "run"
    hidden: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}, "hidden": {name: name.upper() for name in cls.hidden}}


class LoadVae(Node):
    vae: ClassVar[Any] = None

    def run(self, name: str) -> tuple[Any]:
        return (self.vae,)


class EmptyLatent(Node):
    def run(self, seed: int, batch: int) -> tuple[Any]:
        return ({"samples": torch.randn(batch, 4, 4, 6, generator=torch.Generator().manual_seed(seed)) * 5},)


class VaeDecode(Node):
    def run(self, samples: Any, vae: Any) -> tuple[Any]:
        return (vae.decode(samples["samples"]),)


class SaveImage(Node):
    """``metadata`` is what it would write into the picture, ``images`` the picture."""

    hidden = ("extra_pnginfo",)

    def run(self, images: torch.Tensor, name: str, extra_pnginfo: Any = None) -> dict[str, Any]:
        metadata = None if extra_pnginfo is None else {key: json.dumps(value) for key, value in extra_pnginfo.items()}
        return {"ui": {}, "result": (images, metadata)}


class Context(NamedTuple):
    prompt_id: str
    node_id: str
    list_index: Optional[int] = None


_context: contextvars.ContextVar[Optional[Context]] = contextvars.ContextVar("context", default=None)


class PromptExecutor:
    """Runs a graph; a node whose inputs are the same as before is not run again."""

    def __init__(self, nodes: dict[str, Any]) -> None:
        self.nodes = nodes
        self.cache: dict[str, Any] = {}

    def execute(self, prompt: Any, prompt_id: str, extra_data: Any = {}, execute_outputs: Any = ()) -> dict[str, Any]:  # noqa: B006
        return {name: self._output(name, prompt, prompt_id, extra_data) for name in execute_outputs}

    def _output(self, name: str, prompt: Any, prompt_id: str, extra_data: Any) -> Any:
        node = prompt[name]
        key = json.dumps(self._key(name, prompt), sort_keys=True)
        if key in self.cache:
            return self.cache[key]
        inputs = {
            each: self._output(value[0], prompt, prompt_id, extra_data)[value[1]] if isinstance(value, list) else value
            for each, value in node["inputs"].items()
        }
        kind = self.nodes[node["class_type"]]
        hidden = {"UNIQUE_ID": name, "EXTRA_PNGINFO": extra_data.get("extra_pnginfo")}
        for each, what in kind.INPUT_TYPES().get("hidden", {}).items():
            inputs[each] = hidden[what]
        token = _context.set(Context(prompt_id, name))
        try:
            made = getattr(kind(), kind.FUNCTION)(**inputs)
        finally:
            _context.reset(token)
        self.cache[key] = made["result"] if isinstance(made, dict) else made
        return self.cache[key]

    def _key(self, name: str, prompt: Any) -> Any:
        kind = self.nodes[prompt[name]["class_type"]]
        changed = kind.IS_CHANGED(**prompt[name]["inputs"]) if hasattr(kind, "IS_CHANGED") else ""
        inputs = prompt[name]["inputs"]
        links = {key: self._key(value[0], prompt) for key, value in inputs.items() if isinstance(value, list)}
        return [prompt[name]["class_type"], changed, {key: value for key, value in inputs.items() if key not in links}, links]


_EXECUTE = PromptExecutor.execute


# --- the whole of it -----------------------------------------------------------------------------------------------------


class ComfyHost:
    """``vae`` is what LoadVae loads, ``brought`` the patchers that were brought to their device."""

    def __init__(self, vae: AutoencoderKL, folder: Path, *, interrupt: type[BaseException] = BaseException) -> None:
        self.folder = folder
        self.brought: list[ModelPatcher] = []
        self.is_interrupted = False
        self.interrupt_class = type("InterruptProcessingException", (interrupt,), {})
        # What was shown on nodes, and to whom.
        self.texts: list[tuple[str, str, str | None]] = []
        self.routes: dict[str, Callable[..., Any]] = {}
        self.vae = VAE(FirstStage(copy.deepcopy(vae)))
        self.server = SimpleNamespace(
            client_id="me",
            routes=SimpleNamespace(get=self._route("GET"), post=self._route("POST")),
            send_progress_text=lambda text, node, sid=None: self.texts.append((text, node, sid)),
        )
        LoadVae.vae = self.vae
        self.nodes: dict[str, Any] = {
            "VAELoader": LoadVae,
            "EmptyLatentImage": EmptyLatent,
            "VAEDecode": VaeDecode,
            "SaveImage": SaveImage,
        }
        self.executor = PromptExecutor(self.nodes)
        self.pack: ModuleType | None = None
        self._jobs = 0

    def _route(self, method: str) -> Callable[[str], Callable[..., Any]]:
        def at(path: str) -> Callable[..., Any]:
            def keep(handler: Callable[..., Any]) -> Callable[..., Any]:
                self.routes[f"{method} {path}"] = handler
                return handler

            return keep

        return at

    def modules(self) -> Iterator[ModuleType]:
        management = make_module(
            "comfy.model_management",
            InterruptProcessingException=self.interrupt_class,
            processing_interrupted=lambda: self.is_interrupted,
            throw_exception_if_processing_interrupted=self.throw_if_interrupted,
            intermediate_device=lambda: CPU,
            load_models_gpu=lambda models, **_: self.brought.extend(models),
        )
        sd = make_module("comfy.sd", VAE=VAE)
        patcher = make_module("comfy.model_patcher", ModelPatcher=ModelPatcher)
        yield make_module("comfy", __path__=[], model_management=management, sd=sd, model_patcher=patcher)
        yield from (management, sd, patcher)
        utils = make_module("comfy_execution.utils", get_executing_context=_context.get)
        yield make_module("comfy_execution", __path__=[], utils=utils)
        yield utils
        yield make_module("execution", PromptExecutor=PromptExecutor)
        yield make_module(
            "folder_paths",
            get_output_directory=lambda: str(self.folder / "output"),
            get_user_directory=lambda: str(self.folder / "user"),
        )
        yield make_module("server", PromptServer=SimpleNamespace(instance=self.server))
        yield make_module("comfyui_version", __version__="0.33.0")
        yield make_module("aiohttp", web=SimpleNamespace(json_response=lambda value: value))

    def throw_if_interrupted(self) -> None:
        if self.is_interrupted:
            self.is_interrupted = False
            raise self.interrupt_class

    def load_pack(self) -> ModuleType:
        """As ComfyUI does: the file, by a name that is its folder."""
        name = str(PACK).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        pack = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        self.nodes.update(pack.NODE_CLASS_MAPPINGS)
        self.pack = pack
        return pack

    def settings(self, **values: object) -> None:
        """What the user changes in the page."""
        path = self.folder / "user" / "default" / "comfy.settings.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(path.read_text()) if path.exists() else {"Comfy.ColorPalette": "dark"}
        path.write_text(json.dumps({**stored, **{f"RemoteVAE.{key}": value for key, value in values.items()}}))

    def run(self, graph: dict[str, Any], output: str, extra: Any = None) -> Any:
        """The outputs of one node of a job."""
        self._jobs += 1
        data = {} if extra is None else {"extra_pnginfo": extra}
        prompt = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}
        return self.executor.execute(prompt, f"job {self._jobs}", data, [output])[output]

    def clear_seam(self) -> None:
        for name, function in OWN.items():
            setattr(VAE, name, function)
        PromptExecutor.execute = _EXECUTE  # type: ignore[method-assign]
