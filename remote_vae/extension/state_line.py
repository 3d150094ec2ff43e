"""The line that says how things stand, wherever a page shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def state_line(make: Callable[[], str], elem_id: str) -> Any:
    """``make``'s HTML. gradio asks for it when the page is loaded, and javascript/remote_vae.js by a button that nobody sees."""
    import gradio as gr

    line = gr.HTML(value=make, elem_id=elem_id)
    button = gr.Button("", visible=False, elem_id=f"{elem_id}_refresh")
    button.do_not_save_to_config = True
    # Not in the queue, in which the line would wait for the generation that is running.
    button.click(make, outputs=[line], queue=False, show_progress="hidden")
    return line
