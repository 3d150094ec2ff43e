"""The exact tiled VAE on a GPU, of which all but the kernels is real."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch

from remote_vae import tiled
from remote_vae.errors import CallCancelled
from remote_vae.tiled import pinned
from tests import layouts
from tests.nearness import psnr, psnr_of_moments
from tests.pretend_gpu import LATENTS, Card, OnCard, on_card
from tests.tiled.strips import cut_strips
from tests.versions import needs_half

CALLS: dict[str, tuple[Any, Any]] = {"decode": (tiled.decode, psnr), "encode": (tiled.encode, psnr_of_moments)}


@pytest.fixture(autouse=True)
def thin_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_strips(monkeypatch, 256 << 10, "cuda")
    monkeypatch.setattr(pinned, "_SLAB_BYTES", 1 << 20)


@pytest.fixture
def vae() -> Any:
    return layouts.plain_kl(block_out_channels=(32, 64, 64, 64))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("share", [None, 0.3, 0.15])
def test_a_call_on_the_card_is_the_processors_and_keeps_to_its_bytes(
    card: Card, vae: Any, op: str, share: float | None
) -> None:
    call, nearness = CALLS[op]
    given, true, taken = on_card(card, vae, op)
    before = card.live
    limit = None if share is None else int(share * taken)
    result = call(vae, given, max_bytes=limit)
    assert isinstance(result, OnCard)
    assert nearness(result.cpu(), true) >= 100
    assert limit is None or card.peak - before <= limit
    assert (card.put_away > 0) is (limit is not None)
    del result
    assert card.live == before


def test_a_batch_is_put_away_and_fetched_picture_by_picture(card: Card, vae: Any) -> None:
    given, true, taken = on_card(card, vae, "decode")
    result = tiled.decode(vae, given.repeat(2, 1, 1, 1), max_bytes=int(0.3 * taken))
    assert psnr(result[1:].cpu(), true) >= 100
    assert torch.equal(result[0], result[1])
    assert card.put_away > 0


def test_where_the_system_pins_no_more_strips_wait_in_other_memory(
    card: Card, vae: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    given, true, taken = on_card(card, vae, "decode")
    card.most_pinned = 1 << 20
    assert psnr(tiled.decode(vae, given, max_bytes=int(0.15 * taken)).cpu(), true) >= 100
    assert card.put_away > 0
    assert "no more pinned memory" in caplog.text


def test_a_call_that_is_cancelled_leaves_nothing_on_the_card_and_nothing_pinned(card: Card, vae: Any) -> None:
    given, _, taken = on_card(card, vae, "decode")
    before = card.live
    with pytest.raises(CallCancelled):
        tiled.decode(vae, given, max_bytes=int(0.15 * taken), cancelled=lambda: card.put_away > 1 << 20)
    assert card.live == before
    pinned.PINNED.give_back()
    assert (card.pinned_bytes, card.kept_pinned_bytes) == (0, 0)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("share", [None, 0.3, 0.15])
def test_the_host_waits_for_the_card_at_most_three_times_a_picture(card: Card, vae: Any, op: str, share: float | None) -> None:
    given, _, taken = on_card(card, vae, op)
    call, _ = CALLS[op]
    before = card.waits
    call(vae, given, max_bytes=None if share is None else int(share * taken))
    assert card.waits - before <= 3


@needs_half
def test_half_precision_is_looked_at_once_at_the_end(card: Card, vae: Any) -> None:
    given = card.put(LATENTS.half())
    card.put_module(vae.half())
    before = card.waits
    tiled.decode(vae, given)
    assert card.waits - before == 1


def test_what_is_pinned_serves_the_next_call_and_is_given_back_when_nobody_calls(
    card: Card, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, _, taken = on_card(card, vae, "decode")
    limit = int(0.15 * taken)
    tiled.decode(vae, given, max_bytes=limit)
    kept = card.pinned_bytes
    assert 0 < kept <= 32 << 20
    monkeypatch.setattr(pinned, "_IDLE_SECONDS", 0.05)
    tiled.decode(vae, given, max_bytes=limit)
    assert card.pinned_bytes == kept
    deadline = time.monotonic() + 10
    while card.pinned_bytes + card.kept_pinned_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (card.pinned_bytes, card.kept_pinned_bytes) == (0, 0)


def test_no_more_is_pinned_than_a_part_of_the_hosts_memory(card: Card, vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given, true, taken = on_card(card, vae, "decode")
    monkeypatch.setattr(pinned, "_most_bytes", lambda: 2 << 20)
    assert psnr(tiled.decode(vae, given, max_bytes=int(0.15 * taken)).cpu(), true) >= 100
    assert card.pinned_bytes <= 2 << 20


@needs_half
def test_half_precision_that_overflows_on_the_card_is_done_again_in_float32(
    card: Card, vae: Any, caplog: pytest.LogCaptureFixture
) -> None:
    vae.decoder.up_blocks[0].resnets[0].conv1.weight.mul_(3e5)
    true = vae.decode(LATENTS[:, :, :8, :8]).sample
    vae = card.put_module(vae.to(torch.bfloat16).to(torch.float16))
    result = tiled.decode(vae, card.put(LATENTS[:, :, :8, :8].half()))
    assert "once more in float32" in caplog.text
    assert result.dtype == torch.float16
    assert torch.isfinite(result).all()
    assert psnr(result.cpu(), true) >= 30


def test_weights_that_the_host_keeps_in_its_memory_are_copied_to_the_card_layer_by_layer(card: Card, vae: Any) -> None:
    true = vae.decode(LATENTS).sample
    assert psnr(tiled.decode(vae, LATENTS, device="cuda"), true) >= 100
    assert not any(isinstance(parameter, OnCard) for parameter in vae.parameters())
    copied = card.peak
    card.put_module(vae.decoder)
    weights = card.live
    # At no time were many of the weights on the card beside the strips.
    assert copied <= card.taken_by(lambda: tiled.decode(vae, LATENTS, device="cuda")) + 0.3 * weights
