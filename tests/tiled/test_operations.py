"""How often the exact tiled VAE asks something of a card, by counting: the same code with a card's settings."""

from __future__ import annotations

import pytest
import torch

from bench.operations import Operations, counted

# Of a decode; the whole VAE has 136 operations in a decode and 108 in an encode.
MOST = {None: 1200, 0.3: 3000, 0.1: 8000}
ENCODE = 108 / 136


@pytest.mark.parametrize("share", MOST)
def test_a_decode_of_1024_px_takes_as_few_operations_as_the_memory_allows(share: float | None) -> None:
    made = counted("decode", 1024, share)
    assert made.operations <= MOST[share]
    assert (made.to_store > 0) is (share is not None)
    assert made.from_store == made.to_store
    assert made.synchronisations == 0


@pytest.mark.parametrize("share", MOST)
def test_an_encode_takes_fewer_in_proportion(share: float | None) -> None:
    assert counted("encode", 1024, share).operations <= ENCODE * MOST[share]


def test_views_and_empty_memory_are_no_operations_and_a_look_is_a_wait() -> None:
    values = torch.ones(2, 3)
    with torch.no_grad(), Operations() as count:
        values.view(6)[2:].reshape(2, 2).transpose(0, 1)
        torch.empty(4), torch.empty_like(values)
    assert (count.operations, count.synchronisations) == (0, 0)
    assert count.dispatched > 4
    with torch.no_grad(), Operations() as count:
        (values + 1).mul_(2)
        bool(values.sum() > 3)
    assert (count.operations, count.synchronisations) == (5, 1)
