"""What a VAE can do by itself in less device memory: its own tiling, and a copy of it on another device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from remote_vae.errors import UnsupportedLayout

# In space, and in time where that is a switch of its own (LTX, Mochi; Hunyuan's is on). Nobody needs the one for encoding:
# LTX's does nothing, and Mochi's is not made.
_SWITCHES = ("use_tiling", "use_framewise_decoding")

Module = TypeVar("Module", bound=nn.Module)


def on_cpu(module: Module) -> Module:
    """A float32 copy of ``module`` on the CPU. Raises as ``copied`` does."""
    return copied(module, torch.device("cpu"), torch.float32)


def copied(module: Module, device: torch.device, dtype: torch.dtype | None) -> Module:
    """A copy of ``module`` on ``device``; ``module`` itself, its weights and their device are left alone.

    Its weights are in ``dtype``; None: each in its own.

    Hooks that move weights (accelerate's) and instance attributes that replace methods stay behind, as they would act on
    the original.

    Raises:
        UnsupportedLayout: some weights are not loaded at all (offloaded to disk or to the meta device).
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "meta":
            raise UnsupportedLayout(f"the VAE's weights are offloaded and cannot be copied to {device}")
        values = tensor.detach().to(device, dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)
        # deepcopy takes what the memo has for a tensor instead of copying it on its own device.
        memo[id(tensor)] = nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
    overridden = [_instance_methods(part) for part in module.modules()]
    for part, names in zip(module.modules(), overridden, strict=True):
        # A bound method or a partial would drag a copy of the object behind it along.
        memo.update({id(part.__dict__[name]): None for name in names})
    made = copy.deepcopy(module, memo)
    for part, names in zip(made.modules(), overridden, strict=True):
        for name in names:
            del part.__dict__[name]
    return made


def _instance_methods(module: nn.Module) -> list[str]:
    """Attributes of the instance that stand in front of a method of its class, or carry accelerate's hook."""
    return [
        name
        for name, value in module.__dict__.items()
        if name == "_hf_hook" or (callable(value) and callable(getattr(type(module), name, None)))
    ]


@contextmanager
def own_tiling(vae: Any) -> Iterator[None]:
    """Run ``vae`` (diffusers') with the tiling it brings along: overlapping tiles, blended. Not exact, but little memory.

    Raises:
        UnsupportedLayout: it has no tiling, or already uses it.
    """
    if not hasattr(vae, "enable_tiling") or not hasattr(vae, "use_tiling"):
        raise UnsupportedLayout(f"{type(vae).__name__} has no tiling of its own")
    if vae.use_tiling:
        raise UnsupportedLayout(f"{type(vae).__name__} is tiled already")
    switched = [name for name in _SWITCHES if getattr(vae, name, True) is False]
    for name in switched:
        setattr(vae, name, True)
    try:
        yield
    finally:
        for name in switched:
            setattr(vae, name, False)
