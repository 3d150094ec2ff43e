"""The tiled route: the whole VAE where it fits, and else the exact tiled VAE in the memory that there is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch

from remote_vae.call import Outcome, Spare, T, VaeCall
from remote_vae.local.ladder import exact_ways, first_that_fits, whole_fits
from remote_vae.settings import Settings
from remote_vae.tiled.memory import free_memory, is_fast_at_bfloat16, is_out_of_memory
from remote_vae.tiled.weights import bring_in

log = logging.getLogger("remote_vae")


class TiledRoute:
    """Answers on this machine, whatever memory it has.

    Where the whole VAE fits, it is asked first: its answer is the host's own to the last bit.
    """

    name = "tiled"

    def run(self, call: VaeCall[T], settings: Settings) -> Outcome[T]:
        """Raises OutOfMemory when nothing fits; an error that is not about memory is the host's own."""
        batch, height, width = call.size
        what = f"the {call.op} of {batch} x {width} x {height} px"
        call.tell(f"{call.doing} on this machine")
        name, value = first_that_fits(_ways(call, settings), what)
        return Outcome(value, detail=name)


def wants_bfloat16(call: VaeCall[T], settings: Settings) -> bool:
    """Whether the call is to be done by the CPU's fast path."""
    device = call.device or call.tensor.device
    return settings.cpu_bfloat16 and call.vae is not None and device.type == "cpu" and is_fast_at_bfloat16()


def _ways(call: VaeCall[T], settings: Settings) -> Iterator[Spare[T]]:
    device = call.device or call.tensor.device
    if wants_bfloat16(call, settings):
        for way in exact_ways(call.vae, call.op, call.tensor, dtype=torch.bfloat16, progress=_teller(call)):
            yield Spare("tiled VAE in bfloat16", partial(_finished, call, way.run))
    tensor = call.tensor
    if call.vae is not None:
        # Before the free memory is looked at: a host that has put the VAE away takes other models away to make room for it.
        tensor = _brought(call)
    if call.whole is not None and (call.vae is None or whole_fits(call.vae, call.op, _part(call), device)):
        yield Spare("whole VAE", call.whole)
    if call.vae is not None:
        for way in exact_ways(call.vae, call.op, tensor, progress=_teller(call)):
            yield Spare(way.name, partial(_finished, call, way.run))
    del tensor
    yield from call.spares


def _part(call: VaeCall[T]) -> torch.Tensor:
    """What the host's own call works on at once."""
    return call.tensor[:1] if call.in_parts else call.tensor


def _brought(call: VaeCall[T]) -> torch.Tensor:
    """What the VAE computes with, on its device, where the host has brought it; where that finds no room, as it is."""
    try:
        bring_in(call.vae)
        return call.bring(call.tensor)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("no room for the VAE on its device: %s", error)
    free_memory()
    return call.tensor


def _teller(call: VaeCall[T]) -> Callable[[float], None]:
    """Shows the user how far it is, in whole per cents."""
    shown = -1

    def tell(done: float) -> None:
        nonlocal shown
        if int(100 * done) > shown:
            shown = int(100 * done)
            call.tell(f"{call.doing} on this machine, {shown} %")

    return tell


def _finished(call: VaeCall[T], run: Callable[[], torch.Tensor]) -> T:
    return call.finish(run())
