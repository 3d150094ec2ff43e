"""The section "Remote VAE" of the host's settings, made from options.toml."""

from __future__ import annotations

from typing import Any

from remote_vae.hosts.base import PREFIX
from remote_vae.settings import Option, load_options

SECTION = ("remote_vae", "Remote VAE")


def add_options() -> None:
    """Add every option to the host's settings. Called by the host in on_ui_settings, again after Reload UI."""
    from modules import shared

    for option in load_options().values():
        component, arguments = _component(option)
        label = f"{option.label} ({option.unit})" if option.unit else option.label
        info = shared.OptionInfo(option.default, label, component, arguments, section=SECTION)
        shared.opts.add_option(PREFIX + option.key, info.info(option.help))


def _component(option: Option) -> tuple[Any, dict[str, Any]]:
    import gradio as gr

    if isinstance(option.default, bool):
        return gr.Checkbox, {}
    if option.choices:
        return gr.Radio, {"choices": list(option.choices)}
    if isinstance(option.default, float):
        return gr.Number, {"minimum": option.min, "maximum": option.max}
    return gr.Textbox, {"max_lines": 1}
