from __future__ import annotations

import io
import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from PIL import Image

from remote_vae.errors import MalformedAnswer
from remote_vae.wire import (
    DecodeAnswer,
    DecodeRequest,
    EncodeRequest,
    HttpResponse,
    Output,
    decode_response,
    encode_response,
    error_detail,
    error_response,
    expect_decode,
    expect_encode,
)
from remote_vae.wire.pixels import to_uint8

LATENTS = torch.zeros(1, 4, 4, 6)
PIXELS = torch.linspace(-1.2, 1.2, 3 * 32 * 48).reshape(1, 3, 32, 48)


def lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def believed(request: DecodeRequest, answer: HttpResponse) -> DecodeAnswer:
    """The answer as a client takes it: head first, then exactly the bytes it may have."""
    expected = expect_decode(request, lower(answer.headers))
    body = np.frombuffer(bytes(answer.body), dtype=np.uint8)
    assert expected.exact in (None, body.nbytes)
    assert body.nbytes <= expected.limit
    return expected.finish(body)


def tensor_head(shape: object, dtype: str = "float32", label: str = "tensor/binary") -> dict[str, str]:
    return {"content-type": label, "shape": json.dumps(shape), "dtype": dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_answer_comes_back_bit_equal(dtype: torch.dtype) -> None:
    pixels = PIXELS.to(dtype)
    request = DecodeRequest(LATENTS)
    assert torch.equal(believed(request, decode_response(request, pixels)).tensor, pixels)


def test_uint8_comes_back_as_the_levels_of_the_picture() -> None:
    request = DecodeRequest(LATENTS, Output.UINT8)
    answer = believed(request, decode_response(request, PIXELS))
    assert torch.equal(answer.tensor, to_uint8(PIXELS))
    assert torch.equal(to_uint8(answer.pixels("cpu", torch.float32)), to_uint8(PIXELS))


def test_uint8_is_rounded_down_for_a_host_that_truncates() -> None:
    request = DecodeRequest(LATENTS, Output.UINT8, truncate=True)
    assert torch.equal(believed(request, decode_response(request, PIXELS)).tensor, to_uint8(PIXELS, truncate=True))


def test_unit_tensors_are_clamped_to_0_and_1() -> None:
    request = DecodeRequest(LATENTS, Output.UNIT)
    tensor = believed(request, decode_response(request, PIXELS)).tensor
    assert torch.equal(tensor, (PIXELS / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(("output", "name", "worst"), [(Output.PNG, "png", 0), (Output.JPG, "jpeg", 4)])
def test_a_picture_file_comes_back_as_a_picture(output: Output, name: str, worst: int) -> None:
    request = DecodeRequest(LATENTS, output)
    answer = believed(request, decode_response(request, PIXELS))
    assert isinstance(answer.payload, Image.Image)
    assert answer.payload.format == name
    off = to_uint8(answer.pixels("cpu", torch.float32)).int() - to_uint8(PIXELS).int()
    assert off.abs().max() <= worst


def test_legacy_base64_answers_come_back_bit_equal() -> None:
    request = DecodeRequest(LATENTS, base64_answer=True)
    answer = decode_response(request, PIXELS)
    assert json.loads(bytes(answer.body))["parameters"] == {"shape": [1, 3, 32, 48], "dtype": "float32"}
    assert torch.equal(believed(request, answer).tensor, PIXELS)


@pytest.mark.parametrize(
    ("output", "shape"),
    [(Output.TENSOR, (1, 3, 5, 32, 48)), (Output.UINT8, (5, 32, 48, 3)), (Output.UNIT, (5, 3, 32, 48))],
)
def test_video_comes_in_the_shape_of_the_protocol(output: Output, shape: tuple[int, ...]) -> None:
    request = DecodeRequest(torch.zeros(1, 16, 2, 4, 6), output)
    frames = PIXELS.unsqueeze(2).expand(1, 3, 5, 32, 48)
    assert believed(request, decode_response(request, frames)).tensor.shape == shape


def test_an_mp4_answer_is_the_bytes_of_the_file() -> None:
    request = DecodeRequest(torch.zeros(1, 16, 2, 4, 6), Output.MP4)
    answer = decode_response(request, PIXELS.unsqueeze(2).expand(1, 3, 5, 32, 48))
    assert believed(request, answer).payload == bytes(answer.body)


def test_packed_latents_of_1208_pixels_are_answered_with_1200() -> None:
    request = DecodeRequest(torch.zeros(1, 75 * 75, 64), height=1208, width=1208)
    assert expect_decode(request, tensor_head([1, 3, 1200, 1200], "float16")).exact == 3 * 1200 * 1200 * 2
    with pytest.raises(MalformedAnswer):
        expect_decode(request, tensor_head([1, 3, 1208, 1208], "float16"))


def test_the_dtype_of_the_answer_may_differ_from_the_request() -> None:
    # The hosted Flux endpoint answers float16 to bfloat16.
    expected = expect_decode(DecodeRequest(LATENTS.bfloat16()), tensor_head([1, 3, 32, 48], "float16"))
    assert expected.finish(np.zeros(3 * 32 * 48 * 2, np.uint8)).tensor.dtype == torch.float16


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "tensor/binary"},
        {"content-type": "text/html; charset=utf-8", "shape": "[1, 3, 32, 48]", "dtype": "float32"},
        tensor_head([1, 3, 32, 48], label="application/json"),
        tensor_head([2, 3, 32, 48]),
        tensor_head([1, 4, 32, 48]),
        tensor_head([1, 3, 48, 32]),
        tensor_head([1, 3, 32, 49]),
        tensor_head([1, 3, 24, 36]),
        tensor_head([3, 32, 48]),
        tensor_head([1, 3, 65536, 65536]),
        tensor_head([1, 3, 32, 48], "uint8"),
        tensor_head([1, 3, 32, 48], "float64"),
        tensor_head("none"),
        {**tensor_head([1, 3, 32, 48]), "content-encoding": "gzip"},
    ],
)
def test_a_head_that_is_not_the_answer_is_refused_before_its_body(headers: dict[str, str]) -> None:
    with pytest.raises(MalformedAnswer):
        expect_decode(DecodeRequest(LATENTS), headers)


def test_floating_point_is_refused_where_levels_were_asked_for() -> None:
    with pytest.raises(MalformedAnswer, match="uint8"):
        expect_decode(DecodeRequest(LATENTS, Output.UINT8), tensor_head([1, 32, 48, 3], "float16"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e6])
@pytest.mark.parametrize("place", [0, -1])
def test_values_that_no_vae_gives_cannot_become_a_tensor(value: float, place: int) -> None:
    pixels = PIXELS.clone()
    pixels.view(-1)[place] = value
    request = DecodeRequest(LATENTS)
    with pytest.raises(MalformedAnswer, match="no VAE"):
        believed(request, decode_response(request, pixels))


def test_a_picture_of_another_size_is_refused() -> None:
    request = DecodeRequest(LATENTS, Output.PNG)
    with pytest.raises(MalformedAnswer, match="picture of 32 x 64"):
        believed(request, decode_response(request, torch.zeros(1, 3, 32, 64)))


@pytest.mark.parametrize("body", [b"", b"<html>", b"\x89PNG\r\n\x1a\n garbage"])
def test_what_is_not_a_picture_is_refused(body: bytes) -> None:
    expected = expect_decode(DecodeRequest(LATENTS, Output.PNG), {"content-type": "image/png"})
    with pytest.raises(MalformedAnswer):
        expected.finish(np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"inputs": "AAAA"}', b'{"inputs": 1, "parameters": {"shape": [1], "dtype": "uint8"}}']
)
def test_a_base64_answer_that_is_none_is_refused(body: bytes) -> None:
    expected = expect_decode(DecodeRequest(LATENTS, base64_answer=True), {"content-type": "application/json"})
    with pytest.raises(MalformedAnswer):
        expected.finish(np.frombuffer(body, np.uint8))


@pytest.mark.parametrize("posterior", [False, True])
def test_latents_and_posteriors_come_back_bit_equal(posterior: bool) -> None:
    latents = torch.randn(2, 8, 4, 6)
    answer = encode_response(latents, is_posterior=posterior)
    expected = expect_encode(EncodeRequest(torch.zeros(2, 3, 32, 48), posterior=True), lower(answer.headers))
    got = expected.finish(np.frombuffer(bytes(answer.body), np.uint8))
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
    expected = expect_encode(EncodeRequest(torch.zeros(1, 3, 32, 48)), tensor_head([1, 4, 4, 6]))
    with pytest.raises(MalformedAnswer, match="nan"):
        expected.finish(np.full(4 * 4 * 4 * 6, 255, np.uint8))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": "no replica"}', "no replica"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html><h1>502</h1> Bad&nbsp;Gateway</html>", "502 Bad Gateway"),
        (b"", "no message"),
        (b"\xff\xfe", "��"),
        (b"x" * 5000, "x" * 297 + "..."),
    ],
)
def test_an_error_body_becomes_one_short_line(body: bytes, text: str) -> None:
    assert error_detail(body) == text


def test_every_error_is_the_protocols_json() -> None:
    answer = error_response(400, 'a "bad" shape')
    assert json.load(io.BytesIO(bytes(answer.body))) == {"error": 'a "bad" shape'}
    assert answer.headers["Content-Type"] == "application/json"
