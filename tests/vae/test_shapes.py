"""What a config says of a VAE's tensors is what the VAE does."""

from __future__ import annotations

import pytest
import torch

from remote_vae.vae.at_work import has_posterior, whole_diffusers
from remote_vae.vae.families import family_of, load_families
from tests.vaes import SMALL, small_vae


@pytest.mark.parametrize("name", SMALL)
def test_a_vae_has_the_shape_that_its_config_says(name: str) -> None:
    vae = small_vae(name)
    family = family_of(vae)
    one_only = name in ("qwen-image-2.1", "hunyuan-image-refiner")
    for frames in (1, 3) if family.video and not one_only else (1,):
        latents = torch.randn(1, family.latent_channels, *((frames,) if family.video else ()), 2, 3)
        with torch.no_grad():
            pixels = whole_diffusers(vae, "decode", latents)
            encoded = whole_diffusers(vae, "encode", pixels)
        made = (family.frames(frames),) if family.video else ()
        assert pixels.shape == (1, family.pixel_channels, *made, 2 * family.downscale, 3 * family.downscale)
        channels = family.latent_channels * (2 if has_posterior(vae) else 1)
        assert encoded.shape == (1, channels, *latents.shape[2:])
        assert not family.video or family.latent_frames(family.frames(frames)) == frames


@pytest.mark.parametrize("name", SMALL)
def test_several_at_once_are_each_what_it_is_alone(name: str) -> None:
    vae = small_vae(name)
    family = family_of(vae)
    latents = torch.randn(2, family.latent_channels, *((1,) if family.video else ()), 2, 2)
    with torch.no_grad():
        pixels = whole_diffusers(vae, "decode", latents)
        for op, given, made in (("decode", latents, pixels), ("encode", pixels, whole_diffusers(vae, "encode", pixels))):
            alone = torch.cat([whole_diffusers(vae, op, each) for each in given.split(1)])
            torch.testing.assert_close(made, alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_vae_of_each_family_is_recognised(name: str) -> None:
    if name in load_families():
        assert family_of(small_vae(name)).key == name


def test_every_family_was_looked_at() -> None:
    assert set(load_families()) <= set(SMALL)
