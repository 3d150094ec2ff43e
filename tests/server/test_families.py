"""Every family over HTTP: bit-equal to the same VAE called here, in every form that its requests have."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from remote_vae.server.models import LoadedVae
from remote_vae.vae.families import family_of
from remote_vae.wire import FINGERPRINT_KEYS
from remote_vae.wire.pixels import to_uint8
from tests.conftest import ServerThread
from tests.server.asking import TIMEOUT, body, decode, head, tensor_of
from tests.vaes import SMALL, small_vae

# Of the latents.
FRAMES, ROWS, COLUMNS = 3, 2, 3


class Served:
    """A small VAE and its server. Its latents are of ``frames`` frames, where it takes more than one."""

    def __init__(self, name: str, rows: int = ROWS, columns: int = COLUMNS) -> None:
        self.frames = 1 if name == "qwen-image-2.1" else FRAMES
        self.size = rows, columns
        self.vae = small_vae(name)
        self.family = family_of(self.vae)
        self.server = ServerThread(LoadedVae(self.vae, self.family, name, dict.fromkeys(FINGERPRINT_KEYS, "0" * 16)))

    def latents(self, frames: int | None = None, batch: int = 1) -> torch.Tensor:
        axis = (frames or self.frames,) if self.family.video else ()
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, self.family.latent_channels, *axis, *self.size, generator=generator)

    def pixels(self, frames: int | None = None, batch: int = 1) -> torch.Tensor:
        family = self.family
        axis = (frames or family.frames(self.frames),) if family.video else ()
        sides = (side * family.downscale for side in self.size)
        size = batch, family.pixel_channels, *axis, *sides
        return torch.rand(size, generator=torch.Generator().manual_seed(2)) * 2 - 1

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """As its own class does it, called by hand."""
        with torch.inference_mode():
            if self.family.key != "svd":
                return self.vae.decode(latents, return_dict=False)[0]
            batch, channels, frames, rows, columns = latents.shape
            flat = latents.permute(0, 2, 1, 3, 4).reshape(-1, channels, rows, columns)
            made = self.vae.decode(flat, num_frames=frames).sample
            return made.reshape(batch, frames, *made.shape[1:]).permute(0, 2, 1, 3, 4)

    def encoded(self, pixels: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Moments, or latents of a VAE without a posterior; and which."""
        with torch.inference_mode():
            if self.family.key == "svd":
                frames = self.vae.encode(pixels.permute(0, 2, 1, 3, 4).flatten(0, 1)).latent_dist.parameters
                return frames.unflatten(0, (pixels.shape[0], -1)).permute(0, 2, 1, 3, 4), True
            out = self.vae.encode(pixels)
            dist = getattr(out, "latent_dist", None)
            if dist is None:
                return out["latent" if "latent" in out else "latents"], False
            # Cosmos has one that is a point.
            is_posterior = type(dist).__name__ == "DiagonalGaussianDistribution"
            return (dist.parameters if is_posterior else dist.mode()), is_posterior

    def encode(self, pixels: torch.Tensor, **params: Any) -> requests.Response:
        asked = {**head(pixels), **params}
        return requests.post(f"{self.server.url}/encode", data=body(pixels), params=asked, timeout=TIMEOUT)

    def decode(self, latents: torch.Tensor, **params: Any) -> requests.Response:
        return decode(self.server, latents, **params)

    def info(self) -> dict[str, Any]:
        return dict(requests.get(f"{self.server.url}/info", timeout=TIMEOUT).json())


@pytest.fixture(scope="module", params=SMALL)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    made = Served(request.param)
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def wan() -> Iterator[Served]:
    made = Served("wan", 4, 6)
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def flux2() -> Iterator[Served]:
    made = Served("flux2", 4, 6)
    yield made
    made.server.close()


# --- every family --------------------------------------------------------------------------------------------------------


def test_a_decode_is_bit_equal_to_the_same_vae_called_here(served: Served) -> None:
    latents = served.latents()
    answer = tensor_of(served.decode(latents))
    assert torch.equal(answer, served.decoded(latents))
    assert answer.shape == served.pixels().shape


def test_levels_are_the_nearest_to_what_the_vae_made(served: Served) -> None:
    latents = served.latents()
    levels = tensor_of(served.decode(latents, partial_postprocess=True))
    expected = served.decoded(latents)
    frames = expected[0].movedim(1, 0) if served.family.video else expected
    exact = (frames.double() / 2 + 0.5).clamp(0, 1).movedim(1, -1) * 255
    assert levels.dtype == torch.uint8
    assert (levels - exact).abs().max() <= 0.5 + 1e-4


def test_an_encode_is_bit_equal_to_the_same_vae_called_here(served: Served) -> None:
    pixels = served.pixels()
    expected, is_posterior = served.encoded(pixels)
    answer = served.encode(pixels, posterior=True)
    assert torch.equal(tensor_of(answer), expected)
    assert answer.headers.get("posterior") == ("True" if is_posterior else None)
    mode = expected.chunk(2, dim=1)[0] if is_posterior else expected
    assert torch.equal(tensor_of(served.encode(pixels)), mode)
    assert mode.shape == served.latents().shape


def test_info_says_how_latents_and_pixels_are_shaped_and_scaled(served: Served) -> None:
    info, family = served.info(), served.family
    said = {key: info[key] for key in ("family", "latent_channels", "downscale", "pixel_channels", "video", "frame_scale")}
    assert said == {key if key != "key" else "family": value for key, value in _shape(served).items()}
    assert (info["scaling_factor"], info["shift_factor"]) == (family.scaling_factor, family.shift_factor)
    assert (tuple(info.get("latents_mean", ())), tuple(info.get("latents_std", ()))) == (
        family.latents_mean,
        family.latents_std,
    )
    assert info["batch_norm"] == hasattr(served.vae, "bn")
    assert info["posterior"] == served.encoded(served.pixels())[1]


def _shape(served: Served) -> dict[str, Any]:
    """What the VAE itself does, and not what is known of its family."""
    latents, pixels = served.latents(), served.decoded(served.latents())
    video = latents.ndim == 5
    return {
        "family": served.family.key,
        "latent_channels": latents.shape[1],
        "downscale": pixels.shape[-1] // latents.shape[-1],
        "pixel_channels": pixels.shape[1],
        "video": video,
        "frame_scale": (pixels.shape[2] - 1) // (served.frames - 1) if video and served.frames > 1 else 1,
    }


# --- one frame is a picture ----------------------------------------------------------------------------------------------


def test_pictures_for_a_video_vae_are_one_frame_each(wan: Served) -> None:
    latents = wan.latents(frames=1, batch=2)
    pixels = wan.decoded(latents)
    assert torch.equal(tensor_of(wan.decode(latents.squeeze(2))), pixels.squeeze(2))
    moments = wan.encoded(pixels)[0]
    assert torch.equal(tensor_of(wan.encode(pixels.squeeze(2), posterior=True)), moments.squeeze(2))


@pytest.mark.parametrize("frames_axis", [True, False])
def test_a_picture_file_comes_of_one_frame(wan: Served, frames_axis: bool) -> None:
    latents = wan.latents(frames=1)
    sent = latents if frames_axis else latents.squeeze(2)
    file = wan.decode(sent, output_type="pil", image_format="png").content
    picture = torch.from_numpy(np.array(Image.open(io.BytesIO(file))))
    assert torch.equal(picture, to_uint8(wan.decoded(latents).squeeze(2))[0])


def test_a_picture_file_is_encoded_as_one_frame(wan: Served) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    answer = requests.post(f"{wan.server.url}/encode", data=file.getvalue(), timeout=TIMEOUT)
    pixels = torch.from_numpy(levels).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    assert torch.equal(tensor_of(answer), wan.encoded(pixels)[0].chunk(2, dim=1)[0].squeeze(2))


def test_levels_of_a_video_are_encoded_as_the_pixels_that_they_stand_for(wan: Served) -> None:
    levels = torch.randint(0, 256, (1, 3, 5, 32, 48), dtype=torch.uint8)
    assert torch.equal(tensor_of(wan.encode(levels, posterior=True)), tensor_of(wan.encode(levels / 127.5 - 1, posterior=True)))


def test_several_videos_come_back_as_one_tensor(wan: Served) -> None:
    latents = wan.latents(frames=2, batch=2)
    assert torch.equal(tensor_of(wan.decode(latents)), wan.decoded(latents))


# --- scaling and packed forms --------------------------------------------------------------------------------------------


def test_latents_of_the_model_are_scaled_by_the_channels_own_numbers(wan: Served) -> None:
    """As WanPipeline does it before its decode, and back."""
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (wan.vae.config.latents_mean, wan.vae.config.latents_std)
    )
    latents = wan.latents()
    assert torch.equal(tensor_of(wan.decode(latents, do_scaling=True)), wan.decoded(latents / (1.0 / std) + mean))
    pixels = wan.pixels()
    mode = wan.encoded(pixels)[0].chunk(2, dim=1)[0]
    assert torch.equal(tensor_of(wan.encode(pixels, do_scaling=True)), (mode - mean) * (1.0 / std))


def _packed_by_hand(flux2: Served, raw: torch.Tensor) -> torch.Tensor:
    """As Flux2Pipeline does it."""
    norm = flux2.vae.bn
    batch, channels, rows, columns = raw.shape
    cells = raw.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 5, 2, 4)
    packed = cells.reshape(batch, channels * 4, rows // 2, columns // 2)
    mean, std = (
        norm.running_mean.view(1, -1, 1, 1),
        torch.sqrt(norm.running_var.view(1, -1, 1, 1) + flux2.vae.config.batch_norm_eps),
    )
    return (packed - mean) / std


def test_packed_latents_of_flux2_go_both_ways_by_the_vaes_own_numbers(flux2: Served) -> None:
    pixels = flux2.pixels(batch=2)
    mode = flux2.encoded(pixels)[0].chunk(2, dim=1)[0]
    packed = tensor_of(flux2.encode(pixels, form="packed"))
    assert torch.equal(packed, _packed_by_hand(flux2, mode))
    back = tensor_of(flux2.decode(packed))
    assert back.shape == pixels.shape
    assert torch.allclose(back, flux2.decoded(mode), atol=1e-4)


def test_an_opaque_picture_is_encoded_by_a_vae_of_transparent_ones() -> None:
    served = Served("qwen-image-2.1")
    try:
        transparent = served.pixels(frames=1)
        opaque = transparent.clone()
        opaque[:, 3] = 1.0
        expected = served.encoded(opaque)[0]
        assert torch.equal(tensor_of(served.encode(opaque[:, :3], posterior=True)), expected)
        assert not torch.equal(tensor_of(served.encode(transparent, posterior=True)), expected)
        answer = served.decode(served.latents(frames=1), output_type="pil", image_format="png")
        assert Image.open(io.BytesIO(answer.content)).mode == "RGBA"
        refused = served.decode(served.latents(frames=1), output_type="pil", image_format="jpg")
        assert refused.status_code == 400
        assert "alpha" in refused.json()["error"]
    finally:
        served.server.close()


# --- what a VAE does not take --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 4, 3, 8, 8), "expected 16 channels"),
        ((1, 48, 8, 8), "expected 16 channels"),
        ((1, 64, 4, 4), "expected 16 channels"),
        ((1, 16, 258, 8, 8), "1029 frames; this server takes at most 1025"),
        ((1, 16, 38, 90, 160), "149 frames of 1280 x 720 are 137318400 pixels in all; this server takes at most 134217728"),
        ((33, 16, 2, 8, 8), "33 videos; this server takes at most 32"),
    ],
)
def test_latents_that_a_video_vae_does_not_take_are_refused_before_they_are_sent(
    wan: Served, shape: tuple[int, ...], said: str
) -> None:
    params = {"shape": list(shape), "dtype": "float32", "output_type": "pt"}
    answer = requests.post(f"{wan.server.url}/decode", params=params, data=b"", timeout=TIMEOUT)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
