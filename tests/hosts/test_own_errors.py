"""What is done when a step of ours has no room, between an answer and the UI."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from remote_vae.wire import DecodeAnswer
from tests.hosts.conftest import Endpoint, Made, make
from tests.hosts.forge_standin import ForgeHost
from tests.hosts.standin import Host, same, source
from tests.nearness import out_of_memory


@pytest.mark.parametrize("name", ["a1111"], indirect=True)
def test_a_remote_picture_that_has_no_room_on_the_device_is_made_here(
    host: Host, alone: dict[str, Made], endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = DecodeAnswer.pixels
    left = [1]

    def no_room_once(answer: DecodeAnswer, device: Any, dtype: torch.dtype) -> torch.Tensor:
        left[0] -= 1
        return out_of_memory() if left[0] == 0 else pixels(answer, device, dtype)

    monkeypatch.setattr(DecodeAnswer, "pixels", no_room_once)
    host.turn_on(endpoint.url)
    assert same(make(host, "batch").pictures, alone["batch"].pictures)
    assert host.routes() == ["decode remote", "decode local"]
    assert host.records()[-1].fallback_reason == "OutOfMemoryError"


@pytest.mark.parametrize("name", ["forge"], indirect=True)
def test_for_a_shared_vae_as_much_room_is_made_as_its_own_call_takes(host: ForgeHost) -> None:
    """What is estimated for a picture as if it were latents is 79 times as much: every other model would go."""
    wanted: list[int] = []
    host.memory_management.load_models_gpu = lambda models, memory_required: wanted.append(memory_required)
    shared, vae = host.adapter.current(), host.forge_vae
    assert shared is not None
    latents = torch.zeros(1, 4, 8, 8)
    for tensor in (latents, source()):
        shared.bring(tensor)
    assert wanted == [
        vae.memory_used_decode(latents.shape, vae.vae_dtype),
        vae.memory_used_encode(source().shape, vae.vae_dtype),
    ]
