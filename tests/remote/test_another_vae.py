"""Which VAE the endpoint has: what is asked, what it decides, and what the user reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae.errors import AnotherVae, CallCancelled, DeadlineExceeded, EndpointUnreachable, NotOffered, RouteFailed
from remote_vae.remote.another_vae import VaeCheck
from remote_vae.server.models import LoadedVae
from remote_vae.settings import Settings
from remote_vae.vae.families import find_family
from remote_vae.vae.fingerprint import Identity
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.remote.conftest import Caller
from tests.vaes import loaded as as_loaded


@pytest.fixture
def sd1(server: ServerThread) -> Iterator[ServerThread]:
    """A server of the same weights, which takes them for those of SD 1."""
    loaded = replace(server.engine.loaded, family=find_family("sd1"))
    running = ServerThread(loaded)
    yield running
    running.close()


def train(vae: Any) -> None:
    """Other weights in the same module."""
    vae.load_state_dict({name: value * 1.01 for name, value in vae.state_dict().items()})


def unasked(tensor: torch.Tensor) -> Any:
    raise AssertionError(f"a sample of {list(tensor.shape)} was sent")


def test_with_the_same_vae_the_call_goes_remote(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    assert caller.run(settings) == caller.run(settings) == "remote"
    assert chaos.infos == ["/info"]
    assert chaos.requests == ["/decode"] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_the_same_vae_in_another_dtype_too(caller: Caller, settings: Settings, dtype: torch.dtype) -> None:
    caller.vae.to(dtype)
    assert caller.run(settings) == "remote"


def test_a_call_that_does_not_say_which_vae_it_has_asks_nothing(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    assert caller.run(settings, identity=None) == "remote"
    assert not chaos.infos


def test_with_another_vae_nothing_is_sent_and_both_are_named(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    train(caller.vae)
    for _ in range(2):
        with pytest.raises(AnotherVae) as caught:
            caller.ask(settings, "mine.safetensors")
    names = ("demo_vae", "mine.safetensors", chaos.url, *(Identity(caller.vae).fingerprint() or ())[1:])
    for name in (*names, "serve", "When the VAE differs"):
        assert name in str(caught.value)
    assert caught.value.reason == "another VAE there"
    assert chaos.infos == ["/info"]
    assert not chaos.requests


def test_another_vae_is_no_reason_to_pause(caller: Caller, settings: Settings) -> None:
    before = {name: value.clone() for name, value in caller.vae.state_dict().items()}
    train(caller.vae)
    assert caller.run(settings) == "local"
    assert caller.reason == "another VAE there"
    caller.vae.load_state_dict(before)
    assert caller.run(settings) == "remote"


def test_another_vae_is_asked_all_the_same_if_the_user_wants_it(
    caller: Caller, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    train(caller.vae)
    for _ in range(3):
        assert caller.run(replace(settings, when_vae_differs="remote")) == "remote"
    assert caller.reason == ""
    assert [message.count("has another VAE") for message in warnings(caplog)] == [1]


def test_after_other_weights_were_loaded_into_the_same_vae_it_is_another(
    caller: Caller, chaos: Chaos, settings: Settings
) -> None:
    assert caller.run(settings) == "remote"
    train(caller.vae)
    assert caller.run(settings) == "local"
    assert chaos.requests == ["/decode"]


def test_a_server_that_has_another_vae_meanwhile_is_noticed_after_a_minute(
    caller: Caller, chaos: Chaos, settings: Settings, loaded: LoadedVae
) -> None:
    assert caller.run(settings) == "remote"
    trained = AutoencoderKL.from_config(loaded.vae.config).requires_grad_(False)
    trained.load_state_dict(loaded.vae.state_dict())
    train(trained)
    other = ServerThread(replace(as_loaded(trained, "sd1"), family=loaded.family))
    try:
        chaos.target = other.url
        caller.clock.now += 61
        assert caller.run(settings) == "local"
        assert caller.reason == "another VAE there"
    finally:
        other.close()


def test_a_server_that_failed_is_asked_who_it_is_before_the_minute_is_over(
    caller: Caller, chaos: Chaos, settings: Settings
) -> None:
    settings = replace(settings, cooldown=0.0)
    assert caller.run(settings) == "remote"
    chaos.reset("503", fail_at=0)
    assert caller.run(settings) == "local"
    assert caller.run(settings) == "remote"
    assert chaos.infos == ["/info"]


# --- families ------------------------------------------------------------------------------------------------------------


def test_a_vae_of_another_family_is_another_vae(caller: Caller, chaos: Chaos, sd1: ServerThread) -> None:
    chaos.target = sd1.url
    with pytest.raises(AnotherVae, match=r"has a VAE for SD 1 / SD 2, .* is for SDXL"):
        caller.ask(Settings(endpoint=chaos.url), family=find_family("sdxl"))
    assert caller.ask(Settings(endpoint=chaos.url), family=find_family("sd2")) == "remote"
    # A family that nobody knows cannot be compared; the weights are the same.
    assert caller.ask(Settings(endpoint=chaos.url)) == "remote"
    assert chaos.requests == ["/decode"] * 2


# --- an endpoint that says nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["404 html", "503", "200 html", "nan", "redirect", "short"])
def test_without_info_the_models_own_vae_is_taken_for_the_standard_one(
    caller: Caller, chaos: Chaos, settings: Settings, mode: str
) -> None:
    train(caller.vae)
    chaos.info = mode
    assert caller.run(settings) == "remote"


@pytest.mark.parametrize(
    ("picked", "family", "where"),
    [
        ("kl-f8-anime2.safetensors", "sd1", "local"),
        ("vae-ft-mse-840000-ema-pruned.safetensors", "sd1", "remote"),
        ("VAE-ft-MSE-840000-ema-pruned.vae.pt", "sd1", "remote"),
        ("vae-ft-mse-840000-ema-pruned.ckpt", "sdxl", "local"),
        ("C:\\models\\VAE\\sdxl_vae.safetensors", "sdxl", "remote"),
        ("sub/sdxl.vae.safetensors", "sdxl", "remote"),
        ("ae.sft", "flux", "remote"),
        ("anything.pt", "sd3", "local"),
        ("", "sd3", "remote"),
    ],
)
def test_without_info_a_vae_that_was_picked_is_the_standard_one_by_its_name_only(
    caller: Caller, chaos: Chaos, settings: Settings, picked: str, family: str, where: str
) -> None:
    chaos.info = "404 html"
    call = caller.call(picked, family=find_family(family))
    check = VaeCheck()
    if where == "remote":
        check.check(call, f"{chaos.url}/decode", settings, unasked, public=False)
        return
    with pytest.raises(AnotherVae, match=find_family(family).label) as caught:
        check.check(call, f"{chaos.url}/decode", settings, unasked, public=False)
    assert picked in str(caught.value)


def test_a_fingerprint_that_matches_counts_more_than_a_name(caller: Caller, settings: Settings) -> None:
    assert caller.run(settings, "kl-f8-anime2.safetensors") == "remote"


def test_weights_that_cannot_be_read_leave_the_name_to_decide(caller: Caller, settings: Settings) -> None:
    caller.vae = torch.nn.Identity()
    assert caller.run(settings) == "remote"
    assert caller.run(settings, "kl-f8-anime2.safetensors") == "local"


def test_a_public_endpoint_is_not_asked_for_info_and_has_the_standard_vae(caller: Caller, chaos: Chaos) -> None:
    check = VaeCheck()
    url = f"{chaos.url}/"
    check.check(caller.call(family=find_family("sd1")), url, Settings(), unasked, public=True)
    with pytest.raises(AnotherVae):
        check.check(caller.call("anime.pt", family=find_family("sd1")), url, Settings(), unasked, public=True)
    assert not chaos.infos


# --- an endpoint that does not answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "error"), [("hang", DeadlineExceeded), ("drop", EndpointUnreachable)])
def test_an_endpoint_that_does_not_answer_is_asked_one_thing_and_then_left_alone(
    caller: Caller, chaos: Chaos, mode: str, error: type[RouteFailed]
) -> None:
    settings = Settings(endpoint=chaos.url, first_byte_timeout=0.3)
    chaos.reset(mode)
    with pytest.raises(error):
        caller.ask(settings)
    with pytest.raises(NotOffered, match="asked again in"):
        caller.ask(settings)
    assert (chaos.infos, chaos.requests) == (["/info"], [])


def test_a_hanging_call_costs_one_deadline_however_it_goes_on(caller: Caller, chaos: Chaos) -> None:
    """The first byte of /info was there in time, and the call's never comes: one wait, and the next call makes none."""
    settings = Settings(endpoint=chaos.url, first_byte_timeout=0.3)
    chaos.reset("hang")
    chaos.info = "pass"
    assert caller.run(settings) == caller.run(settings) == "local"
    assert (chaos.infos, chaos.requests) == (["/info", "/health"], ["/decode"])


def test_an_interrupt_while_asking_is_no_reason_to_pause(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    chaos.reset("hang")
    with pytest.raises(CallCancelled):
        caller.ask(settings, cancelled=lambda: True)
    chaos.reset("pass")
    assert caller.ask(settings) == "remote"


# --- what the user reads -------------------------------------------------------------------------------------------------


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_user_reads_it_once_and_again_when_something_has_changed(
    caller: Caller, settings: Settings, caplog: pytest.LogCaptureFixture, pixels: torch.Tensor
) -> None:
    same = {name: value.clone() for name, value in caller.vae.state_dict().items()}
    train(caller.vae)
    for _ in range(3):
        caller.run(settings)
        caller.run(settings, op="encode", tensor=pixels)
    assert len(warnings(caplog)) == 1
    assert caller.reason == "another VAE there"
    train(caller.vae)
    caller.run(settings)
    assert len(warnings(caplog)) == 2
    trained = {name: value.clone() for name, value in caller.vae.state_dict().items()}
    caller.vae.load_state_dict(same)
    assert caller.run(settings) == "remote"
    caller.vae.load_state_dict(trained)
    caller.run(settings)
    caller.run(settings)
    assert len(warnings(caplog)) == 3


def test_a_key_in_the_address_is_not_told(caller: Caller, chaos: Chaos) -> None:
    train(caller.vae)
    with pytest.raises(AnotherVae) as caught:
        caller.ask(Settings(decode_endpoint=f"{chaos.url}/decode?key=secret"))
    assert "secret" not in str(caught.value)
