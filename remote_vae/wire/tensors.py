"""Tensors as bytes: dtypes by name, shapes as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire.errors import one_line
from remote_vae.wire.http import Buffer

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
_ANY_DTYPE = "float16, float32, bfloat16 or uint8"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NUMPY: dict[torch.dtype, Any] = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.bfloat16: np.int16,
    torch.uint8: np.uint8,
}

# No picture has a longer side; keeps a product of sizes far from absurd before anything is allocated.
MAX_SIZE = 65536
MAX_DIMENSIONS = 5

# Values that are looked at together where torch (before 2.2) cannot look at float16 on the CPU.
_PART = 1 << 20

_SHAPE = re.compile(r" *\[[0-9, ]{1,60}\] *")
_SIZE = re.compile(r" *[0-9]{1,6} *")


def dtype_name(dtype: torch.dtype) -> str:
    """The protocol's name of ``dtype``.

    Raises:
        InvalidRequest: the protocol cannot carry it.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise InvalidRequest(f"got dtype {dtype}, expected {_ANY_DTYPE}") from None


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU in row-major order, free of autograd; copied only where it is not so already."""
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().to("cpu").contiguous()
    return tensor


def tensor_to_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values in row-major order, little endian, whatever its strides, device or autograd state.

    Copies only what ``on_cpu`` copies; the view keeps the values alive.
    """
    tensor = on_cpu(tensor)
    # numpy has no bfloat16.
    values = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return values.data.cast("B")


def is_within(tensor: torch.Tensor, limit: float | None = None) -> bool:
    """Whether every value is finite and, with ``limit``, of no larger magnitude.

    torch.aminmax hands NaN on and takes one pass: 7 us for latents of 1024 px in float16, 0.25 ms for the picture in float16,
    0.4 ms in float32. Comparing their bits in numpy takes 4 us, 0.5 ms and 1.0 ms; torch.isfinite 4 ms (torch 2.13, 2 cores).
    """
    if not tensor.is_floating_point():
        return True
    largest = torch.finfo(tensor.dtype).max if limit is None else limit
    return all(-largest <= low.item() and high.item() <= largest for low, high in _extremes(tensor.detach()))


def _extremes(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if _looks_at_half or not tensor.is_cpu or tensor.dtype != torch.float16:
        yield torch.aminmax(tensor)
    else:
        yield from (torch.aminmax(part.float()) for part in torch.split(tensor.flatten(), _PART))


def _has_aminmax_of_half() -> bool:
    try:
        torch.aminmax(torch.zeros(1, dtype=torch.float16))
    except RuntimeError:
        return False
    return True


_looks_at_half = _has_aminmax_of_half()


def tensor_from_bytes(buffer: Buffer | np.ndarray, head: TensorHead) -> torch.Tensor:
    """The tensor that ``head`` describes, on the CPU, sharing memory with a writable ``buffer``.

    Raises:
        MalformedAnswer: the length does not fit shape and dtype.
    """
    flat = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, dtype=np.uint8)
    if flat.nbytes != head.nbytes:
        raise MalformedAnswer(f"got {flat.nbytes} bytes for {head}, expected {head.nbytes}")
    if not flat.flags.writeable:
        flat = flat.copy()
    tensor = torch.from_numpy(flat.view(_NUMPY[head.dtype]).reshape(head.shape))
    return tensor.view(torch.bfloat16) if head.dtype == torch.bfloat16 else tensor


@dataclass(frozen=True)
class TensorHead:
    """Shape and dtype of a tensor whose bytes are still to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS:
            raise ValueError(f"got {len(self.shape)} dimensions, expected 1 to {MAX_DIMENSIONS}")
        if any(not 1 <= size <= MAX_SIZE for size in self.shape):
            raise ValueError(f"got shape {[min(size, 10**9) for size in self.shape]}, expected sizes from 1 to {MAX_SIZE}")
        if self.dtype not in _NAMES:
            raise ValueError(f"got dtype {self.dtype}, expected {_ANY_DTYPE}")

    @property
    def nbytes(self) -> int:
        """Length of the body in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{_NAMES[self.dtype]} {list(self.shape)}"

    @classmethod
    def parse(cls, shape: object, dtype: object) -> TensorHead:
        """From what a peer sent: ``shape`` a JSON list or a list of numbers or digits, ``dtype`` a name.

        Raises:
            ValueError: it does not describe a tensor of the protocol.
        """
        if isinstance(shape, str):
            if not _SHAPE.fullmatch(shape):
                raise ValueError(f"got shape {one_line(shape, 60)!r}, expected whole numbers such as [1, 4, 64, 64]")
            shape = shape.strip(" []").split(",")
        if not isinstance(shape, list):
            raise ValueError(f"got {type(shape).__name__} as shape, expected a list of whole numbers")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            shown = one_line(dtype, 40) if isinstance(dtype, str) else type(dtype).__name__
            raise ValueError(f"got dtype {shown!r}, expected {_ANY_DTYPE}")
        return cls(tuple(map(_parse_size, shape)), DTYPES[dtype])


def _parse_size(size: object) -> int:
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(size, str) and _SIZE.fullmatch(size):
        return int(size)
    shown = one_line(size, 20) if isinstance(size, str) else type(size).__name__
    raise ValueError(f"got {shown!r} in the shape, expected whole numbers")
