"""Makes the VAE calls of a server: they are read, wait, are made several at once, and answered, each in threads of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.server.admission import Admission, ClientGone, Limits, Place, Size
from remote_vae.server.batching import Batcher, Job, Request
from remote_vae.server.catalogue import Catalogue, Device, Entry, Fits, NoModel, pick
from remote_vae.server.moving import Mover
from remote_vae.server.pictures import Facts, answer
from remote_vae.server.worker import Nobody, Watcher, Worker, prepared
from remote_vae.tiled.memory import forget_frames, is_out_of_memory
from remote_vae.vae.at_work import VIDEO_DIMENSIONS, Op
from remote_vae.vae.frames import check_cells, check_frames, check_latent_frames
from remote_vae.wire import EncodeRequest, HttpResponse, Output, TensorHead, decode_size, encode_size
from remote_vae.wire.whole_files import picture_size

# Four pictures of 512 px take as long as three, and those of 1024 px as long as they would one by one (H100, float16).
BATCH_PIXELS = 1 << 20
BATCH_WAIT = 0.005
# Of what waits, so much is brought to a GPU beforehand.
_AHEAD_BYTES = 128 << 20
# Of a picture's file: four levels, and as many values of float32.
_FILE_BYTES_A_PIXEL = 20
# A device that had no room for a copy of a VAE is not tried again for so long (seconds).
_NO_ROOM = 60.0
_THREADS = max(2, min(8, os.cpu_count() or 2))


def batch_pixels_on(devices: Iterable[torch.device]) -> int:
    """How many pixels are best made at once: on CPUs alone none, as they make four pictures more slowly than one by one."""
    return BATCH_PIXELS if any(device.type != "cpu" for device in devices) else 0


class Engine:
    """The VAEs of a server and the queue before them.

    Calls run in threads of the engine's own, so the engine may be made in any thread, and used in any event loop.

    Args:
        catalogue: the VAEs.
        limits: what requests may ask for.
        turn: held while the VAE works: what a host holds while it generates itself.
        batch_pixels: that are made at once, where several calls wait for the same; 0: each goes alone.
        batch_wait: seconds that a call waits at most for others that are on their way.
        watcher: is told what happens.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits | None = None,
        *,
        turn: AbstractContextManager[Any] | None = None,
        batch_pixels: int = BATCH_PIXELS,
        batch_wait: float = BATCH_WAIT,
        watcher: Watcher | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.limits = limits or Limits()
        self.admission = Admission(self.limits, len(catalogue.devices))
        self._batcher = Batcher(batch_pixels, batch_wait, self._others_come)
        around: AbstractContextManager[Any] = turn or nullcontext()
        self.watcher = watcher or Nobody()
        self._workers = [
            Worker(device, around, self.watcher, self.admission.measure, self._finish) for device in catalogue.devices
        ]
        self._threads: list[threading.Thread] = []
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="remote-vae-read")
        self._answerers = ThreadPoolExecutor(_THREADS, thread_name_prefix="remote-vae-answer")
        # Another, as who asks what there is does not wait for the calls.
        self._clerk = ThreadPoolExecutor(1, thread_name_prefix="remote-vae-info")
        self._lock = threading.Lock()
        self._since = time.time()
        self._made: Counter[Op] = Counter()
        # Requests within ``run``; of them those that are being read, and those that the VAE or what makes answers has.
        self._inside = self._reading = self._at_work = self._answering = 0
        self._no_room: dict[tuple[Entry, Device], float] = {}

    # --- what the app calls --------------------------------------------------------------------------------------------

    def known(
        self, name: str | None = None, family: str | None = None, fingerprint: str | None = None, fits: Fits | None = None
    ) -> Entry | None:
        """As ``pick``, and nothing is loaded: None where only that would tell. Raises what ``catalogue.pick`` raises."""
        entry = pick(self.catalogue.entries(), name, family, fingerprint, fits)
        return entry if entry.is_known else None

    async def pick(
        self, name: str | None = None, family: str | None = None, fingerprint: str | None = None, fits: Fits | None = None
    ) -> Entry:
        """The VAE that a request is for, whose family is known: see ``catalogue.pick``. It may be loaded first.

        Raises:
            NoModel: there is none, or it cannot be loaded; the message says why. And as there.
        """
        entries = list(self.catalogue.entries())
        failure: NoModel | None = None
        while True:
            try:
                entry = pick(entries, name, family, fingerprint, fits)
                if entry.is_known:
                    return entry
                # Who waits for it hears at /health that his call is not forgotten.
                with self._counted("_inside"):
                    await self._loaded(entry)
            except NoModel as error:
                # Whether it would have been the one is not known; another one may be.
                failure = error
                entries.remove(entry)
                if name is not None or not entries:
                    raise
            except InvalidRequest:
                if failure is None:
                    raise
                raise failure from None

    async def run(
        self,
        place: Place,
        entry: Entry,
        request: Callable[[bytearray], Request],
        body: bytearray,
        leaving: Coroutine[Any, Any, None],
    ) -> HttpResponse:
        """Answer a request when its turn comes, unless the client is gone by then.

        Args:
            place: of the request.
            entry: whose call it is.
            request: reads the body. Called in another thread.
            body: of the request.
            leaving: ends when the client hangs up.

        Raises:
            ClientGone: nobody wants the answer. InvalidRequest, Busy, NoModel, OutOfMemory, NotFinite. And what the VAE raises.
        """
        jobs: list[Job] = []
        watch = asyncio.ensure_future(leaving)
        watch.add_done_callback(lambda done: None if done.cancelled() else self._leave(place, jobs))
        with entry.held(), self._counted("_inside"):
            try:
                if not any(entry.is_at(device) for device in self.catalogue.devices):
                    await self._loaded(entry, watch)
                with self._counted("_reading"):
                    jobs.append(await asyncio.wrap_future(self._readers.submit(self._read, place, entry, request, body)))
                    # A client that left meanwhile is seen when its turn comes.
                    self._batcher.put(self._started(jobs[0]))
                return await asyncio.wrap_future(jobs[0].answer)
            except asyncio.CancelledError:
                if not place.is_gone():
                    self._leave(place, jobs)
                    raise
                raise ClientGone("the client hung up") from None
            finally:
                watch.cancel()

    def submit(self, place: Place, entry: Entry, request: Request) -> Future[HttpResponse]:
        """As ``run``, for a request that has been read, from any thread. The entry must be loaded."""
        job = self._started(self._job(place, entry, request))
        self._batcher.put(job)
        return job.answer

    def health(self) -> dict[str, Any]:
        """``GET /health``: whether a call is running, and how many wait behind it."""
        return {"status": "ok", "running": self._at_work > 0, "waiting": max(0, self._inside - self._at_work)}

    def problem(self) -> str:
        """Why no VAE can be had at the moment; "" where one can."""
        problems = [entry.problem for entry in self.catalogue.entries()]
        return problems[0] if problems and all(problems) else ""

    def status(self) -> dict[str, Any]:
        """What the page of ``GET /`` says of its work: of ``health``, since when (seconds of the epoch), and how many calls."""
        made = {f"{op}s": self._made[op] for op in ("decode", "encode")}
        return {**self.health(), "since": self._since, **made}

    async def ask_info(self, name: str | None = None) -> dict[str, Any]:
        """``info``, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._clerk, self.info, name)

    def info(self, name: str | None = None) -> dict[str, Any]:
        """``GET /info``: the VAEs, what may be asked of them, and of the first one once more what older clients read.

        Args:
            name: of the only one that is asked for.

        Raises:
            NoModel: the only one is not there. UnknownModel.
        """
        entries = self.catalogue.entries() if name is None else [pick(self.catalogue.entries(), name)]
        models = [{"name": entry.name, "loaded": entry.is_loaded, **entry.info()} for entry in entries]
        first = {key: value for key, value in models[0].items() if key not in ("name", "loaded")}
        return {**first, "limits": self.limits.published(), "models": models}

    def check_decode(self, entry: Entry, head: TensorHead, height: int | None, width: int | None, output: Output) -> Size:
        """Refuse latents by their head, before their bytes are read.

        Returns:
            What they make.

        Raises:
            InvalidRequest: more pixels, pictures or frames than the limits allow, latents for another VAE, or an answer that
                this machine cannot make. NoModel.
        """
        own = entry.require()
        batch, frames, rows, columns = decode_size(head.shape, height, width, own)
        self.limits.check(batch, frames, rows, columns)
        check_latent_frames(own, own.latent_frames(frames))
        check_cells(own, rows // own.downscale, columns // own.downscale)
        # Before the VAE has worked for minutes.
        if output is Output.MP4 and importlib.util.find_spec("av") is None:
            raise InvalidRequest("this server cannot make mp4: install the package av there, or ask for output_type pt")
        return Size(batch, frames, rows, columns)

    def check_encode(self, entry: Entry, head: TensorHead | None) -> Size | None:
        """Refuse pixels by their head; None for a picture's file, of which nothing is known yet. Raises as above."""
        own = entry.require()
        if head is None:
            return None
        batch, frames, rows, columns = encode_size(head.shape, own)
        self.limits.check(batch, frames, rows, columns)
        check_frames(own, frames)
        return Size(batch, frames, rows, columns)

    def close(self) -> None:
        """End the threads when what is in the queue is answered. Nothing may be asked of it any more."""
        self._batcher.close()
        for thread in self._threads:
            thread.join()
        for pool in (self._readers, self._answerers, self._clerk):
            pool.shutdown()

    # --- read ------------------------------------------------------------------------------------------------------------

    def _read(self, place: Place, entry: Entry, request: Callable[[bytearray], Request], body: bytearray) -> Job:
        """The body as a job. In a thread, as a large picture's file would hold up every other request."""
        if place.is_gone():
            raise ClientGone("the client hung up")
        began = time.monotonic()
        if place.op == "encode" and place.size is None:
            # A file of a few bytes may hold a large picture; what it becomes is levels and floating point values.
            self.admission.grow(place, _FILE_BYTES_A_PIXEL * min(math.prod(picture_size(body)), self.limits.max_pixels))
        job = self._job(place, entry, request(body))
        place.stages["decode_request"] = time.monotonic() - began
        return job

    def _job(self, place: Place, entry: Entry, request: Request) -> Job:
        worker = self._nearest(entry)
        vae = entry.vae(worker.device)
        with worker.mover.leaving():
            values = prepared(request, vae)
        shape = values.shape
        if isinstance(request, EncodeRequest):
            frames = shape[2] if len(shape) == VIDEO_DIMENSIONS else 1
            place.size = Size(shape[0], frames, *shape[-2:])
            place.pixels = place.size.pixels
        is_on_card = worker.device is not None and vae.device.type == "cuda"
        if is_on_card and self._batcher.bytes_ahead() + values.nbytes <= _AHEAD_BYTES:
            values = _ahead(worker.mover, values, vae.dtype)
        return Job(place, entry, request, vae.family, values, shape)

    def _nearest(self, entry: Entry) -> Worker:
        """One of those that have the VAE, the idle first."""
        having = [worker for worker in self._workers if entry.is_at(worker.device)]
        return min(having or self._workers, key=lambda worker: worker.busy)

    def _others_come(self) -> bool:
        return self._reading > 0 or self.admission.is_uploading()

    # --- wait ------------------------------------------------------------------------------------------------------------

    def _started(self, job: Job) -> Job:
        """With the first job there are threads: a host's engine may never have one."""
        with self._lock:
            if not self._threads:
                self._threads = [worker.start(self._take) for worker in self._workers]
        return job

    def _take(self, worker: Worker, rest: float | None) -> list[Job] | None:
        batch = self._batcher.take(partial(self._can, worker), rest)
        if batch is None:
            return None
        now = time.monotonic()
        with self._lock:
            self._at_work += len(batch)
        for job in batch:
            job.place.stages["queue"] = now - job.queued
            job.answer.add_done_callback(self._answered)
        return batch

    def _can(self, worker: Worker, job: Job) -> bool:
        """Whether a worker takes a job now. Where all that have its VAE are at work, the worker gets a copy of its own."""
        # What was made waits for those who make answers of it, and takes memory.
        if self._answering >= 2 * _THREADS:
            return False
        entry = job.entry
        if entry.is_at(worker.device):
            return True
        idle = any(not other.busy and entry.is_at(other.device) for other in self._workers)
        failed = self._no_room.get((entry, worker.device), -_NO_ROOM)
        if not idle and not self.catalogue.is_loading(entry) and time.monotonic() - failed >= _NO_ROOM:
            self.catalogue.load(entry, worker.device).add_done_callback(partial(self._copied, entry, worker))
        return False

    def _copied(self, entry: Entry, worker: Worker, done: Future[None]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._no_room[entry, worker.device] = time.monotonic()
        self._batcher.wake()

    async def _loaded(self, entry: Entry, leaving: asyncio.Future[None] | None = None) -> None:
        """Wait for a VAE that others may wait for as well: who goes does not end their load.

        Raises:
            ClientGone: ``leaving`` has ended before. NoModel.
        """
        loading = asyncio.wrap_future(self.catalogue.load(entry, self._emptiest()))
        # Where nobody waits any more, nobody asks why it failed.
        loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        waiting: set[asyncio.Future[None]] = {loading} if leaving is None else {loading, leaving}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            raise ClientGone("the client hung up while the VAE was loaded")
        loading.result()

    def _emptiest(self) -> Device:
        """The device with the fewest VAEs."""
        entries = self.catalogue.entries()
        return min(self.catalogue.devices, key=lambda device: sum(entry.is_at(device) for entry in entries))

    def _leave(self, place: Place, jobs: list[Job]) -> None:
        """The client hung up. A call that runs ends where it can; the place of one that waits is free at once."""
        place.leave()
        for job in jobs:
            if self._batcher.remove(job):
                job.fail(ClientGone("the client hung up"))

    # --- answer ----------------------------------------------------------------------------------------------------------

    def _finish(self, worker: Worker, job: Job, made: torch.Tensor, facts: Facts) -> None:
        with self._lock:
            self._answering += 1
        self._answerers.submit(self._answer, worker, job, made, facts)

    def _answer(self, worker: Worker, job: Job, made: torch.Tensor, facts: Facts) -> None:
        began = time.monotonic()
        place = job.place
        place.stages["predict"] = (place.ended or 0.0) - (place.begun or 0.0)
        try:
            response = answer(job.request, made, facts, worker.mover, place)
            place.stages["answer"] = time.monotonic() - began
            job.succeed(response)
        except Exception as error:
            job.fail(error)
        finally:
            with self._lock:
                self._answering -= 1
                self._made[place.op] += 1
            self._batcher.wake()

    def _answered(self, _: Future[HttpResponse]) -> None:
        with self._lock:
            self._at_work -= 1

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        with self._lock:
            setattr(self, name, getattr(self, name) + 1)
        try:
            yield
        finally:
            with self._lock:
                setattr(self, name, getattr(self, name) - 1)


def _ahead(mover: Mover, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` on their way to the device in ``dtype``.

    Where the calls at work have all of its memory they wait here as they were sent: they may have to be made in float32.
    """
    try:
        return mover.up(values.to(dtype))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        forget_frames(error)
        return values
