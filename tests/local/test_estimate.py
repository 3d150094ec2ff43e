"""What is known of a call before it is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.live_bytes import LiveBytes
from remote_vae.local.estimate import whole_bytes
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from tests.layouts import plain_kl
from tests.vaes import small_vae


def peak(call: Any) -> int:
    counter = LiveBytes()
    with torch.no_grad(), counter:
        call()
    return counter.peak["cpu"]


def test_the_bytes_of_the_whole_vae_are_those_that_it_takes() -> None:
    # As in the real ones, the channels double and there are two blocks a level.
    vae = plain_kl(block_out_channels=(32, 64, 64, 64), layers_per_block=2)
    latents, pixels = torch.randn(2, 4, 20, 28), torch.rand(1, 3, 160, 224)
    decode, encode = peak(lambda: vae.decode(latents)), peak(lambda: vae.encode(pixels))
    assert whole_bytes(decoder_plan(vae), latents.shape, torch.float32) == pytest.approx(decode, rel=0.03)
    assert whole_bytes(encoder_plan(vae), pixels.shape, torch.float32) == pytest.approx(encode, rel=0.03)


@pytest.mark.parametrize("name", ["qwen-image", "wan22-5b"])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_bytes_of_the_whole_vae_of_a_video_are_enough_and_not_far_too_many(name: str, frames: int) -> None:
    vae = small_vae(name)
    scale, channels = (8, 16) if name == "qwen-image" else (16, 48)
    latents, pixels = torch.randn(1, channels, frames, 8, 12), torch.rand(1, 3, 4 * frames - 3, 8 * scale, 12 * scale)
    decode, encode = peak(lambda: vae.decode(latents)), peak(lambda: vae.encode(pixels))
    assert decode <= whole_bytes(decoder_plan(vae), latents.shape, torch.float32) <= 2.5 * decode
    assert encode <= whole_bytes(encoder_plan(vae), pixels.shape, torch.float32) <= 2.5 * encode
