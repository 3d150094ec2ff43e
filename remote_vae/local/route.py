"""How this machine answers a VAE call: in this order, until the picture is there.

1. a copy of the VAE on the device that the user has picked for this (``local_device``),
2. the host's own call of the whole VAE, where the memory takes it: its answer is the host's to the last bit. Where memory is
   short, once more after the host has put its other models away,
3. the exact tiled VAE in less and less memory, last in float32 on the CPU,
4. the VAE's own overlapping tiles, which are not exact,
5. a copy of the whole VAE on the CPU, in float32.

Only the second is the host's. Whatever goes wrong with it or with the others, the next one is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from remote_vae.call import Outcome, T, VaeCall, Way, no_room
from remote_vae.errors import InvalidRequest, NotFinite, OutOfMemory, UnsupportedLayout
from remote_vae.local.elsewhere import copies, picked_device
from remote_vae.local.estimate import Need, mask_bytes, reserved_bytes, usual_bytes, whole_need
from remote_vae.local.memory import available_memory, heard_out_of_memory, spills
from remote_vae.local.own import on_cpu
from remote_vae.local.pace import pace
from remote_vae.settings import Settings
from remote_vae.tiled.exact import Limits, check_frames, run
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.tiled.memory import forget_frames, free_memory, is_fast_at_bfloat16, is_out_of_memory
from remote_vae.tiled.plan import Plan
from remote_vae.tiled.weights import bring_in

log = logging.getLogger("remote_vae")

_PLANS = {"decode": decoder_plan, "encode": encoder_plan}
_CPU = torch.device("cpu")

# Shares of the free memory that the tiled VAE may take, one attempt after the other. Convolutions have workspaces of their own,
# which nobody announces, and free memory is in pieces.
_SHARES = (0.8, 0.4, 0.15)
# Of what the whole VAE keeps alive: in less the tiled VAE is slow, and in so much it is as quick as it gets.
_TIGHT, _ENOUGH = 0.3, 0.6
# A processor's memory is other programs', too: a call for whose attention there is no more than this is not begun.
_MASK_SHARE = 0.75


@dataclass
class _Attempts:
    """What has come of the ways that were tried.

    Attributes:
        failure: the first error, or the host's own.
        because: why the whole VAE did not answer.
        elsewhere: why the device that the user has picked did not.
        short: whether the last way failed for lack of memory.
    """

    failure: Exception | None = None
    because: str = ""
    elsewhere: str = ""
    short: bool = False


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
    if settings.make_room == "off":
        call = replace(call, make_room=no_room)
    so_far = _Attempts()
    for way in _ways(call, settings, dtype, so_far):
        try:
            made = _run(way, call)
            # The host's own picture is what was to be had, whatever room was made for it.
            whole_failed = "" if way.run is call.whole else so_far.because
            return Outcome(made, way.route, way.detail, because=", then ".join(filter(None, (so_far.elsewhere, whole_failed))))
        except Exception as error:
            so_far.short = _is_memory(error)
            if so_far.short:
                heard_out_of_memory(error)
            if way.run is call.whole:
                so_far.because = "out of memory" if so_far.short else f"its own call failed: {error}"
            _tell(call, way, error, memory=so_far.short)
            # The host's own error goes to the host as it is, if nothing else helps.
            if so_far.failure is None or isinstance(so_far.failure, UnsupportedLayout) or way.run is call.whole:
                so_far.failure = error
            forget_frames(error)
        free_memory()
    failure = so_far.failure
    if failure is None or _is_memory(failure) or isinstance(failure, UnsupportedLayout):
        message = f"this machine has too little memory for {_name(call)} ({failure})"
        raise OutOfMemory(message, reason="out of memory") from failure
    raise failure


def whole_fits(call: VaeCall[T]) -> bool:
    """Whether the memory that is free is sure to take the whole VAE's call, of a batch all at once.

    True where that cannot be told.
    """
    known = _known(call)
    _brought(call)
    free = available_memory(call.vae.device)
    return free is None or _need(call, known).likely <= free


def likely_bytes(call: VaeCall[T]) -> int:
    """What the whole VAE's call is likely to take of its device beside the weights, of a batch all at once."""
    likely = _need(call, _known(call)).likely
    pictures, height, width = call.size
    return likely or usual_bytes(call.op, pictures * height * width, call.vae.dtype, call.vae.device)


def _run(way: Way[T], call: VaeCall[T]) -> T:
    try:
        if way.run is call.whole:
            return pace.timed(call, way.run, available_memory(call.vae.device))
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


def _ways(call: VaeCall[T], settings: Settings, dtype: torch.dtype | None, so_far: _Attempts) -> Iterator[Way[T]]:
    """Each is asked for when the one before has failed and given its memory back."""
    known = _known(call)
    picked = None if call.vae.module is None else picked_device(settings.local_device, call.vae.device)
    if picked is not None:
        yield from _ways_on(picked, call, known, dtype)
        so_far.elsewhere = f"{picked}: {'out of memory' if so_far.short else 'failed'}"
    if known is not None and dtype is None and wants_bfloat16(call, settings):
        yield from _exact_ways(call, known, call.tensor, torch.bfloat16)
    # Before the free memory is looked at: a host that has put the VAE away takes other models away to make room for it.
    tensor = _brought(call)
    if call.whole is not None and dtype is None:
        yield from _whole_ways(call, call.whole, known, so_far)
    if known is not None:
        _make_room_for_tiles(call, known)
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
    picture: Need


def _known(call: VaeCall[T]) -> _Known | None:
    if call.vae.module is None:
        return None
    try:
        plan = _PLANS[call.op](call.vae.module)
        check_frames(plan, call.tensor)
        shape, dtype = call.tensor[:1].shape, plan.first_weight.dtype
        return _Known(plan, whole_need(call.op, plan, shape, dtype, call.vae.device))
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


# --- the whole VAE -----------------------------------------------------------------------------------------------------------


def _whole_ways(call: VaeCall[T], whole: Callable[[], T], known: _Known | None, so_far: _Attempts) -> Iterator[Way[T]]:
    """The host's own call, and once more where other models have made room for it."""
    device = call.vae.device
    free = available_memory(device)
    if pace.is_too_slow(call, free):
        so_far.because = "the whole VAE was too slow before"
        return
    need = _need(call, known)
    # What is sure to fit, where nothing says that it does not; elsewhere what may fit is tried.
    wanted = need.likely if spills(device) else need.least
    if free is None or wanted <= free:
        yield Way("local", "", whole)
        if not so_far.short:
            return
        # It was not enough.
        wanted = (need.least + need.likely) // 2
    free = None if call.make_room is no_room else available_memory(device)
    if free is not None and _make_room(call, need.likely - free, wanted - free):
        yield Way("local", "", whole)


def _need(call: VaeCall[T], known: _Known | None) -> Need:
    """What the whole call takes; nothing where that cannot be told."""
    if known is not None:
        return known.picture.of(1 if call.in_parts else call.tensor.shape[0])
    try:
        mask = int(mask_bytes(call) / _MASK_SHARE)
        return Need(0, mask, max(mask, reserved_bytes(call)))
    except Exception:  # as of a plan
        log.debug("what the whole VAE takes is not known", exc_info=True)
        return Need(0, 0, 0)


def _make_room(call: VaeCall[T], wanted: int, least: int) -> int:
    """As ``VaeCall.make_room``; 0 where nothing is wanted."""
    freed = call.make_room(wanted, max(1, least)) if wanted > 0 else 0
    if freed:
        log.info("%s: other models made room of %d MB", _name(call), freed // 10**6)
    return freed


def _make_room_for_tiles(call: VaeCall[T], known: _Known) -> None:
    """Where the tiled VAE would be slow for lack of memory, and other models could at least double what there is."""
    free = None if call.make_room is no_room else available_memory(call.vae.device)
    if free is not None and free < _TIGHT * known.picture.counted:
        _make_room(call, int(_ENOUGH * known.picture.counted) - free, free)


# --- others ------------------------------------------------------------------------------------------------------------------


def _exact_ways(call: VaeCall[T], known: _Known, tensor: torch.Tensor, dtype: torch.dtype | None) -> Iterator[Way[T]]:
    """With less and less memory, which is asked for anew each time. Where it cannot be told: shares of what the whole takes."""
    name = "exact, bfloat16" if dtype == torch.bfloat16 else "exact"
    for share in _SHARES:
        free = available_memory(tensor.device)
        limit = int(share * (tensor.shape[0] * known.picture.counted if free is None else free))
        yield Way("tiled", name, partial(_exact, call, known.plan, tensor, Limits(limit, dtype=dtype)))
    if tensor.device.type != "cpu":
        yield Way("tiled", "exact, on the CPU", partial(_exact, call, known.plan, tensor, _limits_on(_CPU, torch.float32)))


def _limits_on(device: torch.device, dtype: torch.dtype | None) -> Limits:
    free = available_memory(device)
    return Limits(None if free is None else int(_SHARES[0] * free), device=device, dtype=dtype)


def _exact(call: VaeCall[T], plan: Plan, tensor: torch.Tensor, limits: Limits) -> T:
    return call.adopt_local(run(plan, call.vae.module, tensor, limits, progress=_progress(call)))


def _on_cpu(call: VaeCall[T]) -> T:
    vae, free = call.vae, available_memory(_CPU)
    if free is not None and mask_bytes(call) > _MASK_SHARE * free:
        # A system that has promised its memory ends the process.
        raise OutOfMemory("its attention to every frame does not fit in this machine's memory", reason="out of memory")
    return call.adopt_local(vae.whole(on_cpu(vae.module), call.op, call.tensor.to(_CPU, torch.float32)))


def _ways_on(device: torch.device, call: VaeCall[T], known: _Known | None, dtype: torch.dtype | None) -> Iterator[Way[T]]:
    """On a device that the user has picked: a copy of the whole VAE where it fits there, then the exact tiled one."""
    computed = dtype or (torch.float32 if device.type == "cpu" else call.vae.dtype)
    name = "on the CPU" if device.type == "cpu" else f"on {device}"
    if _fits_on(device, call, known, computed):
        yield Way("local", name, partial(_whole_on, device, call, computed))
    # Its memory is for the strips now; their weights are copied layer by layer.
    copies.drop()
    if known is not None:
        yield Way("tiled", f"exact, {name}", partial(_exact_on, device, call, known.plan, computed))


def _fits_on(device: torch.device, call: VaeCall[T], known: _Known | None, dtype: torch.dtype) -> bool:
    """Whether the copy and its work fit; True where that cannot be told."""
    free = available_memory(device)
    if free is None or known is None:
        return free is None or mask_bytes(call) <= _MASK_SHARE * free
    if copies.has(call.vae.module, device):
        weights = 0
    else:
        weights = dtype.itemsize * sum(weight.numel() for weight in call.vae.module.parameters())
    need = whole_need(call.op, known.plan, call.tensor.shape, dtype, device)
    return weights + (need.likely if spills(device) else need.least) <= free


def _whole_on(device: torch.device, call: VaeCall[T], dtype: torch.dtype) -> T:
    vae = call.vae
    with torch.no_grad():
        made = vae.whole(copies.of(vae.module, device, dtype), call.op, call.tensor.to(device, dtype))
    return _adopted_from(device, call, made)


def _exact_on(device: torch.device, call: VaeCall[T], plan: Plan, dtype: torch.dtype) -> T:
    made = run(plan, call.vae.module, call.tensor, _limits_on(device, dtype), progress=_progress(call))
    return _adopted_from(device, call, made)


def _adopted_from(device: torch.device, call: VaeCall[T], made: torch.Tensor) -> T:
    if not torch.isfinite(made).all():
        raise NotFinite(f"the {call.op} on {device} gives NaN or infinite values")
    return call.adopt_local(made)


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
