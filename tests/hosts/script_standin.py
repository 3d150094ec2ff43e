"""What a script of an extension meets in every host: gradio's widgets, ``modules.scripts``, and the X/Y/Z plot."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fastapi import HTTPException

SCRIPT = Path(__file__).parents[2] / "scripts" / "remote_vae_extension.py"


def make_module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


class HostModule(ModuleType):
    """A module of the host. Its methods find each other through the module, where others may have put something else."""

    def __init__(self, name: str, host: Any) -> None:
        super().__init__(name)
        self.host = host


# --- gradio ------------------------------------------------------------------------------------------------------------


class Component:
    """A gradio component: takes the arguments named in ``takes``, those that all components take, and no others."""

    takes: tuple[str, ...] = ()
    all_take = ("elem_id", "elem_classes", "info", "interactive", "visible")

    def __init__(self, *, value: Any = None, label: str = "", **arguments: Any) -> None:
        unknown = set(arguments) - {*self.takes, *self.all_take}
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}")
        self.value, self.label = value, label
        vars(self).update(arguments)


class Checkbox(Component):
    pass


class Dropdown(Component):
    takes = ("choices", "multiselect", "type")


class Radio(Component):
    takes = ("choices",)


class Number(Component):
    takes = ("minimum", "maximum", "step", "precision")


class Textbox(Component):
    takes = ("lines", "max_lines", "placeholder")


class Block:
    """What components are put in. It has no value, and is no argument of a script."""

    takes: tuple[str, ...] = ("elem_id", "visible")

    def __init__(self, **arguments: Any) -> None:
        unknown = set(arguments) - set(self.takes)
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Accordion(Block):
    takes = ("elem_id", "open", "visible")

    def __init__(self, label: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.label = label


class Row(Block):
    pass


class Update(dict[str, Any]):
    """What changes a component in the browser."""


def paste(runner: ScriptRunner, params: dict[str, str]) -> dict[str, Any]:
    """What a pasted infotext sets, by the labels of the components. All hosts take updates; SD.Next takes nothing else."""
    values = {}
    for component, key in runner.infotext_fields:
        update = key(params) if callable(key) else Update(value=params.get(key))
        assert isinstance(update, Update), f"SD.Next fails on {update!r}, and no field is restored"
        values[component.label] = update["value"]
    return values


def gradio() -> ModuleType:
    kinds = (Accordion, Checkbox, Dropdown, Number, Radio, Row, Textbox)
    # Over the page, by what it says.
    shown: list[str] = []
    return make_module("gradio", update=Update, Warning=shown.append, shown=shown, **{kind.__name__: kind for kind in kinds})


# --- scripts -----------------------------------------------------------------------------------------------------------


class ScriptClassData(NamedTuple):
    script_class: type
    path: str
    basedir: str
    module: ModuleType


class Script:
    name: str | None = None
    filename: str | None = None
    args_from: int | None = None
    args_to: int | None = None
    alwayson = False
    is_txt2img = False
    is_img2img = False
    infotext_fields: list[Any] | None = None
    paste_field_names: list[str] | None = None

    def title(self) -> str:
        raise NotImplementedError

    def ui(self, is_img2img: bool) -> Any:
        pass

    def show(self, is_img2img: bool) -> Any:
        return True

    def before_process(self, p: Any, *args: Any) -> None:
        pass

    def process(self, p: Any, *args: Any) -> None:
        pass

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        pass

    def elem_id(self, item_id: str) -> str:
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{item_id}"


class ScriptRunner:
    """The AlwaysVisible scripts of one tab, and where the arguments of each are."""

    def __init__(self, scripts: Any, is_img2img: bool, leaves_out: Callable[[Script], bool] = lambda _: False) -> None:
        self.alwayson_scripts: list[Script] = []
        self.inputs: list[Any] = [None]
        self.infotext_fields: list[Any] = []
        for data in scripts.scripts_data:
            script = data.script_class()
            script.filename, script.is_img2img, script.is_txt2img = data.path, is_img2img, not is_img2img
            if script.show(is_img2img) is scripts.AlwaysVisible and not leaves_out(script):
                script.alwayson = True
                self.alwayson_scripts.append(script)
                self._make_ui(script)

    def _make_ui(self, script: Script) -> None:
        script.args_from = script.args_to = len(self.inputs)
        controls = script.ui(script.is_img2img)
        if controls is None:
            return
        assert all(isinstance(control, Component) for control in controls), f"{script.title()}: not a component"
        script.name = script.title().lower()
        self.infotext_fields += script.infotext_fields or []
        self.inputs += controls
        script.args_to = len(self.inputs)

    def find(self, title: str) -> Script:
        """As the API does: in any case, and an unknown name is refused."""
        for script in self.alwayson_scripts:
            if script.title().lower() == title.lower():
                return script
        raise HTTPException(422, f"always on script {title} not found")

    def script_args(self, alwayson: dict[str, list[Any]]) -> list[Any]:
        """What the API makes of a request: the defaults of the UI, and over them what is named."""
        args = [getattr(control, "value", None) for control in self.inputs]
        args[0] = 0
        for script in self.alwayson_scripts:
            # The API asks for the UI once more.
            controls = script.ui(script.is_img2img) or []
            args[script.args_from : script.args_to] = [control.value for control in controls]
        for title, named in alwayson.items():
            script = self.find(title)
            start, end = script.args_from or 0, script.args_to or 0
            taken = named[: end - start]
            args[start : start + len(taken)] = taken
        return args

    def args_of(self, p: Any, script: Script) -> list[Any]:
        return p.script_args[script.args_from : script.args_to]

    def before_process(self, p: Any) -> None:
        for script in self.alwayson_scripts:
            script.before_process(p, *self.args_of(p, script))

    def process(self, p: Any) -> None:
        for script in self.alwayson_scripts:
            script.process(p, *self.args_of(p, script))

    def postprocess(self, p: Any, processed: Any) -> None:
        for script in self.alwayson_scripts:
            script.postprocess(p, processed, *self.args_of(p, script))


class Scripts(HostModule):
    """``modules.scripts``: loads the scripts of the host, which here are the X/Y/Z plot, and that of the extension."""

    Script = Script
    ScriptRunner = ScriptRunner
    ScriptClassData = ScriptClassData
    AlwaysVisible = object()

    def __init__(self, name: str, host: Any) -> None:
        super().__init__(name, host)
        self.scripts_data: list[Any] = []
        self.scripts_txt2img: ScriptRunner | None = None
        self.scripts_img2img: ScriptRunner | None = None
        self.load_builtin_scripts()

    def load_builtin_scripts(self) -> None:
        self.scripts_data.clear()
        # The same list object may be known to somebody.
        self.scripts_data += [self.data_of(module) for module in self.host.xyz_modules()]

    def data_of(self, module: ModuleType) -> Any:
        return ScriptClassData(module.Script, f"scripts/{module.__name__}", "scripts", module)

    def load_extension(self) -> None:
        """Execute the extension's script as a new module, as at the start, and register the Scripts that it names."""
        spec = importlib.util.spec_from_file_location(SCRIPT.name, SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for member in vars(module).values():
            if self.registers(member) and issubclass(member, Script):
                self.scripts_data.append(ScriptClassData(member, str(SCRIPT), str(SCRIPT.parents[1]), module))

    def registers(self, member: Any) -> bool:
        return inspect.isclass(member)

    def create_ui(self) -> None:
        self.scripts_txt2img = ScriptRunner(self, is_img2img=False)
        self.scripts_img2img = ScriptRunner(self, is_img2img=True)


class AxisOption:
    """One axis of the X/Y/Z plot: ``type`` makes a value of a text, ``apply(p, value, values)`` puts it into a request."""

    def __init__(
        self,
        label: str,
        type: Callable[[str], Any],  # noqa: A002
        apply: Callable[[Any, Any, Any], None],
        format_value: Callable[[Any, Any, Any], str] = lambda p, opt, x: f"{opt.label}: {x}",
        confirm: Callable[[Any, Any], None] | None = None,
        cost: float = 0.0,
        choices: Callable[[], list[str]] | None = None,
        prepare: Any = None,
    ) -> None:
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices, self.prepare = confirm, cost, choices, prepare


def xyz_module(name: str, options: list[Any], axis_option: type = AxisOption) -> ModuleType:
    """A module as the file ``name`` makes it: with a Script, whose ``__module__`` is the name of the file."""
    script = type("Script", (Script,), {"__module__": name, "title": lambda _: "X/Y/Z plot"})
    return make_module(name, Script=script, AxisOption=axis_option, axis_options=options)


def set_seed(p: Any, value: Any, values: Any) -> None:
    p.seed = value
