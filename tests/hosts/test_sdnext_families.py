"""SD.Next with the VAEs of newer models: in front of its own stand-in for their calls, or of their class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.chaos import Chaos
from tests.hosts.of_families import latents_in, latents_of, pixels_of, the_vae
from tests.hosts.sdnext_standin import Pipeline, SdnextHost
from tests.nearness import out_of_memory, psnr

# One frame and many; pictures of Flux.2.
FAMILIES = ("flux2", "qwen-image", "wan22-5b")


@pytest.fixture(scope="module")
def name() -> str:
    return "sdnext"


def loaded(host: SdnextHost, family: str) -> Any:
    """A pipeline of that family is loaded, its calls taken by SD.Next as there, and announced afterwards."""
    pipe = Pipeline(copy.deepcopy(the_vae(family)))
    host.sd_hijack_vae.init_hijack(pipe)
    host.load(pipe)
    host.moved.clear()
    return pipe.vae


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_remote_call_is_made_before_sdnext_moves_the_vae_to_the_card(host: SdnextHost, served: Chaos, family: str) -> None:
    vae = loaded(host, family)
    for frames in (1, 2):
        latents, pixels = latents_of(vae, frames), pixels_of(vae, frames)
        alone = vae.decode(latents, return_dict=False)[0], latents_in(vae.encode(pixels))
        assert host.moved
        host.moved.clear()
        served.reset("pass")
        host.turn_on(served.url)
        assert torch.equal(vae.decode(latents, return_dict=False)[0], alone[0])
        assert torch.equal(latents_in(vae.encode(pixels)), alone[1])
        assert served.requests == ["/decode", "/encode"]
        assert host.moved == []
        host.turn_on(served.url, enabled=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["503", "cut"])
@torch.no_grad()
def test_when_the_endpoint_fails_sdnexts_own_call_gives_what_it_gives(
    host: SdnextHost, served: Chaos, family: str, mode: str
) -> None:
    vae = loaded(host, family)
    latents = latents_of(vae)
    alone = vae.decode(latents, return_dict=False)[0]
    host.moved.clear()
    served.reset(mode)
    host.turn_on(served.url)
    assert torch.equal(vae.decode(latents, return_dict=False)[0], alone)
    # To be brought for an estimate of the memory, and by SD.Next itself.
    assert host.moved == [vae] * 2
    assert host.routes() == ["decode local"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("failure", [out_of_memory, lambda *_, **__: 1 / 0])
@torch.no_grad()
def test_where_sdnext_would_lose_the_picture_it_is_made_in_another_way(
    host: SdnextHost, served: Chaos, family: str, failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = loaded(host, family)
    latents, pixels = latents_of(vae, frames=1), pixels_of(vae, frames=1)
    alone = vae.decode(latents, return_dict=False)[0], latents_in(vae.encode(pixels))
    for part in (vae.decoder, vae.encoder):
        monkeypatch.setattr(part, "forward", failure)
    assert vae.decode(latents, return_dict=False) is None
    served.reset("503")
    host.turn_on(served.url)
    assert psnr(vae.decode(latents, return_dict=False)[0], alone[0]) >= 100
    assert psnr(latents_in(vae.encode(pixels)), alone[1]) >= 100
    assert {record.route for record in host.records()} <= {"tiled", "local"}
    # It is said why, and not that SD.Next gave None.
    reason = "out of memory" if failure is out_of_memory else "division by zero"
    assert all(reason in record.fallback_reason for record in host.records())


@pytest.mark.parametrize("family", ["ltx2"])
@torch.no_grad()
def test_what_the_wire_does_not_carry_is_sdnexts_own_call(host: SdnextHost, served: Chaos, family: str) -> None:
    vae = loaded(host, family)
    latents = latents_of(vae)
    alone = vae.decode(latents, causal=True, return_dict=False)[0]
    host.moved.clear()
    host.turn_on(served.url)
    assert torch.equal(vae.decode(latents, causal=True, return_dict=False)[0], alone)
    assert host.moved == [vae]
    assert not served.requests
    assert not host.records()


@pytest.mark.parametrize("family", ["sana", "cogvideox"])
@torch.no_grad()
def test_a_vae_that_sdnext_does_not_stand_before_is_taken_at_its_class(host: SdnextHost, served: Chaos, family: str) -> None:
    pipe = Pipeline(copy.deepcopy(the_vae(family)))
    latents, pixels = latents_of(pipe.vae), pixels_of(pipe.vae)
    alone = pipe.vae.decode(latents).sample, latents_in(pipe.vae.encode(pixels))
    host.load(pipe)
    host.turn_on(served.url)
    assert torch.equal(pipe.vae.decode(latents).sample, alone[0])
    assert torch.equal(latents_in(pipe.vae.encode(pixels)), alone[1])
    assert served.requests == ["/decode", "/encode"]
    # Another of the class is a preprocessor's.
    copy.deepcopy(pipe.vae).decode(latents)
    assert len(served.requests) == 2


@pytest.mark.parametrize("family", ["qwen-image"])
@torch.no_grad()
def test_a_reload_leaves_one_hook_and_the_vae_that_is_switched_away_none(host: SdnextHost, served: Chaos, family: str) -> None:
    kind = type(the_vae(family))
    own = {op: vars(kind)[op] for op in ("decode", "encode")}
    host.adapter.uninstall()
    pipe = Pipeline(copy.deepcopy(the_vae(family)))
    host.sd_hijack_vae.init_hijack(pipe)
    host.load(pipe)
    theirs = {op: vars(pipe.vae)[op] for op in own}
    for _ in range(2):
        host.adapter.install()
        host.adapter.hook_loaded()
        assert vars(pipe.vae)["decode"].__wrapped__ is theirs["decode"]
        host.adapter.uninstall()
        assert {op: vars(pipe.vae)[op] for op in own} == theirs
        assert {op: vars(kind)[op] for op in own} == own
    host.reload_ui()
    host.turn_on(served.url)
    pipe.vae.decode(latents_of(pipe.vae))
    assert served.requests == ["/decode"]
    other = loaded(host, family)
    assert {op: vars(pipe.vae)[op] for op in own} == theirs
    # What SD.Next took from its class is the class's own once the extension is out.
    host.adapter.uninstall()
    assert {op: vars(kind)[op] for op in own} == own
    assert {op: vars(other)[f"orig_{op}"].__func__ for op in own} == own


@pytest.mark.parametrize("family", ["wan"])
@torch.no_grad()
def test_a_vae_that_was_hooked_and_replaced_within_its_pipeline_is_none_of_our_business(
    host: SdnextHost, served: Chaos, family: str
) -> None:
    before = loaded(host, family)
    host.model.vae = copy.deepcopy(the_vae(family))
    host.turn_on(served.url)
    host.model.vae.decode(latents_of(before))
    assert served.requests == ["/decode"]
    # It asks the one that is loaded, as SD.Next's own does.
    host.adapter.hook_loaded()
    assert "remote_vae_adapter" not in vars(vars(before)["decode"])
