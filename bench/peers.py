"""The clients of others, unmodified, against our server with four VAEs behind it: every output type and family that they have.

diffusers' functions come from its package; SD.Next's and ComfyUI-HFRemoteVae's files from checkouts, which are read and not
kept here. Stand-ins take the place of the modules of SD.Next that its file imports. What a client returns is compared with what
the same VAE gives when it is called directly, in levels of 255; latents in standard deviations.

    python -m bench.peers [--sdnext PATH_TO_SDNEXT] [--hfremotevae PATH_TO_COMFYUI_HFREMOTEVAE]
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import diffusers
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import remote_utils
from diffusers.video_processor import VideoProcessor
from PIL import Image

from bench.vaes import of_the_public_endpoints
from remote_vae.server.own import OwnVaes, Source
from tests.conftest import ServerThread

VAES = of_the_public_endpoints()
HEIGHT, WIDTH = 128, 160
FRAMES = 9
# What the peers' own tests send.
DTYPES = {"sd1": torch.float16, "sdxl": torch.float16, "flux": torch.bfloat16, "hunyuan-video": torch.float16}
# The most that a row may be off: levels of 255, standard deviations of latents. Half precision in their processors makes a
# level (bfloat16 two); JPEG and H.264 lose more of such noise as random weights make, on average.
LEVELS = {"png": 1.01, "u8": 1.01, "pt": 2.1, "unit": 2.1, "jpg": 5.0, "mp4": 30.0}
DEVIATIONS = 0.05


@dataclass(frozen=True)
class Row:
    """One call of a client."""

    client: str
    family: str
    call: str
    gave: str
    off: float
    most: float
    error: str = ""

    @property
    def is_good(self) -> bool:
        return not self.error and self.off <= self.most


class Peers:
    """What is asked of the server, and what its VAEs give when they are called directly.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        generator = torch.Generator().manual_seed(13)
        self.latents = {
            name: torch.randn(
                (1, vae.family.latent_channels, *((3,) if vae.family.video else ()), HEIGHT // 8, WIDTH // 8),
                generator=generator,
            ).to(DTYPES[name])
            for name, vae in VAES.items()
        }

    def expected(self, name: str, latents: torch.Tensor, *, scaled: bool) -> torch.Tensor:
        """Levels, float ``[B, H, W, 3]``, of a video's frames."""
        vae = VAES[name]
        raw = latents.float()
        if scaled:
            raw = raw / vae.family.scaling_factor + vae.family.shift_factor
        with torch.inference_mode():
            pixels = vae.vae.decode(raw, return_dict=False)[0]
        frames = pixels if pixels.ndim == 4 else pixels[0].movedim(1, 0)
        return ((frames / 2 + 0.5).clamp(0, 1) * 255).movedim(1, -1)

    def encoded(self, name: str, pixels: torch.Tensor) -> torch.Tensor:
        """The mode, scaled as the family has it."""
        vae = VAES[name]
        with torch.inference_mode():
            raw = vae.vae.encode(pixels.float(), return_dict=False)[0].mode()
        return (raw - vae.family.shift_factor) * vae.family.scaling_factor


def row(client: str, family: str, call: str, kind: str, run: Callable[[], Any], expected: torch.Tensor) -> Row:
    """Run one call and compare what it gave."""
    most = DEVIATIONS if kind == "latents" else LEVELS[kind]
    try:
        result = run()
        off = _off(result, expected, kind)
        return Row(client, family, call, _described(result), off, most)
    except Exception as error:
        return Row(client, family, call, "", float("nan"), most, f"{type(error).__name__}: {error}"[:120])


def _off(result: Any, expected: torch.Tensor, kind: str) -> float:
    if kind == "latents":
        return ((result.float() - expected).abs().max() / expected.std()).item()
    made = levels_of(result, kind)
    if made.shape != expected.shape:
        raise ValueError(f"got {list(made.shape)}, expected {list(expected.shape)}")
    difference = (made - (expected.round() if kind in ("png", "u8") else expected)).abs()
    # Of what loses, the mean.
    return (difference.mean() if kind in ("jpg", "mp4") else difference.max()).item()


def levels_of(result: Any, kind: str) -> torch.Tensor:
    """Float ``[B, H, W, 3]`` of whatever a client returns."""
    if isinstance(result, bytes):
        with av.open(io.BytesIO(result)) as file:
            return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]).float()
    if isinstance(result, Image.Image):
        result = [result]
    if isinstance(result, list) and isinstance(result[0], Image.Image):
        return torch.stack([torch.from_numpy(np.array(picture)) for picture in result]).float()
    tensor = torch.cat(result) if isinstance(result, list) else result
    if tensor.dtype == torch.uint8:
        return tensor.float()
    if tensor.ndim == 5:
        tensor = tensor[0].movedim(1, 0)
    if kind == "unit":
        # ComfyUI's pictures have their channels last.
        return (tensor if tensor.shape[-1] == 3 else tensor.movedim(1, -1)).float() * 255
    return ((tensor.float() / 2 + 0.5).clamp(0, 1) * 255).movedim(1, -1)


def _described(result: Any) -> str:
    if isinstance(result, torch.Tensor):
        return f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
    if isinstance(result, list):
        return f"{len(result)} x {_described(result[0])}"
    if isinstance(result, bytes):
        return f"{len(result)} bytes"
    return f"{result.mode} {result.width} x {result.height}"


# --- diffusers -------------------------------------------------------------------------------------------------------------


def of_diffusers(peers: Peers) -> Iterator[Row]:
    """``remote_decode`` and ``remote_encode`` of the installed package."""
    client = f"diffusers {diffusers.__version__}"
    for name, vae in VAES.items():
        latents, family = peers.latents[name], vae.family
        factors = {"scaling_factor": family.scaling_factor, "shift_factor": family.shift_factor or None}
        expected = peers.expected(name, latents, scaled=True)
        processor = VideoProcessor() if family.video else VaeImageProcessor()

        decode = partial(remote_utils.remote_decode, f"{peers.url}/{name}/decode", **factors)
        calls: list[tuple[str, str, dict[str, Any]]] = [
            ("pt", "pt", {"output_type": "pt", "return_type": "pt"}),
            ("pt, processor", "u8", {"output_type": "pt", "return_type": "pil", "processor": processor}),
            ("pt, partial, to pt", "u8", {"output_type": "pt", "return_type": "pt", "partial_postprocess": True}),
            ("pt, partial, to pil", "u8", {"output_type": "pt", "return_type": "pil", "partial_postprocess": True}),
            ("pil, processor, to pt", "unit", {"output_type": "pil", "return_type": "pt", "processor": processor}),
            ("pil, processor, to pil", "u8", {"output_type": "pil", "return_type": "pil", "processor": processor}),
            ("do_scaling=True", "pt", {"output_type": "pt", "return_type": "pt", "scaling_factor": None, "shift_factor": None}),
        ]
        if family.video:
            calls.append(("mp4", "mp4", {"output_type": "mp4", "return_type": "mp4"}))
        else:
            calls += [(f"pil, {kind}", kind, {"output_type": "pil", "image_format": kind}) for kind in ("jpg", "png")]
        for call, kind, arguments in calls:
            # Their processor computes in the dtype of the answer.
            kind = "pt" if call == "pt, processor" and kind == "u8" else kind
            kind = "unit" if call == "pil, processor, to pil" else kind
            yield row(client, name, call, kind, partial(decode, latents, **arguments), expected)
        raw = {"output_type": "pt", "return_type": "pt", "do_scaling": False, "scaling_factor": None, "shift_factor": None}
        unscaled = peers.expected(name, latents, scaled=False)
        yield row(client, name, "do_scaling=False", "pt", partial(decode, latents, **raw), unscaled)
        if not family.video:
            batch = latents.repeat(2, 1, 1, 1)
            both = peers.expected(name, batch, scaled=True)
            asked = {"output_type": "pt", "return_type": "pt", "partial_postprocess": True}
            yield row(client, name, "a batch, partial", "u8", partial(decode, batch, **asked), both)
            yield from _encodes(client, peers, name, factors)
    latents = peers.latents["flux"]
    packed = latents.reshape(1, 16, HEIGHT // 16, 2, WIDTH // 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, -1, 64)
    family = VAES["flux"].family

    def decode_packed() -> Any:
        return remote_utils.remote_decode(
            f"{peers.url}/flux/decode", packed, scaling_factor=family.scaling_factor, shift_factor=family.shift_factor,
            output_type="pt", return_type="pt", height=HEIGHT, width=WIDTH,
        )  # fmt: skip

    yield row(client, "flux", "packed latents", "pt", decode_packed, peers.expected("flux", latents, scaled=True))


def _photo() -> Image.Image:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [127.5 + 127.5 * np.sin(x / (9.0 + 7 * index) + y / (13.0 + 5 * index)) for index in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def _pixels(photo: Image.Image) -> torch.Tensor:
    """Contiguous: of others diffusers' client sends memory that has been freed."""
    return (torch.from_numpy(np.array(photo)).movedim(-1, 0)[None].float() / 127.5 - 1).contiguous()


def _encodes(client: str, peers: Peers, name: str, factors: dict[str, Any]) -> Iterator[Row]:
    photo = _photo()
    pixels = _pixels(photo)
    expected = peers.encoded(name, pixels)
    encode = partial(remote_utils.remote_encode, f"{peers.url}/{name}/encode")
    for call, image in (("encode, PIL", photo), ("encode, float32", pixels), ("encode, float16", pixels.half())):
        yield row(client, name, call, "latents", partial(encode, image, **factors), expected)


# --- SD.Next ---------------------------------------------------------------------------------------------------------------

SDNEXT_MODELS = {"sd": "sd1", "pixartalpha": "sd1", "sdxl": "sdxl", "auraflow": "sdxl", "f1": "flux", "chroma": "flux",
                 "zimage": "flux", "lumina2": "flux", "hunyuanvideo": "hunyuan-video"}  # fmt: skip


def of_sdnext(peers: Peers, checkout: Path) -> Iterator[Row]:
    """``modules/vae/sd_vae_remote.py`` with stand-ins for what it imports of SD.Next."""
    shared = SimpleNamespace(
        opts=SimpleNamespace(remote_vae_type="raw", remote_vae_encode=True), sd_model_type="", sd_model=None
    )
    said: list[str] = []
    logger = SimpleNamespace(debug=lambda *_: None, error=said.append, warning=said.append)
    modules = _module("modules", logger=_module("modules.logger", log=logger), shared=shared)
    modules.devices = SimpleNamespace(cpu=torch.device("cpu"), dtype=torch.float16)
    modules.errors = SimpleNamespace(display=lambda error, _: said.append(str(error)))
    modules.modelloader = SimpleNamespace(hf_login=lambda: None)
    for name in ("shared", "devices", "errors", "modelloader"):
        sys.modules[f"modules.{name}"] = getattr(modules, name)
    client = _loaded("sdnext_remote", checkout / "modules" / "vae" / "sd_vae_remote.py")
    for table, op in ((client.hf_decode_endpoints, "decode"), (client.hf_encode_endpoints, "encode")):
        for model in table:
            if model in SDNEXT_MODELS:
                table[model] = f"{peers.url}/{SDNEXT_MODELS[model]}/{op}"

    for model, name in SDNEXT_MODELS.items():
        family = VAES[name].family
        config = {"scaling_factor": family.scaling_factor, "shift_factor": family.shift_factor or None}
        shared.sd_model = SimpleNamespace(vae=SimpleNamespace(config=config))
        shared.sd_model_type = model
        modules.devices.dtype = DTYPES[name]
        latents = peers.latents[name]
        batch = latents if family.video else torch.cat([latents, latents.flip(-1)])
        expected = peers.expected(name, batch, scaled=True)
        for kind in ("raw",) if family.video else ("raw", "png", "jpg"):
            shared.opts.remote_vae_type = kind

            def decode(batch: torch.Tensor = batch) -> Any:
                result = client.remote_decode(batch, width=WIDTH, height=HEIGHT)
                if isinstance(result, list) and not result:
                    raise RuntimeError(said[-1] if said else "nothing came")
                return result

            form = {"raw": "pt"}.get(kind, kind)
            yield row("SD.Next", f"{model} ({name})", f"{len(batch)} latents, {kind}", form, decode, expected)
        if model in client.hf_encode_endpoints and not family.video:
            photo = _photo()
            both = peers.encoded(name, torch.cat([_pixels(photo)] * 2))
            encode = partial(client.remote_encode, [photo, photo])
            yield row("SD.Next", f"{model} ({name})", "encode, 2 pictures", "latents", encode, both)


# --- ComfyUI-HFRemoteVae ---------------------------------------------------------------------------------------------------

HF_TYPES = {"SD": "sd1", "SDXL": "sdxl", "Flux": "flux", "HunyuanVideo": "hunyuan-video"}


def of_hfremotevae(peers: Peers, checkout: Path) -> Iterator[Row]:
    """``nodes.py``: its two nodes, and its function in every output type."""
    nodes = _loaded("hfremotevae_nodes", checkout / "nodes.py")
    decode, processor = nodes.remote_decode, VaeImageProcessor()
    for kind, name in HF_TYPES.items():
        family, latents = VAES[name].family, peers.latents[name]
        raw = latents.float() / family.scaling_factor + family.shift_factor
        # The nodes send what ComfyUI has: float32, and numpy knows no bfloat16.
        own = raw.half().float()
        expected = peers.expected(name, own, scaled=False)

        at = f"{peers.url}/{name}/decode"

        def ours(endpoint: str, tensor: torch.Tensor, at: str = at, **more: Any) -> Any:
            del endpoint
            return decode(at, tensor, **more)

        def node(own: torch.Tensor = own, kind: str = kind) -> Any:
            return nodes.HFRemoteVAEDecode().decode({"samples": own}, kind)[0]

        nodes.remote_decode = ours
        yield row("HFRemoteVae", name, "node Decode", "unit", node, expected)
        if not family.video:  # it tells a video by the address
            vae = nodes.HFRemoteVAE().create_vae(kind)[0]
            yield row("HFRemoteVae", name, "node VAE", "unit", partial(vae.decode, own), expected)
        nodes.remote_decode = decode
        sent = latents if latents.dtype != torch.bfloat16 else latents.half()
        scaled = peers.expected(name, sent, scaled=True)
        for wire in ("base64", "binary"):
            asked = {"input_tensor_type": wire, "output_tensor_type": wire}
            calls: list[tuple[str, str, dict[str, Any]]] = [
                (f"pt, {wire}", "pt", {"output_type": "pt"}),
                (f"pt, partial, {wire}", "u8", {"output_type": "pt", "partial_postprocess": True, "processor": processor}),
            ]
            if family.video:
                calls.append((f"mp4, {wire}", "mp4", {"output_type": "mp4"}))
            for call, form, arguments in calls:
                yield row("HFRemoteVae", name, call, form, partial(decode, at, sent, **asked, **arguments), scaled)


def _module(name: str, **attributes: Any) -> Any:
    made = types.ModuleType(name)
    made.__dict__.update(attributes)
    sys.modules[name] = made
    return made


def _loaded(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdnext", type=Path)
    parser.add_argument("--hfremotevae", type=Path)
    options = parser.parse_args()
    catalogue = OwnVaes([Source(name, name) for name in VAES], load=lambda source, **_: VAES[source])
    catalogue.start(preload=True)
    server = ServerThread(VAES["sd1"], catalogue=catalogue)
    peers = Peers(server.url)
    rows = list(of_diffusers(peers))
    if options.sdnext:
        rows += of_sdnext(peers, options.sdnext)
    if options.hfremotevae:
        rows += of_hfremotevae(peers, options.hfremotevae)
    print(f"{'client':<18} {'family':<28} {'call':<24} {'gave':<30} {'off':>7}  {'at most':>7}")
    for each in rows:
        said = "" if each.is_good else f"  NO {each.error}"
        print(f"{each.client:<18} {each.family:<28} {each.call:<24} {each.gave:<30} {each.off:7.3f}  {each.most:7.3f}{said}")
    bad = sum(not each.is_good for each in rows)
    print(f"{len(rows)} calls, {bad} of them not as they should be (off: levels of 255; of latents standard deviations)")
    server.close()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
