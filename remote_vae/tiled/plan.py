"""A VAE's encoder or decoder as a list of steps, whatever its modules are called.

The plan builders (``layouts/``) make plans from modules, the executor runs them. A plan holds the modules themselves, never
copies of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from torch import nn

from remote_vae.errors import InvalidRequest, UnsupportedLayout


@dataclass(frozen=True)
class Conv:
    """A convolution; ``pad`` is the zero padding (left, right, top, bottom)."""

    module: nn.Conv2d
    pad: tuple[int, int, int, int]

    @property
    def kernel(self) -> tuple[int, int]:
        rows, columns = self.module.kernel_size
        return rows, columns

    @property
    def stride(self) -> int:
        return self.module.stride[0]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that come out of a picture of ``height`` x ``width``."""
        left, right, top, bottom = self.pad
        rows, columns = self.kernel
        return (height + top + bottom - rows) // self.stride + 1, (width + left + right - columns) // self.stride + 1


@dataclass(frozen=True)
class Norm:
    """GroupNorm over the whole picture."""

    module: nn.GroupNorm


@dataclass(frozen=True)
class Pointwise:
    """A function of each value on its own; may work in place."""

    run: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RmsNorm:
    """``x / sqrt(mean(x^2) + eps)`` over the channels of each position, times the module's weight and with its bias, if any."""

    module: nn.Module
    eps: float


@dataclass(frozen=True)
class Local:
    """A function that makes ``up`` x ``up`` positions of each ``down`` x ``down``, whatever there is around them.

    Attributes:
        run: of ``[1, C, n down, m down]``, gives a new tensor ``[1, channels, n up, m up]``.
        channels: of what comes out.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    channels: int
    down: int = 1
    up: int = 1

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result. Raises InvalidRequest where ``down`` does not divide."""
        if height % self.down or width % self.down:
            raise InvalidRequest(
                f"this VAE takes no picture of this size: it comes to {width} x {height}, which {self.down} does not divide"
            )
        return height // self.down * self.up, width // self.down * self.up


@dataclass(frozen=True)
class Upsample:
    """Every value becomes ``scale`` x ``scale`` equal ones."""

    scale: int = 2


@dataclass(frozen=True)
class Residual:
    """``main(x) + shortcut(x)``; an empty shortcut is x itself, else it is one ``Conv`` or one ``Local``."""

    main: tuple[Step, ...]
    shortcut: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Attention:
    """``x + out(attention(norm(x)))`` of every position to every position of the picture.

    The four projections are Linear layers or 1 x 1 convolutions.
    """

    norm: nn.GroupNorm
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    heads: int = 1


@dataclass(frozen=True)
class LinearAttention:
    """``x + norm(out(attention(x)))`` without a softmax: of each position only sums over all others are needed.

    Queries, keys and values are cut into heads of ``head`` channels in the order in which the three are joined, those that the
    convolutions of each of ``scales`` make of them as well (EfficientViT, arXiv 2205.14756).
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    scales: tuple[tuple[Conv, ...], ...]
    out: nn.Module
    norm: RmsNorm
    head: int
    eps: float

    @property
    def inner(self) -> int:
        """Channels of all queries."""
        return next(self.query.parameters()).shape[0]


Step = Union[Conv, Norm, Pointwise, RmsNorm, Local, Upsample, Residual, Attention, LinearAttention]


@dataclass(frozen=True)
class Plan:
    """What happens to the pixels or latents, in order."""

    steps: tuple[Step, ...]

    @property
    def first_weight(self) -> torch.Tensor:
        """Its dtype is the one that the VAE computes in."""
        return next(module.weight for module in self.modules() if isinstance(module, nn.Conv2d))

    def sizes(self, height: int, width: int) -> Iterator[tuple[Step, int, int, int]]:
        """Each step down to the convolutions, with channels, rows and columns of what it makes of ``height`` x ``width``."""
        return _sizes(self.steps, self.first_weight.shape[1], height, width)

    def modules(self) -> Iterator[nn.Module]:
        """Every module with weights that takes part."""
        return _modules(self.steps)


def _modules(steps: tuple[Step, ...]) -> Iterator[nn.Module]:
    for step in steps:
        if isinstance(step, (Conv, Norm, RmsNorm)):
            yield step.module
        elif isinstance(step, Residual):
            yield from _modules(step.shortcut)
            yield from _modules(step.main)
        elif isinstance(step, Attention):
            yield from (step.norm, step.query, step.key, step.value, step.out)
        elif isinstance(step, LinearAttention):
            yield from (step.query, step.key, step.value, step.out, step.norm.module)
            for scale in step.scales:
                yield from _modules(scale)


def _sizes(steps: tuple[Step, ...], channels: int, height: int, width: int) -> Iterator[tuple[Step, int, int, int]]:
    for step in steps:
        if isinstance(step, Conv):
            channels, (height, width) = step.module.out_channels, step.size(height, width)
        elif isinstance(step, Upsample):
            height, width = height * step.scale, width * step.scale
        elif isinstance(step, Local):
            channels, (height, width) = step.channels, step.size(height, width)
        elif isinstance(step, Residual):
            # Only because it may not take this size.
            list(_sizes(step.shortcut, channels, height, width))
            for part in _sizes(step.main, channels, height, width):
                yield part
                channels, height, width = part[1:]
        yield step, channels, height, width


# Downsamplers pad below and to the right only, as the first VAEs in TensorFlow did.
DOWN_PAD = (0, 1, 0, 1)


# --- what the builders make steps with: everything they take is checked here ------------------------------------------------


def conv(module: object, pad: tuple[int, int, int, int] | None = None) -> Conv:
    """A convolution step; without ``pad``, the module's own padding.

    Raises:
        UnsupportedLayout: not a plain two-dimensional convolution.
    """
    if not isinstance(module, nn.Conv2d):
        raise UnsupportedLayout(f"{type(module).__name__} stands where a Conv2d is expected")
    plain = module.padding_mode == "zeros" and set(module.dilation) == {1} and len(set(module.stride)) == 1
    # Forge's, for weights that are not what they are computed with.
    patched = getattr(module, "scale_weight", None) is not None or getattr(module, "forge_online_loras", None)
    # Seamless tiles in one direction are made by replacing methods of each convolution. accelerate's hook is another matter.
    replaced = "_conv_forward" in vars(module) or ("forward" in vars(module) and not hasattr(module, "_hf_hook"))
    if not plain or patched or replaced or isinstance(module.padding, str):
        raise UnsupportedLayout(f"a convolution of a kind that cannot be cut into strips: {module}")
    rows, columns = module.padding
    return Conv(module, (columns, columns, rows, rows) if pad is None else pad)


def norm(module: object) -> Norm:
    """A GroupNorm step. Raises UnsupportedLayout."""
    if not isinstance(module, nn.GroupNorm):
        raise UnsupportedLayout(f"{type(module).__name__} stands where a GroupNorm is expected")
    return Norm(module)


def rms_norm(module: object) -> RmsNorm:
    """The step of diffusers' RMSNorm, with a weight. Raises UnsupportedLayout."""
    eps = getattr(module, "eps", None)
    known = type(module).__name__ == "RMSNorm" and isinstance(getattr(module, "weight", None), torch.Tensor)
    if not known or not isinstance(module, nn.Module) or not isinstance(eps, float):
        raise UnsupportedLayout(f"{type(module).__name__} stands where an RMS norm with a weight is expected")
    return RmsNorm(module, eps)


def activation(module: object = None) -> Pointwise:
    """The activation that ``module`` computes; None is SiLU. Raises UnsupportedLayout."""
    if module is None:
        return Pointwise(silu)
    try:
        return Pointwise(_ACTIVATIONS[type(module).__name__])
    except KeyError:
        raise UnsupportedLayout(f"activation {type(module).__name__}") from None


def silu(x: torch.Tensor) -> torch.Tensor:
    """The activation x sigmoid(x), in place."""
    return nn.functional.silu(x, inplace=True)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SiLU": silu,
    "ReLU": torch.relu_,
    "Identity": lambda x: x,
    "GELU": nn.functional.gelu,
    "Mish": nn.functional.mish,
}


def complete_plan(steps: Sequence[Step], *parts: nn.Module | None, unused: Sequence[nn.Module] = ()) -> Plan:
    """The plan of ``steps``, in which every weight of ``parts`` must have its place.

    Args:
        steps: in order.
        parts: of the VAE; all that it has for this.
        unused: modules of ``parts`` that a call never comes to.

    Raises:
        UnsupportedLayout: there is something that the builder does not know.
    """
    plan = Plan(tuple(steps))
    used = {id(tensor) for module in plan.modules() for tensor in module.parameters(recurse=False)}
    used |= {id(tensor) for module in unused for tensor in module.parameters()}
    for part in parts:
        for name, tensor in part.named_parameters() if part is not None else ():
            if id(tensor) not in used:
                raise UnsupportedLayout(f"{type(part).__name__} has {name}, which the tiled VAE does not know")
    return plan
