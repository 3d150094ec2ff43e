"""One call of the VAE: in float32 where half precision gives NaN, and to its end only while somebody waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from remote_vae import local
from remote_vae.call import Answer, User, VaeCall
from remote_vae.errors import NotFinite
from remote_vae.local.own import own_tiling
from remote_vae.server.admission import ClientGone, Place
from remote_vae.settings import Settings
from remote_vae.tiled.memory import free_memory
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.wire import EncodeAnswer
from remote_vae.wire.tensors import is_within

log = logging.getLogger("remote_vae")


class _Left(BaseException):
    """The client hung up. No error of one way to answer, after which the next one is tried."""


class _Check(TorchFunctionMode):
    """Looks after the client at each operation of this thread: 1 us each (torch 2.13)."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _check(self._place)
        return function(*args, **(kwargs or {}))


def _check(place: Place) -> None:
    if place.is_gone():
        raise _Left


def _while_wanted(whole: Callable[[Any, Op, torch.Tensor], torch.Tensor], place: Place, *call: Any) -> torch.Tensor:
    """The VAE's own work, which ends at its next operation when the client hangs up. A video's may have minutes before it.

    No more than that: where a host moves models in the middle of a call, it has to come to the end of it.
    """
    with _Check(place):
        return whole(*call)


def made(vae: VaeAtWork, op: Op, values: Callable[[torch.dtype], torch.Tensor], place: Place) -> torch.Tensor:
    """Pixels of raw latents, or moments of pixels; in float32 if half precision gives NaN. The VAE stays as it is.

    Args:
        vae: what makes them.
        op: which of them.
        values: what it takes, on its device, in the dtype given.
        place: of the request.

    Raises:
        NotFinite: float32 gives NaN as well. OutOfMemory: it does not fit, tiled neither. ClientGone: the client hung up
            meanwhile. And what the VAE raises.
    """
    try:
        return _made(replace(vae, whole=partial(_while_wanted, vae.whole, place)), op, values, place)
    except _Left:
        raise ClientGone("the client hung up while the VAE worked") from None


def _made(vae: VaeAtWork, op: Op, values: Callable[[torch.dtype], torch.Tensor], place: Place) -> torch.Tensor:
    result = _on_this_machine(vae, op, values(vae.dtype), place)
    if not is_within(result) and vae.dtype != torch.float32:
        log.warning("the VAE gives NaN in %s; this call is done in float32, and the VAE stays as it is", vae.dtype)
        # A video's NaN takes as much room as its pixels.
        del result
        free_memory()
        result = _on_this_machine(vae, op, values(torch.float32), place, torch.float32)
    if not is_within(result):
        raise NotFinite(f"the {op} gives NaN or infinite values, in float32 as well; is it scaled for this VAE?")
    return result


def _on_this_machine(
    vae: VaeAtWork, op: Op, tensor: torch.Tensor, place: Place, dtype: torch.dtype | None = None
) -> torch.Tensor:
    def whole() -> torch.Tensor:
        return vae.whole(vae.module, op, vae.bring(tensor))

    def in_its_own_tiles() -> torch.Tensor:
        with own_tiling(vae.module):
            return whole()

    user = User(tell=lambda _: _check(place))
    call = VaeCall(op, tensor, vae, adopt=_values, whole=whole, own_tiling=in_its_own_tiles, user=user)
    return local.answer(call, Settings(), dtype=dtype).value


def _values(made: Answer) -> torch.Tensor:
    return made.latents if isinstance(made, EncodeAnswer) else made.tensor
