"""Exact strips of the VAEs of Wan and Qwen-Image, of one frame and of many, against the whole VAE of diffusers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench.live_bytes import STORE, LiveBytes
from remote_vae import tiled
from remote_vae.errors import CallCancelled, InvalidRequest, OutOfMemory, UnsupportedLayout
from remote_vae.tiled import offload
from tests import wan_layouts
from tests.nearness import psnr, psnr_of_moments, rmse
from tests.tiled.strips import cut_strips
from tests.vaes import small_vae
from tests.versions import needs_half
from tests.wan_layouts import clamped

EXACT_DB = 100.0


def itself(vae: Any) -> Any:
    return vae


@dataclass(frozen=True)
class Exact:
    """A small VAE of diffusers, and how its layers are arranged.

    Attributes:
        frames: the most that there are of latents.
    """

    name: str
    arranged: Callable[[Any], Any] = itself
    frames: int = 3
    changes: dict[str, Any] = field(default_factory=dict)

    def vaes(self) -> tuple[Any, Any]:
        """The one in strips and, of the same weights, the whole one."""
        return self.arranged(self.whole()), self.whole()

    def whole(self) -> Any:
        return small_vae(self.name, num_res_blocks=1, **self.changes)

    @property
    def scale(self) -> int:
        return 16 if self.name in ("wan22-5b", "qwen-image-2.1") else 8

    @property
    def colours(self) -> int:
        return 4 if self.name == "qwen-image-2.1" else 3


KINDS = {
    "Qwen-Image": Exact("qwen-image"),
    "Wan 2.1": Exact("wan"),
    "Wan 2.2": Exact("wan22-5b"),
    "Qwen-Image-2.1": Exact("qwen-image-2.1", frames=1),
    "the original 2.1": Exact("wan", wan_layouts.original),
    "the original 2.2": Exact("wan22-5b", wan_layouts.original),
    "Neo's of two dimensions": Exact("qwen-image", wan_layouts.flat, frames=1),
}
VIDEOS = [name for name, kind in KINDS.items() if kind.frames > 1]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents_of(kind: Exact, frames: int, height: int, width: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    channels = {"wan22-5b": 48, "qwen-image-2.1": 64}.get(kind.name, 16)
    return random(batch, channels, frames, height, width, seed=seed)


def pixels_of(kind: Exact, frames: int, height: int, width: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return random(batch, kind.colours, frames, height, width, seed=seed).clamp(-1, 1)


def whole_decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    pixels: torch.Tensor = vae.decode(latents).sample
    return pixels


def whole_encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    moments: torch.Tensor = vae.encode(pixels).latent_dist.parameters
    return moments


@pytest.fixture(autouse=True)
def thin_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a row or two, so that small pictures are cut as large ones are."""
    cut_strips(monkeypatch, 24 << 10)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> Exact:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def vaes(kind: Exact) -> tuple[Any, Any]:
    return kind.vaes()


# --- the same picture, the same video ----------------------------------------------------------------------------------

quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(0, 99))


@quick
@given(size=sizes)
def test_latents_of_any_size_decode_as_in_the_whole_vae(kind: Exact, vaes: Any, size: tuple[int, ...]) -> None:
    frames, height, width, batch, seed = size
    latents = latents_of(kind, min(frames, kind.frames), height, width, batch, seed)
    assert psnr(clamped(tiled.decode(vaes[0], latents)), whole_decode(vaes[1], latents)) >= EXACT_DB


@quick
@given(size=sizes, more=st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 7)))
def test_pixels_of_any_size_encode_as_in_the_whole_vae(
    kind: Exact, vaes: Any, size: tuple[int, ...], more: tuple[int, int, int]
) -> None:
    frames, height, width, batch, seed = size
    late, below, right = more
    # Wan 2.2 takes only what it can halve; what is left over of a step of frames is left out by all.
    rest = (below, right) if kind.scale == 8 else (0, 0)
    count = 4 * (frames - 1) + 1 + late if kind.frames > 1 else 1
    pixels = pixels_of(kind, count, kind.scale * height + rest[0], kind.scale * width + rest[1], batch, seed)
    assert psnr_of_moments(tiled.encode(vaes[0], pixels), whole_encode(vaes[1], pixels)) >= EXACT_DB


def test_four_dimensions_are_one_frame(kind: Exact, vaes: Any) -> None:
    latents, pixels = latents_of(kind, 1, 3, 2), pixels_of(kind, 1, 32, 48)
    assert torch.equal(tiled.decode(vaes[0], latents[:, :, 0]), tiled.decode(vaes[0], latents)[:, :, 0])
    assert torch.equal(tiled.encode(vaes[0], pixels[:, :, 0]), tiled.encode(vaes[0], pixels)[:, :, 0])


def test_frames_that_know_nothing_of_each_other_are_pictures_of_their_own() -> None:
    flat, _ = KINDS["Neo's of two dimensions"].vaes()
    latents, pixels = random(2, 16, 3, 4, 2), random(2, 3, 3, 16, 24).clamp(-1, 1)
    decoded, encoded = tiled.decode(flat, latents), tiled.encode(flat, pixels)
    for frame in range(3):
        assert torch.equal(decoded[:, :, frame], tiled.decode(flat, latents[:, :, frame]))
        assert torch.equal(encoded[:, :, frame], tiled.encode(flat, pixels[:, :, frame]))


# --- in little memory --------------------------------------------------------------------------------------------------


def live(run: Callable[[], torch.Tensor]) -> tuple[LiveBytes, torch.Tensor]:
    counter = LiveBytes()
    with counter.storing(), counter:
        result = run()
    return counter, result


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(offload, "_is_memory", lambda folder: False)


@pytest.mark.parametrize("name", ["Qwen-Image", "Wan 2.2"])
def test_one_frame_keeps_to_a_tenth_of_what_the_whole_vae_takes(name: str) -> None:
    kind = KINDS[name]
    vae = kind.whole()
    latents, pixels = latents_of(kind, 1, 512 // kind.scale, 64 // kind.scale), pixels_of(kind, 1, 512, 64)
    for run, whole in (
        (lambda **limit: tiled.decode(vae, latents, **limit), lambda: whole_decode(vae, latents)),
        (lambda **limit: tiled.encode(vae, pixels, **limit), lambda: whole_encode(vae, pixels)),
    ):
        counter, true = live(whole)
        limit = int(0.1 * counter.peak["cpu"])
        counter, made = live(lambda run=run, limit=limit: run(max_bytes=limit))
        assert counter.peak["cpu"] <= limit
        assert psnr_of_moments(made, true) >= EXACT_DB


@pytest.mark.usefixtures("in_files")
@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_is_done_some_frames_at_a_time_where_all_are_too_many(name: str) -> None:
    vae, whole = KINDS[name].vaes()
    latents, pixels = latents_of(KINDS[name], 5, 6, 4), pixels_of(KINDS[name], 17, 96, 32)
    for run, true in (
        (lambda limit: tiled.decode(vae, latents, max_bytes=limit), whole_decode(whole, latents)),
        (lambda limit: tiled.encode(vae, pixels, max_bytes=limit), whole_encode(whole, pixels)),
    ):
        counter, made = live(lambda run=run: run(None))
        assert counter.peak[STORE] == 0
        with pytest.raises(OutOfMemory, match="are needed"):
            run(10_000)
        limit = int(0.8 * counter.peak["cpu"])
        counter, made = live(lambda run=run, limit=limit: run(limit))
        assert counter.peak["cpu"] <= limit
        assert psnr_of_moments(clamped(made) if made.shape[1] == 3 else made, true) >= EXACT_DB


# --- precision, work, the VAE is left alone ----------------------------------------------------------------------------


def test_half_precision_is_about_as_near_to_float32_as_the_whole_vae_in_it(kind: Exact, vaes: Any) -> None:
    half, whole = (vae.bfloat16() for vae in kind.vaes())
    latents, pixels = latents_of(kind, kind.frames, 3, 3), pixels_of(kind, 4 * kind.frames - 3, 48, 48)
    decoded, encoded = tiled.decode(half, latents.bfloat16()), tiled.encode(half, pixels.bfloat16())
    assert decoded.dtype == encoded.dtype == torch.bfloat16
    true = whole_decode(vaes[1], latents)
    assert rmse(clamped(decoded), true) <= 1.2 * rmse(whole_decode(whole, latents.bfloat16()), true)
    true = whole_encode(vaes[1], pixels)
    assert rmse(encoded, true) <= 1.2 * rmse(whole_encode(whole, pixels.bfloat16()), true)


@needs_half
def test_half_precision_that_gives_nan_is_done_again_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    vae = KINDS["Qwen-Image"].whole()
    vae.decoder.conv_in.weight *= 100
    latents = 5_000 * latents_of(KINDS["Qwen-Image"], 1, 4, 4)
    true = whole_decode(vae, latents)
    half = vae.half()
    assert whole_decode(half, latents.half()).isnan().any(), "this overflows, which is what the test needs"
    pixels = tiled.decode(half, latents.half())
    assert psnr(pixels, true) > 40
    assert "float32" in caplog.text


@pytest.mark.parametrize("frames", [1, 2])
def test_nothing_is_computed_twice(kind: Exact, vaes: Any, frames: int) -> None:
    frames = min(frames, kind.frames)
    latents, pixels = latents_of(kind, frames, 3, 3), pixels_of(kind, 4 * frames - 3, 48, 48)
    with FlopCounterMode(display=False) as whole:
        whole_decode(vaes[1], latents), whole_encode(vaes[1], pixels)
    with FlopCounterMode(display=False) as ours:
        tiled.decode(vaes[0], latents), tiled.encode(vaes[0], pixels)
    assert ours.get_total_flops() <= whole.get_total_flops()


@pytest.mark.usefixtures("in_files")
@pytest.mark.parametrize("limit", [None, 700_000])
def test_progress_rises_with_every_strip_and_ends_at_one(limit: int | None) -> None:
    vae = KINDS["Wan 2.1"].whole()
    shares: list[float] = []
    tiled.decode(vae, latents_of(KINDS["Wan 2.1"], 4, 4, 2, batch=2), max_bytes=limit, progress=shares.append)
    assert len(shares) > 100
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.05
    assert shares[-1] == pytest.approx(1.0)
    assert max(later - earlier for earlier, later in itertools.pairwise(shares)) < 0.1


def test_cancelling_ends_the_call_at_the_next_strip(kind: Exact, vaes: Any) -> None:
    shares: list[float] = []
    pixels = pixels_of(kind, 4 * kind.frames - 3, 48, 48)
    with pytest.raises(CallCancelled):
        tiled.encode(vaes[0], pixels, progress=shares.append, cancelled=lambda: len(shares) == 7)
    assert len(shares) == 7


@pytest.mark.parametrize("name", ["Qwen-Image", "Wan 2.2", "Qwen-Image-2.1"])
def test_weights_that_accelerate_keeps_away_come_layer_by_layer_and_go_again(name: str) -> None:
    kind = KINDS[name]
    vae = kind.whole()
    latents, pixels = latents_of(kind, kind.frames, 2, 3), pixels_of(kind, 4 * kind.frames - 3, 32, 48)
    decoded, encoded = whole_decode(vae, latents), whole_encode(vae, pixels)
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}
    assert psnr(tiled.decode(vae, latents), decoded) >= EXACT_DB
    assert psnr_of_moments(tiled.encode(vae, pixels), encoded) >= EXACT_DB
    assert {weight.device.type for weight in vae.parameters()} == {"meta"}


def test_the_vae_is_not_changed(kind: Exact, vaes: Any) -> None:
    def state() -> list[Any]:
        weights = [(name, each.data_ptr(), each.dtype, each._version) for name, each in vaes[0].named_parameters()]
        return [weights, [sorted(vars(module)) for module in vaes[0].modules()]]

    before = state()
    tiled.decode(vaes[0], latents_of(kind, kind.frames, 2, 2))
    tiled.encode(vaes[0], pixels_of(kind, 4 * kind.frames - 3, 32, 32), dtype=torch.bfloat16)
    assert state() == before


# --- what they do not take ---------------------------------------------------------------------------------------------


def test_a_vae_of_one_frame_refuses_two() -> None:
    vae = KINDS["Qwen-Image-2.1"].whole()
    with pytest.raises(InvalidRequest, match="one frame, not 2"):
        tiled.decode(vae, latents_of(KINDS["Qwen-Image-2.1"], 2, 2, 2))


def test_a_picture_that_the_vae_cannot_halve_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidRequest, match="does not divide"):
        tiled.encode(KINDS["Wan 2.2"].whole(), random(1, 3, 1, 64, 40))


@pytest.mark.parametrize("shape", [(16, 8, 8), (1, 16, 0, 8, 8), (1, 1, 16, 1, 8, 8)])
def test_what_is_no_batch_of_videos_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"\[B, C, F, H, W\]"):
        tiled.decode(KINDS["Qwen-Image"].whole(), torch.zeros(shape))


def more_weights(vae: Any) -> None:
    vae.decoder.colour = torch.nn.Conv2d(3, 3, 1)


def patched_weights(vae: Any) -> None:
    # ComfyUI's, of LoRAs that are applied at each call.
    vae.decoder.conv_in.weight_function = [lambda weight: weight]


def another_norm(vae: Any) -> None:
    vae.decoder.norm_out.scale = 1.0


def another_padding(vae: Any) -> None:
    vae.decoder.conv_in._padding = (1, 1, 1, 1, 1, 1)


def another_upsampling(vae: Any) -> None:
    vae.decoder.up_blocks[0].upsamplers[0].resample[0].mode = "bilinear"


def seamless(vae: Any) -> None:
    vae.decoder.conv_in.padding_mode = "circular"


@pytest.mark.parametrize("change", [more_weights, patched_weights, another_norm, another_padding, another_upsampling, seamless])
def test_a_layout_that_only_looks_known_is_refused(change: Callable[[Any], None]) -> None:
    vae = KINDS["Wan 2.1"].whole()
    change(vae)
    with pytest.raises(UnsupportedLayout):
        tiled.decode(vae, latents_of(KINDS["Wan 2.1"], 1, 2, 2))


def test_an_encoder_that_halves_the_frames_too_often_takes_one_frame() -> None:
    kind = Exact("wan", changes={"dim_mult": [1, 1, 1, 1], "temperal_downsample": [True, True, True]})
    vae = kind.whole()
    pixels = pixels_of(kind, 1, 16, 16)
    assert psnr_of_moments(tiled.encode(vae, pixels), whole_encode(vae, pixels)) >= EXACT_DB
    with pytest.raises(InvalidRequest, match="one frame"):
        tiled.encode(vae, pixels_of(kind, 5, 16, 16))
