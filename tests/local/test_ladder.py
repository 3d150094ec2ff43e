"""Which way is tried when, with how much memory, and what is left of it for the next one."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from remote_vae.call import Op, Spare
from remote_vae.errors import OutOfMemory, UnsupportedLayout
from remote_vae.local import ladder
from remote_vae.local.estimate import whole_bytes
from remote_vae.local.ladder import exact_ways, first_that_fits, whole_fits
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from tests.layouts import kl_with_extra_parameter, plain_kl
from tests.nearness import psnr

OPS: tuple[Op, ...] = ("decode", "encode")
# A device that is not the CPU, on every machine.
ELSEWHERE = torch.device("meta")


def oom() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def kl() -> nn.Module:
    vae: nn.Module = plain_kl()
    return vae


def given_to(op: Op) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((1, 4, 8, 12) if op == "decode" else (1, 3, 64, 96), generator=generator)


def whole(vae: Any, op: Op) -> torch.Tensor:
    result: torch.Tensor = (
        vae.decode(given_to(op)).sample if op == "decode" else vae.encode(given_to(op)).latent_dist.parameters
    )
    return result


def memory(monkeypatch: pytest.MonkeyPatch, *sizes: int | None) -> list[torch.device]:
    """There are ``sizes`` bytes one asking after the other, the last one for ever; notes of which device was asked."""
    asked: list[torch.device] = []

    def available(device: torch.device) -> int | None:
        asked.append(device)
        return sizes[min(len(asked), len(sizes)) - 1]

    monkeypatch.setattr(ladder, "available_memory", available)
    return asked


# --- whole_fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("size", "fits"), [(None, True), (1 << 40, True), (0, False)])
def test_the_whole_vae_fits_in_as_much_as_it_takes(
    monkeypatch: pytest.MonkeyPatch, kl: nn.Module, op: Op, size: int | None, fits: bool
) -> None:
    asked = memory(monkeypatch, size)
    assert whole_fits(kl, op, given_to(op)) is fits
    assert asked == [torch.device("cpu")]


@pytest.mark.parametrize("op", OPS)
def test_the_whole_vae_is_only_tried_where_there_is_memory_to_spare(
    monkeypatch: pytest.MonkeyPatch, kl: nn.Module, op: Op
) -> None:
    picture = given_to(op)
    plan = (decoder_plan if op == "decode" else encoder_plan)(kl)
    needed = whole_bytes(plan, picture.shape, torch.float32)
    assert needed > picture.numel() * 4
    memory(monkeypatch, needed)
    assert not whole_fits(kl, op, picture)
    memory(monkeypatch, 2 * needed)
    assert whole_fits(kl, op, picture)
    # A batch needs as much for each picture; half precision half.
    assert not whole_fits(kl, op, picture.repeat(2, 1, 1, 1))
    assert whole_fits(kl.half(), op, picture.repeat(2, 1, 1, 1))


def test_the_device_that_the_call_is_on_is_the_one_whose_memory_counts(monkeypatch: pytest.MonkeyPatch, kl: nn.Module) -> None:
    asked = memory(monkeypatch, 0)
    whole_fits(kl, "decode", given_to("decode").to(ELSEWHERE))
    assert asked == [ELSEWHERE]


def test_a_vae_of_an_unknown_layout_is_taken_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 0)
    assert whole_fits(kl_with_extra_parameter(), "decode", given_to("decode"))


# --- exact_ways --------------------------------------------------------------------------------------------------------


def test_a_layout_that_is_not_known_has_no_exact_way() -> None:
    assert list(exact_ways(kl_with_extra_parameter(), "decode", given_to("decode"))) == []


KL = plain_kl()


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the exact tiled VAE is told to do, which it does not."""
    told: list[dict[str, Any]] = []
    for op in OPS:

        def run(vae: Any, tensor: torch.Tensor, op: str = op, **order: Any) -> torch.Tensor:
            told.append({"op": op, **order})
            return tensor

        monkeypatch.setitem(ladder._CALLS, op, run)
    return told


@pytest.mark.parametrize("op", OPS)
def test_each_attempt_gets_less_of_the_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, orders: list[dict[str, Any]], op: Op
) -> None:
    memory(monkeypatch, 1_000_000)
    for way in exact_ways(KL, op, given_to(op)):
        assert way.name == "exact tiled VAE"
        way.run()
    limits = [order["max_bytes"] for order in orders]
    assert len(limits) >= 3
    assert all(later < earlier for earlier, later in itertools.pairwise(limits))
    assert 0 < limits[-1] <= 200_000
    assert 500_000 <= limits[0] < 1_000_000
    assert all(order["op"] == op and order.get("store_device") is None for order in orders)


def test_each_attempt_asks_for_the_free_memory_only_when_its_turn_comes(
    monkeypatch: pytest.MonkeyPatch, orders: list[dict[str, Any]]
) -> None:
    asked = memory(monkeypatch, 1_000, 1_000_000)
    ways = exact_ways(KL, "decode", given_to("decode"))
    assert asked == []
    next(ways).run()
    assert len(asked) == 1
    next(ways).run()
    assert len(asked) == 2
    # More has become free meanwhile.
    assert orders[0]["max_bytes"] < 1_000 < orders[1]["max_bytes"]


def test_where_the_memory_cannot_be_told_the_limits_are_shares_of_what_the_whole_vae_needs(
    monkeypatch: pytest.MonkeyPatch, orders: list[dict[str, Any]]
) -> None:
    memory(monkeypatch, None)
    for way in exact_ways(KL, "decode", given_to("decode")):
        way.run()
    needed = whole_bytes(decoder_plan(KL), given_to("decode").shape, torch.float32)
    limits = [order["max_bytes"] for order in orders]
    assert limits == sorted(limits, reverse=True)
    assert len(set(limits)) == len(limits) >= 3
    assert 0 < limits[-1] < limits[0] < needed


def test_an_error_of_the_exact_tiled_vae_that_nobody_has_thought_of_leaves_the_call_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("this device has no such thing")

    monkeypatch.setitem(ladder._CALLS, "decode", broken)
    picture = torch.zeros(1)
    ways = [*exact_ways(KL, "decode", given_to("decode")), Spare("another way", lambda: picture)]
    assert first_that_fits(ways, "a picture") == ("another way", picture)


def test_off_the_cpu_the_last_attempt_is_the_cpus_in_float32(
    monkeypatch: pytest.MonkeyPatch, orders: list[dict[str, Any]]
) -> None:
    asked = memory(monkeypatch, 1_000, 1_000, 1_000, 64_000)
    names = []
    for way in exact_ways(KL, "decode", given_to("decode").half().to(ELSEWHERE)):
        names.append(way.name)
        way.run()
    assert names == ["exact tiled VAE"] * 3 + ["exact tiled VAE on the CPU"]
    assert asked == [ELSEWHERE] * 3 + [torch.device("cpu")]
    *there, last = orders
    assert not any(order.get("device") or order.get("dtype") for order in there)
    assert (last["device"], last["dtype"]) == ("cpu", torch.float32)
    assert 32_000 <= last["max_bytes"] < 64_000


@pytest.mark.parametrize("op", OPS)
def test_with_little_memory_a_later_attempt_still_makes_the_whole_vaes_result(
    monkeypatch: pytest.MonkeyPatch, kl: nn.Module, op: Op
) -> None:
    # The first attempt has too little, and then other programs have ended.
    memory(monkeypatch, 1_000, 8_000_000)
    name, result = first_that_fits(exact_ways(kl, op, given_to(op)), "a picture")
    assert name == "exact tiled VAE"
    assert psnr(result, whole(kl, op)) >= 100


# --- first_that_fits ---------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[[], Any]:
    def run() -> Any:
        raise error

    return run


def test_the_first_way_that_fits_answers_and_no_later_one_is_made() -> None:
    made: list[str] = []

    def ways() -> Iterator[Spare[int]]:
        for number, run in enumerate((failing(oom()), lambda: 7, lambda: 8), 1):
            made.append(f"way {number}")
            yield Spare(f"way {number}", run)

    assert first_that_fits(ways(), "a picture") == ("way 2", 7)
    assert made == ["way 1", "way 2"]


@pytest.mark.parametrize(
    "error",
    [
        oom(),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        OutOfMemory("max_bytes of 1 MB is too little"),
        UnsupportedLayout("no tiling of its own"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_of_any_kind_and_a_layout_that_is_not_known_go_on(error: Exception) -> None:
    assert first_that_fits([Spare("a", failing(error)), Spare("b", lambda: 1)], "a picture") == ("b", 1)


@pytest.mark.parametrize("error", [ValueError("a defect"), RuntimeError("shapes cannot be multiplied"), KeyboardInterrupt()])
def test_another_error_goes_through_and_nothing_else_is_tried(error: BaseException) -> None:
    tried: list[int] = []
    with pytest.raises(type(error)) as caught:
        first_that_fits([Spare("a", failing(error)), Spare("b", lambda: tried.append(1))], "a picture")
    assert caught.value is error
    assert tried == []


def test_when_no_way_fits_the_error_says_what_failed_and_why() -> None:
    last = oom()
    with pytest.raises(OutOfMemory, match=r"the decode of 1 x 64 x 96 px.*Tried to allocate 2\.00 GiB") as caught:
        first_that_fits([Spare("a", failing(MemoryError())), Spare("b", failing(last))], "the decode of 1 x 64 x 96 px")
    assert caught.value.__cause__ is last
    assert caught.value.reason == "out of memory"


@pytest.mark.parametrize("memory_first", [True, False])
def test_a_layout_that_is_not_known_does_not_hide_that_memory_was_short(memory_first: bool) -> None:
    short = oom()
    errors = [short, UnsupportedLayout("no tiling of its own")]
    ways = [Spare("way", failing(error)) for error in (errors if memory_first else errors[::-1])]
    with pytest.raises(OutOfMemory) as caught:
        first_that_fits(ways, "a picture")
    assert caught.value.__cause__ is short


class Filled:
    """Attempts that fill the memory before it is full, and what the next one finds of them."""

    def __init__(self) -> None:
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def run_out(self) -> torch.Tensor:
        activations = torch.zeros(1000)
        self.tensors.append(weakref.ref(activations))
        raise oom()

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.tensors)


def test_what_an_attempt_has_filled_is_free_again_for_the_next_one() -> None:
    filled, found = Filled(), []

    def ways() -> Iterator[Spare[int]]:
        yield Spare("a", filled.run_out)
        # Here the next one asks for the free memory.
        found.append(filled.alive())
        yield Spare("b", filled.run_out)
        found.append(filled.alive())
        yield Spare("c", filled.alive)

    assert first_that_fits(ways(), "a picture") == ("c", 0)
    assert len(filled.tensors) == 2
    assert found == [0, 0]


def test_what_an_attempt_has_filled_before_an_error_of_its_own_is_free_again_too() -> None:
    filled = Filled()

    def again() -> Any:
        try:
            filled.run_out()
        except Exception:
            # As in the tiled VAE after NaN, and wherever a library tries twice.
            raise oom() from None

    assert first_that_fits([Spare("a", again), Spare("b", filled.alive)], "a picture") == ("b", 0)


def test_cached_memory_is_given_back_after_every_attempt_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    monkeypatch.setattr(ladder, "free_memory", lambda: freed.append(1))
    first_that_fits([Spare("a", failing(oom())), Spare("b", failing(oom())), Spare("c", lambda: len(freed))], "a picture")
    assert len(freed) == 2
