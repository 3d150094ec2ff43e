"""A device and the thread that makes calls there, one batch after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Protocol

import torch

from remote_vae.server.admission import ClientGone, Place
from remote_vae.server.batching import Job
from remote_vae.server.calling import Calls, Made
from remote_vae.server.catalogue import Device, check_family, check_fingerprint
from remote_vae.server.moving import Mover, moved
from remote_vae.server.pictures import Facts
from remote_vae.tiled.memory import trim_heap
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.packed import batch_norm_of
from remote_vae.wire import DecodeRequest

log = logging.getLogger("remote_vae")

# Seconds without a call.
_REST = 1.0


class Watcher(Protocol):
    """Is told what happens; called from any thread."""

    def call_ended(self, place: Place, status: int, bytes_in: int, bytes_out: int) -> None:
        """A request has its answer, or the client is gone (status 499). Called by whoever sends it."""
        ...

    def batch_done(self, model: str, op: Op, pictures: int, seconds: float) -> None:
        """The VAE has made so many pictures, or videos, at once."""
        ...

    def out_of_memory(self, model: str, op: Op) -> None:
        """Calls did not fit as they were."""
        ...


class Nobody:
    """A watcher that does nothing."""

    def call_ended(self, place: Place, status: int, bytes_in: int, bytes_out: int) -> None: ...

    def batch_done(self, model: str, op: Op, pictures: int, seconds: float) -> None: ...

    def out_of_memory(self, model: str, op: Op) -> None: ...


# What becomes of a call that the VAE has made: pixels or moments, of which VAE.
Finish = Callable[["Worker", Job, torch.Tensor, Facts], None]


class Worker:
    """Makes calls on one device.

    Args:
        device: None: wherever the VAE is.
        turn: held while the VAE works.
        watcher: is told what happens.
        measure: told what a batch took.
        finish: is given what was made; must not wait.

    Attributes:
        busy: whether it is at work.
    """

    def __init__(
        self,
        device: Device,
        turn: AbstractContextManager[Any],
        watcher: Watcher,
        measure: Callable[[Sequence[Place]], None],
        finish: Finish,
    ) -> None:
        self.device = device
        self.mover = Mover(device or torch.device("cpu"))
        self.busy = False
        self._turn = turn
        self._watcher = watcher
        self._measure = measure
        self._finish = finish

    def start(self, take: Callable[[Worker, float | None], list[Job] | None]) -> threading.Thread:
        """Make what ``take`` gives until it gives nothing; see ``Batcher.take``."""
        thread = threading.Thread(target=self._run, args=(take,), name=f"remote-vae-{self.device or 'vae'}", daemon=True)
        thread.start()
        return thread

    def _run(self, take: Callable[[Worker, float | None], list[Job] | None]) -> None:
        rest: float | None = None
        while (batch := take(self, rest)) != []:
            if batch is None:
                # What the C library keeps of a crowd's calls goes back to the system once they are over.
                trim_heap()
                rest = None
            else:
                self.work(batch)
                # A host's heap is its own.
                rest = None if self.device is None else _REST
            # Not kept until the next one comes.
            del batch

    def work(self, batch: list[Job]) -> None:
        """Make calls at once. Each has its own result or error in the end, whatever happens."""
        self.busy = True
        try:
            self._work(batch)
        except Exception as error:
            for job in batch:
                job.fail(error)
        finally:
            self.busy = False

    def _work(self, batch: list[Job]) -> None:
        entry, op = batch[0].entry, batch[0].place.op
        with ExitStack() as stack:
            stack.enter_context(self._turn)
            # A generation of the host may have taken minutes.
            wanted = [job for job in batch if not job.place.is_gone()]
            for job in batch:
                if job not in wanted:
                    job.fail(ClientGone("the client hung up"))
            if not wanted:
                return
            vae = entry.vae(self.device)
            places = [job.place for job in wanted]
            begin(places, [job.pictures for job in wanted])
            stack.callback(end, places)
            stack.enter_context(entry.serving())
            calls = Calls(
                vae,
                op,
                is_wanted=lambda: not all(place.is_gone() for place in places),
                ran_out=partial(self._watcher.out_of_memory, entry.name, op),
                make_room=partial(entry.make_room, self.device),
            )
            results = calls.made([partial(self._values, job, vae) for job in wanted])
            facts = Facts(vae.family, batch_norm_of(vae.module), vae.has_posterior)
            for result in results:
                if isinstance(result, torch.Tensor):
                    self.mover.leaves(result)
        if any(isinstance(result, torch.Tensor) for result in results):
            self._measure(places)
        self._watcher.batch_done(entry.name, op, places[0].batch, (places[0].ended or 0.0) - (places[0].begun or 0.0))
        self._hand_over(wanted, results, facts)

    def _hand_over(self, jobs: Sequence[Job], results: list[Made], facts: Facts) -> None:
        for index, job in enumerate(jobs):
            # Each is let go of as soon as its answer is made.
            result, results[index] = results[index], ClientGone("handed over")
            if isinstance(result, Exception):
                job.fail(result)
            else:
                self._finish(self, job, result, facts)

    def _values(self, job: Job, vae: VaeAtWork, dtype: torch.dtype) -> torch.Tensor:
        """What the VAE takes for ``job``, in ``dtype`` and on its device. Raises InvalidRequest, OtherVae."""
        request = job.request
        # Here and not earlier: a host may have loaded another one meanwhile.
        check_family(vae.family, request.family)
        check_fingerprint(job.entry, request.fingerprint)
        given = self._given(job, vae, dtype)
        return request.scaling.unscale(given, vae.family) if isinstance(request, DecodeRequest) else given

    def _given(self, job: Job, vae: VaeAtWork, dtype: torch.dtype) -> torch.Tensor:
        values, is_here = job.values, job.values.device == vae.device
        if is_here:
            self.mover.arrived(values)
        if job.family == vae.family and (values.is_cpu or (is_here and values.dtype == dtype)):
            return moved(values, vae.device, dtype)
        # A host has another VAE by now, or what was brought is on another device, or not in float32.
        return moved(prepared(job.request, vae), vae.device, dtype)


def prepared(request: Any, vae: VaeAtWork) -> torch.Tensor:
    """What ``vae`` takes for ``request`` but for the scaling, as it was sent. Raises InvalidRequest: it is not for that VAE."""
    if isinstance(request, DecodeRequest):
        return request.unpacked(vae.family, batch_norm_of(vae.module))
    pixels: torch.Tensor = request.pixels(vae.family)
    return pixels


def begin(places: Sequence[Place], pictures: Sequence[int]) -> None:
    """The VAE starts to work on them at once."""
    now = time.monotonic()
    for place in places:
        place.begun, place.batch = now, sum(pictures)
        place.batch_pixels = sum(each.pixels for each in places)


def end(places: Sequence[Place]) -> None:
    """It has done what it could."""
    now = time.monotonic()
    for place in places:
        place.ended = now
