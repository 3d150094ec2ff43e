"""The exact tiled VAE of every family that it knows, against the whole VAE of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench.live_bytes import LiveBytes
from remote_vae import tiled
from remote_vae.errors import CallCancelled, InvalidRequest, UnsupportedLayout
from tests.nearness import psnr, psnr_of_moments, rmse
from tests.tiled.strips import cut_strips
from tests.vaes import small_vae
from tests.versions import before_diffusers, needs_half, skip_if

EXACT_DB = 100.0


@dataclass(frozen=True)
class Exact:
    """How a family's small VAE is made, and how large its latents may be here. Its pixels have ``downscale`` times the sides.

    Groups of fewer than four channels are none of the real ones': with two, a norm of one position turns the rounding of a
    small difference into a sign.
    """

    name: str
    changes: dict[str, Any]
    downscale: int = 8
    most: int = 10

    def vae(self) -> Any:
        return small_vae(self.name, **self.changes)


TAESD = {
    **{f"{way}_block_out_channels": (32, 32, 32, 32) for way in ("encoder", "decoder")},
    **{f"num_{way}_blocks": (1, 1, 1, 1) for way in ("encoder", "decoder")},
}
FAMILIES: dict[str, Exact] = {
    "flux2": Exact("flux2", {"norm_num_groups": 8}),
    "flux2-small": Exact("flux2-small", {"norm_num_groups": 8}),
    "hunyuan-image": Exact("hunyuan-image", {}, 32, 4),
    "sana": Exact("sana", {}, 32, 4),
    "sana, shuffled pixels": Exact(
        "sana", {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"}, 32, 5
    ),
    "sana, nothing at full size": Exact(
        "sana",
        {
            "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
            "decoder_layers_per_block": (0, 1, 1, 1, 1, 1),
            "encoder_out_shortcut": False,
            "decoder_in_shortcut": False,
        },
        32,
        4,
    ),
    "asymmetric": Exact("asymmetric", {"norm_num_groups": 8}),
    "taesd": Exact("taesd", TAESD),
    "taesd3": Exact("taesd3", TAESD),
    "taef2": Exact("taef2", TAESD),
}


def whole_decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pixels: torch.Tensor = vae.decode(latents).sample
    return pixels


def whole_encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    encoded = vae.encode(pixels)
    moments: torch.Tensor = encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded[0]
    return moments


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents_of(vae: Any, height: int, width: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return random(batch, vae.config.latent_channels, height, width, seed=seed)


@pytest.fixture(autouse=True)
def thin_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a row or two, so that small pictures are cut as large ones are."""
    cut_strips(monkeypatch, 16 << 10)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> Exact:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def vae(family: Exact) -> Any:
    return family.vae()


quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), batch=st.integers(1, 2), seed=st.integers(0, 99))
def test_latents_of_any_size_decode_as_in_the_whole_vae(
    family: Exact, vae: Any, shares: tuple[float, float], batch: int, seed: int
) -> None:
    height, width = (1 + round(share * (family.most - 1)) for share in shares)
    latents = latents_of(vae, height, width, batch, seed)
    assert psnr(tiled.decode(vae, latents), whole_decode(vae, latents)) >= EXACT_DB


@quick
@given(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), batch=st.integers(1, 2), seed=st.integers(0, 99))
def test_pixels_of_any_size_encode_as_in_the_whole_vae(
    family: Exact, vae: Any, shares: tuple[float, float], batch: int, seed: int
) -> None:
    height, width = (family.downscale * (1 + round(share * (family.most - 1))) for share in shares)
    pixels = random(batch, 3, height, width, seed=seed).clamp(-1, 1)
    assert psnr_of_moments(tiled.encode(vae, pixels), whole_encode(vae, pixels)) >= EXACT_DB


def test_nothing_is_computed_twice(family: Exact, vae: Any) -> None:
    latents, pixels = latents_of(vae, 3, 3), random(1, 3, 3 * family.downscale, 3 * family.downscale)
    with FlopCounterMode(display=False) as whole:
        whole_decode(vae, latents), whole_encode(vae, pixels)
    with FlopCounterMode(display=False) as ours:
        tiled.decode(vae, latents), tiled.encode(vae, pixels)
    # Queries that are scaled by the sums of linear attention are one more row.
    assert ours.get_total_flops() <= 1.02 * whole.get_total_flops()


def test_progress_rises_with_every_strip_and_ends_at_one(vae: Any) -> None:
    shares: list[float] = []
    tiled.decode(vae, latents_of(vae, 3, 3), progress=shares.append)
    assert len(shares) > 30
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.1
    assert shares[-1] == pytest.approx(1.0)
    assert shares[-2] < 1


def test_cancelling_ends_the_call_at_the_next_strip(family: Exact, vae: Any) -> None:
    shares: list[float] = []
    pixels = random(1, 3, 3 * family.downscale, 3 * family.downscale)
    with pytest.raises(CallCancelled):
        tiled.encode(vae, pixels, progress=shares.append, cancelled=lambda: len(shares) == 7)
    assert len(shares) == 7


# As many channels at full size as are more than the three of the result, as the real ones have.
WIDE_SANA = {f"{way}_block_out_channels": (32,) * 6 for way in ("encoder", "decoder")}


@pytest.mark.parametrize(("name", "changes"), [("hunyuan-image", {}), ("sana", WIDE_SANA)])
def test_a_picture_keeps_to_a_tenth_of_what_the_whole_vae_takes(name: str, changes: dict[str, Any]) -> None:
    vae = small_vae(name, **changes)
    latents, pixels = latents_of(vae, 6, 1), random(1, 3, 192, 32).clamp(-1, 1)
    for run, whole in (
        (lambda **limit: tiled.decode(vae, latents, **limit), lambda: whole_decode(vae, latents)),
        (lambda **limit: tiled.encode(vae, pixels, **limit), lambda: whole_encode(vae, pixels)),
    ):
        with LiveBytes() as counter:
            true = whole()
        limit = int(0.1 * counter.peak["cpu"])
        counter = LiveBytes()
        with counter.storing(), counter:
            made = run(max_bytes=limit)
        assert counter.peak["cpu"] <= limit
        assert psnr_of_moments(made, true) >= EXACT_DB


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=needs_half), torch.bfloat16])
def test_half_precision_is_about_as_near_to_float32_as_the_whole_vae_in_it(family: Exact, vae: Any, dtype: torch.dtype) -> None:
    half = family.vae().to(dtype)
    if type(half).__name__ == "AutoencoderDC":
        skip_if(before_diffusers(0, 33, "AutoencoderDC in half precision"))
    latents, pixels = latents_of(vae, 3, 3), random(1, 3, 3 * family.downscale, 3 * family.downscale).clamp(-1, 1)
    decoded, encoded = tiled.decode(half, latents.to(dtype)), tiled.encode(half, pixels.to(dtype))
    assert decoded.dtype == encoded.dtype == dtype
    true = whole_decode(vae, latents)
    assert rmse(decoded, true) <= 1.2 * rmse(whole_decode(half, latents.to(dtype)), true)
    true = whole_encode(vae, pixels)
    assert rmse(encoded, true) <= 1.2 * rmse(whole_encode(half, pixels.to(dtype)), true)


@pytest.mark.parametrize("name", ["hunyuan-image", "sana"])
def test_weights_that_accelerate_keeps_away_come_layer_by_layer_and_go_again(name: str) -> None:
    vae = FAMILIES[name].vae()
    latents, pixels = latents_of(vae, 2, 3), random(1, 3, 64, 32)
    decoded, encoded = whole_decode(vae, latents), whole_encode(vae, pixels)
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}
    assert psnr(tiled.decode(vae, latents), decoded) >= EXACT_DB
    assert psnr_of_moments(tiled.encode(vae, pixels), encoded) >= EXACT_DB
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}


def test_keys_that_are_alike_nowhere_are_summed_as_in_the_whole_vae() -> None:
    # Rows that differ much: sums of single strips would be far off those of the picture.
    vae = FAMILIES["sana"].vae()
    latents = latents_of(vae, 8, 3) * torch.linspace(0.1, 30, 8).view(1, 1, 8, 1)
    assert psnr(tiled.decode(vae, latents), whole_decode(vae, latents)) >= EXACT_DB


# --- what they do not take ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hunyuan-image", "sana"])
def test_a_picture_that_the_vae_cannot_halve_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InvalidRequest, match="does not divide"):
        tiled.encode(FAMILIES[name].vae(), random(1, 3, 64, 40))


def test_a_hunyuan_image_vae_whose_blocks_change_their_channels_is_refused() -> None:
    vae = FAMILIES["hunyuan-image"].vae()
    vae.decoder.up_blocks[0].conv_shortcut = torch.nn.Conv2d(128, 128, 1)
    with pytest.raises(UnsupportedLayout, match="channels"):
        tiled.decode(vae, random(1, 64, 2, 2))


def test_a_deep_compression_decoder_with_batch_norms_is_refused() -> None:
    vae = small_vae("sana", decoder_norm_types="batch_norm")
    with pytest.raises(UnsupportedLayout, match="BatchNorm2d"):
        tiled.decode(vae, random(1, 32, 2, 2))
