"""How much memory the whole VAE takes, before it is called."""

from __future__ import annotations

import torch

from remote_vae.tiled.plan import Conv, Plan, Residual


def whole_bytes(plan: Plan, shape: torch.Size, dtype: torch.dtype) -> int:
    """What the whole VAE takes at its peak for ``shape`` ``[B, C, H, W]``.

    That is in the largest residual block: what went in, and the first convolution's result, normalised, activated, and the
    second's.
    """
    peak = 0
    for made in plan.sizes(*shape[2:]):
        if isinstance(made.step, Residual):
            entered = next(part.module.in_channels for part in made.step.main if isinstance(part, Conv))
            peak = max(peak, (entered + 4 * made.channels) * made.rows * made.columns)
    return shape[0] * peak * dtype.itemsize
