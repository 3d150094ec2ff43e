"""What is said of the frames that a VAE takes, held against what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from remote_vae.errors import InvalidRequest
from remote_vae.vae.at_work import whole_diffusers
from remote_vae.vae.families import Family, family_of
from remote_vae.vae.frames import check_cells, check_frames, check_latent_frames, check_sides
from tests.vaes import small_vae

FRAMES = 6
# Of a kind with another, or none of frames.
VIDEOS = ("qwen-image", "qwen-image-2.1", "hunyuan-video-1.5", "ltx", "ltx2", "mochi", "cogvideox", "cosmos")


def refused(check: Callable[[Family, Any], None], family: Family, frames: Any) -> bool:
    try:
        check(family, frames)
    except InvalidRequest:
        return True
    return False


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_refused_where_the_vae_fails_or_leaves_them_out(name: str) -> None:
    vae = small_vae(name)
    family = family_of(vae)

    def fails(frames: int) -> bool:
        size = 1, family.pixel_channels, frames, 2 * family.downscale, 2 * family.downscale
        try:
            with torch.inference_mode():
                made = whole_diffusers(vae, "encode", torch.zeros(size)).shape[2]
        except (RuntimeError, ValueError):
            return True
        return made < family.latent_frames(frames)

    counts = range(1, FRAMES + 1)
    assert [refused(check_frames, family, frames) for frames in counts] == list(map(fails, counts))


@pytest.mark.parametrize("name", VIDEOS)
def test_latent_frames_are_refused_where_the_vae_fails(name: str) -> None:
    vae = small_vae(name)
    family = family_of(vae)

    def fails(frames: int) -> bool:
        try:
            with torch.inference_mode():
                whole_diffusers(vae, "decode", torch.zeros(1, family.latent_channels, frames, 2, 2))
        except (RuntimeError, ValueError):
            return True
        return False

    counts = (1, 2, 3)
    assert [refused(check_latent_frames, family, frames) for frames in counts] == list(map(fails, counts))


# Of every kind of encoder.
ENCODERS = (*VIDEOS, "wan", "wan22-5b", "hunyuan-image", "hunyuan-image-refiner", "hunyuan-video", "sana", "svd", "taesd")


@pytest.mark.parametrize("name", ENCODERS)
def test_sides_are_refused_where_the_vae_fails(name: str) -> None:
    vae = small_vae(name)
    family = family_of(vae)
    cell, frames = family.downscale, (1,) if family.video else ()

    def fails(side: int) -> bool:
        try:
            with torch.inference_mode():
                whole_diffusers(vae, "encode", torch.zeros(1, family.pixel_channels, *frames, side, 2 * cell))
        except (RuntimeError, ValueError):
            return True
        return False

    sides = (cell, cell + 1, cell + 2, cell + 4, cell + cell // 2, 2 * cell)
    expected = list(map(fails, sides))
    assert [refused(lambda own, side: check_sides(own, side, 2 * cell), family, side) for side in sides] == expected
    assert [refused(lambda own, side: check_sides(own, 2 * cell, side), family, side) for side in sides] == expected


@pytest.mark.parametrize("name", ["ltx2", "ltx", "sana", "flux2"])
def test_cells_are_refused_where_the_vae_fails(name: str) -> None:
    vae = small_vae(name)
    family = family_of(vae)

    def fails(height: int, width: int) -> bool:
        try:
            with torch.inference_mode():
                frames = (1,) if family.video else ()
                whole_diffusers(vae, "decode", torch.zeros(1, family.latent_channels, *frames, height, width))
        except RuntimeError:
            return True
        return False

    for size in ((1, 1), (1, 3), (3, 1), (2, 2)):
        assert refused(lambda own, cells: check_cells(own, *cells), family, size) == fails(*size)


def test_the_message_says_how_many_frames_to_send() -> None:
    with pytest.raises(InvalidRequest, match=r"1 \+ 8 n frames: got 12, send 9 of them"):
        check_frames(family_of(small_vae("ltx2")), 12)
