"""Hosts that manage their models themselves make room in their own way, and bring models back when they use them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from remote_vae.call import VaeCall
from remote_vae.hosts import comfy_shaped, sdnext
from remote_vae.hosts.comfy_shaped import COMFYUI, FORGE, Seam
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import find_family
from tests.hosts.standin import make_module

CARD = torch.device("meta")


class Manager:
    """The memory management that Forge and ComfyUI share: models that are loaded, the last used one first."""

    def __init__(self, *models: nn.Module) -> None:
        self.current_loaded_models = [SimpleNamespace(model=SimpleNamespace(model=each), device=CARD) for each in models]
        self.free = 1000
        self.asked: list[int] = []

    def get_free_memory(self, device: torch.device) -> int:
        assert device == CARD
        return self.free

    def free_memory(self, memory_required: int, device: torch.device, keep_loaded: list[Any]) -> None:
        assert device == CARD
        self.asked.append(memory_required)
        for each in reversed(self.current_loaded_models):
            if each not in keep_loaded and self.free < memory_required:
                self.current_loaded_models.remove(each)
                self.free += sum(weight.nbytes for weight in each.model.model.parameters())


def loaded(size: int) -> nn.Module:
    """On the card, with so many bytes."""
    return nn.Linear(size // 4, 1, bias=False, device=CARD)


@pytest.fixture(params=[FORGE, COMFYUI], ids=lambda seam: seam.host)
def seam(request: pytest.FixtureRequest) -> Seam:
    found: Seam = request.param
    return found


@pytest.fixture
def first_stage() -> nn.Module:
    return loaded(400)


@pytest.fixture
def manager(seam: Seam, first_stage: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Manager:
    made = Manager(first_stage, loaded(5000), loaded(2000))
    for name, module in ((seam.memory.partition(".")[0], make_module("host", __path__=[])), (seam.memory, made)):
        monkeypatch.setitem(sys.modules, name, module)
    return made


def make_room(seam: Seam, first_stage: nn.Module, wanted: int, least: int) -> int:
    # Another patcher of the same model, as each clone has.
    vae = SimpleNamespace(device="cpu", patcher=SimpleNamespace(model=first_stage, load_device=CARD))
    return comfy_shaped._make_room(seam, vae, wanted, least)


def test_the_host_is_asked_for_what_is_wanted_beside_what_is_free_and_keeps_the_vae(
    seam: Seam, manager: Manager, first_stage: nn.Module
) -> None:
    assert make_room(seam, first_stage, 1500, 1) == 2000
    assert manager.asked == [2500]
    assert make_room(seam, first_stage, 1 << 40, 1) == 5000
    assert [each.model.model for each in manager.current_loaded_models] == [first_stage]
    assert make_room(seam, first_stage, 1 << 40, 1) == 0


def test_where_all_that_it_has_is_not_enough_it_is_not_asked(seam: Seam, manager: Manager, first_stage: nn.Module) -> None:
    assert make_room(seam, first_stage, 9000, 7001) == 0
    assert manager.asked == []
    assert make_room(seam, first_stage, 9000, 7000) == 7000


def test_a_manager_that_has_changed_makes_no_room_and_no_error(
    seam: Seam, manager: Manager, first_stage: nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Manager, "free_memory")
    assert make_room(seam, first_stage, 1500, 1) == 0
    assert f"{seam.host} made no room" in caplog.text


# --- SD.Next -----------------------------------------------------------------------------------------------------------------


class Sdnext:
    """Its model, and what it was told to put away. ``free``: bytes, as often as they are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        vae = nn.Linear(2, 2)
        self.pipe = SimpleNamespace(vae=vae, components={"vae": vae, "unet": nn.Linear(2, 2), "text_encoder": nn.Linear(1, 1)})
        self.told: list[Any] = []
        free = iter((100, 5100))
        monkeypatch.setattr(sdnext, "available_memory", lambda device: next(free))
        monkeypatch.setattr(sdnext.adapter, "_models", lambda: [self.pipe])
        models = make_module(
            "modules.sd_models", apply_balanced_offload=lambda *args, **kwargs: self.told.append((args, kwargs))
        )
        shared = make_module("modules.shared", opts=SimpleNamespace(diffusers_offload_mode=mode))
        package = make_module("modules", __path__=[], sd_models=models, shared=shared)
        for each in (package, models, shared):
            monkeypatch.setitem(sys.modules, each.__name__, each)

    def call(self) -> VaeCall[str]:
        at_work = VaeAtWork(self.pipe.vae, find_family("sd1"))
        return VaeCall("decode", torch.zeros(1, 4, 2, 2), at_work, adopt=lambda _: "adopted")


def test_with_balanced_offload_sdnext_puts_away_what_it_had_left_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Sdnext(monkeypatch, "balanced")
    with sdnext.adapter._roomy(host.call()) as call:
        assert call.make_room(1, 1) == 5000
    assert host.told == [((host.pipe,), {"exclude": ["vae"], "force": True})]


def test_without_offload_the_parts_of_its_pipeline_leave_as_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Sdnext(monkeypatch, "none")
    moved: list[Any] = []
    monkeypatch.setattr(sdnext.Room, "make", lambda room, wanted, least: moved.extend(room._modules()) or 7)
    with sdnext.adapter._roomy(host.call()) as call:
        assert call.make_room(1, 1) == 7
    assert moved == [host.pipe.components["unet"], host.pipe.components["text_encoder"]]
    assert host.told == []


@pytest.mark.parametrize("mode", ["model", "sequential", "group"])
def test_where_its_models_are_on_the_card_one_at_a_time_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    host = Sdnext(monkeypatch, mode)
    with sdnext.adapter._roomy(host.call()) as call:
        assert call.make_room(1, 1) == 0
    assert host.told == []
