"""Endpoints that say nothing of their VAE: what a small picture tells, and what it costs."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from remote_vae import tiled
from remote_vae.errors import AnotherVae, CallCancelled, DeadlineExceeded
from remote_vae.remote.client import DEFAULT_DEADLINES, never
from remote_vae.remote.sample import KEPT_SECONDS, UNKNOWN_SECONDS, Samples, picture
from remote_vae.settings import Settings
from remote_vae.vae.families import find_family
from remote_vae.vae.fingerprint import Identity
from remote_vae.wire import DecodeAnswer, Output
from tests.chaos import Chaos
from tests.remote.conftest import Caller, Clock


@pytest.fixture
def asker(caller: Caller, chaos: Chaos) -> Caller:
    """As the UI's own router calls an endpoint of the protocol that has no /info and gives no posteriors."""
    chaos.info = "404 html"
    chaos.drops = ("posterior", "family")
    caller.router = type(caller.router)()
    caller.route = caller.router._remote
    caller.clock = caller.route._vaes._samples._clock = Clock()
    return caller


def change(vae: Any, part: str) -> None:
    """Weights as another training would leave them."""
    generator = torch.Generator().manual_seed(0)
    for name, value in vae.state_dict().items():
        if name.startswith(part) and value.ndim == 4:
            value.mul_(1 + 0.4 * torch.randn(value.shape, generator=generator))


@pytest.fixture(params=["decode", "encode"])
def op(request: pytest.FixtureRequest, pixels: torch.Tensor) -> dict[str, Any]:
    """The changes that make a call of it."""
    return {} if request.param == "decode" else {"op": "encode", "tensor": pixels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_with_the_same_vae_the_call_goes_remote_and_the_sample_is_sent_once(
    asker: Caller, chaos: Chaos, settings: Settings, op: dict[str, Any], dtype: torch.dtype
) -> None:
    asker.vae.to(dtype)
    if op:
        op = {**op, "tensor": op["tensor"].to(dtype)}
    asker.latents = asker.latents.to(dtype)
    assert asker.run(settings, **op) == asker.run(settings, **op) == "remote"
    assert len(chaos.requests) == 3


def test_with_another_vae_the_call_stays_here_and_only_the_sample_was_sent(
    asker: Caller, chaos: Chaos, settings: Settings, op: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    change(asker.vae, "encoder" if op else "decoder")
    assert asker.run(settings, **op) == asker.run(settings, **op) == "local"
    assert asker.reason == "another VAE there"
    assert len(chaos.requests) == 1
    assert len([record for record in caplog.records if "makes other " in record.message]) == 1


def test_another_decoder_alone_is_noticed_where_it_counts(
    asker: Caller, settings: Settings, pixels: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """As the one of vae-ft-mse, whose encoder is that of SD 1."""
    change(asker.vae, "decoder")
    for _ in range(2):
        assert asker.run(settings, op="encode", tensor=pixels) == "remote"
        assert asker.run(settings) == "local"
    assert len([record for record in caplog.records if "makes other pictures" in record.message]) == 1


def test_the_user_may_have_the_other_vaes_pictures(
    asker: Caller, chaos: Chaos, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    change(asker.vae, "decoder")
    assert asker.run(replace(settings, when_vae_differs="remote")) == "remote"
    assert "makes other pictures" in caplog.text
    assert len(chaos.requests) == 2


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_public_endpoint_is_sent_the_sample_too(asker: Caller, is_changed: bool) -> None:
    """Most checkpoints have the standard VAE that is there; some have one of their own and no name for it."""
    sd1 = find_family("sd1")
    there = copy.deepcopy(asker.vae)
    if is_changed:
        change(asker.vae, "decoder")

    def ask(latents: torch.Tensor) -> DecodeAnswer:
        return DecodeAnswer(Output.TENSOR, there.decode(latents).sample)

    with pytest.raises(AnotherVae, match="makes other pictures") if is_changed else nullcontext():
        asker.route._vaes.check(asker.call(family=sd1), sd1.public_endpoint("decode"), Settings(), ask, public=True)


def test_the_sample_counts_more_than_a_name(asker: Caller, settings: Settings) -> None:
    assert asker.run(settings, "kl-f8-anime2.safetensors") == "remote"
    change(asker.vae, "decoder")
    assert asker.run(settings, "vae-ft-mse-840000-ema-pruned.safetensors") == "local"


def test_a_vae_that_cannot_be_run_here_leaves_the_name_to_decide(asker: Caller, chaos: Chaos, settings: Settings) -> None:
    asker.vae = torch.nn.Linear(1, 1)
    assert asker.run(settings) == "remote"
    assert asker.run(settings, "kl-f8-anime2.safetensors") == "local"
    assert len(chaos.requests) == 1


@pytest.mark.parametrize("mode", ["400", "503", "200 html", "nan"])
def test_what_an_endpoint_does_wrong_with_the_sample_alone_is_not_held_against_it(
    asker: Caller, chaos: Chaos, settings: Settings, mode: str
) -> None:
    change(asker.vae, "decoder")
    settings = replace(settings, transfer="raw")
    chaos.reset(mode, fail_at=0)
    assert asker.run(settings) == asker.run(settings) == "remote"
    assert asker.reason == ""
    assert len(chaos.requests) == 3
    asker.clock.now += UNKNOWN_SECONDS + 1
    assert asker.run(settings) == "local"


@pytest.mark.parametrize("transfer", ["raw", "u8", "png", "jpg"])
def test_it_is_sent_as_the_user_has_pictures_sent_but_never_lossy(
    asker: Caller, chaos: Chaos, settings: Settings, op: dict[str, Any], transfer: str
) -> None:
    settings = replace(settings, transfer=transfer)
    assert asker.run(settings, **op) == "remote"
    assert "jpg" not in chaos.queries[0]
    if not op:
        assert ("image_format=png" in chaos.queries[0]) is (transfer in ("png", "jpg"))
    change(asker.vae, "encoder" if op else "decoder")
    assert asker.run(settings, **op) == "local"


def test_two_looks_of_one_vae_are_both_remembered(asker: Caller, chaos: Chaos, settings: Settings) -> None:
    """As in diffusers' SDXL pipelines, which turn the VAE to float32 and back."""
    asker.vae.to(torch.bfloat16)
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            asker.vae.to(dtype)
            assert asker.run(settings, tensor=asker.latents.to(dtype)) == "remote"
    assert len(chaos.requests) == 2 + 4


def test_no_host_is_asked_to_bring_its_vae_for_it(asker: Caller, settings: Settings) -> None:
    calls = []
    asker.vae.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    assert asker.run(settings) == "remote"
    assert not calls


def test_an_endpoint_that_hangs_costs_one_deadline(asker: Caller, chaos: Chaos) -> None:
    chaos.reset("hang")
    with pytest.raises(DeadlineExceeded):
        asker.ask(Settings(endpoint=chaos.url, first_byte_timeout=0.3))
    assert asker.run(Settings(endpoint=chaos.url, first_byte_timeout=0.3)) == "local"
    assert len(chaos.requests) == 1


def test_an_interrupt_ends_it_before_anything_is_sent(asker: Caller, chaos: Chaos, settings: Settings) -> None:
    asker.route._vaes._infos.of(f"{chaos.url}/decode", DEFAULT_DEADLINES, never)
    with pytest.raises(CallCancelled):
        asker.ask(settings, cancelled=lambda: True)
    assert not chaos.requests
    assert asker.run(settings) == "remote"
    assert len(chaos.requests) == 2


def test_a_vae_that_makes_nan_here_leaves_the_name_to_decide(asker: Caller, chaos: Chaos, settings: Settings) -> None:
    asker.vae.decoder.conv_out.weight.data.fill_(torch.nan)
    assert asker.run(settings) == "remote"
    assert len(chaos.requests) == 1


def test_it_is_asked_anew_after_a_while_and_after_a_failure(asker: Caller, chaos: Chaos, settings: Settings) -> None:
    settings = replace(settings, cooldown=0.0)
    assert asker.run(settings) == "remote"
    asker.clock.now += KEPT_SECONDS + 1
    assert asker.run(settings) == "remote"
    assert len(chaos.requests) == 4
    chaos.reset("503", fail_at=0)
    assert asker.run(settings) == "local"
    assert asker.run(settings) == "remote"
    assert len(chaos.requests) == 3


def test_weights_that_are_loaded_while_the_sample_is_made_are_not_compared(asker: Caller) -> None:
    def encode(vae: Any, pixels: torch.Tensor, *, cancelled: Any) -> torch.Tensor:
        moments = tiled.encode(vae, pixels, cancelled=cancelled)
        change(vae, "decoder")
        return moments

    def ask(tensor: torch.Tensor) -> Any:
        raise AssertionError("a mixture of two VAEs was sent")

    samples = Samples(encode, tiled.decode)
    assert samples.compare(Identity(asker.vae), "decode", "http://127.0.0.1:9/", ask, never) is None


def test_other_weights_in_the_same_vae_are_compared_anew(asker: Caller, settings: Settings) -> None:
    assert asker.run(settings) == "remote"
    change(asker.vae, "decoder")
    assert asker.run(settings) == "local"


def test_the_picture_is_made_of_levels_and_has_light_and_shade() -> None:
    pixels = picture()
    assert pixels.shape == (1, 3, 64, 64)
    levels = (pixels + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert pixels.amin() < -0.7
    assert pixels.amax() > 0.7
