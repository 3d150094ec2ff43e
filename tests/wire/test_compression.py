"""Bodies that are compressed without loss: the form, what comes back, and what does not get in."""

from __future__ import annotations

import gzip
import io
import itertools
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_vae.wire import compression
from remote_vae.wire.compression import Coding, best, codings, compressed, decompressed
from remote_vae.wire.tensors import DTYPES, TensorHead, tensor_to_bytes

CODINGS = pytest.mark.parametrize("coding", list(codings().values()), ids=list(codings()))
GZIP = codings()["delta-gzip"]


def values_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Something like a photo, with all of the dtype's extremes in it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(shape, generator=generator).cumsum(-1).sin() * 127 + 128
    values.view(-1)[:3] = torch.tensor([0.0, 255.0, 1.0])
    return values.to(torch.uint8) if dtype == torch.uint8 else (values / 127.5 - 1).to(dtype)


def of(tensor: torch.Tensor) -> tuple[memoryview, TensorHead]:
    return tensor_to_bytes(tensor), TensorHead(tuple(tensor.shape), tensor.dtype)


def as_documented(tensor: torch.Tensor, channel: int) -> bytes:
    """The form by its description alone, value by value."""
    array = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()
    size, made = array.itemsize, b""
    planes = np.moveaxis(array, channel, 0).astype(np.int64)
    for index in np.ndindex(planes.shape[1:-2]):
        where = (slice(None), *index)
        for start in range(0, planes.shape[-2], 256):
            band = planes[where][:, start : start + 256].copy()
            if size == 1 and band.shape[0] >= 3:
                band[0] -= band[1]
                band[2] -= band[1]
            rows = [[[band[c, y, x] - (band[c, y - 1, x] if y else 0) for x in range(band.shape[2])]
                     for y in range(band.shape[1])] for c in range(band.shape[0])]  # fmt: skip
            each = [row[x] - (row[x - 1] if x else 0) for plane in rows for row in plane for x in range(len(row))]
            flat = [int(value) % (1 << 8 * size) for value in each]
            made += b"".join(bytes(value >> 8 * byte & 255 for value in flat) for byte in range(size))
    return made


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize(
    ("shape", "channel"), [((2, 3, 5, 7), 1), ((1, 300, 2, 3), -1), ((1, 2, 3, 4, 4), -1), ((2, 4, 2, 3, 5), 1)]
)
def test_the_form_is_the_one_that_is_documented(dtype: torch.dtype, shape: tuple[int, ...], channel: int) -> None:
    tensor = values_of(shape, dtype)
    body = compressed(*of(tensor), channel, GZIP)
    assert gzip.decompress(body) == as_documented(tensor, channel)


@CODINGS
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize(
    ("shape", "channel"),
    [((1, 1, 1, 3), -1), ((2, 600, 9, 4), -1), ((3, 3, 257, 8), 1), ((1, 4, 5, 16, 8), 1), ((1, 9, 8, 2), -1)],
)
def test_every_value_comes_back(coding: Coding, dtype: torch.dtype, shape: tuple[int, ...], channel: int) -> None:
    values, head = of(values_of(shape, dtype))
    body = compressed(values, head, channel, coding)
    assert decompressed(body, head, channel, coding).tobytes() == bytes(values)


@CODINGS
def test_what_is_sent_stays_as_it_was(coding: Coding) -> None:
    values, head = of(values_of((1, 8, 8, 3), torch.uint8))
    before = bytes(values)
    compressed(values, head, -1, coding)
    assert bytes(values) == before


@CODINGS
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_noise_comes_back_as_well(coding: Coding, seed: int, rows: int, columns: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, (1, 3, rows, columns * 4), dtype=np.uint8)
    for dtype in DTYPES.values():
        head = TensorHead((1, 3, rows, columns * 4 // dtype.itemsize), dtype)
        assert decompressed(compressed(array.tobytes(), head, 1, coding), head, 1, coding).tobytes() == array.tobytes()


@CODINGS
def test_a_smooth_picture_gets_much_smaller(coding: Coding) -> None:
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    picture = torch.stack([x, x // 32 * 32, y], dim=-1).to(torch.uint8).unsqueeze(0)
    body = compressed(*of(picture), -1, coding)
    assert len(body) < picture.numel() / 30


VALUES, HEAD = of(values_of((1, 40, 31, 3), torch.uint8))


@CODINGS
@given(data=st.data())
def test_a_damaged_body_is_refused_or_whole(coding: Coding, data: st.DataObject) -> None:
    """Both kinds have a checksum: a body that was changed on its way never is another picture."""
    body = bytearray(compressed(VALUES, HEAD, -1, coding))
    position = data.draw(st.integers(0, len(body) - 1))
    body[position] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError):
        assert decompressed(body, HEAD, -1, coding).tobytes() == bytes(VALUES)


@CODINGS
def test_every_cut_body_is_refused(coding: Coding) -> None:
    body = compressed(VALUES, HEAD, -1, coding)
    for length in itertools.chain(range(40), range(40, len(body) - 8, 97), range(len(body) - 8, len(body))):
        with pytest.raises(ValueError, match="got a body that is not uint8"):
            decompressed(body[:length], HEAD, -1, coding)


@CODINGS
@pytest.mark.parametrize("rows", [1, 39, 41, 200])
def test_values_of_another_number_are_refused(coding: Coding, rows: int) -> None:
    body = compressed(VALUES, HEAD, -1, coding)
    with pytest.raises(ValueError, match=r"cut off|more"):
        decompressed(body, TensorHead((1, rows, 31, 3), torch.uint8), -1, coding)


@CODINGS
@given(body=st.binary(max_size=200))
def test_anything_else_is_refused(coding: Coding, body: bytes) -> None:
    with pytest.raises(ValueError, match="got a body that is not"):
        decompressed(body, HEAD, -1, coding)


@CODINGS
@pytest.mark.parametrize("more", [b"x", b"\x00\x01", bytes(40)])
def test_a_body_with_more_behind_it_is_refused(coding: Coding, more: bytes) -> None:
    with suppress(ValueError):  # gzip files may be padded with zeros
        assert decompressed(compressed(VALUES, HEAD, -1, coding) + more, HEAD, -1, coding).tobytes() == bytes(VALUES)
        assert coding is GZIP
        assert not more.strip(b"\x00")


def test_a_frame_of_a_million_blocks_is_refused_at_once() -> None:
    zstandard = pytest.importorskip("zstandard")
    body = compressed(VALUES, HEAD, -1, codings()["delta-zstd"])
    start = zstandard.frame_header_size(body)
    blocks = body[:start] + b"\x00\x00\x00" * 1_000_000 + body[start:]
    with pytest.raises(ValueError, match="not one frame"):
        decompressed(blocks, HEAD, -1, codings()["delta-zstd"])


def bomb(coding: Coding) -> bytes:
    """64 MB of nothing."""
    compressor = coding.compressor()
    return b"".join(compressor.compress(bytes(1 << 20)) for _ in range(64)) + compressor.flush()


@CODINGS
def test_a_bomb_takes_no_more_than_the_values_that_were_to_come(coding: Coding) -> None:
    body = bomb(coding)
    assert len(body) < 1 << 18
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="holds more"):
            decompressed(body, HEAD, -1, coding)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


def test_a_window_of_gigabytes_is_refused() -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    body = compressor.compress(bytes(HEAD.nbytes)) + compressor.flush()
    with pytest.raises(ValueError, match="got a body that is not"):
        decompressed(body, HEAD, -1, codings()["delta-zstd"])


def test_a_long_answer_takes_little_memory_beside_itself() -> None:
    head = TensorHead((1, 24, 256, 256, 3), torch.uint8)
    values = bytes(head.nbytes)
    body = compressed(values, head, -1, GZIP)
    tracemalloc.start()
    try:
        assert decompressed(body, head, -1, GZIP).tobytes() == values
        assert tracemalloc.get_traced_memory()[1] < 2.5 * head.nbytes  # the values, as numpy and here as bytes
    finally:
        tracemalloc.stop()


def test_what_is_no_picture_is_refused() -> None:
    head = TensorHead((4, 16), torch.uint8)
    with pytest.raises(ValueError, match="has not the axes of pictures"):
        decompressed(b"", head, 1, GZIP)


def test_the_best_of_what_both_sides_have_is_taken() -> None:
    assert best(["delta-gzip", "delta-zstd", "br"]) is next(iter(codings().values()))
    assert best(["br", "delta-gzip"]) is GZIP
    assert best(["br"]) is None


def test_without_a_package_there_is_what_python_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_of_package", lambda: None)
    monkeypatch.setattr(compression, "_of_python", lambda: None)
    assert list(codings.__wrapped__()) == ["delta-gzip"]


def test_the_gzip_form_is_any_gzip() -> None:
    """Whatever wrote it: a level, another strategy, a name in its head."""
    plain = gzip.decompress(compressed(VALUES, HEAD, -1, GZIP))
    file = io.BytesIO()
    with gzip.GzipFile("name.bin", "wb", 9, file) as writer:
        writer.write(plain)
    other = zlib.compressobj(wbits=31)
    for body in (file.getvalue(), other.compress(plain) + other.flush()):
        assert decompressed(body, HEAD, -1, GZIP).tobytes() == bytes(VALUES)
