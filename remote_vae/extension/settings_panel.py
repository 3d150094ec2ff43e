"""The section "Remote VAE" of the host's settings, made from options.toml: what everybody needs, a test, and the rest."""

from __future__ import annotations

import html
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from remote_vae.diagnosis import diagnosis
from remote_vae.errors import SettingsError
from remote_vae.extension.commands import server_commands
from remote_vae.extension.language import language, say
from remote_vae.extension.state_line import state_line
from remote_vae.hosts.base import PREFIX, WebUi, warn
from remote_vae.settings import Option, Settings, load_options
from remote_vae.vae.at_work import VaeAtWork

log = logging.getLogger("remote_vae")

SECTION = ("remote_vae", "Remote VAE")
# Options of ours that are none: places for text and a button. SD.Next stores no option with this value.
_PLACE = "dummy"


def add_options(adapter: WebUi) -> None:
    """Add every option to the host's settings. Called by the host in on_ui_settings, again after Reload UI."""
    _add_place("purpose", partial(_text, f"<p>{html.escape(say('purpose'))}</p>"))
    first = True
    for name, options in groupby(load_options(language()).values(), lambda option: option.group):
        if not first:
            _add_place(name, partial(_text, f"<h4>{html.escape(name)}</h4>"))
        for option in options:
            _add_option(option)
            _mend(option)
        if first:
            _add_place("test", partial(_test, adapter))
            _add_place("advanced", partial(_text, f"<h3>{say('advanced')}</h3><p>{say('untouched')}</p>"))
        first = False
    _explain()


def restrict_options() -> None:
    """Keep the restricted options from requests of the host's API where the host has a list of such and no ``restrict_api``."""
    from modules import shared

    if not _restricts(shared):
        refused: set[str] = getattr(shared, "restricted_opts", set())
        refused.update(PREFIX + option.key for option in load_options().values() if option.restricted)


def _add_option(option: Option) -> None:
    from modules import shared

    component, arguments = _component(option)
    label = f"{option.label} ({option.unit})" if option.unit else option.label
    more = {"restrict_api": True} if option.restricted and _restricts(shared) else {}
    info = shared.OptionInfo(
        option.default, label, component, arguments, onchange=partial(_changed, option), section=SECTION, **more
    )
    shared.opts.add_option(PREFIX + option.key, info)


def _add_place(name: str, component: Callable[..., Any]) -> None:
    """Where the page has something else than an option: ``component`` makes it."""
    from modules import shared

    key = PREFIX + "page_" + "".join(letter if letter.isalnum() else "_" for letter in name.lower())
    info = shared.OptionInfo(_PLACE, "", component, {}, section=SECTION)
    info.do_not_save = True
    shared.opts.add_option(key, info)


def _text(text: str, **arguments: Any) -> Any:
    import gradio as gr

    gr.HTML(text)
    return _stored(arguments)


def _stored(arguments: dict[str, Any]) -> Any:
    """What the host stores in the place of an option: always the same."""
    import gradio as gr

    return gr.Textbox(value=_PLACE, visible=False, elem_id=arguments.get("elem_id"))


def _test(adapter: WebUi, **arguments: Any) -> Any:
    """The state, the button that tries the endpoint, and the commands for the other machine."""
    import gradio as gr

    state = state_line(adapter, partial(_state, adapter), "remote_vae_state")
    button = gr.Button(say("test"), elem_id="remote_vae_test")
    verdict = gr.HTML("", elem_id="remote_vae_verdict")
    typed = _on_the_page("setting_" + PREFIX + "endpoint")
    button.click(partial(try_typed, adapter), inputs=[] if typed is None else [typed], outputs=[verdict, state])
    return _stored(arguments)


def try_typed(adapter: WebUi, typed: object = None) -> tuple[str, str]:
    """The verdict on the endpoint that stands in the page, applied or not, and the line of state. Both are HTML."""
    try:
        settings = adapter.own_settings()
        if isinstance(typed, str) and not _is_frozen():
            settings = replace(settings, endpoint=typed)
        trial = adapter.router.try_endpoint(_current(adapter), settings)
        mark, text = ("&#10003;" if trial.is_good else "&#10007;"), trial.verdict
        if trial.is_good and not settings.enabled:
            text += f" Tick {load_options(language())['enabled'].label!r} and apply, and pictures are made there."
    except SettingsError as error:
        mark, text = "&#10007;", str(error)
    except Exception as error:
        log.exception("the endpoint could not be tested")
        mark, text = "&#10007;", f"the test itself went wrong: {error}"
    return f"<p>{mark} {html.escape(text)}</p>", _state(adapter)


def _is_frozen() -> bool:
    """Whether nobody may change settings in the page: then the token of the set endpoint goes to no other one either."""
    from modules import shared

    return bool(getattr(getattr(shared, "cmd_opts", None), "freeze_settings", False))


def _state(adapter: WebUi) -> str:
    line = html.escape(adapter.state())
    vae = _current(adapter)
    install, serve = server_commands("" if vae is None else vae.model, "" if vae is None else vae.family.key)
    commands = _to_copy("commands", f"{install}\n{serve}")
    return f"<p><b>{say('state')}</b> {line}</p>{commands}{_to_copy('diagnosis', _report(adapter))}"


def _to_copy(word: str, text: str) -> str:
    """A text that a click marks as a whole."""
    return f"<details><summary>{say(word)}</summary><pre style='user-select: all'>{html.escape(text)}</pre></details>"


def _report(adapter: WebUi) -> str:
    try:
        settings = adapter.own_settings()
        lines = [adapter.seam_state().opening(settings), f"state: {adapter.state()}"]
        return diagnosis(settings, lines, adapter.router.history.records())
    except Exception as error:  # it is there for when something goes wrong
        log.debug("no diagnosis", exc_info=True)
        return f"no diagnosis: {type(error).__name__}: {error}"


def _current(adapter: WebUi) -> VaeAtWork | None:
    """The VAE that is loaded; None where none is, or where what is loaded is of no known kind."""
    try:
        return adapter.current()
    except Exception:
        log.debug("the loaded VAE cannot be told", exc_info=True)
        return None


def _on_the_page(elem_id: str) -> Any:
    """The component of the page that is being made which has this id; None: there is none."""
    try:
        from gradio.context import Context

        blocks = Context.root_block.blocks.values()
    except (ImportError, AttributeError):
        return None
    return next((block for block in blocks if getattr(block, "elem_id", None) == elem_id), None)


def _restricts(shared: Any) -> bool:
    return "restrict_api" in inspect.signature(shared.OptionInfo).parameters


def _shows_comments() -> bool:
    """Whether the host shows what an option has beside it; SD.Next does not, and shows the component's own text."""
    return "modules.modeldata" not in sys.modules


def _component(option: Option) -> tuple[Any, dict[str, Any]]:
    import gradio as gr

    more: dict[str, Any] = {} if _shows_comments() else {"info": option.help}
    if isinstance(option.default, bool):
        return gr.Checkbox, more
    if option.choices:
        return gr.Radio, {"choices": list(option.choices), **more}
    if isinstance(option.default, float):
        # Without bounds: a number outside of them would make the host refuse all its settings and not say which it is.
        return gr.Number, more
    return gr.Textbox, {"max_lines": 1, **more}


def _changed(option: Option) -> None:
    """Called by the host when the option was changed in the panel, the Quicksettings or by a POST of options."""
    problem = _mend(option)
    if problem:
        log.warning("Settings: %s", problem)
        warn(f"Remote VAE: {problem}")
    _explain()


def _mend(option: Option) -> str:
    """What was wrong with the option as it is stored, which is then put right: the host's page breaks at a wrong type.

    An address that cannot be used stays for the user to correct.
    """
    from modules import shared

    stored = shared.opts.data.get(PREFIX + option.key, option.default)
    value, problem = option.forgive(stored)
    is_free_text = isinstance(option.default, str) and not option.choices
    if type(stored) is not type(value) or (not is_free_text and stored != value):
        shared.opts.data[PREFIX + option.key] = value
    return problem


def _explain() -> None:
    """Write beside every option what it does and what is wrong with it; the page shows it when it is loaded anew."""
    from modules import shared

    values = {key: shared.opts.data.get(PREFIX + key, option.default) for key, option in load_options().items()}
    problems = Settings.forgiving(values)[0].problems
    for key, option in load_options(language()).items():
        info = shared.opts.data_labels.get(PREFIX + key)
        if info is None:
            continue
        if not _shows_comments():
            info.component_args["info"] = " ".join(filter(None, (option.help, problems.get(key))))
            continue
        info.comment_after = ""
        info.info(option.help)
        if key in problems:
            info.info(html.escape(problems[key]))
