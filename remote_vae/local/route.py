"""How this machine answers a VAE call: in this order, until the picture is there.

1. the host's own call of the whole VAE, where the free memory takes it: its answer is the host's to the last bit,
2. the exact tiled VAE in less and less memory, last in float32 on the CPU,
3. the VAE's own overlapping tiles, which are not exact,
4. a copy of the whole VAE on the CPU, in float32.

Only the first is the host's. Whatever goes wrong with it or with the others, the next one is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from remote_vae.call import Outcome, T, VaeCall, Way
from remote_vae.errors import InvalidRequest, OutOfMemory, UnsupportedLayout
from remote_vae.local.estimate import mask_bytes, whole_bytes
from remote_vae.local.own import on_cpu
from remote_vae.settings import Settings
from remote_vae.tiled.exact import Limits, check_frames, run
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.tiled.memory import available_memory, forget_frames, free_memory, is_fast_at_bfloat16, is_out_of_memory
from remote_vae.tiled.plan import Plan
from remote_vae.tiled.weights import bring_in

log = logging.getLogger("remote_vae")

_PLANS = {"decode": decoder_plan, "encode": encoder_plan}

# Shares of the free memory that the tiled VAE may take, one attempt after the other. Convolutions have workspaces of their own,
# which nobody announces, and free memory is in pieces.
_SHARES = (0.8, 0.4, 0.15)
# The whole VAE is only tried where it fits with this to spare.
_WHOLE_SHARE = 0.75


def answer(call: VaeCall[T], settings: Settings, *, dtype: torch.dtype | None = None) -> Outcome[T]:
    """Answer ``call`` on this machine.

    Args:
        call: what is wanted.
        settings: the user's.
        dtype: what to compute in; then the host's own call, which computes in the VAE's, is left out.

    Raises:
        OutOfMemory: no way has memory enough. Or what the host's own call raised, where no other way answers either.
    """
    call.user.tell(f"{call.doing} on this machine")
    failure: Exception | None = None
    because = ""
    for way in _ways(call, settings, dtype):
        try:
            return Outcome(_run(way, call), way.route, way.detail, because=because)
        except Exception as error:
            memory = _is_memory(error)
            if way.run is call.whole:
                because = "out of memory" if memory else f"its own call failed: {error}"
            _tell(call, way, error, memory=memory)
            # The host's own error goes to the host as it is, if nothing else helps.
            if failure is None or isinstance(failure, UnsupportedLayout):
                failure = error
            forget_frames(error)
        free_memory()
    if failure is None or _is_memory(failure) or isinstance(failure, UnsupportedLayout):
        message = f"this machine has too little memory for {_name(call)} ({failure})"
        raise OutOfMemory(message, reason="out of memory") from failure
    raise failure


def whole_fits(call: VaeCall[T]) -> bool:
    """Whether the memory that is free takes the whole VAE's call, of a batch all at once; True where that cannot be told."""
    known = _known(call)
    _brought(call)
    return _whole_fits(call, known)


def _run(way: Way[T], call: VaeCall[T]) -> T:
    try:
        return way.run()
    except BaseException:
        # What Wan's and Qwen-Image's VAEs keep of the frames before would stay in the device's memory until their next call.
        # Strips keep nothing there, and another thread may be within a call of the module meanwhile.
        if way.run in (call.whole, call.own_tiling) and hasattr(call.vae.module, "clear_cache"):
            call.vae.module.clear_cache()
        raise


def wants_bfloat16(call: VaeCall[T], settings: Settings) -> bool:
    """Whether the call is to be done by the CPU's fast path."""
    vae = call.vae
    return settings.cpu_bfloat16 and vae.module is not None and vae.device.type == "cpu" and is_fast_at_bfloat16()


def _ways(call: VaeCall[T], settings: Settings, dtype: torch.dtype | None) -> Iterator[Way[T]]:
    """Each is asked for when the one before has failed and given its memory back."""
    known = _known(call)
    if known is not None and dtype is None and wants_bfloat16(call, settings):
        yield from _exact_ways(call, known, call.tensor, torch.bfloat16)
    # Before the free memory is looked at: a host that has put the VAE away takes other models away to make room for it.
    tensor = _brought(call)
    if call.whole is not None and dtype is None and _whole_fits(call, known):
        yield Way("local", "", call.whole)
    if known is not None:
        yield from _exact_ways(call, known, tensor, dtype)
    del tensor
    if call.own_tiling is not None and dtype is None:
        yield Way("tiled", "the VAE's own tiling", call.own_tiling)
    if call.vae.module is not None:
        yield Way("local", "on the CPU", partial(_on_cpu, call))


@dataclass(frozen=True)
class _Known:
    """A VAE that the exact tiled VAE knows: its plan, and what one picture or video takes in the whole VAE."""

    plan: Plan
    picture_bytes: int


def _known(call: VaeCall[T]) -> _Known | None:
    if call.vae.module is None:
        return None
    try:
        plan = _PLANS[call.op](call.vae.module)
        check_frames(plan, call.tensor)
        return _Known(plan, whole_bytes(plan, call.tensor[:1].shape, plan.first_weight.dtype))
    except (UnsupportedLayout, InvalidRequest) as error:
        log.debug("no exact tiled VAE: %s", error)
    except Exception:
        log.warning("no exact tiled VAE of %s", type(call.vae.module).__name__, exc_info=True)
    return None


def _brought(call: VaeCall[T]) -> torch.Tensor:
    """What the VAE computes with, on its device, where the host has brought it; where that cannot be, as it is."""
    if call.vae.module is None:
        return call.tensor
    try:
        bring_in(call.vae.module)
        return call.vae.bring(call.tensor)
    except Exception as error:
        if not is_out_of_memory(error):
            log.warning("the VAE could not be brought to %s", call.vae.device, exc_info=True)
        else:
            log.warning("no room for the VAE on %s: %s", call.vae.device, error)
        forget_frames(error)
    free_memory()
    return call.tensor


def _whole_fits(call: VaeCall[T], known: _Known | None) -> bool:
    """Whether the memory that is free takes the whole VAE's call; True where that cannot be told."""
    free = available_memory(call.vae.device)
    if free is None:
        return True
    if known is None:
        return mask_bytes(call) <= _WHOLE_SHARE * free
    at_once = 1 if call.in_parts else call.tensor.shape[0]
    return at_once * known.picture_bytes <= _WHOLE_SHARE * free


def _exact_ways(call: VaeCall[T], known: _Known, tensor: torch.Tensor, dtype: torch.dtype | None) -> Iterator[Way[T]]:
    """With less and less memory, which is asked for anew each time. Where it cannot be told: shares of what the whole takes."""
    name = "exact, bfloat16" if dtype == torch.bfloat16 else "exact"
    for share in _SHARES:
        free = available_memory(tensor.device)
        limit = int(share * (tensor.shape[0] * known.picture_bytes if free is None else free))
        yield Way("tiled", name, partial(_exact, call, known.plan, tensor, Limits(limit, dtype=dtype)))
    if tensor.device.type != "cpu":
        memory = available_memory(torch.device("cpu"))
        limits = Limits(None if memory is None else int(_SHARES[0] * memory), device="cpu", dtype=torch.float32)
        yield Way("tiled", "exact, on the CPU", partial(_exact, call, known.plan, tensor, limits))


def _exact(call: VaeCall[T], plan: Plan, tensor: torch.Tensor, limits: Limits) -> T:
    return call.adopt_local(run(plan, call.vae.module, tensor, limits, progress=_progress(call)))


def _on_cpu(call: VaeCall[T]) -> T:
    vae, free = call.vae, available_memory(torch.device("cpu"))
    if free is not None and mask_bytes(call) > _WHOLE_SHARE * free:
        # A system that has promised its memory ends the process.
        raise OutOfMemory("its attention to every frame does not fit in this machine's memory", reason="out of memory")
    return call.adopt_local(vae.whole(on_cpu(vae.module), call.op, call.tensor.to("cpu", torch.float32)))


def _progress(call: VaeCall[T]) -> Callable[[float], None]:
    """Shows the user how far it is, in whole per cents."""
    shown = -1

    def progress(done: float) -> None:
        nonlocal shown
        if int(100 * done) > shown:
            shown = int(100 * done)
            call.user.tell(f"{call.doing} on this machine, {shown} %")

    return progress


def _name(call: VaeCall[T]) -> str:
    batch, height, width = call.size
    return f"the {call.op} of {f'{batch} pictures of ' if batch > 1 else ''}{width} x {height} px"


def _tell(call: VaeCall[T], way: Way[T], error: Exception, *, memory: bool) -> None:
    name = " ".join(filter(None, (way.route, way.detail)))
    if memory:
        log.warning("%s ran out of memory for %s", name, _name(call))
    elif isinstance(error, UnsupportedLayout):
        log.info("%s cannot be used for %s: %s", name, _name(call), error)
    else:
        log.warning("%s failed for %s: %s", name, _name(call), error)
        log.debug("%s", name, exc_info=error)


def _is_memory(error: Exception) -> bool:
    return isinstance(error, OutOfMemory) or is_out_of_memory(error)
