"""Names of weights: the original authors' and the UIs' to those of diffusers, one table a layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Union

import torch

from remote_vae.errors import UnsupportedLayout

State = Mapping[str, torch.Tensor]
Rule = tuple[str, Union[str, Callable[["re.Match[str]"], str]]]

# Attention as diffusers named it before 0.15.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD: Sequence[Rule] = (
    (
        r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.(?=weight$|bias$)",
        lambda match: f"{match[1]}.{_OLD_ATTENTION[match[2]]}.",
    ),
)

# latent-diffusion's names, with the parts that every VAE which kept them has.
_LDM: Sequence[Rule] = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_LDM_BLOCKS: Sequence[Rule] = (
    *_LDM,
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
)
_LDM_KL: Sequence[Rule] = (
    *_LDM_BLOCKS,
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.proj_out\.", ".attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.quant_conv\.", "quant_conv."),
    (r"^decoder\.post_quant_conv\.", "post_quant_conv."),
)
# Stable Video Diffusion's decoder: each block has another one over time, and a number that mixes the two.
_LDM_TEMPORAL: Sequence[Rule] = (
    (r"^decoder\.conv_out\.time_mix_conv\.", "decoder.time_conv_out."),
    (r"^(decoder\..*)\.time_stack\.in_layers\.0\.", r"\1.temporal_res_block.norm1."),
    (r"^(decoder\..*)\.time_stack\.in_layers\.2\.", r"\1.temporal_res_block.conv1."),
    (r"^(decoder\..*)\.time_stack\.out_layers\.0\.", r"\1.temporal_res_block.norm2."),
    (r"^(decoder\..*)\.time_stack\.out_layers\.3\.", r"\1.temporal_res_block.conv2."),
    (r"^(decoder\..*)\.mix_factor$", r"\1.time_mixer.mix_factor"),
    (r"^(decoder\..*)(\.block_[12]|\.block\.\d+)\.(norm1|norm2|conv1|conv2|nin_shortcut)\.", r"\1\2.spatial_res_block.\3."),
    *_LDM_KL,
)
# Wan's, Qwen-Image's as well.
_WAN: Sequence[Rule] = (
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
)
_WAN_22: Sequence[Rule] = (
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.", r"encoder.down_blocks.\1.downsampler.\2."),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.", r"encoder.down_blocks.\1.resnets."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.", r"decoder.up_blocks.\1.upsampler.\2."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.", r"decoder.up_blocks.\1.resnets."),
    *_WAN,
)
_TINY: Sequence[Rule] = (
    (r"^taesd_encoder\.", "encoder.layers."),
    # The original's first layer is a clamp, which diffusers has outside of the list.
    (r"^taesd_decoder\.(\d+)\.", lambda match: f"decoder.layers.{int(match[1]) - 1}."),
)


def in_diffusers_names(state: State) -> dict[str, torch.Tensor]:
    """The same weights under the names that diffusers' class has; unknown layouts keep their own.

    Raises:
        UnsupportedLayout: some are missing.
    """
    for seen, convert in _LAYOUTS:
        if seen(state):
            try:
                return convert(state)
            except KeyError as error:
                raise UnsupportedLayout(f"it is a part of a VAE: {error} is missing") from None
    return _renamed(state, _OLD)


def _renamed(state: State, rules: Sequence[Rule]) -> dict[str, torch.Tensor]:
    patterns = [(re.compile(pattern), to) for pattern, to in rules]
    named = {}
    for key, value in state.items():
        for pattern, to in patterns:
            key = pattern.sub(to, key)
        named[key] = value
    return named


def _count(state: State, pattern: str) -> int:
    """How many numbers the pattern's group takes, from 0 on."""
    found = (re.match(pattern, key) for key in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _kl(state: State) -> dict[str, torch.Tensor]:
    """AutoencoderKL, Flux.2's and HunyuanVideo's: latent-diffusion numbers the decoder's levels from the picture on."""
    levels = _count(state, r"decoder\.up\.(\d+)\.")
    turned: Rule = (r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{levels - 1 - int(match[1])}.")
    if "decoder.mid.block_1.mix_factor" not in state:
        return _renamed(state, (turned, *_LDM_KL))
    named = _renamed(state, (turned, *_LDM_TEMPORAL))
    if "quant_conv.weight" not in named:
        # diffusers' class always has one. What the file leaves out changes nothing.
        moments = named["encoder.conv_out.bias"]
        named["quant_conv.weight"] = torch.eye(len(moments), dtype=moments.dtype)[:, :, None, None]
        named["quant_conv.bias"] = torch.zeros_like(moments)
    return named


def _hunyuan_image(state: State) -> dict[str, torch.Tensor]:
    """HunyuanImage's: in diffusers blocks, downsamplers and upsamplers of all levels stand in one list."""

    def flat(side: str, level: str, place: int, whole: int) -> str:
        return f"{side}_blocks.{int(level) * whole + place}."

    down = _count(state, r"encoder\.down\.0\.block\.(\d+)\.") + 1
    up = _count(state, r"decoder\.up\.0\.block\.(\d+)\.") + 1
    return _renamed(
        state,
        (
            *_LDM,
            (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", lambda m: flat("encoder.down", m[1], int(m[2]), down)),
            (r"^encoder\.down\.(\d+)\.downsample\.", lambda m: flat("encoder.down", m[1], down - 1, down)),
            (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", lambda m: flat("decoder.up", m[1], int(m[2]), up)),
            (r"^decoder\.up\.(\d+)\.upsample\.", lambda m: flat("decoder.up", m[1], up - 1, up)),
            (r"\.attentions\.0\.proj_out\.", ".attentions.0.proj."),
        ),
    )


def _wan(state: State) -> dict[str, torch.Tensor]:
    """Wan 2.1's: diffusers keeps the encoder's one list, and makes blocks of the decoder's."""
    found = (re.match(r"decoder\.upsamples\.(\d+)\.resample\.", key) for key in state)
    whole = min((int(match[1]) + 1 for match in found if match), default=1)

    def block(match: re.Match[str]) -> str:
        level, place = divmod(int(match[1]), whole)
        return f"decoder.up_blocks.{level}." + ("upsamplers.0." if place == whole - 1 else f"resnets.{place}.")

    rules: Sequence[Rule] = (
        (r"^encoder\.downsamples\.", "encoder.down_blocks."),
        (r"^decoder\.upsamples\.(\d+)\.", block),
        *_WAN,
    )
    return _renamed(state, rules)


def _dc(state: State) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers as convert

    named: dict[str, torch.Tensor] = convert(dict(state))
    return named


def _ltx(state: State) -> dict[str, torch.Tensor]:
    from diffusers.loaders import single_file_utils

    # LTX-2 has residual downsamplers, whose convolution lies one deeper.
    is_second = "encoder.down_blocks.1.conv.conv.weight" in state and not any(".last_time_embedder." in key for key in state)
    name = "convert_ltx2_vae_to_diffusers" if is_second else "convert_ltx_vae_checkpoint_to_diffusers"
    named: dict[str, torch.Tensor] = getattr(single_file_utils, name)({f"vae.{key}": value for key, value in state.items()})
    return named


def _is_hunyuan_image(state: State) -> bool:
    """Its downsampler gives a fourth of the channels, and the pixels of a square of four are put behind one another."""
    down = state.get("encoder.down.0.downsample.conv.weight")
    return down is not None and down.ndim == 4 and down.shape[0] != down.shape[1]


_LAYOUTS: Sequence[tuple[Callable[[State], bool], Callable[[State], dict[str, torch.Tensor]]]] = (
    (lambda state: "taesd_decoder.1.weight" in state, lambda state: _renamed(_without_comfyui_factors(state), _TINY)),
    (lambda state: "decoder.upsamples.0.upsamples.0.residual.2.weight" in state, lambda state: _renamed(state, _WAN_22)),
    (lambda state: "decoder.middle.0.residual.0.gamma" in state, _wan),
    (lambda state: any(key.startswith("decoder.stages.") for key in state), _dc),
    (lambda state: "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight" in state, _ltx),
    (_is_hunyuan_image, _hunyuan_image),
    # HunyuanVideo 1.5's, whose norms are RMS norms: its decoder's levels are numbered as diffusers does it.
    (
        lambda state: "encoder.down.0.block.0.norm1.gamma" in state,
        lambda state: _renamed(state, _LDM_BLOCKS),
    ),
    (lambda state: any(key.startswith("encoder.down.") for key in state), _kl),
)


def _without_comfyui_factors(state: State) -> State:
    """ComfyUI keeps the factors of its model's latents beside a TAESD; the VAE itself takes latents as the model makes them."""
    return {key: value for key, value in state.items() if key not in ("vae_scale", "vae_shift")}
