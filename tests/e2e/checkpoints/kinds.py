"""What each host gets, and where it looks for it below its own folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.checkpoints import configs, files, folders, parts, tokenizers
from tests.e2e.checkpoints.files import save
from tests.e2e.checkpoints.parts import FULL, SMALL, TINY
from tests.original_names import ORIGINAL

# What is added to the seed for the first checkpoint, the second, and the separate VAE.
A, B, C = 1, 2, 3


@dataclass(frozen=True)
class Made:
    """What was made for a host, and how the driver is told of it.

    Attributes:
        written: files and folders.
        serve: the one of them whose VAE is served.
        vae: the separate VAE by the host's name.
        checkpoint: the second checkpoint by the host's name.
        settings: what the host's config.json has to say.
    """

    written: Sequence[Path]
    serve: Path
    vae: str
    checkpoint: str
    settings: Mapping[str, Any]


def a1111(out: Path, seed: int) -> Made:
    """AUTOMATIC1111: it takes any size that its configuration of SD 1 has. That of SDXL lies beside the checkpoint."""
    models, separate = out / "models" / "Stable-diffusion", out / "models" / "VAE" / "tiny-c.safetensors"
    clip = tokenizers.write_clip(out / "models" / "tiny-clip")
    parts.text_encoder(TINY.text, seed).config.save_pretrained(clip)
    written = [
        save(models / "tiny-a.safetensors", files.sd1(TINY, seed + A)),
        save(models / "tiny-b.safetensors", files.sd1(TINY, seed + B)),
        save(models / "tiny-xl.safetensors", files.sdxl(seed + A)),
        save(separate, files.kl(parts.kl_vae(TINY, "sd1", seed + C))),
        clip,
        _write(models / "tiny-xl.yaml", configs.a1111_xl(clip)),
        _write(out / "configs" / "v1-inference.yaml", configs.a1111_sd1(clip)),
    ]
    settings = {"sd_model_checkpoint": "tiny-a.safetensors", "sd_vae": "Automatic", **configs.ENDPOINT}
    return Made(written, written[0], separate.name, "tiny-b.safetensors", settings)


def forge(out: Path, seed: int) -> Made:
    """Forge and Forge Neo: the sizes of VAE and text encoder are files of theirs."""
    models, separate = out / "models" / "Stable-diffusion", out / "models" / "VAE" / "small-c.safetensors"
    known = out / "backend" / "huggingface" / "runwayml" / "stable-diffusion-v1-5"
    vae = parts.kl_vae(SMALL, "sd1", seed + C)
    vae.save_config(known / "vae")
    parts.text_encoder(SMALL.text, seed).config.save_pretrained(known / "text_encoder")
    written = [
        save(models / "small-a.safetensors", files.sd1(SMALL, seed + A), half=True),
        save(models / "small-b.safetensors", files.sd1(SMALL, seed + B), half=True),
        save(separate, files.kl(vae), half=True),
        known / "vae" / "config.json",
        known / "text_encoder" / "config.json",
    ]
    settings = {"sd_model_checkpoint": "small-a.safetensors", **configs.ENDPOINT}
    return Made(written, written[0], str(separate), "small-b.safetensors", settings)


def sdnext(out: Path, seed: int) -> Made:
    """SD.Next: folders of diffusers."""
    models, separate = out / "models" / "Diffusers", out / "models" / "VAE" / "tiny-c"
    parts.kl_vae(TINY, "sd1", seed + C).save_pretrained(separate)
    written = [
        folders.sd1(models / "tiny-a", seed + A),
        folders.sd1(models / "tiny-b", seed + B),
        folders.sdxl(models / "tiny-xl", seed + A),
        folders.qwen_image(models / "tiny-qwen-image", seed + A),
        folders.flux2_klein(models / "tiny-flux.2-klein", seed + A),
        separate,
    ]
    settings = {
        "sd_model_checkpoint": "Diffusers/tiny-a",
        "sd_vae": "Default",
        "samples_format": "png",
        "show_progress_type": "None",
        "diffusers_offload_mode": "none",
        # Else no VAE's folder is loaded.
        "diffuser_cache_config": False,
        # Else each generation looks for Triton.
        "sdnq_dequantize_compile": False,
        # Else text encoders are the published ones of the hub.
        "te_shared_te": False,
        **configs.ENDPOINT,
    }
    return Made(written, written[0] / "vae", separate.name, "Diffusers/tiny-b", settings)


def comfyui(out: Path, seed: int) -> Made:
    """ComfyUI: VAE and text encoder of SD 1 have their whole size. The other VAEs are for round trips."""
    checkpoints, vaes = out / "models" / "checkpoints", out / "models" / "vae"
    flux2 = parts.flux2_vae(FULL.vae, (32, 64, 128, 128), 2, seed + C)
    wan = parts.other_vae("AutoencoderKLWan", seed + C, base_dim=16)
    written = [
        save(checkpoints / "full-a.safetensors", files.sd1(FULL, seed + A), half=True),
        save(checkpoints / "full-b.safetensors", files.sd1(FULL, seed + B), half=True),
        save(vaes / "full-c.safetensors", files.kl(parts.kl_vae(FULL, "sd1", seed + C)), half=True),
        save(vaes / "flux-full.safetensors", files.kl(parts.kl_vae(FULL, "flux", seed + C)), half=True),
        save(vaes / "flux2-small.safetensors", ORIGINAL["flux2", "ldm"](flux2.state_dict()), half=True),
        # Qwen-Image's VAE is of the same kind.
        save(vaes / "wan-tiny.safetensors", ORIGINAL["wan", "Wan"](wan.state_dict())),
    ]
    return Made(written, written[0], "full-c.safetensors", "full-b.safetensors", {})


KINDS: Mapping[str, Callable[[Path, int], Made]] = {"a1111": a1111, "forge": forge, "sdnext": sdnext, "comfyui": comfyui}


def _write(path: Path, content: object) -> Path:
    """JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
