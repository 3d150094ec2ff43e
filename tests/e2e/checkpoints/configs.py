"""What a host has to be told of checkpoints that are smaller than the published ones, in the form that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.checkpoints.parts import OPEN_CLIP, OPEN_CLIP_TEXT, TINY, XL_EMBEDDED

_NOTHING = {"target": "torch.nn.Identity"}
# The proxy of tests.e2e.hosts, in front of the server.
ENDPOINT = {"remotevae_endpoint": "http://127.0.0.1:7979"}


def a1111_sd1(clip: Path) -> dict[str, Any]:
    """AUTOMATIC1111's configuration of SD 1, with the folder of the tokenizer in the place of one on the hub."""
    text = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": str(clip)}}
    params = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 64,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": _unet("ldm", image_size=32, context_dim=TINY.text["hidden_size"]),
        "first_stage_config": _vae("ldm.models.autoencoder.AutoencoderKL"),
        "cond_stage_config": text,
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def a1111_xl(clip: Path) -> dict[str, Any]:
    """Its configuration of SDXL."""
    width, pooled = TINY.text["hidden_size"], OPEN_CLIP_TEXT["hidden_size"]
    modules = "sgm.modules.diffusionmodules"
    denoiser = {
        "num_idx": 1000,
        "weighting_config": {"target": f"{modules}.denoiser_weighting.EpsWeighting"},
        "scaling_config": {"target": f"{modules}.denoiser_scaling.EpsScaling"},
        "discretization_config": {"target": f"{modules}.discretizer.LegacyDDPMDiscretization"},
    }
    first = {"version": str(clip), "layer": "hidden", "layer_idx": TINY.text["num_hidden_layers"] - 1}
    second = {"arch": OPEN_CLIP, "version": "", "layer": "penultimate", "always_return_pooled": True, "legacy": False}
    embedders = [
        _embedder("FrozenCLIPEmbedder", "txt", first),
        _embedder("FrozenOpenCLIPEmbedder2", "txt", second),
        *(
            _embedder("ConcatTimestepEmbedderND", key, {"outdim": XL_EMBEDDED})
            for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        ),
    ]
    unet = _unet(
        "sgm",
        context_dim=width + pooled,
        adm_in_channels=6 * XL_EMBEDDED + pooled,
        num_classes="sequential",
        use_linear_in_transformer=True,
        spatial_transformer_attn_type="softmax",
    )
    params = {
        "scale_factor": 0.13025,
        "disable_first_stage_autocast": True,
        "denoiser_config": {"target": f"{modules}.denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": unet,
        "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": embedders}},
        "first_stage_config": _vae("sgm.models.autoencoder.AutoencoderKLInferenceWrapper"),
    }
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}


def _embedder(kind: str, key: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"is_trainable": False, "input_key": key, "target": f"sgm.modules.encoders.modules.{kind}", "params": params}


def _unet(package: str, **more: Any) -> dict[str, Any]:
    first = TINY.unet[0]
    params = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": first,
        "channel_mult": [width // first for width in TINY.unet],
        "attention_resolutions": [2**level for level, has in enumerate(TINY.attention) if has],
        "num_res_blocks": 1,
        "num_heads": TINY.heads,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "use_checkpoint": False,
        "legacy": False,
        **more,
    }
    return {"target": f"{package}.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _vae(target: str) -> dict[str, Any]:
    first = TINY.vae[0]
    shape = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": first,
        "ch_mult": [width // first for width in TINY.vae],
        "num_res_blocks": TINY.vae_layers,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"target": target, "params": {"embed_dim": 4, "ddconfig": shape, "lossconfig": _NOTHING}}
