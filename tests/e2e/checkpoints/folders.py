"""Whole pipelines as folders of diffusers, for SD.Next."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.e2e.checkpoints import parts, tokenizers
from tests.e2e.checkpoints.names import text_in_full
from tests.e2e.checkpoints.parts import TINY, WIDE_TEXT

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd1(folder: Path, seed: int) -> Path:
    pipe = diffusers.StableDiffusionPipeline(
        vae=parts.kl_vae(TINY, "sd1", seed),
        unet=parts.unet(TINY, seed),
        text_encoder=parts.text_encoder(TINY.text, seed),
        tokenizer=tokenizers.clip(folder / "tokenizer"),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**_BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipe, folder, "text_encoder")


def sdxl(folder: Path, seed: int, second: Mapping[str, Any] = WIDE_TEXT) -> Path:
    """``second``: the configuration of its second text encoder."""
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=parts.kl_vae(TINY, "sdxl", seed),
        unet=parts.xl_unet(second, seed),
        text_encoder=parts.text_encoder(TINY.text, seed),
        text_encoder_2=parts.text_encoder(second, seed, projected=True),
        tokenizer=tokenizers.clip(folder / "tokenizer"),
        tokenizer_2=tokenizers.clip(folder / "tokenizer_2"),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**_BETAS),
        add_watermarker=False,
    )
    return _save(pipe, folder, "text_encoder", "text_encoder_2")


def qwen_image(folder: Path, seed: int) -> Path:
    tokenizer = tokenizers.qwen()
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 16}
    text = {**small, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}},
        vision_config={**small, "depth": 1, "num_heads": 2, "out_hidden_size": 16},
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=parts.other_vae("AutoencoderKLQwenImage", seed, base_dim=16),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return _save(pipe, folder)


def flux2_klein(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    # The pipeline takes what layers 9, 18 and 27 give.
    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=512,
        max_position_embeddings=1024,
    )
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=parts.flux2_vae(TINY.vae, TINY.vae, 1, seed),
        text_encoder=transformers.Qwen3ForCausalLM(config),
        tokenizer=tokenizers.qwen(),
        transformer=transformer,
        is_distilled=False,
    )
    return _save(pipe, folder)


def _save(pipe: Any, folder: Path, *clips: str) -> Path:
    """``clips``: its text encoders of CLIP, whose files are to be read by older versions of transformers as well."""
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    for name in clips:
        tokenizers.write_clip(folder / name.replace("text_encoder", "tokenizer"))
        weights = folder / name / "model.safetensors"
        save_file(text_in_full(load_file(weights)), weights, {"format": "pt"})
    return folder
