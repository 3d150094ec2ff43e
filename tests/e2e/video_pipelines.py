"""The pipelines of diffusers whose VAE is one of videos, and AnimateDiff; see ``pipelines``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.pipelines import FLOW, NO_GUIDANCE, SIZE, TWO_TEXTS, UNET, Case, Part, ones, picture, sd_text, values


class _NothingUnsafe:
    """In the place of Cosmos' guardrail, a package of its own."""

    def to(self, device: object) -> None:
        """It has no weights."""

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, intermediate_size=16,
        patch_size=32,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def _feature_extractor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor()


def _ltx2_connectors() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    return LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=2, video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=4, video_connector_num_layers=1, video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4, audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_theta=10000.0,
        rope_double_precision=False, causal_temporal_positioning=False, rope_type="split",
    )  # fmt: skip


def _ltx2_vocoder() -> Any:
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    return LTX2Vocoder(
        in_channels=2 * 8, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip


# fmt: off
_wan_config = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
}
_wan: dict[str, Part] = {
    "transformer": ("WanTransformer3DModel", _wan_config), "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
}


def _video_text(channels: int = 16, **more: Any) -> Callable[[], dict[str, Any]]:
    """A video of 5 frames, of a text of 6 tokens."""
    return lambda: {"prompt_embeds": values(1, 6, channels), **SIZE, "num_frames": 5, **NO_GUIDANCE, **more}


_cosmos_config = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "mlp_ratio": 2, "text_embed_dim": 16,
    "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0),
    # To resize one it would need torchvision.
    "concat_padding_mask": False,
}

VIDEO_PIPELINES: tuple[Case, ...] = (
    Case(
        "AnimateDiff: text to video, 40 frames", "AnimateDiffPipeline", "sd1",
        {
            "unet": (
                "UNet2DConditionModel",
                {
                    **UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                },
            ),
            "motion_adapter": (
                "MotionAdapter",
                {
                    "block_out_channels": (16, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 8,
                    "motion_num_attention_heads": 2, "motion_max_seq_length": 40,
                },
            ),
            "scheduler": ("DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False}),
        },
        lambda: {**sd_text(), "height": 32, "width": 32, "num_frames": 40, "decode_chunk_size": 40},
        ("text_encoder", "tokenizer", "feature_extractor", "image_encoder"),
    ),
    Case("Wan 2.1: text to video", "WanPipeline", "wan", _wan, _video_text(negative_prompt=None), quick=True),
    Case(
        "Wan 2.1: image to video", "WanImageToVideoPipeline", "wan",
        {
            "transformer": ("WanTransformer3DModel", {**_wan_config, "in_channels": 36}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
        },
        _video_text(image=picture()), ("text_encoder", "tokenizer", "image_encoder", "image_processor"),
    ),
    Case("Wan 2.1: text to image (one frame)", "WanPipeline", "wan", _wan, _video_text(num_frames=1)),
    Case(
        "Wan 2.2 5B: text to video", "WanPipeline", "wan22-5b",
        {
            "transformer": ("WanTransformer3DModel", {**_wan_config, "in_channels": 48, "out_channels": 48}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}), "expand_timesteps": True,
        },
        _video_text(), quick=True,
    ),
    Case(
        "Cosmos-Predict2: text to image", "Cosmos2TextToImagePipeline", "wan",
        {
            "transformer": ("CosmosTransformer3DModel", {**_cosmos_config, "in_channels": 16, "out_channels": 16}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}), "safety_checker": _NothingUnsafe,
        },
        lambda: {"prompt_embeds": values(1, 6, 16), **NO_GUIDANCE, **SIZE},
    ),
    Case(
        "Cosmos 1: video to world", "CosmosVideoToWorldPipeline", "cosmos",
        {
            "transformer": ("CosmosTransformer3DModel", {**_cosmos_config, "in_channels": 17, "out_channels": 16}),
            "scheduler": ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}), "safety_checker": _NothingUnsafe,
        },
        lambda: {"prompt_embeds": values(1, 6, 16), "image": picture(), "num_frames": 9, **NO_GUIDANCE, **SIZE},
        quick=True,
    ),
    Case(
        "HunyuanVideo: text to video", "HunyuanVideoPipeline", "hunyuan-video",
        {
            "transformer": (
                "HunyuanVideoTransformer3DModel",
                {
                    "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 10,
                    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
                    "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
                },
            ),
            "scheduler": FLOW,
        },
        _video_text(pooled_prompt_embeds=values(1, 8), prompt_attention_mask=ones(1, 6)), TWO_TEXTS, quick=True,
    ),
    Case(
        "HunyuanVideo 1.5: text to video", "HunyuanVideo15Pipeline", "hunyuan-video-1.5",
        {
            "transformer": (
                "HunyuanVideo15Transformer3DModel",
                {
                    "in_channels": 65, "out_channels": 32, "num_attention_heads": 2, "attention_head_dim": 8,
                    "num_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1,
                    "text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 12, "rope_axes_dim": (2, 2, 4),
                    "target_size": 16, "task_type": "t2v",
                },
            ),
            "scheduler": FLOW, "guider": ("ClassifierFreeGuidance", {"guidance_scale": 1.0}),
        },
        lambda: {
            "prompt_embeds": values(1, 6, 16), "prompt_embeds_mask": ones(1, 6), "prompt_embeds_2": values(1, 6, 16),
            "prompt_embeds_mask_2": ones(1, 6), "num_frames": 5, **SIZE,
        },
        TWO_TEXTS, quick=True,
    ),
    Case(
        "LTX-Video: image to video", "LTXImageToVideoPipeline", "ltx",
        {
            "transformer": (
                "LTXVideoTransformer3DModel",
                {
                    "in_channels": 128, "out_channels": 128, "num_attention_heads": 4, "attention_head_dim": 8,
                    "cross_attention_dim": 32, "num_layers": 1, "caption_channels": 16,
                },
            ),
            "scheduler": FLOW,
        },
        _video_text(num_frames=9, prompt_attention_mask=ones(1, 6), image=picture()), quick=True,
    ),
    Case(
        "Mochi: text to video", "MochiPipeline", "mochi",
        {
            "transformer": (
                "MochiTransformer3DModel",
                {
                    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "pooled_projection_dim": 16,
                    "in_channels": 12, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 16,
                },
            ),
            "scheduler": FLOW,
        },
        _video_text(num_frames=7, prompt_attention_mask=ones(1, 6).bool()), quick=True,
    ),
    Case(
        "CogVideoX: text to video", "CogVideoXPipeline", "cogvideox",
        {
            "transformer": (
                "CogVideoXTransformer3DModel",
                {
                    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 16, "out_channels": 16,
                    "time_embed_dim": 2, "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 8,
                    "sample_frames": 9, "patch_size": 2, "max_text_seq_length": 6,
                },
            ),
            "scheduler": ("DDIMScheduler", {}),
        },
        _video_text(), quick=True,
    ),
    Case(
        "LTX-2: text to video with sound", "LTX2Pipeline", "ltx2",
        {
            "transformer": (
                "LTX2VideoTransformer3DModel",
                {
                    "in_channels": 128, "out_channels": 128, "num_attention_heads": 2, "attention_head_dim": 8,
                    "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4,
                    "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
                    "num_layers": 1, "caption_channels": 16, "qk_norm": "rms_norm_across_heads",
                    "rope_double_precision": False, "rope_type": "split",
                },
            ),
            "connectors": _ltx2_connectors,
            "audio_vae": (
                "AutoencoderKLLTX2Audio",
                {
                    "base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "resolution": 32, "latent_channels": 2,
                    "mel_bins": 8, "mid_block_add_attention": False,
                },
            ),
            "vocoder": _ltx2_vocoder, "scheduler": FLOW,
        },
        lambda: {
            **_video_text(2 * 16, num_frames=9)(), "prompt_attention_mask": ones(1, 6), "frame_rate": 25.0, "stg_scale": 0.0,
            "modality_scale": 1.0, "guidance_rescale": 0.0, "audio_guidance_scale": 1.0, "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0, "audio_guidance_rescale": 0.0, "use_cross_timestep": False,
        },
        quick=True, vae_config={"spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
    ),
    Case(
        "Stable Video Diffusion: image to video", "StableVideoDiffusionPipeline", "svd",
        {
            "unet": (
                "UNetSpatioTemporalConditionModel",
                {
                    "block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 16,
                    "num_attention_heads": 4, "projection_class_embeddings_input_dim": 24, "addition_time_embed_dim": 8,
                    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                },
            ),
            "image_encoder": _image_encoder, "feature_extractor": _feature_extractor,
            "scheduler": (
                "EulerDiscreteScheduler",
                {
                    "prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True,
                    "sigma_max": 700.0, "sigma_min": 0.002,
                },
            ),
        },
        lambda: {"image": picture(), "num_frames": 6, "decode_chunk_size": 4, **SIZE},
        (), quick=True,
    ),
    Case(
        "CogVideoX: an even number of latent frames", "CogVideoXPipeline", "cogvideox", {}, dict,
        calls=lambda vae: vae.decode(values(1, 16, 2, 8, 8)).sample,
    ),
)
