"""The architecture of a VAE from names and shapes of its weights, in diffusers' names: the class and its config.

Widths, layers, channels and what is there or not stand in the weights. What does not stand there, as activations, is one and
the same in every published VAE of the class: its defaults, and the few values that are written here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from remote_vae.errors import UnsupportedLayout

State = Mapping[str, torch.Tensor]
Config = dict[str, Any]

# GroupNorm groups of every published VAE that has such norms; a state dict does not tell them.
_GROUPS = 32
# Of the channels that LTX-2's upsamplers turn into pixels and frames.
_LTX2_FACTOR = 2
_LEVEL = re.compile(
    r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.resnets\.(\d+)\.(?:spatial_res_block\.)?conv1(?:\.conv|\.conv_s)?\.weight"
)


def architecture(state: State) -> Config:
    """The config of the VAE, without its factors, and its class under ``_class_name``.

    Raises:
        UnsupportedLayout: it is of no class that is known here.
    """
    for seen, kind, config in _CLASSES:
        if seen(state):
            try:
                return {"_class_name": kind, **config(state)}
            except (KeyError, IndexError, ZeroDivisionError, StopIteration, ValueError) as error:
                why = str(error) or type(error).__name__
                raise UnsupportedLayout(f"it looks like an {kind}, and is none: {why}; put its config.json beside it") from None
    raise UnsupportedLayout("the file holds no VAE whose layout is known")


def _levels(state: State, side: str) -> tuple[list[int], list[int]]:
    """Channels of each level of ``side`` ("encoder.down" or "decoder.up") and the number of its blocks, in their order."""
    widths: dict[int, int] = {}
    layers: dict[int, int] = {}
    for key, weight in state.items():
        match = _LEVEL.fullmatch(key)
        if match and match[1] == side:
            level, layer = int(match[2]), int(match[3])
            if layer == 0:
                widths[level] = weight.shape[0]
            layers[level] = max(layers.get(level, 0), layer + 1)
    if not widths or sorted(widths) != list(range(len(widths))) or layers.keys() != widths.keys():
        raise ValueError(f"its {side}_blocks are not whole")
    return [widths[level] for level in sorted(widths)], [layers[level] for level in sorted(layers)]


def _number(state: State, pattern: str) -> int:
    """How many numbers the pattern's group takes, from 0 on."""
    found = (re.match(pattern, key) for key in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _has(part: str) -> Callable[[State], bool]:
    return lambda state: any(part in key for key in state)


def _in_groups(widths: Sequence[int]) -> list[int]:
    if any(width % _GROUPS for width in widths):
        raise ValueError(f"widths {list(widths)} do not fit {_GROUPS} norm groups")
    return list(widths)


def _channels(state: State, suffix: str = "") -> Config:
    return {
        "in_channels": state[f"encoder.conv_in{suffix}.weight"].shape[1],
        "out_channels": state[f"decoder.conv_out{suffix}.weight"].shape[0],
        "latent_channels": state[f"decoder.conv_in{suffix}.weight"].shape[1],
    }


# --- Stable Diffusion's and what came of it -------------------------------------------------------------------------------


def _kl(state: State) -> Config:
    widths, layers = _levels(state, "encoder.down")
    return {
        **_channels(state),
        "block_out_channels": _in_groups(widths),
        "layers_per_block": layers[0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "norm_num_groups": _GROUPS,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": _has("mid_block.attentions.")(state),
    }


def _flux2(state: State) -> Config:
    config = _kl(state)
    decoder = _in_groups(_levels(state, "decoder.up")[0][::-1])
    if decoder != config["block_out_channels"]:
        config["decoder_block_out_channels"] = decoder
    return config


def _temporal_decoder(state: State) -> Config:
    config = _kl(state)
    wanted = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "down_block_types")
    return {key: config[key] for key in wanted}


def _asymmetric(state: State) -> Config:
    down, down_layers = _levels(state, "encoder.down")
    up, up_layers = _levels(state, "decoder.up")
    return {
        **_channels(state),
        "down_block_types": ["DownEncoderBlock2D"] * len(down),
        "down_block_out_channels": _in_groups(down),
        "layers_per_down_block": down_layers[0],
        "up_block_types": ["UpDecoderBlock2D"] * len(up),
        "up_block_out_channels": _in_groups(up[::-1]),
        "layers_per_up_block": up_layers[0] - 1,
        "norm_num_groups": _GROUPS,
    }


def _tiny(state: State) -> Config:
    """TAESD, TAESD 3, TAEF1: they differ in the latents' channels alone."""
    first, last = state["encoder.layers.0.weight"], state["decoder.layers.0.weight"]
    return {
        "in_channels": first.shape[1],
        "latent_channels": last.shape[1],
        "encoder_block_out_channels": [first.shape[0]] * 4,
        "decoder_block_out_channels": [last.shape[0]] * 4,
    }


# --- Sana and HunyuanImage ------------------------------------------------------------------------------------------------


def _dc(state: State) -> Config:
    config: Config = {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
    }
    for side, blocks, norm in (("encoder", "down", "conv2"), ("decoder", "up", "conv2")):
        levels = _number(state, rf"{side}\.{blocks}_blocks\.(\d+)\.")
        parts = [_dc_level(state, f"{side}.{blocks}_blocks.{level}.", norm) for level in range(levels)]
        config[f"{side}_block_out_channels"] = [width for width, _, _ in parts]
        config[f"{side}_layers_per_block"] = [layers for _, layers, _ in parts]
        config[f"{side}_block_types"] = ["EfficientViTBlock" if scales is not None else "ResBlock" for _, _, scales in parts]
        config[f"{side}_qkv_multiscales"] = [scales or [] for _, _, scales in parts]
    widths = config["encoder_block_out_channels"]
    down = state["encoder.down_blocks.0." + str(config["encoder_layers_per_block"][0]) + ".conv.weight"].shape[0]
    up = state["decoder.up_blocks.0.0.conv.weight"].shape[0]
    return {
        **config,
        "downsample_block_type": "Conv" if down == widths[1] else "pixel_unshuffle",
        "upsample_block_type": "interpolate" if up == config["decoder_block_out_channels"][0] else "pixel_shuffle",
    }


def _dc_level(state: State, start: str, norm: str) -> tuple[int, int, list[int] | None]:
    """Channels, number of blocks, and kernel sizes of a level's attention (None: it has none)."""
    blocks = {
        key[len(start) :].split(".")[0]: key
        for key in state
        if key.startswith(start) and (f".{norm}.weight" in key or ".attn.to_q.weight" in key)
    }
    key = next(iter(blocks.values()))
    scales = None
    if ".attn." in key:
        of_first = rf"{re.escape(key.removesuffix('to_q.weight'))}to_qkv_multiscale\.\d+\.proj_in\.weight"
        scales = [weight.shape[-1] for name, weight in state.items() if re.fullmatch(of_first, name)]
    return state[key].shape[1] if scales is not None else state[key].shape[0], len(blocks), scales


def _hunyuan_image(state: State) -> Config:
    levels = _flat_levels(state, "encoder.down_blocks")
    return {
        **_channels(state),
        "block_out_channels": _in_groups([width for width, _ in levels]),
        "layers_per_block": levels[0][1],
        "spatial_compression_ratio": 2 ** sum(f"encoder.down_blocks.{i}.conv.weight" in state for i in range(len(state))),
        # Only its own tiling asks for it.
        "sample_size": 384,
    }


def _flat_levels(state: State, start: str) -> list[tuple[int, int]]:
    """Channels and number of blocks of each level where all of them stand in one list, with the samplers between them."""
    levels: list[tuple[int, int]] = []
    width = layers = 0
    for index in range(_number(state, rf"{re.escape(start)}\.(\d+)\.")):
        conv = state.get(f"{start}.{index}.conv1.weight")
        if conv is not None:
            width, layers = conv.shape[0], layers + 1
        else:
            levels.append((width, layers))
            layers = 0
    return [*levels, (width, layers)]


# --- Wan and Qwen-Image ---------------------------------------------------------------------------------------------------


def _wan(state: State) -> Config:
    levels = _flat_levels(state, "encoder.down_blocks")
    return _wan_config(state, [width for width, _ in levels], levels[0][1], r"encoder\.down_blocks\.\d+\.")


def _wan_residual(state: State) -> Config:
    widths, layers = _levels(state, "encoder.down")
    config = _wan_config(state, widths, layers[0], r"encoder\.down_blocks\.\d+\.downsampler\.")
    first = _levels(state, "decoder.up")[0][-1]
    return {**config, "decoder_base_dim": first, "is_residual": True}


def _wan_config(state: State, widths: Sequence[int], layers: int, sampler: str) -> Config:
    base = state["encoder.conv_in.weight"].shape[0]
    found = sorted(
        (int(key.split(".")[2]), f"{key.rpartition('resample.')[0]}time_conv.weight" in state)
        for key in state
        if re.fullmatch(sampler + r"resample\.1\.weight", key)
    )
    into, out = state["encoder.conv_in.weight"].shape[1], state["decoder.conv_out.weight"].shape[0]
    config: Config = {
        "base_dim": base,
        "z_dim": state["decoder.conv_in.weight"].shape[1],
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": layers,
        "temperal_downsample": [in_time for _, in_time in found],
        "in_channels": into,
        "out_channels": out,
        "scale_factor_spatial": 2 ** len(found),
        "scale_factor_temporal": 2 ** sum(in_time for _, in_time in found),
    }
    # Squares of pixels in the place of channels: of three, as nobody has published any of four.
    patch = math.isqrt(into // 3) if into % 3 == 0 else 1
    if patch > 1:
        config |= {"patch_size": patch, "scale_factor_spatial": patch * config["scale_factor_spatial"]}
    return config


# --- video ----------------------------------------------------------------------------------------------------------------


def _hunyuan_video(state: State) -> Config:
    widths, layers = _levels(state, "encoder.down")
    return {
        **_channels(state, ".conv"),
        "block_out_channels": _in_groups(widths),
        "layers_per_block": layers[0],
        "down_block_types": ["HunyuanVideoDownBlock3D"] * len(widths),
        "up_block_types": ["HunyuanVideoUpBlock3D"] * len(widths),
        "norm_num_groups": _GROUPS,
        "mid_block_add_attention": _has("mid_block.attentions.")(state),
    }


def _hunyuan_video_15(state: State) -> Config:
    widths, layers = _levels(state, "encoder.down")
    samplers = _number(state, r"encoder\.down_blocks\.(\d+)\.downsamplers\.")
    fourths = (
        state[f"encoder.down_blocks.{index}.downsamplers.0.conv.conv.weight"].shape[0] * 4 == widths[index + 1]
        for index in range(samplers)
    )
    return {
        **_channels(state, ".conv"),
        "block_out_channels": widths,
        "layers_per_block": layers[0],
        "spatial_compression_ratio": 2**samplers,
        "temporal_compression_ratio": 2 ** (samplers - sum(fourths)),
    }


def _cogvideox(state: State) -> Config:
    widths, layers = _levels(state, "encoder.down")
    return {
        **_channels(state, ".conv"),
        "block_out_channels": _in_groups(widths),
        "layers_per_block": layers[0],
        "down_block_types": ["CogVideoXDownBlock3D"] * len(widths),
        "up_block_types": ["CogVideoXUpBlock3D"] * len(widths),
        "norm_num_groups": _GROUPS,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


def _ltx(state: State) -> Config:
    if _has("time_embedder")(state) or _has("per_channel_scale")(state):
        raise ValueError("it is of LTX-Video 0.9.1 or later, whose decoder wants a time step and noise beside the latents")
    widths, layers = _levels(state, "encoder.down")
    up, up_layers = _levels(state, "decoder.up")
    return {
        "latent_channels": state["decoder.conv_in.conv.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": [*layers, _number(state, r"encoder\.mid_block\.resnets\.(\d+)\.")],
        "decoder_block_out_channels": up[::-1],
        "decoder_layers_per_block": [*up_layers[::-1], _number(state, r"decoder\.mid_block\.resnets\.(\d+)\.")],
    }


def _ltx2(state: State) -> Config:
    if _has("time_embedder")(state) or _has("per_channel_scale")(state):
        raise ValueError("its decoder wants a time step or noise beside the latents")
    widths, layers = _levels(state, "encoder.down")
    up, up_layers = _levels(state, "decoder.up")
    return {
        "latent_channels": state["decoder.conv_in.conv.weight"].shape[1],
        "block_out_channels": [*widths[1:], state["encoder.mid_block.resnets.0.conv1.conv.weight"].shape[0]],
        "layers_per_block": [*layers, _number(state, r"encoder\.mid_block\.resnets\.(\d+)\.")],
        "decoder_block_out_channels": [width * _LTX2_FACTOR for width in up[::-1]],
        "decoder_layers_per_block": [*up_layers[::-1], _number(state, r"decoder\.mid_block\.resnets\.(\d+)\.")],
        "upsample_factor": [_LTX2_FACTOR] * len(up),
        # As LTX-2 was published, and other than the class's default.
        "decoder_causal": False,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    }


def _mochi(state: State) -> Config:
    down, down_layers = _levels(state, "encoder.down")
    up, _ = _levels(state, "decoder.up")
    kernels = [state[f"encoder.down_blocks.{index}.conv_in.conv.weight"].shape[2:] for index in range(len(down))]
    first, last = (_number(state, rf"encoder\.block_{part}\.resnets\.(\d+)\.") for part in ("in", "out"))
    blocks = ["encoder.block_in.", *(f"encoder.down_blocks.{index}." for index in range(len(down))), "encoder.block_out."]
    return {
        "in_channels": state["encoder.proj_in.weight"].shape[1],
        "out_channels": state["decoder.proj_out.weight"].shape[0],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "encoder_block_out_channels": _in_groups([state["encoder.proj_in.weight"].shape[0], *down]),
        "decoder_block_out_channels": _in_groups([state["decoder.block_out.resnets.0.conv1.conv.weight"].shape[0], *up[::-1]]),
        "layers_per_block": [first, *down_layers, last],
        "temporal_expansions": [kernel[0] for kernel in kernels],
        "spatial_expansions": [kernel[1] for kernel in kernels],
        "add_attention_block": [_has(f"{block}attentions.")(state) for block in blocks],
    }


def _cosmos(state: State) -> Config:
    down, layers = _levels(state, "encoder.down")
    up, _ = _levels(state, "decoder.up")
    return {
        "latent_channels": state["post_quant_conv.weight"].shape[1],
        "encoder_block_out_channels": [state["encoder.conv_in.conv_s.weight"].shape[0], *down],
        "decode_block_out_channels": [*up[::-1], state["decoder.conv_in.conv_s.weight"].shape[0]],
        "num_layers": layers[0],
    }


def _first_conv(state: State) -> int:
    """Dimensions of the encoder's first convolution: 4 of pictures, 5 of videos, 0 where it has another name."""
    conv = state.get("encoder.conv_in.weight")
    return 0 if conv is None else conv.ndim


def _is_hunyuan_image(state: State) -> bool:
    return _first_conv(state) == 4 and "encoder.down_blocks.0.conv1.weight" in state


# The first that fits, special ones first.
_CLASSES: Sequence[tuple[Callable[[State], bool], str, Callable[[State], Config]]] = (
    (lambda state: "encoder.layers.0.weight" in state, "AutoencoderTiny", _tiny),
    (lambda state: "encoder.down_blocks.0.0.conv1.weight" in state, "AutoencoderDC", _dc),
    (_has("decoder.condition_encoder."), "AsymmetricAutoencoderKL", _asymmetric),
    (_has("decoder.time_conv_out."), "AutoencoderKLTemporalDecoder", _temporal_decoder),
    (lambda state: "bn.running_mean" in state, "AutoencoderKLFlux2", _flux2),
    (_is_hunyuan_image, "AutoencoderKLHunyuanImage", _hunyuan_image),
    (
        lambda state: _first_conv(state) == 4 and "encoder.norm_out.gamma" in state,
        "AutoencoderKLQwenImage21",
        _wan_residual,
    ),
    (
        lambda state: _first_conv(state) == 5 and "encoder.down_blocks.0.resnets.0.norm1.gamma" in state,
        "AutoencoderKLWan",
        _wan_residual,
    ),
    (lambda state: _first_conv(state) == 5 and "encoder.norm_out.gamma" in state, "AutoencoderKLWan", _wan),
    (lambda state: "encoder.proj_in.weight" in state, "AutoencoderKLMochi", _mochi),
    (lambda state: "encoder.conv_in.conv_s.weight" in state, "AutoencoderKLCosmos", _cosmos),
    (_has("decoder.norm_out.norm_layer."), "AutoencoderKLCogVideoX", _cogvideox),
    (
        lambda state: "latents_mean" in state and "encoder.down_blocks.0.downsamplers.0.conv.conv.weight" in state,
        "AutoencoderKLLTX2Video",
        _ltx2,
    ),
    (lambda state: "latents_mean" in state, "AutoencoderKLLTXVideo", _ltx),
    (
        lambda state: "encoder.conv_in.conv.weight" in state and "encoder.norm_out.gamma" in state,
        "AutoencoderKLHunyuanVideo15",
        _hunyuan_video_15,
    ),
    (lambda state: "encoder.conv_in.conv.weight" in state, "AutoencoderKLHunyuanVideo", _hunyuan_video),
    (lambda state: "encoder.down_blocks.0.resnets.0.conv1.weight" in state, "AutoencoderKL", _kl),
)
