"""What each tiling does to a picture: its difference to the whole VAE's, beside each other in one PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from bench.client_overhead import photo_pixels
from bench.vae_call import Call

TARGET = Path(__file__).resolve().parent.parent / "docs" / "tiled-difference.png"
SIDE = 1024
PANEL = 300
GAP = 8
CAPTION = 48
AMPLIFIED = 10
MAX_FILE_BYTES = 600_000


def write(peer: str = "") -> None:
    """The astronaut at 1024 px, encoded by the small whole VAE and decoded by every method."""
    with torch.inference_mode():
        latents = Call("small", "encode", SIDE).prepare()(photo_pixels(SIDE).float())[:, :4]
        whole = Call("small", "decode", SIDE).prepare()(latents)
        panels = [_panel(_levels(whole), "whole VAE", f"to the right: difference to it x {AMPLIFIED}")]
        for method in ("exact", "diffusers tiling", *(("multidiffusion", "multidiffusion fast") if peer else ())):
            picture = Call("small", "decode", SIDE, method, peer=peer).prepare()(latents)
            panels.append(_difference(picture, whole, method))
    sheet = Image.new("RGB", (len(panels) * (PANEL + GAP) - GAP, PANEL + CAPTION), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index * (PANEL + GAP), 0))
    sheet.save(TARGET, optimize=True)
    size = TARGET.stat().st_size
    print(f"\ndocs/{TARGET.name}: {size / 1000:.0f} kB (at most {MAX_FILE_BYTES / 1000:.0f}), differences x {AMPLIFIED}")


def _difference(picture: torch.Tensor, whole: torch.Tensor, name: str) -> Image.Image:
    error = (picture.clamp(-1, 1) - whole.clamp(-1, 1)).abs() * 127.5
    rmse = (picture - whole).double().square().mean().sqrt().item()
    psnr = 20 * math.log10(2 / rmse) if rmse else math.inf
    return _panel(_image(error[0] * AMPLIFIED), name, f"max error {error.max():.2g} of 255, PSNR {psnr:.1f} dB")


def _levels(pixels: torch.Tensor) -> Image.Image:
    return _image((pixels[0].clamp(-1, 1) + 1) * 127.5)


def _image(levels: torch.Tensor) -> Image.Image:
    """``[3, H, W]`` in [0, 255]."""
    values: Any = levels.round().clamp(0, 255).permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return Image.fromarray(values)


def _panel(image: Image.Image, title: str, line: str) -> Image.Image:
    panel = Image.new("RGB", (PANEL, PANEL + CAPTION), "white")
    panel.paste(image.resize((PANEL, PANEL), Image.Resampling.BOX), (0, 0))
    draw = ImageDraw.Draw(panel)
    draw.text((4, PANEL + 4), title, fill="black", font=ImageFont.load_default(18))
    draw.text((4, PANEL + 27), line, fill="black", font=ImageFont.load_default(14))
    return panel
