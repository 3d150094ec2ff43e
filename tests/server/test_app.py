"""The server, spoken to as diffusers', SD.Next's and ComfyUI-HFRemoteVae's clients do, and as nobody should."""

from __future__ import annotations

import base64
import copy
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from remote_vae.local import route
from remote_vae.server import engine
from remote_vae.server.engine import Limits
from remote_vae.server.models import LoadedVae
from remote_vae.vae.fingerprint import fingerprint
from remote_vae.wire.pixels import image_to_pixels, to_uint8
from tests.conftest import ServerThread
from tests.nearness import no_room_for_the_whole, out_of_memory, psnr
from tests.vaes import tiny_flux

TIMEOUT = 30


def body(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def head(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[-1]}


def tensor_of(answer: requests.Response) -> torch.Tensor:
    assert answer.status_code == 200, answer.text
    dtype = getattr(torch, answer.headers["dtype"])
    return torch.frombuffer(bytearray(answer.content), dtype=dtype).reshape(json.loads(answer.headers["shape"]))


def locally(loaded: LoadedVae, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.vae.decode(latents.to(loaded.dtype), return_dict=False)[0]


# --- the bar: raw tensors are bit-equal, 8 bits within a level -----------------------------------------------------------


def test_a_raw_decode_is_bit_equal_to_the_same_vae_called_here(server: ServerThread, loaded: LoadedVae) -> None:
    latents = torch.randn(3, 4, 8, 12)
    answer = requests.post(
        f"{server.url}/decode", data=body(latents), params={**head(latents), "output_type": "pt"}, timeout=TIMEOUT
    )
    assert torch.equal(tensor_of(answer), locally(loaded, latents))


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


# --- the rest of the protocol --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_the_answer_comes_in_the_dtype_of_the_request(server: ServerThread, latents: torch.Tensor, dtype: torch.dtype) -> None:
    latents = latents.to(dtype)
    answer = requests.post(
        f"{server.url}/decode", data=body(latents), params={**head(latents), "output_type": "pt"}, timeout=TIMEOUT
    )
    assert tensor_of(answer).dtype == dtype


def test_uint8_latents_are_decoded_in_the_servers_dtype(server: ServerThread) -> None:
    latents = torch.randint(0, 9, (1, 4, 8, 8), dtype=torch.uint8)
    answer = requests.post(
        f"{server.url}/decode", data=body(latents), params={**head(latents), "output_type": "pt"}, timeout=TIMEOUT
    )
    assert tensor_of(answer).dtype == torch.float32


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
        "max_frames": 257,
        "max_waiting": 64,
        "max_total_pixels": 4 * 4096 * 4096,
    }
    assert "/" not in json.dumps(info)


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
        (GOOD, bytes(20_000), "longer than"),
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
        ({**GOOD, "shape": [1, 4, 1, 8, 8]}, bytes(1024), "picture latents"),
        ({**GOOD, "family": "sd77"}, bytes(1024), ""),
    ],
)
def test_a_request_that_cannot_be_answered_gets_400_and_the_reason_in_json(
    server: ServerThread, params: dict[str, Any], data: bytes, message: str
) -> None:
    answer = requests.post(f"{server.url}/decode", params=params, data=data, timeout=TIMEOUT)
    if params.get("family"):
        # A server of a custom VAE has no family to compare with.
        assert answer.status_code == 200
        return
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


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/decode", 405), ("POST", "/nowhere", 404), ("GET", "/docs", 404)]
)
def test_every_error_is_json_whatever_its_status(server: ServerThread, method: str, path: str, status: int) -> None:
    answer = requests.request(method, server.url + path, timeout=TIMEOUT)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_latents_of_another_family_are_refused(flux: ServerThread) -> None:
    latents = torch.zeros(1, 16, 8, 8)
    params = {**head(latents), "output_type": "pt", "family": "sd3"}
    answer = requests.post(flux.url, params=params, data=body(latents), timeout=TIMEOUT)
    assert answer.status_code == 400
    assert "Flux" in answer.json()["error"]
    same = requests.post(flux.url, params={**params, "family": "chroma"}, data=body(latents), timeout=TIMEOUT)
    assert same.status_code == 200


def test_an_error_of_the_vae_is_a_500_with_its_words(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a defect of the VAE")

    monkeypatch.setattr(server.engine.loaded.vae, "decode", broken)
    answer = requests.post(f"{server.url}/decode", params=GOOD, data=bytes(1024), timeout=TIMEOUT)
    assert answer.status_code == 500
    assert "a defect of the VAE" in answer.json()["error"]


def test_out_of_memory_is_tried_again_tiled_and_then_a_507(
    server: ServerThread, loaded: LoadedVae, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> requests.Response:
        params = {**head(latents), "output_type": "pt"}
        return requests.post(f"{server.url}/decode", params=params, data=body(latents), timeout=TIMEOUT)

    vae = server.engine.loaded.vae
    whole, tilings = locally(loaded, latents), []

    def run_out(*args: Any, **kwargs: Any) -> Any:
        tilings.append(vae.use_tiling)
        out_of_memory()

    monkeypatch.setattr(vae.decoder, "forward", run_out)
    assert psnr(tensor_of(asked()), whole) >= 100
    assert tilings == [False]

    # Too little for anything: the whole VAE is not even tried, the tiles that it brings along are.
    monkeypatch.setattr(route, "available_memory", lambda device: 1000)
    answer = asked()
    assert answer.status_code == 507
    assert "memory" in answer.text
    assert tilings == [False, True]
    assert not vae.use_tiling


def test_a_picture_that_does_not_fit_whole_is_encoded_in_tiles(
    server: ServerThread, loaded: LoadedVae, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        whole = loaded.vae.encode(pixels).latent_dist.parameters
    seen = no_room_for_the_whole(monkeypatch, server.engine.loaded.vae)
    params = {**head(pixels), "posterior": True}
    answer = requests.post(f"{server.url}/encode", data=body(pixels), params=params, timeout=TIMEOUT)
    assert psnr(tensor_of(answer), whole) >= 100
    assert seen == ["encoder"]


def test_a_picture_for_which_memory_is_short_is_not_tried_whole(
    server: ServerThread, loaded: LoadedVae, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = locally(loaded, latents)
    seen = no_room_for_the_whole(monkeypatch, server.engine.loaded.vae)
    monkeypatch.setattr(engine, "whole_fits", lambda *_: False)
    params = {**head(latents), "output_type": "pt"}
    answer = requests.post(f"{server.url}/decode", params=params, data=body(latents), timeout=TIMEOUT)
    assert psnr(tensor_of(answer), whole) >= 100
    assert seen == []


def test_a_vae_of_an_unknown_layout_is_tiled_in_its_own_way(loaded: LoadedVae, latents: torch.Tensor) -> None:
    own = replace(loaded, vae=copy.deepcopy(loaded.vae))
    own.vae.decoder.colour = torch.nn.Conv2d(3, 3, 1)
    original, tilings = type(own.vae).decode, []

    def decode(z: torch.Tensor, **kwargs: Any) -> Any:
        tilings.append(own.vae.use_tiling)
        return original(own.vae, z, **kwargs) if own.vae.use_tiling else out_of_memory()

    own.vae.decode = decode
    running = ServerThread(own)
    try:
        params = {**head(latents), "output_type": "pt"}
        answer = requests.post(f"{running.url}/decode", params=params, data=body(latents), timeout=TIMEOUT)
        # So small a picture is a single tile.
        assert torch.equal(tensor_of(answer), locally(loaded, latents))
    finally:
        running.close()
    assert tilings == [False, True]


def test_half_precision_that_gives_nan_goes_on_in_float32(loaded: LoadedVae) -> None:
    own = replace(loaded, vae=copy.deepcopy(loaded.vae).half())
    original = type(own.vae).decode

    def decode(z: torch.Tensor, **kwargs: Any) -> Any:
        result = original(own.vae, z, **kwargs)
        return (result[0] * float("nan"),) if z.dtype == torch.float16 else result

    own.vae.decode = decode
    running = ServerThread(own)
    try:
        latents = torch.zeros(1, 4, 8, 8).half()
        for _ in range(2):
            answer = requests.post(
                f"{running.url}/decode", params={**head(latents), "output_type": "pt"}, data=body(latents), timeout=TIMEOUT
            )
            assert torch.isfinite(tensor_of(answer)).all()
        assert running.engine.info()["dtype"] == "float32"
    finally:
        running.close()


# --- tokens, limits, queue -----------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(loaded: LoadedVae) -> Iterator[ServerThread]:
    running = ServerThread(loaded, token="s3cret", limits=Limits(max_pixels=64 * 64, max_batch=2, max_waiting=2))
    yield running
    running.close()


def test_without_the_token_only_health_answers(guarded: ServerThread) -> None:
    assert requests.get(f"{guarded.url}/health", timeout=TIMEOUT).ok
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
    assert requests.post(f"{guarded.url}/decode", headers=good, params=GOOD, data=bytes(1024), timeout=TIMEOUT).ok


def test_the_client_sends_the_token_of_its_environment(
    guarded: ServerThread, monkeypatch: pytest.MonkeyPatch, latents: torch.Tensor
) -> None:
    from remote_vae.errors import EndpointError
    from remote_vae.remote.client import client_for
    from remote_vae.wire import DecodeRequest

    client = client_for(f"{guarded.url}/decode")
    request = DecodeRequest(latents[..., :8])
    with pytest.raises(EndpointError, match="REMOTE_VAE_TOKEN"):
        client.decode(request)
    monkeypatch.setenv("REMOTE_VAE_TOKEN", "s3cret")
    assert client.decode(request).answer.tensor.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("/decode", [1, 4, 9, 8], "at most 4096"),
        ("/decode", [3, 4, 1, 1], "at most 2"),
        ("/encode", [1, 3, 65, 64], "at most 4096"),
    ],
)
def test_a_limit_is_kept_before_the_body_is_read(guarded: ServerThread, path: str, shape: list[int], message: str) -> None:
    """The body never comes: an answer shows that nobody waited for it."""
    query = "&".join(f"shape={size}" for size in shape) + "&dtype=float32"
    with socket.create_connection(("127.0.0.1", int(guarded.url.rpartition(":")[2])), timeout=TIMEOUT) as connection:
        headers = "Host: x\r\nAuthorization: Bearer s3cret\r\nContent-Length: 999999999"
        connection.sendall(f"POST {path}?{query} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(4096)
    assert b"400" in answer.split(b"\r\n")[0]
    assert message.encode() in answer


def test_a_png_larger_than_the_limit_is_refused(guarded: ServerThread) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (65, 64)).save(buffer, "PNG")
    headers = {"Authorization": "Bearer s3cret"}
    answer = requests.post(f"{guarded.url}/encode", data=buffer.getvalue(), headers=headers, timeout=TIMEOUT)
    assert answer.status_code == 400
    assert "at most 4096" in answer.json()["error"]


def test_calls_wait_their_turn_a_full_queue_says_503_and_a_client_that_left_is_not_served(guarded: ServerThread) -> None:
    vae = guarded.engine.loaded.vae
    gate, entered, served = threading.Event(), threading.Event(), []
    original = vae.decode

    def slow(z: torch.Tensor, **kwargs: Any) -> Any:
        served.append(z.shape[0])
        entered.set()
        gate.wait(20)
        return original(z, **kwargs)

    headers = {"Authorization": "Bearer s3cret"}
    results: dict[str, int] = {}

    def post(name: str, batch: int) -> None:
        params = {**GOOD, "shape": [batch, 4, 8, 8]}
        answer = requests.post(
            f"{guarded.url}/decode", params=params, data=bytes(1024 * batch), headers=headers, timeout=TIMEOUT
        )
        results[name] = answer.status_code

    vae.decode = slow
    try:
        first = threading.Thread(target=post, args=("first", 1))
        first.start()
        assert entered.wait(10)
        # A second client takes the last place in the queue and leaves before its turn.
        query = "shape=2&shape=4&shape=8&shape=8&dtype=float32&output_type=pt"
        leaver = socket.create_connection(("127.0.0.1", int(guarded.url.rpartition(":")[2])))
        leaver.sendall(
            f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\nContent-Length: 2048\r\n\r\n".encode()
            + bytes(2048)
        )
        deadline = time.monotonic() + 10
        while requests.get(f"{guarded.url}/health", timeout=TIMEOUT).json() != {"status": "ok", "running": True, "waiting": 1}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        post("third", 1)
        assert results == {"third": 503}
        leaver.close()
        gate.set()
        first.join()
        post("fourth", 1)
    finally:
        gate.set()
        del vae.decode
    assert results == {"third": 503, "first": 200, "fourth": 200}
    assert served == [1, 1]


def test_a_client_that_leaves_the_queue_frees_its_place_at_once(guarded: ServerThread) -> None:
    vae = guarded.engine.loaded.vae
    gate, entered = threading.Event(), threading.Event()
    original = vae.decode

    def slow(z: torch.Tensor, **kwargs: Any) -> Any:
        entered.set()
        gate.wait(20)
        return original(z, **kwargs)

    def send() -> socket.socket:
        query = "shape=1&shape=4&shape=8&shape=8&dtype=float32&output_type=pt"
        client = socket.create_connection(("127.0.0.1", int(guarded.url.rpartition(":")[2])))
        headers = "Host: x\r\nAuthorization: Bearer s3cret\r\nContent-Length: 1024"
        client.sendall(f"POST /decode?{query} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + bytes(1024))
        return client

    def wait_for(waiting: int) -> None:
        deadline = time.monotonic() + 10
        wanted = {"status": "ok", "running": True, "waiting": waiting}
        while requests.get(f"{guarded.url}/health", timeout=TIMEOUT).json() != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    vae.decode = slow
    try:
        with send():
            assert entered.wait(10)
            with send():
                wait_for(1)
            # The first call still runs.
            wait_for(0)
            gate.set()
    finally:
        gate.set()
        del vae.decode
