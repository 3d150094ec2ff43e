"""What the stand-ins for the hosts have in common: options, callbacks, a request, and a Host's face.

Forge and SD.Next grew out of AUTOMATIC1111, and an extension meets the same shapes in all three. What differs is in the
stand-in of each. What the hosts catch and print (errors in callbacks and scripts) is let through, so that a test sees it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hosts.script_standin import AxisOption, ScriptRunner, gradio, make_module, set_seed, xyz_module

PREFIX = "remotevae_"
Pictures = list[np.ndarray]


# --- options and callbacks ---------------------------------------------------------------------------------------------


class OptionInfo:
    """A1111's, and Forge's."""

    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        onchange: Callable[[], Any] | None = None,
        section: Any = None,
        restrict_api: bool = False,
    ) -> None:
        self.default, self.label, self.component, self.section = default, label, component, section
        self.component_args, self.onchange, self.restrict_api = component_args, onchange, restrict_api
        self.comment_after = ""

    def info(self, text: str) -> OptionInfo:
        self.comment_after += f"<span class='info'>({text})</span>"
        return self


class Options:
    """A1111's, and Forge's. ``data`` is config.json: it may hold anything, and a key before its option is added."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.data_labels: dict[str, OptionInfo] = {}

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def set(self, key: str, value: Any, is_api: bool = False, run_callbacks: bool = True) -> bool:
        if self.data.get(key) == value:
            return False
        if key not in self.data and key not in self.data_labels:
            raise KeyError(key)
        info = self.data_labels.get(key)
        if info is not None and is_api and info.restrict_api:
            return False
        self.data[key] = value
        if info is not None and run_callbacks and info.onchange is not None:
            info.onchange()
        return True

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("data", {})
        if name in values:
            return values[name]
        raise AttributeError(f"'Options' object has no attribute '{name}'")


# The events in which an extension may register, of those that these stand-ins fire, and the order in which they do.
EVENTS = ("app_started", "before_ui", "infotext_pasted", "model_loaded", "script_unloaded", "ui_settings")


def script_callbacks(takes_name: bool = True, more_events: tuple[str, ...] = ()) -> ModuleType:
    """``modules.script_callbacks``. SD.Next's ``on_…`` take no ``name``."""
    lists: dict[str, list[Callable[..., Any]]] = {"ui_settings": [], "model_loaded": [], "script_unloaded": []}

    def adder(event: str) -> Callable[..., None]:
        def add(callback: Callable[..., Any]) -> None:
            lists.setdefault(event, []).append(callback)

        def add_named(callback: Callable[..., Any], *, name: str | None = None) -> None:
            add(callback)

        return add_named if takes_name else add

    def firer(event: str) -> Callable[..., None]:
        def fire(*arguments: Any) -> None:
            callbacks = list(lists.get(event, ()))
            for callback in reversed(callbacks) if event in ("script_unloaded", "before_ui") else callbacks:
                callback(*arguments)

        return fire

    def clear_callbacks() -> None:
        for callbacks in lists.values():
            callbacks.clear()

    contents: dict[str, Any] = {"callbacks": lists, "clear_callbacks": clear_callbacks}
    for event in (*EVENTS, *more_events):
        contents |= {f"on_{event}": adder(event), f"{event}_callback": firer(event)}
    return make_module("modules.script_callbacks", **contents)


# --- requests ----------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """The ``p`` of a generation. ``begin`` makes ready what is sampled from, ``sample`` is the sampler and what follows it."""

    sample: Callable[[Request], Any]
    begin: Callable[[Request], Any] = lambda _: None
    seed: int = 1
    batch_size: int = 1
    n_iter: int = 1
    iteration: int = 0
    init_images: list[Any] = field(default_factory=list)
    extra_generation_params: dict[str, Any] = field(default_factory=dict)
    override_settings: dict[str, Any] = field(default_factory=dict)
    override_settings_restore_afterwards: bool = True
    scripts: Any = None
    script_args: list[Any] = field(default_factory=list)
    per_script_args: dict[str, list[Any]] = field(default_factory=dict)
    sd_model: Any = None
    init_latent: Any = None

    @property
    def seed_now(self) -> int:
        return self.seed + self.iteration * self.batch_size


@dataclass
class Processed:
    images: list[Any]
    infotexts: list[str]


def infotext_of(p: Request, index: int) -> str:
    """The line below a picture; a list has a value for each picture, and a function is called."""
    params = {"Seed": p.seed_now + index, **p.extra_generation_params}
    for key, value in params.items():
        if isinstance(value, list):
            params[key] = value[index]
        elif callable(value):
            params[key] = value(p=p, index=index)
    return ", ".join(key if key == value else f"{key}: {value}" for key, value in params.items() if value is not None)


class WebuiState:
    """Of A1111 and Forge. Interrupt and Skip are forgotten when the next job begins."""

    interrupted = False
    skipped = False
    stopping_generation = False
    job = ""
    job_count = 0
    sampling_step = 0
    current_latent: torch.Tensor | None = None
    current_image: Image.Image | None = None
    textinfo: str | None = None

    def begin(self, job: str = "(unknown)") -> None:
        self.job, self.job_count = job, -1
        self.current_latent = self.current_image = self.textinfo = None
        self.interrupted = self.skipped = self.stopping_generation = False

    def end(self) -> None:
        self.job, self.job_count = "", 0

    def interrupt(self) -> None:
        self.interrupted = True

    def skip(self) -> None:
        self.skipped = True

    def stop_generating(self) -> None:
        self.stopping_generation = True

    def assign_current_image(self, image: Image.Image) -> None:
        self.current_image = image


class WebuiHost:
    """The modules, and what a user does with them.

    ``offences``: what an extension must not do and did. ``alwayson``, ``override_settings`` and ``n_iter`` go into every
    request from now on; ``infotexts`` and ``last`` are those of the last generation, ``last`` being its ``p``.
    A press of Interrupt or Skip before a generation stands for one while it samples: the flags are up from there on.
    """

    axis_option: ClassVar[type] = AxisOption

    def __init__(self) -> None:
        self.offences: list[str] = []
        self.loads = 0
        self.n_iter = 1
        self.alwayson: dict[str, list[Any]] = {}
        self.override_settings: dict[str, Any] = {}
        self.infotexts: list[str] = []
        self.last: Any = None
        self._pressed = (False, False)

    def modules(self) -> Iterator[ModuleType | tuple[str, None]]:
        """Every module, and the names of those that are really missing."""
        package = make_module("modules", __path__=[])
        for value in vars(self).values():
            if isinstance(value, ModuleType) and value.__name__.startswith("modules."):
                setattr(package, value.__name__.rpartition(".")[2], value)
                yield value
        call_queue = make_module("modules.call_queue", queue_lock=threading.Lock())
        package.call_queue = call_queue
        yield call_queue
        yield package
        yield gradio()

    def xyz_modules(self) -> list[ModuleType]:
        axes = [self.axis_option("Nothing", str, lambda p, x, xs: None), self.axis_option("Seed", int, set_seed)]
        return [xyz_module("xyz_grid.py", axes, self.axis_option)]

    def set_options(self, **values: Any) -> None:
        """Options of the extension, by their keys in options.toml."""
        self.opts.data.update({PREFIX + key: value for key, value in values.items()})

    def load_extension(self) -> None:
        """Execute the script as a new module, as at the start."""
        self.scripts.load_extension()
        self.scripts.scripts_txt2img = None

    def create_ui(self) -> None:
        """As the host does after its scripts are loaded; done by the first generation where nobody did it before."""
        self.script_callbacks.before_ui_callback()
        self.script_callbacks.ui_settings_callback()
        self.scripts.create_ui()

    def reload_ui(self) -> None:
        self.script_callbacks.script_unloaded_callback()
        self.script_callbacks.clear_callbacks()
        self.scripts.load_builtin_scripts()
        self.load_extension()
        self.create_ui()

    def xyz(self, label: str, values: list[str], batch: int = 1, seed: int = 1) -> list[Pictures]:
        """The pictures of each cell of a plot of one axis, looked up by its label among the axes of the plot."""
        [axis] = [option for option in self.scripts.scripts_data[0].module.axis_options if option.label == label]
        typed = [axis.type(value) for value in values]
        if axis.confirm:
            axis.confirm(None, typed)
        request, cells, infotexts = self.txt2img_request(batch, seed), [], []
        self._make_ready(request, is_img2img=False)
        for value in typed:
            # The plot makes shallow copies: a dictionary of the request is one for all cells.
            cell = copy(request)
            axis.apply(cell, value, typed)
            cells.append(self._process(cell))
            infotexts += self.infotexts
        self.infotexts = infotexts
        return cells

    def txt2img_request(self, batch: int, seed: int) -> Request:
        raise NotImplementedError

    def txt2img(self, batch: int = 1, seed: int = 1) -> Pictures:
        return self.generate(self.txt2img_request(batch, seed))

    def generate(self, request: Request, is_img2img: bool = False) -> Pictures:
        """One press of Generate, through the API."""
        self._make_ready(request, is_img2img)
        return self._process(request)

    def _make_ready(self, request: Request, is_img2img: bool) -> None:
        runner = self.runner(is_img2img)
        request.scripts, request.n_iter = runner, self.n_iter
        request.script_args = runner.script_args(self.alwayson)
        request.override_settings = dict(self.override_settings)
        self.fill_in(request)

    def _process(self, request: Request) -> Pictures:
        self.last, self.infotexts = request, []
        self._pressed = self.state.interrupted, self.state.skipped
        job = self.state.begin("scripts_txt2img")
        try:
            processed = self.processing.process_images(request)
        finally:
            self.state.end(*([job] if job else []))
        assert processed is not None, "the model is not loaded"
        self.infotexts = processed.infotexts
        return [np.asarray(image) for image in processed.images]

    def runner(self, is_img2img: bool) -> ScriptRunner:
        if self.scripts.scripts_txt2img is None:
            self.create_ui()
        return self.scripts.scripts_img2img if is_img2img else self.scripts.scripts_txt2img

    def fill_in(self, request: Request) -> None:
        """What a host adds to its request."""

    def sampling(self) -> None:
        """Called where the sampler runs: the user has pressed what they pressed."""
        interrupted, skipped = self._pressed
        if interrupted:
            self.state.interrupted = True
        if skipped:
            self.state.skipped = True


def put_in_place(monkeypatch: pytest.MonkeyPatch, host: Any) -> Any:
    """Put the host's modules where ``import`` finds them, for the time of a test."""
    for module in host.modules():
        name, found = module if isinstance(module, tuple) else (module.__name__, module)
        monkeypatch.setitem(sys.modules, name, found)
    return host


def sampled(batch: int, seed: int, size: tuple[int, int] = (4, 6), channels: int = 4) -> torch.Tensor:
    """What a UNet would have made: model latents ``[batch, channels, h, w]``."""
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def to_levels(unit: torch.Tensor) -> np.ndarray:
    """``[3, H, W]`` in [0, 1] to uint8 ``[H, W, 3]``, cut off and not rounded."""
    return (255.0 * np.moveaxis(unit.cpu().numpy(), 0, 2)).astype(np.uint8)


def enlarged(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 2, image.height * 2))


def to_unit(images: list[Image.Image]) -> torch.Tensor:
    """Pictures to ``[N, 3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255.0).movedim(-1, 1)


def to_images(unit: torch.Tensor) -> list[Image.Image]:
    """``[N, 3, H, W]`` in [0, 1] to the pictures that a user gave."""
    return [Image.fromarray(picture) for picture in (unit * 255).round().byte().movedim(1, -1).cpu().numpy()]


def out_of_memory() -> Exception:
    kind = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    return kind("CUDA out of memory. Tried to allocate 2.00 GiB.")


class DiagonalGaussianDistribution:
    """The posterior of ldm and of Forge, which draws from the CPU's global generator whatever the device."""

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
