from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer, NotFinite
from remote_vae.vae.families import Family, find_family
from remote_vae.vae.packed import BatchNormed
from remote_vae.wire import DecodeRequest, EncodeAnswer, EncodeRequest, HttpResponse, Scaling, encode_response, expect_encode
from remote_vae.wire.tensors import DTYPES

PLAIN = Family("plain", "a plain VAE", 4, 8)
PICTURE = Image.linear_gradient("L")
PIXELS = torch.linspace(-1, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)


def believed(request: EncodeRequest, answer: HttpResponse) -> EncodeAnswer:
    """The answer as a client takes it."""
    expected = expect_encode(request, {name.lower(): value for name, value in answer.headers.items()})
    assert expected.exact == expected.limit == len(answer.body)
    return expected.finish(np.frombuffer(bytes(answer.body), np.uint8))


def tensor_head(shape: object, dtype: str = "float32", label: str = "tensor/binary") -> dict[str, str]:
    return {"content-type": label, "shape": json.dumps(shape), "dtype": dtype}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("a path", "PIL image"),
        (torch.zeros(3, 8, 8), "expected 4 or 5 dimensions"),
        (torch.zeros(1, 5, 8, 8), r"\[B, 3, H, W\]"),
    ],
)
def test_an_encode_that_cannot_be_answered_cannot_be_made(image: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        EncodeRequest(image)  # type: ignore[arg-type]


def test_a_posterior_is_never_scaled() -> None:
    with pytest.raises(InvalidRequest, match="never scaled"):
        EncodeRequest(torch.zeros(1, 3, 8, 8), Scaling(0.5), posterior=True)
    with pytest.raises(InvalidRequest, match="never scaled or packed"):
        EncodeRequest(torch.zeros(1, 3, 8, 8), packed=True, posterior=True)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_a_tensor_to_encode_arrives_as_it_was_sent(name: str) -> None:
    tensor = torch.rand(2, 3, 16, 24).to(DTYPES[name])
    http = EncodeRequest(tensor, posterior=True, family="sdxl").to_http()
    got = EncodeRequest.from_http(http.query, bytes(http.body))
    assert isinstance(got.image, torch.Tensor)
    assert torch.equal(got.image, tensor)
    assert got.posterior
    assert got.family == "sdxl"


def test_a_picture_to_encode_arrives_with_every_level_and_without_content_type() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    http = EncodeRequest(Image.fromarray(levels, "RGBA"), Scaling(0.5, 0.25)).to_http()
    assert "Content-Type" not in http.headers
    got = EncodeRequest.from_http(http.query, bytes(http.body))
    assert np.array_equal(np.array(got.image), levels[..., :3])
    assert got.scaling == Scaling(0.5, 0.25)
    assert got.pixels(PLAIN).shape == (1, 3, 16, 24)


def test_uint8_pixels_stand_for_levels() -> None:
    tensor = torch.tensor([0, 255], dtype=torch.uint8).repeat(96).reshape(1, 3, 8, 8)
    assert EncodeRequest(tensor).pixels(PLAIN).unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("posterior", [False, True])
def test_latents_and_posteriors_come_back_bit_equal(posterior: bool) -> None:
    latents = torch.randn(2, 8, 4, 6)
    got = believed(EncodeRequest(torch.zeros(2, 3, 32, 48), posterior=True), encode_response(latents, is_posterior=posterior))
    assert torch.equal(got.latents, latents)
    assert got.is_posterior is posterior


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (9, 3)])
@pytest.mark.parametrize(("channels", "scale"), [(3, 8), (4, 16), (3, 32)])
def test_a_video_to_encode_arrives_and_its_latents_come_back(
    frames: int, latent_frames: int, channels: int, scale: int
) -> None:
    request = EncodeRequest(torch.rand(2, channels, frames, 64, 96), posterior=True)
    http = request.to_http()
    got = EncodeRequest.from_http(http.query, bytes(http.body))
    assert isinstance(got.image, torch.Tensor)
    assert isinstance(request.image, torch.Tensor)
    assert torch.equal(got.image, request.image)
    latents = torch.randn(2, 8, latent_frames, 64 // scale, 96 // scale)
    assert torch.equal(believed(request, encode_response(latents, is_posterior=True)).latents, latents)


def test_a_plain_endpoint_gets_no_key_that_it_did_not_get_before() -> None:
    http = EncodeRequest(torch.zeros(1, 3, 8, 8), Scaling(0.5)).to_http()
    assert [key for key, _ in http.query] == ["scaling_factor", "shape", "shape", "shape", "shape", "dtype"]


VIDEO_VAE = Family("video", "a video VAE", 4, 8, video=True, frame_scale=4)
WITH_ALPHA = Family("rgba", "a VAE with alpha", 4, 8, pixel_channels=4, video=True)
SMALL_PICTURE = PICTURE.resize((48, 32))


@pytest.mark.parametrize("image", [PIXELS, SMALL_PICTURE])
def test_a_picture_is_one_frame_for_a_video_vae_and_answered_as_a_picture(image: torch.Tensor | Image.Image) -> None:
    request = EncodeRequest(image)
    assert request.pixels(VIDEO_VAE).shape == (1, 3, 1, 32, 48)
    assert request.in_form(torch.zeros(1, 4, 1, 4, 6), VIDEO_VAE).shape == (1, 4, 4, 6)
    clip = EncodeRequest(PIXELS.unsqueeze(2))
    assert clip.in_form(torch.zeros(1, 4, 1, 4, 6), VIDEO_VAE).shape == (1, 4, 1, 4, 6)


@pytest.mark.parametrize("image", [PIXELS, PIXELS.unsqueeze(2), SMALL_PICTURE, (PIXELS * 127).abs().to(torch.uint8)])
def test_what_has_no_alpha_is_opaque_to_a_vae_with_alpha(image: torch.Tensor | Image.Image) -> None:
    pixels = EncodeRequest(image).pixels(WITH_ALPHA)
    assert pixels.shape == (1, 4, 1, 32, 48)
    assert pixels[:, 3].unique().tolist() == [1.0]


@pytest.mark.parametrize("alpha", [False, True])
def test_the_alpha_of_a_picture_goes_where_it_is_wanted(alpha: bool) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    http = EncodeRequest(Image.fromarray(levels, "RGBA"), alpha=alpha).to_http()
    got = EncodeRequest.from_http(http.query, bytes(http.body))
    assert got.pixels(PLAIN).shape == (1, 3, 16, 24)
    expected = torch.from_numpy(levels if alpha else np.concatenate([levels[..., :3], np.full_like(levels[..., :1], 255)], 2))
    assert torch.equal(got.pixels(WITH_ALPHA), (expected.movedim(-1, 0) / 127.5 - 1)[None, :, None])


FLUX, FLUX2 = find_family("flux"), find_family("flux2")
NORM = BatchNormed(torch.randn(128), torch.rand(128) + 0.5)


@pytest.mark.parametrize(
    ("family", "raw", "shape"), [(FLUX, (2, 16, 4, 6), (2, 6, 64)), (FLUX2, (2, 32, 4, 6), (2, 128, 2, 3))]
)
def test_packed_latents_are_made_where_they_are_asked_for_and_decode_to_the_raw_ones(
    family: Family, raw: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    http = EncodeRequest(torch.rand(2, 3, 32, 48), packed=True).to_http()
    request = EncodeRequest.from_http(http.query, bytes(http.body))
    latents = torch.randn(raw)
    packed = request.in_form(latents, family, NORM)
    assert packed.shape == shape
    got = believed(request, encode_response(packed)).latents
    assert torch.equal(got, packed)
    assert torch.allclose(DecodeRequest(got, height=32, width=48).unpacked(family, NORM), latents, atol=1e-5)


@pytest.mark.parametrize("form", ["patched", "PACKED", "\x1b[31m"])
def test_another_form_than_packed_is_refused(form: str) -> None:
    query = [("form", form), *(("shape", str(size)) for size in (1, 3, 8, 8)), ("dtype", "uint8")]
    with pytest.raises(InvalidRequest, match="expected packed"):
        EncodeRequest.from_http(query, bytes(192))


@pytest.mark.parametrize(
    "headers",
    [
        tensor_head([1, 16, 4, 6]),
        tensor_head([1, 16, 10, 4, 6]),
        tensor_head([2, 16, 3, 4, 6]),
        tensor_head([1, 999, 3, 4, 6]),
        tensor_head([1, 16, 3, 4, 8]),
        tensor_head([1, 16, 65536, 65536, 65536]),
        {**tensor_head([1, 15, 3, 4, 6]), "posterior": "True"},
    ],
)
def test_an_answer_that_is_not_of_this_video_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(MalformedAnswer):
        expect_encode(EncodeRequest(torch.zeros(1, 3, 9, 32, 48), posterior=True), headers)


@pytest.mark.parametrize("shape", [[1, 7, 64], [1, 6, 1024], [2, 6, 64], [1, 128, 2, 2], [6, 64]])
def test_packed_latents_of_another_size_are_refused(shape: list[int]) -> None:
    with pytest.raises(MalformedAnswer):
        expect_encode(EncodeRequest(torch.zeros(1, 3, 32, 48), packed=True), tensor_head(shape))


def test_a_video_whose_latents_are_the_same_everywhere_is_not_believed() -> None:
    request = EncodeRequest(torch.rand(1, 3, 9, 32, 48))
    with pytest.raises(MalformedAnswer, match="the same everywhere"):
        believed(request, encode_response(torch.zeros(1, 16, 3, 4, 6)))


def test_500_x_333_pixels_give_62_x_41_latents() -> None:
    picture = Image.new("RGB", (500, 333))
    assert expect_encode(EncodeRequest(picture), tensor_head([1, 4, 41, 62], "float16")).exact == 4 * 41 * 62 * 2


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "tensor/binary"},
        tensor_head([1, 4, 4, 5]),
        tensor_head([2, 4, 4, 6]),
        tensor_head([1, 999, 4, 6]),
        tensor_head([4, 4, 6]),
        tensor_head([1, 4, 4, 6], "uint8"),
        tensor_head([1, 4, 4, 6], label="text/html"),
        {**tensor_head([1, 8, 4, 6]), "posterior": "True"},
    ],
)
def test_an_encode_answer_that_does_not_fit_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(MalformedAnswer):
        expect_encode(EncodeRequest(torch.zeros(1, 3, 32, 48)), headers)


def test_latents_that_are_not_finite_cannot_become_a_tensor() -> None:
    expected = expect_encode(EncodeRequest(PIXELS), tensor_head([1, 4, 4, 6]))
    with pytest.raises(MalformedAnswer, match="nan"):
        expected.finish(np.full(4 * 4 * 4 * 6, 255, np.uint8))


@pytest.mark.parametrize("posterior", [False, True])
def test_no_answer_is_made_of_latents_that_are_not_finite(posterior: bool) -> None:
    latents = torch.randn(1, 8, 4, 6)
    latents[0, 7, 0, 0] = float("inf")
    with pytest.raises(NotFinite, match="NaN"):
        encode_response(latents, is_posterior=posterior)


@pytest.mark.parametrize("image", [PIXELS, PIXELS.to(torch.uint8), PICTURE])
@pytest.mark.parametrize("posterior", [False, True])
def test_latents_that_are_the_same_everywhere_are_not_believed_of_a_picture_that_varies(
    image: torch.Tensor | Image.Image, posterior: bool
) -> None:
    request = EncodeRequest(image, posterior=posterior)
    latents = torch.zeros(1, 8, request.size[1] // 8, request.size[2] // 8)
    if posterior:
        latents[:, 4:] = torch.randn_like(latents[:, 4:])
    with pytest.raises(MalformedAnswer, match="the same everywhere"):
        believed(request, encode_response(latents, is_posterior=posterior))


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 32, 48), Image.new("RGB", (48, 32), "red"), torch.rand(1, 3, 8, 8)])
def test_latents_that_are_the_same_everywhere_are_believed_of_one_colour_and_of_one_cell(image: torch.Tensor) -> None:
    request = EncodeRequest(image)
    believed(request, encode_response(torch.zeros(1, 4, request.size[1] // 8, request.size[2] // 8)))


def test_a_picture_that_cannot_be_read_cannot_become_a_request(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 300)
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(InvalidRequest, match="cannot be read"):
        EncodeRequest(image)
