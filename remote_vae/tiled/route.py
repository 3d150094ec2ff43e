"""The tiled route: the whole VAE where it fits, and else the exact tiled VAE in the memory that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from remote_vae.routes import Outcome, Spare, T, VaeCall
from remote_vae.settings import Settings
from remote_vae.tiled.ladder import exact_ways, first_that_fits, whole_fits
from remote_vae.tiled.processor import is_fast_at_bfloat16


class TiledRoute:
    """Answers on this machine, whatever memory it has.

    Where the whole VAE fits, it is asked first: its answer is the host's own to the last bit.
    """

    name = "tiled"

    def run(self, call: VaeCall[T], settings: Settings) -> Outcome[T]:
        """Raises OutOfMemory when nothing fits; an error that is not about memory is the host's own."""
        batch, height, width = call.size
        what = f"the {call.op} of {batch} x {width} x {height} px"
        name, value = first_that_fits(_ways(call, settings), what)
        return Outcome(value, detail=name)


def wants_bfloat16(call: VaeCall[T], settings: Settings) -> bool:
    """Whether the call is to be done by the CPU's fast path."""
    return settings.cpu_bfloat16 and call.vae is not None and call.tensor.device.type == "cpu" and is_fast_at_bfloat16()


def _ways(call: VaeCall[T], settings: Settings) -> Iterator[Spare[T]]:
    if wants_bfloat16(call, settings):
        for way in exact_ways(call.vae, call.op, call.tensor, dtype=torch.bfloat16):
            yield Spare("tiled VAE in bfloat16", partial(_finished, call, way.run))
    if call.whole is not None and (call.vae is None or whole_fits(call.vae, call.op, call.tensor)):
        yield Spare("whole VAE", call.whole)
    if call.vae is not None:
        for way in exact_ways(call.vae, call.op, call.tensor):
            yield Spare(way.name, partial(_finished, call, way.run))
    yield from call.spares


def _finished(call: VaeCall[T], run: Callable[[], torch.Tensor]) -> T:
    return call.finish(run())
