"""Pictures and tensors made small on the wire without loss: differences of neighbours, then zstd or gzip.

The form, for those who write another client or server. The values are taken as whole numbers of their size in bytes, which wrap
around; of each picture as planes ``[C, H, W]``. They go
picture by picture (frame by frame) in bands of 256 rows, of which the last may have fewer. In each band

1. of uint8 values with three channels or more the second one (green) is taken from the first and from the third,
2. from each row the one above is taken, then from each value the one to its left; the first of a band stay as they are,
3. the lowest byte of all values comes first, then the next byte of all, and so on.

What comes of all bands is compressed as one zstd frame or one gzip member. Photos and their decodes take 0.6 to 1.8 bytes a
pixel (``bench/compression.py``).
"""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch

from remote_vae.wire.http import Buffer
from remote_vae.wire.tensors import TensorHead

# Rows that are made at once: so little that all of it stays in the processor's cache, and beside the values nothing is needed.
BAND = 256
# Smaller bodies are not worth the work.
SMALLEST = 64 * 1024

_ZSTD = "delta-zstd"
_GZIP = "delta-gzip"
# Seconds a byte of the values, for both sides together, on one core of a server of 2023 (``bench/compression.py``).
_ZSTD_SECONDS = 7e-9
_GZIP_SECONDS = 18e-9

_DIMENSIONS = (4, 5)
_RGB = 3
_GREEN = 1
# Bits of the distance over which zstd looks back: less than a band. And what a receiver takes of others, at the most.
_WINDOW = 18
_MAX_WINDOW = 23
# Values have few repetitions: only long ones are looked for, which is quicker, and smaller by a tenth than zstd's level 1.
_LONG_MATCH = 7
_SMALL_HASH = 6

# Blocks of a frame, which have 128 KB of values: a frame of more is made to take long.
_FEWEST_BLOCKS = 4096
_SMALLEST_BLOCK = 1024

_WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# torch sums along rows three times as fast as numpy, and wraps around like it.
_SUMS: dict[int, tuple[Any, torch.dtype]] = {
    1: (np.uint8, torch.uint8),
    2: (np.int16, torch.int16),
    4: (np.int32, torch.int32),
}


class _Compressor(Protocol):
    def compress(self, data: Any) -> bytes: ...

    def flush(self) -> bytes: ...


@dataclass(frozen=True)
class Coding:
    """One way to compress, which this machine can do.

    Attributes:
        name: on the wire.
        seconds_per_byte: of the values, for both sides together.
        compressor: a new one.
        opened: a body as a file of what was compressed.
    """

    name: str
    seconds_per_byte: float
    compressor: Callable[[], _Compressor]
    opened: Callable[[Buffer], io.BufferedIOBase]


@cache
def codings() -> dict[str, Coding]:
    """Those of this machine by name, the best one first: zstd where Python (3.14) or the package zstandard has it."""
    zstd = _of_python() or _of_package()
    # Runs of one value and Huffman codes: half of deflate's time, and smaller, as nothing else repeats.
    plain = Coding(
        _GZIP,
        _GZIP_SECONDS,
        lambda: zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS, 9, zlib.Z_RLE),
        lambda body: gzip.GzipFile(fileobj=io.BytesIO(body)),
    )
    return {coding.name: coding for coding in (zstd, plain) if coding is not None}


def best(names: Collection[str]) -> Coding | None:
    """The best of ``names`` that this machine can do; None where there is none."""
    return next((coding for name, coding in codings().items() if name in names), None)


def compressed(values: Buffer, head: TensorHead, channel: int, coding: Coding) -> bytes:
    """``values``, the bytes of what ``head`` describes, made small.

    Args:
        values: of four or five axes.
        head: their shape and dtype.
        channel: which axis has the channels.
        coding: of ``codings``.
    """
    compressor, made = coding.compressor(), []
    for band in _bands(np.frombuffer(values, dtype=np.uint8), head, channel):
        differences = band.copy()
        if _has_colours(band):
            differences[0] -= differences[_GREEN]
            differences[2] -= differences[_GREEN]
        differences[:, 1:] -= differences[:, :-1].copy()
        differences[:, :, 1:] -= differences[:, :, :-1].copy()
        size = differences.itemsize
        made.append(compressor.compress(np.ascontiguousarray(differences.reshape(-1).view(np.uint8).reshape(-1, size).T)))
    made.append(compressor.flush())
    return b"".join(made)


def decompressed(body: Buffer, head: TensorHead, channel: int, coding: Coding) -> np.ndarray:
    """What was compressed so, as uint8 ``[N]``; beside it and ``body`` a few bands are all the memory that this takes.

    Raises:
        ValueError: ``body`` is not the values that ``head`` describes, compressed so.
    """
    values = np.empty(head.nbytes, dtype=np.uint8)
    try:
        with coding.opened(body) as file:
            for band in _bands(values, head, channel):
                _fill(band, file)
            if file.read(1):
                raise ValueError("it holds more")
    except Exception as error:  # of whichever library: damaged, cut, or something else
        why = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"got a body that is not {head} in {coding.name}: {why}") from None
    return values


def _bands(values: np.ndarray, head: TensorHead, channel: int) -> Iterator[np.ndarray]:
    """Views ``[C, rows, W]`` of ``values``, picture by picture. Raises ValueError: these are no pictures."""
    if len(head.shape) not in _DIMENSIONS:
        raise ValueError(f"{head} has not the axes of pictures")
    planes = np.moveaxis(values.view(_WORDS[head.dtype.itemsize]).reshape(head.shape), channel, 0)
    for index in np.ndindex(planes.shape[1:-2]):
        where = (slice(None), *index)
        picture = planes[where]
        for start in range(0, picture.shape[1], BAND):
            yield picture[:, start : start + BAND]


def _fill(band: np.ndarray, file: io.BufferedIOBase) -> None:
    """Put the next values of ``file`` into ``band``. Raises ValueError: there are not so many."""
    size = band.itemsize
    read = np.empty((size, band.size), dtype=np.uint8)
    view, filled = read.data.cast("B"), 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise ValueError("it is cut off")
        filled += count
    signed, dtype = _SUMS[size]
    differences = np.ascontiguousarray(read.T).view(signed).reshape(band.shape)
    sums = torch.cumsum(torch.from_numpy(differences), 2, dtype=dtype).numpy().view(band.dtype)
    for row in range(1, sums.shape[1]):
        sums[:, row] += sums[:, row - 1]
    if _has_colours(sums):
        sums[0] += sums[_GREEN]
        sums[2] += sums[_GREEN]
    band[:] = sums


def _has_colours(band: np.ndarray) -> bool:
    return band.itemsize == 1 and band.shape[0] >= _RGB


# --- zstd, of whoever brings it ------------------------------------------------------------------------------------------


def _of_python() -> Coding | None:
    """Of the standard library, from Python 3.14 on."""
    try:
        zstd: Any = importlib.import_module("compression.zstd")
    except ImportError:
        return None
    option = zstd.CompressionParameter
    options = {
        option.compression_level: 1,
        option.window_log: _WINDOW,
        option.min_match: _LONG_MATCH,
        option.hash_log: _SMALL_HASH,
        option.checksum_flag: 1,
    }
    bound = {zstd.DecompressionParameter.window_log_max: _MAX_WINDOW}
    return Coding(
        _ZSTD,
        _ZSTD_SECONDS,
        lambda: zstd.ZstdCompressor(options=options),
        lambda body: zstd.ZstdFile(io.BytesIO(body), options=bound),
    )


def _of_package() -> Coding | None:
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        return None
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=_WINDOW, min_match=_LONG_MATCH, hash_log=_SMALL_HASH, write_checksum=True
    )

    def opened(body: Buffer) -> io.BufferedIOBase:
        # Its reader takes a frame without its end for a whole one.
        checksum = 4 if zstandard.get_frame_parameters(body).has_checksum else 0
        if _end_of_blocks(body, zstandard.frame_header_size(body)) + checksum != len(body):
            raise ValueError("it is not one frame")
        reader: io.BufferedIOBase = zstandard.ZstdDecompressor(max_window_size=1 << _MAX_WINDOW).stream_reader(body)
        return reader

    return Coding(_ZSTD, _ZSTD_SECONDS, lambda: zstandard.ZstdCompressor(compression_params=parameters).compressobj(), opened)


def _end_of_blocks(body: Buffer, start: int) -> int:
    """Where the last block of a zstd frame ends whose first one begins at ``start``; -1: nowhere. See RFC 8878, 3.1.1.2."""
    for _ in range(_FEWEST_BLOCKS + len(body) // _SMALLEST_BLOCK):
        head = int.from_bytes(body[start : start + 3], "little")
        is_last, is_run, size = head & 1, head >> 1 & 3 == 1, head >> 3
        start += 3 + (1 if is_run else size)
        if start > len(body):
            break
        if is_last:
            return start
    return -1
