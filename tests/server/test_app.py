"""The server, spoken to as diffusers', SD.Next's and ComfyUI-HFRemoteVae's clients do, and as nobody should."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from remote_vae import remote_decode
from remote_vae.server.models import LoadedVae
from remote_vae.vae.fingerprint import ROUNDINGS, fingerprint
from remote_vae.wire.pixels import image_to_pixels, to_uint8
from tests.conftest import ServerThread
from tests.server.asking import TIMEOUT, body, decode, head, locally, tensor_of
from tests.vaes import tiny_flux

# --- the bar: raw tensors are bit-equal, 8 bits within a level -----------------------------------------------------------


def test_a_raw_decode_is_bit_equal_to_the_same_vae_called_here(server: ServerThread, loaded: LoadedVae) -> None:
    latents = torch.randn(3, 4, 8, 12)
    assert torch.equal(tensor_of(decode(server, latents)), locally(loaded, latents))


def test_a_posterior_is_bit_equal_to_the_same_vae_called_here(
    server: ServerThread, loaded: LoadedVae, pixels: torch.Tensor
) -> None:
    answer = requests.post(
        f"{server.url}/encode", data=body(pixels), params={**head(pixels), "posterior": True}, timeout=TIMEOUT
    )
    with torch.inference_mode():
        expected = loaded.vae.encode(pixels).latent_dist.parameters
    assert answer.headers["posterior"] == "True"
    assert torch.equal(tensor_of(answer), expected)


def test_uint8_is_at_most_one_level_off(server: ServerThread, loaded: LoadedVae, latents: torch.Tensor) -> None:
    params = {**head(latents), "output_type": "pt", "partial_postprocess": True}
    levels = tensor_of(requests.post(f"{server.url}/decode", data=body(latents), params=params, timeout=TIMEOUT))
    exact = (locally(loaded, latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
    assert (levels - exact).abs().max() <= 0.5


# --- SD.Next -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "accept", "name"), [("png", "image/png", "PNG"), ("jpg", "image/jpeg", "JPEG")])
def test_sdnext_gets_its_picture(server: ServerThread, latents: torch.Tensor, kind: str, accept: str, name: str) -> None:
    latents = latents.half()
    params = {
        "input_tensor_type": "binary",
        **head(latents),
        "image_format": kind,
        "output_type": "pil",
        "scaling_factor": 0.08489,
    }
    params["shift_factor"] = None  # requests leaves it out
    headers = {"Content-Type": "tensor/binary", "Accept": accept}
    answer = requests.post(server.url, headers=headers, params=params, data=body(latents), timeout=TIMEOUT)
    assert answer.ok, answer.text
    assert answer.headers["content-type"] == accept
    image = Image.open(io.BytesIO(answer.content))
    assert (image.format, image.size) == (name, (96, 64))


def test_sdnext_gets_its_raw_tensor(server: ServerThread, loaded: LoadedVae, latents: torch.Tensor) -> None:
    params = {
        "input_tensor_type": "binary", **head(latents), "partial_postprocess": False, "output_type": "pt",
        "output_tensor_type": "binary", "scaling_factor": 0.08489,
    }  # fmt: skip
    headers = {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}
    answer = requests.post(server.url, headers=headers, params=params, data=body(latents), timeout=TIMEOUT)
    assert torch.equal(tensor_of(answer), locally(loaded, latents / 0.08489))


@pytest.fixture(scope="module")
def flux() -> Iterator[ServerThread]:
    running = ServerThread(tiny_flux())
    yield running
    running.close()


def test_sdnext_sends_flux_latents_without_their_batch_axis(flux: ServerThread) -> None:
    latents = torch.randn(16, 6, 10).bfloat16()
    params = {
        "input_tensor_type": "binary", **head(latents), "image_format": "png", "output_type": "pil", "width": 80, "height": 48,
        "scaling_factor": 0.3611, "shift_factor": 0.1159,
    }  # fmt: skip
    headers = {"Content-Type": "tensor/binary", "Accept": "image/png"}
    answer = requests.post(flux.url, headers=headers, params=params, data=body(latents), timeout=TIMEOUT)
    assert Image.open(io.BytesIO(answer.content)).size == (80, 48)


# --- ComfyUI-HFRemoteVae -------------------------------------------------------------------------------------------------


def test_comfyui_sends_height_and_width_with_4d_latents(server: ServerThread, loaded: LoadedVae, latents: torch.Tensor) -> None:
    params = {
        "do_scaling": False, "output_type": "pt", "partial_postprocess": False, **head(latents), "height": 64, "width": 96,
    }  # fmt: skip
    headers = {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}
    answer = requests.post(f"{server.url}/", params=params, data=body(latents), headers=headers, timeout=TIMEOUT)
    assert torch.equal(tensor_of(answer), locally(loaded, latents))


def test_the_legacy_base64_transport_works_both_ways(server: ServerThread, loaded: LoadedVae, latents: torch.Tensor) -> None:
    params = {"do_scaling": True, "output_type": "pt", "partial_postprocess": False, **head(latents)}
    headers = {"Content-Type": "tensor/base64", "Accept": "tensor/base64"}
    document = {"inputs": base64.b64encode(body(latents)).decode()}
    answer = requests.post(server.url, params=params, json=document, headers=headers, timeout=TIMEOUT)
    result = answer.json()
    assert result["parameters"] == {"shape": [1, 3, 64, 96], "dtype": "float32"}
    tensor = torch.frombuffer(bytearray(base64.b64decode(result["inputs"])), dtype=torch.float32).reshape(1, 3, 64, 96)
    # do_scaling=True without a factor: the server's own
    assert torch.equal(tensor, locally(loaded, latents / loaded.family.scaling_factor))


def test_an_encode_by_the_servers_own_factors_is_scaled_by_them(
    server: ServerThread, loaded: LoadedVae, pixels: torch.Tensor
) -> None:
    params = {"do_scaling": True, **head(pixels)}
    answer = requests.post(f"{server.url}/encode", params=params, data=body(pixels), timeout=TIMEOUT)
    with torch.inference_mode():
        mean = loaded.vae.encode(pixels).latent_dist.mode()
    assert torch.equal(tensor_of(answer), mean * loaded.family.scaling_factor)


# --- the rest of the protocol --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_the_answer_comes_in_the_dtype_of_the_request(server: ServerThread, latents: torch.Tensor, dtype: torch.dtype) -> None:
    assert tensor_of(decode(server, latents.to(dtype))).dtype == dtype


def test_uint8_latents_are_decoded_in_the_servers_dtype(server: ServerThread) -> None:
    latents = torch.randint(0, 9, (1, 4, 8, 8), dtype=torch.uint8)
    assert tensor_of(decode(server, latents)).dtype == torch.float32


def test_a_png_of_500_x_333_gives_62_x_41_latents_of_its_exact_levels(server: ServerThread, loaded: LoadedVae) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (333, 500, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    answer = requests.post(f"{server.url}/encode", data=buffer.getvalue(), params={"scaling_factor": 0.5}, timeout=TIMEOUT)
    with torch.inference_mode():
        expected = loaded.vae.encode(image_to_pixels(image)).latent_dist.mode() * 0.5
    latents = tensor_of(answer)
    assert latents.shape == (1, 4, 41, 62)
    assert torch.equal(latents, expected)


def test_uint8_pixels_are_encoded_as_the_picture_with_these_levels(server: ServerThread, pixels: torch.Tensor) -> None:
    levels = to_uint8(pixels)
    planes = levels.permute(0, 3, 1, 2)
    as_tensor = tensor_of(requests.post(f"{server.url}/encode", data=body(planes), params=head(planes), timeout=TIMEOUT))
    buffer = io.BytesIO()
    Image.fromarray(levels[0].numpy()).save(buffer, "PNG")
    assert torch.equal(as_tensor, tensor_of(requests.post(f"{server.url}/encode", data=buffer.getvalue(), timeout=TIMEOUT)))


# --- who the server is ---------------------------------------------------------------------------------------------------


def test_health_says_that_it_lives(server: ServerThread) -> None:
    assert requests.get(f"{server.url}/health", timeout=TIMEOUT).json() == {"status": "ok", "running": False, "waiting": 0}


def test_info_says_who_it_is_and_nothing_of_where_its_files_lie(server: ServerThread, loaded: LoadedVae) -> None:
    info = requests.get(f"{server.url}/info", timeout=TIMEOUT).json()
    assert info["server"] == "remote-vae"
    assert (info["family"], info["model"], info["dtype"], info["device"]) == ("custom", "demo_vae", "float32", "cpu")
    assert (info["latent_channels"], info["downscale"], info["scaling_factor"], info["shift_factor"]) == (4, 8, 0.08489, 0.0)
    assert info["fingerprint"] == fingerprint(loaded.vae.state_dict())
    assert info["fingerprint_bfloat16"] == fingerprint(loaded.vae.state_dict(), "bfloat16")
    assert info["fingerprint_float16_bfloat16"] == fingerprint(loaded.vae.state_dict(), "float16_bfloat16")
    assert info["posterior"] is True
    assert info["limits"] == {
        "max_pixels": 4096 * 4096,
        "max_batch": 32,
        "max_frames": 1025,
        "max_waiting": 64,
        "max_total_pixels": 4 * 4096 * 4096,
        "max_video_pixels": 1 << 27,
    }
    assert "/" not in json.dumps(info)


def test_a_slash_at_the_end_is_the_same_path(server: ServerThread, loaded: LoadedVae, latents: torch.Tensor) -> None:
    for path in ("/decode/", "/"):
        params = {**head(latents), "output_type": "pt"}
        answer = requests.post(server.url + path, data=body(latents), params=params, timeout=TIMEOUT, allow_redirects=False)
        assert torch.equal(tensor_of(answer), locally(loaded, latents))
    assert requests.get(f"{server.url}/info/", timeout=TIMEOUT, allow_redirects=False).status_code == 200


def test_a_browser_that_comes_by_reads_what_this_is(server: ServerThread) -> None:
    answer = requests.get(server.url, timeout=TIMEOUT)
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "Remote VAE" in answer.text
    assert "endpoint" in answer.text


def test_the_log_says_who_asked_for_what_and_how_long_it_took(
    server: ServerThread, latents: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "remote_vae"):
        decode(server, latents)
        requests.post(f"{server.url}/decode", params={**GOOD, "dtype": "float64"}, timeout=TIMEOUT)
    done, refused = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"decode custom 96x64 for 127\.0\.0\.1: 200, 0\.1 MB; waited [\d.]+ s, took [\d.]+ s", done)
    assert refused.startswith("/decode for 127.0.0.1: 400, shape and dtype")


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
def test_the_vae_that_a_client_means_answers_and_another_does_not(
    server: ServerThread, loaded: LoadedVae, latents: torch.Tensor, rounding: str
) -> None:
    meant = decode(server, latents, fingerprint=loaded.fingerprints[rounding])
    assert torch.equal(tensor_of(meant), locally(loaded, latents))
    other = decode(server, latents, fingerprint="0123456789abcdef")
    assert other.status_code == 409
    assert loaded.fingerprint in other.json()["error"]


# --- what nobody should send ---------------------------------------------------------------------------------------------


GOOD = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt"}


@pytest.mark.parametrize(
    ("params", "data", "message"),
    [
        ({}, bytes(1024), "lacks shape"),
        ({**GOOD, "shape": [1, 4, 8]}, bytes(128), "height"),
        ({**GOOD, "shape": [1, 16, 8, 8]}, bytes(4096), "4 channels"),
        ({**GOOD, "dtype": "float64"}, bytes(1024), "float64"),
        (GOOD, bytes(1020), "1020 bytes"),
        (GOOD, b"\xff" * 1024, "NaN"),
        ({**GOOD, "shape": [1, 4, 9000, 9000]}, b"", "at most 16777216"),
        ({**GOOD, "shape": [33, 4, 1, 1]}, bytes(528), "at most 32"),
        ({**GOOD, "shape": [5, 4, 512, 512]}, b"", "pixels in all"),
        # Sizes that are small as a picture and huge as a body: refused by the head, as no body comes.
        ({**GOOD, "shape": [1, 65536, 512, 512]}, b"", "4 channels"),
        ({**GOOD, "shape": [65536, 65536, 64], "height": 8, "width": 8}, b"", "neither packed"),
        ({**GOOD, "shape": [1, 65536, 65536], "height": 8, "width": 8}, b"", "neither packed"),
        ({**GOOD, "shape": [65536]}, b"", "4 channels"),
        ({**GOOD, "shape": [1, 4, 65537, 1]}, b"", "sizes"),
        ({**GOOD, "shape": [2, 4, 8, 8], "output_type": "pil"}, bytes(2048), "one by one"),
        ({**GOOD, "output_type": "mp4"}, bytes(1024), "video"),
        ({**GOOD, "shape": [1, 4, 1, 8, 8]}, b"", "expected picture latents"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_400_and_the_reason_in_json(
    server: ServerThread, params: dict[str, Any], data: bytes, message: str
) -> None:
    answer = requests.post(f"{server.url}/decode", params=params, data=data, timeout=TIMEOUT)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("params", "data", "message"),
    [
        ({}, b"", "not a PNG"),
        ({}, b"GIF89a", "not a PNG"),
        ({"shape": [1, 4, 8, 8], "dtype": "float32"}, bytes(1024), "[B, 3, H, W]"),
        ({"shape": [1, 3, 4, 4], "dtype": "float32"}, bytes(192), "at least 8 x 8"),
        ({"shape": [1, 3, 9000, 9000], "dtype": "float32"}, b"", "at most 16777216"),
        ({"shape": [1, 65536, 4096, 4096], "dtype": "float32"}, b"", "[B, 3, H, W]"),
        ({"shape": [1, 3, 9, 4096, 4096], "dtype": "float32"}, b"", "[B, 3, H, W]"),
        ({"scaling_factor": "x"}, b"", ""),
    ],
)
def test_a_picture_that_cannot_be_encoded_gets_400_and_the_reason_in_json(
    server: ServerThread, params: dict[str, Any], data: bytes, message: str
) -> None:
    answer = requests.post(f"{server.url}/encode", params=params, data=data, timeout=TIMEOUT)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize("path", ["/decode", "/encode"])
def test_a_body_of_a_thousand_brackets_is_a_400(server: ServerThread, path: str) -> None:
    """json.loads goes through as many frames."""
    data, headers = b"[" * 1000, {"Content-Type": "tensor/base64"}
    answer = requests.post(
        f"{server.url}{path}", params=GOOD if path == "/decode" else {}, data=data, headers=headers, timeout=TIMEOUT
    )
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_a_server_of_a_vae_of_no_family_answers_for_all(server: ServerThread) -> None:
    assert decode(server, torch.zeros(1, 4, 8, 8), family="sd77").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/decode", 405), ("POST", "/nowhere", 404), ("GET", "/nowhere", 404), ("GET", "/a/b/c", 404), ("PUT", "/", 405)],
)
def test_every_error_is_json_whatever_its_status(server: ServerThread, method: str, path: str, status: int) -> None:
    answer = requests.request(method, server.url + path, timeout=TIMEOUT)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_latents_of_another_family_are_refused(flux: ServerThread) -> None:
    answer = decode(flux, torch.zeros(1, 16, 8, 8), family="sd3")
    assert answer.status_code == 400
    assert "Flux" in answer.json()["error"]
    assert decode(flux, torch.zeros(1, 16, 8, 8), family="chroma").status_code == 200


# --- tokens -----------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(loaded: LoadedVae) -> Iterator[ServerThread]:
    running = ServerThread(loaded, token="s3cret")
    yield running
    running.close()


def test_without_the_token_only_health_and_the_page_answer(guarded: ServerThread) -> None:
    assert requests.get(guarded.url, timeout=TIMEOUT).ok
    assert requests.get(f"{guarded.url}/health", timeout=TIMEOUT).json() == {"status": "ok"}
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "s3cret"},
        {"Authorization": "Bearer ü".encode("latin1")},
    ):
        for method, path in (("GET", "/info"), ("POST", "/decode"), ("POST", "/encode"), ("POST", "/")):
            answer = requests.request(method, guarded.url + path, headers=headers, timeout=TIMEOUT)
            assert answer.status_code == 401
            assert "REMOTE_VAE_TOKEN" in answer.json()["error"]
    good = {"Authorization": "Bearer s3cret"}
    assert requests.get(f"{guarded.url}/info", headers=good, timeout=TIMEOUT).ok
    assert "waiting" in requests.get(f"{guarded.url}/health", headers=good, timeout=TIMEOUT).json()
    assert requests.post(f"{guarded.url}/decode", headers=good, params=GOOD, data=bytes(1024), timeout=TIMEOUT).ok


def test_the_client_sends_the_token_of_its_environment(
    guarded: ServerThread, monkeypatch: pytest.MonkeyPatch, latents: torch.Tensor
) -> None:
    asked = partial(remote_decode, guarded.url, latents, scaling_factor=1.0, output_type="pt", partial_postprocess=True)
    with pytest.raises(RuntimeError, match="REMOTE_VAE_TOKEN"):
        asked()
    monkeypatch.setenv("REMOTE_VAE_TOKEN", "s3cret")
    assert asked().size == (96, 64)
