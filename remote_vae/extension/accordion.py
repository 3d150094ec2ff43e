"""The accordion "Remote VAE" of txt2img and img2img: on or off for one generation, how things stand, and how it is sent.

Over the API: ``"alwayson_scripts": {"Remote VAE": {"args": ["remote", "raw"]}}``, mode and transfer, both optional.

The box in its title shows what the settings say until the user presses it (javascript/remote_vae.js keeps it so). Beside it
goes what the settings said when it was set, which tells whether it was pressed: where it was not, the settings count, whatever
they say by then.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from remote_vae.extension.language import language, say
from remote_vae.extension.state_line import state_line
from remote_vae.hosts.base import WebUi
from remote_vae.hosts.generation import FOLLOW, INFOTEXT, MODE_TEXT, MODES, REQUEST, TRANSFER_TEXT, Request
from remote_vae.settings import load_options

log = logging.getLogger("remote_vae")

TITLE = "Remote VAE"
# Which calls go to the endpoint: the choices of the accordion, by the mode that each asks for.
AS_SET, EVERY = "as the settings say", "every call, even to another VAE"
_SCOPES = {AS_SET: "auto", EVERY: "remote"}


def transfers() -> tuple[str, ...]:
    """What can be chosen for the transfer of one generation."""
    return (FOLLOW, *load_options()["transfer"].choices)


def request_of(*values: object) -> Request:
    """What the user or the API asks for; nothing, or nonsense with a line in the log, is to follow the settings.

    Args:
        values: of the accordion: the box, whether the settings were on when it was set, which calls, and the transfer. Over
            the API also mode and transfer, both texts, as they always were.
    """
    if values and isinstance(values[0], bool):
        box, seen, scope, transfer = (*values, None, None, None, None)[:4]
        which = _one_of((AS_SET, EVERY), scope, "which calls", AS_SET)
        mode: object = FOLLOW
        if box is False and seen is not False:
            mode = "off"
        elif box is True and (seen is not True or which != AS_SET):
            mode = _SCOPES[which]
    else:
        mode, transfer = (*values, None, None)[:2]
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

            on = adapter.own_settings().enabled
            with _titled(on, self.elem_id("remote_vae")) as box:
                state_line(adapter, partial(_state, adapter), self.elem_id("remote_vae_state"))
                seen = gr.Checkbox(value=on, visible=False, elem_id=self.elem_id("remote_vae_seen"))
                seen.do_not_save_to_config = True
                scope = gr.Radio(
                    choices=list(_SCOPES), value=AS_SET, label=say("scope"), info=say("scope_help"),
                    elem_id=self.elem_id("remote_vae_scope"),
                )  # fmt: skip
                transfer = gr.Radio(
                    choices=list(transfers()), value=FOLLOW, label=load_options(language())["transfer"].label,
                    info=load_options(language())["transfer"].help,
                    elem_id=self.elem_id("remote_vae_transfer"),
                )  # fmt: skip
            # An update and not the bare value: that SD.Next takes for a field with a name. What a picture's text says moves
            # the box in the title, which is seen, and never lets every call go to another VAE.
            self.infotext_fields = [
                (box, lambda pasted: gr.update(value=pasted_box(pasted, switched_on=adapter.own_settings().enabled))),
                (transfer, lambda pasted: gr.update(value=pasted_transfer(pasted, adapter.own_settings().transfer))),
            ]
            return [box, seen, scope, transfer]

        def before_process(self, p: Any, *values: object) -> None:
            setattr(p, REQUEST, request_of(*values))

    return RemoteVaeScript


@contextmanager
def _titled(on: bool, elem_id: str) -> Iterator[Any]:
    """The accordion, with the box in its title where the host has such, else as the first thing within."""
    import gradio as gr

    try:
        from modules.ui_components import InputAccordion

        titled = InputAccordion(value=on, label=TITLE, elem_id=elem_id)
    except Exception:  # another host, or another form of it
        log.debug("no accordion with a box", exc_info=True)
        titled = None
    if titled is not None:
        for part in (titled, getattr(titled, "accordion", titled)):
            # What is kept of it from another version, or another day, is not what the settings say now.
            part.do_not_save_to_config = True
        with titled:
            yield titled
        return
    with gr.Accordion(TITLE, open=False, elem_id=elem_id):
        yield gr.Checkbox(value=on, label=load_options(language())["enabled"].label, elem_id=f"{elem_id}-checkbox")


def _state(adapter: WebUi) -> str:
    return f"<p>{html.escape(adapter.state())}</p>"


def pasted_box(pasted: Mapping[str, Any], *, switched_on: bool) -> bool:
    """The box that makes a picture as the one whose infotext was pasted was made."""
    named = pasted.get(MODE_TEXT)
    if named in ("off", "auto", "remote"):
        return bool(named != "off")
    return bool(switched_on or INFOTEXT in pasted)


def pasted_transfer(pasted: Mapping[str, Any], usual: str) -> str:
    """The transfer that was named, or that took place, where it is not the ``usual`` one."""
    took_place = re.search(r"remote (?:\S+ )?\((\w+)[,)]", str(pasted.get(INFOTEXT, "")))
    found = pasted.get(TRANSFER_TEXT) or (took_place[1] if took_place else None)
    return str(found) if found in transfers() and found != usual else FOLLOW


def _one_of(choices: tuple[str, ...], value: object, what: str, nothing: str = FOLLOW) -> str:
    if value is None or value == "":
        return nothing
    if value in choices:
        return str(value)
    log.warning("%s: got %r, expected one of %s; following the settings", what, value, ", ".join(choices))
    return nothing
