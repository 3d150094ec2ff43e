"""What the stand-ins for the web UIs share: the seam that an extension meets, and nothing of the UI behind it.

Each has a small real VAE. There is no UNet: what it would make is drawn from a seed. What the hosts catch and print (errors in
callbacks and scripts) is let through, so that a test sees it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae.hosts.base import WebUi

SCRIPT = Path(__file__).parents[2] / "scripts" / "remote_vae_extension.py"
TITLE = "Remote VAE"
CPU = torch.device("cpu")
SCALES = {"sd1": 0.18215, "sdxl": 0.13025}
# As they are before any test has hooked them.
OWN = {op: vars(AutoencoderKL)[op] for op in ("decode", "encode")}
Pictures = list[np.ndarray]


def make_module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


# --- gradio, options and callbacks -------------------------------------------------------------------------------------


class Component:
    """A gradio component: takes the arguments named in ``takes``, those that all take, and no others."""

    takes: tuple[str, ...] = ()

    made: ClassVar[dict[str, Component]] = {}

    def __init__(self, value: Any = None, *, label: str = "", elem_id: str = "", info: str = "", **arguments: Any) -> None:
        assert set(arguments) <= set(self.takes), f"{type(self).__name__} takes none of {arguments}"
        self.value, self.label = value, label
        self.made[elem_id] = self

    def click(self, fn: Callable[..., Any], *, inputs: list[Any], outputs: list[Any], show_progress: str = "full") -> None:
        names = [each.label or type(each).__name__ for each in outputs]

        def press(*typed: Any) -> dict[str, Any]:
            made = fn(*typed)
            return dict(zip(names, [made] if len(names) == 1 else made, strict=True))

        self.press = press


class Accordion:
    """What components are put in. It is no argument of a script."""

    def __init__(self, label: str, *, open: bool = True, elem_id: str = "") -> None:  # noqa: A002
        self.label = label

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class Update(dict[str, Any]):
    """What changes a component in the browser."""


def gradio() -> ModuleType:
    takes = {
        "Checkbox": ("visible",),
        "Number": (),
        "Radio": ("choices",),
        "Textbox": ("max_lines", "visible"),
        "HTML": (),
        "Button": ("visible",),
    }
    kinds = {name: type(name, (Component,), {"takes": names}) for name, names in takes.items()}
    # Over the page, by what it says.
    shown: list[str] = []
    return make_module("gradio", Accordion=Accordion, update=Update, Warning=shown.append, shown=shown, **kinds)


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
        self.do_not_save = False

    def info(self, text: str) -> None:
        self.comment_after += f"<span class='info'>({text})</span>"


class Options:
    """``data`` is config.json: it may hold anything, and a key before its option is added. An unknown option raises."""

    def __init__(self, stores_defaults: bool = True, **data: Any) -> None:
        self.data: dict[str, Any] = data
        self.data_labels: dict[str, OptionInfo] = {}
        self._stores_defaults = stores_defaults

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        if self._stores_defaults and not info.do_not_save:
            self.data.setdefault(key, info.default)

    def set(self, key: str, value: Any, is_api: bool = False) -> bool:
        info = self.data_labels[key]
        if self.data.get(key) == value or (is_api and info.restrict_api):
            return False
        self.data[key] = value
        if info.onchange is not None:
            info.onchange()
        return True

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("data", {}):
            return self.data[name]
        if name in self.__dict__.get("data_labels", {}):
            return self.data_labels[name].default
        raise AttributeError(name)


EVENTS = ("app_started", "before_ui", "model_loaded", "script_unloaded", "ui_settings")


def script_callbacks() -> ModuleType:
    """``modules.script_callbacks``: ``fire`` is the host's own."""
    callbacks: dict[str, list[Callable[..., Any]]] = {event: [] for event in EVENTS}

    def fire(event: str, *arguments: Any) -> None:
        for callback in callbacks[event][:: -1 if event in ("script_unloaded", "before_ui") else 1]:
            callback(*arguments)

    adders = {f"on_{event}": callbacks[event].append for event in EVENTS}
    return make_module("modules.script_callbacks", callbacks=callbacks, fire=fire, **adders)


class Shared(ModuleType):
    """Reading ``sd_model`` or ``sd_refiner`` loads a model: the host's own business, which an extension must not set off."""

    reads = 0

    @property
    def sd_model(self) -> None:
        self.reads += 1

    sd_refiner = sd_model


# --- scripts -----------------------------------------------------------------------------------------------------------


class Script:
    infotext_fields: Any = ()

    def elem_id(self, item_id: str) -> str:
        return f"script_{item_id}"


class AxisOption:
    """One axis of the X/Y/Z plot: ``type`` makes a value of a text, ``apply(p, value, values)`` puts it into a request."""

    def __init__(self, label: str, type: Any, apply: Any, *, confirm: Any = None, choices: Any = None) -> None:  # noqa: A002
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


class ScriptRunner:
    """The AlwaysVisible scripts of one tab."""

    def __init__(self, scripts: ModuleType, is_img2img: bool, *, fills_up: bool) -> None:
        self._scripts: list[tuple[Any, list[Component]]] = []
        self._fills_up = fills_up
        for data in scripts.scripts_data:
            script = data.script_class() if data.script_class else None
            if script is not None and script.show(is_img2img) is scripts.AlwaysVisible:
                self._scripts.append((script, script.ui(is_img2img)))

    def before_process(self, p: Request) -> None:
        for script, controls in self._scripts:
            script.before_process(p, *self._arguments(p.alwayson.get(script.title()), [each.value for each in controls]))

    def _arguments(self, named: list[Any] | None, defaults: list[Any]) -> list[Any]:
        """What the API makes of a request. SD.Next passes on what was named: nothing is filled up and nothing cut off."""
        if named is None:
            return defaults
        return [*named, *defaults[len(named) :]][: len(defaults)] if self._fills_up else named

    def paste(self, params: dict[str, str]) -> dict[str, Any]:
        """What a pasted infotext sets, by the labels of the components. SD.Next takes nothing but updates."""
        updates = {field.label: act(params) for script, _ in self._scripts for field, act in script.infotext_fields}
        assert all(isinstance(update, Update) for update in updates.values())
        return {label: update["value"] for label, update in updates.items()}


# --- generations -------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """The ``p`` of a generation. ``image``: ``[N, 3, H, W]`` in [0, 1]."""

    seed: int = 1
    batch_size: int = 1
    n_iter: int = 1
    iteration: int = 0
    vae_type: str = "Full"
    image: torch.Tensor | None = None
    alwayson: dict[str, list[Any]] = field(default_factory=dict)
    extra_generation_params: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, int] = field(default_factory=dict)

    def comment(self, text: str) -> None:
        """A line under the picture, as A1111 and Forge have them."""
        self.comments[text] = 1

    def sampled(self, channels: int = 4, around: torch.Tensor | None = None) -> torch.Tensor:
        seed = self.seed + self.iteration * self.batch_size
        if around is None:
            return sampled(self.batch_size, seed, channels=channels)
        return around + sampled(len(around), seed, (around.shape[2], around.shape[3]), channels) * 0.1

    def infotext(self, index: int) -> str:
        params = {"Seed": self.seed + self.iteration * self.batch_size + index, **self.extra_generation_params}
        return ", ".join(f"{key}: {value}" for key, value in params.items())


class Processed(NamedTuple):
    """What a generation gives."""

    images: Pictures
    infotexts: list[str]


class State:
    """SD.Next's. With every job that begins, presses are forgotten."""

    interrupted = skipped = False
    textinfo: str | None = None

    def begin(self, job: str = "") -> None:
        self.interrupted = self.skipped = False
        self.textinfo = None

    def interrupt(self) -> None:
        self.interrupted = True

    def skip(self) -> None:
        self.skipped = True


class WebuiState(State):
    """Of A1111 and Forge."""

    stopping_generation = False

    def begin(self, job: str = "") -> None:
        super().begin(job)
        self.stopping_generation = False

    def stop_generating(self) -> None:
        self.stopping_generation = True


class Host:
    """A web UI with an SD 1 model. The extension is not in it before ``load_extension``.

    Each has, in its own way:
        made(family), load(model), swap_to(model), model: a model with a copy of the VAE, to be loaded, and the one in use.
        module, calls: the VAE of the model in use, and what was asked of it on this machine.
        decode(latents), encode(pixels): the calls that another extension makes, outside any generation.
        change_vae(weights): the user picks a VAE with these.
        seam(), clear_seam(): what stands in front of a decode of the model in use, and taking that away.
        put_over(notes, chaining): the hook of another extension, around what is there or, not ``chaining``, in its place.
        places_in_the_model(): where a hook could be left on the model in use.
        _single_sample_to_image, _encoded, _decoded: a preview; model latents of pictures in [0, 1]; the final decode.

    Attributes:
        alwayson, n_iter: go into every request from now on.
        infotexts: of the last generation.
        while_sampling: called where the sampler runs.
        within: called with ``p`` in each generation, before anything is encoded.
    """

    adapter: ClassVar[WebUi]
    # Whether arguments of scripts that a request does not name are filled up.
    fills_up = True
    make_state: ClassVar[type[State]] = WebuiState
    inference: ClassVar[Any] = torch.no_grad

    def __init__(self, vae: AutoencoderKL, data_path: Path) -> None:
        self.vae = vae
        self.alwayson: dict[str, list[Any]] = {}
        self.n_iter = 1
        self.infotexts: list[str] = []
        self.while_sampling: Callable[[], Any] = lambda: None
        self.within: Callable[[Request], Any] = lambda _: None
        self.opts, self.state = Options(show_progress_type="Full"), self.make_state()
        self.devices = make_module("modules.devices", dtype_vae=torch.float32, device=CPU)
        self.paths = make_module("modules.paths", data_path=str(data_path))
        self.call_queue = make_module("modules.call_queue", queue_lock=threading.Lock())
        self.script_callbacks = script_callbacks()
        self.processing = make_module("modules.processing", process_images_inner=self._process_images_inner)
        self.sd_samplers_common = make_module("modules.sd_samplers_common", single_sample_to_image=self._single_sample_to_image)
        self.scripts = make_module("modules.scripts", Script=Script, AlwaysVisible=object(), scripts_data=[])
        self.shared = Shared("modules.shared")
        vars(self.shared).update(opts=self.opts, state=self.state, OptionInfo=OptionInfo)
        self._load_plot()

    # --- what a user does -----------------------------------------------------------------------------------------------

    def _load_plot(self) -> None:
        axes = [AxisOption("Nothing", str, None), AxisOption("Seed", int, None)]
        plot = make_module("xyz_grid.py", AxisOption=AxisOption, axis_options=axes)
        self.scripts.scripts_data[:] = [SimpleNamespace(script_class=None, module=plot)]

    @property
    def axes(self) -> list[AxisOption]:
        axes: list[AxisOption] = self.scripts.scripts_data[0].module.axis_options
        return axes

    def load_extension(self) -> None:
        """Execute the script as a new module, as at the start, and register the Scripts that it names."""
        spec = importlib.util.spec_from_file_location(SCRIPT.name, SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = [each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, Script)]
        self.scripts.scripts_data += [SimpleNamespace(script_class=each, module=module) for each in found]

    def create_ui(self) -> None:
        self.script_callbacks.fire("before_ui")
        self.script_callbacks.fire("ui_settings")

    def reload_ui(self) -> None:
        self.script_callbacks.fire("script_unloaded")
        for callbacks in self.script_callbacks.callbacks.values():
            callbacks.clear()
        self._load_plot()
        self.load_extension()
        self.create_ui()

    def runner(self, is_img2img: bool = False) -> ScriptRunner:
        return ScriptRunner(self.scripts, is_img2img, fills_up=self.fills_up)

    def set_options(self, **values: Any) -> None:
        """Options of the extension, by their keys in options.toml."""
        self.opts.data.update({f"remotevae_{key}": value for key, value in values.items()})

    def turn_on(self, endpoint: str, **options: Any) -> None:
        """No pause after a failure, so that every request that an adapter would make is made."""
        values = {"enabled": True, "endpoint": endpoint, "transfer": "raw", "cooldown": 0.0, "first_byte_timeout": 20.0}
        self.set_options(**{**values, **options})

    def txt2img(self, batch: int = 1, seed: int = 1) -> Pictures:
        return self.generate(Request(seed, batch))

    def img2img(self, image: torch.Tensor) -> Pictures:
        return self.generate(Request(batch_size=len(image), image=image))

    def generate(self, p: Request) -> Pictures:
        """One press of Generate, through the API."""
        p.n_iter, p.alwayson = self.n_iter, self.alwayson
        self.runner(p.image is not None).before_process(p)
        pictures = self.process(p)
        self.comments = list(p.comments)
        return pictures

    def xyz(self, label: str, values: list[str]) -> list[Pictures]:
        """The pictures of each cell of a plot of one axis."""
        [axis] = [option for option in self.axes if option.label == label]
        axis.confirm(None, values)
        p, cells, infotexts = Request(alwayson=self.alwayson), [], []
        self.runner().before_process(p)
        for value in values:
            # The plot makes shallow copies: a dictionary of the request is one for all cells.
            cell = copy(p)
            axis.apply(cell, value, values)
            cells.append(self.process(cell))
            infotexts += self.infotexts
        self.infotexts = infotexts
        return cells

    def process(self, p: Request) -> Pictures:
        """A generation without the scripts of its tab, as a face detailer makes one."""
        self.state.begin()
        pictures, self.infotexts = self.processing.process_images_inner(p)
        return pictures

    def _process_images_inner(self, p: Request) -> Processed:
        """A1111's, and Forge's."""
        state = self.state
        self.within(p)
        pictures: Pictures = []
        infotexts: list[str] = []
        with self.inference():
            initial = None if p.image is None else self._encoded(p.image)
            for iteration in range(p.n_iter):
                p.iteration = iteration
                state.skipped = False
                if state.interrupted or state.stopping_generation:
                    break
                self.while_sampling()
                for index, pixels in enumerate(self._decoded(p.sampled(self._channels, initial))):
                    pictures.append(to_levels(pixels))
                    infotexts.append(p.infotext(index))
        return Processed(pictures, infotexts)

    @property
    def _channels(self) -> int:
        return 4

    def preview(self, latents: torch.Tensor) -> np.ndarray:
        """What a progress request shows while ``latents`` are being sampled."""
        shown: np.ndarray = self.sd_samplers_common.single_sample_to_image(latents[0])
        return shown

    # --- what a test sees -----------------------------------------------------------------------------------------------

    def modules(self) -> Iterator[ModuleType]:
        package = make_module("modules", __path__=[])
        for value in list(vars(self).values()):
            if isinstance(value, ModuleType):
                setattr(package, value.__name__.rpartition(".")[2], value)
                yield value
        yield package
        yield gradio()

    def callables(self) -> dict[str, Any]:
        """Every function wherever one of ours could be left."""
        places = [self.state, type(self.state), AutoencoderKL, *self.places_in_the_model()]
        places += [value for value in vars(self).values() if isinstance(value, ModuleType)]
        held = [(place, place if isinstance(place, dict) else vars(place)) for place in places]
        return {f"{id(place)}.{key}": value for place, values in held for key, value in values.items() if callable(value)}

    def records(self) -> list[Any]:
        return self.adapter.router.history.records()

    def routes(self) -> list[str]:
        return [f"{record.op} {record.route}" for record in self.records()]

    def details(self) -> list[str]:
        return [record.detail for record in self.records()]


def put_in_place(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """Put the host's modules where ``import`` finds them, for the time of a test."""
    for module in host.modules():
        monkeypatch.setitem(sys.modules, module.__name__, module)


# --- pictures and tensors ----------------------------------------------------------------------------------------------


def sampled(batch: int, seed: int, size: tuple[int, int] = (4, 6), channels: int = 4) -> torch.Tensor:
    """What a UNet would have made: model latents ``[batch, channels, h, w]``."""
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def source(count: int = 1, height: int = 32, width: int = 48) -> torch.Tensor:
    """One picture, ``count`` times, ``[count, 3, H, W]`` in [0, 1]."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3)).repeat(count, 1, 1, 1)


def to_levels(pixels: torch.Tensor) -> np.ndarray:
    """``[3, H, W]`` in [-1, 1] to uint8 ``[H, W, 3]``, cut off and not rounded."""
    unit = ((pixels.float() + 1.0) / 2.0).clamp(0.0, 1.0)
    return (255.0 * unit.movedim(0, -1).cpu().numpy()).astype(np.uint8)


def same(pictures: Pictures, others: Pictures) -> bool:
    return len(pictures) == len(others) and all(np.array_equal(a, b) for a, b in zip(pictures, others, strict=True))


def levels_apart(pictures: Pictures, others: Pictures) -> int:
    assert len(pictures) == len(others)
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(pictures, others, strict=True))


def hooks_in(function: Any) -> int:
    """How many of our hooks a call goes through."""
    count = 0
    while function is not None:
        count += hasattr(function, "remote_vae_adapter")
        function = getattr(function, "__wrapped__", None)
    return count


class DiagonalGaussianDistribution:
    """The posterior of ldm and of Forge, which draws from the CPU's global generator whatever the device."""

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def sample(self) -> torch.Tensor:
        return self.mean + self.std * torch.randn(self.mean.shape).to(self.parameters.device)

    def mode(self) -> torch.Tensor:
        return self.mean
