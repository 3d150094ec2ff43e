from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import pixels as px

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
def test_a_picture_of_any_mode_is_sent_as_rgb(mode: str) -> None:
    image = Image.new(mode, (16, 8))
    assert px.image_from_bytes(px.image_to_bytes(image, "png"), max_pixels=128).mode == "RGB"


def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded() -> None:
    data = px.image_to_bytes(Image.new("RGB", (64, 64)), "png")
    # Only the header is left: decoding would fail, and the size is refused first.
    with pytest.raises(InvalidRequest, match="at most 100"):
        px.image_from_bytes(data[:60], max_pixels=100)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"<html>", b"GIF89a" + bytes(40), b"\xff\xd8\xff" + bytes(100)])
def test_what_is_not_a_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a PNG"):
        px.image_from_bytes(data, max_pixels=100)


def test_an_mp4_has_every_frame_in_its_size() -> None:
    frames = torch.randint(0, 255, (5, 33, 48, 3), dtype=torch.uint8)
    data = px.check_mp4(px.video_to_mp4(frames))
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert decoded == [(32, 48, 3)] * 5


def test_a_file_that_is_not_mp4_is_not_believed() -> None:
    with pytest.raises(MalformedAnswer, match="mp4"):
        px.check_mp4(b"<html>not a film</html>")
