"""Drives a running AUTOMATIC1111 with the extension installed, and prints what came out, in levels of difference to local.

    python -m tests.e2e.a1111 --host http://127.0.0.1:7861 --server http://127.0.0.1:7870

The server must have the VAE of the host's checkpoint: remote-vae serve --vae CHECKPOINT.safetensors --family sd1.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import threading
import time
import urllib.request
from typing import Any

import numpy as np
from PIL import Image

from tests.chaos import Chaos

SIZE = 256
BASE: dict[str, Any] = {
    "prompt": "a photo of a cat", "width": SIZE, "height": SIZE, "steps": 8, "sampler_name": "Euler", "seed": 1, "cfg_scale": 7,
}  # fmt: skip
HIRES = {"enable_hr": True, "hr_scale": 2, "hr_second_pass_steps": 4, "denoising_strength": 0.6}


class Host:
    """The host's HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=300) as answer:
            return json.loads(answer.read() or b"null")

    def options(self, **values: object) -> None:
        self.call("/sdapi/v1/options", {f"remote_vae_{key}": value for key, value in values.items()})

    def pictures(self, path: str, body: dict[str, Any]) -> list[np.ndarray]:
        result = self.call(path, body)
        return [picture(text) for text in result["images"]]


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


def as_base64(levels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def jobs(host: Host) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is generated: path and body by name. The source of img2img is the host's own local picture."""
    source = as_base64(host.pictures("/sdapi/v1/txt2img", BASE)[0])
    mask = np.zeros((SIZE, SIZE, 3))
    mask[64:192, 64:192] = 255
    image = {"init_images": [source], "denoising_strength": 0.5}
    return {
        "txt2img": ("/sdapi/v1/txt2img", BASE),
        "txt2img, batch of 2": ("/sdapi/v1/txt2img", {**BASE, "batch_size": 2}),
        "img2img": ("/sdapi/v1/img2img", {**BASE, **image}),
        "inpaint": ("/sdapi/v1/img2img", {**BASE, **image, "mask": as_base64(mask), "inpainting_fill": 1}),
        "hires, latent upscaler": ("/sdapi/v1/txt2img", {**BASE, **HIRES, "hr_upscaler": "Latent"}),
        "hires, pixel upscaler": ("/sdapi/v1/txt2img", {**BASE, **HIRES, "hr_upscaler": "Lanczos"}),
    }


def difference(pictures: list[np.ndarray], reference: list[np.ndarray]) -> str:
    if len(pictures) != len(reference):
        return f"{len(pictures)} of {len(reference)} pictures"
    return str(max(int(np.abs(a - b).max()) for a, b in zip(pictures, reference, strict=True)))


def run_table(host: Host, chaos: Chaos) -> None:
    host.options(enabled=False)
    work = jobs(host)
    modes: dict[str, tuple[dict[str, object], str]] = {
        "off, again": ({"enabled": False}, "pass"),
        "remote raw": ({"endpoint": chaos.url, "transfer": "raw"}, "pass"),
        "remote u8": ({"endpoint": chaos.url, "transfer": "u8"}, "pass"),
        "refused": ({"endpoint": "http://127.0.0.1:9"}, "pass"),
        "503": ({"endpoint": chaos.url}, "503"),
        "NaN": ({"endpoint": chaos.url, "transfer": "raw"}, "nan"),
        # The pause after a failure makes a hang cost its deadline once for decodes and once for encodes, not for each pass.
        "hangs": ({"first_byte_timeout": 2.0, "cooldown": 60.0}, "hang"),
    }
    local, local_seconds = {}, {}
    for name, job in work.items():
        started = time.monotonic()
        local[name] = host.pictures(*job)
        local_seconds[name] = time.monotonic() - started
    print(f"{'':24}" + "".join(f"{mode:>14}" for mode in modes) + "   requests (remote raw)")
    for name, (path, body) in work.items():
        cells, requests = [], ""
        for mode, (options, behaviour) in modes.items():
            defaults = {"enabled": True, "transfer": "u8", "cooldown": 0.0, "first_byte_timeout": 20.0}
            if behaviour == "hang":
                # An address of its own, which the pause after an earlier failure does not cover.
                hanging = Chaos()
                hanging.reset("hang")
                options = {**options, "endpoint": hanging.url}
            host.options(**{**defaults, **options})
            chaos.reset(behaviour)
            started = time.monotonic()
            cell = difference(host.pictures(path, body), local[name])
            if mode == "hangs":
                cell += f" ({time.monotonic() - started - local_seconds[name]:+.1f} s)"
            if mode == "remote raw":
                requests = ", ".join(chaos.requests)
            cells.append(cell)
        print(f"{name:24}" + "".join(f"{cell:>14}" for cell in cells) + f"   {requests}", flush=True)
    host.options(enabled=False)


def run_preview(host: Host, chaos: Chaos) -> None:
    """Live preview Full at every step must leave nothing but the final decode on the wire."""
    host.call(
        "/sdapi/v1/options", {"show_progress_type": "Full", "show_progress_every_n_steps": 1, "live_previews_enable": True}
    )
    host.options(enabled=True, endpoint=chaos.url, transfer="raw", cooldown=0.0)
    chaos.reset("pass")
    body = {**BASE, "steps": 30}
    thread = threading.Thread(target=lambda: host.call("/sdapi/v1/txt2img", body))
    thread.start()
    seen = set()
    while thread.is_alive():
        progress = host.call("/sdapi/v1/progress")
        if progress.get("current_image"):
            seen.add(progress["state"]["sampling_step"])
        time.sleep(0.05)
    print(f"live preview Full: previews at {len(seen)} steps, requests: {', '.join(chaos.requests)}")
    host.options(enabled=False)


def run_interrupt(host: Host, chaos: Chaos) -> None:
    """Interrupt while a hanging endpoint is waited for: the picture comes out, at once."""
    host.options(enabled=True, endpoint=chaos.url, transfer="raw", first_byte_timeout=30.0, cooldown=0.0)
    chaos.reset("hang")
    finished: list[float] = []

    def generate() -> None:
        pictures = host.pictures("/sdapi/v1/txt2img", BASE)
        finished.append(time.monotonic())
        assert len(pictures) == 1

    thread = threading.Thread(target=generate)
    thread.start()
    while not chaos.requests:
        time.sleep(0.01)
    time.sleep(0.5)
    pressed = time.monotonic()
    host.call("/sdapi/v1/interrupt", {})
    thread.join()
    print(f"Interrupt while waiting: picture {finished[0] - pressed:.2f} s after it, local decode included")
    host.options(enabled=False)


def run_vae_switch(host: Host, chaos: Chaos, vae: str) -> None:
    """Another VAE is picked and taken back: the model is announced twice more, and stays hooked once."""
    for name in (vae, "Automatic"):
        host.call("/sdapi/v1/options", {"sd_vae": name})
    host.options(enabled=False)
    local = host.pictures("/sdapi/v1/txt2img", BASE)
    host.options(enabled=True, endpoint=chaos.url, transfer="raw", cooldown=0.0)
    chaos.reset("pass")
    cell = difference(host.pictures("/sdapi/v1/txt2img", BASE), local)
    print(f"VAE switched to {vae} and back: {cell} levels, requests: {', '.join(chaos.requests)}")
    host.options(enabled=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True, help="address of the running host")
    parser.add_argument("--server", required=True, help="address of a Remote VAE server with the same VAE")
    parser.add_argument("--vae", help="name of another VAE in the host, for the switch")
    options = parser.parse_args()
    host, chaos = Host(options.host), Chaos(options.server)
    run_table(host, chaos)
    run_preview(host, chaos)
    run_interrupt(host, chaos)
    if options.vae:
        run_vae_switch(host, chaos, options.vae)
    chaos.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
