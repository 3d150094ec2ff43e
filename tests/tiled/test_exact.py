"""The exact tiled VAE against the whole VAE."""

from __future__ import annotations

import mmap
import platform
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from remote_vae import tiled
from remote_vae.errors import CallCancelled, InvalidRequest, UnsupportedLayout
from remote_vae.tiled import exact, memory, store
from tests import layouts
from tests.nearness import psnr, psnr_of_moments, rmse
from tests.tiled.strips import cut_strips
from tests.versions import needs_half

EXACT_DB = 100.0

KNOWN: dict[str, Callable[[], Any]] = {
    "diffusers": layouts.plain_kl,
    "old attention names": layouts.old_attention_kl,
    "no quant convs": lambda: layouts.plain_kl(use_quant_conv=False, use_post_quant_conv=False),
    "no mid attention": lambda: layouts.plain_kl(mid_block_add_attention=False),
    "ldm": layouts.ldm_vae,
    "ldm, tanh at the end": lambda: layouts.ldm_vae(tanh_out=True),
    "sgm": layouts.sgm_vae,
    "sgm, xformers attention": lambda: layouts.sgm_vae("vanilla-xformers"),
    "sgm, no attention": lambda: layouts.sgm_vae("none"),
    "Forge": layouts.forge_vae,
    "Forge, no quant convs": lambda: layouts.forge_vae(use_quant=False),
    "Forge, weights cast at every call": lambda: layouts.forge_vae(manual_cast=True),
    "AutoencoderTiny": lambda: tiny(),
}


def tiny() -> Any:
    torch.manual_seed(3)
    return diffusers.AutoencoderTiny().eval().requires_grad_(False)


def whole_decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pixels = vae.decode(latents)
    return pixels if isinstance(pixels, torch.Tensor) else pixels.sample


def whole_encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    if hasattr(vae, "moments"):
        return vae.moments(pixels)
    encoded = vae.encode(pixels)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def thin_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a row or two, so that small pictures are cut as large ones are."""
    cut_strips(monkeypatch, 32 << 10)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae() -> Any:
    # Four channels a group, the fewest that SD's has. With two, a norm of one latent position turns the rounding of a small
    # difference into a sign: there the whole VAE in float32 is as far as 70 dB from itself in float64.
    return layouts.plain_kl(norm_num_groups=8)


@pytest.fixture(scope="module")
def demo_vae() -> Any:
    return diffusers.AutoencoderKL.from_pretrained("assets/demo_vae").eval()


# --- the same picture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_layout_decodes_as_the_whole_vae_does(name: str) -> None:
    vae, latents = KNOWN[name](), random(2, 4, 13, 9)
    pixels = tiled.decode(vae, latents)
    assert pixels.shape == (2, 3, 104, 72)
    assert psnr(pixels, whole_decode(vae, latents)) >= EXACT_DB


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_layout_encodes_to_the_moments_of_the_whole_vae(name: str) -> None:
    vae, pixels = KNOWN[name](), random(2, 3, 75, 58).clamp(-1, 1)
    assert psnr_of_moments(tiled.encode(vae, pixels), whole_encode(vae, pixels)) >= EXACT_DB


def test_on_a_processor_memory_is_given_back_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = layouts.plain_kl(), random(1, 4, 13, 9)
    expected = tiled.decode(vae, latents)
    trims = []
    monkeypatch.setattr(store, "_TRIM_EVERY", 100_000)
    monkeypatch.setattr(store, "trim_heap", lambda: trims.append(True))
    assert torch.equal(tiled.decode(vae, latents), expected)
    assert len(trims) > 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not asked")
def test_holes_between_what_is_alive_go_back_to_the_system() -> None:
    torch.ones(30 << 20, dtype=torch.uint8)  # once it was freed, less than so much comes from the heap
    tensors = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(100)]
    del tensors[::2]
    before = resident_bytes()
    memory.trim_heap()
    assert resident_bytes() < before - (30 << 20)
    assert all(bool((tensor == 1).all()) for tensor in tensors)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(1, 24), width=st.integers(1, 24), batch=st.integers(1, 2), seed=st.integers(0, 99))
@example(height=1, width=1, batch=1, seed=68)
def test_latents_of_any_size_decode_as_in_the_whole_vae(vae: Any, height: int, width: int, batch: int, seed: int) -> None:
    latents = random(batch, 4, height, width, seed=seed)
    assert psnr(tiled.decode(vae, latents), whole_decode(vae, latents)) >= EXACT_DB


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(8, 200), width=st.integers(8, 200), batch=st.integers(1, 2), seed=st.integers(0, 99))
def test_pixels_of_any_size_encode_as_in_the_whole_vae(vae: Any, height: int, width: int, batch: int, seed: int) -> None:
    pixels = random(batch, 3, height, width, seed=seed).clamp(-1, 1)
    assert psnr_of_moments(tiled.encode(vae, pixels), whole_encode(vae, pixels)) >= EXACT_DB


@pytest.mark.parametrize(("height", "width"), [(64, 2048), (2048, 64)])
def test_a_picture_that_is_all_length_is_the_same(vae: Any, height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_strips(monkeypatch, 256 << 10)
    latents, pixels = random(1, 4, height // 8, width // 8), random(1, 3, height, width)
    assert psnr(tiled.decode(vae, latents), whole_decode(vae, latents)) >= EXACT_DB
    assert psnr_of_moments(tiled.encode(vae, pixels), whole_encode(vae, pixels)) >= EXACT_DB


def test_rows_that_differ_much_from_each_other_have_common_statistics(vae: Any) -> None:
    # Averages of the strips' own variances would be far off here.
    latents = random(1, 4, 32, 8) * torch.linspace(0.1, 30, 32).view(1, 1, 32, 1) + torch.linspace(-20, 20, 32).view(
        1, 1, 32, 1
    )
    assert psnr(tiled.decode(vae, latents), whole_decode(vae, latents)) >= EXACT_DB


def test_stability_ais_sd_3_has_neither_quant_convs_nor_lists_of_attention() -> None:
    vae, latents, pixels = layouts.ldm_vae(), random(1, 4, 9, 9), random(1, 3, 64, 64)
    decoded, encoded = vae.decoder(latents), vae.encoder(pixels)
    del vae.quant_conv, vae.post_quant_conv
    for level in (*vae.decoder.up, *vae.encoder.down):
        del level.attn
    assert psnr(tiled.decode(vae, latents), decoded) >= EXACT_DB
    assert psnr_of_moments(tiled.encode(vae, pixels), encoded) >= EXACT_DB


def test_latents_that_are_not_contiguous_are_the_same(vae: Any) -> None:
    latents = random(2, 9, 7, 4).permute(0, 3, 1, 2)
    assert psnr(tiled.decode(vae, latents), whole_decode(vae, latents)) >= EXACT_DB


def test_the_trained_vae_gives_its_photo(demo_vae: Any) -> None:
    pixels = torch.nn.functional.interpolate(random(1, 3, 16, 16), size=192, mode="bicubic").clamp(-1, 1)
    moments = whole_encode(demo_vae, pixels)
    assert psnr_of_moments(tiled.encode(demo_vae, pixels), moments) >= EXACT_DB
    latents = moments.chunk(2, dim=1)[0]
    assert psnr(tiled.decode(demo_vae, latents), whole_decode(demo_vae, latents)) >= EXACT_DB


# --- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=needs_half), torch.bfloat16])
def test_half_precision_is_no_further_from_float32_than_the_whole_vae_in_it(dtype: torch.dtype) -> None:
    full, half = layouts.plain_kl(), layouts.plain_kl().to(dtype)
    latents, pixels = random(1, 4, 16, 16), random(1, 3, 128, 128).clamp(-1, 1)
    decoded, encoded = tiled.decode(half, latents.to(dtype)), tiled.encode(half, pixels.to(dtype))
    assert decoded.dtype == encoded.dtype == dtype
    true = whole_decode(full, latents)
    assert rmse(decoded, true) <= rmse(whole_decode(half, latents.to(dtype)), true)
    true = whole_encode(full, pixels)
    assert rmse(encoded, true) <= rmse(whole_encode(half, pixels.to(dtype)), true)


@needs_half
def test_half_precision_that_gives_nan_is_done_again_in_float32(demo_vae: Any, caplog: pytest.LogCaptureFixture) -> None:
    latents = whole_encode(demo_vae, random(1, 3, 64, 64)).chunk(2, dim=1)[0]
    half = diffusers.AutoencoderKL.from_pretrained("assets/demo_vae", torch_dtype=torch.float16).eval()
    assert whole_decode(half, latents.half()).isnan().any(), "this VAE overflows, which is what the test needs"
    pixels = tiled.decode(half, latents.half())
    assert pixels.dtype == torch.float16
    assert psnr(pixels, whole_decode(demo_vae, latents)) > 50
    assert "float32" in caplog.text
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}


@needs_half
def test_nan_that_is_in_the_latents_comes_out_as_from_the_whole_vae(vae: Any) -> None:
    latents = random(1, 4, 8, 8)
    latents[0, 0, 3, 3] = torch.nan
    assert tiled.decode(vae, latents).isnan().any()
    half = layouts.plain_kl().half()
    assert tiled.decode(half, latents.half()).isnan().any()


def test_another_dtype_to_compute_in_changes_the_values_and_not_the_dtype_of_the_result(vae: Any) -> None:
    latents = random(1, 4, 16, 16)
    quick, true = tiled.decode(vae, latents, dtype=torch.bfloat16), whole_decode(vae, latents)
    assert quick.dtype == torch.float32
    assert 25 < psnr(quick, true) < 90


def test_autocast_gives_what_the_whole_vae_gives_under_it(vae: Any) -> None:
    latents = random(1, 4, 16, 16)
    true = whole_decode(vae, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = tiled.decode(vae, latents), whole_decode(vae, latents)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert rmse(ours, true) <= rmse(theirs, true)


def test_autocast_leaves_float64_alone() -> None:
    vae, latents = layouts.plain_kl().double(), random(1, 4, 9, 9).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = tiled.decode(vae, latents), whole_decode(vae, latents)
    assert ours.dtype == theirs.dtype == torch.float64
    assert psnr(ours, theirs) >= EXACT_DB


@pytest.mark.filterwarnings("ignore:torch.*deprecated")
@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps", "privateuseone", "meta"])
@pytest.mark.parametrize("old", [False, True])
def test_autocast_that_is_on_for_one_device_is_off_for_the_others(
    monkeypatch: pytest.MonkeyPatch, device: str, old: bool
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), monkeypatch.context() as context:
        if old:
            # torch before 2.4 asks of CUDA without a name, and fails for any that is given.
            context.setattr(torch, "is_autocast_enabled", lambda: False)
        assert exact._autocast_dtype(device) == (torch.bfloat16 if device == "cpu" else None)
    assert exact._autocast_dtype(device) is None


def test_inference_mode_makes_no_difference(vae: Any) -> None:
    latents = random(1, 4, 9, 9)
    outside = tiled.decode(vae, latents)
    with torch.inference_mode():
        inside = tiled.decode(vae, latents.clone())
    assert torch.equal(outside, inside)


# --- work --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diffusers", "ldm", "AutoencoderTiny"])
def test_nothing_is_computed_twice(name: str) -> None:
    vae, latents, pixels = KNOWN[name](), random(1, 4, 12, 12), random(1, 3, 96, 96)
    with FlopCounterMode(display=False) as whole:
        whole_decode(vae, latents), whole_encode(vae, pixels)
    with FlopCounterMode(display=False) as ours:
        tiled.decode(vae, latents), tiled.encode(vae, pixels)
    assert ours.get_total_flops() <= whole.get_total_flops()


def test_progress_rises_with_every_strip_and_ends_at_one(vae: Any) -> None:
    shares: list[float] = []
    tiled.decode(vae, random(2, 4, 16, 16), progress=shares.append)
    assert len(shares) > 100
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.05
    assert shares[-1] == pytest.approx(1.0)
    assert any(0.45 < share < 0.5 for share in shares)
    assert any(0.5 < share < 0.55 for share in shares)


def test_cancelling_ends_the_call_at_the_next_strip(vae: Any) -> None:
    shares: list[float] = []
    with pytest.raises(CallCancelled):
        tiled.encode(vae, random(1, 3, 128, 128), progress=shares.append, cancelled=lambda: len(shares) == 7)
    assert len(shares) == 7


# --- the VAE is left alone ---------------------------------------------------------------------------------------------


def state(vae: Any) -> list[object]:
    weights = [(name, tensor.data_ptr(), tensor.dtype, tensor._version) for name, tensor in vae.named_parameters()]
    return [weights, [(type(module), sorted(vars(module)), module.training) for module in vae.modules()]]


def test_the_vae_is_not_changed(vae: Any) -> None:
    before = state(vae)
    tiled.decode(vae, random(1, 4, 8, 8), max_bytes=3_000_000)
    tiled.encode(vae, random(1, 3, 64, 64), dtype=torch.bfloat16)
    assert state(vae) == before


def test_two_threads_get_their_own_pictures(vae: Any) -> None:
    latents = [random(1, 4, 12, 12, seed=seed) for seed in (1, 2)]
    alone = [tiled.decode(vae, each) for each in latents]
    together: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        together[index] = tiled.decode(vae, latents[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[index], together[index]) for index in range(2))


def test_weights_that_accelerate_keeps_away_come_layer_by_layer_and_go_again() -> None:
    vae, latents = layouts.plain_kl(), random(1, 4, 9, 7)
    true = whole_decode(vae, latents)
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}
    assert psnr(tiled.decode(vae, latents), true) >= EXACT_DB
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}


def test_a_vae_that_waits_as_a_whole_is_called_in_as_its_own_decode_does(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = layouts.plain_kl()
    calls: list[object] = []
    accelerate.cpu_offload_with_hook(vae, torch.device("cpu"))
    monkeypatch.setattr(vae._hf_hook, "pre_forward", lambda module, *args, **kwargs: calls.append(module))
    tiled.decode(vae, random(1, 4, 4, 4))
    assert calls == [vae]


def test_the_pre_hook_of_a1111s_lowvram_is_called_first_and_nobody_elses() -> None:
    # It moves the VAE in, and whatever was there out.
    vae = layouts.ldm_vae()
    calls: list[object] = []

    def send_me_to_gpu(module: object, _: object) -> None:
        calls.append(module)

    def of_another_extension(module: object, args: tuple[torch.Tensor, ...]) -> None:
        calls.append(args[0].shape)

    vae.register_forward_pre_hook(of_another_extension)
    vae.register_forward_pre_hook(send_me_to_gpu)
    tiled.encode(vae, random(1, 3, 32, 32))
    assert calls == [vae]


# --- what it does not know ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        layouts.kl_with_extra_parameter,
        lambda: layouts.sgm_vae("linear"),
        lambda: layouts.sgm_vae(give_pre_end=True),
        lambda: layouts.ldm_vae(resamp_with_conv=False),
        lambda: layouts.ldm_vae(attn_levels=(3,)),
        torch.nn.Identity,
    ],
)
def test_a_layout_that_is_not_known_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedLayout):
        tiled.decode(make(), random(1, 4, 4, 4))


def test_a_video_vae_is_refused() -> None:
    vae = diffusers.AutoencoderKLHunyuanVideo(block_out_channels=(32,) * 4, layers_per_block=1, norm_num_groups=32)
    with pytest.raises(UnsupportedLayout):
        tiled.decode(vae, random(1, 16, 4, 4))


def test_seamless_tiles_of_a1111_are_refused() -> None:
    # Its option "Tiling" makes every convolution wrap around, and then the first row needs the last one.
    vae = layouts.ldm_vae()
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
    with pytest.raises(UnsupportedLayout, match="convolution"):
        tiled.decode(vae, random(1, 4, 4, 4))


def test_forges_weights_that_are_patched_at_run_time_are_refused() -> None:
    vae = layouts.forge_vae()
    vae.decoder.conv_in.forge_online_loras = {"weight": [1]}
    with pytest.raises(UnsupportedLayout):
        tiled.decode(vae, random(1, 4, 4, 4))


@pytest.mark.parametrize("method", ["_conv_forward", "forward"])
def test_convolutions_whose_methods_somebody_has_replaced_are_refused(method: str) -> None:
    # Seamless tiles in one direction are made so.
    vae = layouts.ldm_vae()
    setattr(vae.decoder.conv_in, method, getattr(vae.decoder.conv_in, method))
    with pytest.raises(UnsupportedLayout):
        tiled.decode(vae, random(1, 4, 4, 4))


def test_a_vae_with_a_codebook_is_refused() -> None:
    vae = layouts.plain_kl()
    vae.quantize = torch.nn.Identity()
    with pytest.raises(UnsupportedLayout, match="codebook"):
        tiled.decode(vae, random(1, 4, 4, 4))


def test_a_layout_that_only_looks_known_is_refused() -> None:
    vae = layouts.plain_kl()
    vae.decoder.mid_block.resnets = torch.nn.ModuleList()
    with pytest.raises(UnsupportedLayout):
        tiled.decode(vae, random(1, 4, 4, 4))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 4, 1, 8, 8), (0, 4, 8, 8)])
def test_what_is_no_batch_of_pictures_is_refused(vae: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"\[B, C, H, W\]"):
        tiled.decode(vae, torch.zeros(shape))
