"""A running web UI by its HTTP API: which of them it is, and what is said to it otherwise than to the others."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

PREFIX = "remotevae_"
# Settings of the extension while it is driven, its defaults but for the switch; a situation changes some of them.
EXTENSION: dict[str, object] = {
    "enabled": False,
    "decode": True,
    "encode": True,
    "transfer": "u8",
    "cooldown": 30.0,
    "first_byte_timeout": 20.0,
    "cpu_bfloat16": False,
    "when_vae_differs": "local",
}


@dataclass
class Shot:
    """What came back of a generation, or of several.

    Attributes:
        pictures: levels ``[H, W, 3]`` of each.
        seconds: what the generations took, without what was done between them.
        ended: when the last one ended, on the monotonic clock.
        infotext: of the last picture.
        previews: at how many steps a live preview was seen.
        saved: how many files the host has saved.
    """

    pictures: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    ended: float = 0.0
    infotext: str = ""
    previews: int = 0
    saved: int = 0

    def __add__(self, later: Shot) -> Shot:
        pictures = self.pictures + later.pictures
        seconds, previews = self.seconds + later.seconds, self.previews + later.previews
        return Shot(pictures, seconds, later.ended, later.infotext, previews, self.saved + later.saved)


class Host:
    """AUTOMATIC1111; the others say what is different."""

    name = "AUTOMATIC1111"
    # Whether Interrupt ends the job, and not only the wait for an endpoint.
    interrupt_ends_job = False
    size = 128
    steps = 4
    sampler = "Euler"
    image: ClassVar[dict[str, Any]] = {"denoising_strength": 0.5, "steps": 8}
    hires: ClassVar[dict[str, Any]] = {"enable_hr": True, "hr_scale": 2, "hr_second_pass_steps": 4, "denoising_strength": 0.6}
    latent_upscaler = "Latent"
    pixel_upscaler = "Lanczos"
    previews: ClassVar[dict[str, object]] = {
        "show_progress_type": "Full",
        "show_progress_every_n_steps": 1,
        "live_previews_enable": True,
    }
    no_previews: ClassVar[dict[str, object]] = {"live_previews_enable": False}

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        # A proxy of the environment is not for loopback.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._saves: Path | None = None

    # --- the API -------------------------------------------------------------------------------------------------------

    def call(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=600) as answer:
            return json.loads(answer.read() or b"null")

    def has(self, path: str) -> bool:
        try:
            self.call(path)
        except urllib.error.HTTPError:
            return False
        return True

    def options(self, values: dict[str, object]) -> None:
        self.call("/sdapi/v1/options", values)

    def extension(self, **values: object) -> None:
        """Set the extension's options: those of ``EXTENSION``, and ``values`` over them."""
        try:
            self.options({PREFIX + key: value for key, value in {**EXTENSION, **values}.items()})
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{self.name} does not take the extension's options; is it installed? {error}") from None

    def set_endpoint(self, url: str) -> None:
        """Where the API may not do that, the user of the driver has done it."""
        self.options({PREFIX + "endpoint": url})
        # Forge does not list the options of extensions.
        found = self.call("/sdapi/v1/options").get(PREFIX + "endpoint", url)
        if found != url:
            raise SystemExit(f"{self.name} keeps its endpoint from its API: set Settings, Remote VAE, Endpoint to {url}")

    @contextmanager
    def saving_into(self, folder: Path) -> Iterator[None]:
        """Within, every picture is saved into ``folder``, on this machine, and counted."""
        values = {f"outdir_{tab}_samples": str(folder) for tab in ("txt2img", "img2img")}
        wanted = {**values, "samples_save": True, "grid_save": False, "return_grid": False}
        stored = self.call("/sdapi/v1/options")
        self.options(wanted)
        self._saves = folder
        try:
            yield
        finally:
            self._saves = None
            self.options({key: stored[key] for key in wanted if key in stored})

    def interrupt(self) -> None:
        self.call("/sdapi/v1/interrupt", {})

    def progress_text(self) -> str:
        """The host's progress line."""
        return self.call("/sdapi/v1/progress?skip_current_image=true").get("textinfo") or ""

    def generate(self, path: str, body: dict[str, Any]) -> Shot:
        before = self._files()
        started = time.monotonic()
        result = self.call(f"/sdapi/v1/{path}", {**body, "save_images": self._saves is not None})
        ended = time.monotonic()
        infotexts = json.loads(result.get("info") or "{}").get("infotexts") or [""]
        pictures = [_picture(text) for text in result["images"]]
        return Shot(pictures, ended - started, ended, infotexts[-1], saved=self._files() - before)

    def _files(self) -> int:
        return 0 if self._saves is None else sum(path.suffix in (".png", ".jpg") for path in self._saves.rglob("*"))

    # --- what differs --------------------------------------------------------------------------------------------------

    def version(self) -> str:
        found = re.search(r"Version: ([^,\n]+)", self.generate("txt2img", {**self.base(1), "steps": 1}).infotext)
        return found[1] if found else "of unknown version"

    def base(self, seed: int) -> dict[str, Any]:
        """The body of a small txt2img."""
        return {
            "prompt": "a cat",
            "width": self.size,
            "height": self.size,
            "steps": self.steps,
            "sampler_name": self.sampler,
            "seed": seed,
            "cfg_scale": 7,
        }

    def vae(self, name: str | None) -> dict[str, object]:
        """The option that picks another VAE; None: the one that was picked when the driver started."""
        return {"sd_vae": name or "Automatic"}

    def checkpoint(self) -> str:
        return str(self.call("/sdapi/v1/options")["sd_model_checkpoint"])


class Forge(Host):
    name = "Forge"
    # Without the modules named, its API takes none.
    hires: ClassVar[dict[str, Any]] = {**Host.hires, "hr_additional_modules": ["Use same choices"]}

    def vae(self, name: str | None) -> dict[str, object]:
        return {"forge_additional_modules": [name] if name else []}


class Neo(Forge):
    name = "Forge Neo"
    # It has none that upscale latents; this one resizes the picture.
    latent_upscaler = ""
    pixel_upscaler = "None"


class Reforge(Host):
    name = "reForge"


class SdNext(Host):
    name = "SD.Next"
    sampler = "Euler a"
    hires: ClassVar[dict[str, Any]] = {**Host.hires, "hr_resize_mode": 1, "hr_force": True}
    latent_upscaler = "Latent Nearest"
    pixel_upscaler = "Resize Lanczos"
    previews: ClassVar[dict[str, object]] = {"show_progress_type": "Full"}
    no_previews: ClassVar[dict[str, object]] = {"show_progress_type": "None"}

    def version(self) -> str:
        version = self.call("/sdapi/v1/version")
        return f"{version.get('commit', '')} of {version.get('updated', '')}"

    def vae(self, name: str | None) -> dict[str, object]:
        return {"sd_vae": name or "Default"}


def find_host(url: str) -> Host:
    """Which host answers at ``url``, by what its API has."""
    from tests.e2e.comfyui import ComfyUi  # it is made of this module

    host = Host(url)
    if host.has("/system_stats"):
        return ComfyUi(url)
    if host.has("/sdapi/v1/version"):
        return SdNext(url)
    if host.has("/sdapi/v1/sd-modules"):
        is_neo = "VERSION_UID" in host.call("/sdapi/v1/options")
        return Neo(url) if is_neo else Forge(url)
    if host.has("/sdapi/v1/sd-vae"):
        return Reforge(url) if "reforge_karras_rho" in host.call("/sdapi/v1/options") else host
    raise SystemExit(f"{url}: none of the hosts this driver knows, or started without --api")


def as_base64(levels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _picture(text: str) -> np.ndarray:
    data = base64.b64decode(text.partition(",")[2] or text)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
