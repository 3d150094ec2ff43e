"""The line that says how things stand, wherever a page shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remote_vae.hosts.base import WebUi, warn


def state_line(adapter: WebUi, make: Callable[[], str], elem_id: str) -> Any:
    """``make``'s HTML. gradio asks for it when the page is loaded, javascript/remote_vae.js by a button that nobody sees."""
    import gradio as gr

    line = gr.HTML(value=make, elem_id=elem_id)
    button = gr.Button("", visible=False, elem_id=f"{elem_id}_refresh")
    button.do_not_save_to_config = True

    def refresh() -> str:
        # Forge and Forge Neo generate in a thread that has no page, which is asked to refresh afterwards.
        missed = adapter.unshown_warning()
        if missed:
            warn(missed)
        return make()

    button.click(refresh, inputs=[], outputs=[line], show_progress="hidden")
    return line
