"""Every family's VAE over the wire, the remote route against the real server: pictures, videos, alpha, 32 pixels a cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import torch

from remote_vae.call import VaeCall
from remote_vae.errors import AnotherVae, MalformedAnswer
from remote_vae.remote.route import RemoteRoute
from remote_vae.settings import Settings
from remote_vae.vae.at_work import VaeAtWork, has_posterior, whole_diffusers
from remote_vae.vae.families import Family, family_of
from remote_vae.wire import DecodeAnswer, EncodeAnswer
from remote_vae.wire.pixels import to_uint8
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.vaes import loaded, small_vae

PICTURES = ["flux2", "hunyuan-image", "sana", "qwen-image-2.1"]
VIDEOS = ["qwen-image", "wan22-5b", "hunyuan-video", "cogvideox", "svd"]


class Served:
    """A small VAE, the server that has it, and calls of a host that has the same."""

    def __init__(self, name: str) -> None:
        self.vae = small_vae(name)
        self.family = family_of(self.vae)
        self.server = ServerThread(loaded(self.vae, self.family.key))
        self.chaos = Chaos(self.server.url)
        self.route = RemoteRoute()

    def latents(self, batch: int = 1, frames: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shape = (batch, self.family.latent_channels, *((frames,) if self.family.video else ()), 2, 3)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)

    def pixels(self, batch: int = 1, frames: int = 1) -> torch.Tensor:
        scale = self.family.downscale
        shape = (batch, self.family.pixel_channels, *((frames,) if self.family.video else ()), 2 * scale, 3 * scale)
        levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3))
        return levels / 127.5 - 1

    def ask(self, op: Any, tensor: torch.Tensor, transfer: str, family: Family | None = None, vae: Any = None) -> Any:
        at_work = VaeAtWork(vae or self.vae, family or self.family, has_posterior=has_posterior(self.vae))
        call: VaeCall[Any] = VaeCall(op, tensor, at_work, adopt=lambda answer: answer)
        return self.route.run(call, Settings(endpoint=self.chaos.url, transfer=transfer)).value

    def here(self, op: Any, tensor: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return whole_diffusers(self.vae, op, tensor)


_running: dict[str, Served] = {}


@pytest.fixture(scope="module", autouse=True)
def _all_end() -> Iterator[None]:
    yield
    for each in _running.values():
        each.chaos.close()
        each.server.close()
    _running.clear()


def served(name: str) -> Served:
    """The one of this family, for all tests of the file."""
    if name not in _running:
        _running[name] = Served(name)
    it = _running[name]
    it.route = RemoteRoute()
    it.chaos.reset("pass")
    it.chaos.info, it.chaos.drops = "mode", ()
    it.chaos.requests.clear()
    return it


@pytest.mark.parametrize(
    ("name", "frames"), [*((name, 1) for name in PICTURES), *((name, frames) for name in VIDEOS for frames in (1, 2, 3))]
)
def test_raw_is_the_vaes_own_to_the_bit(name: str, frames: int) -> None:
    it = served(name)
    latents = it.latents(frames=frames)
    answer = it.ask("decode", latents, "raw")
    assert isinstance(answer, DecodeAnswer)
    assert torch.equal(answer.pixels("cpu", torch.float32), it.here("decode", latents))
    pixels = it.pixels(frames=it.family.frames(frames))
    encoded = it.ask("encode", pixels, "raw")
    assert isinstance(encoded, EncodeAnswer)
    assert torch.equal(encoded.latents, it.here("encode", pixels))
    assert encoded.is_posterior is has_posterior(it.vae)


@pytest.mark.parametrize("transfer", ["u8", "png", "jpg"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("name", "frames"), [("sana", 1), ("qwen-image", 1), ("qwen-image", 2), ("qwen-image-2.1", 1)])
def test_levels_are_within_one_of_the_vaes_own(name: str, frames: int, batch: int, transfer: str) -> None:
    it = served(name)
    latents = it.latents(batch, frames)
    whole = it.here("decode", latents)
    answer = it.ask("decode", latents, transfer)
    pixels = answer.pixels("cpu", torch.float32)
    assert pixels.shape == whole.shape
    is_lossy = transfer == "jpg" and frames == 1 and it.family.pixel_channels == 3
    off = to_uint8(pixels.flatten(2, -2)).int() - to_uint8(whole.flatten(2, -2)).int()
    assert off.abs().max() <= (80 if is_lossy else 1)
    # Videos go one by one.
    assert len(it.chaos.requests) == (batch if it.family.video else 1)


@pytest.mark.parametrize("transfer", ["u8", "png"])
@pytest.mark.parametrize(("name", "frames"), [("qwen-image", 1), ("qwen-image", 5), ("qwen-image-2.1", 1)])
def test_pixels_go_up_in_a_form_that_holds_them(name: str, frames: int, transfer: str) -> None:
    it = served(name)
    pixels = it.pixels(2, frames)
    encoded = it.ask("encode", pixels, transfer)
    assert encoded.latents.shape == it.here("encode", pixels).shape
    assert torch.allclose(encoded.latents, it.here("encode", pixels), atol=2e-2)


def other(family: Family, **changes: Any) -> Family:
    values = {name: getattr(family, name) for name in family.__dataclass_fields__}
    return Family(**{**values, "key": "custom", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_scale": 8}, r"got \[1, 3, 5, 16, 24\], expected \[1, 3, 9, 16, 24\]"),
        ({"frame_scale": 1}, r"expected \[1, 3, 2, 16, 24\]"),
        ({"downscale": 16}, r"got \[1, 3, 5, 16, 24\], expected \[1, 3, 5, 32, 48\]"),
        ({"pixel_channels": 4}, r"got \[1, 3, 5, 16, 24\], expected \[1, 4, 5, 16, 24\]"),
    ],
)
def test_a_video_that_this_vae_would_not_have_made_is_not_taken(changes: dict[str, Any], message: str) -> None:
    it = served("wan")
    with pytest.raises(MalformedAnswer, match=message):
        it.ask("decode", it.latents(frames=2), "u8", other(it.family, **changes))


@pytest.mark.parametrize(
    ("changes", "frames", "message"),
    [
        ({"latent_channels": 12}, 5, r"got \[1, 32, 2, 2, 3\], expected \[1, 24, 1, 2, 3\]"),
        ({"frame_scale": 8}, 9, r"got \[1, 32, 3, 2, 3\], expected \[1, 32, 1, 2, 3\]"),
        ({"downscale": 16}, 5, r"got \[1, 32, 2, 2, 3\], expected \[1, 32, 1, 1, 1\]"),
    ],
)
def test_latents_that_this_vae_would_not_have_made_are_not_taken(changes: dict[str, Any], frames: int, message: str) -> None:
    it = served("wan")
    with pytest.raises(MalformedAnswer, match=message):
        it.ask("encode", it.pixels(frames=frames), "raw", other(it.family, **changes))


@pytest.mark.parametrize("name", ["flux2", "sana", "wan", "qwen-image-2.1", "svd"])
@pytest.mark.parametrize("op", ["decode", "encode"])
def test_an_endpoint_that_says_nothing_is_known_by_the_test_picture(name: str, op: Any) -> None:
    it, other_one = served(name), small_vae(name)
    it.chaos.info, it.chaos.drops = "404 html", ("family",)
    tensor = it.latents() if op == "decode" else it.pixels()
    it.ask(op, tensor, "png")
    assert len(it.chaos.requests) == 2
    with torch.no_grad():
        for value in other_one.state_dict().values():
            if value.ndim > 3:
                value.mul_(1 + 0.6 * torch.randn(value.shape, generator=torch.Generator().manual_seed(4)))
    with pytest.raises(AnotherVae, match="makes other"):
        it.ask(op, tensor, "png", vae=other_one)


def test_a_video_of_nothing_but_nan_is_not_taken() -> None:
    it = served("wan")
    it.chaos.reset("nan")
    it.chaos.info = "pass"
    with pytest.raises(MalformedAnswer, match="nan"):
        it.ask("decode", it.latents(frames=2), "raw")


def test_the_public_endpoint_of_videos_is_asked_for_what_it_knows() -> None:
    """diffusers asks it for tensors and mp4 only: no picture's file, no key that it does not know but ``family``."""
    it = served("hunyuan-video")
    it.chaos.extras = []
    it.ask("decode", it.latents(), "png")
    keys = [key for key, _ in parse_qsl(urlsplit(it.chaos.queries[-1]).query or it.chaos.queries[-1])]
    assert keys == ["output_type", "partial_postprocess", *["shape"] * 5, "dtype", "family"]
