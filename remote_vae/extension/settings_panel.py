"""The section "Remote VAE" of the host's settings, made from options.toml."""

from __future__ import annotations

import html
import inspect
import logging
import warnings
from contextlib import suppress
from functools import partial
from typing import Any

from remote_vae.hosts.base import PREFIX
from remote_vae.settings import Option, Settings, load_options

log = logging.getLogger("remote_vae")

SECTION = ("remote_vae", "Remote VAE")


def add_options() -> None:
    """Add every option to the host's settings. Called by the host in on_ui_settings, again after Reload UI."""
    from modules import shared

    restricts = _restricts(shared)
    for option in load_options().values():
        component, arguments = _component(option)
        label = f"{option.label} ({option.unit})" if option.unit else option.label
        more = {"restrict_api": True} if option.restricted and restricts else {}
        info = shared.OptionInfo(
            option.default, label, component, arguments, onchange=partial(_changed, option), section=SECTION, **more
        )
        shared.opts.add_option(PREFIX + option.key, info)
        _mend(option)
    _explain()


def restrict_options() -> None:
    """Keep the restricted options from requests of the host's API where the host has a list of such and no ``restrict_api``."""
    from modules import shared

    if not _restricts(shared):
        refused: set[str] = getattr(shared, "restricted_opts", set())
        refused.update(PREFIX + option.key for option in load_options().values() if option.restricted)


def _restricts(shared: Any) -> bool:
    return "restrict_api" in inspect.signature(shared.OptionInfo).parameters


def _component(option: Option) -> tuple[Any, dict[str, Any]]:
    import gradio as gr

    if isinstance(option.default, bool):
        return gr.Checkbox, {}
    if option.choices:
        return gr.Radio, {"choices": list(option.choices)}
    if isinstance(option.default, float):
        # Without bounds: a number outside of them would make the host refuse all its settings and not say which it is.
        return gr.Number, {}
    return gr.Textbox, {"max_lines": 1}


def _changed(option: Option) -> None:
    """Called by the host when the option was changed in the panel, the Quicksettings or by a POST of options."""
    problem = _mend(option)
    if problem:
        log.warning("Settings: %s", problem)
        _show(f"Remote VAE: {problem}")
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
    for key, option in load_options().items():
        info = shared.opts.data_labels.get(PREFIX + key)
        if info is not None:
            info.comment_after = ""
            info.info(option.help)
            if key in problems:
                info.info(html.escape(problems[key]))


def _show(text: str) -> None:
    """As a message over the page. Outside of one, as in the host's API, gradio warns Python, or has no such message."""
    import gradio as gr

    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gr.Warning(text)
