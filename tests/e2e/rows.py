"""What is generated with a host: the rows of the table. Each has seeds of its own, so that no picture is taken for another."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tests.e2e.host import Host, Shot, as_base64

PREVIEW = "live preview Full"
SHARED_SOURCE = "img2img, batch of 3, one source"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        run: generates it.
        pictures: how many must come back.
        batch: of how many pictures its decode is.
        decodes_in_between: whether a decoded picture is encoded again for another pass.
        untiled: what an endpoint makes, where the row asks for overlapping tiles: the same without them.
    """

    name: str
    run: Callable[[], Shot]
    pictures: int = 1
    batch: int = 1
    decodes_in_between: bool = False
    untiled: Callable[[], Shot] | None = None


@dataclass(frozen=True)
class Names:
    """What is switched to, by the host's names; empty where there is none, and then the row is left out.

    Attributes:
        round_trip: a VAE of no model that is there; then pictures are only encoded and decoded by it.
    """

    vae: str = ""
    checkpoint: str = ""
    reload: str = ""
    round_trip: str = ""


def source_picture(size: int) -> np.ndarray:
    """Levels ``[size, size, 3]`` by formula: the same in every run of the driver, whatever the host draws."""
    y, x = np.mgrid[0:size, 0:size] / size
    return np.stack([255 * x, 255 * y, 127.5 + 127.5 * np.sin(9 * x * y)], axis=-1)


def square_mask(size: int) -> np.ndarray:
    """White in the middle."""
    mask = np.zeros((size, size, 3))
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = 255
    return mask


def restarted(command: str, run: Callable[[], Shot]) -> Shot:
    """What ``run`` gives after the UI was restarted by ``command``."""
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    return run()


class Rows:
    """Makes the rows for a host."""

    def __init__(self, host: Host, names: Names) -> None:
        self._host = host
        self._names = names
        self._checkpoint = host.checkpoint()
        size = host.size
        self._image = {**host.image, "init_images": [as_base64(source_picture(size))]}
        self._mask = {"mask": as_base64(square_mask(size)), "inpainting_fill": 1, "mask_blur": 4, "inpaint_full_res": False}

    def all(self) -> list[Row]:
        host, names = self._host, self._names
        latent = {**host.hires, "hr_upscaler": host.latent_upscaler}
        pixel = {**host.hires, "hr_upscaler": host.pixel_upscaler}
        rows = [
            Row("txt2img", self._plain(101, "txt2img")),
            Row("batch of 3", self._plain(102, "txt2img", batch_size=3), pictures=3, batch=3),
            Row("img2img", self._plain(103, "img2img", **self._image)),
            Row(SHARED_SOURCE, self._plain(104, "img2img", **self._image, batch_size=3), pictures=3, batch=3),
            Row("inpaint", self._plain(105, "img2img", **self._image, **self._mask)),
            *([Row("hires, latent upscaler", self._plain(106, "txt2img", **latent))] if host.latent_upscaler else []),
            Row("hires, pixel upscaler", self._plain(107, "txt2img", **pixel), decodes_in_between=True),
            Row(PREVIEW, self._preview),
        ]
        if names.vae:
            switch = partial(self._there_and_back, 108, host.vae(names.vae), host.vae(None))
            rows.append(Row("VAE switch and back", switch, pictures=2))
        if names.checkpoint:
            there, back = {"sd_model_checkpoint": names.checkpoint}, {"sd_model_checkpoint": self._checkpoint}
            rows.append(Row("model switch and back", partial(self._there_and_back, 110, there, back), pictures=2))
        if names.reload:
            rows.append(Row("after Reload UI", self._reloaded))
        return rows

    def _plain(self, seed: int, path: str, **body: Any) -> Callable[[], Shot]:
        return lambda: self._host.generate(path, {**self._host.base(seed), **body})

    def _there_and_back(self, seed: int, there: dict[str, object], back: dict[str, object]) -> Shot:
        try:
            self._host.options(there)
            shot = self._host.generate("txt2img", self._host.base(seed))
        finally:
            self._host.options(back)
        return shot + self._host.generate("txt2img", self._host.base(seed + 1))

    def _reloaded(self) -> Shot:
        return restarted(self._names.reload, lambda: self._host.generate("txt2img", self._host.base(112)))

    def _preview(self) -> Shot:
        """With somebody who watches every step."""
        host, seen, done = self._host, set(), threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                progress = host.call("/sdapi/v1/progress")
                if progress.get("current_image"):
                    seen.add(progress["state"]["sampling_step"])

        watcher = threading.Thread(target=watch)
        host.options(host.previews)
        try:
            watcher.start()
            shot = host.generate("txt2img", {**host.base(113), "steps": 20})
        finally:
            done.set()
            watcher.join()
            host.options(host.no_previews)
        shot.previews = len(seen)
        # A preview that is still being made holds the host for a moment.
        time.sleep(0.2)
        return shot
