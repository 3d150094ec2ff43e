"""Tensors between the host's memory and a device: beside the computation where it can be, and without a second copy of all.

On CUDA (and ROCm) each direction has a stream, and a buffer of pinned memory that everything goes through piece by piece: so
no more than these are ever pinned, a call's values come while the call before is computed, and its answer goes while the next
one is. Elsewhere a copy is a copy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from remote_vae.wire.tensors import on_cpu

log = logging.getLogger("remote_vae")

# Of each direction. A picture of 1024 px in 8 bits has 3 MB.
_PINNED_BYTES = 16 << 20


def moved(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` on ``device`` in ``dtype``: itself, where it is so already.

    torch makes a copy of the whole in the new dtype before it crosses over; here only a frame is ever copied twice.

    Args:
        tensor: ``[B, C, F, h, w]``, or anything with a batch; any device, any strides.
    """
    device = torch.device(device)
    if tensor.dtype == dtype or tensor.device == device:
        # One copy at the most.
        return tensor.to(device, dtype)
    made = torch.empty(tensor.shape, dtype=dtype, device=device)
    frames = 2 if tensor.ndim == 5 else 0
    for target, source in zip(made.unbind(frames), tensor.unbind(frames), strict=True):
        target.copy_(source)
    return made


class Mover:
    """Moves tensors to one device and back. For many threads.

    Args:
        device: which.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._up, self._down = (_Lane(device, priority) if device.type == "cuda" else None for priority in (0, -1))

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, which is on the CPU, on the device: on its way there. See ``arrived``."""
        return tensor.to(self.device) if self._up is None else self._up.to_device(tensor)

    def arrived(self, tensor: torch.Tensor) -> None:
        """What this thread computes from here on waits for a tensor of ``up``."""
        if self._up is not None:
            _wait(torch.cuda.current_stream(self.device), self._up.stream, tensor)

    def leaves(self, tensor: torch.Tensor) -> None:
        """``tensor`` is computed by what this thread has asked for until now; what is done in ``leaving`` waits for that."""
        if self._down is not None:
            _wait(self._down.stream, torch.cuda.current_stream(self.device), tensor)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """What this thread computes within it does not wait for the calls at work."""
        if self._down is None:
            yield
        else:
            with torch.cuda.stream(self._down.stream):
                yield

    def down(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in the host's memory, in row-major order; within ``leaving``. One that is there stays as it is."""
        return on_cpu(tensor) if self._down is None or tensor.is_cpu else self._down.to_host(tensor.contiguous())


def _wait(waiting: Any, stream: Any, tensor: torch.Tensor) -> None:
    waiting.wait_stream(stream)
    # Its memory was taken in the other one, and is not to be given to others before this one is through.
    tensor.record_stream(waiting)


class _Lane:
    """One direction: a stream and a pinned buffer."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self.stream: Any = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
        self._device = device
        self._lock = threading.Lock()
        self._buffer: torch.Tensor | None = None
        self._pins = True

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._lock, torch.cuda.stream(self.stream):
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            source, target = _as_bytes(tensor.contiguous()), _as_bytes(made)
            for start, piece in self._pieces(len(source)):
                part = source[start : start + len(piece)]
                # The copy before is to be through with the buffer.
                self.stream.synchronize()
                target[start : start + len(piece)].copy_(piece.copy_(part), non_blocking=True)
            return made if self._pins else made.copy_(tensor)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        with self._lock:
            source, target = _as_bytes(tensor), _as_bytes(made)
            for start, piece in self._pieces(len(target)):
                piece.copy_(source[start : start + len(piece)], non_blocking=True)
                self.stream.synchronize()
                target[start : start + len(piece)].copy_(piece)
            return made if self._pins else made.copy_(tensor)

    def _pieces(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The buffer, or its beginning, for each piece of so many bytes; none where nothing can be pinned."""
        buffer = self._pinned()
        if buffer is not None:
            for start in range(0, size, len(buffer)):
                yield start, buffer[: size - start]

    def _pinned(self) -> torch.Tensor | None:
        if self._buffer is None and self._pins:
            try:
                self._buffer = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                # Systems limit how much may be pinned, WSL to little. A copy to other memory waits for the computation.
                log.info("no pinned memory: %s", error)
                self._pins = False
        return self._buffer


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
