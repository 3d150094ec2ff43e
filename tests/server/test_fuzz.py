"""Whatever is sent, the answer is the protocol's: what is wrong with it a 4xx that says so in JSON, and never a 500.

More of it: ``REMOTE_VAE_FUZZ=20`` (times as many examples), with ``-s`` also what it took.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from remote_vae.server.admission import Limits
from remote_vae.server.app import create_app
from remote_vae.server.catalogue import OneVae
from remote_vae.server.engine import Engine
from remote_vae.server.metrics import metrics
from remote_vae.server.models import LoadedVae
from remote_vae.server.protocol import BoundedProtocol
from tests.conftest import ServerThread
from tests.server.asking import Raw, wait_until

TIMES = int(os.environ.get("REMOTE_VAE_FUZZ", "1"))
# What is right is made: small, so that it is about requests and not about the VAE.
LIMITS = Limits(max_pixels=64 * 64, max_batch=2, stall=0.2)
GOOD = {"shape": ["1", "4", "2", "2"], "dtype": ["float32"], "output_type": ["pt"]}
GOOD_BYTES = 64
PICTURE = {"shape": ["1", "3", "16", "16"], "dtype": ["uint8"]}


@dataclass
class Seen:
    """What came back, and of what was bad the milliseconds: of the clock, and of this process, which is server and client."""

    statuses: Counter[int] = field(default_factory=Counter)
    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def target(loaded: LoadedVae) -> Iterator[ServerThread]:
    running = ServerThread(loaded, limits=LIMITS, protocol=type("Hasty", (BoundedProtocol,), {"head_seconds": 0.2}))
    yield running
    running.close()


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    made = Seen()
    before = psutil.Process().memory_info().rss
    yield made
    memory = (psutil.Process().memory_info().rss - before) / 1e6
    print(f"\n{dict(made.statuses)}, {memory:.0f} MB more; bad ones, median, p99 and longest in ms:")
    for name, values in (("clock", sorted(made.clock)), ("cpu", sorted(made.cpu))):
        print(name, *(f"{values[int(share * (len(values) - 1))]:.1f}" for share in (0.5, 0.99, 1.0)))


def bounded(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


# --- requests that are HTTP, and make no sense ------------------------------------------------------------------------------

_NUMBERS = "0 -1 1 4 8 16 65536 65537 999999999999999999999 1e3 nan inf -inf None True [1,4,2,2] [[["
_NAMES = "pt pil mp4 png jpg float32 bfloat16 uint8 float64 packed sdxl flux tensor/binary tensor/base64 image/png delta-zstd"
_ODD = ["", "late, pictures, delta-zstd", "\x00", "\u0663", "\ud7ff" * 3, "x" * 3000]
_OF_SCALING = "scaling_factor shift_factor do_scaling height width"
_OF_FORM = "shape dtype output_type image_format partial_postprocess input_tensor_type truncate posterior form sample"
WORDS = st.sampled_from([*_NUMBERS.split(), *_NAMES.split(), *_ODD])
KEYS = st.sampled_from([*_OF_SCALING.split(), *_OF_FORM.split(), "family", "fingerprint", "unknown"])
QUERIES = st.dictionaries(KEYS, st.lists(WORDS | st.text(max_size=20), max_size=6), max_size=6)
HEADER_NAMES = st.sampled_from(
    [
        "Content-Type",
        "Accept",
        "X-Remote-VAE-Accept",
        "X-Remote-VAE-Encoding",
        "Authorization",
        "Expect",
        "Content-Encoding",
        "X-Odd",
    ]
)
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
HEADERS = st.dictionaries(
    HEADER_NAMES, WORDS.filter(lambda word: word.isascii() and word.isprintable()) | PRINTABLE, max_size=4
)
PATHS = st.sampled_from(
    ["/decode", "/encode", "/", "/custom/decode", "/custom", "/nobody/encode", "/%00/decode", "/decode/", "/../decode"]
)
_BASE64 = [b'{"inputs": 5}', b'{"inputs": "AAAA"}', b'{"inputs": "' + b"A" * 88 + b'"}', b"[" * 2000]
_FILES = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(60), b"RIFF\x00\x00\x00\x00WEBP"]
_VALUES = [b"", bytes(GOOD_BYTES), bytes(GOOD_BYTES - 1), b"\xff" * GOOD_BYTES, bytes(768)]
BODIES = st.sampled_from([*_BASE64, *_FILES, *_VALUES]) | st.binary(max_size=300)


@bounded(80)
@given(PATHS, st.sampled_from([{}, GOOD, PICTURE]), QUERIES, HEADERS, BODIES, st.sampled_from([None, 1, 7, 64]))
@example("/decode", GOOD, {}, {"X-Remote-VAE-Accept": "late, pictures, delta-zstd"}, bytes(GOOD_BYTES), None)
@example("/encode", PICTURE, {}, {"X-Remote-VAE-Encoding": "delta-zstd"}, b"(\xb5/\xfd" + bytes(60), None)
@example("/encode", PICTURE, {"sample": ["-1"]}, {}, bytes(768), None)
@example("/decode", GOOD, {"scaling_factor": ["1e-999"]}, {}, bytes(GOOD_BYTES), 1)
def test_a_request_that_makes_no_sense_is_a_4xx_that_says_why(
    target: ServerThread,
    seen: Seen,
    path: str,
    base: dict[str, list[str]],
    query: dict[str, list[str]],
    headers: dict[str, str],
    body: bytes,
    chunk: int | None,
) -> None:
    pairs = [(key, value) for key, values in {**base, **query}.items() for value in values]
    text = f"{path}?{urlencode(pairs, errors='replace')}" if pairs else path
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if chunk is None:
        sent = body
        head += f"Content-Length: {len(body)}\r\n"
    else:
        pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)]
        sent = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        head += "Transfer-Encoding: chunked\r\n"
    check(target, seen, f"POST {text} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode("latin1") + sent)


# --- requests that are no HTTP, or lie about themselves ---------------------------------------------------------------------

GOOD_LINE = "POST /decode?shape=1&shape=4&shape=2&shape=2&dtype=float32 HTTP/1.1"
LINES = st.sampled_from(
    [
        *(
            "POST /decode HTTP/1.1",
            GOOD_LINE,
            "GET / HTTP/1.0",
            "GET /decode HTTP/9.9",
            "BREW /decode HTTP/1.1",
            "POST  /decode",
        ),
        *("", "\x00", "GET \xff HTTP/1.1", "POST http://[/decode HTTP/1.1", "OPTIONS * HTTP/1.1", "CONNECT x:1 HTTP/1.1"),
        *("POST /" + "a" * 5000 + " HTTP/1.1", f"POST /{quote(chr(0x202E))}/decode?shape=%ff%fe HTTP/1.1"),
    ]
)
_LENGTHS = [f"Content-Length: {length}" for length in ("5", "-1", "99999999999999999999", "1, 2", "\xb2")]
_CODINGS = [f"Transfer-Encoding: {coding}" for coding in ("chunked", "gzip, chunked", "x")]
_OTHERS = [
    "Connection: close",
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Expect: 100-continue",
    "Host: x",
    "Host: [",
    "Host:",
]
_BROKEN = [": empty", "no colon", " folded", "X: \x00", "X: " + "y" * 9000]
FIELDS = st.lists(st.sampled_from([*_LENGTHS, *_CODINGS, *_OTHERS, *_BROKEN]), max_size=5)


@bounded(80)
@given(LINES, FIELDS, BODIES)
@example(GOOD_LINE, ["Host: x", "Content-Length: 9999999999"], b"x")
@example(GOOD_LINE, ["Host: x", "Content-Length: 64"], b"x")
@example("POST /decode", [], b"")
@example("POST /decode HTTP/1.1", ["Host: x", "Transfer-Encoding: chunked"], b"ffffffffffffffff\r\n")
@example("POST /decode HTTP/1.1", ["Host: x", "Content-Length: 5", "Transfer-Encoding: chunked"], b"0\r\n\r\n")
def test_what_is_no_request_is_a_4xx_as_well(
    target: ServerThread, seen: Seen, line: str, fields: list[str], body: bytes
) -> None:
    check(target, seen, "\r\n".join([line, *fields, "", ""]).encode("latin1") + body, is_http=False)


def check(target: ServerThread, seen: Seen, data: bytes, *, is_http: bool = True) -> None:
    """Send it all, and nothing more: what comes back is an answer of the protocol; to what is no HTTP it may be the end."""
    with Raw(target) as connection:
        started, used = time.perf_counter(), time.process_time()
        try:
            connection.send(data)
            status, headers, body = connection.answer()
            if status == 100:
                status, headers, body = connection.answer()
        except ConnectionError:
            assert not is_http, data[:300]
            return
    seen.statuses[status] += 1
    if status == 200:
        return
    if status != 408:
        # That one is for those who stop in the middle.
        seen.clock.append(1000 * (time.perf_counter() - started))
        seen.cpu.append(1000 * (time.process_time() - used))
    assert 400 <= status < 500, (status, body[:300], data[:300])
    assert headers["content-type"] == "application/json"
    assert isinstance(json.loads(body)["error"], str)


def test_after_all_of_it_the_server_is_as_it_was(target: ServerThread, seen: Seen) -> None:
    """Nothing of it is kept, and the next one who behaves is answered."""
    wait_until(lambda: target.engine.admission.is_empty)
    assert target.engine.health() == {"status": "ok", "running": False, "waiting": 0}
    before = psutil.Process().memory_info().rss
    query = urlencode([(key, value) for key, values in GOOD.items() for value in values])
    for number in range(40 * TIMES):
        bad = number % 2
        data = bytes(GOOD_BYTES - bad)
        check(target, seen, f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    assert psutil.Process().memory_info().rss - before < 30e6


# --- by what the server says of itself --------------------------------------------------------------------------------------


GETS = ("/health", "/info", "/docs", "/metrics")
POSTS = ("/decode", "/encode", "/{name}/decode", "/{name}/encode")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def schema(loaded: LoadedVae) -> Any:
    app = create_app(Engine(OneVae(loaded, about=loaded.about), LIMITS, watcher=metrics()))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_path_of_the_openapi_is_asked(schema: Any) -> None:
    operations = {(result.ok().method.upper(), result.ok().path) for result in schema.get_all_operations()}
    # It is asked for to make the others.
    assert operations - {("GET", "/openapi.json")} == {*(("GET", path) for path in GETS), *(("POST", path) for path in POSTS)}


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *(("GET", path, GenerationMode.POSITIVE) for path in GETS),
        *(("POST", path, mode) for path in POSTS for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)),
    ],
)
def test_every_answer_is_one_that_the_openapi_knows(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    @bounded(4)
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            assert isinstance(response.json()["error"], str)

    ask()
