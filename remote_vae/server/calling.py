"""Calls of the VAE, several at once: in parts where memory is short, in float32 where half precision gives NaN.

They go on only while somebody waits for one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Union

import torch
from torch.overrides import TorchFunctionMode

from remote_vae import local
from remote_vae.call import Answer, User, VaeCall
from remote_vae.errors import NotFinite, OutOfMemory
from remote_vae.local.own import own_tiling
from remote_vae.server.admission import ClientGone
from remote_vae.settings import Settings
from remote_vae.tiled.memory import forget_frames, free_memory, is_out_of_memory
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.wire import EncodeAnswer
from remote_vae.wire.tensors import is_within

log = logging.getLogger("remote_vae")

# What the VAE takes, on its device, in the dtype given.
Values = Callable[[torch.dtype], torch.Tensor]
# Of one call: pixels of raw latents, or moments of pixels.
Made = Union[torch.Tensor, Exception]


class _Left(BaseException):
    """The clients hung up. No error of one way to answer, after which the next one is tried."""


class _Check(TorchFunctionMode):
    """Looks after the clients at each operation of this thread: 1 us each (torch 2.13)."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._check()
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Calls:
    """Calls of one VAE that may be made at once.

    Attributes:
        vae: what makes them. It stays as it is.
        op: which of them.
        is_wanted: whether one client still waits.
        ran_out: told when memory was too short for them as they were.
        make_room: puts other VAEs away for so many bytes; returns the bytes that became free.
    """

    vae: VaeAtWork
    op: Op
    is_wanted: Callable[[], bool] = lambda: True
    ran_out: Callable[[], None] = lambda: None
    make_room: Callable[[int], int] = lambda _: 0

    def made(self, values: Sequence[Values]) -> list[Made]:
        """What each of ``values`` gives, or why it gives nothing: InvalidRequest, NotFinite, OutOfMemory, what the VAE raises.

        Raises:
            ClientGone: all clients hung up meanwhile.
        """
        try:
            with_check = replace(self, vae=replace(self.vae, whole=partial(_while_wanted, self.vae.whole, self._check)))
            return with_check._made(values)  # noqa: SLF001
        except _Left:
            raise ClientGone("the client hung up while the VAE worked") from None

    def _check(self) -> None:
        if not self.is_wanted():
            raise _Left

    def _made(self, values: Sequence[Values]) -> list[Made]:
        given = [_tried(partial(each, self.vae.dtype)) for each in values]
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        made = iter(self._parts(tensors) if tensors else [])
        results = [next(made) if isinstance(each, torch.Tensor) else each for each in given]
        del given, tensors, made
        return [self._finite(results, index, values[index]) for index in range(len(values))]

    # --- in less memory --------------------------------------------------------------------------------------------------

    def _parts(self, tensors: Sequence[torch.Tensor]) -> list[Made]:
        """All at once, else in halves, of one picture in whichever way this machine can."""
        if len(tensors) == 1 and len(tensors[0]) == 1:
            return [_tried(partial(self._alone, tensors[0]))]
        try:
            return self._at_once(tensors)
        except Exception as error:
            self._failed(error, sum(map(len, tensors)))
        free_memory()
        if len(tensors) > 1:
            half = len(tensors) // 2
            return [*self._parts(tensors[:half]), *self._parts(tensors[half:])]
        return [self._in_halves(tensors[0])]

    def _in_halves(self, tensor: torch.Tensor) -> Made:
        parts = [self._parts([half])[0] for half in tensor.tensor_split(2)]
        failed = next((part for part in parts if isinstance(part, Exception)), None)
        return failed or torch.cat([part for part in parts if isinstance(part, torch.Tensor)])

    def _at_once(self, tensors: Sequence[torch.Tensor]) -> list[Made]:
        whole = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        call = VaeCall(self.op, whole, self.vae, adopt=_values)
        if not local.whole_fits(call) and not (self._made_room(whole) and local.whole_fits(call)):
            raise OutOfMemory(f"{len(whole)} pictures do not fit at once", reason="out of memory")
        try:
            made = self._with_room(whole)
        except BaseException:
            # What Wan's and Qwen-Image's VAEs keep of the frames before.
            if hasattr(self.vae.module, "clear_cache"):
                self.vae.module.clear_cache()
            raise
        sizes = [len(each) for each in tensors]
        return list(made.split_with_sizes(sizes))

    def _failed(self, error: Exception, pictures: int) -> None:
        if not _is_memory(error):
            log.warning("%d pictures at once failed (%s); they are made in parts", pictures, error)
        else:
            self.ran_out()
            log.warning("out of memory for %d pictures at once; they are made in parts", pictures)
        forget_frames(error)

    def _with_room(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole VAE's call, once more where others were put away for it."""
        try:
            return self._whole(tensor)
        except Exception as error:
            if not _is_memory(error):
                raise
            forget_frames(error)
            if not self._made_room(tensor):
                raise
        free_memory()
        return self._whole(tensor)

    def _made_room(self, tensor: torch.Tensor) -> bool:
        return self.make_room(local.likely_bytes(VaeCall(self.op, tensor, self.vae, adopt=_values))) > 0

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.vae.whole(self.vae.module, self.op, self.vae.bring(tensor))

    def _alone(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        def whole() -> torch.Tensor:
            try:
                return self._with_room(tensor)
            except Exception as error:
                if _is_memory(error):
                    self.ran_out()
                raise

        def in_its_own_tiles() -> torch.Tensor:
            with own_tiling(self.vae.module):
                return self._whole(tensor)

        user = User(tell=lambda _: self._check())
        call = VaeCall(
            self.op,
            tensor,
            self.vae,
            adopt=_values,
            whole=whole,
            own_tiling=in_its_own_tiles,
            make_room=lambda wanted, _: self.make_room(wanted),
            user=user,
        )
        return local.answer(call, Settings(), dtype=dtype).value

    # --- in float32 ------------------------------------------------------------------------------------------------------

    def _finite(self, results: list[Made], index: int, values: Values) -> Made:
        """One of ``results``, its pictures that are not finite made in float32; the list lets go of it."""
        result, results[index] = results[index], ClientGone("taken")
        if isinstance(result, Exception) or is_within(result):
            return result
        bad = [number for number, picture in enumerate(result) if not is_within(picture)]
        if self.vae.dtype == torch.float32:
            return self._not_finite()
        log.warning("the VAE gives NaN in %s; this call is done in float32, and the VAE stays as it is", self.vae.dtype)
        # A video's NaN takes as much room as its pixels.
        kept = None if len(bad) == len(result) else result
        del result
        free_memory()
        return _tried(partial(self._in_float32, values, bad, kept))

    def _in_float32(self, values: Values, bad: list[int], kept: torch.Tensor | None) -> torch.Tensor:
        given = values(torch.float32)
        made = [self._alone(given[number : number + 1], torch.float32) for number in bad]
        if not all(map(is_within, made)):
            raise self._not_finite()
        if kept is None:
            return made[0] if len(made) == 1 else torch.cat(made)
        whole = kept.float()
        for number, picture in zip(bad, made, strict=True):
            whole[number : number + 1] = picture
        return whole

    def _not_finite(self) -> NotFinite:
        return NotFinite(f"the {self.op} gives NaN or infinite values, in float32 as well; is it scaled for this VAE?")


def _while_wanted(
    whole: Callable[[Any, Op, torch.Tensor], torch.Tensor], check: Callable[[], None], *call: Any
) -> torch.Tensor:
    """The VAE's own work, which ends at its next operation when the clients hang up. A video's may have minutes before it.

    No more than that: where a host moves models in the middle of a call, it has to come to the end of it.
    """
    with _Check(check):
        return whole(*call)


def _tried(make: Callable[[], torch.Tensor]) -> Made:
    """What it makes, or its error."""
    try:
        return make()
    except Exception as error:
        if _is_memory(error):
            forget_frames(error)
        return error


def _is_memory(error: Exception) -> bool:
    return isinstance(error, OutOfMemory) or is_out_of_memory(error)


def _values(made: Answer) -> torch.Tensor:
    return made.latents if isinstance(made, EncodeAnswer) else made.tensor
