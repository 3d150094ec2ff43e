"""The accordion "Remote VAE" of txt2img and img2img: what the user wants of one generation. Also by API, and from infotexts.

Over the API: ``"alwayson_scripts": {"Remote VAE": {"args": ["remote", "raw"]}}``, mode and transfer, both optional.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from remote_vae.hosts.base import WebUi
from remote_vae.hosts.generation import FOLLOW, INFOTEXT, MODE_TEXT, MODES, REQUEST, TRANSFER_TEXT, Request
from remote_vae.settings import load_options

log = logging.getLogger("remote_vae")

TITLE = "Remote VAE"
_HELP = (
    "auto: remote as the settings say, even while they are switched off. remote: every VAE call, also those that the settings "
    "keep here. Whatever fails is done on this machine."
)


def transfers() -> tuple[str, ...]:
    """What can be chosen for the transfer of one generation."""
    return (FOLLOW, *load_options()["transfer"].choices)


def request_of(mode: object = None, transfer: object = None) -> Request:
    """What the user or the API asks for; nothing, or nonsense with a line in the log, is to follow the settings."""
    return Request(_one_of(MODES, mode, "mode"), _one_of(transfers(), transfer, "transfer"))


def script_class(adapter: WebUi) -> type:
    """The script that the host shows in its tabs; the host finds it in the module that it executes."""
    from modules import scripts

    class RemoteVaeScript(scripts.Script):  # type: ignore[misc]  # the host's class, which mypy does not see
        def title(self) -> str:
            return TITLE

        def show(self, is_img2img: bool) -> Any:  # noqa: ARG002  # in both tabs
            return scripts.AlwaysVisible

        def ui(self, is_img2img: bool) -> list[Any]:  # noqa: ARG002
            import gradio as gr

            with gr.Accordion(TITLE, open=False, elem_id=self.elem_id("remote_vae")):
                mode = gr.Radio(
                    choices=list(MODES), value=FOLLOW, label="Remote VAE", info=_HELP, elem_id=self.elem_id("remote_vae_mode")
                )
                transfer = gr.Radio(
                    choices=list(transfers()), value=FOLLOW, label="Transfer", elem_id=self.elem_id("remote_vae_transfer")
                )
            # An update and not the bare value: that SD.Next takes for a field with a name.
            self.infotext_fields = [
                (mode, lambda pasted: gr.update(value=pasted_mode(pasted, switched_on=adapter.own_settings().enabled))),
                (transfer, lambda pasted: gr.update(value=pasted_transfer(pasted, adapter.own_settings().transfer))),
            ]
            return [mode, transfer]

        def before_process(self, p: Any, mode: object = None, transfer: object = None, *_: Any) -> None:
            setattr(p, REQUEST, request_of(mode, transfer))

    return RemoteVaeScript


def pasted_mode(pasted: Mapping[str, Any], *, switched_on: bool) -> str:
    """The mode that makes a picture as the one whose infotext was pasted was made."""
    named = pasted.get(MODE_TEXT)
    if named in MODES:
        return str(named)
    return FOLLOW if switched_on or INFOTEXT not in pasted else "auto"


def pasted_transfer(pasted: Mapping[str, Any], usual: str) -> str:
    """The transfer that was named, or that took place, where it is not the ``usual`` one."""
    took_place = re.search(r"remote (?:\S+ )?\((\w+)[,)]", str(pasted.get(INFOTEXT, "")))
    found = pasted.get(TRANSFER_TEXT) or (took_place[1] if took_place else None)
    return str(found) if found in transfers() and found != usual else FOLLOW


def _one_of(choices: tuple[str, ...], value: object, what: str) -> str:
    if value is None or value == "":
        return FOLLOW
    if value in choices:
        return str(value)
    log.warning("%s: got %r, expected one of %s; following the settings", what, value, ", ".join(choices))
    return FOLLOW
