"""Long videos: the memory that an answer takes, and what goes wrong in minutes of work."""

from __future__ import annotations

import copy
import io
import sys
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
import requests
import torch

from bench.live_bytes import LiveBytes
from remote_vae.server.admission import Limits
from remote_vae.server.catalogue import OneVae
from remote_vae.server.models import LoadedVae
from remote_vae.server.moving import moved
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import family_of
from remote_vae.wire import FINGERPRINT_KEYS, DecodeRequest, HttpResponse, Output
from remote_vae.wire.pixels import to_uint8
from tests.conftest import ServerThread
from tests.nearness import out_of_memory, psnr, psnr_of_moments
from tests.pretend_gpu import DEVICE, Card
from tests.server.asking import TIMEOUT, Raw, body, decode, head, tensor_of, wait_until
from tests.server.at_once import answers
from tests.sharing import Sharing
from tests.vaes import small_vae

FRAMES = 4
LATENTS = torch.randn(1, 16, FRAMES, 4, 6, generator=torch.Generator().manual_seed(1))
PIXELS = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
MP4 = {"output_type": "mp4"}


@pytest.fixture(scope="module")
def vae() -> Any:
    """Never changed."""
    return small_vae("wan")


def serving(vae: Any, **options: Any) -> ServerThread:
    return ServerThread(LoadedVae(vae, family_of(vae), "wan", dict.fromkeys(FINGERPRINT_KEYS, "0" * 16)), **options)


@pytest.fixture
def wan(vae: Any) -> Iterator[ServerThread]:
    """A server whose VAE may be broken."""
    running = serving(copy.deepcopy(vae))
    yield running
    running.close()


def decoded(vae: Any, latents: torch.Tensor = LATENTS) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return made


def health(server: ServerThread) -> dict[str, Any]:
    return dict(requests.get(f"{server.url}/health", timeout=TIMEOUT).json())


# --- memory --------------------------------------------------------------------------------------------------------------


class Made(Sharing):
    """A video VAE that has made its pixels before it is asked."""

    def __init__(self, vae: Any, pixels: torch.Tensor) -> None:
        super().__init__()
        self._made = [pixels]
        self._at_work = VaeAtWork(vae, family_of(vae), whole=self._whole)

    def current(self) -> VaeAtWork:
        return self._at_work

    def _whole(self, module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
        # Nobody else has it, as nobody has what a VAE makes.
        return self._made.pop()


@pytest.mark.parametrize(
    ("output", "dtype", "share"),
    [(Output.TENSOR, torch.float32, 0.0), (Output.TENSOR, torch.float16, 0.5), (Output.UINT8, torch.float32, 0.25)],
)
def test_beside_the_pixels_there_is_only_the_answer_and_a_frame(
    vae: Any, output: Output, dtype: torch.dtype, share: float
) -> None:
    pixels = torch.rand(1, 3, 81, 64, 96) * 2 - 1
    size, frame = pixels.nbytes, pixels.nbytes / 81
    entry, request = OneVae(Made(vae, pixels)), DecodeRequest(torch.zeros(1, 16, 21, 8, 12, dtype=dtype), output)
    del pixels
    # Nothing that is made before counts.
    with LiveBytes() as live:
        answer = answers(entry, [request])[0]
    assert isinstance(answer, HttpResponse)
    assert len(answer.body) == pytest.approx(size * (share or 1.0))
    assert live.peak["cpu"] <= share * size + 8 * frame


def test_a_video_crosses_over_to_the_card_and_back_frame_by_frame(card: Card) -> None:
    pixels = torch.rand(1, 3, 16, 32, 32)
    there = moved(pixels, DEVICE, torch.float16)
    assert (there.device, there.dtype) == (DEVICE, torch.float16)
    back = []
    # In float32, as it is to be: one of its frames.
    assert card.taken_by(lambda: back.append(moved(there, "cpu", torch.float32))) == pixels.nbytes // 16
    assert torch.equal(back[0], pixels.half().float())


# --- mp4 -----------------------------------------------------------------------------------------------------------------


def test_an_mp4_has_every_frame(wan: ServerThread, vae: Any) -> None:
    answer = decode(wan, LATENTS, **MP4)
    assert answer.headers["Content-Type"] == "video/mp4"
    with av.open(io.BytesIO(answer.content)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    levels = to_uint8(decoded(vae)[0].movedim(1, 0)).numpy()
    assert np.stack(frames).shape == levels.shape
    # The film is lossy; another order of the frames is further away.
    assert np.abs(np.stack(frames).astype(float) - levels).mean() < np.abs(levels.astype(float)[::-1] - levels).mean()


def test_without_its_encoder_an_mp4_is_refused_before_the_vae_works(wan: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with Raw(wan) as connection:
        query = "&".join(f"shape={size}" for size in LATENTS.shape) + "&dtype=float32&output_type=mp4"
        connection.send(f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {LATENTS.nbytes}\r\n\r\n".encode())
        status, _, answer = connection.answer()
    assert status == 400
    assert b"install the package av" in answer


# --- clients that leave --------------------------------------------------------------------------------------------------


class Slow:
    """A decoder that comes to no end with its second frame; ``frames`` that it was asked for."""

    def __init__(self, vae: Any) -> None:
        self.frames = 0
        whole = vae.decoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.frames += 1
            until = time.monotonic() + 20
            while self.frames > 1 and time.monotonic() < until:
                torch.ones(1)
            return whole(*args, **kwargs)

        vae.decoder.forward = forward


def test_health_says_that_a_video_is_worked_on_and_the_work_ends_when_the_client_leaves(wan: ServerThread, vae: Any) -> None:
    slow = Slow(wan.loaded.vae)
    with Raw(wan) as leaver:
        leaver.post("/decode", tuple(LATENTS.shape), LATENTS.nbytes)
        wait_until(lambda: slow.frames == 2)
        assert health(wan) == {"status": "ok", "running": True, "waiting": 0}
    wait_until(lambda: health(wan) == {"status": "ok", "running": False, "waiting": 0})
    assert slow.frames == 2
    # What the VAE keeps of the frames before is given back.
    assert not any(isinstance(kept, torch.Tensor) for kept in wan.loaded.vae._feat_map)
    del wan.loaded.vae.decoder.forward
    assert torch.equal(tensor_of(decode(wan, LATENTS)), decoded(vae))


def test_a_client_that_leaves_in_the_middle_of_its_answer_gives_its_place_back(vae: Any) -> None:
    """It is alone, and so let in for 64 MB; a second has no room beside it until then."""
    own = copy.deepcopy(vae)
    running = serving(own, limits=Limits(max_bytes=1 << 20))
    own.decode = lambda z, **_: (torch.zeros(1, 3, 81, 256, 256),)
    try:
        with Raw(running, receive_bytes=4096) as leaver:
            leaver.post("/decode", (1, 16, 21, 32, 32), 21 * 16 * 32 * 32 * 4)
            assert leaver.socket.recv(64).startswith(b"HTTP/1.1 200")
            del own.decode
            assert decode(running, LATENTS).status_code == 503
        wait_until(lambda: decode(running, LATENTS).status_code == 200)
    finally:
        running.close()


def test_the_answer_to_an_encode_that_is_not_read_keeps_its_place(vae: Any) -> None:
    """A picture's file, or a small tensor, says nothing of the bytes that its latents take."""
    own = copy.deepcopy(vae)
    running = serving(own, limits=Limits(max_bytes=1 << 20))
    own.encode = lambda x, **_: (torch.zeros(1, 32, 1, 512, 1024),)
    try:
        with Raw(running, receive_bytes=4096) as slow:
            slow.post("/encode", (1, 3, 1, 8, 8), 3 * 64 * 4)
            assert slow.socket.recv(64).startswith(b"HTTP/1.1 200")
            assert decode(running, LATENTS).status_code == 503
        wait_until(lambda: decode(running, LATENTS).status_code == 200)
    finally:
        running.close()


# --- NaN and memory ------------------------------------------------------------------------------------------------------


def test_nan_of_a_video_in_half_precision_is_one_call_in_float32(vae: Any) -> None:
    half = copy.deepcopy(vae).half()

    def broken(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if output.dtype == torch.float16 else output

    for part in (half.decoder, half.encoder):
        part.register_forward_hook(broken)
    running = serving(half)
    exact = copy.deepcopy(vae).half().float()
    try:
        assert psnr(tensor_of(decode(running, LATENTS)), decoded(exact)) >= 80
        with torch.inference_mode():
            moments = exact.encode(PIXELS).latent_dist.parameters
        params = {**head(PIXELS), "posterior": True}
        encoded = requests.post(f"{running.url}/encode", data=body(PIXELS), params=params, timeout=TIMEOUT)
        assert psnr_of_moments(tensor_of(encoded), moments) >= 65
        assert half.dtype == torch.float16
    finally:
        running.close()


def test_a_video_that_is_nan_in_float32_as_well_is_an_error_in_every_form(wan: ServerThread) -> None:
    wan.loaded.vae.decoder.conv_out.bias.fill_(float("nan"))
    for form in ({}, {"partial_postprocess": True}, MP4):
        answer = decode(wan, LATENTS, **form)
        assert answer.status_code == 422
        assert "NaN or infinite" in answer.json()["error"]


def test_a_video_that_does_not_fit_is_made_in_tiles(wan: ServerThread, vae: Any) -> None:
    own = wan.loaded.vae
    tilings: list[bool] = []
    whole = type(own).decode

    def decode_in_tiles(z: torch.Tensor, **kwargs: Any) -> Any:
        tilings.append(own.use_tiling)
        return whole(own, z, **kwargs) if own.use_tiling else out_of_memory()

    own.decode = decode_in_tiles
    assert psnr(tensor_of(decode(wan, LATENTS)), decoded(vae)) >= 100
    assert tilings[0] is False
    assert not own.use_tiling


def test_a_video_that_fits_nowhere_is_a_507(wan: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    from remote_vae.local import route

    monkeypatch.setattr(type(wan.loaded.vae), "decode", out_of_memory)
    monkeypatch.setattr(route, "on_cpu", out_of_memory)
    monkeypatch.setattr(route, "_known", lambda call: None)
    answer = decode(wan, LATENTS)
    assert answer.status_code == 507
    assert "memory" in answer.json()["error"]
