"""What is known of a call before it is made."""

from __future__ import annotations

import csv
import statistics
from typing import Any

import pytest
import torch

from bench.live_bytes import LiveBytes
from remote_vae.call import VaeCall
from remote_vae.local.estimate import reserved_bytes, usual_bytes, whole_bytes, whole_need
from remote_vae.settings import read_toml, settings_folder
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.tiled.plan import Plan
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import find_family
from tests.layouts import plain_kl
from tests.vaes import WAN22, small_vae
from tests.versions import of_diffusers

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLANS = {"decode": decoder_plan, "encode": encoder_plan}
OPS: tuple[Op, ...] = ("decode", "encode")


def real(name: str) -> Any:
    """A VAE of the real architecture without weights."""
    with torch.device("meta"):
        if name == "sd":
            return plain_kl(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
        if name == "wan22":
            return of_diffusers("AutoencoderKLWan")(
                base_dim=160,
                decoder_base_dim=256,
                **WAN22,
                latents_mean=[0.0] * 48,
                latents_std=[1.0] * 48,
            )
        return of_diffusers("AutoencoderKLQwenImage")()


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


# --- on cards --------------------------------------------------------------------------------------------------------------

# MiB of the cards of vae_cost.csv.
CARDS = {
    "RTX 4090": 24564,
    "RTX 4080": 16376,
    "RTX 4080 SUPER": 16376,
    "RTX 4070 Ti": 12282,
    "RTX 3090": 24576,
    "RTX 3080": 10240,
    "RTX 3070": 8192,
}
# From here on the size of the card was the limit: cuDNN makes do with less.
CAPPED = 85.0


def estimated(plans: dict[str, Plan], weights: int, row: dict[str, str]) -> int:
    """All that the VAE takes of the card in a row of vae_cost.csv, its weights among it."""
    side = (1, 4, int(row["height"]) // 8, int(row["width"]) // 8)
    shape = side if row["op"] == "decode" else (1, 3, int(row["height"]), int(row["width"]))
    # Those of SDXL were in float32.
    dtype = torch.float16 if row["family"] == "sd1" else torch.float32
    op: Op = "decode" if row["op"] == "decode" else "encode"
    return weights * dtype.itemsize + whole_need(op, plans[op], torch.Size(shape), dtype, GPU).likely


def test_the_estimate_is_true_on_the_cards_that_were_measured() -> None:
    vae = real("sd")
    plans = {op: PLANS[op](vae) for op in OPS}
    weights = sum(weight.numel() for weight in vae.parameters())
    with (settings_folder() / "vae_cost.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row, CARDS[row["gpu"]] << 20) for row in csv.DictReader(file)]
    misses = [row for row, size in rows if int(row["full_oom"]) and estimated(plans, weights, row) <= size]
    assert not misses
    errors = [
        estimated(plans, weights, row) / (float(row["memory_pct"]) / 100 * size) - 1
        for row, size in rows
        if row["memory_pct"] and float(row["memory_pct"]) < CAPPED
    ]
    assert len(errors) == 57
    assert statistics.median(map(abs, errors)) <= 0.04
    assert min(errors) >= -0.05
    assert max(errors) <= 0.30


@pytest.mark.parametrize(
    ("kind", "name", "frames"),
    [("pictures", "sd", 0), ("frame", "qwen", 1), ("frames", "wan22", 2)],
    ids=lambda each: str(each),
)
@pytest.mark.parametrize("op", OPS)
def test_what_the_data_say_is_counted_of_a_real_vae_is_what_is_counted(kind: str, name: str, frames: int, op: Op) -> None:
    vae, side = real(name), 256
    scale, channels = {"sd": (8, 4), "qwen": (8, 16), "wan22": (16, 48)}[name]
    in_time = (frames,) if op == "decode" else (4 * frames - 3,)
    size = (channels, side // scale) if op == "decode" else (3, side)
    shape = torch.Size((1, size[0], *(in_time if frames else ()), size[1], size[1]))
    known = read_toml("vae_memory.toml")[kind][op]
    assert whole_bytes(PLANS[op](vae), shape, torch.float16) / side**2 / 2 == pytest.approx(known["counted"], rel=0.001)
    need = whole_need(op, PLANS[op](vae), shape, torch.float16, GPU)
    assert need.likely / side**2 / 2 == pytest.approx(known["half"], rel=0.001)
    assert need.counted <= need.likely
    assert need.least <= need.likely


def test_a_card_of_amd_takes_twice_as_much_and_a_processor_no_more_than_is_alive_and_a_third(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, shape = decoder_plan(plain_kl()), torch.Size((1, 4, 8, 12))
    nvidia, intel = (whole_need("decode", plan, shape, torch.float16, torch.device(name)) for name in ("cuda", "xpu"))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert whole_need("decode", plan, shape, torch.float16, GPU).likely == pytest.approx(2 * nvidia.likely, rel=0.001)
    assert whole_need("decode", plan, shape, torch.float16, torch.device("xpu")) == intel
    on_cpu = whole_need("decode", plan, shape, torch.float16, CPU)
    assert on_cpu.counted < on_cpu.least == on_cpu.likely < 1.5 * on_cpu.counted


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_what_is_usual_is_what_the_vae_of_sd_takes(op: Op, dtype: torch.dtype, device: torch.device) -> None:
    vae, shape = real("sd"), (1, 4, 32, 32) if op == "decode" else (1, 3, 256, 256)
    need = whole_need(op, PLANS[op](vae), torch.Size(shape), dtype, device)
    assert usual_bytes(op, 256 * 256, dtype, device) == pytest.approx(need.likely, rel=0.001)


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5", "cogvideox", "ltx", "mochi"])
@pytest.mark.parametrize("op", OPS)
def test_a_vae_whose_layers_are_not_counted_takes_on_a_card_what_is_published(name: str, op: Op) -> None:
    vae, family = small_vae(name), find_family(name)
    channels = family.latent_channels if op == "decode" else family.pixel_channels
    side = (8, 12) if op == "decode" else (8 * family.downscale, 12 * family.downscale)
    tensor = torch.empty(1, channels, 1, *side, device="meta", dtype=torch.float16)

    def reserved(device: torch.device, tensor: torch.Tensor = tensor) -> int:
        at_work = VaeAtWork(vae, family, device, torch.float16)
        return reserved_bytes(VaeCall(op, tensor, at_work, adopt=lambda answer: answer))

    pixels = 96 * family.downscale**2
    known = read_toml("vae_memory.toml")["classes"][type(vae).__name__]
    assert reserved(GPU) == known[op] * pixels * 2
    assert reserved(GPU, tensor.repeat(2, 1, 1, 1, 1)) == 2 * reserved(GPU)
    # Those that do a few frames at a time take no more for more of them.
    ever_more = reserved(GPU, tensor.repeat(1, 1, 33, 1, 1)) / reserved(GPU)
    assert ever_more == known["frames"] if "frames" in known else ever_more > 8
    assert reserved(CPU) == 0
    vae.enable_tiling()
    assert reserved(GPU) == 0
