"""From what is fastest down to what needs the least memory, until the picture comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from remote_vae.call import Op, Spare, T
from remote_vae.errors import OutOfMemory, RouteFailed, UnsupportedLayout
from remote_vae.local.estimate import whole_bytes
from remote_vae.tiled.exact import decode, encode
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.tiled.memory import available_memory, forget_frames, free_memory, is_out_of_memory

log = logging.getLogger("remote_vae")

_CALLS = {"decode": decode, "encode": encode}
_PLANS = {"decode": decoder_plan, "encode": encoder_plan}

# Shares of the free memory that the tiled VAE may take, one attempt after the other. Convolutions have workspaces of their own,
# which nobody announces, and free memory is in pieces.
_SHARES = (0.8, 0.4, 0.15)
# The whole VAE is only tried where it fits with this to spare.
_WHOLE_SHARE = 0.75


def whole_fits(vae: Any, op: Op, tensor: torch.Tensor, device: torch.device | None = None) -> bool:
    """Whether the memory that is free on ``device`` takes the whole VAE's call; True where that cannot be told."""
    free = available_memory(device or tensor.device)
    try:
        plan = _PLANS[op](vae)
    except UnsupportedLayout:
        return True
    return free is None or whole_bytes(plan, tensor.shape, plan.first_weight.dtype) <= _WHOLE_SHARE * free


def exact_ways(
    vae: Any,
    op: Op,
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Spare[torch.Tensor]]:
    """The exact tiled VAE with less and less memory, last in float32 on the CPU. Each asks for the free memory anew.

    None for a VAE of a layout that is not known. Where the free memory cannot be told, the limits are shares of what the whole
    VAE needs.
    """
    try:
        plan = _PLANS[op](vae)
    except UnsupportedLayout as error:
        log.info("no exact tiled VAE: %s", error)
        return
    call = partial(_guarded, _CALLS[op], vae, tensor, progress=progress)
    whole = whole_bytes(plan, tensor.shape, plan.first_weight.dtype)
    device = tensor.device
    for share in _SHARES:
        free = available_memory(device)
        limit = int(share * (whole if free is None else free))
        yield Spare("exact tiled VAE", partial(call, max_bytes=limit, dtype=dtype))
    if device.type != "cpu":
        memory = available_memory(torch.device("cpu"))
        most = None if memory is None else int(_SHARES[0] * memory)
        yield Spare("exact tiled VAE on the CPU", partial(call, device="cpu", dtype=torch.float32, max_bytes=most))


def _guarded(call: Callable[..., torch.Tensor], *args: Any, **limits: Any) -> torch.Tensor:
    try:
        return call(*args, **limits)
    except RouteFailed:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Something about this VAE or this device that nobody has thought of must not cost the picture: others may know a way.
        log.exception("the exact tiled VAE failed")
        raise UnsupportedLayout(f"the exact tiled VAE failed: {error}") from error


def first_that_fits(ways: Iterable[Spare[T]], what: str) -> tuple[str, T]:
    """Try one way after the other until one has memory enough.

    Args:
        ways: asked for one by one, after the memory of the one before is free again.
        what: for the log.

    Returns:
        The name of the way, and what it gave.

    Raises:
        OutOfMemory: none has. An error that is not about memory goes through.
    """
    failure: BaseException | None = None
    for way in ways:
        try:
            return way.name, way.run()
        except UnsupportedLayout as error:
            log.info("%s cannot be used here: %s", way.name, error)
            forget_frames(error)
            failure = failure or error
        except Exception as error:
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                raise
            log.warning("%s ran out of memory for %s", way.name, what)
            forget_frames(error)
            failure = error
        free_memory()
    raise OutOfMemory(f"this machine has too little memory for {what} ({failure})", reason="out of memory") from failure
