from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family, find_family
from remote_vae.vae.packed import BatchNormed
from remote_vae.wire import DecodeRequest, decode_size, encode_size, pack_latents, unpack_latents
from remote_vae.wire.latents import as_packed, as_the_vae_takes_them, is_packed
from tests.versions import of_diffusers

SIZES = st.integers(1, 6)
FLUX2, QWEN = find_family("flux2"), find_family("qwen-image")
NORM = BatchNormed(torch.randn(128), torch.rand(128) + 0.5)


@given(batch=SIZES, channels=SIZES, rows=SIZES, columns=SIZES)
def test_unpacking_undoes_packing(batch: int, channels: int, rows: int, columns: int) -> None:
    latents = torch.randn(batch, channels, rows * 2, columns * 2)
    packed = pack_latents(latents)
    assert packed.shape == (batch, rows * columns, channels * 4)
    assert torch.equal(unpack_latents(packed, rows * 16, columns * 16), latents)


def test_packing_is_that_of_diffusers_flux_pipeline() -> None:

    latents = torch.randn(2, 16, 6, 10)
    packed = FluxPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(pack_latents(latents), packed)
    assert torch.equal(unpack_latents(packed, 48, 80), FluxPipeline._unpack_latents(packed, 48, 80, 8))


def test_packed_1208_pixels_are_75_tokens_a_side() -> None:
    assert unpack_latents(torch.zeros(1, 75 * 75, 64), 1208, 1208).shape == (1, 16, 150, 150)


def test_packed_latents_that_do_not_fit_their_size_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected"):
        unpack_latents(torch.zeros(1, 100, 64), 512, 512)
    with pytest.raises(InvalidRequest, match="even"):
        pack_latents(torch.zeros(1, 4, 3, 4))


@given(rows=st.integers(1, 64), columns=st.integers(1, 64))
def test_one_pictures_latents_are_never_taken_for_packed_ones(rows: int, columns: int) -> None:
    height, width = rows * 16, columns * 16
    assert is_packed((1, rows * columns, 64), height, width)
    assert is_packed((3, rows * columns, 16), height, width)
    assert not is_packed((16, height // 8, width // 8), height, width)


# --- what the VAE takes of whatever comes


@pytest.mark.parametrize(
    ("family", "shape", "size", "becomes", "makes"),
    [
        ("sd1", (2, 4, 5, 7), None, (2, 4, 5, 7), (2, 1, 40, 56)),
        ("sana", (1, 32, 5, 7), None, (1, 32, 5, 7), (1, 1, 160, 224)),
        ("flux", (2, 6, 64), (32, 48), (2, 16, 4, 6), (2, 1, 32, 48)),
        ("flux", (16, 4, 6), (32, 48), (1, 16, 4, 6), (1, 1, 32, 48)),
        ("flux2", (2, 32, 4, 6), None, (2, 32, 4, 6), (2, 1, 32, 48)),
        ("flux2", (2, 128, 2, 3), None, (2, 32, 4, 6), (2, 1, 32, 48)),
        ("flux2", (2, 6, 128), (32, 48), (2, 32, 4, 6), (2, 1, 32, 48)),
        ("qwen-image", (2, 16, 4, 6), None, (2, 16, 1, 4, 6), (2, 1, 32, 48)),
        ("qwen-image", (2, 6, 64), (32, 48), (2, 16, 1, 4, 6), (2, 1, 32, 48)),
        ("qwen-image", (1, 16, 21, 4, 6), None, (1, 16, 21, 4, 6), (1, 81, 32, 48)),
        ("wan22-5b", (1, 48, 21, 4, 6), None, (1, 48, 21, 4, 6), (1, 81, 64, 96)),
        ("ltx", (1, 128, 3, 4, 6), None, (1, 128, 3, 4, 6), (1, 17, 128, 192)),
        ("svd", (1, 4, 14, 4, 6), None, (1, 4, 14, 4, 6), (1, 14, 32, 48)),
    ],
)
def test_every_form_becomes_what_the_vae_takes_and_its_size_is_known_before(
    family: str,
    shape: tuple[int, ...],
    size: tuple[int, int] | None,
    becomes: tuple[int, ...],
    makes: tuple[int, int, int, int],
) -> None:
    known, (height, width) = find_family(family), size or (None, None)
    assert decode_size(shape, height, width, known) == makes
    assert DecodeRequest(torch.zeros(shape), height=height, width=width).unpacked(known, NORM).shape == becomes


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        ("sd1", (1, 16, 4, 4), r"got shape \[1, 16, 4, 4\], expected 4 channels"),
        ("sd1", (1, 4, 1, 4, 4), r"expected picture latents \[B, 4, h, w\] for SD 1"),
        ("flux", (1, 64, 4, 4), "expected 16 channels"),
        ("flux2", (1, 64, 4, 4), "expected 32 channels"),
        ("qwen-image", (1, 48, 3, 4, 4), "expected 16 channels"),
        ("qwen-image", (1, 6, 128), "neither packed for 32 x 48 pixels"),
        ("qwen-image", (1, 7, 64), "neither packed"),
        ("wan22-5b", (65536,), "expected 48 channels"),
        ("wan22-5b", (1, 48, 65536, 65536, 65536, 65536), "expected 48 channels"),
    ],
)
def test_what_the_vae_cannot_take_is_refused_by_its_head(family: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        decode_size(shape, 32, 48, find_family(family))


@given(
    shape=st.lists(st.integers(1, 65536), min_size=1, max_size=6),
    size=st.tuples(st.integers(1, 65536), st.integers(1, 65536)) | st.just((None, None)),
    name=st.sampled_from(["sd1", "flux", "flux2", "qwen-image", "qwen-image-2.1", "ltx", "svd"]),
)
def test_a_head_is_measured_or_refused_whatever_it_says(
    shape: list[int], size: tuple[int | None, int | None], name: str
) -> None:
    family = find_family(name)
    for channel in (shape[1:2], [family.latent_channels], [family.pixel_channels]):
        head = (*shape[:1], *channel, *shape[2:])
        with suppress(InvalidRequest):
            assert min(decode_size(head, *size, family)) >= 1
        with suppress(InvalidRequest):
            assert min(encode_size(head, family)) >= 1


def test_qwen_images_packed_latents_are_unpacked_as_in_its_pipeline() -> None:
    packed = torch.randn(2, 6, 64)
    theirs = of_diffusers("QwenImagePipeline")._unpack_latents(packed, 32, 48, 8)
    assert torch.equal(as_the_vae_takes_them(packed, 32, 48, QWEN), theirs)
    assert torch.equal(as_packed(theirs, QWEN), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux2s_packed_latents_become_raw_as_in_its_pipeline(dtype: torch.dtype) -> None:
    """As ``pipeline.__call__`` does it after its last step, from tokens and their places."""
    pipeline = of_diffusers("Flux2Pipeline")
    tokens = torch.randn(1, 6, 128).to(dtype)
    places = pipeline._prepare_latent_ids(torch.zeros(1, 128, 2, 3))
    unpacked = pipeline._unpack_latents_with_ids(tokens, places)
    mean, deviation = (values.view(1, -1, 1, 1).to(dtype) for values in (NORM.mean, NORM.deviation))
    theirs = pipeline._unpatchify_latents(unpacked * deviation + mean)
    assert torch.equal(as_the_vae_takes_them(tokens, 32, 48, FLUX2, NORM), theirs)
    assert torch.equal(as_the_vae_takes_them(unpacked, None, None, FLUX2, NORM), theirs)
    assert torch.equal(as_packed(theirs, FLUX2, NORM), (pipeline._patchify_latents(theirs) - mean) / deviation)


def test_normalised_latents_are_refused_where_the_numbers_are_missing() -> None:
    with pytest.raises(InvalidRequest, match="does not say by what they are normalised"):
        as_the_vae_takes_them(torch.zeros(1, 128, 2, 3), None, None, FLUX2)
    with pytest.raises(InvalidRequest, match="does not say by what they are normalised"):
        as_packed(torch.zeros(1, 32, 4, 6), FLUX2)


@pytest.mark.parametrize(("family", "shape"), [(QWEN, (1, 16, 2, 4, 4)), (QWEN, (1, 16, 1, 3, 4)), (FLUX2, (1, 32, 4, 5))])
def test_what_cannot_be_packed_is_refused(family: Family, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"one frame|even"):
        as_packed(torch.zeros(shape), family, NORM)


# --- pixels


@pytest.mark.parametrize(
    ("family", "shape", "size"),
    [
        ("sd1", (2, 3, 40, 56), (2, 1, 40, 56)),
        ("qwen-image", (2, 3, 40, 56), (2, 1, 40, 56)),
        ("qwen-image", (1, 3, 81, 480, 832), (1, 81, 480, 832)),
        ("qwen-image-2.1", (1, 4, 1, 32, 48), (1, 1, 32, 48)),
        ("qwen-image-2.1", (1, 3, 32, 48), (1, 1, 32, 48)),
    ],
)
def test_pixels_are_measured_by_their_head(family: str, shape: tuple[int, ...], size: tuple[int, int, int, int]) -> None:
    assert encode_size(shape, find_family(family)) == size


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        ("sd1", (1, 4, 8, 8), r"got shape \[1, 4, 8, 8\], expected \[B, 3, H, W\]"),
        ("sd1", (1, 3, 2, 8, 8), r"expected \[B, 3, H, W\]"),
        ("sd1", (3, 8, 8), r"expected \[B, 3, H, W\]"),
        ("qwen-image", (1, 4, 2, 8, 8), r"expected \[B, 3, F, H, W\]"),
        ("qwen-image-2.1", (1, 2, 1, 16, 16), r"expected \[B, 3 or 4, F, H, W\]"),
        ("wan22-5b", (1, 3, 8, 16), "at least 16 x 16 pixels"),
        ("sana", (1, 3, 64, 48), r"sides are multiples of 32: got \[64, 48\]"),
    ],
)
def test_pixels_for_another_vae_are_refused(family: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        encode_size(shape, find_family(family))
