"""What is asked beyond the protocol: who asks for nothing sees nothing, and what does not fit is refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import (
    DecodeAnswer,
    DecodeRequest,
    EncodeRequest,
    HttpRequest,
    HttpResponse,
    Output,
    Scaling,
    decode_response,
    expect_decode,
)
from remote_vae.wire.compression import codings
from remote_vae.wire.extras import ACCEPT, ENCODING, NO_EXTRAS, Extras, compressed_response, own_extras
from remote_vae.wire.pixels import image_to_bytes
from remote_vae.wire.several import PICTURES_TYPE, joined, parted

ALL = Extras(late=True, pictures=True, codings=tuple(codings()))
GZIP = Extras(codings=("delta-gzip",))
LATENTS = torch.randn(2, 4, 24, 20, generator=torch.Generator().manual_seed(0))
PIXELS = torch.linspace(-1, 1, 2 * 3 * 192 * 160).reshape(2, 3, 192, 160).sin()


def lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def arrived(request: DecodeRequest) -> DecodeRequest:
    """As the server has it."""
    sent = request.to_http()
    return DecodeRequest.from_http(sent.query, lower(sent.headers), bytes(sent.body))


def answered(request: DecodeRequest, pixels: torch.Tensor = PIXELS) -> HttpResponse:
    """As the server answers it."""
    asked = arrived(request)
    return compressed_response(decode_response(asked, pixels), asked.extras)


def believed(request: DecodeRequest, answer: HttpResponse) -> DecodeAnswer:
    """As the client takes it."""
    expected = expect_decode(request, lower(answer.headers))
    assert len(answer.body) <= expected.limit
    return expected.finish(np.frombuffer(bytes(answer.body), np.uint8))


def test_who_takes_nothing_says_nothing_and_gets_nothing_else() -> None:
    request = DecodeRequest(LATENTS, Output.UINT8)
    assert ACCEPT not in request.to_http().headers
    assert ACCEPT not in EncodeRequest(PIXELS).to_http().headers
    answer = answered(request)
    assert set(answer.headers) == {"Content-Type", "shape", "dtype"}
    assert len(answer.body) == PIXELS.numel()


def test_what_a_client_takes_arrives_and_unknown_words_are_left_out() -> None:
    assert Extras.from_headers(lower(ALL.to_headers())) == ALL
    assert Extras.from_headers({ACCEPT.lower(): " Late,br, delta-GZIP,,\x00" + "," * 5000}) == Extras(
        True, False, ("delta-gzip",)
    )
    assert Extras.from_headers({}) == NO_EXTRAS
    assert {*ALL.words, "fingerprint", "sample"} == set(own_extras())


@pytest.mark.parametrize("name", list(codings()))
@pytest.mark.parametrize("output", [Output.UINT8, Output.TENSOR, Output.UNIT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compressed_answer_is_the_same_to_the_bit(name: str, output: Output, dtype: torch.dtype) -> None:
    request = DecodeRequest(LATENTS.to(dtype), output, extras=Extras(codings=(name,)))
    plain, small = answered(replace(request, extras=NO_EXTRAS), PIXELS.to(dtype)), answered(request, PIXELS.to(dtype))
    assert small.headers == {**plain.headers, ENCODING: name}
    assert len(small.body) < 0.9 * len(plain.body)
    assert believed(request, small).tensor.equal(believed(replace(request, extras=NO_EXTRAS), plain).tensor)


def test_a_video_is_compressed_as_well() -> None:
    latents, pixels = torch.randn(1, 4, 2, 20, 16), torch.linspace(-1, 1, 3 * 5 * 160 * 128).reshape(1, 3, 5, 160, 128).sin()
    for output in (Output.UINT8, Output.TENSOR):
        request = DecodeRequest(latents, output, extras=ALL)
        answer = answered(request, pixels)
        assert ENCODING in answer.headers
        plain = answered(replace(request, extras=NO_EXTRAS), pixels)
        assert believed(request, answer).tensor.equal(believed(request, plain).tensor)


@pytest.mark.parametrize("size", [(2, 2), (24, 20)])
def test_what_does_not_get_smaller_goes_as_it_is(size: tuple[int, int]) -> None:
    """Too small to be worth it, and noise."""
    pixels = torch.rand(1, 3, 8 * size[0], 8 * size[1]) * 2 - 1
    answer = answered(DecodeRequest(torch.randn(1, 4, *size), Output.UINT8, extras=ALL), pixels)
    assert ENCODING not in answer.headers


def test_errors_pictures_and_base64_are_not_compressed() -> None:
    for request in (
        DecodeRequest(LATENTS[:1], Output.PNG, extras=ALL),
        DecodeRequest(LATENTS, Output.UINT8, base64_answer=True, extras=ALL),
    ):
        answer = answered(request, PIXELS[: request.batch])
        assert ENCODING not in answer.headers
        believed(request, answer)
    error = HttpResponse(500, {"Content-Type": "application/json"}, b" " * 100_000)
    assert compressed_response(error, ALL) is error


@pytest.mark.parametrize("name", ["br", "delta-zstd", "", "\x1b[2J", "delta-gzip, delta-gzip"])
def test_an_encoding_that_was_not_asked_for_is_refused(name: str) -> None:
    request = DecodeRequest(LATENTS, Output.UINT8, extras=GZIP)
    answer = answered(request)
    with pytest.raises(MalformedAnswer, match="which was not asked for"):
        believed(request, replace(answer, headers={**answer.headers, ENCODING: name}))


@given(position=st.integers(0, 10**6), change=st.binary(min_size=1, max_size=4), cut=st.booleans())
def test_a_damaged_answer_is_never_another_picture(position: int, change: bytes, cut: bool) -> None:
    body = bytearray(SMALL.body)
    position %= len(body)
    if cut:
        del body[position:]
    else:
        body[position : position + len(change)] = change
    try:
        answer = believed(ASKED, replace(SMALL, body=bytes(body)))
    except MalformedAnswer:
        return
    assert answer.tensor.equal(WHOLE)


ASKED = DecodeRequest(LATENTS, Output.UINT8, extras=ALL)
SMALL = answered(ASKED)
WHOLE = believed(ASKED, SMALL).tensor


@pytest.mark.parametrize("shape", ["[2, 96, 80, 3]", "[2, 192, 160, 4]", "[1, 192, 160, 3]", "[2, 768, 640, 3]"])
def test_a_head_that_lies_is_refused(shape: str) -> None:
    with pytest.raises(MalformedAnswer):
        believed(ASKED, replace(SMALL, headers={**SMALL.headers, "shape": shape}))


# --- uploads ---------------------------------------------------------------------------------------------------------------


def uploaded(sent: HttpRequest, **changes: str) -> EncodeRequest:
    return EncodeRequest.from_http(sent.query, bytes(sent.body), headers={**lower(sent.headers), **changes})


@pytest.mark.parametrize("name", list(codings()))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("frames", [None, 3])
def test_pixels_that_go_up_compressed_arrive_to_the_bit(name: str, dtype: torch.dtype, frames: int | None) -> None:
    pixels = PIXELS if frames is None else PIXELS[:, :, None].expand(-1, -1, frames, -1, -1)
    image = (pixels * 127.5 + 127.5).to(torch.uint8) if dtype == torch.uint8 else pixels.to(dtype)
    plain, small = EncodeRequest(image).to_http(), EncodeRequest(image, extras=Extras(codings=(name,))).to_http()
    assert small.query == plain.query
    assert small.headers == {**plain.headers, ACCEPT: name, ENCODING: name}
    assert len(small.body) < 0.9 * len(plain.body)
    assert torch.equal(uploaded(small).image, image.contiguous())  # type: ignore[arg-type]  # a tensor


def test_a_picture_file_goes_up_as_it_is() -> None:
    sent = EncodeRequest(Image.linear_gradient("L").resize((512, 512)), extras=ALL).to_http()
    assert ENCODING not in sent.headers
    assert uploaded(sent).size == (1, 512, 512)


def test_an_upload_in_an_unknown_encoding_is_refused() -> None:
    sent = EncodeRequest(PIXELS, extras=GZIP).to_http()
    for name in ("br", "gzip", "", "\x1b[2J"):
        with pytest.raises(InvalidRequest, match=r"expected .*delta-gzip"):
            uploaded(sent, **{ENCODING.lower(): name})
    picture = EncodeRequest(Image.linear_gradient("L")).to_http()
    with pytest.raises(InvalidRequest, match="for a tensor with shape and dtype"):
        uploaded(picture, **{ENCODING.lower(): "delta-gzip"})


@given(body=st.binary(max_size=300), cut=st.integers(0, 10**6))
def test_an_upload_of_anything_else_is_refused(body: bytes, cut: int) -> None:
    sent = EncodeRequest(PIXELS, extras=GZIP).to_http()
    for bad in (body, bytes(sent.body)[: cut % len(sent.body)]):
        with pytest.raises(InvalidRequest, match="got a body that is not"):
            uploaded(replace(sent, body=bad))


# --- several pictures in one answer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [Output.PNG, Output.JPG])
def test_a_batch_of_pictures_comes_in_one_answer_where_both_sides_know_how(output: Output) -> None:
    with pytest.raises(InvalidRequest, match="send them one by one"):
        DecodeRequest(LATENTS, output)
    request = DecodeRequest(LATENTS, output, extras=ALL)
    answer = answered(request)
    assert answer.headers == {"Content-Type": PICTURES_TYPE}
    levels = believed(request, answer)
    assert levels.extent == (2, 3, 1, 192, 160)
    each = [believed(r := DecodeRequest(LATENTS[i : i + 1], output), answered(r, PIXELS[i : i + 1])).levels for i in range(2)]
    assert levels.levels.equal(torch.cat(each))


def test_one_picture_comes_as_the_protocol_has_it() -> None:
    request = DecodeRequest(LATENTS[:1], Output.PNG, extras=ALL)
    assert answered(request, PIXELS[:1]).headers == {"Content-Type": "image/png"}


def test_a_server_that_does_not_know_the_header_refuses_the_batch_as_before() -> None:
    sent = DecodeRequest(LATENTS, Output.PNG, extras=ALL).to_http()
    headers = {name: value for name, value in lower(sent.headers).items() if name != ACCEPT.lower()}
    with pytest.raises(InvalidRequest, match="send them one by one"):
        DecodeRequest.from_http(sent.query, headers, bytes(sent.body))


def test_videos_are_never_several_pictures() -> None:
    with pytest.raises(InvalidRequest):
        DecodeRequest(torch.zeros(2, 4, 1, 8, 8), Output.PNG, extras=ALL)


def png(height: int, width: int) -> bytes:
    return image_to_bytes(Image.linear_gradient("L").resize((width, height)), "png")


GOOD = png(192, 160)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        joined([GOOD]),
        joined([GOOD, GOOD, GOOD]),
        joined([GOOD, GOOD])[:-1],
        joined([GOOD, GOOD]) + b"x",
        joined([GOOD, b""]),
        joined([GOOD, GOOD[:-8]]),
        joined([GOOD, png(96, 80)]),
        joined([GOOD, png(192, 152)]),
        struct.pack(">I", 2**32 - 1) + GOOD,
        GOOD + GOOD,
    ],
)
def test_pictures_that_are_not_those_of_the_batch_are_refused(body: bytes) -> None:
    request = DecodeRequest(LATENTS, Output.PNG, extras=ALL)
    with pytest.raises(MalformedAnswer):
        believed(request, HttpResponse(200, {"Content-Type": PICTURES_TYPE}, body))


def test_one_picture_is_not_taken_for_a_batch() -> None:
    request = DecodeRequest(LATENTS, Output.PNG, extras=ALL)
    with pytest.raises(MalformedAnswer, match="content type"):
        believed(request, HttpResponse(200, {"Content-Type": "image/png"}, GOOD))


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(0, 6), st.binary(max_size=12))
def test_parts_are_those_that_were_joined_or_none(files: list[bytes], count: int, rest: bytes) -> None:
    body = joined(files)
    if count == len(files) and not rest:
        assert [bytes(part) for part in parted(memoryview(body), count)] == files
    else:
        try:
            parts = parted(memoryview(body + rest), count)
        except ValueError:
            return
        assert joined(parts) == body + rest


# --- a sample, and which VAE -----------------------------------------------------------------------------------------------


def moments(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, 5, 6, generator=torch.Generator().manual_seed(3))


def test_a_sample_is_the_one_that_is_documented() -> None:
    given_ = moments()
    request = EncodeRequest(torch.zeros(3, 3, 40, 48), sample=7)
    latents, is_posterior = request.chosen(given_, has_posterior=True)
    assert not is_posterior
    for index in range(3):
        noise = torch.randn((4, 5, 6), generator=torch.Generator().manual_seed(7 + index))
        mean, logvar = given_[index, :4], given_[index, 4:]
        torch.testing.assert_close(latents[index], mean + torch.exp(logvar / 2) * noise, rtol=1e-6, atol=1e-6)


def test_the_same_seed_gives_the_same_latents_whatever_the_batch() -> None:
    whole, _ = EncodeRequest(torch.zeros(3, 3, 40, 48), sample=2**63 - 2).chosen(moments(), has_posterior=True)
    for index, seed in enumerate((2**63 - 2, 2**63 - 1, 0)):
        alone, _ = EncodeRequest(torch.zeros(1, 3, 40, 48), sample=seed).chosen(
            moments()[index : index + 1], has_posterior=True
        )
        assert alone[0].equal(whole[index])


def test_without_a_posterior_there_is_nothing_to_sample() -> None:
    latents = moments()
    assert EncodeRequest(torch.zeros(3, 3, 40, 48), sample=1).chosen(latents, has_posterior=False) == (latents, False)


def test_a_posterior_and_a_mode_are_as_before() -> None:
    given_ = moments()
    assert EncodeRequest(torch.zeros(3, 3, 40, 48), posterior=True).chosen(given_, has_posterior=True) == (given_, True)
    mode, is_posterior = EncodeRequest(torch.zeros(3, 3, 40, 48)).chosen(given_, has_posterior=True)
    assert mode.equal(given_[:, :4])
    assert not is_posterior


@pytest.mark.parametrize("text", ["-1", "1.0", "x", "9223372036854775808", "9" * 5000, "\u0664", "1e3"])
def test_a_seed_that_is_none_is_refused(text: str) -> None:
    sent = EncodeRequest(PIXELS, sample=1).to_http()
    query = [(key, text if key == "sample" else value) for key, value in sent.query]
    with pytest.raises(InvalidRequest, match="sample: got"):
        EncodeRequest.from_http(query, bytes(sent.body))


def test_a_sample_is_never_asked_for_beside_a_posterior() -> None:
    with pytest.raises(InvalidRequest, match="sample"):
        EncodeRequest(PIXELS, sample=1, posterior=True)
    sent = EncodeRequest(PIXELS, sample=5, scaling=Scaling(0.5)).to_http()
    assert uploaded(sent).sample == 5
    with pytest.raises(InvalidRequest, match="posterior"):
        EncodeRequest.from_http([*sent.query, ("posterior", "True")], bytes(sent.body))


def test_the_fingerprint_of_the_clients_vae_arrives() -> None:
    assert arrived(DecodeRequest(LATENTS, fingerprint="0123456789abcdef")).fingerprint == "0123456789abcdef"
    assert uploaded(EncodeRequest(PIXELS, fingerprint="0123456789abcdef").to_http()).fingerprint == "0123456789abcdef"
    sent = DecodeRequest(LATENTS).to_http()
    for text in ("x" * 16, "abc", "\x1b[2J", "0" * 65):
        with pytest.raises(InvalidRequest, match="fingerprint: got"):
            DecodeRequest.from_http([*sent.query, ("fingerprint", text)], {}, bytes(sent.body))
