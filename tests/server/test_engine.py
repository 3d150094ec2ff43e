"""What the server does when memory is short, when half precision is not enough, and when the VAE fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import requests
import torch

from remote_vae.local import route
from remote_vae.server.models import LoadedVae
from tests.conftest import ServerThread
from tests.nearness import no_room_for_the_whole, out_of_memory, psnr, psnr_of_moments
from tests.server.asking import TIMEOUT, body, decode, head, locally, tensor_of
from tests.vaes import tiny_flux
from tests.versions import NO_HALF


@pytest.fixture
def own(loaded: LoadedVae) -> Iterator[ServerThread]:
    """A server whose VAE may be broken."""
    running = ServerThread(replace(loaded, vae=copy.deepcopy(loaded.vae)))
    yield running
    running.close()


@pytest.fixture
def half(loaded: LoadedVae) -> Iterator[ServerThread]:
    """A server whose VAE, in half precision, gives NaN for whatever is decoded or encoded as a whole."""
    if NO_HALF:
        pytest.skip(NO_HALF)
    running = ServerThread(replace(loaded, vae=copy.deepcopy(loaded.vae).half()))
    for part in (running.loaded.vae.decoder, running.loaded.vae.encoder):
        part.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    yield running
    running.close()


def test_an_error_of_the_whole_vae_is_mended_by_the_exact_tiled_one(
    own: ServerThread, loaded: LoadedVae, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its words are: "Invalid buffer size", 32-bit index math and the like all mean too large."""

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Expected canUse32BitIndexMath to be true")

    monkeypatch.setattr(own.loaded.vae.decoder, "forward", broken)
    assert psnr(tensor_of(decode(own, latents)), locally(loaded, latents)) >= 100


def test_a_vae_that_fails_in_every_way_is_a_500_with_its_words(own: ServerThread, latents: torch.Tensor) -> None:
    class Broken(torch.nn.Module):
        def forward(self, *args: Any) -> None:
            raise RuntimeError("a defect of the VAE")

    whole, own.loaded.vae.decoder = own.loaded.vae.decoder, Broken()
    answer = decode(own, latents)
    assert answer.status_code == 500
    assert "a defect of the VAE" in answer.json()["error"]
    own.loaded.vae.decoder = whole
    assert decode(own, latents).status_code == 200


def test_out_of_memory_is_tried_again_tiled_and_then_a_507(
    own: ServerThread, loaded: LoadedVae, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, tilings = own.loaded.vae, []

    def run_out(*args: Any, **kwargs: Any) -> Any:
        tilings.append(vae.use_tiling)
        out_of_memory()

    monkeypatch.setattr(vae.decoder, "forward", run_out)
    assert psnr(tensor_of(decode(own, latents)), locally(loaded, latents)) >= 100
    assert tilings == [False]

    # Too little for anything: the whole VAE is not even tried, the tiles that it brings along are.
    monkeypatch.setattr(route, "available_memory", lambda device: 1000)
    monkeypatch.setattr(route, "on_cpu", out_of_memory)
    answer = decode(own, latents)
    assert answer.status_code == 507
    assert "memory" in answer.text
    assert tilings == [False, True]
    assert not vae.use_tiling


def test_a_picture_that_does_not_fit_whole_is_encoded_in_tiles(
    own: ServerThread, loaded: LoadedVae, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        whole = loaded.vae.encode(pixels).latent_dist.parameters
    seen = no_room_for_the_whole(monkeypatch, own.loaded.vae)
    params = {**head(pixels), "posterior": True}
    answer = requests.post(f"{own.url}/encode", data=body(pixels), params=params, timeout=TIMEOUT)
    assert psnr(tensor_of(answer), whole) >= 100
    assert seen == ["encoder"]


def test_a_vae_of_an_unknown_layout_is_tiled_in_its_own_way(
    own: ServerThread, loaded: LoadedVae, latents: torch.Tensor
) -> None:
    vae, tilings = own.loaded.vae, []
    vae.decoder.colour = torch.nn.Conv2d(3, 3, 1)
    original = type(vae).decode

    def decode_in_tiles(z: torch.Tensor, **kwargs: Any) -> Any:
        tilings.append(vae.use_tiling)
        return original(vae, z, **kwargs) if vae.use_tiling else out_of_memory()

    vae.decode = decode_in_tiles
    # So small a picture is a single tile.
    assert torch.equal(tensor_of(decode(own, latents)), locally(loaded, latents))
    assert tilings == [False, True]


def test_nan_in_half_precision_is_one_call_in_float32_and_changes_nothing(
    half: ServerThread, loaded: LoadedVae, latents: torch.Tensor, pixels: torch.Tensor
) -> None:
    weights = {name: value.clone() for name, value in half.loaded.vae.state_dict().items()}
    exact = copy.deepcopy(loaded.vae).half().float()
    with torch.inference_mode():
        expected = exact.decode(latents).sample
        moments = exact.encode(pixels).latent_dist.parameters
    for _ in range(2):
        assert psnr(tensor_of(decode(half, latents)), expected) >= 80
        params = {**head(pixels), "posterior": True}
        encoded = requests.post(f"{half.url}/encode", data=body(pixels), params=params, timeout=TIMEOUT)
        # Rounding the result to half precision leaves this much; computing in it leaves 69 dB.
        assert psnr_of_moments(tensor_of(encoded), moments) >= 71
    assert requests.get(f"{half.url}/info", timeout=TIMEOUT).json()["dtype"] == "float16"
    assert all(torch.equal(value, weights[name]) for name, value in half.loaded.vae.state_dict().items())


@pytest.mark.parametrize("output", [{"output_type": "pt", "partial_postprocess": True}, {"output_type": "pil"}])
def test_a_picture_that_is_not_finite_is_an_error_in_every_form(
    half: ServerThread, latents: torch.Tensor, output: dict[str, Any]
) -> None:
    """And not a black picture; the next call finds the server as it was."""
    bias = half.loaded.vae.decoder.conv_out.bias.detach()
    good = bias.clone()
    bias.fill_(float("nan"))
    answer = decode(half, latents, **output)
    assert answer.status_code == 422
    assert "NaN or infinite" in answer.json()["error"]
    bias.copy_(good)
    assert decode(half, latents, **output).status_code == 200


def test_latents_that_are_too_large_for_the_vae_are_an_error(
    own: ServerThread, half: ServerThread, latents: torch.Tensor
) -> None:
    assert decode(own, latents, scaling_factor=1e-30).status_code == 400
    assert decode(half, latents, scaling_factor=1e-30).status_code == 400
    assert decode(half, latents).status_code == 200


def test_a_large_batch_of_another_layout_is_bit_equal() -> None:
    """The answer goes out in more than one piece."""
    running = ServerThread(tiny_flux())
    try:
        latents = torch.randn(2, 16, 32, 32)
        assert torch.equal(tensor_of(decode(running, latents)), locally(running.loaded, latents))
    finally:
        running.close()
