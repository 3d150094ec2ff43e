"""The hook where the VAE and its latents are on a GPU, of which all but the kernels is real."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

import remote_vae
from remote_vae.tiled import offload
from tests.chaos import Chaos
from tests.nearness import psnr, psnr_of_moments
from tests.pretend_gpu import Card, OnCard, on_card, values

NOBODY = "http://127.0.0.1:9"
NEARNESS = {"decode": psnr, "encode": psnr_of_moments}


@pytest.mark.parametrize("op", NEARNESS)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_on_the_card_is_sent_and_the_answer_comes_to_the_card(
    card: Card, vae: AutoencoderKL, chaos: Chaos, op: str, batch: int
) -> None:
    given, true, _ = on_card(card, vae, op, batch)
    handle = remote_vae.attach(vae, {"endpoint": chaos.url, "transfer": "raw"})
    # Neither the strides nor the gradient of what a host gives matter.
    given = given.to(memory_format=torch.channels_last).requires_grad_()
    result = values(getattr(vae, op)(given))
    assert handle.history.last is not None
    assert (handle.history.last.route, handle.history.last.fallback_reason) == ("remote", "")
    assert isinstance(result, OnCard)
    assert torch.equal(result.cpu(), true)


@pytest.mark.parametrize("op", NEARNESS)
def test_on_a_card_too_small_for_the_whole_vae_the_picture_is_tiled_there(card: Card, vae: AutoencoderKL, op: str) -> None:
    given, true, taken = on_card(card, vae, op)
    card.size = card.live + int(0.4 * taken)
    handle = remote_vae.attach(vae, {"endpoint": NOBODY})
    result = values(getattr(vae, op)(given))
    record = handle.history.last
    assert record is not None
    assert (record.route, record.detail, record.fallback_reason) == ("tiled", "exact", "connection refused")
    assert isinstance(result, OnCard)
    assert NEARNESS[op](result.cpu(), true) >= 100


@pytest.mark.parametrize("op", NEARNESS)
def test_on_a_card_that_is_full_the_picture_is_made_on_the_processor(card: Card, vae: AutoencoderKL, op: str) -> None:
    given, true, _ = on_card(card, vae, op)
    card.size = card.live + (1 << 18)
    handle = remote_vae.attach(vae, {})
    result = values(getattr(vae, op)(given))
    record = handle.history.last
    assert record is not None
    assert (record.route, record.detail) == ("tiled", "exact, on the CPU")
    assert isinstance(result, OnCard)
    assert NEARNESS[op](result.cpu(), true) >= 100
    assert all(isinstance(parameter, OnCard) for parameter in vae.parameters())


def test_memory_that_others_take_in_the_meantime_costs_time_and_no_picture(
    card: Card, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given, true, taken = on_card(card, vae, "decode")
    before = card.live
    card.size = before + int(0.25 * taken)
    handle = remote_vae.attach(vae, {})
    # What is said to be free is gone when it is used.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (taken, taken))
    result = vae.decode(given).sample
    assert handle.history.last is not None
    assert handle.history.last.detail == "exact"
    assert "tiled exact ran out of memory" in caplog.text
    # Kept for the next call; no call has a part of it any more.
    offload.PINNED.give_back()
    assert (card.pinned_bytes, card.kept_pinned_bytes) == (0, 0)
    assert psnr(result.cpu(), true) >= 100
