"""Weights where and as a call needs them, for no longer than it needs them. The VAE keeps its own untouched.

Hosts that offload bring weights in by hooks: accelerate's ``_hf_hook`` on the VAE (whole) or on each layer (its weights are on
the meta device until then), A1111's lowvram by a forward pre-hook on the VAE (``send_me_to_gpu``). Weights that are elsewhere
all the same are copied layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from remote_vae.errors import UnsupportedLayout

_LOWVRAM = "send_me_to_gpu"


def bring_in(vae: Any) -> None:
    """Tell the host that ``vae`` is about to be used, as a call of it would: it makes room and moves weights in its own way."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)
    # Other pre-hooks are for a forward with its arguments, which neither decode nor encode calls.
    for pre_hook in list(getattr(vae, "_forward_pre_hooks", {}).values()):
        if getattr(pre_hook, "__name__", "") == _LOWVRAM:
            pre_hook(vae, ())


@contextmanager
def borrowed(module: Any, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight (of some norms ``gamma``) and bias of one layer on ``device`` in ``dtype``.

    Raises:
        UnsupportedLayout: the weights are not loaded, and nothing says how to load them.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        weight = module.weight if hasattr(module, "weight") else module.gamma
        # Some norms have a number in the place of the bias that they do not have.
        bias = module.bias if isinstance(getattr(module, "bias", None), torch.Tensor) else None
        if weight.device.type == "meta":
            raise UnsupportedLayout(f"the weights of {type(module).__name__} are not loaded")
        yield weight.detach().to(device, dtype), None if bias is None else bias.detach().to(device, dtype)
    finally:
        if hook is not None:
            hook.post_forward(module, None)
