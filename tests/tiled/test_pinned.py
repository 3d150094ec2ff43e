"""Pinned memory that calls share."""

from __future__ import annotations

import random

import pytest
import torch

from remote_vae.errors import OutOfMemory
from remote_vae.tiled import offload, pinned
from remote_vae.tiled.offload import HostMemory
from remote_vae.tiled.pinned import PinnedMemory
from remote_vae.tiled.policy import CARD
from tests.pretend_gpu import DEVICE, Card


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_SLAB_BYTES", 1 << 16)
    monkeypatch.setattr(pinned, "_most_bytes", lambda: 1 << 18)


def test_pieces_never_overlap_and_all_memory_is_there_again_when_they_are_given_back() -> None:
    memory, chance = PinnedMemory(), random.Random(3)
    held: list[tuple[pinned.Piece, torch.Tensor, int]] = []
    for number in range(400):
        if held and (chance.random() < 0.5 or len(held) > 12):
            piece, values, given = held.pop(chance.randrange(len(held)))
            assert bool((values == given).all())
            memory.give(piece)
            continue
        piece = memory.take(4 * (count := chance.randrange(1, 6000)), pin=False)
        if piece is not None:
            values = piece.like(torch.empty(1, 1, 1, count)).fill_(number)
            held.append((piece, values, number))
    for piece, values, given in held:
        assert bool((values == given).all())
        memory.give(piece)
    memory.give_back()
    assert memory._slabs == []


def test_there_is_a_bound() -> None:
    memory = PinnedMemory()
    pieces = [memory.take(1 << 16, pin=False) for _ in range(5)]
    assert [piece is None for piece in pieces] == [False] * 4 + [True]
    memory.give(pieces[1])
    assert memory.take(1 << 16, pin=False) is not None


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_piece_takes_a_strip_in_its_own_order(order: torch.memory_format, dtype: torch.dtype) -> None:
    strip = torch.randn(2, 3, 5, 7).to(dtype).to(memory_format=order)
    piece = PinnedMemory().take(strip.nbytes, pin=False)
    assert piece is not None
    stored = piece.like(strip)
    assert stored.is_contiguous(memory_format=order)
    assert torch.equal(stored.copy_(strip), strip)


def test_what_is_in_use_is_not_given_back() -> None:
    memory = PinnedMemory()
    piece = memory.take(100, pin=False)
    memory.give_back()
    assert len(memory._slabs) == 1
    memory.give(piece)
    memory.give_back()
    assert memory._slabs == []


def test_a_torch_that_keeps_what_was_pinned_leaves_it_to_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # As 2.1, which A1111 brings.
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = PinnedMemory()
    piece = memory.take(100, pin=False)
    assert piece is not None
    memory.give(piece)
    memory.give_back()
    monkeypatch.setattr(pinned, "available_host_memory", lambda: 0)
    again = memory.take(100, pin=False)
    assert again is not None
    assert again.slab is piece.slab


def test_where_the_host_has_no_memory_left_nothing_is_pinned_and_the_call_ends_before_the_process_does(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "PINNED", PinnedMemory())
    strip = card.put(torch.ones(1, 2, 3, 4))
    for module in (pinned, offload):
        monkeypatch.setattr(module, "available_host_memory", lambda: pinned.RESERVE + strip.nbytes)
    memory = HostMemory(DEVICE, CARD)
    stored = memory.put(strip)
    assert stored.piece is None
    assert torch.equal(memory.arrived(memory.fetch(stored)), strip)
    for module in (pinned, offload):
        monkeypatch.setattr(module, "available_host_memory", lambda: pinned.RESERVE)
    with pytest.raises(OutOfMemory, match="the host has no memory left"):
        memory.put(strip)
    memory.close()
    memory.leave()


def test_a_piece_that_a_call_still_reads_is_not_for_another_call(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PINNED", PinnedMemory())
    ours, theirs = (HostMemory(DEVICE, CARD) for _ in range(2))
    strip = card.put(torch.ones(1, 2, 3, 4))
    stored = ours.put(strip)
    coming = ours.fetch(stored)
    ours.drop(stored)
    other = theirs.put(card.put(torch.zeros(1, 2, 3, 4)))
    assert other.piece != stored.piece
    assert torch.equal(ours.arrived(coming), strip)
    third = ours.put(strip)
    assert third.piece == stored.piece, "now it has been read"
    for memory, each in ((theirs, other), (ours, third)):
        memory.close()
        memory.drop(each)
        memory.leave()
