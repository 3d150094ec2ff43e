"""Flux.2's VAE in ComfyUI and Forge Neo, which undoes the norm and the patches of its latents itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remote_vae import tiled
from remote_vae.errors import InvalidRequest, UnsupportedLayout
from remote_vae.tiled import exact
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.vae.packed import batch_norm_of
from tests import layouts
from tests.nearness import psnr, psnr_of_moments
from tests.tiled.strips import cut_strips
from tests.vaes import small_vae

EXACT_DB = 100.0
CHANNELS = 32


@pytest.fixture(autouse=True)
def thin_strips_without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cut_strips(monkeypatch, 32 << 10)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae() -> Any:
    return layouts.batch_normed_vae(groups=8)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(height=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_normed_latents_decode_as_in_the_whole_vae(vae: Any, height: int, width: int, seed: int) -> None:
    latents = random(2, CHANNELS, height, width, seed=seed)
    assert psnr(tiled.decode(vae, latents), vae.decode(latents)) >= EXACT_DB


@quick
@given(height=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_an_encode_gives_the_mean_that_the_whole_vae_gives(vae: Any, height: int, width: int, seed: int) -> None:
    pixels = random(2, 3, 16 * height, 16 * width, seed=seed).clamp(-1, 1)
    moments = tiled.encode(vae, pixels)
    assert moments.shape == (2, 2 * CHANNELS, height, width)
    assert psnr_of_moments(moments[:, :CHANNELS], vae.encode(pixels)) >= EXACT_DB


def test_the_deviation_is_that_of_normed_samples(vae: Any) -> None:
    pixels = random(1, 3, 48, 32).clamp(-1, 1)
    mean, logvar = vae.moments(pixels).chunk(2, dim=1)
    deviation = (0.5 * logvar).exp()
    sample, normed = (vae.bn(torch.nn.functional.pixel_unshuffle(each, 2)) for each in (mean + deviation, mean))
    ours = (0.5 * tiled.encode(vae, pixels)[:, CHANNELS:]).exp()
    torch.testing.assert_close(ours, sample - normed, rtol=1e-4, atol=1e-5)


def test_a_plan_takes_and_gives_raw_ones(vae: Any) -> None:
    norm = batch_norm_of(vae)
    assert norm is not None
    latents, pixels = random(1, CHANNELS, 4, 3), random(1, 3, 32, 48).clamp(-1, 1)
    decoded = exact.run(decoder_plan(vae), vae, norm.raw(latents), exact.Limits())
    assert psnr(decoded, vae.decode(latents)) >= EXACT_DB
    assert psnr_of_moments(exact.run(encoder_plan(vae), vae, pixels, exact.Limits()), vae.moments(pixels)) >= EXACT_DB


def test_latents_that_neo_leaves_unpacked_are_packed_first() -> None:
    # Mugen's; the last odd row and column are filled up with zeros.
    vae = layouts.batch_normed_vae(groups=8)
    spread = layouts.batch_normed_vae(groups=8)
    spread.mugen = True
    latents, pixels = random(1, CHANNELS // 4, 5, 6), random(1, 3, 32, 48).clamp(-1, 1)
    packed = torch.nn.functional.pixel_unshuffle(torch.nn.functional.pad(latents, (0, 0, 0, 1)), 2)
    assert torch.equal(tiled.decode(spread, latents), tiled.decode(vae, packed))
    mean = tiled.encode(vae, pixels)[:, :CHANNELS]
    assert torch.equal(tiled.encode(spread, pixels)[:, : CHANNELS // 4], torch.nn.functional.pixel_shuffle(mean, 2))


def test_diffusers_vae_of_the_same_model_takes_raw_ones() -> None:
    vae, latents = small_vae("flux2", norm_num_groups=8), random(1, 32, 6, 4)
    assert psnr(tiled.decode(vae, latents), vae.decode(latents).sample) >= EXACT_DB


def test_raw_latents_are_no_normed_ones(vae: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"expected \[B, 32, h, w\]"):
        tiled.decode(vae, random(1, CHANNELS // 4, 4, 4))


def test_a_picture_whose_latents_cannot_be_packed_is_refused(vae: Any) -> None:
    with pytest.raises(InvalidRequest, match="multiples of 16"):
        tiled.encode(vae, random(1, 3, 40, 32))


def test_without_the_numbers_of_its_norm_it_is_refused() -> None:
    vae = layouts.batch_normed_vae(groups=8)
    vae.bn = vae.bn.to("meta")
    with pytest.raises(UnsupportedLayout, match="numbers"):
        tiled.decode(vae, random(1, CHANNELS, 4, 4))
    with pytest.raises(UnsupportedLayout, match="numbers"):
        tiled.encode(vae, random(1, 3, 32, 32))
