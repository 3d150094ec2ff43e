"""Where strips go that find no room on the compute device: a GPU's into the host's memory, a processor's into a file.

The file is written and read, not mapped: on a full disk a mapped one ends the whole program (SIGBUS), this one the call. It has
no name on POSIX and is deleted on close on Windows, so that nothing is left behind by a program that is killed.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remote_vae.errors import OutOfMemory

log = logging.getLogger("remote_vae")

# A file is given back when all its strips are: larger ones hold more that nobody waits for, smaller ones are more open files.
_FILE_BYTES = 256 << 20
# What others may need of the disk meanwhile, latents that are rescued among them.
_DISK_RESERVE = 1 << 30


class HostMemory:
    """For the strips of a GPU: pinned memory of the host, into and out of which is copied while the GPU goes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pins = self._copies is not None
        self.fetches_ahead = self._copies is not None

    def put(self, strip: torch.Tensor) -> torch.Tensor:
        """A copy of ``strip`` in the host's memory."""
        copies = self._copies
        if copies is None:
            return torch.empty_like(strip, device="cpu").copy_(strip)
        # One strip on its way at a time: it takes up memory until it has arrived.
        copies.synchronize()
        stored = self._allocate(strip)
        copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(copies):
            stored.copy_(strip, non_blocking=stored.is_pinned())
        strip.record_stream(copies)
        return stored

    def _allocate(self, strip: torch.Tensor) -> torch.Tensor:
        if self._pins:
            try:
                return torch.empty_like(strip, device="cpu", pin_memory=True)
            except RuntimeError as error:
                # Systems limit how much may be pinned, WSL to little. A copy to other memory makes the GPU wait.
                log.info("no more pinned memory: %s", error)
                self._pins = False
        return torch.empty_like(strip, device="cpu")

    def fetch(self, stored: torch.Tensor) -> torch.Tensor:
        """Back to the GPU; begins at once, and ``arrived`` has to be called before the strip is used."""
        copies = self._copies
        if copies is None:
            return stored.to(self._device)
        # Not further ahead of the computation than one strip.
        copies.synchronize()
        copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(copies):
            return stored.to(self._device, non_blocking=stored.is_pinned())

    def arrived(self, strip: torch.Tensor) -> torch.Tensor:
        """Make what follows wait for a strip that is being fetched."""
        if self._copies is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._copies)
            strip.record_stream(current)
        return strip

    def drop(self, stored: torch.Tensor) -> None:
        """Its memory goes when nobody has it any more."""

    def close(self) -> None:
        """Wait for the copies that are on their way."""
        if self._copies is not None:
            self._copies.synchronize()


@dataclass
class _File:
    """Strips one after the other: the bytes of all, and how many are still waited for."""

    file: io.FileIO
    size: int = 0
    strips: int = 0


@dataclass(frozen=True)
class _InFile:
    """Where a strip is; ``form`` is a tensor of its shape, dtype and order without values."""

    file: _File
    at: int
    form: torch.Tensor


class TemporaryFiles:
    """For the strips of a processor: files without a name in a folder for large temporary files, some strips in each.

    What is in them is in the system's cache as long as there is memory for it, and need never reach the disk.
    """

    fetches_ahead = False

    def __init__(self) -> None:
        self._folder = ""
        self._open: list[_File] = []

    def put(self, strip: torch.Tensor) -> _InFile:
        """A copy of ``strip`` in a file.

        Raises:
            OutOfMemory: no folder can take it.
        """
        try:
            if not self._open or self._open[-1].size >= _FILE_BYTES:
                self._open.append(_File(self._new()))
            if shutil.disk_usage(self._folder).free < strip.nbytes + _DISK_RESERVE:
                raise OSError(f"less than {_DISK_RESERVE >> 30} GB would be left free")
            file = self._open[-1]
            # No view: rows cut out of a strip are not in one piece.
            order = torch.channels_last if strip.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            dense = strip.contiguous(memory_format=order)
            file.file.seek(file.size)
            rest = _bytes(dense)
            while rest:
                rest = rest[file.file.write(rest) :]
        except OSError as error:
            message = (
                f"the memory that is allowed takes only a part of this picture, and the rest found no room on the disk"
                f" ({self._folder or 'no temporary folder'}: {error}); set TMPDIR to a folder on a disk with room"
            )
            raise OutOfMemory(message, reason="out of memory") from error
        stored = _InFile(file, file.size, torch.empty_like(dense, device="meta"))
        file.size += strip.nbytes
        file.strips += 1
        return stored

    def _new(self) -> io.FileIO:
        for folder in [self._folder] if self._folder else _folders():
            with suppress(OSError):
                file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115  # closed with its last strip
                self._folder = folder
                return file
        raise OSError("nothing can be written")

    def fetch(self, stored: _InFile) -> torch.Tensor:
        """The strip, as it was."""
        strip = torch.empty_like(stored.form, device="cpu")
        stored.file.file.seek(stored.at)
        rest = _bytes(strip)
        while rest:
            count = stored.file.file.readinto(rest)
            if not count:
                raise OSError(f"a temporary file in {self._folder} was cut short")
            rest = rest[count:]
        return strip

    def arrived(self, strip: torch.Tensor) -> torch.Tensor:
        """It has, when ``fetch`` gives it."""
        return strip

    def drop(self, stored: _InFile) -> None:
        """Nobody will fetch it any more: the file goes with its last strip."""
        file = stored.file
        file.strips -= 1
        if not file.strips:
            self._open.remove(file)
            file.file.close()

    def close(self) -> None:
        """Nothing will be fetched any more."""
        for file in self._open:
            file.file.close()


def _bytes(dense: torch.Tensor) -> memoryview:
    rows = dense if dense.is_contiguous() else dense.permute(0, 2, 3, 1)
    return rows.reshape(-1).view(torch.uint8).numpy().data


def _folders() -> list[str]:
    """For large temporary files, the first choice first. /tmp is memory on many systems, and /var/tmp is on none."""
    large = ["/var/tmp"] if os.name == "posix" else []  # noqa: S108  # opened without a name
    folders = [os.environ.get("TMPDIR", ""), *large, tempfile.gettempdir()]
    return [folder for folder in folders if folder and not _is_memory(folder)]


def _is_memory(folder: str) -> bool:
    """Whether it is a Linux file system that lies in memory: nothing would be won there."""
    with suppress(OSError):
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
        device = os.stat(folder).st_dev
        for place, kind in mounts:
            with suppress(OSError):
                if kind in ("tmpfs", "ramfs") and os.stat(place).st_dev == device:
                    return True
    return False
