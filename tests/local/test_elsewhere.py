"""The VAE on a device that the user has picked: which way is taken, and how long its copy is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from remote_vae.call import VaeCall
from remote_vae.local import answer, elsewhere, route
from remote_vae.local.elsewhere import Copies, picked_device
from remote_vae.settings import Settings
from remote_vae.vae.at_work import VaeAtWork, whole_diffusers
from remote_vae.vae.families import find_family
from remote_vae.wire import DecodeAnswer
from tests.layouts import plain_kl
from tests.nearness import psnr
from tests.pretend_gpu import LATENTS, Card, OnCard

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    made = Copies()
    monkeypatch.setattr(route, "copies", made)
    yield made
    made.drop()


def values(made: Any) -> torch.Tensor:
    assert isinstance(made, DecodeAnswer)
    return made.tensor


def decode(vae: nn.Module, device: str, latents: torch.Tensor = LATENTS, **changes: Any) -> Any:
    at_work = VaeAtWork(vae, find_family("sd1"), latents.device, latents.dtype)
    call = VaeCall("decode", latents, at_work, values, whole=lambda: whole_diffusers(vae, "decode", latents), **changes)
    with torch.no_grad():
        return answer(call, Settings(local_device=device))


def whole(vae: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return whole_diffusers(vae, "decode", LATENTS)


def test_the_picture_is_made_by_a_copy_there_and_the_outcome_says_so(card: Card, copies: Copies) -> None:
    vae = plain_kl()
    true = whole(vae)
    outcome = decode(vae, "cuda:0")
    assert (outcome.route, outcome.detail, outcome.because) == ("local", "on cuda:0", "")
    assert isinstance(outcome.value, OnCard)
    assert torch.equal(outcome.value.cpu(), true)
    assert not any(isinstance(weight, OnCard) for weight in vae.parameters())
    kept = copies.of(vae, torch.device("cuda", 0), torch.float32)
    decode(vae, "cuda:0")
    assert copies.of(vae, torch.device("cuda", 0), torch.float32) is kept


def test_a_vae_of_a_card_is_made_on_the_cpu_by_choice_in_float32(card: Card) -> None:
    vae = card.put_module(plain_kl().half())
    outcome = decode(vae, "cpu", card.put(LATENTS.half()))
    assert (outcome.route, outcome.detail) == ("local", "on the CPU")
    assert outcome.value.dtype == torch.float32
    assert not isinstance(outcome.value, OnCard)
    assert all(isinstance(weight, OnCard) for weight in vae.parameters())


def test_where_the_whole_vae_does_not_fit_there_the_exact_tiles_are_made_there(card: Card) -> None:
    vae = plain_kl(block_out_channels=(32, 64, 64, 64))
    true = whole(vae)
    with torch.no_grad():
        taken = card.taken_by(lambda: values_of(card.put_module(plain_kl(block_out_channels=(32, 64, 64, 64))), card))
    card.size = card.live + int(0.6 * taken)
    outcome = decode(vae, "cuda:0")
    assert (outcome.route, outcome.detail) == ("tiled", "exact, on cuda:0")
    assert psnr(outcome.value.cpu(), true) >= 100


def values_of(vae: nn.Module, card: Card) -> None:
    vae.decode(card.put(LATENTS))


def test_an_error_there_costs_no_picture(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    vae = plain_kl()
    true = whole(vae)
    monkeypatch.setattr(Copies, "of", broken)
    monkeypatch.setattr(route, "run", broken)
    outcome = decode(vae, "cuda:0")
    assert (outcome.route, outcome.detail, outcome.because) == ("local", "", "cuda:0: failed")
    assert torch.equal(outcome.value, true)


def test_if_nothing_helps_the_error_is_the_hosts_own_and_not_that_of_the_device(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def own() -> Any:
        raise ValueError("a defect of the host")

    monkeypatch.setattr(Copies, "of", broken)
    monkeypatch.setattr(route, "run", broken)
    monkeypatch.setattr(route, "on_cpu", broken)
    at_work = VaeAtWork(plain_kl(), find_family("sd1"))
    call: VaeCall[Any] = VaeCall("decode", LATENTS, at_work, values, whole=own)
    with pytest.raises(ValueError, match="a defect of the host"):
        answer(call, Settings(local_device="cuda:0"))


def test_nan_there_is_no_picture() -> None:
    vae = plain_kl()
    at_work = VaeAtWork(vae, find_family("sd1"), torch.device("meta"))
    call: VaeCall[Any] = VaeCall("decode", LATENTS * torch.nan, at_work, values, whole=lambda: "the host's own")
    assert answer(call, Settings(local_device="cpu")).value == "the host's own"


def test_the_copy_is_made_anew_for_other_weights_and_for_another_vae(copies: Copies) -> None:
    vae, other = plain_kl(), plain_kl()
    first = copies.of(vae, CPU, torch.float32)
    assert copies.of(vae, CPU, torch.float32) is first
    # As A1111 does when another VAE is picked.
    vae.load_state_dict({name: weight + 1 for name, weight in vae.state_dict().items()})
    second = copies.of(vae, CPU, torch.float32)
    assert second is not first
    assert torch.equal(next(second.parameters()), next(vae.parameters()))
    assert copies.of(other, CPU, torch.float32) is not second
    assert not copies.has(vae, CPU)
    assert copies.has(other, CPU)


def test_the_copy_is_made_anew_where_the_host_has_set_the_vae_otherwise(copies: Copies) -> None:
    vae = plain_kl()
    first = copies.of(vae, CPU, torch.float32)
    # As A1111 does for pictures that are to be tiles.
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"
    second = copies.of(vae, CPU, torch.float32)
    assert second is not first
    assert torch.equal(whole(second), whole(vae))
    vae.enable_tiling()
    assert copies.of(vae, CPU, torch.float32).use_tiling
    assert copies.of(vae, CPU, torch.float32) is copies.of(vae, CPU, torch.float32)


def test_the_copy_goes_with_its_vae_and_before_the_next_one_is_made(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = plain_kl()
    gone = weakref.ref(copies.of(vae, CPU, torch.float32))
    alive: list[bool] = []
    copied = elsewhere.copied
    monkeypatch.setattr(elsewhere, "copied", lambda *args: alive.append(gone() is not None) or copied(*args))
    other = plain_kl()
    gone_too = weakref.ref(copies.of(other, CPU, torch.float32))
    assert alive == [False]
    del other
    gc.collect()
    assert gone_too() is None


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("", "cuda:0", None),
        ("cpu", "cpu", None),
        ("cuda:0", "cuda", None),
        ("cuda:0", "cuda:0", None),
        ("cuda:1", "cuda:0", "cuda:1"),
        ("cuda:1", "cuda", "cuda:1"),
        ("cpu", "cuda:0", "cpu"),
        ("xpu:0", "cuda:0", "xpu:0"),
    ],
)
def test_the_device_where_the_vae_is_anyway_is_no_other_one(name: str, own: str, expected: str | None) -> None:
    assert picked_device(name, torch.device(own)) == (expected and torch.device(expected))
