"""What is free on a device for one more computation, whatever limits its memory."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from contextlib import suppress
from typing import Any

import torch

from remote_vae.tiled.host_memory import available_host_memory

log = logging.getLogger("remote_vae")

_RATIO = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"
# What CUDA's allocator says when there is no room, and of its limit, where one is set: "... 1.50 GiB allowed; ...".
_NO_ROOM = re.compile(r"out of memory.*?GPU (\d+)\b", re.DOTALL)
_ALLOWED = re.compile(r"([\d.]+) (bytes|KiB|MiB|GiB) allowed")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class _Limits:
    """What cards were heard to be limited to, by their number. torch before 2.7 does not tell unless it is out of memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[int, int] = {}

    def hear(self, error: BaseException) -> None:
        card, limit = _NO_ROOM.search(str(error)), _ALLOWED.search(str(error))
        if card is None:
            return
        with self._lock:
            # It may have been taken away again.
            self._bytes.pop(int(card[1]), None)
            if limit is not None:
                self._bytes[int(card[1])] = int(float(limit[1]) * _UNITS[limit[2]])

    def of(self, index: int) -> int | None:
        with self._lock:
            return self._bytes.get(index)


_heard = _Limits()


def heard_out_of_memory(error: BaseException) -> None:
    """Learn from an error that says there is no room: of CUDA's it has the limit that was set for this process, if any."""
    _heard.hear(error)


def available_memory(device: torch.device) -> int | None:
    """Bytes that a computation on ``device`` could still get, or None where that is not known.

    What limits this process (``set_per_process_memory_fraction``, Apple's watermark, a container) counts as the device's size.
    """
    try:
        if device.type == "cpu":
            return available_host_memory()
        return _of_mps() if device.type == "mps" else _of_card(device)
    except Exception as error:  # no answer must cost a picture
        log.debug("the free memory of %s is not known: %s", device, error)
        return None


def spills(device: torch.device) -> bool:
    """Whether what finds no room on ``device`` goes to the host's memory without an error, at a hundredth of the speed.

    So does NVIDIA's driver on Windows since 536.40, unless the user has told it not to.
    """
    return sys.platform == "win32" and device.type == "cuda" and torch.version.hip is None


def _of_card(device: torch.device) -> int:
    # As torch.cuda; the devices that are neither do not tell.
    api: Any = getattr(torch, device.type)
    # torch before 2.3 does not say what is free of a card without a number, as "cuda" of A1111's --medvram is.
    device = torch.device(device.type, _index(api, device))
    reserved, used = int(api.memory_reserved(device)), int(api.memory_allocated(device))
    try:
        free, size = (int(each) for each in api.mem_get_info(device))
    except (AttributeError, RuntimeError):
        # Of Intel's cards some do not tell, and torch before 2.6 does not ask.
        if device.type != "xpu":
            raise
        size = int(api.get_device_properties(device).total_memory)
        free = size - reserved
    limit = _limit_of(api, device, size)
    if limit is not None:
        free = min(free, max(0, limit - reserved))
    # What torch has taken and does not use is free as well.
    return free + reserved - used


def _limit_of(api: Any, device: torch.device, size: int) -> int | None:
    """Bytes that this process may reserve of a card of ``size``; None: no limit is known."""
    fraction = getattr(api, "get_per_process_memory_fraction", None)
    if fraction is None:
        # 2.1 to 2.6
        return None if device.type != "cuda" else _heard.of(_index(api, device))
    with suppress(Exception):
        # Other allocators than torch's own know no limit.
        share = float(fraction(device))
        return int(share * size) if share < 1.0 else None
    return None


def _index(api: Any, device: torch.device) -> int:
    return int(api.current_device()) if device.index is None else device.index


def _of_mps() -> int:
    """Apple's memory is the machine's. Beyond what Metal recommends the system swaps, whatever the watermark lets through."""
    import psutil

    api: Any = torch.mps
    ratio = float(os.environ.get(_RATIO) or 0.0)
    size = int(api.recommended_max_memory()) * (ratio if 0.0 < ratio < 1.0 else 1.0)
    taken, used = int(api.driver_allocated_memory()), int(api.current_allocated_memory())
    room = min(int(size) - taken, int(psutil.virtual_memory().available))
    return max(0, room) + taken - used
