from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer, NotFinite
from remote_vae.wire import EncodeAnswer, EncodeRequest, HttpResponse, Scaling, encode_response, expect_encode
from remote_vae.wire.tensors import DTYPES

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
    [("a path", "PIL image"), (torch.zeros(3, 8, 8), "expected 4 dimensions"), (torch.zeros(1, 4, 8, 8), r"\[B, 3, H, W\]")],
)
def test_an_encode_that_cannot_be_answered_cannot_be_made(image: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        EncodeRequest(image)  # type: ignore[arg-type]


def test_a_posterior_is_never_scaled() -> None:
    with pytest.raises(InvalidRequest, match="never scaled"):
        EncodeRequest(torch.zeros(1, 3, 8, 8), Scaling(0.5), posterior=True)


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
    assert got.pixels().shape == (1, 3, 16, 24)


def test_uint8_pixels_stand_for_levels() -> None:
    tensor = torch.tensor([0, 255], dtype=torch.uint8).repeat(96).reshape(1, 3, 8, 8)
    assert EncodeRequest(tensor).pixels().unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("posterior", [False, True])
def test_latents_and_posteriors_come_back_bit_equal(posterior: bool) -> None:
    latents = torch.randn(2, 8, 4, 6)
    got = believed(EncodeRequest(torch.zeros(2, 3, 32, 48), posterior=True), encode_response(latents, is_posterior=posterior))
    assert torch.equal(got.latents, latents)
    assert got.is_posterior is posterior


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
