"""What the adapter for SD.Next has of its own: the hook in diffusers' class, and whose VAEs it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tests.hosts.conftest import Endpoint
from tests.hosts.sdnext_standin import SdnextHost
from tests.hosts.standin import OWN, OptionInfo, Request, same, sampled, source


@pytest.fixture(scope="module")
def name() -> str:
    return "sdnext"


@torch.no_grad()
def test_a_vae_of_a_preprocessor_is_none_of_our_business_nor_one_that_was_taken_out(
    host: SdnextHost, endpoint: Endpoint
) -> None:
    other, before = host.made("sd1").vae, host.module
    local = other.decode(sampled(1, 1)).sample
    within: list[torch.Tensor] = []
    host.within = lambda p: within.append(other.decode(sampled(1, 1)).sample)
    host.turn_on(endpoint.url)
    host.txt2img()
    assert torch.equal(within[0], local)
    assert endpoint.requests == ["/decode"]
    # Without a word.
    host.model.vae = other
    before.decode(sampled(1, 1))
    assert len(endpoint.requests) == 1
    other.decode(sampled(1, 1))
    assert len(endpoint.requests) == 2


@torch.no_grad()
def test_the_refiners_vae_and_that_of_a_pipeline_within_a_model_are_taken(host: SdnextHost, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url)
    host.model_data.sd_refiner = host.made("sdxl")
    host.model_data.sd_refiner.vae.decode(sampled(1, 1))
    assert "family=sdxl" in endpoint.queries[0]
    vae = host.module
    host.model_data.sd_model = SimpleNamespace(pipe=host.model)
    vae.decode(sampled(1, 1))
    assert endpoint.requests == ["/decode"] * 2
    host.model_data.sd_model = host.model.pipe


@pytest.mark.parametrize("mode", ["pass", "503", "off"])
@torch.no_grad()
def test_what_a_pipeline_asks_of_the_class_comes_back_in_its_own_form(host: SdnextHost, endpoint: Endpoint, mode: str) -> None:
    vae, latents, pixels = host.module, sampled(1, 1), source() * 2 - 1

    def everything() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        decoded = [
            vae.decode(latents, return_dict=True).sample,
            vae.decode(z=latents).sample,
            vae.decode(latents, False)[0],
            vae.decode(latents, False, generator)[0],
        ]
        distributions = [vae.encode(x=pixels).latent_dist, vae.encode(pixels, return_dict=False)[0]]
        drawn = [distribution.sample(generator) for distribution in distributions]
        return [*decoded, *drawn, *(each.mode() for each in distributions), generator.get_state()]

    local = everything()
    endpoint.reset("pass" if mode == "off" else mode)
    host.turn_on(endpoint.url, enabled=mode != "off")
    for one, other in zip(everything(), local, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert endpoint.requests == ([] if mode == "off" else ["/decode"] * 4 + ["/encode"] * 2)


@pytest.mark.parametrize("enabled", [True, False])
@torch.no_grad()
def test_what_a_pipeline_passes_beside_the_tensor_reaches_the_class(
    bare: SdnextHost, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    seen: list[dict[str, Any]] = []

    def noted(vae: Any, z: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return OWN["decode"](vae, z, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", noted)
    bare.load_extension()
    bare.turn_on("", enabled=enabled)
    generator = torch.Generator()
    bare.module.decode(sampled(1, 1), return_dict=False, generator=generator)
    bare.adapter.uninstall()
    assert seen == [{"return_dict": False, "generator": generator}]
    assert AutoencoderKL.decode is noted
    bare.clear_seam()


@pytest.mark.parametrize("output_type", ["pil", "np"])
@torch.no_grad()
def test_a_picture_in_eight_bits_is_rounded_where_the_uis_own_is_and_cut_off_where_that_is(
    host: SdnextHost, endpoint: Endpoint, output_type: str
) -> None:
    def pictures() -> list[np.ndarray]:
        made: list[np.ndarray] = host.processing_vae.vae_decode(sampled(1, 1), host.model, output_type=output_type)
        return made

    local = pictures()
    host.turn_on(endpoint.url, transfer="u8")
    assert same(pictures(), local)
    assert host.routes() == ["decode remote"]


@torch.no_grad()
def test_a_preview_whose_approximation_is_named_is_one_as_well(host: SdnextHost, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url)
    host.sd_samplers_common.single_sample_to_image(sampled(1, 9)[0], "Full")
    assert endpoint.requests == []


def test_after_interrupt_in_one_batch_the_next_is_not_begun_by_process_diffusers_either(
    host: SdnextHost, endpoint: Endpoint
) -> None:
    """It forgets the press when a job begins, so the pictures are refused there and the loop ends."""
    host.turn_on(endpoint.url)

    def stops(_: Request) -> None:
        host.adapter._thread.generation.stops = True

    host.n_iter, host.within = 3, stops
    assert host.txt2img() == []
    assert endpoint.requests == []


def test_the_hosts_own_options_of_a_like_name_stay_its_own(bare: SdnextHost) -> None:
    """SD.Next has a remote VAE of its own."""
    own = {key: OptionInfo(False, key) for key in ("remote_vae_type", "remote_vae_encode")}
    for key, info in own.items():
        bare.opts.add_option(key, info)
    bare.load_extension()
    bare.create_ui()
    assert {key: bare.opts.data_labels[key] for key in own} == own


def test_a_request_of_the_api_cannot_say_where_pictures_and_tokens_go(host: SdnextHost) -> None:
    """Its options know no ``restrict_api``; there is a list of those that requests may not override."""
    restricted = {"endpoint", "decode_endpoint", "encode_endpoint", "public_endpoints", "rescue_folder", "share"}
    assert {f"remotevae_{key}" for key in restricted} <= host.shared.restricted_opts


@pytest.mark.parametrize(("enabled", "mode"), [(True, None), (False, "auto"), (False, None), (True, "off")])
def test_the_uis_own_remote_vae_is_asked_only_where_ours_is_off(
    host: SdnextHost, endpoint: Endpoint, enabled: bool, mode: str | None
) -> None:
    """It would send the pictures to Hugging Face, although an endpoint is set."""
    is_ours = enabled if mode is None else mode == "auto"
    host.turn_on(endpoint.url, enabled=enabled)
    host.alwayson = {} if mode is None else {"Remote VAE": [mode]}
    p = Request(vae_type="Remote")
    host.generate(p)
    assert host.sent_elsewhere == (0 if is_ours else 1)
    assert endpoint.requests == (["/decode"] if is_ours else [])
    assert p.vae_type == "Remote", "what the user picked stays picked"


def test_the_control_tab_which_shows_only_scripts_of_its_list_shows_ours(host: SdnextHost) -> None:
    host.reload_ui()
    assert host.installer.control_extensions == ["IP Adapters", "Remote VAE"]
