"""The names that UNet and text encoders have in checkpoints of one file, made of those of diffusers and transformers.

The VAE's are in ``tests.original_names``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from tests.original_names import replaced

State = Mapping[str, torch.Tensor]
Named = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_to_ldm(state: State, levels: int, layers: int) -> Named:
    """latent-diffusion numbers the blocks of all levels in one list on the way down, and in another on the way up."""
    places = _places(state, levels, layers)
    named = {}
    for key, value in state.items():
        start = max((place for place in places if key.startswith(place + ".")), key=len)
        rest = key[len(start) + 1 :]
        part, _, last = rest.partition(".")
        if ".resnets." in start:
            rest = f"{_RESNET[part]}.{last}"
        named[f"{places[start]}.{rest}"] = value
    return named


def _places(state: State, levels: int, layers: int) -> dict[str, str]:
    """Blocks, and what stands between them, by diffusers' names."""
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    number = 0
    for level in range(levels):
        for layer in range(layers):
            number += 1
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
        if level < levels - 1:
            number += 1
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    number = -1
    for level in range(levels):
        for layer in range(layers + 1):
            number += 1
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
        # The last of the block that it stands in.
        has_attention = any(key.startswith(f"up_blocks.{level}.attentions.") for key in state)
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{2 if has_attention else 1}.conv"
    return places


def text_in_full(state: State) -> Named:
    """As every published file has them: newer versions of transformers have no "text_model." for a text encoder alone."""
    start = "text_model."
    return {key if key.startswith((start, "text_projection.")) else start + key: value for key, value in state.items()}


_OPEN_CLIP = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def text_to_open_clip(state: State) -> Named:
    """SDXL's second text encoder: query, key and value are one matrix, and the projection stands the other way."""
    full = text_in_full(state)
    named = {"text_projection": full.pop("text_projection.weight").T, "logit_scale": torch.tensor(4.6052)}
    for key, value in full.items():
        found = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", key)
        if found is None:
            name = key
        elif found[2] == "q":
            value = torch.cat([full[f"{found[1]}.self_attn.{part}_proj.{found[3]}"] for part in "qkv"])
            name = f"{found[1]}.attn.in_proj_{found[3]}"
        else:
            continue
        named[name] = value
    return replaced(named, *_OPEN_CLIP)
