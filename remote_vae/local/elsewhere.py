"""The VAE on a device that the user has picked, beside the one where the host has it: a copy, kept from call to call."""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from remote_vae.local.own import copied
from remote_vae.vae.fingerprint import Excerpt, excerpt

log = logging.getLogger("remote_vae")


@dataclass(frozen=True)
class _Copy:
    """``module`` is a copy of ``original``, which had the weights of ``weights`` and was set as in ``switches``."""

    original: weakref.ref[Any]
    weights: Excerpt | None
    switches: tuple[tuple[str, bool | str], ...]
    device: torch.device
    dtype: torch.dtype | None
    module: Any


class Copies:
    """One copy a process, made anew for another VAE, other weights, or where the host has set it otherwise. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: _Copy | None = None

    def of(self, original: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
        """``original`` on ``device`` in ``dtype``, None: in its own.

        Raises:
            UnsupportedLayout: its weights are not at hand. And what torch raises where there is no room.
        """
        weights, switches = excerpt(original), _switches(original)
        with self._lock:
            kept = self._kept
            if (
                kept is not None
                and weights is not None
                and kept.original() is original
                and (kept.weights, kept.switches, kept.device, kept.dtype) == (weights, switches, device, dtype)
            ):
                return kept.module
            # Before the next one is made: both together may find no room.
            self._kept = kept = None
            module = copied(original, device, dtype)
            self._kept = _Copy(weakref.ref(original, self._forget), weights, switches, device, dtype, module)
            log.info("a copy of %s is kept on %s", type(original).__name__, device)
            return module

    def has(self, original: Any, device: torch.device) -> bool:
        """Whether a copy of ``original`` is on ``device``, of whichever weights."""
        kept = self._kept
        return kept is not None and kept.original() is original and kept.device == device

    def drop(self) -> None:
        """Give its memory back."""
        with self._lock:
            self._kept = None

    def _forget(self, original: weakref.ref[Any]) -> None:
        # A finaliser may run in the midst of anything, also of what holds the lock.
        kept = self._kept
        if kept is not None and kept.original is original:
            self._kept = None


copies = Copies()


def _switches(original: Any) -> tuple[tuple[str, bool | str], ...]:
    """What a host may set between two calls: the padding of convolutions (A1111's Tiling), the VAE's own tiles (diffusers)."""
    return tuple(
        (name, value) for part in original.modules() for name, value in vars(part).items() if isinstance(value, (bool, str))
    )


def picked_device(name: str, own: torch.device) -> torch.device | None:
    """The device of ``name``, which the settings have checked; None where that is ``own``, where the VAE is anyway, or none."""
    if not name:
        return None
    device = torch.device(name)
    same_kind = device.type == own.type
    if same_kind and (device.type == "cpu" or (device.index or 0) == (own.index or 0)):
        return None
    return device
