"""What the adapter for Forge and those that came of it has of its own: the class of their VAE, and its tiling."""

from __future__ import annotations

import pytest
import torch

from remote_vae.hosts import detect
from remote_vae.local import route
from tests.conftest import ServerThread
from tests.hosts.conftest import FORGES, WAYS, Endpoint, Made, make
from tests.hosts.forge_kin_standin import ReforgeHost
from tests.hosts.forge_standin import ForgeHost, no_memory
from tests.hosts.standin import levels_apart, same, sampled, source
from tests.vaes import tiny_flux


@pytest.fixture(scope="module", params=FORGES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


ONLY_FORGE = pytest.mark.parametrize("name", ["forge"], indirect=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["off", "remote", "503"])
def test_each_of_them_goes_remote_and_falls_back_and_is_itself_when_off(
    host: ForgeHost, alone: dict[str, Made], endpoint: Endpoint, way: str, mode: str
) -> None:
    host.turn_on(endpoint.url, enabled=mode != "off")
    endpoint.reset("503" if mode == "503" else "pass")
    made, expected = make(host, way), alone[way]
    assert levels_apart(made.pictures, expected.pictures) <= (1 if mode == "remote" else 0)
    assert torch.equal(made.rng, expected.rng)
    assert (endpoint.requests == []) is (mode == "off")
    assert (host.calls == []) is (mode == "remote")


def test_each_of_them_is_known_and_shares_the_vae_in_use(host: ForgeHost) -> None:
    assert detect.detect() is host.adapter
    served = host.adapter.current()
    assert served is not None
    assert (served.module, served.family.key) == (host.module, "sd1")
    pixels = source() * 2 - 1
    with host.adapter.serving():
        moments = served.whole(served.module, "encode", served.bring(pixels))
    torch.testing.assert_close(moments, host.vae.encode(pixels).latent_dist.parameters)


@pytest.mark.parametrize("why", ["no memory", "always tiled"])
def test_their_own_tiling_is_not_used_where_the_exact_one_can(host: ForgeHost, alone: dict[str, Made], why: str) -> None:
    if why == "always tiled" and isinstance(host, ReforgeHost):
        pytest.skip("it does not look at that")
    host.memory_management.VAE_ALWAYS_TILED = why == "always tiled"
    host.turn_on("")
    with no_memory(host.module, times=2 if why == "no memory" else 0):
        made = make(host, "img2img")
    assert levels_apart(made.pictures, alone["img2img"].pictures) <= 1
    assert torch.equal(made.rng, alone["img2img"].rng)
    assert host.forge_vae.tilings == []
    assert host.details() == ["exact"] * 2
    assert not [name for name in vars(host.forge_vae) if "_tiled" in name]
    assert all("out of memory" in text for text in host.infotexts)


def test_a_tiling_that_somebody_put_into_a_vae_is_still_there_after_a_local_decode(host: ForgeHost) -> None:
    theirs = host.forge_vae.decode_tiled_ = lambda _: torch.zeros(1, 3, 32, 48)
    host.turn_on("")
    host.txt2img()
    assert host.forge_vae.decode_tiled_ is theirs


def test_their_own_tiling_is_the_last_resort_and_its_own_when_off(
    host: ForgeHost, alone: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "available_memory", lambda device: 1000)
    for enabled in (False, True):
        host.turn_on("", enabled=enabled)
        # What its own tiling tries before.
        with no_memory(host.module, times=1):
            assert same(make(host, "txt2img").pictures, alone["txt2img"].pictures)
    assert host.forge_vae.tilings == ["decode"] * 2
    assert host.details() == ["the VAE's own tiling"]


@torch.inference_mode()
def test_the_latents_of_a_picture_whose_sides_are_no_multiples_of_eight_are_those_of_its_own_vae(
    host: ForgeHost, endpoint: Endpoint
) -> None:
    def encoded() -> torch.Tensor:
        torch.manual_seed(5)
        return host.encode(source(height=250, width=333) * 2 - 1)

    local = encoded()
    host.turn_on(endpoint.url)
    assert local.shape == (1, 4, 31, 41)
    torch.testing.assert_close(encoded(), local, rtol=1e-4, atol=1e-4)
    assert endpoint.requests == ["/encode"]


@torch.inference_mode()
def test_a_clone_of_the_vae_goes_remote_and_after_the_extension_is_out_does_not(host: ForgeHost, endpoint: Endpoint) -> None:
    twin, latents = host.forge_vae.clone(), sampled(1, 1)
    local = twin.decode(latents)
    host.turn_on(endpoint.url)
    torch.testing.assert_close(twin.decode(latents), local, rtol=1e-4, atol=1e-4)
    assert twin.encode(source().movedim(1, -1)).shape == (1, 4, 4, 6)
    assert endpoint.requests == ["/decode", "/encode"]
    host.adapter.uninstall()
    assert torch.equal(twin.decode(latents), local)
    assert len(endpoint.requests) == 2


def test_a_clone_that_another_extension_put_among_the_parts_before_us_is_hooked(bare: ForgeHost, endpoint: Endpoint) -> None:
    bare.model.forge_objects_after_applying_lora.vae = bare.forge_vae.clone()
    bare.load_extension()
    bare.turn_on(endpoint.url)
    bare.txt2img()
    assert endpoint.requests == ["/decode"]


def test_what_stands_for_a_model_before_the_first_generation_is_left_alone(bare: ForgeHost) -> None:
    model, bare.model_data.sd_model = bare.model, object()
    bare.load_extension()
    assert bare.adapter.installed
    assert bare.adapter.current() is None
    bare.load(model)


@ONLY_FORGE
@torch.inference_mode()
def test_a_regulation_of_the_posterior_is_applied_to_a_remote_one(host: ForgeHost, endpoint: Endpoint) -> None:
    vae, pixels = host.forge_vae, source().movedim(1, -1)
    vae.patcher.model_options["model_vae_regulation"] = lambda posterior: posterior.mode()
    local = vae.encode(pixels)
    host.turn_on(endpoint.url)
    torch.testing.assert_close(vae.encode(pixels), local, rtol=1e-4, atol=1e-4)
    # A plain endpoint's sample is taken as it is.
    del vae.patcher.model_options["model_vae_regulation"]
    endpoint.drops, endpoint.info = ("posterior",), "404 html"
    torch.testing.assert_close(vae.encode(pixels), local, rtol=1e-4, atol=1e-4)
    assert endpoint.requests == ["/encode"] * 2


def test_an_engine_of_sixteen_channels_and_a_shift_is_right(host: ForgeHost) -> None:
    flux = tiny_flux()
    host.load(host.made("flux", flux.vae))

    def pictures() -> list:
        torch.manual_seed(5)
        return host.img2img(source())

    local = pictures()
    server = ServerThread(flux)
    host.turn_on(server.url)
    try:
        assert levels_apart(pictures(), local) <= 1
    finally:
        server.close()
    assert host.routes() == ["encode remote", "decode remote"]


def test_a_remote_answer_leaves_the_vae_off_its_device_and_a_tiled_one_brings_it_there(
    host: ForgeHost, endpoint: Endpoint
) -> None:
    host.turn_on(endpoint.url)
    host.img2img(source())
    assert host.brought == []
    host.turn_on("")
    with no_memory(host.module):
        host.txt2img()
    # For the exact strips, and before by itself.
    assert host.details()[-1] == "exact"
    assert set(host.brought) == {host.forge_vae.patcher}
