"""How much of the host's memory is free, whatever limits it."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger("remote_vae")

_CGROUP = Path("/sys/fs/cgroup")


def available_host_memory() -> int | None:
    """Bytes that this process could still get without the system swapping; None: that is not known."""
    try:
        # The web UIs ship it; without it the memory is found out by trying.
        import psutil

        return _within_container(int(psutil.virtual_memory().available))
    except Exception as error:  # no answer must cost a picture
        log.debug("the free memory of the host is not known: %s", error)
        return None


def _within_container(available: int) -> int:
    """``available`` bytes, or what the limit of the container (cgroup v2) leaves of them.

    psutil does not know of it: in a container of 4 GB on a machine with 64 GB free, the whole VAE, which takes 16 GB for
    2048 px, would be tried and the process be killed.
    """
    try:
        limit, used, stat = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
        # The cache of files is let go of when memory is wanted.
        cached = next(int(line.split()[1]) for line in stat.splitlines() if line.startswith("file "))
        return min(available, max(0, int(limit) - int(used) + cached))
    except (OSError, ValueError, StopIteration):
        # No container, or none with a limit ("max").
        return available
