"""The names that weights have in the original authors' files and in the UIs', made of diffusers' names: the other way of
``remote_vae.server.weights.names``. Held against files that ComfyUI's own modules saved, whose names are these."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

State = Mapping[str, torch.Tensor]
Named = dict[str, torch.Tensor]


def to_ldm(state: State, levels: int) -> Named:
    """As the original checkpoints of Stable Diffusion have them, attention as 1 x 1 convolutions."""
    renamed = {}
    for key, value in state.items():
        name = key
        for index in range(levels):
            for part in ("block", "downsample", "upsample"):
                plural = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}[part]
                name = name.replace(f"encoder.down_blocks.{index}.{plural}", f"encoder.down.{index}.{part}")
                name = name.replace(f"decoder.up_blocks.{index}.{plural}", f"decoder.up.{levels - 1 - index}.{part}")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace(
            "mid_block.attentions.0", "mid.attn_1"
        )
        for new, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(f"attn_1.{new}", f"attn_1.{old}")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        convolution = ".attn_1." in name and value.ndim == 2
        renamed[name] = value[:, :, None, None] if convolution else value
    return renamed


def _four_levels(state: State) -> Named:
    return to_ldm(state, 4)


def _old_attention(state: State) -> Named:
    """diffusers' own names before 0.15."""
    old = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    renamed = dict(state)
    for new, name in old:
        renamed = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in renamed.items()}
    return renamed


def _flux2_by_its_authors(state: State) -> Named:
    moved = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
    renamed = {}
    for key, value in to_ldm(state, 4).items():
        start = next((name for name in moved if key.startswith(name)), "")
        renamed[moved.get(start, "") + key[len(start) :]] = value
    del renamed["bn.num_batches_tracked"]
    return renamed


def replaced(state: State, *pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> Named:
    """``state`` under other names: each pattern in its turn."""
    renamed = {}
    for key, value in state.items():
        for pattern, to in pairs:
            key = re.sub(pattern, to, key)
        renamed[key] = value
    return renamed


_WAN_PARTS = (
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.conv_in\.", ".conv1."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)


def _wan(state: State) -> Named:
    """Three blocks and an upsampler a level, in one list."""
    return replaced(
        state,
        (r"^encoder\.down_blocks\.", "encoder.downsamples."),
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2])}."),
        (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.upsamples.{4 * int(m[1]) + 3}."),
        *_WAN_PARTS,
    )


def _wan_22(state: State) -> Named:
    return replaced(
        state,
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.downsamples.\1.downsamples."),
        (r"^encoder\.down_blocks\.(\d+)\.downsampler\.", r"encoder.downsamples.\1.downsamples.2."),
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.upsamples.\1.upsamples."),
        (r"^decoder\.up_blocks\.(\d+)\.upsampler\.", r"decoder.upsamples.\1.upsamples.3."),
        *_WAN_PARTS,
    )


_LDM_PARTS = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def _hunyuan_image(state: State) -> Named:
    """One block and a sampler a level in the encoder, two and one in the decoder."""

    def level(side: str, whole: int, sampler: str) -> Callable[[re.Match[str]], str]:
        def named(match: re.Match[str]) -> str:
            index, place = divmod(int(match[1]), whole)
            return f"{side}.{index}." + (f"{sampler}." if place == whole - 1 else f"block.{place}.")

        return named

    return replaced(
        state,
        (r"^encoder\.down_blocks\.(\d+)\.", level("encoder.down", 2, "downsample")),
        (r"^decoder\.up_blocks\.(\d+)\.", level("decoder.up", 3, "upsample")),
        (r"\.attentions\.0\.proj\.", ".attentions.0.proj_out."),
        *_LDM_PARTS,
    )


def _hunyuan_video_15(state: State) -> Named:
    return replaced(
        state,
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1.block."),
        (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
        *_LDM_PARTS,
    )


def _svd(state: State) -> Named:
    return replaced(
        to_ldm(state, 4),
        (r"\.spatial_res_block\.", "."),
        (r"\.temporal_res_block\.norm1\.", ".time_stack.in_layers.0."),
        (r"\.temporal_res_block\.conv1\.", ".time_stack.in_layers.2."),
        (r"\.temporal_res_block\.norm2\.", ".time_stack.out_layers.0."),
        (r"\.temporal_res_block\.conv2\.", ".time_stack.out_layers.3."),
        (r"\.time_mixer\.mix_factor$", ".mix_factor"),
        (r"^decoder\.time_conv_out\.", "decoder.conv_out.time_mix_conv."),
    )


def _sana(state: State) -> Named:
    """MIT's names: levels are stages of lists of operations, and query, key and value are one convolution."""
    renamed = {}
    for key, value in state.items():
        if re.search(r"\.attn\.to_[kv]\.", key):
            continue
        if ".attn.to_q." in key:
            start = key.removesuffix("to_q.weight")
            value = torch.cat([state[f"{start}to_{part}.weight"] for part in "qkv"])[:, :, None, None]
            key = f"{start}qkv.conv.weight"
        elif ".attn.to_out." in key:
            value = value[:, :, None, None]
        renamed[key] = value
    is_sampler = {key.rpartition(".conv.")[0] for key in state if re.search(r"_blocks\.\d+\.\d+\.conv\.", key)}
    samplers = "|".join(re.escape(name) for name in sorted(is_sampler, key=len, reverse=True))
    return replaced(
        renamed,
        (rf"^({samplers})\.conv\.", r"\1.main.conv."),
        (r"\.attn\.to_qkv_multiscale\.0\.proj_in\.", ".context_module.main.aggreg.0.0."),
        (r"\.attn\.to_qkv_multiscale\.0\.proj_out\.", ".context_module.main.aggreg.0.1."),
        (r"\.attn\.to_out\.", ".context_module.main.proj.conv."),
        (r"\.attn\.norm_out\.", ".context_module.main.proj.norm."),
        (r"\.attn\.qkv\.", ".context_module.main.qkv."),
        (r"\.conv_out\.conv_inverted\.", ".local_module.main.inverted_conv.conv."),
        (r"\.conv_out\.conv_depth\.", ".local_module.main.depth_conv.conv."),
        (r"\.conv_out\.conv_point\.", ".local_module.main.point_conv.conv."),
        (r"(_blocks\.\d+\.\d+)\.conv_out\.norm\.", r"\1.local_module.main.point_conv.norm."),
        (r"(_blocks\.\d+\.\d+)\.conv1\.", r"\1.main.conv1.conv."),
        (r"(_blocks\.\d+\.\d+)\.conv2\.", r"\1.main.conv2.conv."),
        (r"(_blocks\.\d+\.\d+)\.norm\.", r"\1.main.conv2.norm."),
        (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.stages.\1.op_list."),
        (r"^decoder\.up_blocks\.(\d+)\.", r"decoder.stages.\1.op_list."),
        (r"\.main\.conv\.(weight|bias)$", r".main.conv.conv.\1"),
        (r"^encoder\.conv_in\.", "encoder.project_in.conv."),
        (r"^encoder\.conv_out\.", "encoder.project_out.0.conv."),
        (r"^decoder\.conv_in\.", "decoder.project_in.conv."),
        (r"^decoder\.norm_out\.", "decoder.project_out.0."),
        (r"^decoder\.conv_out\.", "decoder.project_out.2.conv."),
    )


# The original lists of blocks, in diffusers' names: what stands at each number.
_LTX_DOWN = (
    "down_blocks.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.0.conv_out",
    "down_blocks.1",
    "down_blocks.1.downsamplers.0",
    "down_blocks.1.conv_out",
    "down_blocks.2",
    "down_blocks.2.downsamplers.0",
    "down_blocks.3",
    "mid_block",
)
_LTX_UP = (
    "mid_block",
    "up_blocks.0",
    "up_blocks.1.upsamplers.0",
    "up_blocks.1",
    "up_blocks.2.conv_in",
    "up_blocks.2.upsamplers.0",
    "up_blocks.2",
    "up_blocks.3.conv_in",
    "up_blocks.3.upsamplers.0",
    "up_blocks.3",
)
_LTX2_DOWN = (*(f"down_blocks.{index}{part}" for index in range(4) for part in ("", ".downsamplers.0")), "mid_block")
_LTX2_UP = ("mid_block", *(f"up_blocks.{index}{part}" for index in range(3) for part in (".upsamplers.0", "")))


def _ltx_of(down: tuple[str, ...], up: tuple[str, ...]) -> Callable[[State], Named]:
    def named(state: State) -> Named:
        renamed = {}
        for key, value in state.items():
            side, _, rest = key.partition(".")
            places = down if side == "encoder" else up
            fitting = [place for place in places if rest.startswith(place + ".")]
            if fitting:
                place = max(fitting, key=len)
                blocks = "down" if side == "encoder" else "up"
                key = f"{side}.{blocks}_blocks.{places.index(place)}{rest[len(place) :]}"
            key = re.sub(r"\.resnets\.", ".res_blocks.", key)
            key = re.sub(r"\.conv_shortcut\.conv\.", ".conv_shortcut.", key)
            key = re.sub(r"\.norm3\.", ".norm3.norm.", key)
            key = re.sub("^latents_mean$", "per_channel_statistics.mean-of-means", key)
            key = re.sub("^latents_std$", "per_channel_statistics.std-of-means", key)
            renamed[key] = value
        # What else stands there, and is of no use.
        renamed["per_channel_statistics.mean-of-stds"] = torch.ones(128)
        return renamed

    return named


def _comfyui_tiny(state: State) -> Named:
    renamed = replaced(
        state,
        (r"^encoder\.layers\.", "taesd_encoder."),
        (r"^decoder\.layers\.(\d+)\.", lambda match: f"taesd_decoder.{int(match[1]) + 1}."),
    )
    return {**renamed, "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}


# By a key of tests.vaes.SMALL and by a name for the naming.
ORIGINAL: Mapping[tuple[str, str], Callable[[State], Named]] = {
    **{(name, "ldm"): _four_levels for name in ("sd1", "sdxl", "sd3", "flux", "flux2", "flux2-small", "hunyuan-video")},
    ("sd1", "old attention"): _old_attention,
    ("flux2", "its authors"): _flux2_by_its_authors,
    **{(name, "Wan"): _wan for name in ("wan", "qwen-image", "qwen-image-layered")},
    ("wan22-5b", "Wan"): _wan_22,
    ("hunyuan-image", "ldm"): _hunyuan_image,
    ("hunyuan-video-1.5", "ldm"): _hunyuan_video_15,
    ("svd", "ldm"): _svd,
    ("sana", "its authors"): _sana,
    ("ltx", "its authors"): _ltx_of(_LTX_DOWN, _LTX_UP),
    ("ltx2", "its authors"): _ltx_of(_LTX2_DOWN, _LTX2_UP),
    **{(name, "ComfyUI"): _comfyui_tiny for name in ("taesd", "taesd3")},
}
