from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from remote_vae.errors import InvalidRequest, MalformedAnswer, NotFinite, OneColour
from remote_vae.vae.families import Family, find_family
from remote_vae.wire import (
    DecodeAnswer,
    DecodeRequest,
    HttpResponse,
    Output,
    Scaling,
    decode_response,
    expect_decode,
    pack_latents,
)
from remote_vae.wire.pixels import to_uint8
from remote_vae.wire.tensors import DTYPES

LATENTS = torch.linspace(-3, 3, 4 * 4 * 6).reshape(1, 4, 4, 6)
PIXELS = torch.linspace(-1.2, 1.2, 3 * 32 * 48).reshape(1, 3, 32, 48)
BATCH = torch.zeros(2, 4, 4, 4)
VIDEO = torch.linspace(-3, 3, 16 * 2 * 4 * 6).reshape(1, 16, 2, 4, 6)


def family(channels: int) -> Family:
    return Family("any", "any VAE", channels, 8)


def lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def received(request: DecodeRequest) -> DecodeRequest:
    """The request as a server sees it after a real URL and real bytes."""
    http = request.to_http()
    query = parse_qsl(urlsplit(http.url("http://host/decode")).query)
    return DecodeRequest.from_http(query, lower(http.headers), bytes(http.body))


def believed(request: DecodeRequest, answer: HttpResponse) -> DecodeAnswer:
    """The answer as a client takes it: head first, then exactly the bytes it may have."""
    expected = expect_decode(request, lower(answer.headers))
    body = np.frombuffer(bytes(answer.body), dtype=np.uint8)
    assert expected.exact in (None, body.nbytes)
    assert body.nbytes <= expected.limit
    return expected.finish(body)


def tensor_head(shape: object, dtype: str = "float32", label: str = "tensor/binary") -> dict[str, str]:
    return {"content-type": label, "shape": json.dumps(shape), "dtype": dtype}


def query(**values: object) -> list[tuple[str, str]]:
    """A decode's query as a client writes it: lists are repeated keys, None is left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        pairs += [(key, str(item)) for item in items if item is not None]
    return pairs


# --- requests


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
    http = DecodeRequest(LATENTS).to_http()
    assert [value for key, value in http.query if key == "shape"] == ["1", "4", "4", "6"]
    assert http.url("http://host/?key=1").startswith("http://host/?key=1&output_type=pt")


def test_legacy_base64_arrives_as_binary_does() -> None:
    latents = torch.randn(1, 4, 4, 4)
    http = DecodeRequest(latents, base64_body=True, base64_answer=True).to_http()
    assert base64.b64decode(json.loads(bytes(http.body))["inputs"]) == latents.numpy().tobytes()
    assert http.headers["Content-Type"] == http.headers["Accept"] == "tensor/base64"
    got = DecodeRequest.from_http(http.query, lower(http.headers), http.body)
    assert torch.equal(got.latents, latents)
    assert got.base64_answer


@pytest.mark.parametrize(
    ("latents", "arguments", "message"),
    [
        ([1, 2], {}, "torch.Tensor"),
        (torch.zeros(4, 4), {}, "expected 3 or 4 or 5 dimensions"),
        (torch.zeros(1, 16, 64), {}, "`height` and `width` required"),
        (torch.zeros(1, 0, 4, 4), {}, "expected sizes from 1"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.int64), {}, "int64"),
        (torch.full((1, 4, 4, 4), float("nan")), {}, "NaN"),
        (torch.full((1, 4, 4, 4), float("inf")), {}, "infinite"),
        (BATCH, {"output": Output.PNG}, "more than one picture"),
        (torch.zeros(1, 16, 3, 4, 4), {"output": Output.JPG}, "more than one picture"),
        (LATENTS, {"output": Output.MP4}, "video latents"),
        (torch.zeros(2, 16, 3, 4, 4), {"output": Output.UINT8}, "several videos"),
        (LATENTS, {"output": Output.PNG, "base64_answer": True}, "base64"),
        (LATENTS, {"height": -1, "width": 8}, "height"),
    ],
)
def test_a_decode_that_cannot_be_answered_cannot_be_made(latents: object, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        DecodeRequest(latents, **arguments)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("values", "body", "message"),
    [
        ({"shape": None, "dtype": None}, bytes(16), "lacks shape"),
        ({"dtype": None}, bytes(16), "dtype"),
        ({"dtype": "int4"}, bytes(16), "int4"),
        ({"shape": [1, 4, -1, 1]}, bytes(16), "'-1' in the shape"),
        ({}, bytes(15), "got 15 bytes for float32 .*, expected 16"),
        ({"scaling_factor": "much"}, bytes(16), "scaling_factor"),
        ({"scaling_factor": "0"}, bytes(16), "scaling_factor: got 0, expected 0.001 to 1000"),
        ({"output_type": "gif"}, bytes(16), "gif"),
        ({"output_type": "pil", "image_format": "bmp"}, bytes(16), "bmp"),
        ({"height": "8.5", "width": "8"}, bytes(16), "whole number"),
    ],
)
def test_a_decode_that_makes_no_sense_is_refused_with_the_reason(values: dict[str, object], body: bytes, message: str) -> None:
    pairs = query(**{"shape": [1, 4, 1, 1], "dtype": "float32", **values})
    with pytest.raises(InvalidRequest, match=message):
        DecodeRequest.from_http(pairs, {}, body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b'{"inputs": 3}', b'{"inputs": "*"}', b"\xff", b'{"inputs": "AAA"}', b'["inputs", "AAAA"]',
        b"[" * 957, b"[" * 100_000, b'{"inputs": "AAAA", "more": ' + b"[" * 2000, b'{"a": {"inputs": "AAAA"}}',
        b'{"inputs": "AAAAAAAAAAAAAAAAAAAAAA==", "more": [' + b"[]," * 2000 + b"[]]}",
    ],
)  # fmt: skip
def test_a_base64_body_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="base64"):
        DecodeRequest.from_http(query(shape=[1, 4, 1, 1], dtype="float32"), {"content-type": "tensor/base64"}, body)


def test_latents_come_unpacked_whatever_form_they_had() -> None:
    latents = torch.randn(1, 16, 4, 6)
    packed = DecodeRequest(torch.randn(2, 6, 64), height=32, width=48)
    assert packed.unpacked(family(16)).shape == (2, 16, 4, 6)
    unbatched = DecodeRequest(latents[0], height=32, width=48)
    assert torch.equal(unbatched.unpacked(family(16)), latents)
    ignored = DecodeRequest(latents, height=999, width=7)
    assert torch.equal(ignored.unpacked(family(16)), latents)


@pytest.mark.parametrize(("shape", "channels"), [((1, 4, 4, 6), 16), ((4, 4, 6), 16), ((1, 7, 64), 16), ((1, 6, 64), 4)])
def test_latents_for_another_vae_are_refused(shape: tuple[int, ...], channels: int) -> None:
    request = DecodeRequest(torch.zeros(shape), height=32, width=48)
    with pytest.raises(InvalidRequest):
        request.unpacked(family(channels))


# --- answers


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
    request = DecodeRequest(VIDEO, output)
    frames = PIXELS.unsqueeze(2).expand(1, 3, 5, 32, 48)
    assert believed(request, decode_response(request, frames)).tensor.shape == shape


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("output", [Output.TENSOR, Output.UINT8])
def test_a_video_comes_back_frame_for_frame(output: Output, channels: int) -> None:
    request = DecodeRequest(VIDEO, output)
    clip = torch.rand(1, channels, 5, 32, 48) * 2 - 1
    answer = believed(request, decode_response(request, clip))
    assert answer.extent == (1, channels, 5, 32, 48)
    pixels = answer.pixels("cpu", torch.float32)
    assert pixels.shape == clip.shape
    for frame in range(5):
        assert torch.equal(to_uint8(pixels[:, :, frame]), to_uint8(clip[:, :, frame]))


def test_batches_of_videos_come_as_tensors() -> None:
    request = DecodeRequest(VIDEO.repeat(2, 1, 1, 1, 1))
    clips = torch.rand(2, 3, 5, 32, 48)
    answer = believed(request, decode_response(request, clips))
    assert answer.extent == (2, 3, 5, 32, 48)
    assert torch.equal(answer.pixels("cpu", torch.float32), clips)


ONE_FRAME = VIDEO[:, :, :1]


@pytest.mark.parametrize("output", [Output.TENSOR, Output.UINT8, Output.PNG, Output.JPG])
def test_one_frame_of_a_video_vae_is_a_picture_with_an_axis_of_frames(output: Output) -> None:
    request = DecodeRequest(ONE_FRAME, output)
    answer = believed(request, decode_response(request, PIXELS.unsqueeze(2)))
    assert answer.extent == (1, 3, 1, 32, 48)
    pixels = answer.pixels("cpu", torch.float32)
    assert pixels.shape == (1, 3, 1, 32, 48)
    off = to_uint8(pixels.squeeze(2)).int() - to_uint8(PIXELS).int()
    assert off.abs().max() <= (4 if output is Output.JPG else 0)


@pytest.mark.parametrize("output", [Output.TENSOR, Output.UINT8, Output.PNG, Output.UNIT])
def test_latents_without_frames_are_answered_without_frames(output: Output) -> None:
    request = DecodeRequest(LATENTS, output)
    answer, expected = decode_response(request, PIXELS.unsqueeze(2)), decode_response(request, PIXELS)
    assert bytes(answer.body) == bytes(expected.body)
    assert answer.headers == expected.headers


@pytest.mark.parametrize(
    ("latents", "output", "clip", "message"),
    [
        (LATENTS, Output.TENSOR, (1, 3, 2, 32, 48), "send them with frames"),
        (ONE_FRAME, Output.PNG, (1, 3, 4, 32, 48), "make 4 pictures"),
        (ONE_FRAME, Output.TENSOR, (1, 3, 32, 48), "send them with frames"),
        (ONE_FRAME, Output.JPG, (1, 4, 1, 32, 48), "alpha channel, which jpg cannot hold: ask for png"),
        (VIDEO, Output.MP4, (1, 4, 5, 32, 48), "alpha channel, which mp4 cannot hold: ask for output_type pt"),
    ],
)
def test_an_answer_that_cannot_hold_the_pixels_is_not_made(
    latents: torch.Tensor, output: Output, clip: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decode_response(DecodeRequest(latents, output), torch.rand(clip))


def test_jpeg_of_a_vae_with_alpha_is_refused_before_the_vae_is_asked() -> None:
    with pytest.raises(InvalidRequest, match="ask for png"):
        DecodeRequest(torch.zeros(1, 64, 1, 2, 2), Output.JPG).unpacked(find_family("qwen-image-2.1"))


def test_a_png_keeps_the_alpha_channel() -> None:
    levels = torch.randint(0, 256, (1, 4, 32, 48), generator=torch.Generator().manual_seed(0))
    request = DecodeRequest(ONE_FRAME, Output.PNG)
    answer = believed(request, decode_response(request, (levels / 127.5 - 1).unsqueeze(2)))
    assert answer.extent == (1, 4, 1, 32, 48)
    assert torch.equal(to_uint8(answer.pixels("cpu", torch.float32).squeeze(2)), levels.movedim(1, -1).to(torch.uint8))


class Largest(TorchDispatchMode):
    """The most floating point values that any operation makes a new tensor of; ``empty`` makes none."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point() and "empty" not in str(function):
            own = made.untyped_storage().data_ptr() not in {
                arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)
            }
            self.values = max(self.values, made.numel() if own else 0)
        return made


@pytest.mark.parametrize("output", [Output.UINT8, Output.MP4])
def test_a_clip_is_answered_and_read_frame_by_frame(output: Output) -> None:
    clip, request = torch.rand(1, 3, 40, 64, 64), DecodeRequest(VIDEO.repeat(1, 1, 20, 1, 1), output)
    frame = clip[:, :, 0].numel()
    with Largest() as largest:
        decode_response(request, clip)
    assert 0 < largest.values <= frame
    levels = torch.randint(0, 256, (40, 64, 64, 3), dtype=torch.uint8)
    with Largest() as largest:
        assert DecodeAnswer(Output.UINT8, levels, is_video=True).pixels("cpu", torch.float32).shape == clip.shape
    assert 0 < largest.values <= frame


@pytest.mark.parametrize(
    "headers",
    [
        tensor_head([1, 3, 17, 32, 48]),
        tensor_head([1, 5, 5, 32, 48]),
        tensor_head([1, 2, 5, 32, 48]),
        tensor_head([2, 3, 5, 32, 48]),
        tensor_head([1, 3, 5, 32, 47]),
        tensor_head([1, 3, 5, 1280, 1920]),
        tensor_head([1, 3, 65536, 65536, 65536]),
        tensor_head([3, 5, 32, 48]),
        tensor_head([5, 3, 32, 48]),
    ],
)
def test_a_head_that_is_no_video_of_these_latents_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(MalformedAnswer):
        expect_decode(DecodeRequest(VIDEO), headers)


def test_a_torn_video_is_not_taken() -> None:
    request = DecodeRequest(VIDEO, Output.UINT8)
    answer = decode_response(request, torch.rand(1, 3, 5, 32, 48))
    expected = expect_decode(request, lower(answer.headers))
    for length in (0, 1, len(answer.body) - 1):
        with pytest.raises(MalformedAnswer, match="expected 23040"):
            expected.finish(np.frombuffer(bytes(answer.body)[:length], np.uint8))


def test_an_mp4_answer_is_the_bytes_of_the_file() -> None:
    request = DecodeRequest(VIDEO, Output.MP4)
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
    body = np.frombuffer(PIXELS.half().numpy().tobytes(), np.uint8)
    assert expected.finish(body).tensor.dtype == torch.float16


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "tensor/binary"},
        {"content-type": "text/html; charset=utf-8", "shape": "[1, 3, 32, 48]", "dtype": "float32"},
        tensor_head([1, 3, 32, 48], label="application/json"),
        tensor_head([2, 3, 32, 48]),
        tensor_head([1, 5, 32, 48]),
        tensor_head([1, 3, 48, 32]),
        tensor_head([1, 3, 32, 49]),
        tensor_head([1, 3, 24, 36]),
        tensor_head([3, 32, 48]),
        tensor_head([1, 3, 65536, 65536]),
        tensor_head([1, 3, 32, 48], "uint8"),
        tensor_head([1, 3, 32, 48], "float64"),
        tensor_head("none"),
        {**tensor_head([]), "shape": "[" * 1000},
        {**tensor_head([]), "shape": "[1, 3, 32, 48" + " " * 1000 + "]"},
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
    request = DecodeRequest(LATENTS)
    answer = decode_response(request, PIXELS)
    values = np.frombuffer(bytes(answer.body), np.float32).copy()
    values[place] = value
    with pytest.raises(MalformedAnswer, match="no VAE"):
        believed(request, HttpResponse(200, answer.headers, values.tobytes()))


def test_a_picture_of_another_size_is_refused() -> None:
    request = DecodeRequest(LATENTS, Output.PNG)
    with pytest.raises(MalformedAnswer, match="picture of 32 x 64, expected 4 x 6 times 4, 8, 16 or 32 pixels"):
        believed(request, decode_response(request, torch.rand(1, 3, 32, 64)))


@pytest.mark.parametrize("body", [b"", b"<html>", b"\x89PNG\r\n\x1a\n garbage"])
def test_what_is_not_a_picture_is_refused(body: bytes) -> None:
    expected = expect_decode(DecodeRequest(LATENTS, Output.PNG), {"content-type": "image/png"})
    with pytest.raises(MalformedAnswer):
        expected.finish(np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"[" * 1000,
        b'{"inputs": "AAAA"}',
        b'{"inputs": "AAAA", "parameters": 3}',
        b'{"inputs": 1, "parameters": {"shape": [1], "dtype": "uint8"}}',
        b'{"inputs": "AAAA", "parameters": {"shape": ' + b"[" * 900 + b"]" * 900 + b', "dtype": "float32"}}',
    ],
)
def test_a_base64_answer_that_is_none_is_refused(body: bytes) -> None:
    expected = expect_decode(DecodeRequest(LATENTS, base64_answer=True), {"content-type": "application/json"})
    with pytest.raises(MalformedAnswer):
        expected.finish(np.frombuffer(body, np.uint8))


# --- what must not become a picture


PICTURES = [Output.TENSOR, Output.UINT8, Output.UNIT, Output.PNG, Output.JPG]


@pytest.mark.parametrize("output", [*PICTURES, Output.MP4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_form_of_answer_is_made_of_what_is_not_finite(output: Output, value: float) -> None:
    pixels = PIXELS.clone()
    pixels[0, 1, 2, 3] = value
    request = DecodeRequest(VIDEO if output is Output.MP4 else LATENTS, output)
    with pytest.raises(NotFinite, match="NaN"):
        decode_response(request, pixels.unsqueeze(2) if output is Output.MP4 else pixels)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("output", PICTURES)
@pytest.mark.parametrize("level", [-1.0, 0.25, 1.0])
def test_a_picture_of_one_colour_is_not_believed_of_latents_that_vary(output: Output, level: float, legacy: bool) -> None:
    request = DecodeRequest(LATENTS, output, base64_answer=legacy and output.is_tensor)
    with pytest.raises(OneColour):
        believed(request, decode_response(request, torch.full((1, 3, 32, 48), level)))


@pytest.mark.parametrize("output", PICTURES)
def test_a_picture_of_one_colour_is_believed_of_latents_that_are_the_same_everywhere(output: Output) -> None:
    latents = torch.tensor([1.0, -2.0, 0.5, 0.0]).reshape(1, 4, 1, 1).expand(1, 4, 4, 6)
    colour = torch.tensor([-1.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 32, 48)
    request = DecodeRequest(latents, output)
    assert believed(request, decode_response(request, colour)).size == (32, 48)


@pytest.mark.parametrize("output", PICTURES)
def test_one_pixel_of_another_level_makes_a_picture(output: Output) -> None:
    # Of 24576 places, a thousand are compared first.
    pixels = torch.ones(1, 3, 128, 192)
    pixels[..., -1, -2] = -1
    request = DecodeRequest(LATENTS, output)
    assert believed(request, decode_response(request, pixels)).size == (128, 192)


@pytest.mark.parametrize("output", [Output.TENSOR, Output.UINT8, Output.UNIT])
def test_one_black_picture_takes_the_batch_with_it(output: Output) -> None:
    request = DecodeRequest(LATENTS.expand(3, 4, 4, 6), output)
    pixels = PIXELS.repeat(3, 1, 1, 1)
    assert believed(request, decode_response(request, pixels)).tensor.shape[0] == 3
    pixels[1] = -1
    with pytest.raises(OneColour):
        believed(request, decode_response(request, pixels))


@pytest.mark.parametrize("output", [Output.TENSOR, Output.UINT8, Output.UNIT])
def test_a_video_may_begin_black_and_not_be_black(output: Output) -> None:
    request = DecodeRequest(VIDEO, output)
    frames = PIXELS.unsqueeze(2).repeat(1, 1, 5, 1, 1)
    frames[:, :, 0] = -1
    believed(request, decode_response(request, frames))
    with pytest.raises(OneColour):
        believed(request, decode_response(request, torch.full_like(frames, -1)))


@pytest.mark.parametrize(("latents", "varies"), [(torch.randn(16, 4, 6), True), (torch.ones(16, 4, 6), False)])
@pytest.mark.parametrize("packed", [False, True])
def test_packed_latents_vary_when_the_same_latents_unpacked_do(latents: torch.Tensor, varies: bool, packed: bool) -> None:
    request = DecodeRequest(pack_latents(latents.unsqueeze(0)) if packed else latents, Output.UINT8, height=32, width=48)
    answer = decode_response(request, torch.zeros(1, 3, 32, 48))
    if varies:
        with pytest.raises(OneColour):
            believed(request, answer)
    else:
        believed(request, answer)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_latents_that_are_not_finite_after_unscaling_are_refused_and_not_decoded(name: str) -> None:
    latents = torch.full((1, 4, 2, 2), 3e4).to(DTYPES[name])
    request = DecodeRequest(latents, scaling=Scaling(0.13025))
    if name == "bfloat16":
        assert torch.isfinite(request.scaling.unscale(latents, family(4))).all()
    else:
        with pytest.raises(InvalidRequest, match="too large for the VAE's float16"):
            request.scaling.unscale(latents, family(4))
