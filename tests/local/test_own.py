"""What a VAE can do by itself in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.live_bytes import LiveBytes
from remote_vae.errors import UnsupportedLayout
from remote_vae.local.own import on_cpu, own_tiling
from remote_vae.vae.at_work import whole_diffusers
from tests.vaes import small_vae

# Latents that are larger than one tile of the VAE: beyond 256 pixels, or 512 where its tiles are, in one direction.
LATENTS = {
    "flux2": (1, 32, 40, 4),
    "qwen-image": (1, 16, 1, 40, 4),
    "wan": (1, 16, 2, 40, 4),
    "wan22-5b": (1, 48, 1, 20, 2),
    "qwen-image-2.1": (1, 64, 1, 20, 2),
    "hunyuan-image": (1, 64, 14, 2),
    "sana": (1, 32, 18, 2),
    "hunyuan-video": (1, 16, 1, 40, 4),
    "hunyuan-video-1.5": (1, 32, 1, 20, 3),
    "ltx": (1, 128, 1, 48, 2),
    "mochi": (1, 12, 1, 40, 4),
    "cogvideox": (1, 16, 1, 40, 6),
}
# Smaller tiles; and activations that are more than the pixels, as the real ones are.
CHANGES: dict[str, dict[str, Any]] = {
    "flux2": {"sample_size": 256},
    "ltx": {"decoder_block_out_channels": (128, 64, 64, 64)},
}


def switches(vae: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(vae).items() if name.startswith(("use_", "tile_"))}


def decode(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
    counter = LiveBytes()
    with torch.no_grad(), counter:
        pixels = whole_diffusers(vae, "decode", latents)
    return pixels, counter.peak["cpu"]


@pytest.mark.parametrize("name", LATENTS)
def test_own_tiling_takes_less_memory_and_is_off_again_afterwards(name: str) -> None:
    vae = small_vae(name, **CHANGES.get(name, {}))
    latents = torch.randn(LATENTS[name], generator=torch.Generator().manual_seed(1))
    before = switches(vae)
    whole, most = decode(vae, latents)
    with own_tiling(vae):
        assert vae.use_tiling
        tiled, less = decode(vae, latents)
    assert switches(vae) == before
    assert tiled.shape == whole.shape
    assert less < most
    # Blended tiles, not the same, and not another picture either.
    assert 0 < (tiled - whole).abs().mean() < whole.std()


@pytest.mark.parametrize("name", ["ltx", "mochi"])
def test_many_frames_are_tiled_in_time_as_well_where_that_is_a_switch_of_its_own(name: str) -> None:
    vae = small_vae(name)
    assert not vae.use_framewise_decoding
    with own_tiling(vae):
        assert vae.use_framewise_decoding
    assert not vae.use_framewise_decoding


def test_own_tiling_is_off_again_after_an_error() -> None:
    vae = small_vae("wan")
    with pytest.raises(MemoryError), own_tiling(vae):
        raise MemoryError
    assert not vae.use_tiling


@pytest.mark.parametrize("name", ["svd", "asymmetric"])
def test_a_vae_without_tiles_says_so(name: str) -> None:
    with pytest.raises(UnsupportedLayout, match="no tiling"), own_tiling(small_vae(name)):
        pass


def test_a_vae_that_is_tiled_already_says_so() -> None:
    vae = small_vae("wan")
    vae.enable_tiling()
    with pytest.raises(UnsupportedLayout, match="already"), own_tiling(vae):
        pass
    assert vae.use_tiling


@pytest.mark.parametrize("name", ["qwen-image", "wan22-5b", "hunyuan-video", "ltx"])
def test_a_copy_on_the_cpu_makes_the_same_video_in_float32(name: str) -> None:
    vae = small_vae(name)
    shape = (1, LATENTS[name][1], 1, 2, 3)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected, _ = decode(vae, latents)
    made, _ = decode(on_cpu(vae.double()), latents)
    assert made.dtype == torch.float32
    assert torch.allclose(made, expected, atol=1e-4)
