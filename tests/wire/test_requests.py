from __future__ import annotations

import base64
import json
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest
from remote_vae.wire import DecodeRequest, EncodeRequest, HttpRequest, Output, Scaling
from remote_vae.wire.tensors import DTYPES

PICTURE = torch.zeros(1, 4, 4, 4)
BATCH = torch.zeros(2, 4, 4, 4)
VIDEO = torch.zeros(1, 16, 3, 4, 4)


def lower(request: HttpRequest) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def received(request: DecodeRequest) -> DecodeRequest:
    """The request as a server sees it after a real URL and real bytes."""
    http = request.to_http()
    query = parse_qsl(urlsplit(http.url("http://host/decode")).query)
    return DecodeRequest.from_http(query, lower(http), bytes(http.body))


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("output", [output for output in Output if output is not Output.MP4])
def test_a_decode_arrives_as_it_was_sent(output: Output, name: str) -> None:
    latents = (torch.randn(1, 4, 6, 10) * 9).abs().to(DTYPES[name])
    sent = DecodeRequest(latents, output, Scaling(0.18215, 0.1), height=48, width=80, family="sd1", truncate=True)
    got = received(sent)
    assert torch.equal(got.latents, latents)
    assert got.latents.dtype == latents.dtype
    for field in ("output", "scaling", "height", "width", "family", "truncate", "base64_body", "base64_answer"):
        assert getattr(got, field) == getattr(sent, field), field


def test_a_video_can_be_asked_for_as_mp4() -> None:
    assert received(DecodeRequest(VIDEO, Output.MP4)).output is Output.MP4


def test_the_shape_is_one_repeated_key_a_dimension() -> None:
    http = DecodeRequest(PICTURE).to_http()
    assert [value for key, value in http.query if key == "shape"] == ["1", "4", "4", "4"]
    assert http.url("http://host/?key=1").startswith("http://host/?key=1&output_type=pt")


def test_legacy_base64_arrives_as_binary_does() -> None:
    latents = torch.randn(1, 4, 4, 4)
    http = DecodeRequest(latents, base64_body=True, base64_answer=True).to_http()
    assert json.loads(bytes(http.body)).keys() == {"inputs"}
    assert http.headers["Content-Type"] == http.headers["Accept"] == "tensor/base64"
    got = DecodeRequest.from_http(http.query, lower(http), http.body)
    assert torch.equal(got.latents, latents)
    assert got.base64_answer


@pytest.mark.parametrize(
    ("latents", "arguments", "message"),
    [
        ([1, 2], {}, "torch.Tensor"),
        (torch.zeros(4, 4), {}, "3-D or 4-D or 5-D"),
        (torch.zeros(1, 16, 64), {}, "`height` and `width` required"),
        (torch.zeros(1, 0, 4, 4), {}, "sizes from 1"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.int64), {}, "int64"),
        (torch.full((1, 4, 4, 4), float("nan")), {}, "NaN"),
        (torch.full((1, 4, 4, 4), float("inf")), {}, "infinite"),
        (BATCH, {"output": Output.PNG}, "more than one picture"),
        (VIDEO, {"output": Output.JPG}, "more than one picture"),
        (PICTURE, {"output": Output.MP4}, "video latents"),
        (torch.zeros(2, 16, 3, 4, 4), {"output": Output.UINT8}, "several videos"),
        (PICTURE, {"output": Output.PNG, "base64_answer": True}, "base64"),
        (PICTURE, {"height": -1, "width": 8}, "height"),
    ],
)
def test_a_decode_that_cannot_be_answered_cannot_be_made(latents: object, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        DecodeRequest(latents, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [{"factor": 0.0}, {"factor": -1.0}, {"factor": float("nan")}, {"shift": float("inf")}, {"factor": 1.0, "by_model": True}],
)
def test_a_scaling_that_makes_no_sense_cannot_be_made(arguments: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Scaling(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "message"),
    [("a path", "PIL image"), (torch.zeros(3, 8, 8), "4-D"), (torch.zeros(1, 4, 8, 8), r"\[B, 3, H, W\]")],
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


def query(**values: object) -> list[tuple[str, str]]:
    """A decode's query as a client writes it: lists are repeated keys, None is left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        pairs += [(key, str(item)) for item in items if item is not None]
    return pairs


@pytest.mark.parametrize(
    ("values", "accept", "output"),
    [
        ({}, "", Output.TENSOR),
        ({"output_type": "pt", "partial_postprocess": "True"}, "tensor/binary", Output.UINT8),
        ({"output_type": "pt", "partial_postprocess": "true"}, "*/*", Output.UINT8),
        ({"output_type": "pil", "image_format": "png"}, "*/*", Output.PNG),
        ({"output_type": "pil"}, "*/*", Output.JPG),
        ({"output_type": "pil", "image_format": "jpg"}, "image/png", Output.PNG),
        ({"output_type": "pil", "image_format": "png"}, "tensor/binary", Output.UNIT),
        ({}, "image/png", Output.PNG),
    ],
)
def test_any_key_may_be_missing_and_accept_selects_the_body(values: dict[str, str], accept: str, output: Output) -> None:
    pairs = query(shape=[1, 4, 1, 1], dtype="float32", input_tensor_type="binary", unknown="x", **values)
    assert DecodeRequest.from_http(pairs, {"accept": accept}, bytes(16)).output is output


def test_booleans_and_absent_factors_are_read_as_clients_write_them() -> None:
    pairs = query(shape=[1, 4, 1, 1], dtype="float32", do_scaling="False", shift_factor="None")
    assert DecodeRequest.from_http(pairs, {}, bytes(16)).scaling == Scaling()
    pairs = query(shape=[1, 4, 1, 1], dtype="float32", do_scaling="True")
    assert DecodeRequest.from_http(pairs, {}, bytes(16)).scaling == Scaling(by_model=True)


@pytest.mark.parametrize(
    ("values", "body", "message"),
    [
        ({"shape": None, "dtype": None}, bytes(16), "lacks shape"),
        ({"dtype": None}, bytes(16), "dtype"),
        ({"dtype": "int4"}, bytes(16), "int4"),
        ({"shape": [1, 4, -1, 1]}, bytes(16), "size"),
        ({}, bytes(15), "15 bytes"),
        ({"scaling_factor": "much"}, bytes(16), "scaling_factor"),
        ({"scaling_factor": "0"}, bytes(16), "positive"),
        ({"output_type": "gif"}, bytes(16), "gif"),
        ({"output_type": "pil", "image_format": "bmp"}, bytes(16), "bmp"),
        ({"height": "8.5", "width": "8"}, bytes(16), "whole number"),
    ],
)
def test_a_decode_that_makes_no_sense_is_refused_with_the_reason(values: dict[str, object], body: bytes, message: str) -> None:
    pairs = query(**{"shape": [1, 4, 1, 1], "dtype": "float32", **values})
    with pytest.raises(InvalidRequest, match=message):
        DecodeRequest.from_http(pairs, {}, body)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"inputs": 3}', b'{"inputs": "*"}', b"\xff"])
def test_a_base64_body_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="base64"):
        DecodeRequest.from_http(query(shape=[1, 4, 1, 1], dtype="float32"), {"content-type": "tensor/base64"}, body)


def test_latents_come_unpacked_whatever_form_they_had() -> None:
    latents = torch.randn(1, 16, 4, 6)
    packed = DecodeRequest(torch.randn(2, 6, 64), height=32, width=48)
    assert packed.unpacked(16, 8).shape == (2, 16, 4, 6)
    unbatched = DecodeRequest(latents[0], height=32, width=48)
    assert torch.equal(unbatched.unpacked(16, 8), latents)
    ignored = DecodeRequest(latents, height=999, width=7)
    assert torch.equal(ignored.unpacked(16, 8), latents)


@pytest.mark.parametrize(("shape", "channels"), [((1, 4, 4, 6), 16), ((4, 4, 6), 16), ((1, 7, 64), 16), ((1, 6, 64), 4)])
def test_latents_for_another_vae_are_refused(shape: tuple[int, ...], channels: int) -> None:
    request = DecodeRequest(torch.zeros(shape), height=32, width=48)
    with pytest.raises(InvalidRequest):
        request.unpacked(channels, 8)


def test_scaling_is_that_of_the_protocol() -> None:
    z = torch.randn(1, 4, 2, 2)
    assert torch.equal(Scaling(0.5, 0.25).unscale(z, 9.0, 9.0), z / 0.5 + 0.25)
    assert torch.equal(Scaling(by_model=True).unscale(z, 0.25, 0.5), z / 0.25 + 0.5)
    assert torch.equal(Scaling().unscale(z, 9.0, 9.0), z)
    assert torch.equal(Scaling(0.5, 0.25).scale(z), (z - 0.25) * 0.5)


def test_base64_helper_of_the_standard_library_agrees() -> None:
    http = DecodeRequest(PICTURE, base64_body=True).to_http()
    assert base64.b64decode(json.loads(bytes(http.body))["inputs"]) == bytes(256)
