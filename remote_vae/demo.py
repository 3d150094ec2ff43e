"""The demo: one photo through the real hook, a real server, its death in mid-call, and the fallback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from remote_vae.errors import RemoteVaeError
from remote_vae.history import Record
from remote_vae.hosts.diffusers import Handle, attach
from remote_vae.settings import Settings
from remote_vae.wire.pixels import image_to_pixels, to_uint8

VAE_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "demo_vae"
_START_SECONDS = 120
# How much the difference of two pictures is brightened, so that one level can be seen.
_GAIN = 64


@dataclass(frozen=True)
class Run:
    """One row of the report."""

    name: str
    op: str
    route: str
    endpoint: str
    ms: float
    bytes_up: int
    bytes_down: int
    max_diff_levels: int
    fallback_reason: str


def run_demo(out: Path) -> int:
    """Run it, write pictures and ``report.json`` into ``out``, print a table; the result is an exit status.

    Raises:
        RemoteVaeError: the demo's VAE is not here, or the server does not start.
    """
    if not VAE_FOLDER.is_dir():
        raise RemoteVaeError(f"the demo's VAE is not in {VAE_FOLDER}: run the demo from a checkout of the repository")
    out.mkdir(parents=True, exist_ok=True)
    # Both start while this process gets ready. The second one is killed in its first call, which takes longest.
    with _server() as server, _server() as doomed:
        demo = _Demo(out)
        with torch.inference_mode():
            demo.run(server, doomed)
    report = {"runs": [asdict(run) for run in demo.runs]}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print_table(demo.runs)
    print(f"\npictures and report.json are in {out}/")
    return 0


class _Demo:
    """The runs, one after another; each adds its rows."""

    def __init__(self, out: Path) -> None:
        from skimage import data

        self.runs: list[Run] = []
        self._out = out
        # astronaut: NASA, public domain; shipped with scikit-image, and not among the VAE's training photos.
        photo = Image.fromarray(data.astronaut())
        photo.save(out / "original.png")
        self._pipe = _img2img_pipeline()
        self._vae = self._pipe.vae
        self._photo = image_to_pixels(photo)
        self._picture = photo
        self._latents = self._encode_mode()
        self._local = self._decode(self._latents)
        self._save("local", self._local)

    def run(self, server: _Server, doomed: _Server) -> None:
        handle = attach(self._pipe)
        try:
            self._off(handle)
            self._remote(handle, server.url)
            self._pipeline(handle, server.url)
            self._killed(handle, doomed)
        finally:
            handle.detach()

    def _off(self, handle: Handle) -> None:
        """The hook passes on and keeps no record, so the clock is read here."""
        handle.enabled = False
        started = time.perf_counter()
        latents = self._encode_mode()
        encode_ms = _ms_since(started)
        self.runs.append(Run("off", "encode", "local", "", encode_ms, 0, 0, self._worth(latents), ""))
        started = time.perf_counter()
        levels = self._decode(self._latents)
        self.runs.append(Run("off", "decode", "local", "", _ms_since(started), 0, 0, self._difference(levels), ""))

    def _remote(self, handle: Handle, url: str) -> None:
        handle.enabled = True
        for transfer in ("raw", "u8", "png", "jpg"):
            handle.settings = Settings(endpoint=url, transfer=transfer)
            self._encode_run(handle, f"remote, {transfer}")
            levels = self._decode_run(handle, f"remote, {transfer}")
            if transfer == "u8":
                self._save("remote", levels)

    def _pipeline(self, handle: Handle, url: str) -> None:
        handle.enabled = False
        local = self._img2img()
        handle.enabled = True
        handle.settings = Settings(endpoint=url, transfer="raw")
        handle.history.clear()
        difference = int(np.abs(self._img2img() - local).max())
        for record in handle.history.records():
            self._add("img2img pipeline, raw", record, difference)

    def _killed(self, handle: Handle, server: _Server) -> None:
        handle.settings = Settings(endpoint=server.url, cooldown=0.0)
        server.kill_when_running()
        self._save("fallback", self._decode_run(handle, "server killed in mid-call"))
        self._encode_run(handle, "server gone")
        remote = np.asarray(Image.open(self._out / "remote.png")).astype(int)
        fallback = np.asarray(Image.open(self._out / "fallback.png")).astype(int)
        self._save("difference", np.clip(np.abs(remote - fallback) * _GAIN, 0, 255))

    def _decode_run(self, handle: Handle, name: str) -> np.ndarray:
        levels = self._decode(self._latents)
        self._add(name, handle.history.last, self._difference(levels))
        return levels

    def _encode_run(self, handle: Handle, name: str) -> None:
        latents = self._encode_mode()
        record = handle.history.last
        handle.enabled = False
        difference = self._worth(latents)
        handle.enabled = True
        self._add(name, record, difference)

    def _add(self, name: str, record: Record | None, difference: int) -> None:
        if record is None:
            raise RemoteVaeError(f"{name}: the call left no record")
        route = f"{record.route} ({record.detail})" if record.route == "tiled" else record.route
        self.runs.append(
            Run(
                name=name,
                op=record.op,
                route=route,
                endpoint=record.endpoint,
                ms=round(record.ms, 1),
                bytes_up=record.bytes_up,
                bytes_down=record.bytes_down,
                max_diff_levels=difference,
                fallback_reason=record.fallback_reason,
            )
        )

    def _encode_mode(self) -> torch.Tensor:
        latents: torch.Tensor = self._vae.encode(self._photo).latent_dist.mode()
        return latents

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        levels: np.ndarray = to_uint8(self._vae.decode(latents).sample)[0].numpy().astype(int)
        return levels

    def _worth(self, latents: torch.Tensor) -> int:
        """What latents are worth is seen in the picture that the VAE itself makes of them; of equal ones it makes the same."""
        return 0 if torch.equal(latents, self._latents) else self._difference(self._decode(latents))

    def _difference(self, levels: np.ndarray) -> int:
        return int(np.abs(levels - self._local).max())

    def _img2img(self) -> np.ndarray:
        """The pipeline calls vae.encode and vae.decode itself; its random UNet only adds noise to the photo."""
        result = self._pipe(
            prompt_embeds=torch.zeros(1, 8, 32),
            image=self._picture,
            strength=0.3,
            num_inference_steps=10,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        levels: np.ndarray = (np.asarray(result.images[0]) * 255).round().astype(int)
        return levels

    def _save(self, name: str, levels: np.ndarray) -> None:
        Image.fromarray(levels.astype(np.uint8)).save(self._out / f"{name}.png")


def _img2img_pipeline() -> Any:
    """A real img2img pipeline: the small trained VAE, and a tiny UNet with random weights."""
    # It would warn of picture processors that are not used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(VAE_FOLDER, torch_dtype=torch.float32),
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _Server:
    """``remote-vae serve`` in a process of its own, so that it can really be killed."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "remote_vae", "serve", "--vae", str(VAE_FOLDER), "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)

    @cached_property
    def url(self) -> str:
        """As soon as it is there. Raises RemoteVaeError: it does not start."""
        timer = threading.Timer(_START_SECONDS, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout or ():
                if line.startswith("Endpoint: "):
                    return line.split()[-1]
        finally:
            timer.cancel()
        raise RemoteVaeError(f"the server did not start; try: remote-vae serve --vae {VAE_FOLDER}")

    def kill_when_running(self) -> None:
        """From now on, watch the server, and kill it without a word as soon as it is at work on a call."""
        threading.Thread(target=self._kill_when_running, daemon=True).start()

    def _kill_when_running(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while self._process.poll() is None:
            with suppress(OSError), opener.open(f"{self.url}/health", timeout=10) as answer:
                if json.loads(answer.read())["running"]:
                    self.kill()
                    return
            time.sleep(0.005)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        self._process.wait()


@contextmanager
def _server() -> Iterator[_Server]:
    server = _Server()
    try:
        yield server
    finally:
        server.kill()


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 1)


def _print_table(runs: list[Run]) -> None:
    titles = ("run", "op", "route", "ms", "bytes up", "bytes down", "max diff", "fell back because")
    rows = [
        (
            run.name,
            run.op,
            run.route,
            f"{run.ms:.0f}",
            f"{run.bytes_up:,}",
            f"{run.bytes_down:,}",
            f"{run.max_diff_levels}",
            run.fallback_reason,
        )
        for run in runs
    ]
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    for row in [titles, *rows]:
        cells = [
            text.rjust(width) if 3 <= column <= 6 else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print("max diff: levels of 255 from the local picture; of an encode, from the picture that its latents make locally.")
