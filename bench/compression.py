"""Lossless ways to send a picture of 1024 x 1024 px: bytes a pixel, and the processor's time on each side.

The photos are scikit-image's, scaled, at their own size in a mosaic of different ones, and as the demo's VAE decodes them; and
the same decodes as raw values. "delta" is what our client and server speak (remote_vae/wire/compression.py), beside PNG at
level 1, WebP without loss at its quickest, and zstd of the bytes as they are.

    python -m bench.compression
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import zstandard
from diffusers import AutoencoderKL
from PIL import Image
from skimage import data

from remote_vae.settings import settings_folder
from remote_vae.wire import compression
from remote_vae.wire.pixels import PNG_LEVEL, to_uint8
from remote_vae.wire.tensors import TensorHead, tensor_to_bytes

SIDE = 1024
PIXELS = SIDE * SIDE
# What must stand for photos: bytes a pixel, and milliseconds a side.
MOST_BYTES, MOST_MS = 1.8, 20.0
_RUNS = 5

Pack = Callable[[], bytes]
Unpack = Callable[[bytes], object]


@dataclass(frozen=True)
class Row:
    """What one way made of one picture."""

    picture: str
    way: str
    bytes_a_pixel: float
    pack_ms: float
    unpack_ms: float


def timed(run: Callable[[], object]) -> tuple[object, float]:
    """The result, and milliseconds of the processor: the quickest of a few runs."""
    best, result = float("inf"), None
    for _ in range(_RUNS):
        started = time.process_time()
        result = run()
        best = min(best, time.process_time() - started)
    return result, 1000.0 * best


def photos() -> dict[str, np.ndarray]:
    """uint8 ``[SIDE, SIDE, 3]`` each."""
    scaled = {name: getattr(data, name)() for name in ("astronaut", "coffee", "cat", "retina")}
    made = {f"{name}, scaled": _square(picture) for name, picture in scaled.items()}
    # As sharp as a photo is that was made smaller.
    parts = [data.astronaut(), data.coffee()[:, 44:556], data.rocket()[:, 64:576], data.immunohistochemistry()]
    rows = [np.concatenate([part[:300] for part in parts[start : start + 2]], axis=1) for start in (0, 2)]
    sharp = np.concatenate([*rows, np.concatenate([part[-212:, ::-1] for part in parts[1:3]], axis=1)])
    made["four sharp photos"] = np.concatenate([sharp, sharp[:, ::-1]])[:SIDE]
    made["hubble_deep_field"] = _square(data.hubble_deep_field())
    return made


def _square(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def decodes(pictures: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What the demo's VAE makes of them: float32 ``[1, 3, SIDE, SIDE]``."""
    vae = AutoencoderKL.from_pretrained(settings_folder().parent / "assets" / "demo_vae")
    made = {}
    for name in ("astronaut, scaled", "four sharp photos"):
        pixels = torch.from_numpy(pictures[name]).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            made[name] = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    return made


def ways(levels: np.ndarray) -> dict[str, tuple[Pack, Unpack]]:
    """How to send levels, and how to read them."""
    image, plain = Image.fromarray(levels), levels.tobytes()

    def file(kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    def opened(body: bytes) -> np.ndarray:
        return np.array(Image.open(io.BytesIO(body)))

    return {
        **delta(TensorHead((1, *levels.shape), torch.uint8), plain, -1),
        f"PNG, level {PNG_LEVEL}": (partial(file, "PNG", compress_level=PNG_LEVEL), opened),
        "WebP, quickest": (partial(file, "WEBP", lossless=True, quality=0, method=0), opened),
        "zstd, level 1": (partial(zstandard.ZstdCompressor(level=1).compress, plain), zstandard.ZstdDecompressor().decompress),
    }


def delta(head: TensorHead, values: bytes | memoryview, channel: int) -> dict[str, tuple[Pack, Unpack]]:
    """Ours."""
    return {
        name: (
            partial(compression.compressed, values, head, channel, coding),
            partial(compression.decompressed, head=head, channel=channel, coding=coding),
        )
        for name, coding in compression.codings().items()
    }


def measured(picture: str, way: str, pack: Pack, unpack: Unpack) -> Row:
    body, pack_ms = timed(pack)
    assert isinstance(body, bytes)
    _, unpack_ms = timed(partial(unpack, body))
    return Row(picture, way, len(body) / PIXELS, pack_ms, unpack_ms)


def main() -> int:
    torch.set_num_threads(1)
    pictures = photos()
    pixels = decodes(pictures)
    levels = {**pictures, **{f"decode of {name}": to_uint8(made)[0].numpy() for name, made in pixels.items()}}
    rows = [measured(name, way, *each) for name, made in levels.items() for way, each in ways(made).items()]
    for name, made in pixels.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            tensor = made.to(dtype)
            kinds = delta(TensorHead(tuple(tensor.shape), dtype), tensor_to_bytes(tensor), 1)
            kind = f"{name}, raw {str(dtype).removeprefix('torch.')}"
            rows += [measured(kind, way, *each) for way, each in kinds.items()]
    print(f"{'picture':<36} {'way':<16} {'bytes/pixel':>11} {'pack ms':>8} {'unpack ms':>9}")
    for row in rows:
        print(f"{row.picture:<36} {row.way:<16} {row.bytes_a_pixel:11.2f} {row.pack_ms:8.1f} {row.unpack_ms:9.1f}")
    ours = [row for row in rows if row.way == next(iter(compression.codings())) and ", raw" not in row.picture]
    good = [row for row in ours if row.bytes_a_pixel <= MOST_BYTES and max(row.pack_ms, row.unpack_ms) <= MOST_MS]
    print(f"{len(good)} of {len(ours)} within {MOST_BYTES} bytes a pixel and {MOST_MS:g} ms a side, by {ours[0].way}")
    return 0 if len(good) == len(ours) else 1


if __name__ == "__main__":
    sys.exit(main())
