"""A VAE's encoder or decoder as a list of steps, whatever its modules are called.

The plan builders (``layouts/``) make plans from modules, the executor runs them. A plan holds the modules themselves, never
copies of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Union

import torch
from torch import nn

from remote_vae.errors import InvalidRequest, UnsupportedLayout


@dataclass(frozen=True)
class Conv:
    """A convolution; ``pad`` is the zero padding (left, right, top, bottom).

    A Conv3d is causal: ``depth`` frames, its own and those before it, make one, and before the first are zeros.
    """

    module: nn.Conv2d | nn.Conv3d
    pad: tuple[int, int, int, int]

    @property
    def kernel(self) -> tuple[int, int]:
        rows, columns = self.module.kernel_size[-2:]
        return rows, columns

    @property
    def stride(self) -> int:
        return self.module.stride[-1]

    @property
    def depth(self) -> int:
        return self.module.kernel_size[0] if isinstance(self.module, nn.Conv3d) else 1

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
class RmsNorm:
    """``x / sqrt(mean(x^2) + eps)`` over the channels of each position, times a weight and with a bias if it has one.

    The weight is the module's ``weight`` or ``gamma``.
    """

    module: nn.Module
    eps: float


@dataclass(frozen=True)
class Pointwise:
    """A function of each value on its own; may work in place."""

    run: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Upsample:
    """Every value becomes ``scale`` x ``scale`` equal ones."""

    scale: int = 2


@dataclass(frozen=True)
class Local:
    """A function that makes ``up`` x ``up`` positions of each ``down`` x ``down``, whatever there is around them.

    Attributes:
        run: of ``[F, C, n down, m down]``, gives a new tensor ``[F', channels, n up, m up]``.
        channels: of what comes out.
        frames_down, frames_up: ``run`` makes F / frames_down * frames_up frames. Zeros stand before the first frame of all for
            one less than ``frames_down``, and of the first frames of all one less than ``frames_up`` are left out.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    channels: int
    down: int = 1
    up: int = 1
    frames_down: int = 1
    frames_up: int = 1

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result. Raises InvalidRequest where ``down`` does not divide."""
        if height % self.down or width % self.down:
            raise InvalidRequest(
                f"this VAE takes no picture of this size: it comes to {width} x {height}, which {self.down} does not divide"
            )
        return height // self.down * self.up, width // self.down * self.up

    def frames(self, frames: int, *, first: bool) -> int:
        """How many frames come out; ``first``: the first of all is among them."""
        before, out = (self.frames_down - 1, self.frames_up - 1) if first else (0, 0)
        return (frames + before) // self.frames_down * self.frames_up - out


@dataclass(frozen=True)
class InTime:
    """A causal convolution in time alone, ``[C', C, 3, 1, 1]``, that doubles the frames (``up``) or halves them.

    The first frame of all stays one, and as it is. Up, the convolution never sees it (Wan's decoder): the frames of one become
    two by halves of the channels. Down, every second frame becomes one of itself and the two before.
    """

    module: nn.Conv3d
    up: bool

    @property
    def past(self) -> int:
        """How many frames of those before are needed."""
        return 2 if self.up else 1

    def frames(self, frames: int, *, first: bool) -> int:
        """How many frames come out; ``first``: the first of all is among them."""
        kept = 1 if first else 0
        return kept + ((frames - kept) * 2 if self.up else (frames - kept) // 2)


@dataclass(frozen=True)
class Residual:
    """``main(x) + shortcut(x)``; an empty shortcut is x itself, else it is one ``Conv`` or one ``Local``."""

    main: tuple[Step, ...]
    shortcut: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Attention:
    """``x + out(attention(norm(x)))`` of every position to every position of the picture.

    The four projections are Linear layers or 1 x 1 convolutions. One in the place of the first three makes all three, one after
    the other.
    """

    norm: nn.GroupNorm | RmsNorm
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    heads: int = 1

    @property
    def is_fused(self) -> bool:
        """Whether one layer makes queries, keys and values."""
        return self.query is self.key


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


Step = Union[Conv, Norm, RmsNorm, Pointwise, Upsample, Local, InTime, Residual, Attention, LinearAttention]


class Made(NamedTuple):
    """What one step makes."""

    step: Step
    channels: int
    rows: int
    columns: int
    frames: int


@dataclass(frozen=True)
class Plan:
    """What happens to the pixels or latents, in order.

    Attributes:
        steps: one after the other.
        frames: which numbers of frames it is for, where it is for videos as well, else None.
    """

    steps: tuple[Step, ...]
    frames: Frames | None = None

    @property
    def first_weight(self) -> torch.Tensor:
        """Its dtype is the one that the VAE computes in."""
        return next(module.weight for module in self.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))

    def sizes(self, height: int, width: int, frames: int = 1, *, first: bool = True) -> Iterator[Made]:
        """Each step down to the convolutions, and what it makes of ``frames`` frames of ``height`` x ``width``.

        ``first``: the first frame of all is among them. Raises InvalidRequest where the VAE takes no such size.
        """
        return sizes_of(self.steps, Made(self.steps[0], self.first_weight.shape[1], height, width, frames), first=first)

    def modules(self) -> Iterator[nn.Module]:
        """Every module with weights that takes part."""
        return _modules(self.steps)


@dataclass(frozen=True)
class Frames:
    """How a VAE takes the frames of a video.

    Attributes:
        together: whether frames know of those before them; else each is a picture of its own.
        several: whether there may be more than one.
        step: frames come one at first and then so many at a time; what is left over is left out, as the VAE does.
    """

    together: bool = True
    several: bool = True
    step: int = 1


def _modules(steps: tuple[Step, ...]) -> Iterator[nn.Module]:
    for step in steps:
        if isinstance(step, (Conv, Norm, RmsNorm, InTime)):
            yield step.module
        elif isinstance(step, Residual):
            yield from _modules(step.shortcut)
            yield from _modules(step.main)
        elif isinstance(step, Attention):
            norm = step.norm.module if isinstance(step.norm, RmsNorm) else step.norm
            yield from (norm, step.query, step.key, step.value, step.out)
        elif isinstance(step, LinearAttention):
            yield from (step.query, step.key, step.value, step.out, step.norm.module)
            for scale in step.scales:
                yield from _modules(scale)


def sizes_of(steps: tuple[Step, ...], entered: Made, *, first: bool) -> Iterator[Made]:
    """As ``Plan.sizes``, of some steps after what was made last."""
    _, channels, height, width, frames = entered
    for step in steps:
        if isinstance(step, Conv):
            channels, (height, width) = step.module.out_channels, step.size(height, width)
        elif isinstance(step, Upsample):
            height, width = height * step.scale, width * step.scale
        elif isinstance(step, Local):
            channels, (height, width) = step.channels, step.size(height, width)
        elif isinstance(step, Residual):
            before = Made(step, channels, height, width, frames)
            # Only because it may not take this size.
            list(sizes_of(step.shortcut, before, first=first))
            for part in sizes_of(step.main, before, first=first):
                yield part
                channels, height, width, frames = part[1:]
        if isinstance(step, (Local, InTime)):
            frames = step.frames(frames, first=first)
        yield Made(step, channels, height, width, frames)


# How many frames a convolution in time takes.
_DEPTH = 3

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
    _check(module)
    rows, columns = (int(each) for each in module.padding)
    return Conv(module, (columns, columns, rows, rows) if pad is None else pad)


def causal_conv(module: object) -> Conv:
    """A convolution step of a CausalConv3d of Wan, which pads itself and keeps that in ``_padding``.

    Raises:
        UnsupportedLayout: something else.
    """
    if not isinstance(module, nn.Conv3d) or not type(module).__name__.endswith("CausalConv3d"):
        raise UnsupportedLayout(f"{type(module).__name__} stands where a causal Conv3d is expected")
    _check(module)
    depth, rows, columns = (size // 2 for size in module.kernel_size)
    # diffusers has all of it there and pads by itself (left, right, top, bottom, before, after), the original only the frames.
    own = module._padding  # noqa: SLF001
    _, high, wide = (int(each) for each in module.padding)
    given = own if isinstance(own, tuple) else (wide, wide, high, high, own, 0)
    if tuple(given) != (columns, columns, rows, rows, 2 * depth, 0) or module.kernel_size[0] not in (1, _DEPTH):
        raise UnsupportedLayout(f"a causal convolution with a padding of its own: {module}")
    return Conv(module, (columns, columns, rows, rows))


def in_time(module: object, *, up: bool) -> InTime:
    """A step of a CausalConv3d in time alone. Raises UnsupportedLayout."""
    stride = (1 if up else 2, 1, 1)
    if not isinstance(module, nn.Conv3d) or module.kernel_size != (_DEPTH, 1, 1) or tuple(module.stride) != stride:
        raise UnsupportedLayout(f"{module} stands where a convolution in time is expected")
    _check(module, strides=2)
    return InTime(module, up)


def _check(module: nn.Conv2d | nn.Conv3d, strides: int = 1) -> None:
    plain = module.padding_mode == "zeros" and set(module.dilation) == {1} and len(set(module.stride)) <= strides
    # Forge's and ComfyUI's, for weights that are not what they are computed with.
    patched = getattr(module, "scale_weight", None) is not None or any(
        getattr(module, name, None) for name in ("forge_online_loras", "weight_function", "bias_function")
    )
    # Seamless tiles in one direction are made by replacing methods of each convolution. accelerate's hook is another matter.
    replaced = "_conv_forward" in vars(module) or ("forward" in vars(module) and not hasattr(module, "_hf_hook"))
    if not plain or patched or replaced or isinstance(module.padding, str):
        raise UnsupportedLayout(f"a convolution of a kind that cannot be cut into strips: {module}")


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


def complete_plan(
    steps: Sequence[Step], *parts: nn.Module | None, frames: Frames | None = None, unused: Sequence[nn.Module] = ()
) -> Plan:
    """The plan of ``steps``, in which every weight of ``parts`` must have its place.

    Args:
        steps: in order.
        parts: of the VAE; all that it has for this.
        frames: which numbers of frames the VAE takes, if it is one for videos.
        unused: modules of ``parts`` that a call never comes to.

    Raises:
        UnsupportedLayout: there is something that the builder does not know.
    """
    plan = Plan(tuple(steps), frames)
    used = {id(tensor) for module in plan.modules() for tensor in module.parameters(recurse=False)}
    used |= {id(tensor) for module in unused for tensor in module.parameters()}
    for part in parts:
        for name, tensor in part.named_parameters() if part is not None else ():
            if id(tensor) not in used:
                raise UnsupportedLayout(f"{type(part).__name__} has {name}, which the tiled VAE does not know")
    return plan
