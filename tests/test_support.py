"""The support table of the README, held against what a small VAE of each class does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from remote_vae import attach, remote_decode, remote_encode
from remote_vae.errors import RemoteVaeError
from remote_vae.server.models import load_vae
from remote_vae.tiled import decode, encode
from tests.conftest import ServerThread
from tests.readme import support
from tests.vaes import small_kl

WIDTHS = (32, 32, 32, 32)
DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
KL = {"block_out_channels": WIDTHS, "down_block_types": DOWN, "up_block_types": UP}
SMALL: dict[str, dict[str, Any]] = {
    "AutoencoderKLFlux2": KL,
    "AutoencoderTiny": {
        **{f"{way}_block_out_channels": WIDTHS for way in ("encoder", "decoder")},
        **{f"num_{way}_blocks": (1, 1, 1, 1) for way in ("encoder", "decoder")},
    },
    "AutoencoderKLQwenImage": {"base_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "AutoencoderDC": {
        "in_channels": 3,
        "latent_channels": 4,
        **{f"{way}_block_out_channels": (16, 32) for way in ("encoder", "decoder")},
        **{f"{way}_layers_per_block": (1, 1) for way in ("encoder", "decoder")},
        **{f"{way}_block_types": "ResBlock" for way in ("encoder", "decoder")},
        **{f"{way}_qkv_multiscales": ((), ()) for way in ("encoder", "decoder")},
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 32,
        "block_out_channels": (32, 32, 32, 32, 32, 64),
        "layers_per_block": 1,
        "spatial_compression_ratio": 32,
        "scaling_factor": 0.75289,
        "sample_size": 64,
    },
    "AutoencoderKLHunyuanVideo": {"block_out_channels": WIDTHS, "layers_per_block": 1},
    "AutoencoderKLLTXVideo": {
        **dict.fromkeys(("block_out_channels", "decoder_block_out_channels"), WIDTHS),
        **dict.fromkeys(("layers_per_block", "decoder_layers_per_block"), (1,) * 5),
        "latent_channels": 8,
    },
    "AutoencoderKLTemporalDecoder": {"block_out_channels": WIDTHS, "down_block_types": DOWN},
    "AsymmetricAutoencoderKL": {
        **{f"{way}_block_out_channels": WIDTHS for way in ("down", "up")},
        "down_block_types": DOWN,
        "up_block_types": UP,
    },
}
PIXELS = torch.zeros(1, 3, 64, 64)
# What their pipelines give to a decode beside the latents.
BESIDE = {
    "AutoencoderKLTemporalDecoder": {"num_frames": 1},
    "AsymmetricAutoencoderKL": {"image": torch.zeros(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16)},
}


@pytest.fixture
def server(vae: Any, tmp_path: Path) -> Iterator[ServerThread | None]:
    """What `remote-vae serve` makes of it; None where it refuses."""
    vae.save_pretrained(tmp_path)
    try:
        running = ServerThread(load_vae(str(tmp_path), dtype="float32", device="cpu"))
    except RemoteVaeError:
        yield None
        return
    yield running
    running.close()


def is_served(vae: Any, server: ServerThread | None) -> bool:
    """Whether it answers a decode and an encode, and the decode is what the VAE gives."""
    if server is None:
        return False
    family = server.loaded.family
    latents = torch.zeros(1, family.latent_channels, *((1,) if family.video else ()), 2, 2)
    try:
        pixels = remote_decode(f"{server.url}/decode", latents, output_type="pt", return_type="pt", do_scaling=False)
        remote_encode(f"{server.url}/encode", PIXELS)
    except RemoteVaeError:
        return False
    torch.testing.assert_close(pixels, vae.decode(latents).sample, atol=1e-3, rtol=1e-3)
    return True


def is_tiled(vae: Any, _: ServerThread | None) -> bool:
    """Whether the exact tiled VAE knows both of its halves, and both give what the whole VAE gives."""
    try:
        moments = encode(vae, PIXELS)
        latents = moments.chunk(2, dim=1)[0] if hasattr(vae.encode(PIXELS), "latent_dist") else moments
        pixels = decode(vae, latents)
    except RemoteVaeError:
        return False
    torch.testing.assert_close(pixels, vae.decode(latents).sample, atol=1e-3, rtol=1e-3)
    return True


def is_taken(vae: Any, server: ServerThread | None) -> bool:
    """Whether the calls that a pipeline makes go remote."""
    if server is None:
        return False
    try:
        handle = attach(vae, {"endpoint": server.url})
    except RemoteVaeError:
        return False
    family = server.loaded.family
    latents = torch.zeros(1, family.latent_channels, 2, 2)
    vae.encode(PIXELS.unsqueeze(2) if family.video else PIXELS)
    vae.decode(latents.unsqueeze(2) if family.video else latents, **BESIDE.get(type(vae).__name__, {}))
    return [record.route for record in handle.history.records()] == ["remote"] * 2


CHECKS: dict[str, Callable[[Any, ServerThread | None], bool]] = {"served": is_served, "tiled": is_tiled, "diffusers": is_taken}


@pytest.fixture(params=support()[2])
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vae(key: str) -> Any:
    name = support()[2][key]["class"]
    if name == "AutoencoderKL":
        return small_kl(key)
    torch.manual_seed(7)
    return getattr(diffusers, name)(**SMALL[name]).eval().requires_grad_(False)


@pytest.mark.parametrize("column", CHECKS)
def test_the_support_table_says_what_is(key: str, column: str, vae: Any, server: ServerThread | None) -> None:
    with torch.no_grad():
        works = CHECKS[column](vae, server)
    assert works is (support()[2][key][column] in ("yes", "seen"))
