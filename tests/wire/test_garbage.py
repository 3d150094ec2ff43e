"""Whatever a stranger sends is refused by name, in time and memory of its own size, on both sides of the wire."""

from __future__ import annotations

import base64
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.vae.families import Family
from remote_vae.vae.packed import BatchNormed
from remote_vae.wire import (
    DecodeRequest,
    EncodeRequest,
    Expected,
    Output,
    decode_size,
    encode_size,
    error_detail,
    expect_decode,
    expect_encode,
    expect_info,
    tensor_head,
)
from remote_vae.wire.compression import codings, compressed
from remote_vae.wire.extras import ACCEPT, ENCODING, Extras
from remote_vae.wire.pixels import image_to_bytes
from remote_vae.wire.several import joined
from remote_vae.wire.tensors import TensorHead

MANY = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])

SIZES = st.sampled_from(["0", "1", "2", "4", "8", "16", "64", "65536", "65537", "-1", "1.5", "9" * 5000, "\u0664", " 4", ""])
WORDS = st.sampled_from(
    [
        "float16", "float32", "bfloat16", "uint8", "float64", "pil", "pt", "mp4", "png", "jpg", "webp", "True", "False", "None",
        "0", "1", "1e-30", "1e30", "1e999", "-0.0", "nan", "inf", "0.18215", "32", "9" * 5000, "[" * 1000, "[1, 4, 2, 2]",
        "[1, 3, 16, 16]", "[1, 16, 16, 3]", "[1, 3, 5, 16, 16]", "[5, 16, 16, 4]", "[1, 8, 2, 2, 2]", "[1, 1, 64]",
        "[1, 3, 65536, 65536]", "[1, 4, 2, 2" + " " * 5000 + "]", "tensor/binary", "tensor/base64", "packed", "image/png",
        "image/jpeg", "text/html", "application/json", "gzip", "identity", "\x1b[2J", "\ud800", "delta-zstd", "delta-gzip",
        "late, pictures, delta-zstd, delta-gzip", "0123456789abcdef", "application/vnd.remote-vae.pictures",
    ]
) | st.text(max_size=20)  # fmt: skip
KEYS = [
    "dtype", "output_type", "image_format", "partial_postprocess", "scaling_factor", "shift_factor", "do_scaling", "height",
    "width", "family", "truncate", "posterior", "input_tensor_type", "form", "fingerprint", "sample",
]  # fmt: skip
PAIRS = st.lists(st.tuples(st.just("shape"), SIZES), max_size=6).flatmap(
    lambda shape: st.lists(st.tuples(st.sampled_from(KEYS), WORDS), max_size=6).map(lambda others: shape + others)
)
# Some that are nearly right, as what is wrong altogether does not come far.
GOOD = [
    [*(("shape", str(size)) for size in shape), ("dtype", "float16"), ("height", "32"), ("width", "32")]
    for shape in (
        (1, 4, 2, 2),
        (1, 4, 1, 2, 2),
        (1, 4, 2, 1, 2),
        (1, 1, 16),
        (4, 2, 2),
        (1, 4, 4),
        (1, 3, 16, 16),
        (1, 4, 3, 8, 8),
    )
]
QUERIES = PAIRS | st.tuples(st.sampled_from(GOOD), PAIRS).map(
    lambda both: both[0] + [pair for pair in both[1] if pair[0] not in ("shape", "dtype", "height", "width")]
)
# What a server may have: a VAE of pictures, of videos, of pictures with alpha, and one that normalises packed latents.
VAES = [
    Family("plain", "a plain VAE", 4, 8),
    Family("video", "a video VAE", 4, 8, video=True, frame_scale=4, latents_mean=(0.1,) * 4, latents_std=(2.0,) * 4),
    Family("rgba", "a VAE with alpha", 4, 16, pixel_channels=4, video=True),
    Family("normed", "a VAE that norms", 1, 8, classes=("AutoencoderKLFlux2",)),
]
NORM = BatchNormed(torch.zeros(4), torch.ones(4))
NAMES = ["content-type", "content-encoding", "accept", "shape", "dtype", "posterior", ACCEPT.lower(), ENCODING.lower()]
HEADERS = st.dictionaries(st.sampled_from(NAMES), WORDS)
IMAGES = [image_to_bytes(Image.linear_gradient("L").resize((16, 16)), form) for form in ("png", "jpg")]
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["inputs", "parameters", "shape", "error"]), inner)
    ),
)


def edited(data: bytes) -> st.SearchStrategy[bytes]:
    """``data`` with a piece of it replaced."""
    return st.tuples(st.integers(0, len(data)), st.integers(0, 40), st.binary(max_size=40)).map(
        lambda edit: data[: edit[0]] + edit[2] + data[edit[0] + edit[1] :]
    )


HEAD = TensorHead((1, 3, 16, 16), torch.float32)
SMALL = [compressed(bytes(HEAD.nbytes), HEAD, 1, coding) for coding in codings().values()]
BODIES = st.one_of(
    st.sampled_from([bytes(32), bytes(3 * 16 * 16), bytes(3 * 16 * 16 * 4), b"\xff" * 32, b"[" * 100_000, b'{"a":' * 20_000]),
    st.binary(max_size=64),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([base64.b64encode(bytes(32)), base64.b64encode(bytes(3 * 16 * 16 * 4))]).flatmap(
        lambda text: edited(b'{"inputs": "' + text + b'", "parameters": {"shape": [1, 3, 16, 16], "dtype": "float32"}}')
    ),
    *map(edited, IMAGES),
    *map(edited, SMALL),
    edited(joined([IMAGES[0]] * 2)),
)


@contextmanager
def bounded() -> Iterator[None]:
    """A second of this thread's own time, and 16 MB, where no input has more than 100 KB: a thousand times what is needed."""
    tracemalloc.start()
    started = time.thread_time()
    try:
        yield
        assert time.thread_time() - started < 1
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def headed(value: Callable[[], Expected[Any]], body: bytes) -> None:
    """As a client takes an answer: the head, then no more bytes than it allows."""
    expected = value()
    if expected.exact in (None, len(body)) and len(body) <= expected.limit:
        expected.finish(np.frombuffer(body, np.uint8))


@MANY
@given(query=QUERIES, headers=HEADERS, body=BODIES, family=st.sampled_from(VAES))
def test_a_server_meets_nothing_but_invalid_requests(
    query: list[tuple[str, str]], headers: dict[str, str], body: bytes, family: Family
) -> None:
    with bounded():
        with suppress(InvalidRequest):
            head = tensor_head(query)
            if head is not None:
                decode_size(head.shape, 32, 32, family)
                encode_size(head.shape, family)
        with suppress(InvalidRequest):
            request = DecodeRequest.from_http(query, headers, body)
            request.scaling.unscale(request.unpacked(family, NORM), family)
        with suppress(InvalidRequest):
            EncodeRequest.from_http(query, body, max_pixels=4096, headers=headers).pixels(family)


EXTRAS = Extras(late=True, pictures=True, codings=tuple(codings()))
ASKED = [
    *(DecodeRequest(torch.arange(16).reshape(1, 4, 2, 2).half(), output) for output in Output if output is not Output.MP4),
    DecodeRequest(torch.arange(16).reshape(1, 4, 2, 2).half(), base64_answer=True),
    DecodeRequest(torch.randn(1, 16, 64), height=64, width=64),
    DecodeRequest(torch.randn(1, 128, 2, 2)),
    *(DecodeRequest(torch.randn(1, 16, 2, 2, 2), output) for output in Output if not output.is_image),
    *(DecodeRequest(torch.randn(1, 16, 1, 2, 2), output) for output in Output),
    *(DecodeRequest(torch.randn(2, 4, 2, 2), output, extras=EXTRAS) for output in Output if output is not Output.MP4),
]
ENCODED = [
    EncodeRequest(torch.rand(1, 3, 16, 16), posterior=True),
    EncodeRequest(torch.rand(1, 4, 5, 16, 16), posterior=True),
    EncodeRequest(torch.rand(1, 3, 1, 16, 16), packed=True),
]


@MANY
@given(request=st.sampled_from(ASKED), encoded=st.sampled_from(ENCODED), headers=HEADERS, body=BODIES)
def test_a_client_meets_nothing_but_malformed_answers(
    request: DecodeRequest, encoded: EncodeRequest, headers: dict[str, str], body: bytes
) -> None:
    with bounded():
        with suppress(MalformedAnswer):
            headed(lambda: expect_decode(request, headers), body)
        with suppress(MalformedAnswer):
            headed(lambda: expect_encode(encoded, headers), body)
        with suppress(MalformedAnswer):
            headed(lambda: expect_info(headers), body)
        line = error_detail(body)
        assert len(line) <= 300
        assert line.isprintable()


@pytest.mark.parametrize("body", [b"<" * 65_000, b"<a" * 32_000, b" " * 65_000, b'"inputs":' * 7_000, b"&" * 65_000])
def test_an_error_page_made_to_take_long_takes_no_longer(body: bytes) -> None:
    with bounded():
        error_detail(body)


@pytest.mark.parametrize("request_", ASKED, ids=range(len(ASKED)))
@given(headers=HEADERS)
def test_no_head_makes_a_client_wait_for_more_than_the_request_calls_for(
    request_: DecodeRequest, headers: dict[str, str]
) -> None:
    with suppress(MalformedAnswer):
        cells = request_.latents.numel() // request_.latents.shape[1]
        pictures = request_.batch if request_.is_several else 1
        assert expect_decode(request_, headers).limit <= cells * 64 * 32**2 * 4 + pictures * (1 << 20)
