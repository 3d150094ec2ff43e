"""Calls that take far longer than they should, by a clock that is set by hand."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from remote_vae.call import VaeCall
from remote_vae.local.pace import Pace
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import find_family
from tests.layouts import plain_kl

# Cells of the latents of 512 px.
SIDE = 64


class Machine:
    """A pace whose clock is ``now``, on a card of this name."""

    def __init__(self, card: str = "") -> None:
        self.now = 0.0
        self.vae = plain_kl()
        self.pace = Pace(clock=lambda: self.now, card=lambda _: card)

    def call(
        self, side: int = SIDE, op: Op = "decode", family: str = "sd1", vae: Any = None, device: str = "meta"
    ) -> VaeCall[str]:
        shape = (1, 4, side, side) if op == "decode" else (1, 3, 8 * side, 8 * side)
        at_work = VaeAtWork(vae or self.vae, find_family(family), torch.device(device))
        return VaeCall(op, torch.empty(shape, device="meta"), at_work, adopt=lambda _: "adopted")

    def takes(self, seconds: float, call: VaeCall[str], free: int | None = None) -> str:
        def whole() -> str:
            self.now += seconds
            return "whole"

        return self.pace.timed(call, whole, free)


def test_a_size_that_took_ten_times_as_long_as_before_is_too_slow_and_so_are_larger_ones() -> None:
    machine = Machine()
    small, call, large = machine.call(), machine.call(2 * SIDE), machine.call(3 * SIDE)
    assert machine.takes(0.6, small) == "whole"
    assert machine.pace.seconds(call) == pytest.approx(2.4)
    machine.takes(23.0, call)
    assert not machine.pace.is_too_slow(call, None)
    machine.takes(25.0, call)
    assert machine.pace.is_too_slow(call, None)
    assert machine.pace.is_too_slow(large, None)
    assert not machine.pace.is_too_slow(small, None)
    # What was slow is no measure.
    assert machine.pace.seconds(call) == pytest.approx(2.4)


def test_the_other_operation_and_another_vae_are_another_matter() -> None:
    machine = Machine()
    machine.takes(0.1, machine.call())
    machine.takes(60.0, machine.call())
    assert machine.pace.is_too_slow(machine.call(), None)
    assert not machine.pace.is_too_slow(machine.call(op="encode"), None)
    assert not machine.pace.is_too_slow(machine.call(vae=plain_kl()), None)


def test_a_few_seconds_are_what_a_first_call_takes_to_load_its_libraries() -> None:
    machine = Machine()
    machine.takes(0.01, machine.call())
    machine.takes(4.0, machine.call())
    assert not machine.pace.is_too_slow(machine.call(), None)


def test_with_more_memory_free_than_then_it_may_be_tried_again_and_is_forgotten_when_it_is_quick() -> None:
    machine = Machine()
    machine.takes(0.1, machine.call(), free=1000)
    machine.takes(60.0, machine.call(), free=1000)
    assert machine.pace.is_too_slow(machine.call(), 1200)
    assert not machine.pace.is_too_slow(machine.call(), 1300)
    machine.takes(0.1, machine.call(), free=1300)
    assert not machine.pace.is_too_slow(machine.call(), 1000)


def test_a_card_that_was_slow_for_once_is_tried_again_after_twenty_times_as_long() -> None:
    machine = Machine()
    machine.takes(0.1, machine.call())
    machine.takes(60.0, machine.call())
    machine.now += 1199.0
    assert machine.pace.is_too_slow(machine.call(), None)
    machine.now += 2.0
    assert not machine.pace.is_too_slow(machine.call(), None)
    machine.takes(60.0, machine.call())
    assert machine.pace.is_too_slow(machine.call(), None)


def test_a_processor_that_was_busy_is_not_held_to_it() -> None:
    machine = Machine()
    machine.takes(0.1, machine.call(device="cpu"))
    machine.takes(60.0, machine.call(device="cpu"))
    assert not machine.pace.is_too_slow(machine.call(device="cpu"), None)
    assert machine.pace.seconds(machine.call(device="cpu")) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("card", "family", "seconds"),
    [
        ("NVIDIA GeForce RTX 3090", "sd1", 0.253),
        ("NVIDIA GeForce RTX 3090", "sdxl", 0.459),
        # Of the longest name.
        ("NVIDIA GeForce RTX 4080", "sd1", 0.224),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", "sd1", None),
        ("AMD Radeon RX 7900", "sd1", None),
        ("NVIDIA GeForce RTX 3090", "qwen-image", None),
        ("", "sd1", None),
    ],
)
def test_before_a_first_call_the_published_time_of_the_card_is_to_be_expected(
    card: str, family: str, seconds: float | None
) -> None:
    machine = Machine(card)
    assert machine.pace.seconds(machine.call(128, family=family)) == (seconds and pytest.approx(seconds))


def test_by_the_published_time_the_very_first_call_can_be_too_slow() -> None:
    known, unknown = Machine("NVIDIA GeForce RTX 3070"), Machine()
    for machine in (known, unknown):
        machine.takes(90.0, machine.call(128))
    assert known.pace.is_too_slow(known.call(128), None)
    assert not unknown.pace.is_too_slow(unknown.call(128), None)


def test_between_the_published_sizes_the_nearest_one_counts_by_pixels() -> None:
    machine = Machine("NVIDIA GeForce RTX 3090")
    assert machine.pace.seconds(machine.call(256)) == pytest.approx(4 * 0.253)
    assert machine.pace.seconds(machine.call(32)) == pytest.approx(0.062 / 4)


def test_a_call_that_failed_says_nothing_of_how_long_it_takes() -> None:
    machine = Machine()

    def whole() -> str:
        machine.now += 60.0
        raise MemoryError

    with pytest.raises(MemoryError):
        machine.pace.timed(machine.call(), whole, None)
    assert machine.pace.seconds(machine.call()) is None


def test_what_is_known_of_a_vae_does_not_keep_it() -> None:
    machine = Machine()
    machine.takes(0.1, machine.call())
    gone = weakref.ref(machine.vae)
    del machine.vae
    gc.collect()
    assert gone() is None
