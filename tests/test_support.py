"""The support table, held against what a small VAE of each class does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_vae import attach, remote_decode, remote_encode
from remote_vae.errors import RemoteVaeError
from remote_vae.local.own import own_tiling
from remote_vae.server.models import load_vae
from remote_vae.tiled import decode, encode
from remote_vae.vae.at_work import whole_diffusers
from remote_vae.vae.families import Family, family_of
from tests.conftest import ServerThread
from tests.readme import support
from tests.vaes import small_vae
from tests.versions import before_diffusers, skip_if

# The small VAEs of a row, where there are more than the one that is called as it is.
SMALL = {"flux2": ("flux2", "flux2-small"), "qwen-image": ("qwen-image", "wan")}
ROWS = [(key, name) for key in support()[2] for name in SMALL.get(key, (key,))]
# What their pipelines give to a decode beside the latents.
BESIDE = {
    "svd": {"num_frames": 1},
    "asymmetric": {"image": torch.zeros(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16)},
}


def latents_of(family: Family, side: int = 2) -> torch.Tensor:
    """Of one picture, or of a video of one frame."""
    shape = (1, family.latent_channels, *((1,) if family.video else ()), side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def pixels_of(family: Family) -> torch.Tensor:
    return torch.zeros(1, family.pixel_channels, *((1,) if family.video else ()), 64, 64)


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


def is_served(key: str, vae: Any, server: ServerThread | None) -> bool:
    """Whether it answers a decode and an encode, and the decode is what the VAE gives."""
    if server is None:
        return False
    family = server.loaded.family
    latents = latents_of(family)
    try:
        pixels = remote_decode(f"{server.url}/decode", latents, output_type="pt", return_type="pt", do_scaling=False)
        remote_encode(f"{server.url}/encode", pixels_of(family))
    except RemoteVaeError:
        return False
    torch.testing.assert_close(pixels, whole_diffusers(vae, "decode", latents), atol=1e-3, rtol=1e-3)
    return True


def is_tiled(key: str, vae: Any, _: ServerThread | None) -> bool:
    """Whether the exact tiled VAE knows both of its halves, and both give what the whole VAE gives."""
    family = family_of(vae)
    latents, pixels = latents_of(family), pixels_of(family)
    try:
        moments, decoded = encode(vae, pixels), decode(vae, latents)
    except RemoteVaeError:
        assert has_own_tiling(vae) is (support()[2][key]["tiled"] == "own_tiling"), "the reason is another one"
        return False
    torch.testing.assert_close(moments, whole_diffusers(vae, "encode", pixels), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(decoded, whole_diffusers(vae, "decode", latents), atol=1e-3, rtol=1e-3)
    return True


def has_own_tiling(vae: Any) -> bool:
    """Whether it can be tiled in its own way, and gives a picture of the same size so."""
    latents = latents_of(family_of(vae))
    try:
        with own_tiling(vae):
            made = whole_diffusers(vae, "decode", latents)
    except RemoteVaeError:
        return False
    return made.shape == whole_diffusers(vae, "decode", latents).shape


def is_taken(key: str, vae: Any, server: ServerThread | None) -> bool:
    """Whether the calls that a pipeline makes go remote."""
    if server is None:
        return False
    try:
        handle = attach(vae, {"endpoint": server.url})
    except RemoteVaeError:
        return False
    family = server.loaded.family
    latents, pixels = latents_of(family), pixels_of(family)
    if key == "svd":
        # Its frames are a batch.
        latents, pixels = latents.squeeze(2), pixels.squeeze(2)
    vae.encode(pixels)
    vae.decode(latents, **BESIDE.get(key, {}))
    return [record.route for record in handle.history.records()] == ["remote"] * 2


CHECKS: dict[str, Callable[[str, Any, ServerThread | None], bool]] = {
    "served": is_served,
    "tiled": is_tiled,
    "diffusers": is_taken,
}


@pytest.fixture(params=ROWS, ids=lambda row: row[1])
def row(request: pytest.FixtureRequest) -> tuple[str, str]:
    key, name = request.param
    return key, name


@pytest.fixture
def vae(row: tuple[str, str]) -> Any:
    return small_vae(row[1])


@pytest.mark.parametrize("column", CHECKS)
def test_the_support_table_says_what_is(row: tuple[str, str], column: str, vae: Any, server: ServerThread | None) -> None:
    key = row[0]
    if (key, column) == ("ltx", "tiled"):
        skip_if(before_diffusers(0, 33, "LTX's own tiling"))
    with torch.no_grad():
        works = CHECKS[column](key, vae, server)
    assert works is (support()[2][key][column] in ("yes", "seen"))
