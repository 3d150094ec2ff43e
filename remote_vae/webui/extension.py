"""Starts the extension in the host that executes ``scripts/``."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("remote_vae")


def load() -> None:
    """Register the extension's callbacks and get in the way of the models that are loaded already. Safe to call again."""
    from modules import script_callbacks

    from remote_vae.hosts.a1111 import adapter
    from remote_vae.webui.settings_panel import add_options

    _show_log()
    script_callbacks.on_ui_settings(add_options)
    script_callbacks.on_model_loaded(adapter.hook)
    script_callbacks.on_script_unloaded(adapter.uninstall)
    adapter.install()


def _show_log() -> None:
    """One line a VAE call in the host's console, where the host shows no INFO lines itself."""
    if log.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("Remote VAE: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
