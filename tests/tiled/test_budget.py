"""What the exact tiled VAE needs, and what it does with less."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.live_bytes import STORE, LiveBytes
from remote_vae import tiled
from remote_vae.errors import OutOfMemory
from remote_vae.tiled.budget import Budget, plan_budget
from remote_vae.tiled.exact import Limits, run
from remote_vae.tiled.layouts import decoder_plan
from remote_vae.tiled.policy import CPU, OTHER, Policy
from tests import layouts
from tests.nearness import psnr, psnr_of_moments
from tests.tiled.strips import cut_strips

SIDE = 192
LATENTS = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(1))
PIXELS = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def vae() -> Any:
    """As in the real ones, the channels double and there are two blocks a level."""
    return layouts.plain_kl(block_out_channels=(32, 64, 64, 64), layers_per_block=2)


def live(run: Any) -> tuple[LiveBytes, torch.Tensor]:
    counter = LiveBytes()
    with torch.no_grad(), counter.storing(), counter:
        result = run()
    return counter, result


@pytest.fixture(scope="module")
def whole_decode(vae: Any) -> tuple[int, torch.Tensor]:
    counter, pixels = live(lambda: vae.decode(LATENTS).sample)
    return counter.peak["cpu"], pixels


@pytest.fixture(scope="module")
def whole_encode(vae: Any) -> tuple[int, torch.Tensor]:
    counter, moments = live(lambda: vae.encode(PIXELS).latent_dist.parameters)
    return counter.peak["cpu"], moments


@pytest.mark.parametrize("share", [0.6, 0.4, 0.3, 0.2, 0.15])
def test_a_decode_keeps_to_its_bytes_and_is_the_same_picture(vae: Any, whole_decode: Any, share: float) -> None:
    whole, true = whole_decode
    limit = int(share * whole)
    counter, pixels = live(lambda: tiled.decode(vae, LATENTS, max_bytes=limit))
    assert counter.peak["cpu"] <= limit
    assert psnr(pixels, true) >= 100
    assert (counter.peak[STORE] > 0) is (share <= 0.4)


@pytest.mark.parametrize("share", [0.6, 0.4, 0.3, 0.2])
def test_an_encode_keeps_to_its_bytes_and_gives_the_same_moments(vae: Any, whole_encode: Any, share: float) -> None:
    whole, true = whole_encode
    limit = int(share * whole)
    counter, moments = live(lambda: tiled.encode(vae, PIXELS, max_bytes=limit))
    assert counter.peak["cpu"] <= limit
    assert psnr_of_moments(moments, true) >= 100


@pytest.mark.parametrize("policy", [CPU, OTHER], ids=["a processor", "another device"])
def test_half_precision_keeps_to_its_bytes(whole_decode: Any, policy: Policy) -> None:
    half = layouts.plain_kl(block_out_channels=(32, 64, 64, 64), layers_per_block=2).bfloat16()
    limit = int(0.4 * whole_decode[0] / 2)
    limits = Limits(limit, policy=replace(policy, files=True))
    counter, _ = live(lambda: run(decoder_plan(half), half, LATENTS.bfloat16(), limits))
    assert counter.peak["cpu"] <= limit


def test_without_a_limit_it_needs_much_less_than_the_whole_vae(
    vae: Any, whole_decode: Any, whole_encode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_strips(monkeypatch, 256 << 10)
    decode, _ = live(lambda: tiled.decode(vae, LATENTS))
    encode, _ = live(lambda: tiled.encode(vae, PIXELS))
    assert decode.peak["cpu"] <= 0.45 * whole_decode[0]
    assert encode.peak["cpu"] <= 0.50 * whole_encode[0]


def test_pictures_of_a_batch_are_worked_on_one_after_the_other(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_strips(monkeypatch, 128 << 10)
    latents = LATENTS[:, :, :12, :12]
    one, _ = live(lambda: tiled.decode(vae, latents))
    three, pixels = live(lambda: tiled.decode(vae, latents.repeat(3, 1, 1, 1)))
    assert three.peak["cpu"] <= one.peak["cpu"] + pixels.nbytes
    assert torch.equal(pixels[0], pixels[2])


def too_little(call: Callable[[int], Any]) -> int:
    """How many bytes the error says that are needed."""
    with pytest.raises(OutOfMemory, match=r"\d+ MB are needed") as error:
        call(10_000)
    return int(re.findall(r"(\d+) MB are needed", str(error.value))[0]) * 10**6


def test_too_few_bytes_say_how_many_would_do(vae: Any) -> None:
    latents = LATENTS[:, :, :8, :20]
    needed = too_little(lambda limit: tiled.decode(vae, latents, max_bytes=limit))
    counter, _ = live(lambda: tiled.decode(vae, latents, max_bytes=needed))
    assert counter.peak["cpu"] <= needed


@pytest.mark.parametrize("width", range(8, 80, 7))
def test_the_bytes_that_are_said_to_be_needed_are_enough(vae: Any, width: int) -> None:
    policy = replace(CPU, strip_bytes=1)

    def plan(limit: int) -> Budget:
        return plan_budget(decoder_plan(vae), (1, 8, width), torch.float32, policy=policy, max_bytes=limit, result_bytes=0)

    plan(too_little(plan))
