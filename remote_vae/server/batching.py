"""The queue, and what of it is made at once: calls of one VAE whose tensors have the same shape, the first come first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Union

import torch

from remote_vae.server.admission import Place
from remote_vae.server.catalogue import Entry
from remote_vae.vae.at_work import VIDEO_DIMENSIONS
from remote_vae.vae.families import Family
from remote_vae.wire import DecodeRequest, EncodeRequest, HttpResponse

# Seconds after which what could not be made is looked at again.
_LOOK = 0.1

Request = Union[DecodeRequest, EncodeRequest]


@dataclass(eq=False)
class Job:
    """A call in the queue and at work.

    Attributes:
        place: of its request.
        entry: whose call it is.
        request: what is wanted.
        family: of the VAE that ``values`` are for.
        values: what the VAE takes but for the scaling, ``[B, C, h, w]``, of videos ``[B, C, F, h, w]``: as it was sent, or on
            its way to a device, in the dtype of the VAE there.
        shape: of ``values``.
        answer: comes of it.
        queued: since when, of ``time.monotonic``.
    """

    place: Place
    entry: Entry
    request: Request
    family: Family
    values: torch.Tensor
    shape: torch.Size
    answer: Future[HttpResponse] = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)

    @property
    def pictures(self) -> int:
        """Pictures, or videos."""
        return self.shape[0]

    @property
    def pixels(self) -> int:
        """Of all of them."""
        return self.place.pixels

    def goes_with(self, other: Job) -> bool:
        """Whether both may be made at once. What is no single picture a sample goes alone."""
        return (
            self.entry is other.entry
            and self.place.op == other.place.op
            and self.shape[1:] == other.shape[1:]
            and self.family == other.family
            and (len(self.shape) < VIDEO_DIMENSIONS or self.shape[2] == 1)
        )

    def fail(self, error: Exception) -> None:
        """Its answer is ``error``, unless it has one, or nobody waits for it."""
        with suppress(InvalidStateError):
            self.answer.set_exception(error)

    def succeed(self, response: HttpResponse) -> None:
        """Its answer is ``response``, unless nobody waits for it."""
        with suppress(InvalidStateError):
            self.answer.set_result(response)


class Batcher:
    """The queue. For many threads.

    Args:
        most_pixels: that are made at once; a larger call goes alone.
        wait: seconds that a call waits at most for others to go with it.
        others: whether someone is on his way into the queue: where nobody is, nothing is waited for.
    """

    def __init__(self, most_pixels: int, wait: float, others: Callable[[], bool]) -> None:
        self._most_pixels = most_pixels
        self._wait = wait
        self._others = others
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._jobs)

    def bytes_ahead(self) -> int:
        """Of what waits, those that are in the memory of a device."""
        with self._changed:
            return sum(job.values.nbytes for job in self._jobs if job.values.device.type != "cpu")

    def put(self, job: Job) -> None:
        """The last one in the queue."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def remove(self, job: Job) -> bool:
        """Whether it was still there."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            return True

    def wake(self) -> None:
        """Something has changed for those who wait in ``take``."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """What is in the queue is still taken, and then ``take`` gives nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, can: Callable[[Job], bool], rest: float | None = None) -> list[Job] | None:
        """The next calls that are to be made at once; waits for them. None of them: the queue is closed and empty.

        Args:
            can: whether a job can be made now by the one who asks; it must not wait.
            rest: seconds without a call after which the answer is None; None: it waits for as long as it takes.
        """
        with self._changed:
            while self._jobs or not self._closed:
                first = next((job for job in self._jobs if can(job)), None)
                # Whether a job can be made by another worker, nobody says: it is looked at again.
                left = _LOOK if self._jobs else rest
                if first is not None:
                    batch = self._batch(first)
                    left = first.queued + self._wait - time.monotonic()
                    if left <= 0 or self._is_full(batch) or not self._others():
                        for job in batch:
                            self._jobs.remove(job)
                        if self._closed:
                            # The others may have nothing to wait for any more.
                            self._changed.notify_all()
                        return batch
                if not self._changed.wait(left) and not self._jobs:
                    return None
            return []

    def _batch(self, first: Job) -> list[Job]:
        batch, pixels = [first], first.pixels
        for job in self._jobs:
            if job is not first and pixels + job.pixels <= self._most_pixels and first.goes_with(job):
                batch.append(job)
                pixels += job.pixels
        return batch

    def _is_full(self, batch: Sequence[Job]) -> bool:
        """Whether another one like the first would be too much, or none can go with it."""
        first = batch[0]
        return not first.goes_with(first) or sum(job.pixels for job in batch) + first.pixels > self._most_pixels
