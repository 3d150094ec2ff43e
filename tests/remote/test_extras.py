"""What the client asks beyond the protocol of a server that lists it, and of no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from remote_vae.call import Answer, Outcome
from remote_vae.remote.compressing import wanted, worth
from remote_vae.server.admission import Limits
from remote_vae.server.models import LoadedVae
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op
from remote_vae.wire import DecodeAnswer, EncodeAnswer
from remote_vae.wire.compression import SMALLEST, codings
from remote_vae.wire.extras import Extras, own_extras
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.remote.conftest import Caller

LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)) * 5
LEVELS = torch.linspace(0, 255, 2 * 3 * 128 * 128).reshape(2, 3, 128, 128).round()
PIXELS = LEVELS / 127.5 - 1
BEST = next(iter(codings()))
SLOW = 1e6
FAST = 1e10


class Network:
    """How quick the way to the endpoint is, by what was measured."""

    def __init__(self, caller: Caller, chaos: Chaos) -> None:
        self.caller = caller
        self.chaos = chaos
        chaos.info = "pass"

    def ask(self, pace: float, transfer: str = "u8", **changes: Any) -> Outcome[Answer]:
        self.caller.route._endpoints._came.clear()
        self.caller.route._endpoints.came(self.chaos.url, 10_000_000, 10_000_000 / pace)
        call = replace(self.caller.call(**{"tensor": LATENTS, **changes}), adopt=lambda answer: answer)
        return self.caller.route.run(call, Settings(endpoint=self.chaos.url, transfer=transfer))  # type: ignore[arg-type]


@pytest.fixture
def network(caller: Caller, chaos: Chaos) -> Network:
    return Network(caller, chaos)


def levels(outcome: Outcome[Answer]) -> torch.Tensor:
    assert isinstance(outcome.value, DecodeAnswer)
    return outcome.value.pixels("cpu", torch.float32)


def latents(outcome: Outcome[Answer]) -> torch.Tensor:
    assert isinstance(outcome.value, EncodeAnswer)
    return outcome.value.latents


@pytest.mark.parametrize("transfer", ["u8", "raw"])
def test_over_a_slow_network_a_decode_comes_compressed_and_is_the_same(network: Network, transfer: str) -> None:
    fast, slow = network.ask(FAST, transfer), network.ask(SLOW, transfer)
    assert network.chaos.headers[0]["x-remote-vae-accept"] == "late, pictures"
    assert network.chaos.headers[1]["x-remote-vae-accept"] == f"late, pictures, {BEST}"
    assert slow.bytes_down < 0.85 * fast.bytes_down
    assert levels(slow).equal(levels(fast))


def test_over_a_slow_network_levels_go_up_as_levels(network: Network) -> None:
    encode = {"op": "encode", "tensor": PIXELS}
    fast, slow, raw = network.ask(FAST, **encode), network.ask(SLOW, **encode), network.ask(FAST, "raw", **encode)
    assert "dtype=uint8" in network.chaos.queries[1]
    assert network.chaos.headers[1]["x-remote-vae-encoding"] == BEST
    assert slow.bytes_up < 0.3 * fast.bytes_up
    # float16 is a sixteenth of a level off.
    assert (latents(slow) - latents(raw)).abs().max() <= (latents(fast) - latents(raw)).abs().max()


def test_pixels_that_are_no_levels_keep_their_values(network: Network) -> None:
    """As of a host that scales a picture up in floating point."""
    encode = {"op": "encode", "tensor": (PIXELS + 0.4 / 127.5).clamp(-1, 1)}
    network.ask(SLOW, **encode)
    assert "dtype=float16" in network.chaos.queries[0]
    assert network.chaos.headers[0]["x-remote-vae-encoding"] == BEST


def test_raw_pixels_go_up_to_the_bit(network: Network) -> None:
    encode = {"op": "encode", "tensor": PIXELS.sin()}
    fast, slow = network.ask(FAST, "raw", **encode), network.ask(SLOW, "raw", **encode)
    assert slow.bytes_up < fast.bytes_up
    assert latents(slow).equal(latents(fast))


@pytest.mark.parametrize("transfer", ["png", "jpg"])
def test_a_batch_of_picture_files_is_one_call(network: Network, transfer: str) -> None:
    together = network.ask(FAST, transfer)
    assert len(network.chaos.requests) == 1
    network.chaos.extras = []
    network.caller.same_vae.forget(f"{network.chaos.url}/decode")
    alone = network.ask(FAST, transfer)
    assert len(network.chaos.requests) == 3
    # A batch is made at once, and rounded in other places.
    assert (levels(together) - levels(alone)).abs().mean() < 0.1 / 127.5
    assert together.bytes_down == pytest.approx(alone.bytes_down, abs=200)


def test_a_batch_of_png_files_has_the_levels_of_the_tensor(network: Network) -> None:
    assert levels(network.ask(FAST, "png")).equal(levels(network.ask(FAST, "u8")))


@pytest.fixture(scope="module")
def small(loaded: LoadedVae) -> Iterator[ServerThread]:
    """A server that takes three pictures in one request."""
    running = ServerThread(loaded, limits=Limits(max_batch=3))
    yield running
    running.close()


@pytest.mark.parametrize("transfer", ["raw", "u8", "png"])
@pytest.mark.parametrize("op", ["decode", "encode"])
@pytest.mark.parametrize("knows", [True, False], ids=["a host", "the command line"])
def test_a_batch_goes_in_requests_that_the_server_takes(
    network: Network, small: ServerThread, op: Op, transfer: str, knows: bool
) -> None:
    network.chaos.target = small.url
    network.caller.vae = network.caller.vae if knows else None
    tensor = LATENTS[:, :, :8, :8] if op == "decode" else PIXELS[:, :, :64, :64]
    outcome = network.ask(FAST, transfer, op=op, tensor=tensor.repeat(4, 1, 1, 1)[:7])
    made = levels(outcome) if op == "decode" else latents(outcome)
    assert len(made) == 7
    assert len(network.chaos.requests) == (7 if (op, transfer) == ("encode", "png") else 3)


def test_a_batch_has_no_more_pixels_in_a_request_than_the_server_takes(network: Network, loaded: LoadedVae) -> None:
    server = ServerThread(loaded, limits=Limits(max_pixels=64 * 64))
    network.chaos.target = server.url
    outcome = network.ask(FAST, "u8", tensor=LATENTS[:, :, :8, :8].repeat(3, 1, 1, 1))
    assert levels(outcome).shape == (6, 3, 64, 64)
    assert len(network.chaos.requests) == 2
    server.close()


def test_a_server_that_lists_nothing_is_asked_for_nothing(network: Network) -> None:
    network.chaos.extras = []
    for changes in ({}, {"op": "encode", "tensor": PIXELS}):
        network.ask(SLOW, **changes)
    for headers, query in zip(network.chaos.headers, network.chaos.queries, strict=True):
        assert not [name for name in headers if name.startswith("x-remote-vae")]
        assert "fingerprint" not in query
        assert "dtype=uint8" not in query


def test_a_plain_endpoint_is_asked_for_nothing(network: Network) -> None:
    network.chaos.info = "404 html"
    network.ask(SLOW)
    # The first one is the test picture.
    assert len(network.chaos.headers) == 2
    for headers in network.chaos.headers:
        assert not [name for name in headers if name.startswith("x-remote-vae")]


@pytest.mark.parametrize("mode", ["short", "cut", "nan"])
@pytest.mark.parametrize("transfer", ["u8", "png"])
def test_a_compressed_answer_that_is_broken_is_a_fallback(caller: Caller, chaos: Chaos, mode: str, transfer: str) -> None:
    chaos.info = "pass"
    chaos.reset(mode)
    caller.route._endpoints.came(chaos.url, 1_000_000, 1.0)
    assert caller.run(Settings(endpoint=chaos.url, transfer=transfer), tensor=LATENTS) == "local"
    assert caller.reason


def test_a_server_that_lists_what_it_does_not_do_is_a_fallback(caller: Caller, chaos: Chaos) -> None:
    """It refuses a batch of picture files, as a plain server does."""
    chaos.info, chaos.extras = "pass", list(own_extras())
    chaos.strips = ("x-remote-vae-accept",)
    assert caller.run(Settings(endpoint=chaos.url, transfer="png"), tensor=LATENTS) == "local"
    assert caller.reason == "400"
    # What it does of the protocol is still asked for.
    assert caller.run(Settings(endpoint=chaos.url), tensor=LATENTS) == "remote"


def test_what_the_vae_took_there_is_in_the_record(caller: Caller, chaos: Chaos) -> None:
    chaos.info = "pass"
    caller.run(Settings(endpoint=chaos.url))
    assert caller.last.route == "remote"
    assert 0 < caller.last.vae_ms < caller.last.ms
    assert f"({caller.last.vae_ms:.0f} in the VAE)" in str(caller.last)


# --- when it is worth it ---------------------------------------------------------------------------------------------------

ZSTD_LIKE = replace(codings()["delta-gzip"], seconds_per_byte=1e-8)


@pytest.mark.parametrize(
    ("pace", "near", "is_worth"),
    [
        (1e6, False, True),
        (4.9e7, False, True),
        (5.1e7, False, False),
        (1e9, False, False),
        # What was measured counts for more than the name: a tunnel has the name of this machine.
        (1e6, True, True),
        (1e9, True, False),
        (None, False, True),
        (None, True, False),
    ],
)
def test_compressing_is_worth_it_where_the_network_is_slower_than_the_processor(
    pace: float | None, near: bool, is_worth: bool
) -> None:
    assert worth(1 << 20, pace, ZSTD_LIKE, near=near) is is_worth


def test_what_is_small_is_not_worth_it() -> None:
    assert worth(SMALLEST, 1e6, ZSTD_LIKE, near=False)
    assert not worth(SMALLEST - 1, 1e6, ZSTD_LIKE, near=False)


def test_an_endpoint_on_this_machine_is_taken_for_quick_until_it_is_measured() -> None:
    everything = Extras(late=True, pictures=True, codings=tuple(codings()))
    for url in ("http://localhost:7870/decode", "http://127.0.0.1/decode", "http://[::1]:7870/"):
        assert wanted(everything, 1 << 20, None, url) == Extras(late=True, pictures=True)
    assert wanted(everything, 1 << 20, None, "http://studio:7870/decode") == Extras(late=True, pictures=True, codings=(BEST,))


def test_the_pace_is_that_of_the_answers_of_late(caller: Caller) -> None:
    known = caller.route._endpoints
    assert known.pace("http://a/decode") is None
    known.came("http://a/decode", 1000, 1e-9)
    # Of several at once, which share the network.
    known.came("http://a/decode", 10_000_000, 0.0)
    assert known.pace("http://a/decode") is None
    known.came("http://a/decode", 2_000_000, 1.0)
    assert known.pace("http://a/encode") == pytest.approx(2e6)
    assert known.pace("http://b/decode") is None
    for _ in range(20):
        known.came("http://a/decode", 8_000_000, 1.0)
    assert known.pace("http://a/decode") == pytest.approx(8e6, rel=0.01)
