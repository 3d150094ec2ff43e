"""What a pipeline of diffusers with tiny random parts is: one entry of data in ``picture_pipelines`` or ``video_pipelines``.

Sizes are those at which a pipeline runs in a second on a CPU. The VAEs are those of ``tests.vaes``: the real classes with the
real shapes and factors. Text encoders are left out, as every pipeline takes embeddings in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import diffusers
import numpy as np
import torch
from PIL import Image

from remote_vae.vae.families import family_of
from tests.vaes import small_vae

# A class of diffusers with its config; what makes the part; or the part itself.
Part = Union[tuple[str, Mapping[str, Any]], Callable[[], Any], None, bool, int, float, tuple[int, ...]]

# Of the picture that goes in, where one does.
SIDE = 64
# Latent cells that a picture has at least along one side: more than one tile of the VAE's own.
CELLS = 6
STEPS = 2


def picture(seed: int = 0, side: int = SIDE) -> Image.Image:
    """A picture of coarse random colours."""
    levels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)


def values(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        name: what people call it.
        pipeline: the class of diffusers; of one that cannot be built here the name, and ``calls`` stands in for it.
        vae: a key of ``tests.vaes.SMALL``.
        parts: the other components that are not None.
        arguments: what it is called with.
        without: components that it takes and that are None here.
        quick: whether it stands for its class of VAE in the tests of every day.
        prepare: run before the call, with the pipeline.
        vae_config: what its VAE has other than that of ``tests.vaes``.
        calls: what the pipeline asks of its VAE, in the place of a pipeline that cannot be built without what is not here.
    """

    name: str
    pipeline: str
    vae: str
    parts: Mapping[str, Part]
    arguments: Callable[[], dict[str, Any]]
    without: tuple[str, ...] = ("text_encoder", "tokenizer")
    quick: bool = False
    prepare: Optional[Callable[[Any], None]] = None
    vae_config: Mapping[str, Any] = field(default_factory=dict)
    calls: Optional[Callable[[Any], torch.Tensor]] = None

    def make(self) -> Any:
        """The pipeline. The same weights every time."""
        vae = small_vae(self.vae, **self.vae_config)
        torch.manual_seed(0)
        parts = {name: _made(part) for name, part in self.parts.items()}
        if self.calls is not None:
            return OnlyCalls(vae, self.calls)
        pipe = getattr(diffusers, self.pipeline)(vae=vae, **dict.fromkeys(self.without), **parts)
        pipe.set_progress_bar_config(disable=True)
        if self.prepare is not None:
            self.prepare(pipe)
        return pipe

    def call(self, pipe: Any, output_type: str = "pt") -> torch.Tensor:
        """What the pipeline makes: the same of the same VAE calls. Pictures or frames in [0, 1]."""
        torch.manual_seed(2)
        steps = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3)}
        given = self.arguments()
        if "height" in given:
            given |= dict.fromkeys(("height", "width"), max(SIDE, CELLS * family_of(pipe.vae).downscale))
        made = pipe(output_type=output_type, return_dict=False, **steps, **given)
        made = made[0]
        while isinstance(made, (list, tuple)):
            made = torch.stack(list(made)) if isinstance(made[0], torch.Tensor) else made[0]
        return made if isinstance(made, torch.Tensor) else torch.as_tensor(np.asarray(made))


class OnlyCalls:
    """In the place of a pipeline: nothing but the calls that it makes of its VAE."""

    def __init__(self, vae: Any, calls: Callable[[Any], torch.Tensor]) -> None:
        self.vae = vae
        self._calls = calls

    def __call__(self, **_: Any) -> tuple[torch.Tensor]:
        return ((self._calls(self.vae) / 2 + 0.5).clamp(0, 1),)


def _made(part: Part) -> Any:
    if isinstance(part, tuple) and isinstance(part[0], str):
        kind, config = part
        made = getattr(diffusers, kind)(**config)
    else:
        made = part() if callable(part) else part
    if not isinstance(made, torch.nn.Module):
        return made
    with torch.no_grad():
        for name, weight in made.named_parameters():
            # Pad tokens are made of whatever the memory held.
            if name.endswith("pad_token"):
                weight.fill_(1.0)
    return made.eval().requires_grad_(False)


FLOW: Part = ("FlowMatchEulerDiscreteScheduler", {})
DDIM: Part = ("DDIMScheduler", {"steps_offset": 1, "clip_sample": False})
EULER: Part = ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1})
TWO_TEXTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
SAFETY = ("safety_checker", "feature_extractor")

# fmt: off
UNET = {
    "sample_size": 8, "block_out_channels": (16, 16), "layers_per_block": 1, "cross_attention_dim": 16,
    "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
}
# fmt: on
SIZE = {"height": SIDE, "width": SIDE}
NO_GUIDANCE = {"guidance_scale": 1.0}


def sd_text() -> dict[str, Any]:
    return {"prompt_embeds": values(1, 4, 16), **NO_GUIDANCE}
