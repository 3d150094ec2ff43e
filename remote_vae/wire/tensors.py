"""Tensors as bytes: dtypes by name, shapes as text, and packed Flux latents."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Union

import numpy as np
import torch

from remote_vae.errors import InvalidRequest, MalformedAnswer

Buffer = Union[bytes, bytearray, memoryview]

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NUMPY: dict[torch.dtype, Any] = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.bfloat16: np.int16,
    torch.uint8: np.uint8,
}
# dtype.itemsize came with torch 2.1; hosts still run older ones.
_SIZES = {torch.float16: 2, torch.float32: 4, torch.bfloat16: 2, torch.uint8: 1}

# No picture has a longer side; keeps a product of sizes far from absurd before anything is allocated.
MAX_SIZE = 65536
MAX_DIMENSIONS = 5

# Flux packs 2 x 2 latent cells into one token: [B, (h / 2)(w / 2), 4 C] (diffusers' FluxPipeline._pack_latents).
PACK = 2
MIN_CHANNELS = 4


def dtype_name(dtype: torch.dtype) -> str:
    """The protocol's name of ``dtype``.

    Raises:
        InvalidRequest: the protocol cannot carry it.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise InvalidRequest(f"dtype {dtype} cannot be sent; use one of {', '.join(DTYPES)}") from None


def tensor_to_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values in row-major order, little endian, whatever its strides, device or autograd state.

    Copies only what is not already contiguous on the CPU; the view keeps the values alive.
    """
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().to("cpu").contiguous()
    # numpy has no bfloat16.
    values = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return values.data.cast("B")


# Bits as whole numbers are in the order of the magnitudes, infinity and NaN last: of values >= 0 as signed numbers, of the
# others as unsigned ones.
_BITS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float16: (np.int16, np.uint16),
    torch.bfloat16: (np.int16, np.uint16),
    torch.float32: (np.int32, np.uint32),
}


def is_within(values: Buffer, dtype: torch.dtype, limit: float | None = None) -> bool:
    """Whether every value in the bytes is finite and, with ``limit``, of no larger magnitude.

    On the bits: torch.isfinite and torch.aminmax make temporaries of the whole and wake torch's threads, which costs a small
    call more than its transfer.
    """
    if dtype not in _BITS:
        return True
    signed, unsigned = _BITS[dtype]
    largest, most_negative = _allowed_bits(limit, dtype)
    return bool(
        np.maximum.reduce(np.frombuffer(values, dtype=signed), initial=0) <= largest
        and np.maximum.reduce(np.frombuffer(values, dtype=unsigned), initial=0) <= most_negative
    )


@cache
def _allowed_bits(limit: float | None, dtype: torch.dtype) -> tuple[int, int]:
    """The bits of ``limit``, or of the largest finite value (one below infinity's), and those of its negative."""
    bits = tensor_to_bytes(torch.tensor([float("inf") if limit is None else limit], dtype=dtype))
    largest = int.from_bytes(bits, "little") - (limit is None)
    return largest, largest - int(np.iinfo(_BITS[dtype][0]).min)


def tensor_from_bytes(buffer: Buffer | np.ndarray, head: TensorHead) -> torch.Tensor:
    """The tensor that ``head`` describes, on the CPU, sharing memory with a writable ``buffer``.

    Raises:
        MalformedAnswer: the length does not fit shape and dtype.
    """
    flat = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, dtype=np.uint8)
    if flat.nbytes != head.nbytes:
        raise MalformedAnswer(f"{flat.nbytes} bytes for {head}, which needs {head.nbytes}")
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
            raise ValueError(f"shape {list(self.shape)} must have 1 to {MAX_DIMENSIONS} dimensions")
        if any(not 1 <= size <= MAX_SIZE for size in self.shape):
            raise ValueError(f"shape {list(self.shape)} must have sizes from 1 to {MAX_SIZE}")
        if self.dtype not in _NAMES:
            raise ValueError(f"unknown dtype {self.dtype}")

    @property
    def nbytes(self) -> int:
        """Length of the body in bytes."""
        return math.prod(self.shape) * _SIZES[self.dtype]

    def __str__(self) -> str:
        return f"{_NAMES[self.dtype]} {list(self.shape)}"

    @classmethod
    def parse(cls, shape: object, dtype: object) -> TensorHead:
        """From what a peer sent: ``shape`` a JSON list or a list of numbers or digits, ``dtype`` a name.

        Raises:
            ValueError: it does not describe a tensor of the protocol.
        """
        if isinstance(shape, str):
            text = shape
            try:
                shape = json.loads(text)
            except ValueError:
                raise ValueError(f"shape {text[:80]!r} is not a JSON list") from None
        if not isinstance(shape, list):
            raise ValueError(f"shape {shape!r} is not a list")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        return cls(tuple(_parse_size(size) for size in shape), DTYPES[dtype])


def _parse_size(size: object) -> int:
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(size, str) and size.isascii() and size.isdigit() and len(size) <= 6:
        return int(size)
    raise ValueError(f"size {size!r} in the shape is not a whole number")


def is_packed(shape: tuple[int, ...], height: int | None, width: int | None, downscale: int = 8) -> bool:
    """Whether 3-D latents are packed ``[B, S, 4 C]`` rather than one picture's ``[C, h, w]`` without its batch axis.

    S = (H / 16)(W / 16) and the last dimension decide. ``[C, h, w]`` has h = H / 8, which is S only for W = 32, and then w = 4,
    which would be packed latents of one channel; no VAE has fewer than four.
    """
    if len(shape) != 3 or not height or not width:
        return False
    cell = downscale * PACK
    channels, rest = divmod(shape[2], PACK * PACK)
    return shape[1] == (height // cell) * (width // cell) and channels >= MIN_CHANNELS and not rest


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """``[B, C, h, w]`` to ``[B, (h / 2)(w / 2), 4 C]``; odd last rows and columns cannot be packed.

    Raises:
        InvalidRequest: h or w is odd.
    """
    batch, channels, height, width = latents.shape
    if height % PACK or width % PACK:
        raise InvalidRequest(f"latents of {height} x {width} cells cannot be packed: both must be even")
    cells = latents.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PACK * PACK)


def unpack_latents(packed: torch.Tensor, height: int, width: int, downscale: int = 8) -> torch.Tensor:
    """``[B, S, 4 C]`` to ``[B, C, h, w]``; ``height`` and ``width`` in pixels are rounded down to multiples of 16.

    Raises:
        InvalidRequest: S does not fit height and width.
    """
    rows, columns = height // (downscale * PACK), width // (downscale * PACK)
    batch, tokens, features = packed.shape
    if tokens != rows * columns or features % (PACK * PACK):
        raise InvalidRequest(
            f"packed latents {list(packed.shape)} do not fit height {height} and width {width}: "
            f"expected [B, {rows * columns}, 4 x channels]"
        )
    cells = packed.reshape(batch, rows, columns, features // (PACK * PACK), PACK, PACK)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * PACK, columns * PACK)
