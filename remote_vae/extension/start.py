"""Starts the extension in the host that executes ``scripts/``."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial

from remote_vae.extension.accordion import TITLE, script_class
from remote_vae.extension.axes import add_axes, remove_axes
from remote_vae.extension.console import show_log
from remote_vae.extension.settings_panel import add_options, restrict_options
from remote_vae.extension.share import mount
from remote_vae.hosts.base import WebUi
from remote_vae.hosts.detect import detect

log = logging.getLogger("remote_vae")


def load() -> type | None:
    """Register the extension's callbacks and get in the way of the models that are loaded already. Safe to call again.

    Returns:
        The script that the host is to show, or None where it cannot show one.
    """
    show_log()
    adapter = detect()
    if adapter is None:
        return None
    from modules import script_callbacks

    restrict_options()
    script_callbacks.on_ui_settings(partial(add_options, adapter))
    adapter.install()
    if adapter.installed:
        _register(adapter)
    _say_what_is_hooked(adapter)
    with suppress(Exception):  # then it is shown where scripts always are
        adapter.show_in_tabs(TITLE)
    return script_class(adapter)


def _say_what_is_hooked(adapter: WebUi) -> None:
    """One line in the console: else nobody knows whether it works before the first picture."""
    try:
        log.info("%s", adapter.seam_state().opening(adapter.own_settings()))
    except Exception:  # whatever a host keeps in its options before they are added
        log.debug("the line at the start could not be made", exc_info=True)


def _register(adapter: WebUi) -> None:
    """What follows the UI while it runs."""
    from modules import script_callbacks
    from modules.call_queue import queue_lock

    script_callbacks.on_model_loaded(adapter.hook)
    script_callbacks.on_script_unloaded(adapter.uninstall)
    script_callbacks.on_script_unloaded(remove_axes)
    script_callbacks.on_before_ui(add_axes)
    script_callbacks.on_app_started(lambda _demo, app: mount(app, adapter, queue_lock))
