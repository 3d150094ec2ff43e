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
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from remote_vae.errors import OutOfMemory
from remote_vae.tiled.host_memory import available_host_memory
from remote_vae.tiled.pinned import PINNED, RESERVE, Piece, PinnedMemory
from remote_vae.tiled.policy import Policy

log = logging.getLogger("remote_vae")

# A file is given back when all its strips are: larger ones hold more that nobody waits for, smaller ones are more open files.
_FILE_BYTES = 256 << 20
# What others may need of the disk meanwhile, latents that are rescued among them.
_DISK_RESERVE = 1 << 30


@dataclass
class _InHost:
    """A strip in the host's memory.

    Attributes:
        tensor: its values, when the copy has arrived.
        piece: of the pinned memory; None: it is in other memory.
        written, read: what a stream has to wait for before it reads it, and before others may have its memory.
    """

    tensor: torch.Tensor
    piece: Piece | None
    written: Any = None
    read: Any = None

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class HostMemory:
    """For the strips of a GPU: pinned memory of the host, into and out of which is copied while the GPU goes on.

    The host waits for nothing. Copies out and back have a stream each, and wait for events: a copy out for the strip to be
    made, a copy back for it to be away. The memory of a strip on the GPU belongs to the stream that computes: that one waits
    for the copy before it may have it again, so that a strip need not be kept for longer.
    """

    def __init__(self, device: torch.device, policy: Policy) -> None:
        self._device = device
        self._pins = policy.pins
        self._has_streams = device.type == "cuda"
        self.fetches_ahead = self._has_streams
        self._out: Any = None
        self._back: Any = None
        # The strip that is on its way out, and what ends it.
        self._leaving: tuple[torch.Tensor, Any] | None = None
        self._coming: dict[int, tuple[torch.Tensor, Any]] = {}
        # Pieces that may still be read.
        self._ending: list[tuple[Piece, Any]] = []
        self._at_the_end = ExitStack()

    def put(self, strip: torch.Tensor) -> _InHost:
        """A copy of ``strip`` in the host's memory.

        Raises:
            OutOfMemory: there is too little of it.
        """
        stored = self._take(strip)
        if not self._has_streams or stored.piece is None:
            stored.tensor.copy_(strip, non_blocking=stored.piece is not None)
            return stored
        computes = torch.cuda.current_stream(self._device)
        if self._out is None:
            self._out, self._back = (torch.cuda.Stream(self._device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._let_go(computes)
        self._out.wait_stream(computes)
        with torch.cuda.stream(self._out):
            stored.tensor.copy_(strip, non_blocking=True)
        stored.written = self._out.record_event()
        self._leaving = (strip, stored.written)
        return stored

    def _let_go(self, computes: Any) -> None:
        """The strip before: what computes may have its memory when it has left."""
        if self._leaving is not None:
            computes.wait_event(self._leaving[1])
            self._leaving = None

    def _take(self, strip: torch.Tensor) -> _InHost:
        piece = None
        if self._pins:
            self._give(lambda event: bool(event.query()))
            piece = self._pinned.take(strip.nbytes, pin=self._has_streams)
        if piece is not None:
            return _InHost(piece.like(strip), piece)
        available = available_host_memory()
        if available is not None and available < strip.nbytes + RESERVE:
            # A system that has promised its memory ends the process.
            message = f"only a part of this picture fits on {self._device}, and the host has no memory left for the rest"
            raise OutOfMemory(message, reason="out of memory")
        return _InHost(torch.empty_like(strip, device="cpu"), None)

    @cached_property
    def _pinned(self) -> PinnedMemory:
        return self._at_the_end.enter_context(PINNED.used())

    def _give(self, has_ended: Callable[[Any], bool]) -> None:
        ending, self._ending = self._ending, []
        for piece, event in ending:
            if has_ended(event):
                self._pinned.give(piece)
            else:
                self._ending.append((piece, event))

    def fetch(self, stored: _InHost) -> torch.Tensor:
        """Back to the GPU; begins at once, and ``arrived`` has to be called before the strip is used."""
        strip = torch.empty_like(stored.tensor, device=self._device)
        if not self._has_streams or stored.piece is None:
            return strip.copy_(stored.tensor, non_blocking=stored.piece is not None)
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        self._back.wait_event(stored.written)
        with torch.cuda.stream(self._back):
            strip.copy_(stored.tensor, non_blocking=True)
        stored.read = self._back.record_event()
        self._coming[id(strip)] = (strip, stored.read)
        return strip

    def arrived(self, strip: torch.Tensor) -> torch.Tensor:
        """Make what follows wait for a strip that is being fetched."""
        coming = self._coming.pop(id(strip), None)
        if coming is not None:
            torch.cuda.current_stream(self._device).wait_event(coming[1])
        return strip

    def drop(self, stored: _InHost) -> None:
        """Nobody will fetch it any more: its memory is free when the last copy of it has ended."""
        if stored.piece is not None:
            event = stored.read or stored.written
            if event is None:
                self._pinned.give(stored.piece)
            else:
                self._ending.append((stored.piece, event))

    def close(self) -> None:
        """Wait for the copies that are on their way."""
        if self._out is not None:
            computes = torch.cuda.current_stream(self._device)
            computes.wait_stream(self._out)
            computes.wait_stream(self._back)
            computes.synchronize()
        self._leaving, self._coming = None, {}

    def leave(self) -> None:
        """Nothing is stored any more: what was pinned is for the next who asks."""
        self._give(lambda _: True)
        self._at_the_end.close()


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

    def leave(self) -> None:
        """All strips are dropped."""


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
        mounts = [line.split()[1:3] for line in os.fsdecode(Path("/proc/self/mounts").read_bytes()).splitlines()]
        device = os.stat(folder).st_dev
        for place, kind in mounts:
            with suppress(OSError):
                if kind in ("tmpfs", "ramfs") and os.stat(place).st_dev == device:
                    return True
    return False
