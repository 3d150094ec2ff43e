"""remote_decode and remote_encode against diffusers' own, over the same server."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image

import remote_vae
from remote_vae.errors import EndpointError, InvalidRequest
from remote_vae.remote.client import Deadlines, EndpointClient
from remote_vae.server.models import LoadedVae
from remote_vae.vae.families import family_of, find_family
from remote_vae.vae.packed import batch_norm_of
from remote_vae.wire import DecodeRequest, pack_latents
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.vaes import loaded, small_vae, tiny_flux, tiny_video
from tests.versions import missing

SCALE = 0.08489


def diffusers_own() -> Any:
    """The module of diffusers' two functions."""
    if why := missing("remote_decode"):
        pytest.skip(why)
    from diffusers.utils import remote_utils

    return remote_utils


def same(ours: Any, theirs: Any) -> bool:
    """Whether two results are alike in type, mode, format and every value."""
    if isinstance(theirs, list):
        return isinstance(ours, list) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, Image.Image):
        equal = isinstance(ours, Image.Image) and np.array_equal(np.array(ours), np.array(theirs))
        return equal and ours.mode == theirs.mode and ours.format == theirs.format
    return type(ours) is type(theirs) and ours == theirs


# Every combination that diffusers' tests/remote exercise.
COMBINATIONS: dict[str, dict[str, Any]] = {
    "no scaling": {"output_type": "pt", "do_scaling": False, "processor": VaeImageProcessor()},
    "pt": {"output_type": "pt", "processor": VaeImageProcessor(), "scaling_factor": SCALE},
    "pil": {"output_type": "pil", "scaling_factor": SCALE},
    "pil, png": {"output_type": "pil", "image_format": "png", "scaling_factor": SCALE},
    "pil, processor": {"output_type": "pil", "processor": VaeImageProcessor(), "scaling_factor": SCALE},
    "pil, processor, to pt": {
        "output_type": "pil", "return_type": "pt", "processor": VaeImageProcessor(), "scaling_factor": SCALE,
    },
    "pt, partial": {"output_type": "pt", "partial_postprocess": True, "scaling_factor": SCALE},
    "pt, to pt": {"output_type": "pt", "return_type": "pt", "scaling_factor": SCALE},
    "pt, partial, to pt": {"output_type": "pt", "partial_postprocess": True, "return_type": "pt", "scaling_factor": SCALE},
    "shift": {"output_type": "pt", "return_type": "pt", "scaling_factor": SCALE, "shift_factor": 0.1159},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(COMBINATIONS))
def test_decode_gives_what_diffusers_gives(server: ServerThread, latents: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    arguments = {"endpoint": f"{server.url}/decode", "tensor": latents.to(dtype), **COMBINATIONS[name]}
    if COMBINATIONS[name].get("scaling_factor"):
        arguments["tensor"] = arguments["tensor"] * SCALE
    assert same(remote_vae.remote_decode(**arguments), diffusers_own().remote_decode(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`do_scaling` is deprecated, pass `scaling_factor` and `shift_factor` if required."),
        ({"input_tensor_type": "base64", "scaling_factor": SCALE}, "input_tensor_type='base64' is deprecated. Using `binary`."),
        (
            {"output_tensor_type": "base64", "scaling_factor": SCALE},
            "output_tensor_type='base64' is deprecated. Using `binary`.",
        ),
    ],
)
def test_the_deprecated_arguments_warn_and_work_as_in_diffusers(
    server: ServerThread, latents: torch.Tensor, arguments: dict[str, Any], message: str
) -> None:
    call = {"tensor": latents * SCALE, "output_type": "pt", "partial_postprocess": True, **arguments}
    with pytest.warns(FutureWarning) as caught:
        ours = remote_vae.remote_decode(f"{server.url}/decode", **call)
    assert [str(warning.message) for warning in caught] == [message]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(ours, diffusers_own().remote_decode(f"{server.url}/decode", **call))


@pytest.mark.parametrize("arguments", [{"output_type": "pil"}, {"output_type": "pil", "image_format": "png"}])
def test_a_batch_of_pictures_comes_back_whole(server: ServerThread, arguments: dict[str, Any]) -> None:
    batch = torch.randn(3, 4, 8, 8)
    images = remote_vae.remote_decode(f"{server.url}/decode", batch, do_scaling=False, **arguments)
    single = [remote_vae.remote_decode(f"{server.url}/decode", one[None], do_scaling=False, **arguments) for one in batch]
    assert [(image.mode, image.format, image.size) for image in images] == [(one.mode, one.format, one.size) for one in single]
    # The server makes at once what comes at once, and that is rounded in other places.
    for image, one in zip(images, single, strict=True):
        assert np.abs(np.array(image, dtype=float) - np.array(one, dtype=float)).mean() < 0.5


def test_a_batch_through_the_processor_comes_back_whole(server: ServerThread) -> None:
    batch = torch.randn(3, 4, 8, 8, dtype=torch.float16)
    call: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "processor": VaeImageProcessor()}
    images = remote_vae.remote_decode(f"{server.url}/decode", batch, **call)
    assert isinstance(images, list)
    # diffusers gives the first and drops the others.
    assert same(images[0], diffusers_own().remote_decode(f"{server.url}/decode", batch, **call))
    assert len(images) == 3


def test_latents_with_other_strides_decode_to_the_same_picture(server: ServerThread, latents: torch.Tensor) -> None:
    strided = latents.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    call: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "return_type": "pt"}
    straight = remote_vae.remote_decode(f"{server.url}/decode", latents, **call)
    assert torch.equal(remote_vae.remote_decode(f"{server.url}/decode", strided, **call), straight)


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_type": "gif"},
        {"return_type": "gif"},
        {"output_type": "mp4"},
        {"return_type": "mp4"},
        {"output_type": "pil", "return_type": "pt"},
        {"output_type": "pt"},
        {"image_format": "bmp"},
        {"input_tensor_type": "numpy"},
    ],
)
def test_arguments_that_contradict_each_other_are_a_value_error_before_anything_is_sent(
    chaos: Chaos, latents: torch.Tensor, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        remote_vae.remote_decode(chaos.url, latents, scaling_factor=1.0, **arguments)
    assert isinstance(caught.value, InvalidRequest)
    assert not chaos.requests


def test_packed_latents_need_their_size(chaos: Chaos) -> None:
    with pytest.raises(ValueError, match=r"`height` and `width` required for packed latents\."):
        remote_vae.remote_decode(chaos.url, torch.zeros(1, 6, 64), scaling_factor=1.0)


def test_an_error_of_the_server_is_a_runtime_error_with_its_words(server: ServerThread) -> None:
    with pytest.raises(RuntimeError, match="4 channels") as caught:
        remote_vae.remote_decode(f"{server.url}/decode", torch.zeros(1, 7, 4, 4), do_scaling=False)
    assert isinstance(caught.value, EndpointError)
    assert caught.value.status == 400


@pytest.mark.parametrize("factors", [{}, {"scaling_factor": SCALE}, {"scaling_factor": SCALE, "shift_factor": 0.25}])
@pytest.mark.parametrize("kind", ["picture", "tensor"])
def test_encode_gives_what_diffusers_gives(
    server: ServerThread, pixels: torch.Tensor, kind: str, factors: dict[str, float]
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (66, 97, 3), dtype=np.uint8))
    image = picture if kind == "picture" else pixels.half()
    ours = remote_vae.remote_encode(f"{server.url}/encode", image, **factors)
    assert same(ours, diffusers_own().remote_encode(f"{server.url}/encode", image, **factors))


def test_a_seed_gives_the_same_sample_whatever_the_batch(server: ServerThread, loaded: LoadedVae, pixels: torch.Tensor) -> None:
    batch, endpoint = torch.cat([pixels, pixels.flip(-1)]), f"{server.url}/encode"
    both = remote_vae.remote_encode(endpoint, batch, scaling_factor=SCALE, seed=5)
    with torch.inference_mode():
        posterior = loaded.vae.encode(batch, return_dict=False)[0]
    for index in range(2):
        alone = remote_vae.remote_encode(endpoint, batch[index : index + 1], scaling_factor=SCALE, seed=5 + index)
        torch.testing.assert_close(alone[0], both[index], rtol=0, atol=1e-4)
        noise = torch.randn(both.shape[1:], generator=torch.Generator().manual_seed(5 + index))
        sample = posterior.mean[index] + posterior.std[index] * noise
        torch.testing.assert_close(alone[0], sample * SCALE, rtol=0, atol=1e-4)
    assert not remote_vae.remote_encode(endpoint, batch, scaling_factor=SCALE, seed=6).equal(both)


def test_a_picture_with_transparency_is_encoded_as_rgb(server: ServerThread) -> None:
    picture = Image.new("RGBA", (16, 24), (200, 100, 50, 0))
    latents = remote_vae.remote_encode(f"{server.url}/encode", picture)
    assert torch.equal(latents, remote_vae.remote_encode(f"{server.url}/encode", picture.convert("RGB")))


@pytest.fixture
def other_server(request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    make: Callable[[], LoadedVae] = request.param
    running = ServerThread(make())
    yield running
    running.close()


FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


@pytest.mark.parametrize("other_server", [tiny_flux], indirect=True)
@pytest.mark.parametrize("name", ["pt", "pil, png", "pt, partial, to pt", "pt, to pt", "pil"])
def test_packed_flux_latents_decode_as_with_diffusers_and_as_unpacked_ones(other_server: ServerThread, name: str) -> None:
    latents = torch.randn(1, 16, 6, 10).bfloat16()
    call = {"endpoint": other_server.url, **COMBINATIONS[name], **FLUX}
    packed = {**call, "tensor": pack_latents(latents), "height": 48, "width": 80}
    ours = remote_vae.remote_decode(**packed)
    assert same(ours, diffusers_own().remote_decode(**packed))
    assert same(ours, remote_vae.remote_decode(**call, tensor=latents))


@pytest.mark.parametrize("other_server", [tiny_video], indirect=True)
def test_video_decodes_as_with_diffusers(other_server: ServerThread) -> None:
    latents = torch.randn(1, 16, 2, 4, 6).half()
    factor = find_family("hunyuan-video").scaling_factor
    for arguments in (
        {"output_type": "pt", "processor": VideoProcessor()},
        {"output_type": "pil", "processor": VideoProcessor()},
        {"output_type": "pt", "partial_postprocess": True},
        {"output_type": "pt", "return_type": "pt"},
        {"output_type": "mp4", "return_type": "mp4"},
    ):
        call: dict[str, Any] = {"endpoint": other_server.url, "tensor": latents, "scaling_factor": factor, **arguments}
        ours, theirs = remote_vae.remote_decode(**call), diffusers_own().remote_decode(**call)
        assert type(ours) is type(theirs)
        assert arguments["output_type"] == "mp4" or same(ours, theirs), arguments


@pytest.mark.parametrize(
    ("shape", "pictures"),
    [((1, 4, 16, 16), 1), ((1, 4, 128, 128), 1), ((4, 4, 128, 128), 4), ((1, 16, 21, 64, 128), 42)],
)
def test_who_waits_for_a_picture_waits_as_often_as_long_for_as_many(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], pictures: int
) -> None:
    """A video's answer takes minutes."""
    waits: list[float] = []

    def decode(client: EndpointClient, request: DecodeRequest, deadlines: Deadlines) -> None:
        waits.append(deadlines.total)
        raise InvalidRequest("seen")

    monkeypatch.setattr(EndpointClient, "decode", decode)
    with pytest.raises(InvalidRequest, match="seen"):
        remote_vae.remote_decode(
            "http://127.0.0.1:9", torch.zeros(shape), output_type="pt", return_type="pt", scaling_factor=1.0
        )
    assert waits == [300.0 * pictures]


# --- families that diffusers' functions do not know


def small(name: str) -> Callable[[], LoadedVae]:
    def make() -> LoadedVae:
        vae = small_vae(name)
        return replace(loaded(vae, family_of(vae).key), family=family_of(vae))

    return make


def here(server: ServerThread, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return server.loaded.vae.decode(latents, return_dict=False)[0]


RAW: dict[str, Any] = {"do_scaling": False}


@pytest.mark.parametrize("other_server", [small("qwen-image")], indirect=True)
def test_one_frame_of_a_video_vae_is_a_picture(other_server: ServerThread) -> None:
    latents = torch.randn(1, 16, 1, 4, 6)
    pixels = here(other_server, latents)
    image = VaeImageProcessor().postprocess(pixels[:, :, 0])[0]
    call = {"endpoint": other_server.url, "tensor": latents, **RAW}
    assert same(remote_vae.remote_decode(**call, output_type="pt", processor=VaeImageProcessor()), image)
    assert same(remote_vae.remote_decode(**call, output_type="pt", partial_postprocess=True), image)
    assert same(remote_vae.remote_decode(**call, output_type="pt", processor=VideoProcessor()), [image])
    png = remote_vae.remote_decode(**call, output_type="pil", image_format="png")
    assert np.abs(np.array(png).astype(int) - np.array(image).astype(int)).max() <= 1
    assert remote_vae.remote_decode(**call).size == (48, 32)
    assert torch.equal(remote_vae.remote_decode(**call, output_type="pt", return_type="pt"), pixels)


@pytest.mark.parametrize("other_server", [small("wan")], indirect=True)
def test_a_video_is_frames_a_tensor_or_a_film(other_server: ServerThread) -> None:
    latents = torch.randn(1, 16, 2, 4, 6)
    call = {"endpoint": other_server.url, "tensor": latents, **RAW}
    frames = VideoProcessor().postprocess_video(here(other_server, latents), output_type="pil")[0]
    assert same(remote_vae.remote_decode(**call, output_type="pt", processor=VideoProcessor()), frames)
    film = remote_vae.remote_decode(**call, output_type="mp4", return_type="mp4")
    with av.open(io.BytesIO(film)) as container:
        assert len(list(container.decode(video=0))) == len(frames) == 5


@pytest.mark.parametrize("other_server", [small("wan")], indirect=True)
def test_model_latents_are_scaled_by_the_mean_and_deviation_of_the_server(other_server: ServerThread) -> None:
    latents, config = torch.randn(1, 16, 2, 4, 6), other_server.loaded.vae.config
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    with pytest.warns(FutureWarning):
        pixels = remote_vae.remote_decode(other_server.url, latents, output_type="pt", return_type="pt")
    # As WanPipeline does it.
    assert torch.equal(pixels, here(other_server, latents / (1.0 / std) + mean))


@pytest.mark.parametrize("other_server", [small("flux2")], indirect=True)
@pytest.mark.parametrize("is_tokens", [False, True])
def test_flux2s_packed_latents_are_unpacked_by_the_servers_own_numbers(other_server: ServerThread, is_tokens: bool) -> None:
    packed = torch.randn(1, 128, 2, 3)
    norm = batch_norm_of(other_server.loaded.vae)
    assert norm is not None
    call: dict[str, Any] = {**RAW, "output_type": "pt", "return_type": "pt", "height": 32, "width": 48}
    sent = packed.flatten(2).movedim(1, 2) if is_tokens else packed
    assert torch.equal(remote_vae.remote_decode(other_server.url, sent, **call), here(other_server, norm.raw(packed)))


@pytest.mark.parametrize("other_server", [small("qwen-image-2.1")], indirect=True)
def test_a_picture_with_alpha_keeps_it_and_jpeg_is_refused(other_server: ServerThread) -> None:
    latents = torch.randn(1, 64, 1, 2, 3)
    call = {"endpoint": other_server.url, "tensor": latents, **RAW}
    png = remote_vae.remote_decode(**call, image_format="png")
    assert png.mode == "RGBA"
    assert same(remote_vae.remote_decode(**call, output_type="pt", partial_postprocess=True).getbands(), ("R", "G", "B", "A"))
    with pytest.raises(EndpointError, match="alpha channel, which jpg cannot hold: ask for png"):
        remote_vae.remote_decode(**call)


@pytest.mark.parametrize("other_server", [small("wan")], indirect=True)
def test_a_video_is_encoded_with_its_frames(other_server: ServerThread) -> None:
    pixels = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    with torch.inference_mode():
        mean = other_server.loaded.vae.encode(pixels).latent_dist.mode()
    assert torch.equal(remote_vae.remote_encode(f"{other_server.url}/encode", pixels), mean)


def test_a_video_and_a_processor_of_pictures_do_not_go_together(chaos: Chaos) -> None:
    with pytest.raises(ValueError, match="VideoProcessor"):
        remote_vae.remote_decode(
            chaos.url, torch.zeros(1, 16, 2, 4, 4), scaling_factor=1.0, output_type="pt", processor=VaeImageProcessor()
        )
    assert not chaos.requests
