"""Starts in ComfyUI, which loads the top folder as a node pack."""

from __future__ import annotations

import logging
import sys

from remote_vae.extension.comfyui_nodes import NAMES, NODES
from remote_vae.extension.console import show_log
from remote_vae.hosts.comfyui import adapter

log = logging.getLogger("remote_vae")

NODE_CLASS_MAPPINGS = NODES
NODE_DISPLAY_NAME_MAPPINGS = NAMES
# What the adapter stands on; a ComfyUI that lacks one is too old, or too new.
_NEEDED = {
    "comfy.sd": "VAE",
    "comfy.model_management": "throw_exception_if_processing_interrupted",
    "comfy_execution.utils": "get_executing_context",
    "execution": "PromptExecutor",
    "folder_paths": "get_user_directory",
    "server": "PromptServer",
}


def start() -> None:
    """Get in the way of ComfyUI's VAEs and give it the routes of the settings page; outside of it do nothing. Never raises."""
    if "comfy.sd" not in sys.modules or "execution" not in sys.modules:
        return
    show_log()
    try:
        missing = [f"{module}.{name}" for module, name in _NEEDED.items() if not hasattr(sys.modules.get(module), name)]
        if missing:
            log.warning("this ComfyUI has no %s: it is too old or too new, and its VAEs are left alone", ", no ".join(missing))
            return
        adapter.install()
        from remote_vae.extension.comfyui_routes import add_routes

        add_routes(sys.modules["server"].PromptServer.instance.routes)
        log.info("%s", adapter.seam_state().opening(adapter.settings.now()))
    except Exception:
        log.exception("Remote VAE could not be started; ComfyUI works as without it")
