"""The axes "Remote VAE" and "Remote VAE transfer" of the host's X/Y/Z plot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from remote_vae.extension.accordion import transfers
from remote_vae.hosts.generation import CELL, MODES

log = logging.getLogger("remote_vae")

# Label, field of a request, and what can be chosen.
_AXES = {"Remote VAE": ("mode", MODES), "Remote VAE transfer": ("transfer", transfers())}


def add_axes() -> None:
    """Add the axes, once. Called by the host in on_before_ui, when its scripts are loaded."""
    plot = _plot_module()
    if plot is None:
        return
    present = {option.label for option in plot.axis_options}
    for label, (field, choices) in _AXES.items():
        if label not in present:
            plot.axis_options.append(_axis(plot, label, field, choices))


def remove_axes() -> None:
    """Take the axes away. SD.Next keeps its list of axes while it loads its scripts anew."""
    plot = _plot_module()
    if plot is not None:
        plot.axis_options[:] = [option for option in plot.axis_options if option.label not in _AXES]


def _plot_module() -> Any:
    """The module of the X/Y/Z script, or None."""
    from modules import scripts

    for data in scripts.scripts_data:
        if hasattr(data.module, "axis_options") and hasattr(data.module, "AxisOption"):
            return data.module
    log.info("this UI has no X/Y/Z plot")
    return None


def _axis(plot: Any, label: str, field: str, choices: tuple[str, ...]) -> Any:
    return plot.AxisOption(
        label, str, _applier(field), confirm=partial(_confirm, label, choices), choices=lambda: list(choices)
    )


def _applier(field: str) -> Callable[[Any, str, Any], None]:
    # A plain function: SD.Next logs its __name__.
    def apply_remote_vae(p: Any, value: str, _: Any) -> None:
        # A dictionary of its own: the cells' processing objects are shallow copies of one.
        setattr(p, CELL, {**getattr(p, CELL, {}), field: value})

    return apply_remote_vae


def _confirm(label: str, choices: tuple[str, ...], _: Any, values: list[str]) -> None:
    for value in values:
        if value not in choices:
            raise RuntimeError(f"{label}: {value!r} is not one of {', '.join(choices)}")
