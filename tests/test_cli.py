from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image

from remote_vae.cli import main
from remote_vae.rescue import load_latents, save, write
from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.settings import load_options
from remote_vae.tools.flags import PANEL_ONLY
from remote_vae.vae.families import family_of, find_family, recognise
from remote_vae.vae.packed import batch_norm_of
from remote_vae.wire.pixels import image_to_pixels, to_uint8
from tests.chaos import Chaos
from tests.conftest import DEMO_VAE, ServerThread
from tests.nearness import out_of_memory
from tests.vaes import loaded as loaded_vae
from tests.vaes import small_kl, small_vae, tiny_video

_SAID = ("VAE: custom", "decode: works", "encode: works")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The level of the log, which every command sets."""
    log = logging.getLogger("remote_vae")
    before = log.level
    yield
    log.setLevel(before)


@pytest.fixture
def rescued(tmp_path: Path, loaded: LoadedVae, latents: torch.Tensor) -> Path:
    return save(latents.repeat(2, 1, 1, 1), loaded.family, [tmp_path], "out of memory")


def local(loaded: LoadedVae, latents: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return to_uint8(loaded.vae.decode(latents).sample).numpy()


def test_rescued_latents_become_the_pictures_they_would_have_been(
    rescued: Path, server: ServerThread, loaded: LoadedVae, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected = local(loaded, load_latents(rescued).latents)
    for picture, levels in zip(decoded(rescued, ["--endpoint", server.url], capsys, tmp_path), expected, strict=True):
        assert np.array_equal(picture, levels)


def test_rescued_latents_become_the_exact_pictures_in_tiles_by_a_vae_of_this_machine(
    rescued: Path, loaded: LoadedVae, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        whole = loaded.vae.decode(load_latents(rescued).latents).sample
    levels = ((whole / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    # What is here has failed to decode as a whole.
    monkeypatch.setattr(Decoder, "forward", out_of_memory)
    for picture, exact in zip(decoded(rescued, ["--vae", str(DEMO_VAE)], capsys, tmp_path), levels, strict=True):
        # Half a level of rounding, and what 100 dB are of 255 levels.
        assert np.abs(picture - exact).max() <= 0.5 + 0.0026


def test_rescued_latents_of_flux2_that_are_packed_become_the_picture_by_a_vae_of_this_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    vae = small_vae("flux2")
    vae.save_pretrained(tmp_path / "vae")
    norm = batch_norm_of(vae)
    assert norm is not None
    packed = torch.randn(2, 128, 2, 3, generator=torch.Generator().manual_seed(4))
    family = replace(find_family("flux2"), latent_channels=128, downscale=16)
    path = save(packed, family, [tmp_path], "no endpoint")
    with torch.no_grad():
        expected = to_uint8(vae.decode(norm.raw(packed)).sample)
    for picture, levels in zip(decoded(path, ["--vae", str(tmp_path / "vae")], capsys, tmp_path), expected, strict=True):
        assert np.abs(picture.astype(int) - levels.numpy().astype(int)).max() <= 1


def decoded(rescued: Path, target: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> list[np.ndarray]:
    """The pictures that the command makes of ``rescued``."""
    assert main(["decode", str(rescued), "--out", str(tmp_path / "out.png"), *target]) == 0
    written = capsys.readouterr().out.split()
    assert written == [str(tmp_path / f"out-{number}.png") for number in range(len(written))]
    return [np.asarray(Image.open(path)) for path in written]


def test_a_picture_becomes_latents_and_a_picture_again(
    server: ServerThread, loaded: LoadedVae, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "photo.png")
    endpoint = ["--endpoint", server.url, "--transfer", "raw"]
    assert main(["encode", str(tmp_path / "photo.png"), "--family", "sd1", *endpoint]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file == tmp_path / "photo.safetensors"
    (tmp_path / "photo.png").unlink()
    with torch.inference_mode():
        expected = loaded.vae.encode(image_to_pixels(picture)).latent_dist.mode()
    assert torch.equal(load_latents(file).latents, expected)
    assert main(["decode", str(file), *endpoint]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "photo.png")), local(loaded, expected)[0])


def test_what_is_there_is_not_overwritten_unless_it_was_named(
    server: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Web UIs keep a checkpoint's preview beside it: model.png beside model.safetensors."""
    Image.new("RGB", (64, 64)).save(tmp_path / "model.png")
    picture = (tmp_path / "model.png").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(b"a checkpoint")
    encode = ["encode", str(tmp_path / "model.png"), "--family", "sd1", "--endpoint", server.url]
    for name in ("model-1.safetensors", "model-2.safetensors"):
        assert main(encode) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
    latents = tmp_path / "model-1.safetensors"
    latents.rename(tmp_path / "model.latents")
    for name in ("model-1.png", "model-2.png"):
        assert main(["decode", str(tmp_path / "model.latents"), "--endpoint", server.url]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
    assert (tmp_path / "model.safetensors").read_bytes() == b"a checkpoint"
    assert (tmp_path / "model.png").read_bytes() == picture
    assert main([*encode, "--out", str(tmp_path / "model.safetensors")]) == 0
    assert load_latents(tmp_path / "model.safetensors").family == find_family("sd1")


def test_the_next_free_name_is_never_that_of_another_picture_of_the_batch(
    rescued: Path, server: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{rescued.stem}-0.png").write_bytes(b"mine")
    assert main(["decode", str(rescued), "--endpoint", server.url]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == [f"{rescued.stem}-0-1.png", f"{rescued.stem}-1.png"]
    assert (tmp_path / f"{rescued.stem}-0.png").read_bytes() == b"mine"


@pytest.fixture(scope="module")
def sdxl() -> Iterator[ServerThread]:
    """A server that says that it has an SDXL VAE, and takes nothing for another."""
    running = ServerThread(load_vae(str(DEMO_VAE), family="sdxl", dtype="float32", device="cpu"))
    yield running
    running.close()


def test_check_and_encode_take_the_family_from_the_endpoint(
    sdxl: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--endpoint", sdxl.url]) == 0
    assert capsys.readouterr().out.count("works, SDXL, 256 x 256") == 2
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    assert main(["encode", str(tmp_path / "photo.png"), "--endpoint", sdxl.url]) == 0
    assert load_latents(tmp_path / "photo.safetensors").family == find_family("sdxl")
    capsys.readouterr()
    assert main(["check", "--endpoint", sdxl.url, "--family", "sd1"]) == 1
    assert capsys.readouterr().out.count("this server has the VAE of SDXL") == 2


def test_a_vae_without_a_name_is_known_by_its_factors(server: ServerThread, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    assert main(["encode", str(tmp_path / "photo.png"), "--endpoint", server.url]) == 0
    family = load_latents(tmp_path / "photo.safetensors").family
    assert (family.key, family.scaling_factor) == ("custom", 0.08489)


def test_a_photo_is_encoded_upright_and_a_16_bit_picture_by_its_white(
    server: ServerThread, loaded: LoadedVae, tmp_path: Path
) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    upright = Image.fromarray(levels)
    turned = Image.Exif()
    turned[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "photo.png", exif=turned)
    Image.fromarray(levels[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey.png")
    for name, expected in (("photo", upright), ("grey", Image.fromarray(levels[..., 0]).convert("RGB"))):
        assert main(["encode", str(tmp_path / f"{name}.png"), "--endpoint", server.url, "--transfer", "raw"]) == 0
        with torch.inference_mode():
            latents = loaded.vae.encode(image_to_pixels(expected)).latent_dist.mode()
        assert torch.equal(load_latents(tmp_path / f"{name}.safetensors").latents, latents)


def test_where_the_endpoint_does_not_say_its_family_encode_says_what_to_name(
    chaos: Chaos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chaos.info = "404 html"
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    assert main(["encode", str(tmp_path / "photo.png"), "--endpoint", chaos.url]) == 1
    assert "--family sd1" in capsys.readouterr().err
    assert main(["encode", str(tmp_path / "photo.png")]) == 1
    assert "--endpoint" in capsys.readouterr().err
    assert chaos.requests == []


def test_check_says_that_an_endpoint_works(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--endpoint", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    # How quick the line is, too, where this machine is quick.
    lines = [line for line in lines if not line.startswith("line: ")]
    assert [line.split(",")[0] for line in lines] == [*_SAID, lines[-1].split(",")[0]]
    assert all("in the VAE" in line and "MB/s on the way" in line and "bytes up" in line for line in lines[1:3])
    assert lines[-1].startswith(f"next: enter {server.url} as Endpoint")


def test_check_says_whether_the_endpoint_has_the_users_vae(
    server: ServerThread, sdxl: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--endpoint", server.url, "--vae", str(DEMO_VAE)]) == 0
    assert f"fingerprint {server.loaded.fingerprint}" in capsys.readouterr().out
    assert main(["check", "--endpoint", sdxl.url, "--vae", str(DEMO_VAE)]) == 0
    assert "yours: the same as" in capsys.readouterr().out
    small_kl("sd1").save_pretrained(tmp_path / "mine")
    assert main(["check", "--endpoint", server.url, "--vae", str(tmp_path / "mine"), "--family", "sd1"]) == 1
    assert "yours: another one; your UI would make its pictures itself" in capsys.readouterr().out


def test_check_asks_a_video_vae_for_a_video(capsys: pytest.CaptureFixture[str]) -> None:
    running = ServerThread(tiny_video())
    assert main(["check", "--endpoint", running.url]) == 0
    running.close()
    assert "\ndecode: works, HunyuanVideo" in capsys.readouterr().out


@pytest.fixture
def video() -> Iterator[ServerThread]:
    """A server of Wan's VAE."""
    running = ServerThread(loaded_vae(small_vae("wan"), "qwen-image"))
    yield running
    running.close()


def test_rescued_frames_become_pictures_and_a_video(
    video: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = torch.randn(1, 16, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    file = save(latents, find_family("qwen-image"), [tmp_path], "because")
    with torch.inference_mode():
        expected = to_uint8(video.loaded.vae.decode(latents).sample[0].movedim(1, 0)).numpy()
    assert len(expected) == 5
    for picture, levels in zip(decoded(file, ["--endpoint", video.url], capsys, tmp_path), expected, strict=True):
        assert np.array_equal(picture, levels)
    clip = tmp_path / "clip.mp4"
    assert main(["decode", str(file), "--endpoint", video.url, "--out", str(clip)]) == 0
    with av.open(str(clip)) as container:
        assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(32, 24)] * 5


def test_what_a_video_is_written_with_is_missed_before_anybody_is_asked(
    chaos: Chaos, latents: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(latents, find_family("sd1"), [tmp_path], "because")
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["decode", str(file), "--endpoint", chaos.url, "--out", str(tmp_path / "clip.mp4")]) == 1
    assert f"{sys.executable} -m pip install av" in capsys.readouterr().err
    assert not chaos.requests


def test_a_picture_becomes_one_frame_of_a_video_vae(video: ServerThread, tmp_path: Path) -> None:
    Image.new("RGB", (32, 24), "red").save(tmp_path / "photo.png")
    assert main(["encode", str(tmp_path / "photo.png"), "--endpoint", video.url]) == 0
    assert load_latents(tmp_path / "photo.safetensors").latents.shape == (1, 16, 1, 3, 4)


@pytest.mark.parametrize("name", ["sana", "wan", "qwen-image-2.1", "flux2"])
def test_check_asks_each_vae_for_what_it_makes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    vae = small_vae(name)
    running = ServerThread(loaded_vae(vae, family_of(vae).key))
    try:
        assert main(["check", "--endpoint", running.url]) == 0
    finally:
        running.close()
    printed = capsys.readouterr().out
    assert printed.count("256 x 256") == 2
    assert printed.count("works") == 2


def test_check_says_what_is_wrong_with_an_endpoint(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    chaos.reset("503")
    assert main(["check", "--endpoint", chaos.url]) == 1
    out = capsys.readouterr().out
    assert out.count("failed") == 2
    assert "no replica is ready" in out
    assert main(["check"]) == 1
    assert "--endpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "missing.safetensors", "--endpoint", "http://127.0.0.1:9"], "cannot be read"),
        (["check", "--transfer", "gif"], "transfer"),
        (["check", "--family", "sd77", "--endpoint", "http://127.0.0.1:9"], "sd77"),
        (["encode", "missing.png", "--family", "sd1"], "cannot be read"),
        (["serve", "--vae", "missing", "--port", "0"], "missing"),
        (["serve", "--vae", "missing", "--host", "203.0.113.7", "--port", "0"], "cannot listen"),
        (["serve", "--vae", "missing", "--port", "99999"], "--port: got 99999, expected a whole number from 0 to 65535"),
        (["serve", "--vae", "missing", "--port", "-1"], "--port: got -1"),
        (["serve", "--vae", "missing", "--max-pixels", "0"], "--max-pixels: got 0, expected a whole number from 1 on"),
        (["serve", "--vae", "missing", "--max-video-pixels", "-1"], "--max-video-pixels: got -1"),
        (["serve", "--vae", "missing", "--device", "banana"], "not banana"),
        (["serve", "--vae", "missing", "--device", ""], "--device: got"),
        (["decode", "missing.safetensors", "--out", "nowhere/x.png"], "there is no folder nowhere"),
        (["decode", "missing.safetensors", "--out", "x.doc"], "x.doc: name a picture file, such as picture.png"),
        (["decode", "missing.safetensors", "--out", "x"], "name a picture file"),
        (["encode", "missing.png", "--out", "x.png"], "name a .safetensors file"),
        (["encode", "missing.png", "--out", "nowhere/x.safetensors"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("remote-vae: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("endpoint", "environment"),
    [
        ("http://a..b:77", {}),
        ("http://studio.invalid", {}),
        ("http://studio.invalid", {"http_proxy": "ht!tp://:x:y"}),
        ("http://studio.invalid", {"http_proxy": "http://[::1"}),
        ("http://studio.invalid", {"http_proxy": "socks5://127.0.0.1:9"}),
        ("https://studio.invalid", {"REQUESTS_CA_BUNDLE": "/missing.pem"}),
    ],
)
def test_whatever_is_wrong_with_the_way_to_an_endpoint_is_a_line_without_a_traceback(
    endpoint: str,
    environment: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = write_zeros(tmp_path)
    assert main(["decode", str(file), "--endpoint", endpoint]) == 1
    error = capsys.readouterr().err
    assert error.startswith("remote-vae: ")
    assert error.count("\n") == 1


def write_zeros(folder: Path) -> Path:
    write(torch.zeros(1, 4, 8, 8), find_family("sd1"), folder / "zeros.safetensors", "")
    return folder / "zeros.safetensors"


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 2, 8, 8), (0, 4, 8, 8), (1, 4, 0, 8), (4,), ()])
def test_latents_of_a_shape_that_no_vae_takes_are_refused_before_anybody_is_asked(
    shape: tuple[int, ...], chaos: Chaos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(torch.zeros(shape), find_family("sd1"), tmp_path / "x.safetensors", "")
    assert main(["decode", str(tmp_path / "x.safetensors"), "--endpoint", chaos.url]) == 1
    assert f"got latents of shape {list(shape)}, expected [B, 4, h, w]" in capsys.readouterr().err
    assert chaos.requests == []


def test_a_place_that_cannot_be_written_is_named(chaos: Chaos, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.png").mkdir()
    assert main(["decode", str(write_zeros(tmp_path)), "--endpoint", chaos.url, "--out", str(tmp_path / "out.png")]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out.png'} cannot be written: " in error
    assert "--out" in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["zeros.safetensors"]


@pytest.mark.parametrize("before", [True, False])
def test_verbose_is_a_line_for_every_call(before: bool, server: ServerThread, tmp_path: Path) -> None:
    command = ["-v", "check"] if before else ["check", "-v"]
    result = subprocess.run(
        [sys.executable, "-m", "remote_vae", *command, "--endpoint", server.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split(",")[0] for line in result.stderr.splitlines()] == [
        "decode 256x256: remote (u8)",
        "encode 256x256: remote (u8)",
    ]


def test_a_decode_on_this_machine_is_a_line_too(rescued: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert main(["decode", str(rescued), "--vae", str(DEMO_VAE), "--out", str(tmp_path / "x.png"), "-v"]) == 0
    assert "decode 2 x 96x64: tiled (exact)" in caplog.text


def test_decoding_with_nothing_says_what_to_name(rescued: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", str(rescued)]) == 1
    assert "--endpoint" in capsys.readouterr().err


def test_latents_of_another_vae_are_not_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = recognise(latent_channels=16, scaling_factor=1.0, shift_factor=0)
    file = save(torch.zeros(1, 16, 4, 4), family, [tmp_path], "")
    assert main(["decode", str(file), "--vae", str(DEMO_VAE)]) == 1
    assert "16" in capsys.readouterr().err


def test_the_options_of_the_panel_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    text = capsys.readouterr().out
    for key in set(load_options()) - PANEL_ONLY:
        assert "--" + key.replace("_", "-") in text


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process alone")
@pytest.mark.usefixtures("visited_home")
def test_serve_prints_what_to_enter_and_a_line_a_call_until_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "remote_vae", "serve", "--vae", str(DEMO_VAE), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0] == f"loading {DEMO_VAE} ...\n"
        assert lines[1].startswith("Remote VAE serves custom VAE, ")
        assert re.fullmatch(r"Endpoint: http://127\.0\.0\.1:\d+\n", lines[2])
        assert "--host 0.0.0.0" in lines[3]
        assert main(["check", "--endpoint", lines[2].split()[-1]]) == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None
        error = process.stderr.read()
        assert "Traceback" not in error
        assert [re.sub(r"^[\d-]+ [\d:]+ |: .*", "", line) for line in error.splitlines()][:2] == [
            f"{op} custom 256x256 for 127.0.0.1" for op in ("decode", "encode")
        ]
    finally:
        process.kill()
        process.communicate()


def test_family_of_a_rescued_file_is_told_to_the_server(
    chaos: Chaos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(torch.zeros(1, 4, 8, 8), find_family("sdxl"), [tmp_path], "")
    assert main(["decode", str(file), "--endpoint", chaos.url]) == 0
    assert "family=sdxl" in chaos.queries[-1]
