"""Tensors between devices, without a second copy of a long video on either."""

from __future__ import annotations

import torch


def moved(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` on ``device`` in ``dtype``: itself, where it is so already.

    torch makes a copy of the whole in the new dtype before it crosses over; here only a frame is ever copied twice.

    Args:
        tensor: ``[B, C, F, h, w]``, or anything with a batch; any device, any strides.
    """
    device = torch.device(device)
    if tensor.dtype == dtype or tensor.device == device:
        # One copy at the most.
        return tensor.to(device, dtype)
    made = torch.empty(tensor.shape, dtype=dtype, device=device)
    frames = 2 if tensor.ndim == 5 else 0
    for target, source in zip(made.unbind(frames), tensor.unbind(frames), strict=True):
        target.copy_(source)
    return made
