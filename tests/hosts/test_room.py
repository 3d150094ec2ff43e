"""Models that leave a card for a call, and come back: what moves, what does not, and what becomes of errors."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

import remote_vae
from remote_vae.hosts import room
from remote_vae.hosts.room import Room, parts_of
from tests.hosts.test_gpu import NEARNESS
from tests.pretend_gpu import DEVICE, Card, OnCard, on_card, values
from tests.versions import NO_END_OF_STORAGES, skip_if

LARGE = 1 << 40


@pytest.fixture(autouse=True)
def pretended_tensors_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_is_plain", lambda tensor: type(tensor) in (torch.Tensor, nn.Parameter, OnCard))


def model(card: Card, width: int = 64) -> nn.Module:
    """With a buffer and two modules that have one weight."""
    first, second = nn.Linear(width, width), nn.Linear(width, width)
    second.weight = first.weight
    made: nn.Module = card.put_module(nn.Sequential(first, second, nn.BatchNorm1d(width)).eval())
    made[1].weight = made[0].weight
    return made


def size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*module.parameters(), *module.buffers()})


def is_there(module: nn.Module) -> bool:
    on_the_card = {isinstance(tensor, OnCard) for tensor in (*module.parameters(), *module.buffers())}
    assert len(on_the_card) == 1
    return on_the_card.pop()


def room_of(*modules: Any) -> Room:
    return Room(lambda: modules, lambda: DEVICE)


def test_what_leaves_is_the_same_afterwards_object_for_object(card: Card) -> None:
    skip_if(NO_END_OF_STORAGES)
    unet = model(card)
    batch = card.put(torch.randn(3, 64))
    held = {id(tensor) for tensor in unet.state_dict(keep_vars=True).values()}
    before, live = unet(batch).cpu(), card.live
    made = room_of(unet)
    freed = made.make(1, 1)
    assert freed == size(unet)
    assert card.live == live - freed
    assert not is_there(unet)
    made.restore()
    assert is_there(unet)
    assert card.live == live
    assert {id(tensor) for tensor in unet.state_dict(keep_vars=True).values()} == held
    assert unet[0].weight is unet[1].weight
    assert torch.equal(unet(batch).cpu(), before)


def test_no_more_leave_than_are_wanted_and_none_where_all_of_them_would_not_do(card: Card) -> None:
    unet, text = model(card), model(card, 32)
    assert room_of(unet, text).make(LARGE, size(unet) + size(text) + 1) == 0
    assert is_there(unet)
    assert room_of(unet, text).make(size(unet), 1) == size(unet)
    assert not is_there(unet)
    assert is_there(text)


def test_what_left_once_for_a_batch_leaves_no_second_time(card: Card) -> None:
    unet = model(card)
    made = room_of(unet)
    assert made.make(1, 1)
    assert made.make(1, 1) == 0
    made.restore()
    assert is_there(unet)


class Weight(nn.Parameter):
    """As those of quantised models."""


def quantised(unet: Any) -> None:
    unet[0].weight = Weight(torch.zeros(2, 2), requires_grad=False)
    unet[0].weight.__class__ = type("Packed", (OnCard,), {})


def with_views(unet: Any) -> None:
    unet[0].bias = nn.Parameter(unet[1].weight.data[0], requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: setattr(unet[1], "_hf_hook", object()),
        lambda unet: setattr(unet, "is_quantized", True),
        lambda unet: setattr(unet, "hf_device_map", {"": 0}),
        lambda unet: setattr(unet[0], "_compiled_call_impl", print),
        quantised,
        with_views,
    ],
    ids=["accelerate", "quantised", "device map", "compiled", "weights of their own kind", "views of one another"],
)
def test_what_belongs_to_others_or_is_no_plain_tensor_stays(card: Card, change: Any) -> None:
    unet = model(card)
    change(unet)
    assert room_of(unet).make(LARGE, 1) == 0
    assert isinstance(unet[2].weight, OnCard)


@pytest.mark.parametrize("free", [None, 0, 1000])
def test_where_the_hosts_memory_is_short_as_well_everything_stays(
    card: Card, monkeypatch: pytest.MonkeyPatch, free: int | None
) -> None:
    unet = model(card)
    monkeypatch.setattr(room, "available_memory", lambda device: free)
    assert room_of(unet).make(1, 1) == 0
    assert is_there(unet)


def test_a_host_that_cannot_say_what_it_has_makes_no_room_and_no_error() -> None:
    def broken() -> Any:
        raise AttributeError("first_stage_model")

    assert Room(broken, lambda: DEVICE).make(1, 1) == 0
    assert Room(list, broken).make(1, 1) == 0


def test_on_a_processor_and_on_apples_shared_memory_there_is_no_room_to_be_made() -> None:
    unet = nn.Linear(4, 4)
    for device in ("cpu", "mps"):
        assert Room(lambda: [unet], lambda device=device: torch.device(device)).make(1, 1) == 0  # type: ignore[misc]


def test_who_uses_a_model_that_waits_has_it_back_at_once(card: Card) -> None:
    unet = model(card)
    batch = card.put(torch.randn(3, 64))
    expected = unet(batch).cpu()
    made = room_of(unet)
    made.make(1, 1)
    assert not is_there(unet)
    # As a second pipeline that has the same UNet does.
    assert torch.equal(unet(batch).cpu(), expected)
    assert is_there(unet)
    made.restore()
    assert is_there(unet)
    assert not unet._forward_pre_hooks


def test_who_uses_a_model_that_is_leaving_has_all_of_it(card: Card) -> None:
    unet = model(card)
    first, *others = unet.parameters()
    away = room._Away(unet)
    away.put(first)
    unet(card.put(torch.randn(3, 64)))
    for tensor in others:
        away.put(tensor)
    assert is_there(unet)


def test_what_left_and_came_back_in_inference_mode_is_trained_and_leaves_as_before(card: Card) -> None:
    unet = model(card)
    made = room_of(unet)
    with torch.inference_mode():
        assert made.make(1, 1) == size(unet)
        made.restore()
    assert is_there(unet)
    assert not any(tensor.is_inference() for tensor in (*unet.parameters(), *unet.buffers()))
    assert made.make(1, 1) == size(unet)
    made.restore()


def test_what_goes_wrong_half_way_comes_back_all_the_same(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = model(card)
    to, moved = Card._to, []

    def failing(card: Card, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        moved.append(tensor)
        if len(moved) == 3:
            raise MemoryError
        return to(card, tensor, *args, **kwargs)

    made = room_of(unet)
    monkeypatch.setattr(Card, "_to", failing)
    assert made.make(1, 1) == 0
    assert len(moved) == 3
    made.restore()
    assert is_there(unet)


def test_what_finds_no_room_to_come_back_comes_when_it_is_used(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    skip_if(NO_END_OF_STORAGES)
    unet, text = model(card), model(card, 32)
    batch = torch.randn(3, 64)
    expected = unet(card.put(batch)).cpu()
    made = room_of(unet, text)
    made.make(LARGE, 1)
    card.size = card.live + size(text)
    made.restore()
    assert "could not come back" in caplog.text
    assert is_there(text)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        unet(batch)
    card.size = LARGE
    assert torch.equal(unet(card.put(batch)).cpu(), expected)
    assert is_there(unet)
    assert not unet._forward_pre_hooks


# --- plain diffusers ---------------------------------------------------------------------------------------------------------


class Pipe:
    """A pipeline of diffusers, as far as it matters here."""

    def __init__(self, vae: Any, **parts: Any) -> None:
        self.vae = vae
        self.components = {"vae": vae, "scheduler": object(), "safety_checker": None, **parts}


@pytest.mark.parametrize("op", NEARNESS)
def test_the_models_of_a_pipeline_wait_while_its_vae_needs_the_card(card: Card, vae: AutoencoderKL, op: str) -> None:
    given, true, taken = on_card(card, vae, op)
    unet, text = model(card, 1800), model(card, 256)
    card.size = card.live + int(0.9 * taken)
    assert size(unet) > 0.8 * taken
    pipe = Pipe(vae, unet=unet, text_encoder=text)
    handle = remote_vae.attach(pipe)
    made: list[bool] = []
    handle._hooks["decode"]._original = watched(vae, "decode", unet, made)  # type: ignore[attr-defined]
    handle._hooks["encode"]._original = watched(vae, "encode", unet, made)  # type: ignore[attr-defined]
    result = values(getattr(vae, op)(given))
    record = handle.history.last
    assert record is not None
    assert (record.route, record.detail, record.fallback_reason) == ("local", "", "")
    assert torch.equal(result.cpu(), true)
    assert made[-1] is False
    assert is_there(unet)
    assert is_there(text)
    handle.settings = remote_vae.Settings(make_room="off")
    assert NEARNESS[op](values(getattr(vae, op)(given)).cpu(), true) >= 100
    assert handle.history.last.route == "tiled"


def watched(vae: Any, op: str, unet: nn.Module, made: list[bool]) -> Any:
    method = getattr(type(vae), op)

    def call(*args: Any, **kwargs: Any) -> Any:
        made.append(is_there(unet))
        return method(vae, *args, **kwargs)

    return call


def test_the_largest_parts_of_a_pipeline_come_first_and_its_vae_never(vae: AutoencoderKL) -> None:
    small, large = nn.Linear(2, 2), nn.Linear(9, 9)
    assert parts_of(Pipe(vae, text_encoder=small, unet=large, again=large), vae) == [large, small]
    assert parts_of(None, vae) == parts_of(vae, vae) == []


def test_an_attached_vae_does_not_keep_the_pipeline_that_it_came_with(vae: AutoencoderKL) -> None:
    pipe = Pipe(vae, unet=nn.Linear(2, 2))
    remote_vae.attach(pipe)
    gone = weakref.ref(pipe)
    del pipe
    assert gone() is None
