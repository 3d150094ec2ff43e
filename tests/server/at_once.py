"""What the engine's threads do one after the other, in the thread of the test."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from remote_vae.server.admission import Place
from remote_vae.server.batching import Job, Request
from remote_vae.server.catalogue import Device, Entry
from remote_vae.server.pictures import Facts, answer
from remote_vae.server.worker import Nobody, Watcher, Worker, prepared
from remote_vae.wire import DecodeRequest, HttpResponse


def job_of(entry: Entry, request: Request, device: Device = None) -> Job:
    """A call that has been read."""
    vae = entry.vae(device)
    values = prepared(request, vae)
    place = Place("decode" if isinstance(request, DecodeRequest) else "encode", 1, 1)
    return Job(place, entry, request, vae.family, values, values.shape)


def worker_of(device: Device = None, watcher: Watcher | None = None) -> Worker:
    """A worker that answers at once."""

    def finish(worker: Worker, job: Job, made: torch.Tensor, facts: Facts) -> None:
        try:
            job.succeed(answer(job.request, made, facts, worker.mover, job.place))
        except Exception as error:
            job.fail(error)

    return Worker(device, nullcontext(), watcher or Nobody(), lambda _: None, finish)


def answers(entry: Entry, requests: Sequence[Request], **given: Any) -> list[HttpResponse | Exception]:
    """What comes of calls that are made at once."""
    jobs = [job_of(entry, request) for request in requests]
    worker_of(**given).work(jobs)
    return [job.answer.exception() or job.answer.result() for job in jobs]  # type: ignore[misc]
