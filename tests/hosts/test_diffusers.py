"""attach() on real diffusers pipelines, with a real server and its failures."""

from __future__ import annotations

import copy
import threading
from typing import Any
from urllib.parse import parse_qsl

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL
from PIL import Image

import remote_vae
from remote_vae.errors import SettingsError, UnsupportedLayout, VaeCallFailed
from remote_vae.local import route
from remote_vae.rescue import load_latents
from remote_vae.wire.pixels import to_uint8
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.layouts import asymmetric_decoder_vae, kl_with_extra_parameter
from tests.nearness import no_room_for_the_whole, out_of_memory, psnr
from tests.vaes import tiny_video


def pipeline(kind: str, vae: AutoencoderKL) -> Any:
    """A real pipeline around ``vae`` with a tiny random UNet."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet.eval(), safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))
PIPELINES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"height": 64, "width": 64},
    "StableDiffusionImg2ImgPipeline": {"image": PICTURE, "strength": 0.5},
    "StableDiffusionInpaintPipeline": {"image": PICTURE, "mask_image": MASK, "strength": 0.5, "height": 64, "width": 64},
}
CALLS = {
    "StableDiffusionPipeline": ["decode"],
    "StableDiffusionImg2ImgPipeline": ["encode", "decode"],
    "StableDiffusionInpaintPipeline": ["encode", "encode", "decode"],
}


def generate(pipe: Any, arguments: dict[str, Any], images: int = 1) -> np.ndarray:
    result = pipe(
        prompt_embeds=torch.zeros(1, 4, 16), num_images_per_prompt=images, num_inference_steps=4, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3), output_type="np", **arguments,
    )  # fmt: skip
    return np.asarray(result.images)


IMG2IMG = "StableDiffusionImg2ImgPipeline"


@pytest.mark.parametrize(
    ("kind", "transfer", "worst"),
    [*((kind, "raw", 1e-5) for kind in PIPELINES), (IMG2IMG, "u8", 1.01 / 255), (IMG2IMG, "png", 2.01 / 255)],
)
def test_every_vae_call_of_a_pipeline_goes_remote_and_the_picture_is_the_same(
    vae: AutoencoderKL, chaos: Chaos, kind: str, transfer: str, worst: float
) -> None:
    pipe = pipeline(kind, vae)
    local = generate(pipe, PIPELINES[kind])
    handle = remote_vae.attach(pipe, {"endpoint": chaos.url, "transfer": transfer})
    remote = generate(pipe, PIPELINES[kind])
    assert np.abs(remote - local).max() <= worst
    assert [record.op for record in handle.history.records()] == CALLS[kind]
    assert {record.route for record in handle.history.records()} == {"remote"}
    assert chaos.requests == [f"/{op}" for op in CALLS[kind]]


@pytest.mark.parametrize("transfer", ["raw", "jpg"])
def test_a_request_says_nothing_but_what_the_vae_needs_and_which_program_asks(
    vae: AutoencoderKL, chaos: Chaos, transfer: str
) -> None:
    pipe = pipeline(IMG2IMG, vae)
    handle = remote_vae.attach(pipe, {"endpoint": chaos.url, "transfer": transfer})
    generate(pipe, PIPELINES[IMG2IMG])
    assert {record.route for record in handle.history.records()} == {"remote"}
    said = {key for query in chaos.queries for key, _ in parse_qsl(query)}
    assert said <= {
        "shape",
        "dtype",
        "output_type",
        "image_format",
        "family",
        "fingerprint",
        "posterior",
        "partial_postprocess",
    }
    headers = {name.lower() for each in chaos.headers for name in each}
    of_http = {"host", "user-agent", "accept", "accept-encoding", "content-type", "content-length"}
    assert headers <= of_http | {"x-remote-vae-accept", "x-remote-vae-encoding"}
    assert {each["user-agent"] for each in chaos.headers} == {f"remote-vae/{remote_vae.__version__}"}


@torch.no_grad()
def test_a_pipeline_whose_vae_the_endpoint_does_not_have_uses_its_own(vae: AutoencoderKL, chaos: Chaos) -> None:
    arguments = PIPELINES[IMG2IMG]
    vae.decoder.conv_in.weight.mul_(1.5)
    pipe = pipeline(IMG2IMG, vae)
    local = generate(pipe, arguments)
    handle = remote_vae.attach(pipe, {"endpoint": chaos.url})
    assert np.array_equal(generate(pipe, arguments), local)
    assert [record.fallback_reason for record in handle.history.records()] == ["another VAE there"] * 2
    assert (chaos.infos, chaos.requests) == (["/info"], [])
    handle.settings = remote_vae.Settings(endpoint=chaos.url, when_vae_differs="remote")
    generate(pipe, arguments)
    assert chaos.requests == ["/encode", "/decode"]


def test_a_tiny_vae_is_told_apart_as_well(chaos: Chaos, latents: torch.Tensor) -> None:
    vae = diffusers.AutoencoderTiny().eval().requires_grad_(False)
    handle = remote_vae.attach(vae, {"endpoint": chaos.url})
    vae.decode(latents)
    assert handle.history.last.fallback_reason == "another VAE there"
    assert not chaos.requests


@pytest.mark.parametrize("mode", ["503", "drop", "cut", "nan", "200 html"])
def test_whatever_the_network_does_the_picture_is_the_local_one(vae: AutoencoderKL, chaos: Chaos, mode: str) -> None:
    pipe = pipeline(IMG2IMG, vae)
    local = generate(pipe, PIPELINES[IMG2IMG])
    chaos.reset(mode)
    handle = remote_vae.attach(pipe, {"endpoint": chaos.url, "transfer": "raw", "cooldown": 0.0})
    assert np.array_equal(generate(pipe, PIPELINES[IMG2IMG]), local)
    assert {record.route for record in handle.history.records()} == {"local"}
    assert all(record.fallback_reason for record in handle.history.records())


@pytest.mark.parametrize("enabled", [True, False])
@torch.no_grad()
def test_however_it_is_called_a_vae_gives_what_it_gave_before_bit_for_bit(
    vae: AutoencoderKL, chaos: Chaos, latents: torch.Tensor, pixels: torch.Tensor, enabled: bool
) -> None:
    def drawn(distribution: Any) -> torch.Tensor:
        sample: torch.Tensor = distribution.sample(torch.Generator().manual_seed(5))
        return sample

    def everything() -> list[Any]:
        return [
            vae.decode(latents),
            vae.decode(z=latents),
            vae.decode(latents, False),
            vae.decode(latents, True),
            vae.decode(latents, False, torch.Generator()),
            vae.decode(latents, return_dict=False),
            vae.encode(pixels),
            vae.encode(x=pixels),
            vae.encode(pixels, return_dict=False),
        ]

    local = everything()
    handle = remote_vae.attach(vae, {"endpoint": chaos.url, "transfer": "raw"})
    handle.enabled = enabled
    for ours, own in zip(everything(), local, strict=True):
        assert (type(ours), len(ours), type(ours[0])) == (type(own), len(own), type(own[0]))
        if isinstance(own[0], torch.Tensor):
            assert torch.equal(ours[0], own[0])
        else:
            assert torch.equal(ours[0].parameters, own[0].parameters)
            # The generator of the caller draws.
            assert torch.equal(drawn(ours[0]), drawn(own[0]))
    assert len(chaos.requests) == len(handle.history.records()) == (len(local) if enabled else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_half_precision_vae_gets_its_own_dtype_back(
    vae: AutoencoderKL, server: ServerThread, latents: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype
) -> None:
    remote_vae.attach(vae.to(dtype), {"endpoint": server.url})
    assert vae.decode(latents.to(dtype)).sample.dtype == dtype
    assert vae.encode(pixels.to(dtype)).latent_dist.parameters.dtype == dtype


@torch.no_grad()
def test_a_plain_endpoints_sample_is_taken_as_it_is(vae: AutoencoderKL, chaos: Chaos, pixels: torch.Tensor) -> None:
    mode = vae.encode(pixels).latent_dist.mode()
    remote_vae.attach(vae, {"endpoint": chaos.url, "transfer": "raw"})
    chaos.drops = ("posterior",)
    distribution = vae.encode(pixels).latent_dist
    assert torch.equal(distribution.mode(), mode)
    assert torch.equal(distribution.sample(), mode)


def test_detaching_leaves_no_trace(vae: AutoencoderKL, server: ServerThread) -> None:
    pipe = pipeline(IMG2IMG, vae)
    before, state = dict(vars(vae)), copy.deepcopy(vae.state_dict())
    handle = remote_vae.attach(pipe, {"endpoint": server.url})
    generate(pipe, PIPELINES[IMG2IMG])
    handle.detach()
    handle.detach()
    assert vars(vae).keys() == before.keys()
    assert all(vars(vae)[name] is value for name, value in before.items())
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in state.items())


def test_attaching_again_replaces_the_first(vae: AutoencoderKL, chaos: Chaos, latents: torch.Tensor) -> None:
    first = remote_vae.attach(vae, {"endpoint": "http://127.0.0.1:9"})
    second = remote_vae.attach(vae, {"endpoint": chaos.url})
    vae.decode(latents)
    assert chaos.requests == ["/decode"]
    assert not first.history.records()
    second.detach()
    assert "decode" not in vars(vae)


def test_a_hook_of_somebody_else_over_ours_survives_detaching(vae: AutoencoderKL, chaos: Chaos, latents: torch.Tensor) -> None:
    handle = remote_vae.attach(vae, {"endpoint": chaos.url})
    ours, seen = vae.decode, []

    def foreign(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return ours(*args, **kwargs)

    vae.decode = foreign
    handle.detach()
    vae.decode(latents)
    assert vae.decode is foreign
    assert seen == [1]
    assert not chaos.requests


def test_a_hook_of_somebody_else_under_ours_is_put_back(vae: AutoencoderKL) -> None:
    original = vae.decode

    def foreign(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    vae.decode = foreign
    remote_vae.attach(vae, {}).detach()
    assert vae.decode is foreign


@torch.no_grad()
def test_cancelling_ends_the_wait_and_the_picture_comes_out(vae: AutoencoderKL, chaos: Chaos, latents: torch.Tensor) -> None:
    chaos.reset("hang")
    pressed = threading.Event()
    handle = remote_vae.attach(vae, {"endpoint": chaos.url, "first_byte_timeout": 30.0}, cancelled=pressed.is_set)
    threading.Timer(0.3, pressed.set).start()
    assert vae.decode(latents).sample.shape == (1, 3, 64, 96)
    assert handle.history.last.fallback_reason == "interrupted"
    assert handle.history.last.ms < 10_000


def out_of_memory_for(calls: int, vae: AutoencoderKL, op: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class's own method runs out of memory that many times, on this very VAE; notes how it was called."""
    original, seen = getattr(AutoencoderKL, op), []

    def limited(self: AutoencoderKL, *args: Any, **kwargs: Any) -> Any:
        if self is vae:
            seen.append("tiling" if self.use_tiling else "whole")
            if len(seen) <= calls:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, op, limited)
    return seen


def of_an_unknown_layout(vae: AutoencoderKL) -> AutoencoderKL:
    """``vae`` with a module more than the exact tiled VAE knows, in both parts."""
    for part in (vae.encoder, vae.decoder):
        part.colour = torch.nn.Conv2d(3, 3, 1)
    return vae


@pytest.mark.parametrize("op", ["decode", "encode"])
@torch.no_grad()
def test_without_memory_the_exact_tiled_vae_makes_what_the_whole_one_makes(
    vae: AutoencoderKL, latents: torch.Tensor, pixels: torch.Tensor, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> list[Any]:
        tensor = latents if op == "decode" else pixels
        return [getattr(vae, op)(tensor, return_dict=return_dict) for return_dict in (True, False)]

    def values(result: Any) -> torch.Tensor:
        tensor: torch.Tensor = result[0] if op == "decode" else result[0].parameters
        return tensor

    whole = made()
    seen = no_room_for_the_whole(monkeypatch, vae)
    handle = remote_vae.attach(vae, {})
    for ours, own in zip(made(), whole, strict=True):
        assert (type(ours), type(ours[0])) == (type(own), type(own[0]))
        assert psnr(values(ours), values(own)) >= 100
    # Once by the host's own call, and not again before tiles.
    assert seen == [f"{op}r"] * 2
    assert [(record.route, record.detail) for record in handle.history.records()] == [("tiled", "exact")] * 2
    assert not vae.use_tiling


@pytest.mark.parametrize("op", ["decode", "encode"])
@torch.no_grad()
def test_without_memory_a_vae_of_an_unknown_layout_is_tiled_in_its_own_way_and_its_tiling_is_switched_off_again(
    vae: AutoencoderKL, latents: torch.Tensor, pixels: torch.Tensor, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_unknown_layout(vae)
    seen = out_of_memory_for(1, vae, op, monkeypatch)
    handle = remote_vae.attach(vae, {})
    getattr(vae, op)(latents if op == "decode" else pixels)
    assert seen == ["whole", "tiling"]
    assert not vae.use_tiling
    assert (handle.history.last.route, handle.history.last.detail) == ("tiled", "the VAE's own tiling")


@torch.no_grad()
def test_a_vae_that_the_exact_one_does_not_know_is_never_decoded_by_it(
    latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = kl_with_extra_parameter()
    original = type(vae).decode
    whole = vae.decode(latents).sample
    monkeypatch.setattr(
        type(vae), "decode", lambda self, *args, **kwargs: out_of_memory() if self is vae else original(self, *args, **kwargs)
    )
    handle = remote_vae.attach(vae, {})
    picture = vae.decode(latents).sample
    assert handle.history.last.detail == "on the CPU"
    assert torch.equal(picture, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_without_memory_for_tiles_a_copy_on_the_cpu_makes_the_exact_picture(
    vae: AutoencoderKL, latents: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, moments = vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters
    of_an_unknown_layout(vae).to(dtype)
    before = {name: (value.data_ptr(), value.dtype) for name, value in vae.state_dict().items()}
    for op in ("decode", "encode"):
        out_of_memory_for(2, vae, op, monkeypatch)
    handle = remote_vae.attach(vae, {})
    picture = vae.decode(latents.to(dtype)).sample
    encoded = vae.encode(pixels.to(dtype)).latent_dist.parameters
    assert [record.detail for record in handle.history.records()] == ["on the CPU"] * 2
    assert picture.dtype == encoded.dtype == dtype
    assert (to_uint8(picture).int() - to_uint8(exact).int()).abs().max() <= 1
    assert (encoded.float() - moments).abs().max() <= (1e-4 if dtype == torch.float32 else 0.1)
    assert {name: (value.data_ptr(), value.dtype) for name, value in vae.state_dict().items()} == before
    assert vae.decode.handle is handle


class Mover(ModelHook):  # type: ignore[misc]
    """Notes what accelerate would have moved to the GPU."""

    def __init__(self) -> None:
        self.moved: list[int] = []

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.moved.append(id(module))
        return args, kwargs


@torch.no_grad()
def test_a_vae_with_accelerates_offloading_is_copied_without_its_hooks(
    vae: AutoencoderKL, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = vae.decode(latents).sample
    mover = Mover()
    add_hook_to_module(of_an_unknown_layout(vae), mover)
    out_of_memory_for(2, vae, "decode", monkeypatch)
    handle = remote_vae.attach(vae, {})
    picture = vae.decode(latents).sample
    assert handle.history.last.detail == "on the CPU"
    assert torch.allclose(picture, exact, atol=1e-5)
    assert set(mover.moved) <= {id(vae)}


@torch.no_grad()
def test_the_exact_tiled_vae_tells_accelerates_offloading_that_the_vae_is_used(
    vae: AutoencoderKL, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = vae.decode(latents).sample
    mover = Mover()
    add_hook_to_module(vae, mover)
    no_room_for_the_whole(monkeypatch, vae)
    handle = remote_vae.attach(vae, {})
    picture = vae.decode(latents).sample
    assert handle.history.last.detail == "exact"
    assert psnr(picture, whole) >= 100
    # By the whole VAE's own call, before the free memory is looked at, and before the tiles.
    assert mover.moved == [id(vae)] * 3


def test_a_tiny_vae_without_memory_decodes_in_exact_tiles_and_encodes_in_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    vae = diffusers.AutoencoderTiny().eval().requires_grad_(False)
    latents, pixels = torch.rand(1, 4, 8, 8), torch.rand(1, 3, 64, 64) * 2 - 1
    whole, encoded = vae.decode(latents).sample, vae.encode(pixels).latents
    no_room_for_the_whole(monkeypatch, vae)
    handle = remote_vae.attach(vae, {})
    assert psnr(vae.decode(latents).sample, whole) >= 100
    monkeypatch.undo()
    assert torch.equal(vae.encode(pixels).latents, encoded)
    assert [record.detail for record in handle.history.records()] == ["exact", ""]


def test_when_nothing_fits_the_latents_are_saved(
    vae: AutoencoderKL, latents: torch.Tensor, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(AutoencoderKL, "decode", never)
    monkeypatch.setattr(route, "available_memory", lambda device: 1000)
    handle = remote_vae.attach(vae, {"rescue_folder": str(tmp_path)})
    with pytest.raises(VaeCallFailed, match="They are saved in") as caught:
        vae.decode(latents)
    assert torch.equal(load_latents(caught.value.rescued).latents, latents)  # type: ignore[arg-type]
    assert handle.history.last.route == "failed"


def test_calls_of_an_unknown_shape_are_the_vaes_own_business(vae: AutoencoderKL, chaos: Chaos) -> None:
    handle = remote_vae.attach(vae, {"endpoint": chaos.url})
    with pytest.raises(RuntimeError):
        vae.decode(torch.zeros(1, 7, 8, 8))
    assert not chaos.requests
    assert not handle.history.records()


@pytest.mark.parametrize("thing", [object(), torch.nn.Linear(1, 1), diffusers.DDIMScheduler()])
def test_what_has_no_vae_cannot_be_attached_to(thing: object) -> None:
    with pytest.raises(UnsupportedLayout, match="not a diffusers pipeline"):
        remote_vae.attach(thing)


@torch.no_grad()
def test_a_video_vae_is_attached_to_and_left_alone(chaos: Chaos) -> None:
    vae = tiny_video().vae
    remote_vae.attach(vae, {"endpoint": chaos.url})
    assert vae.decode(torch.zeros(1, 16, 1, 4, 4)).sample.shape == (1, 3, 1, 32, 32)
    assert not chaos.requests


def test_settings_that_cannot_be_used_are_refused_before_anything_is_hooked(vae: AutoencoderKL) -> None:
    with pytest.raises(SettingsError, match="transfer"):
        remote_vae.attach(vae, {"transfer": "gif"})
    assert "decode" not in vars(vae)


@torch.no_grad()
def test_positional_arguments_are_the_vaes_own_parameters(latents: torch.Tensor) -> None:
    """AutoencoderTiny's second one is a generator."""
    tiny = diffusers.AutoencoderTiny().eval()
    remote_vae.attach(tiny, {})
    assert tiny.decode(latents, torch.Generator()).sample.shape == (1, 3, 64, 96)


@torch.no_grad()
def test_what_the_wire_does_not_carry_is_the_vaes_own_call(chaos: Chaos, latents: torch.Tensor) -> None:
    """The asymmetric VAE blends picture and mask in, as diffusers' inpaint pipeline hands them over."""
    vae = asymmetric_decoder_vae()
    picture, mask = torch.rand(1, 3, 64, 96) * 2 - 1, (torch.rand(1, 1, 64, 96) > 0.5).float()
    expected = vae.decode(latents, image=picture, mask=mask).sample
    chaos.reset("503")
    handle = remote_vae.attach(vae, {"endpoint": chaos.url})
    assert torch.equal(vae.decode(latents, image=picture, mask=mask).sample, expected)
    assert torch.equal(vae.decode(latents, None, picture, mask).sample, expected)
    assert not handle.history.records()
    # Without them it is a call as any other.
    vae.decode(latents, image=None, mask=None)
    assert len(handle.history.records()) == 1


def test_gradients_flow_through_the_vae_itself(vae: AutoencoderKL, chaos: Chaos, latents: torch.Tensor) -> None:
    remote_vae.attach(vae, {"endpoint": chaos.url})
    latents.requires_grad_()
    vae.decode(latents).sample.mean().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0
    assert not chaos.requests
    with torch.no_grad():
        vae.decode(latents)
    assert chaos.requests == ["/decode"]


@torch.no_grad()
def test_a_deep_copy_has_its_own_weights_and_is_not_attached(vae: AutoencoderKL, chaos: Chaos, latents: torch.Tensor) -> None:
    remote_vae.attach(vae, {"endpoint": chaos.url})
    copied = copy.deepcopy(copy.deepcopy(vae))
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied.decode(latents).sample.any()
    assert not chaos.requests


@torch.no_grad()
def test_a_compiled_vae_is_attached_to(vae: AutoencoderKL, chaos: Chaos, latents: torch.Tensor) -> None:
    pipe = pipeline("StableDiffusionPipeline", vae)
    pipe.vae = torch.compile(vae, backend="eager")
    handle = remote_vae.attach(pipe, {"endpoint": chaos.url})
    pipe.vae.decode(latents)
    assert chaos.requests == ["/decode"]
    handle.detach()
    assert "decode" not in vars(vae)


@torch.no_grad()
def test_an_error_of_ours_costs_no_picture(vae: AutoencoderKL, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = vae.decode(latents).sample
    handle = remote_vae.attach(vae, {})
    monkeypatch.setattr(handle, "_router", None)
    assert torch.equal(vae.decode(latents).sample, expected)


@torch.no_grad()
def test_a_vae_without_a_posterior_gives_latents_whoever_encodes(pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = diffusers.AutoencoderTiny().eval()
    own = vae.encode(pixels)
    remote_vae.attach(vae, {})
    no_room_for_the_whole(monkeypatch, vae)
    made = vae.encode(pixels)
    assert type(made) is type(own)
    assert psnr(made.latents, own.latents) >= 100
    assert psnr(vae.encode(pixels, return_dict=False)[0], own.latents) >= 100
