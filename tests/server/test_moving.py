"""What crosses between the host's memory and a card, and what waits for what; on a card that is pretended."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from remote_vae.server import moving
from remote_vae.server.admission import Place
from remote_vae.server.catalogue import Device, OneVae
from remote_vae.server.engine import Engine
from remote_vae.server.models import LoadedVae
from remote_vae.server.moving import Mover
from remote_vae.wire import DecodeRequest, EncodeRequest, HttpResponse, Output
from tests.pretend_gpu import DEVICE, Card
from tests.server.at_once import job_of, worker_of

PIXELS = 32 * 48


@pytest.fixture
def there(card: Card, loaded: LoadedVae) -> OneVae:
    """The VAE on the card."""
    vae = card.put_module(copy.deepcopy(loaded.vae))
    return OneVae(_OnCard(vae, loaded.family, loaded.source, loaded.fingerprints))


class _OnCard(LoadedVae):
    device = DEVICE  # type: ignore[assignment]
    dtype = torch.float32  # type: ignore[assignment]


def crossed(card: Card, entry: OneVae, requests: list[Any]) -> list[HttpResponse]:
    """The answers, and in ``card.put_away`` the bytes that came back from the card beside its computation."""
    jobs = [job_of(entry, request) for request in requests]
    worker = worker_of(DEVICE)
    for job in jobs:
        job.values = worker.mover.up(job.values)
    worker.work(jobs)
    return [job.answer.result() for job in jobs]


def there_and_back(mover: Mover, values: torch.Tensor) -> torch.Tensor:
    """One more than the values, made on the card."""
    there = mover.up(values)
    mover.arrived(there)
    made = there + 1
    mover.leaves(made)
    with mover.leaving():
        return mover.down(made)


def values_of(answer: HttpResponse, like: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(answer.body), dtype=torch.float32).reshape(like.shape)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(seed)) * 5


@pytest.mark.parametrize(
    ("output", "bytes_a_pixel"), [(Output.UINT8, 3), (Output.PNG, 3), (Output.TENSOR, 12), (Output.UNIT, 12)]
)
def test_levels_are_made_on_the_card_and_cross_as_they_are(
    card: Card, there: OneVae, loaded: LoadedVae, output: Output, bytes_a_pixel: int
) -> None:
    answers = crossed(card, there, [DecodeRequest(latents(seed), output) for seed in range(2)])
    assert card.put_away == 2 * PIXELS * bytes_a_pixel
    if output is Output.TENSOR:
        with torch.inference_mode():
            expected = loaded.vae.decode(torch.cat([latents(0), latents(1)])).sample.split(1)
        for answer, one in zip(answers, expected, strict=True):
            assert torch.equal(values_of(answer, one), one)


def test_half_precision_is_made_on_the_card_for_who_wants_half_the_bytes(card: Card, there: OneVae) -> None:
    crossed(card, there, [DecodeRequest(latents(0).half(), Output.TENSOR)])
    assert card.put_away == 6 * PIXELS


def test_latents_of_a_picture_come_back(card: Card, there: OneVae, loaded: LoadedVae) -> None:
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    answer = crossed(card, there, [EncodeRequest(pixels, posterior=True)])[0]
    with torch.inference_mode():
        expected = loaded.vae.encode(pixels).latent_dist.parameters
    assert torch.equal(values_of(answer, expected), expected)


@pytest.mark.parametrize("size", [1, 1000, 1024, 2500])
def test_no_more_is_pinned_than_a_piece_each_way_however_much_crosses(
    card: Card, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(moving, "_PINNED_BYTES", 1024)
    mover, values = Mover(DEVICE), torch.arange(size, dtype=torch.uint8)
    assert torch.equal(there_and_back(mover, values), values + 1)
    assert card.pinned_bytes == 2048


def test_where_nothing_can_be_pinned_it_crosses_all_the_same(card: Card) -> None:
    card.most_pinned = 1000
    mover, values = Mover(DEVICE), torch.randn(3, 5)
    assert torch.equal(there_and_back(mover, values), values + 1)
    assert card.pinned_bytes == 0


def test_what_is_not_in_order_comes_in_order(card: Card) -> None:
    mover, values = Mover(DEVICE), torch.randn(4, 6).t()
    there = mover.up(values)
    mover.arrived(there)
    turned = (there + 1).t()
    mover.leaves(turned)
    with mover.leaving():
        assert torch.equal(mover.down(turned), (values + 1).t())


def test_what_was_brought_in_half_precision_is_brought_anew_for_float32(card: Card, there: OneVae, loaded: LoadedVae) -> None:
    """As after a NaN."""
    job = job_of(there, DecodeRequest(latents(1)))
    worker = worker_of(DEVICE)
    job.values = worker.mover.up(job.values.half())
    worker.mover.arrived(job.values)
    worker.work([job])
    with torch.inference_mode():
        expected = loaded.vae.decode(latents(1)).sample
    assert torch.equal(values_of(job.answer.result(), expected), expected)


@pytest.mark.parametrize("device", [DEVICE, None], ids=["no-room-there", "of-a-host"])
def test_what_is_not_brought_ahead_waits_as_it_was_sent(card: Card, loaded: LoadedVae, device: Device) -> None:
    """It may have to be made in float32, after a NaN."""
    vae = card.put_module(copy.deepcopy(loaded.vae).half())
    catalogue = OneVae(_Halved(vae, loaded.family, loaded.source, loaded.fingerprints))
    catalogue.devices = (device,)
    card.size = card.live
    engine = Engine(catalogue)
    job = engine._job(Place("decode", 1, 1), catalogue, DecodeRequest(latents(1)))
    assert torch.equal(job.values, latents(1))
    engine.close()


class _Halved(_OnCard):
    dtype = torch.float16  # type: ignore[assignment]
