"""Small VAEs with random weights, laid out in modules and names as the real ones of other projects are.

Sources of the layouts: Stability-AI/stablediffusion (``ldm``), Stability-AI/generative-models (``sgm``),
lllyasviel/stable-diffusion-webui-forge (``backend/nn/vae.py``, ``backend/operations.py``), comfyanonymous/ComfyUI
(``comfy/ldm/models/autoencoder.py``), Haoming02/sd-webui-forge-classic (branch neo, ``backend/nn/vae.py``) and
huggingface/diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.autoencoders import vae as diffusers_vae
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from tests.vaes import small_kl


@dataclass(frozen=True)
class Layout:
    """Sizes and choices of one VAE; the defaults are those of the real ones but for the sizes."""

    channels: tuple[int, ...] = (32, 32, 64, 64)
    blocks: int = 1
    latent: int = 4
    groups: int = 32
    attn: str = "vanilla"
    attn_levels: tuple[int, ...] = ()
    resamp_with_conv: bool = True
    conv_shortcut: bool = False
    give_pre_end: bool = False
    tanh_out: bool = False
    inplace: bool = False
    conv_type: type[nn.Conv2d] = nn.Conv2d
    norm_type: type[nn.GroupNorm] = nn.GroupNorm

    def conv(self, inner: int, outer: int, size: int = 3, **changes: int) -> nn.Conv2d:
        return self.conv_type(inner, outer, size, **{"padding": size // 2, **changes})

    def norm(self, channels: int) -> nn.GroupNorm:
        return self.norm_type(self.groups, channels, eps=1e-6)

    def attention(self, channels: int) -> nn.Module:
        kinds = {
            "vanilla": AttnBlock,
            "vanilla-xformers": MemoryEfficientAttnBlock,
            "linear": LinAttnBlock,
            "none": lambda _, __: nn.Identity(),
        }
        return kinds[self.attn](self, channels)


# ── the modules of ldm, which sgm and Forge took over ─────────────────────────


class _Resample(nn.Module):
    def __init__(self, layout: Layout, channels: int) -> None:
        super().__init__()
        self.with_conv = layout.resamp_with_conv
        if self.with_conv:
            self.conv = layout.conv(channels, channels, **self.strides)


class Upsample(_Resample):
    strides: ClassVar = {}

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(_Resample):
    strides: ClassVar = {"stride": 2, "padding": 0}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module):
    def __init__(self, layout: Layout, inner: int, outer: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = inner, outer
        self.use_conv_shortcut = layout.conv_shortcut
        if layout.inplace:
            self.swish = nn.SiLU(inplace=True)
        self.norm1 = layout.norm(inner)
        self.conv1 = layout.conv(inner, outer)
        self.norm2 = layout.norm(outer)
        self.dropout = nn.Dropout(0.0, inplace=layout.inplace)
        self.conv2 = layout.conv(outer, outer)
        if inner != outer and self.use_conv_shortcut:
            self.conv_shortcut = layout.conv(inner, outer)
        elif inner != outer:
            self.nin_shortcut = layout.conv(inner, outer, 1)

    def forward(self, x: Tensor, temb: None) -> Tensor:
        swish = getattr(self, "swish", F.silu)
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    def __init__(self, layout: Layout, channels: int) -> None:
        super().__init__()
        self.in_channels = channels
        self.norm = layout.norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, layout.conv(channels, channels, 1))

    def attention(self, h: Tensor) -> Tensor:
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(h.shape)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x + self.proj_out(self.attention(self.norm(x)))


class MemoryEfficientAttnBlock(AttnBlock):
    """The same mathematics by xformers, from ``[B, h*w, C]``; known by its attribute."""

    attention_op = None


class LinAttnBlock(nn.Module):
    """Linear attention: no norm, no residual, other names. Nothing that a plan for AttnBlock can compute."""

    def __init__(self, layout: Layout, channels: int) -> None:
        super().__init__()
        self.to_qkv = layout.conv_type(channels, channels * 3, 1, bias=False)
        self.to_out = layout.conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)
        context = k.softmax(dim=-1) @ v.transpose(1, 2)
        return self.to_out((context.transpose(1, 2) @ q).reshape(x.shape))


class _Level(nn.Module):
    """The ``block`` and ``attn`` of one resolution; a plain nn.Module in the sources, which call the lists themselves."""

    def __init__(self, layout: Layout, index: int, inner: int, blocks: int) -> None:
        super().__init__()
        outer = layout.channels[index]
        self.block = nn.ModuleList(ResnetBlock(layout, outer if i else inner, outer) for i in range(blocks))
        self.attn = nn.ModuleList(layout.attention(outer) for _ in range(blocks if index in layout.attn_levels else 0))


class _Coder(nn.Module):
    """What Encoder and Decoder have in common: the numbers, ``mid`` and the end."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.ch, self.temb_ch = layout.channels[0], 0
        self.num_resolutions, self.num_res_blocks = len(layout.channels), layout.blocks
        self.resolution, self.in_channels = 256, 3

    def add_mid(self, layout: Layout) -> None:
        deepest = layout.channels[-1]
        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(layout, deepest, deepest)
        self.mid.attn_1 = layout.attention(deepest)
        self.mid.block_2 = ResnetBlock(layout, deepest, deepest)

    def run_mid(self, h: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, None)), None)

    def run_level(self, level: nn.Module, h: Tensor) -> Tensor:
        for index, block in enumerate(level.block):
            h = block(h, None)
            if len(level.attn) > 0:
                h = level.attn[index](h)
        return h


class Encoder(_Coder):
    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.conv_in = layout.conv(3, self.ch)
        self.down = nn.ModuleList()
        for index, outer in enumerate(layout.channels):
            level = _Level(layout, index, layout.channels[max(index - 1, 0)], layout.blocks)
            if index != self.num_resolutions - 1:
                level.downsample = Downsample(layout, outer)
            self.down.append(level)
        self.add_mid(layout)
        self.norm_out = layout.norm(layout.channels[-1])
        self.conv_out = layout.conv(layout.channels[-1], 2 * layout.latent)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for index, level in enumerate(self.down):
            h = self.run_level(level, h)
            if index != self.num_resolutions - 1:
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.run_mid(h))))


class Decoder(_Coder):
    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.give_pre_end, self.tanh_out = layout.give_pre_end, layout.tanh_out
        inner = layout.channels[-1]
        self.conv_in = layout.conv(layout.latent, inner)
        self.add_mid(layout)
        self.up = nn.ModuleList()
        for index in reversed(range(self.num_resolutions)):
            level = _Level(layout, index, inner, layout.blocks + 1)
            inner = layout.channels[index]
            if index != 0:
                level.upsample = Upsample(layout, inner)
            self.up.insert(0, level)
        self.norm_out = layout.norm(inner)
        self.conv_out = layout.conv(inner, 3)

    def forward(self, z: Tensor, **_: Any) -> Tensor:
        self.last_z_shape = z.shape
        h = self.run_mid(self.conv_in(z))
        for index in reversed(range(self.num_resolutions)):
            h = self.run_level(self.up[index], h)
            if index != 0:
                h = self.up[index].upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h


# ── the models around them ────────────────────────────────────────────────────


class AutoencoderKL(nn.Module):
    """ldm's: ``encode`` answers the distribution."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(layout), Decoder(layout)
        self.quant_conv: nn.Conv2d | None = layout.conv(2 * layout.latent, 2 * layout.latent, 1)
        self.post_quant_conv: nn.Conv2d | None = layout.conv(layout.latent, layout.latent, 1)
        self.embed_dim = layout.latent

    def moments(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(self.moments(x))

    def decode(self, z: Tensor, **kwargs: Any) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z), **kwargs)


class BatchNormedKL(AutoencoderKL):
    """Flux.2 in ComfyUI and Forge Neo: latents are packed and normed by running statistics; ``encode`` gives the mean."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.bn_eps = 1e-4
        self.bn = nn.BatchNorm2d(4 * layout.latent, eps=self.bn_eps, affine=False)
        nn.init.normal_(self.bn.running_mean, 0.0, 0.5)
        nn.init.uniform_(self.bn.running_var, 0.3, 3.0)

    def encode(self, x: Tensor) -> Tensor:
        return self.bn(F.pixel_unshuffle(super().encode(x).mode(), 2))

    def decode(self, z: Tensor, **kwargs: Any) -> Tensor:
        deviation = (self.bn.running_var.view(1, -1, 1, 1) + self.bn_eps).sqrt()
        return super().decode(F.pixel_shuffle(z * deviation + self.bn.running_mean.view(1, -1, 1, 1), 2), **kwargs)


class DiagonalGaussianRegularizer(nn.Module):
    def __init__(self, sample: bool) -> None:
        super().__init__()
        self.sample = sample

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = DiagonalGaussianDistribution(z)
        return (posterior.sample() if self.sample else posterior.mode()), {}


class AutoencodingEngineLegacy(AutoencoderKL):
    """sgm's: ``encode`` answers a latent, the mean where ``sample`` is false; the moments never come out."""

    def __init__(self, layout: Layout, sample: bool) -> None:
        super().__init__(layout)
        self.max_batch_size = None
        self.loss = nn.Identity()
        self.regularization = DiagonalGaussianRegularizer(sample)

    def encode(self, x: Tensor, return_reg_log: bool = False) -> Any:
        z, log = self.regularization(self.moments(x))
        return (z, log) if return_reg_log else z


class IntegratedAutoencoderKL(AutoencoderKL):
    """Forge's: ``encode`` answers a sample, or what ``regulation`` makes of the distribution."""

    def __init__(self, layout: Layout, use_quant: bool) -> None:
        super().__init__(layout)
        if not use_quant:
            self.quant_conv = self.post_quant_conv = None
        self.config = SimpleNamespace(latent_channels=layout.latent, down_block_types=("DownEncoderBlock2D",) * 4)
        self.scaling_factor, self.shift_factor = 0.18215, 0.0

    def encode(self, x: Tensor, regulation: Any = None) -> Any:
        posterior = super().encode(x)
        return posterior.sample() if regulation is None else regulation(posterior)


class ForgeOperations:
    """Forge's own convolution and norm, which bring their weights to the dtype of the input at each call."""

    class Conv2d(nn.Conv2d):
        parameters_manual_cast = False

        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, *_weights(self, x))

    class GroupNorm(nn.GroupNorm):
        parameters_manual_cast = False

        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(x, self.num_groups, *_weights(self, x), self.eps)


def _weights(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if layer.parameters_manual_cast:
        return layer.weight.to(x), layer.bias.to(x)
    return layer.weight, layer.bias


# ── what tests call ───────────────────────────────────────────────────────────


def ldm_vae(**changes: Any) -> AutoencoderKL:
    """CompVis ldm's AutoencoderKL, as A1111 loads it; ``changes`` are fields of Layout."""
    torch.manual_seed(7)
    return _ready(AutoencoderKL(Layout(**changes)))


def batch_normed_vae(**changes: Any) -> BatchNormedKL:
    """Flux.2's VAE as ComfyUI and Forge Neo have it."""
    torch.manual_seed(7)
    return _ready(BatchNormedKL(Layout(**{"latent": 8, **changes})))


def sgm_vae(attn: str = "vanilla", sample: bool = False, **changes: Any) -> AutoencodingEngineLegacy:
    """sgm's engine; ``attn`` is vanilla, vanilla-xformers, linear or none."""
    torch.manual_seed(7)
    return _ready(AutoencodingEngineLegacy(Layout(attn=attn, **changes), sample))


def forge_vae(use_quant: bool = True, manual_cast: bool = False, **changes: Any) -> IntegratedAutoencoderKL:
    """Forge's VAE; with ``manual_cast`` its weights are float16 and it takes float32."""
    torch.manual_seed(7)
    changes |= {"inplace": True, "conv_type": ForgeOperations.Conv2d, "norm_type": ForgeOperations.GroupNorm}
    vae = _ready(IntegratedAutoencoderKL(Layout(**changes), use_quant))
    for module in vae.modules():
        if hasattr(module, "parameters_manual_cast"):
            module.parameters_manual_cast = manual_cast
    return vae.half() if manual_cast else vae


class AttentionBlock(nn.Module):
    """diffusers' attention before 0.17: the names of its time, the weights of the Attention it stands for."""

    def __init__(self, new: Any) -> None:
        super().__init__()
        self.group_norm = new.group_norm
        self.query, self.key, self.value, self.proj_attn = new.to_q, new.to_k, new.to_v, new.to_out[0]
        self.channels, self.num_heads, self.num_head_size = self.query.in_features, new.heads, None
        self.rescale_output_factor = new.rescale_output_factor

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        heads = (*tokens.shape[:2], self.num_heads, -1)
        q, k, v = (linear(tokens).view(heads).transpose(1, 2) for linear in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) * (self.channels // self.num_heads) ** -0.5
        h = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(tokens.shape)
        return (self.proj_attn(h).transpose(1, 2).reshape(x.shape) + x) / self.rescale_output_factor


def plain_kl(**changes: Any) -> diffusers.AutoencoderKL:
    """diffusers' AutoencoderKL of four levels of 32 channels."""
    return _ready(small_kl("sd1", **changes))


def old_attention_kl(**changes: Any) -> diffusers.AutoencoderKL:
    """``plain_kl`` with the same weights, whose attention has the names of old diffusers."""
    vae = plain_kl(**changes)
    for coder in (vae.encoder, vae.decoder):
        coder.mid_block.attentions[0] = AttentionBlock(coder.mid_block.attentions[0])
    return vae.eval()


def asymmetric_decoder_vae() -> diffusers.AsymmetricAutoencoderKL:
    """A decoder that may blend a masked picture in at every level."""
    torch.manual_seed(7)
    sizes = {f"{way}_block_out_channels": (32,) * 4 for way in ("down", "up")}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return _ready(diffusers.AsymmetricAutoencoderKL(**sizes, **kinds))


class _DecoderWithColour(diffusers_vae.Decoder):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.colour(super().forward(*args, **kwargs))


def kl_with_extra_parameter() -> diffusers.AutoencoderKL:
    """To be refused: a decoder with one module more than a plan knows, used after all others."""
    vae = plain_kl()
    vae.decoder.__class__ = _DecoderWithColour
    vae.decoder.colour = nn.Conv2d(3, 3, 1)
    return _ready(vae)


def _ready(vae: Any) -> Any:
    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
        # Fresh queries and keys attend to all alike, and a test could not tell a wrong scale of the scores.
        if name.rsplit(".", 1)[-1] in {"q", "k", "to_q", "to_k"}:
            nn.init.normal_(module.weight, 0.0, 1.5 * module.weight.shape[1] ** -0.5)
    return vae.eval().requires_grad_(False)
