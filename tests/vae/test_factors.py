"""Model latents and raw ones, held against diffusers' own pipelines to the last bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, FlowMatchEulerDiscreteScheduler, LTXPipeline

from remote_vae.errors import InvalidRequest
from remote_vae.vae.factors import model_of, raw_of
from remote_vae.vae.families import family_of, find_family
from remote_vae.wire import DecodeRequest
from tests.vaes import small_vae
from tests.versions import of_diffusers

LATENTS = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(5)) * 3


def seen_by(vae: Any, run: Any) -> torch.Tensor:
    """The raw latents that ``run`` has ``vae`` decode."""
    seen: list[torch.Tensor] = []
    own = vae.decode
    vae.decode = lambda latents, *args, **kwargs: (seen.append(latents), own(latents, *args, **kwargs))[1]
    try:
        run()
    finally:
        del vae.decode
    return seen[0]


def wan() -> Any:
    transformer = of_diffusers("WanTransformer3DModel")(
        num_attention_heads=1, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=8, num_layers=1, rope_max_seq_len=32
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return of_diffusers("WanPipeline")(None, None, vae=small_vae("wan"), scheduler=scheduler, transformer=transformer)


def qwen() -> Any:
    transformer = of_diffusers("QwenImageTransformer2DModel")(
        num_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8, axes_dims_rope=(4, 2, 2)
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return of_diffusers("QwenImagePipeline")(scheduler, small_vae("qwen-image"), None, None, transformer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_decodes_what_its_pipeline_decodes(dtype: torch.dtype) -> None:
    pipe = wan().to(dtype)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": torch.randn(1, 4, 8, dtype=dtype), "height": 32, "width": 48, "num_frames": 5,
        "num_inference_steps": 1, "guidance_scale": 1.0,
    }  # fmt: skip
    latents: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].clone())
        return {}

    raw = seen_by(pipe.vae, lambda: pipe(**call, callback_on_step_end=keep))
    assert torch.equal(raw_of(latents[0].to(dtype), family_of(pipe.vae)), raw)


def test_qwen_image_decodes_its_packed_latents_as_its_pipeline_does() -> None:
    pipe = qwen()
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": torch.randn(1, 4, 8), "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long),
        "height": 32, "width": 48, "num_inference_steps": 1, "true_cfg_scale": 1.0,
    }  # fmt: skip
    packed: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        packed.append(values["latents"].clone())
        return {}

    raw = seen_by(pipe.vae, lambda: pipe(**call, callback_on_step_end=keep))
    family = family_of(pipe.vae)
    assert packed[0].shape == (1, 6, 64)
    assert torch.equal(raw_of(DecodeRequest(packed[0], height=32, width=48).unpacked(family), family), raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pipeline", "name", "drawn"),
    [("QwenImageImg2ImgPipeline", "qwen-image", True), ("QwenImage21Pipeline", "qwen-image-2.1", False)],
)
def test_latents_of_a_picture_are_scaled_as_in_its_pipeline(pipeline: str, name: str, drawn: bool, dtype: torch.dtype) -> None:
    vae = torch.nn.Module.to(small_vae(name), dtype)
    family = family_of(vae)
    image = torch.rand(1, family.pixel_channels, 1, 32, 48).to(dtype)
    pipe = SimpleNamespace(vae=vae, latent_channels=family.latent_channels)
    theirs = of_diffusers(pipeline)._encode_vae_image(pipe, image, torch.Generator().manual_seed(1))
    posterior = vae.encode(image).latent_dist
    raw = posterior.sample(torch.Generator().manual_seed(1)) if drawn else posterior.mode()
    assert torch.equal(model_of(raw, family), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ltx_takes_the_mean_and_deviation_among_its_weights(dtype: torch.dtype) -> None:
    vae = small_vae("ltx")
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    family, latents = family_of(vae), torch.randn(1, 128, 2, 2, 3).to(dtype)
    numbers = vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    assert torch.equal(raw_of(latents, family), LTXPipeline._denormalize_latents(latents, *numbers))
    assert torch.equal(model_of(latents, family), LTXPipeline._normalize_latents(latents, *numbers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cogvideox_is_scaled_as_in_its_pipeline(dtype: torch.dtype) -> None:
    vae = small_vae("cogvideox").to(dtype)
    latents = torch.randn(1, 2, 16, 2, 3).to(dtype)
    pipe = SimpleNamespace(vae=vae, vae_scaling_factor_image=vae.config.scaling_factor)
    raw = seen_by(vae, lambda: CogVideoXPipeline.decode_latents(pipe, latents))
    assert torch.equal(raw_of(latents.permute(0, 2, 1, 3, 4), family_of(vae)), raw)


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "flux2", "qwen-image", "wan22-5b", "hunyuan-video", "mochi", "sana"])
def test_the_two_ways_undo_each_other(name: str) -> None:
    family = find_family(name)
    latents = torch.randn(2, family.latent_channels, *((3,) if family.video else ()), 4, 6)
    assert torch.allclose(model_of(raw_of(latents, family), family), latents, atol=1e-5)


def test_what_only_a_scheduler_knows_is_refused_and_not_guessed() -> None:
    for way in (raw_of, model_of):
        with pytest.raises(InvalidRequest, match="send raw latents"):
            way(LATENTS, find_family("cosmos"))
