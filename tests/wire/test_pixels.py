from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import pixels as px
from remote_vae.wire import whole_files

EVERY_LEVEL = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_8_bit_levels_survive_a_host_that_rounds_and_one_that_truncates(dtype: torch.dtype) -> None:
    pixels = px.from_uint8(EVERY_LEVEL, dtype)
    assert pixels.dtype == dtype
    unit = ((pixels.float() + 1) / 2).clamp(0, 1)
    levels = EVERY_LEVEL.permute(0, 3, 1, 2)
    assert torch.equal((unit * 255).round().to(torch.uint8), levels)
    assert torch.equal((255.0 * unit).to(torch.uint8), levels)


def test_bfloat16_hosts_get_every_level_within_one() -> None:
    unit = ((px.from_uint8(EVERY_LEVEL, torch.bfloat16).float() + 1) / 2).clamp(0, 1)
    off = (unit * 255).round() - EVERY_LEVEL.permute(0, 3, 1, 2)
    assert off.abs().max() <= 1


def test_uint8_is_what_diffusers_image_processor_makes() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pixels = torch.randn(2, 3, 16, 24)
    expected = (VaeImageProcessor().postprocess(pixels, output_type="np") * 255).round().astype("uint8")
    assert np.array_equal(px.to_uint8(pixels).numpy(), expected)


def test_truncating_makes_the_levels_that_a1111_makes() -> None:
    pixels = torch.randn(1, 3, 16, 24)
    unit = torch.clamp((pixels + 1.0) / 2.0, min=0.0, max=1.0)
    expected = (255.0 * np.moveaxis(unit[0].numpy(), 0, 2)).astype(np.uint8)
    off = px.to_uint8(pixels, truncate=True)[0].numpy().astype(int) - expected
    # (x + 1) / 2 and x / 2 + 0.5 may differ in the last bit, which shows where a value sits on a level.
    assert np.abs(off).max() <= 1
    assert (off != 0).mean() < 0.001


def test_a_picture_has_the_exact_values_of_its_levels() -> None:
    image = Image.fromarray(EVERY_LEVEL[0].numpy())
    back = px.to_uint8(px.image_to_pixels(image))
    assert torch.equal(back, EVERY_LEVEL)


def test_png_is_lossless_and_jpeg_keeps_every_colour_sample() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    assert np.array_equal(np.array(px.image_from_bytes(px.image_to_bytes(image, "png"), max_pixels=10_000)), np.array(image))
    jpeg = Image.open(io.BytesIO(px.image_to_bytes(image, "jpg")))
    assert [component[1:3] for component in jpeg.layer] == [(1, 1)] * 3


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "CMYK", "LA", "I;16"])
def test_a_picture_of_any_mode_becomes_rgb_or_keeps_its_alpha(mode: str) -> None:
    image = Image.new(mode, (16, 8))
    assert px.to_rgb(image).mode == "RGB"
    kept = "RGBA" if mode.endswith("A") else "RGB"
    assert px.image_from_bytes(px.image_to_bytes(image, "png"), max_pixels=128).mode == kept
    assert px.image_from_bytes(px.image_to_bytes(image, "jpg"), max_pixels=128).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_png_has_every_level_of_colour_and_alpha(mode: str) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (16, 24, len(mode)), dtype=np.uint8)
    image = Image.fromarray(levels, mode)
    back = px.image_from_bytes(px.image_to_bytes(image, "png"), max_pixels=400)
    assert np.array_equal(np.array(back), np.array(image.convert("RGBA")))
    assert torch.equal(px.to_uint8(px.image_to_pixels(image, 4))[0], torch.from_numpy(np.array(back)))


def test_a_picture_without_alpha_is_opaque_where_alpha_is_wanted() -> None:
    assert px.image_to_pixels(Image.new("RGB", (16, 8)), 4)[:, 3].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("image", "white"),
    [
        (Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)), 65535),
        (Image.fromarray(np.linspace(0, 65535, 256).astype(np.int32).reshape(16, 16)), 65535),
        (Image.fromarray(np.linspace(0, 255, 256).astype(np.int32).reshape(16, 16)), 255),
        (Image.fromarray(np.linspace(0, 1, 256).astype(np.float32).reshape(16, 16)), 1),
        (Image.fromarray(np.linspace(0, 255, 256).astype(np.float32).reshape(16, 16)), 255),
        (Image.fromarray(np.linspace(0, 65535, 256).astype(np.float32).reshape(16, 16)), 65535),
    ],
)
def test_grey_of_many_levels_has_its_black_its_white_and_what_is_between(image: Image.Image, white: int) -> None:
    levels = np.array(px.to_rgb(image))
    assert np.array_equal(levels[..., 0].ravel(), np.arange(256))
    assert np.array_equal(levels[..., 1], levels[..., 2])


def test_a_dark_16_bit_file_stays_dark_also_where_pillow_calls_it_whole_numbers() -> None:
    # Mode "I" is what older versions make of a 16-bit PNG.
    image = Image.fromarray(np.full((8, 8), 200, np.int32))
    image.format = "PNG"
    assert px.to_rgb(image).getextrema() == ((1, 1),) * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_grey_without_a_white_is_refused(value: float) -> None:
    with pytest.raises(InvalidRequest, match="expected grey from 0 to 65535"):
        px.to_rgb(Image.fromarray(np.full((8, 8), value, np.float32)))


def test_a_16_bit_png_is_read_by_its_own_white() -> None:
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = px.image_from_bytes(png_of(Image.fromarray(grey)), max_pixels=256)
    assert np.array_equal(np.array(image)[..., 0].ravel(), np.arange(256))


def test_nothing_leaves_the_machine_but_pixels() -> None:
    image = Image.new("RGB", (16, 8))
    image.info = {"exif": b"Exif\0\0secret", "icc_profile": b"secret", "parameters": "secret", "comment": b"secret"}
    for image_format in ("png", "jpg"):
        assert b"secret" not in px.image_to_bytes(image, image_format)


# --- files from elsewhere


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
FILES = {"png": px.image_to_bytes(NOISE, "png"), "jpg": px.image_to_bytes(NOISE, "jpg")}


@pytest.fixture(params=[False, True], ids=["strict", "truncated allowed"])
def lenient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's switch, as other extensions of the process leave it."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, rows: bytes, *more: bytes, interlaced: int = 0) -> bytes:
    """An RGB PNG file with these inflated rows, whether there are enough of them or not, and further chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced))
    return b"".join([whole_files.PNG, header, *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def read(data: bytes) -> np.ndarray:
    return np.array(px.image_from_bytes(data, max_pixels=24 * 40))


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", ["png", "jpg"])
def test_a_file_that_is_cut_is_refused_wherever_it_is_cut(name: str) -> None:
    data = FILES[name]
    for length in range(0, len(data), 7):
        with pytest.raises(InvalidRequest):
            read(data[:length])


@pytest.mark.usefixtures("lenient")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 8 * len(FILES["png"]) - 1))
def test_a_png_with_a_flipped_bit_is_refused(bit: int) -> None:
    data = bytearray(FILES["png"])
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(InvalidRequest):
        read(bytes(data))


@given(bit=st.integers(0, 8 * len(FILES["jpg"]) - 1))
@example(bit=8 * 180)
def test_a_damaged_jpeg_is_judged_alike_whatever_others_allow_pillow(bit: int) -> None:
    data = bytearray(FILES["jpg"])
    data[bit // 8] ^= 1 << bit % 8
    results = []
    for switch in (False, True):
        with mock.patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", switch):
            try:
                results.append(read(bytes(data)).tobytes())
            except InvalidRequest:
                results.append(b"refused")
    assert results[0] == results[1]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("missing", [1, 121, 121 * 20])
def test_a_png_with_fewer_rows_than_its_header_says_is_refused_though_every_checksum_is_right(missing: int, level: int) -> None:
    rows = (b"\0" + bytes([level]) * 120) * 24
    assert (read(png(40, 24, rows)) == level).all()
    with pytest.raises(InvalidRequest, match="truncated"):
        read(png(40, 24, rows[:-missing]))


@given(width=st.integers(1, 20), height=st.integers(1, 20), mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]))
def test_a_black_png_of_any_mode_and_size_is_whole(width: int, height: int, mode: str) -> None:
    data = png_of(Image.new(mode, (width, height)))
    assert px.image_from_bytes(data, max_pixels=400).size == (width, height)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 5), (8, 9), (40, 24)])
def test_an_interlaced_png_is_read_whole_or_not_at_all(size: tuple[int, int]) -> None:
    width, height = size
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    levels = np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in levels[y::dy, x::dx] if row.size)
    assert np.array_equal(read(png(width, height, rows, interlaced=1)), levels)
    with pytest.raises(InvalidRequest, match="truncated"):
        read(png(width, height, rows[:-1], interlaced=1))


def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded() -> None:
    # There are no rows: decoding would fail, and the size is refused first.
    with pytest.raises(InvalidRequest, match="it has 9000 x 9000 pixels, expected at most 100"):
        px.image_from_bytes(png(9000, 9000, b""), max_pixels=100)


def test_others_limits_of_pixels_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert all(read(data).shape == (24, 40, 3) for data in FILES.values())


@pytest.mark.usefixtures("lenient")
def test_texts_that_inflate_to_gigabytes_are_not_inflated() -> None:
    bomb = zlib.compress(bytes(1 << 26), 9)
    texts = [
        chunk(b"zTXt", b"key\0\0" + bomb),
        chunk(b"iTXt", b"key\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"name\0\0" + bomb),
        chunk(b"tEXt", b"key\0" + bytes(1 << 22)),
    ]
    assert not read(png(40, 24, bytes(121 * 24), *texts * 20)).any()


def test_a_jpeg_of_more_scans_than_anybody_makes_is_refused() -> None:
    content = b"\xff\xda" * 101
    comment = b"\xff\xfe" + struct.pack(">H", len(content) + 2) + content
    with pytest.raises(InvalidRequest, match="more than 100 scans"):
        read(FILES["jpg"][:2] + comment + FILES["jpg"][2:])


@pytest.mark.parametrize("data", [b"", b"<html>", b"GIF89a" + bytes(40), b"RIFF\x24\0\0\0WEBPVP8 " + bytes(24)])
def test_what_is_not_a_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a PNG or JPEG"):
        read(data)


# --- a user's own files


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_users_picture_stands_upright(name: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image = Image.new("RGB", (40, 24), "black")
    image.paste("white", (0, 0, 8, 24))  # its left is what stands above
    image.save(tmp_path / name, exif=exif)
    picture = px.open_picture(tmp_path / name)
    assert picture.size == (24, 40)
    assert np.array(picture)[:4].min() > 200
    assert np.array(picture)[12:].max() < 50


def test_a_users_16_bit_and_animated_pictures_can_be_opened(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.tiff")
    assert np.array_equal(np.array(px.open_picture(tmp_path / "grey.tiff"))[..., 0].ravel(), np.arange(256))
    frames = [Image.new("L", (16, 16), level) for level in (200, 20)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert px.open_picture(tmp_path / "a.gif").getextrema() == ((200, 200),) * 3


def test_a_users_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for name in ("text.png", "missing.png", "."):
        with pytest.raises(InvalidRequest, match="cannot be read as a picture"):
            px.open_picture(tmp_path / name)


# --- films


def film(frames: Iterable[torch.Tensor]) -> bytes:
    file = io.BytesIO()
    px.write_mp4(frames, file)
    return file.getvalue()


def test_an_mp4_has_every_frame_in_its_size() -> None:
    frames = torch.randint(0, 255, (5, 33, 48, 3), dtype=torch.uint8)
    data = px.check_mp4(film(frames))
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert decoded == [(32, 48, 3)] * 5


def test_a_file_that_is_no_whole_mp4_is_not_believed() -> None:
    data = film(torch.randint(0, 255, (5, 32, 48, 3), dtype=torch.uint8))
    for length in range(0, len(data), 97):
        with pytest.raises(MalformedAnswer, match="mp4"):
            px.check_mp4(data[:length])
    for other in (b"<html>not a film</html>", data[1:], data + b"more", b"\0\0\0\1ftyp" + bytes(8)):
        with pytest.raises(MalformedAnswer, match="mp4"):
            px.check_mp4(other)
