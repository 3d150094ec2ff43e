"""A running ComfyUI by its HTTP API: the same rows as with the web UIs, as graphs.

ComfyUI does not run a node again whose inputs are the same. So a run gives its VAE nodes an input that no run had before, and
that changes nothing: the number of pictures to take from a batch, which is cut to the size of the batch.
"""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from tests.e2e.host import EXTENSION, Host, Shot
from tests.e2e.rows import SHARED_SOURCE, Names, Row, restarted, source_picture, square_mask
from tests.e2e.websocket import frames

SETTING = "RemoteVAE."
Graph = dict[str, dict[str, Any]]
Link = list[Any]


class ComfyUi(Host):
    """ComfyUI, its extension switched on for every VAE or, with ``by_node``, by the node Remote VAE in each graph."""

    name = "ComfyUI"
    # Its VAE has the layers of the real one.
    size = 64
    interrupt_ends_job = True
    no_previews: ClassVar[dict[str, object]] = {}

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.by_node = False
        self._wanted: dict[str, object] = {}
        self._runs = 0
        self._client = uuid.uuid4().hex
        # The last text on a node.
        self.progress = ""
        self.checkpoint_name = ""

    def listen(self) -> None:
        """Follow the texts that are shown on nodes."""

        def follow() -> None:
            # Anew after each restart of the UI.
            while True:
                for payload in frames(self._url, f"/ws?clientId={self._client}"):
                    kind, length = struct.unpack(">II", payload[:8]) if len(payload) > 8 else (0, 0)
                    if kind == 3:
                        self.progress = payload[8 + length :].decode(errors="replace")
                time.sleep(0.5)

        threading.Thread(target=follow, daemon=True).start()

    # --- the API -------------------------------------------------------------------------------------------------------

    def options(self, values: dict[str, object]) -> None:
        """There are none of the host's."""

    def extension(self, **values: object) -> None:
        self._wanted = {**EXTENSION, **values}
        stored = {**self._wanted, "enabled": self._wanted["enabled"] and not self.by_node}
        self.call("/settings", {SETTING + key: value for key, value in stored.items()})

    def set_endpoint(self, url: str) -> None:
        self.call("/settings", {SETTING + "endpoint": url})

    @contextmanager
    def saving_into(self, folder: Path) -> Iterator[None]:
        """Its own output folder: what is saved there is counted."""
        yield

    def interrupt(self) -> None:
        self.call("/interrupt", {})

    def progress_text(self) -> str:
        return self.progress

    def version(self) -> str:
        found: str = self.call("/system_stats")["system"]["comfyui_version"]
        return found + (", by the node Remote VAE" if self.by_node else ", for every VAE")

    def checkpoint(self) -> str:
        choices = self.call("/object_info/CheckpointLoaderSimple")["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"]
        names: list[str] = choices[0] if isinstance(choices[0], list) else choices[1]["options"]
        return self.checkpoint_name or names[0]

    def upload(self, name: str, levels: np.ndarray) -> str:
        """Put a picture among the inputs; returns its name there."""
        buffer = io.BytesIO()
        Image.fromarray(levels.astype(np.uint8)).save(buffer, "PNG")
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{{}}"{{}}\r\n\r\n'
        body = head.format("overwrite", "").encode() + b"true\r\n"
        body += head.format("image", f'; filename="{name}"').encode() + buffer.getvalue() + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        with self._opener.open(urllib.request.Request(f"{self._url}/upload/image", body, headers), timeout=60) as answer:
            found: str = json.loads(answer.read())["name"]
        return found

    # --- jobs ----------------------------------------------------------------------------------------------------------

    def run(self, build: Callable[[Wires], Link]) -> Shot:
        """Run the graph that ``build`` makes, and save the pictures of the link that it returns."""
        self._runs += 1
        node = ("auto" if self._wanted.get("enabled") else "off") if self.by_node else ""
        wires = Wires(self._runs, node, self.checkpoint())
        wires.add("SaveImage", images=build(wires), filename_prefix="remote-vae-e2e")
        body = {"prompt": wires.graph, "client_id": self._client, "extra_data": {"extra_pnginfo": {"driver": "e2e"}}}
        started = time.monotonic()
        job = self.call("/prompt", body)["prompt_id"]
        while True:
            found = self.call(f"/history/{job}").get(job)
            if found is not None:
                break
            time.sleep(0.02)
        ended = time.monotonic()
        status = found["status"]
        if status["status_str"] != "success":
            kinds = [kind for kind, _ in status["messages"]]
            if "execution_interrupted" in kinds:
                return Shot(seconds=ended - started, ended=ended)
            error = next((data for kind, data in status["messages"] if kind == "execution_error"), {})
            raise urllib.error.URLError(error.get("exception_message", "the job failed"))
        images = [image for output in found["outputs"].values() for image in output.get("images", [])]
        pictures, infotext = [], ""
        for image in images:
            picture = self._view(image)
            said = json.loads(picture.info.get("remote_vae", "{}"))
            infotext = f"Remote VAE: {json.dumps(', '.join(dict.fromkeys(said.values())))}" if said else ""
            pictures.append(np.asarray(picture.convert("RGB")).astype(int))
        return Shot(pictures, ended - started, ended, infotext, saved=len(images))

    def _view(self, image: dict[str, str]) -> Image.Image:
        query = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
        with self._opener.open(f"{self._url}/view?{query}", timeout=60) as answer:
            return Image.open(io.BytesIO(answer.read()))


class Wires:
    """A graph in the making."""

    def __init__(self, run: int, mode: str, checkpoint: str) -> None:
        self.graph: Graph = {}
        self.run = run
        self._mode = mode
        self._checkpoint = checkpoint

    def add(self, kind: str, output: int = 0, **inputs: Any) -> Link:
        """A node, and the link to one of its outputs."""
        name = str(len(self.graph) + 1)
        self.graph[name] = {"class_type": kind, "inputs": inputs}
        return [name, output]

    def model(self, checkpoint: str = "") -> tuple[Link, Link, Link]:
        """Model, CLIP and VAE; the VAE behind a node, if it is switched on by one."""
        name = self.add("CheckpointLoaderSimple", ckpt_name=checkpoint or self._checkpoint)[0]
        return [name, 0], [name, 1], self.vae([name, 2])

    def vae(self, vae: Link) -> Link:
        if not self._mode:
            return vae
        return self.add("RemoteVAE", vae=vae, mode=self._mode, transfer="follow settings", family="auto")

    def sampled(self, seed: int, latents: Link, model: Link, clip: Link, *, steps: int = 4, denoise: float = 1.0) -> Link:
        positive = self.add("CLIPTextEncode", text="a cat", clip=clip)
        negative = self.add("CLIPTextEncode", text="", clip=clip)
        return self.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latents,
            seed=seed,
            steps=steps,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=denoise,
        )

    def new_latents(self, latents: Link, batch: int) -> Link:
        """The same latents, which no run had before: at most 64 runs of one graph."""
        return self.add("LatentFromBatch", samples=latents, batch_index=0, length=batch + self.run % (64 - batch))

    def new_images(self, images: Link) -> Link:
        return self.add("ImageFromBatch", image=images, batch_index=0, length=1 + self.run % 4000)

    def decoded(self, latents: Link, vae: Link, batch: int = 1) -> Link:
        return self.add("VAEDecode", samples=self.new_latents(latents, batch), vae=vae)

    def encoded(self, images: Link, vae: Link) -> Link:
        return self.add("VAEEncode", pixels=self.new_images(images), vae=vae)


class ComfyRows:
    """Makes the rows for ComfyUI."""

    def __init__(self, host: ComfyUi, names: Names) -> None:
        self._host = host
        self._names = names
        self._size = host.size
        self._source = host.upload("remote-vae-source.png", source_picture(host.size))
        self._mask = host.upload("remote-vae-mask.png", square_mask(host.size))

    def all(self) -> list[Row]:
        names = self._names
        if names.round_trip:
            return self._round_trips(names.round_trip)
        rows = [
            self._row("txt2img", self._plain(101)),
            self._row("batch of 3", self._plain(102, batch=3), pictures=3, batch=3),
            self._row("img2img", self._image(103)),
            self._row(SHARED_SOURCE, self._image(104, batch=3), pictures=3, batch=3),
            self._row("inpaint", self._inpaint),
            self._row("hires, latent upscaler", self._hires_latent),
            self._row("hires, pixel upscaler", self._hires_pixel, decodes_in_between=True),
            self._row("tiled nodes", self._tiled(107), untiled=self._image(107, size=128)),
        ]
        if names.vae:
            rows.append(Row("VAE switch and back", self._switched(self._plain(108, vae=names.vae), self._plain(109)), 2))
        if names.checkpoint:
            there = self._plain(110, checkpoint=names.checkpoint)
            rows.append(Row("model switch and back", self._switched(there, self._plain(111)), 2))
        if names.reload:
            rows.append(Row("after a restart", lambda: restarted(names.reload, lambda: self._host.run(self._plain(112)))))
        return rows

    def _round_trips(self, name: str) -> list[Row]:
        def through(frames: int = 1) -> Callable[[Wires], Link]:
            def build(wires: Wires) -> Link:
                vae = wires.vae(wires.add("VAELoader", vae_name=name))
                pictures = self._loaded(wires, self._size)
                if frames > 1:
                    pictures = wires.add("RepeatImageBatch", image=pictures, amount=frames)
                pixels = wires.add("ImageFromBatch", image=pictures, batch_index=0, length=frames + wires.run % 4000)
                return wires.decoded(wires.add("VAEEncode", pixels=pixels, vae=vae), vae, frames)

            return build

        return [
            self._row(f"{name}, encode and decode", through()),
            # Of a video VAE they are frames.
            self._row(f"{name}, 5 pictures", through(5), pictures=5, batch=5),
        ]

    def _row(
        self, name: str, build: Callable[[Wires], Link], untiled: Callable[[Wires], Link] | None = None, **more: Any
    ) -> Row:
        whole = None if untiled is None else lambda: self._host.run(untiled)
        return Row(name, lambda: self._host.run(build), untiled=whole, **more)

    def _switched(self, there: Callable[[Wires], Link], back: Callable[[Wires], Link]) -> Callable[[], Shot]:
        return lambda: self._host.run(there) + self._host.run(back)

    def _empty(self, wires: Wires, batch: int = 1) -> Link:
        return wires.add("EmptyLatentImage", width=self._size, height=self._size, batch_size=batch)

    def _plain(self, seed: int, batch: int = 1, vae: str = "", checkpoint: str = "") -> Callable[[Wires], Link]:
        def build(wires: Wires) -> Link:
            model, clip, own = wires.model(checkpoint)
            picked = wires.vae(wires.add("VAELoader", vae_name=vae)) if vae else own
            return wires.decoded(wires.sampled(seed, self._empty(wires, batch), model, clip), picked, batch)

        return build

    def _loaded(self, wires: Wires, size: int) -> Link:
        picture = wires.add("LoadImage", image=self._source)
        return picture if size == self._size else self._scaled(wires, picture, size)

    def _scaled(self, wires: Wires, picture: Link, size: int) -> Link:
        return wires.add("ImageScale", image=picture, upscale_method="bicubic", width=size, height=size, crop="disabled")

    def _image(self, seed: int, batch: int = 1, size: int = 0) -> Callable[[Wires], Link]:
        def build(wires: Wires) -> Link:
            model, clip, vae = wires.model()
            latents = wires.encoded(self._loaded(wires, size or self._size), vae)
            if batch > 1:
                latents = wires.add("RepeatLatentBatch", samples=latents, amount=batch)
            return wires.decoded(wires.sampled(seed, latents, model, clip, steps=8, denoise=0.5), vae, batch)

        return build

    def _tiled(self, seed: int) -> Callable[[Wires], Link]:
        """As ``_image``, by the nodes that work in tiles, of which there are four."""

        def build(wires: Wires) -> Link:
            model, clip, vae = wires.model()
            tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
            latents = wires.add("VAEEncodeTiled", pixels=wires.new_images(self._loaded(wires, 128)), vae=vae, **tiles)
            sampled = wires.new_latents(wires.sampled(seed, latents, model, clip, steps=8, denoise=0.5), 1)
            return wires.add("VAEDecodeTiled", samples=sampled, vae=vae, **tiles)

        return build

    def _inpaint(self, wires: Wires) -> Link:
        model, clip, vae = wires.model()
        mask = wires.add("LoadImageMask", image=self._mask, channel="red")
        pixels = wires.new_images(wires.add("LoadImage", image=self._source))
        latents = wires.add("VAEEncodeForInpaint", pixels=pixels, vae=vae, mask=mask, grow_mask_by=6)
        return wires.decoded(wires.sampled(105, latents, model, clip), vae)

    def _hires_latent(self, wires: Wires) -> Link:
        model, clip, vae = wires.model()
        small = wires.sampled(106, self._empty(wires), model, clip)
        large = wires.add("LatentUpscaleBy", samples=small, upscale_method="bislerp", scale_by=2.0)
        return wires.decoded(wires.sampled(106, large, model, clip, denoise=0.6), vae)

    def _hires_pixel(self, wires: Wires) -> Link:
        model, clip, vae = wires.model()
        small = wires.decoded(wires.sampled(113, self._empty(wires), model, clip), vae)
        large = wires.encoded(self._scaled(wires, small, 2 * self._size), vae)
        return wires.decoded(wires.sampled(113, large, model, clip, denoise=0.6), vae)
