"""The pipelines of diffusers that make pictures with an image VAE, or with that of Qwen-Image; see ``pipelines``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.e2e.pipelines import (
    CELLS,
    DDIM,
    EULER,
    FLOW,
    NO_GUIDANCE,
    SAFETY,
    SIDE,
    SIZE,
    TWO_TEXTS,
    UNET,
    Case,
    Part,
    ones,
    picture,
    sd_text,
    values,
)


class _NoProcessor:
    """In the place of Qwen-Image-2.1's, which is asked for the length of its system prompt and for one token."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, text: str) -> list[int]:
        return [0]


def _small_hidream(pipe: Any) -> None:
    """It makes every picture as large as its model's, 1024 pixels a side."""
    pipe.default_sample_size = SIDE // 8


def _small_edit(pipe: Any) -> None:
    """It makes every picture that is edited as large as its model's."""
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as module

    module.VAE_IMAGE_SIZE = module.CONDITION_IMAGE_SIZE = SIDE**2


def _kolors(vae: Any) -> Any:
    return vae.decode(values(1, 4, 8, 8) / vae.config.scaling_factor, return_dict=False)[0]


def _refined(vae: Any) -> Any:
    encoded = vae.encode(values(1, 3, 1, 16 * CELLS, 16 * CELLS).clamp(-1, 1)).latent_dist
    return vae.decode(encoded.sample(torch.Generator().manual_seed(4)), return_dict=False)[0][:, :, 0]


# fmt: off
_sd: dict[str, Part] = {"unet": ("UNet2DConditionModel", UNET), "scheduler": DDIM, "requires_safety_checker": False}
_sdxl: dict[str, Part] = {
    "unet": (
        "UNet2DConditionModel",
        {
            **UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
    ),
    "scheduler": EULER, "add_watermarker": False,
}
def _sdxl_text() -> dict[str, Any]:
    return {**sd_text(), "pooled_prompt_embeds": values(1, 16)}


_mask = Image.fromarray(np.pad(np.full((SIDE // 2, SIDE // 2), 255, np.uint8), SIDE // 4))

_flux: dict[str, Part] = {
    "transformer": (
        "FluxTransformer2DModel",
        {
            "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        },
    ),
    "scheduler": FLOW,
}


def _flux_text() -> dict[str, Any]:
    return {"prompt_embeds": values(1, 6, 32), "pooled_prompt_embeds": values(1, 32)}


_flux2_config = {
    "in_channels": 128, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4, 4),
}
_flux2: dict[str, Part] = {"transformer": ("Flux2Transformer2DModel", _flux2_config), "scheduler": FLOW}
_klein: dict[str, Part] = {
    "transformer": ("Flux2Transformer2DModel", {**_flux2_config, "guidance_embeds": False}), "scheduler": FLOW,
}

_qwen_config = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
}
_qwen: dict[str, Part] = {"transformer": ("QwenImageTransformer2DModel", _qwen_config), "scheduler": FLOW}


def _qwen_text() -> dict[str, Any]:
    return {"prompt_embeds": values(1, 6, 16), "prompt_embeds_mask": ones(1, 6), "true_cfg_scale": 1.0}

PICTURE_PIPELINES: tuple[Case, ...] = (
    Case(
        "SD 1, SD 2: text to image", "StableDiffusionPipeline", "sd1", _sd,
        lambda: {**sd_text(), **SIZE},
        ("text_encoder", "tokenizer", *SAFETY), quick=True,
    ),
    Case(
        "SD 1: image to image", "StableDiffusionImg2ImgPipeline", "sd1", _sd,
        lambda: {**sd_text(), "image": picture(), "strength": 1.0},
        ("text_encoder", "tokenizer", *SAFETY),
    ),
    Case(
        "SD 1: inpaint", "StableDiffusionInpaintPipeline", "sd1", _sd,
        lambda: {**sd_text(), **SIZE, "image": picture(), "mask_image": _mask, "strength": 1.0},
        ("text_encoder", "tokenizer", *SAFETY),
    ),
    Case(
        "SD 1 with the asymmetric VAE: text to image", "StableDiffusionPipeline", "asymmetric", _sd,
        lambda: {**sd_text(), **SIZE},
        ("text_encoder", "tokenizer", *SAFETY), quick=True,
    ),
    Case(
        "SD 1 with TAESD: image to image", "StableDiffusionImg2ImgPipeline", "taesd", _sd,
        lambda: {**sd_text(), "image": picture(), "strength": 1.0},
        ("text_encoder", "tokenizer", *SAFETY), quick=True,
    ),
    Case("SDXL: text to image", "StableDiffusionXLPipeline", "sdxl", _sdxl, lambda: {**_sdxl_text(), **SIZE}, TWO_TEXTS),
    Case(
        "SDXL: image to image", "StableDiffusionXLImg2ImgPipeline", "sdxl", _sdxl,
        lambda: {**_sdxl_text(), "image": picture(), "strength": 1.0},
        TWO_TEXTS,
    ),
    Case(
        "Kolors: text to image", "KolorsPipeline", "sdxl", {}, dict,
        # The pipeline needs sentencepiece.
        calls=_kolors,
    ),
    Case(
        "PixArt-Sigma: text to image", "PixArtSigmaPipeline", "sdxl",
        {
            "transformer": (
                "PixArtTransformer2DModel",
                {
                    "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
                    "caption_channels": 16, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8,
                    "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
                },
            ),
            "scheduler": DDIM,
        },
        lambda: {
            "prompt_embeds": values(1, 6, 16), "prompt_attention_mask": ones(1, 6), "use_resolution_binning": False,
            "negative_prompt": None, **NO_GUIDANCE, **SIZE,
        },
    ),
    Case(
        "Stable Diffusion 3: text to image", "StableDiffusion3Pipeline", "sd3",
        {
            "transformer": (
                "SD3Transformer2DModel",
                {
                    "sample_size": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1,
                    "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16,
                    "joint_attention_dim": 16, "pooled_projection_dim": 16,
                },
            ),
            "scheduler": FLOW,
        },
        lambda: {**_sdxl_text(), **SIZE},
        (*TWO_TEXTS, "text_encoder_3", "tokenizer_3"),
    ),
    Case("Flux.1: text to image", "FluxPipeline", "flux", _flux, lambda: {**_flux_text(), **SIZE}, TWO_TEXTS),
    Case(
        "Flux.1: image to image", "FluxImg2ImgPipeline", "flux", _flux,
        lambda: {**_flux_text(), **SIZE, "image": picture(), "strength": 1.0},
        TWO_TEXTS,
    ),
    Case(
        "Flux.1 Kontext: edit", "FluxKontextPipeline", "flux", _flux,
        lambda: {**_flux_text(), **SIZE, "image": picture(), "max_area": SIDE**2, "_auto_resize": False},
        TWO_TEXTS,
    ),
    Case(
        "Chroma: text to image", "ChromaPipeline", "flux",
        {
            "transformer": (
                "ChromaTransformer2DModel",
                {
                    "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
                    "approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16,
                },
            ),
            "scheduler": FLOW,
        },
        lambda: {"prompt_embeds": values(1, 6, 32), "prompt_attention_mask": ones(1, 6).bool(), **NO_GUIDANCE, **SIZE},
    ),
    Case(
        "Z-Image: text to image", "ZImagePipeline", "flux",
        {
            "transformer": (
                "ZImageTransformer2DModel",
                {
                    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 32, "n_layers": 1,
                    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [8, 4, 4],
                    "axes_lens": [256, 32, 32],
                },
            ),
            "scheduler": FLOW,
        },
        lambda: {"prompt_embeds": [values(6, 16)], "guidance_scale": 0.0, **SIZE},
    ),
    Case(
        "Lumina 2: text to image", "Lumina2Pipeline", "flux",
        {
            "transformer": (
                "Lumina2Transformer2DModel",
                {
                    "sample_size": 8, "patch_size": 2, "in_channels": 16, "hidden_size": 8, "num_layers": 1,
                    "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": [4, 2, 2],
                    "cap_feat_dim": 8,
                },
            ),
            "scheduler": FLOW,
        },
        lambda: {"prompt_embeds": values(1, 6, 8), "prompt_attention_mask": ones(1, 6), **NO_GUIDANCE, **SIZE},
    ),
    Case(
        "HiDream: text to image", "HiDreamImagePipeline", "flux",
        {
            "transformer": (
                "HiDreamImageTransformer2DModel",
                {
                    "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1,
                    "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [32, 16], "text_emb_dim": 64,
                    "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2),
                    "max_resolution": (32, 32), "llama_layers": (0, 1),
                },
            ),
            "scheduler": FLOW,
        },
        lambda: {
            "prompt_embeds_t5": values(1, 6, 32), "prompt_embeds_llama3": values(2, 1, 6, 16),
            "pooled_prompt_embeds": values(1, 64), **NO_GUIDANCE, **SIZE,
        },
        (*TWO_TEXTS, "text_encoder_3", "tokenizer_3", "text_encoder_4", "tokenizer_4"), prepare=_small_hidream,
    ),
    Case(
        "Flux.2: text to image", "Flux2Pipeline", "flux2", _flux2,
        lambda: {"prompt_embeds": values(1, 6, 16), **SIZE},
        quick=True,
    ),
    Case(
        "Flux.2: edit of a picture", "Flux2Pipeline", "flux2", _flux2,
        lambda: {"prompt_embeds": values(1, 6, 16), **SIZE, "image": [picture()]},
    ),
    Case(
        "Flux.2 with the small decoder: text to image", "Flux2Pipeline", "flux2-small", _flux2,
        lambda: {"prompt_embeds": values(1, 6, 16), **SIZE},
    ),
    Case(
        "Flux.2 Klein: text to image", "Flux2KleinPipeline", "flux2", _klein,
        lambda: {"prompt_embeds": values(1, 6, 16), **NO_GUIDANCE, **SIZE},
    ),
    Case("Qwen-Image: text to image", "QwenImagePipeline", "qwen-image", _qwen, lambda: {**_qwen_text(), **SIZE}, quick=True),
    Case(
        "Qwen-Image: image to image", "QwenImageImg2ImgPipeline", "qwen-image", _qwen,
        lambda: {**_qwen_text(), **SIZE, "image": picture(), "strength": 1.0},
    ),
    Case(
        "Qwen-Image-Edit (2509): edit", "QwenImageEditPlusPipeline", "qwen-image", _qwen,
        lambda: {**_qwen_text(), **SIZE, "image": [picture()]},
        ("text_encoder", "tokenizer", "processor"), prepare=_small_edit,
    ),
    Case(
        "Qwen-Image-2.1: text to image (RGBA)", "QwenImage21Pipeline", "qwen-image-2.1",
        {
            "transformer": (
                "QwenImage21Transformer2DModel",
                {
                    "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "context_in_dim": 16,
                    "axes_dims_rope": (8, 4, 4),
                },
            ),
            "scheduler": FLOW, "processor": _NoProcessor,
        },
        lambda: {"prompt_embeds": values(1, 6, 16), **SIZE},
        ("text_encoder",), quick=True,
    ),
    Case(
        "Krea 2: text to image", "Krea2Pipeline", "qwen-image",
        {
            "transformer": (
                "Krea2Transformer2DModel",
                {
                    "in_channels": 64, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16,
                    "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
                    "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
                    "axes_dims_rope": (4, 2, 2),
                },
            ),
            "scheduler": FLOW, "text_encoder_select_layers": (0, 1, 2),
        },
        lambda: {"prompt_embeds": values(1, 6, 3, 16), "prompt_embeds_mask": ones(1, 6).bool(), "guidance_scale": 0.0, **SIZE},
    ),
    Case(
        "Sana: text to image", "SanaPipeline", "sana",
        {
            "transformer": (
                "SanaTransformer2DModel",
                {
                    "patch_size": 1, "in_channels": 32, "out_channels": 32, "num_layers": 1, "num_attention_heads": 2,
                    "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
                    "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 32,
                },
            ),
            "scheduler": FLOW,
        },
        lambda: {
            "prompt_embeds": values(1, 6, 8), "prompt_attention_mask": ones(1, 6), "use_resolution_binning": False,
            **NO_GUIDANCE, **SIZE,
        },
        quick=True,
    ),
    Case(
        "HunyuanImage 2.1: text to image", "HunyuanImagePipeline", "hunyuan-image",
        {
            "transformer": (
                "HunyuanImageTransformer2DModel",
                {
                    "in_channels": 64, "out_channels": 64, "num_attention_heads": 4, "attention_head_dim": 8,
                    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1),
                    "guidance_embeds": True, "text_embed_dim": 16, "text_embed_2_dim": 16, "rope_axes_dim": (4, 4),
                },
            ),
            "scheduler": FLOW,
        },
        lambda: {
            "prompt_embeds": values(1, 6, 16), "prompt_embeds_mask": ones(1, 6), "prompt_embeds_2": values(1, 6, 16),
            "prompt_embeds_mask_2": ones(1, 6), "distilled_guidance_scale": 1.0, **SIZE,
        },
        TWO_TEXTS, quick=True,
    ),
    Case(
        "HunyuanImage 2.1: refiner", "HunyuanImageRefinerPipeline", "hunyuan-image-refiner", {}, dict,
        # The pipeline's transformer is made for one size of picture.
        calls=_refined,
    ),
)
