"""Who is let in: what a request may ask for, and the place and the bytes that it takes before its body is read.

Works in any ASGI server, so that it also bounds the VAE that a host shares under its own. What concerns connections without a
request is in ``protocol``.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from remote_vae.errors import InvalidRequest, RemoteVaeError
from remote_vae.vae.at_work import Op

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# An upload makes progress while so many bytes, or the rest of it, come within the time.
_PROGRESS = 16 * 1024
# Before the first call has been measured, so many may wait.
_UNMEASURED = 8
# A body that has been coming for longer is not about to be here (seconds).
_MOMENT = 0.05


class Busy(RemoteVaeError):
    """No place, or a longer wait than is worth it. ``retry_after``: when there is room again (whole seconds)."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = max(1, math.ceil(retry_after))


class TooLarge(RemoteVaeError):
    """The body is longer than this request's may be."""


class Stalled(RemoteVaeError):
    """The body stopped coming."""


class ClientGone(RemoteVaeError):
    """The client hung up."""


@dataclass(frozen=True)
class Limits:
    """What requests may ask for, and what all of them together may take.

    Attributes:
        max_pixels: of one picture, or one frame.
        max_batch: pictures, or videos, in a request.
        max_frames: of one video, in pixels and not in latents.
        max_video_pixels: of all frames of a request. The default takes 129 frames of 720p and 257 of 480p; as float32 they are
            1.6 GB, in 8 bits 0.4 GB.
        max_waiting: requests at once, in upload, in the queue or at work.
        max_wait: seconds that a call may be expected to wait; clients look elsewhere after 20.
        max_bytes: bodies and answers of all requests together. A request that is alone is always let in.
        stall: seconds in which the body or the answer of a request must come further.
        patience: seconds after which a body that does not come gives up its place where another request wants it.
    """

    max_pixels: int = 4096 * 4096
    max_batch: int = 32
    max_frames: int = 1025
    max_video_pixels: int = 1 << 27
    max_waiting: int = 64
    max_wait: float = 15.0
    max_bytes: int = 1 << 30
    stall: float = 20.0
    patience: float = 2.0

    @property
    def max_total_pixels(self) -> int:
        """Pixels of one request, all its pictures together: bounds the memory of its body and its answer."""
        return 4 * self.max_pixels

    def check(self, batch: int, frames: int, height: int, width: int) -> None:
        """Refuse what is too much for one request.

        Args:
            batch: pictures, or videos.
            frames: of each, in pixels.
            height, width: in pixels.

        Raises:
            InvalidRequest: it says what was too much.
        """
        if height * width > self.max_pixels:
            kind = "frame" if frames > 1 else "picture"
            raise InvalidRequest(f"{width} x {height} pixels; this server takes at most {self.max_pixels} a {kind}")
        if batch > self.max_batch:
            kind = "videos" if frames > 1 else "pictures"
            raise InvalidRequest(f"{batch} {kind}; this server takes at most {self.max_batch} at once")
        if frames > self.max_frames:
            raise InvalidRequest(f"{frames} frames; this server takes at most {self.max_frames}")
        total, most = batch * frames * height * width, self.max_video_pixels if frames > 1 else self.max_total_pixels
        if total > most:
            size = f"{frames} frames of {width} x {height} are " if frames > 1 else ""
            raise InvalidRequest(f"{size}{total} pixels in all; this server takes at most {most} in one request")

    def published(self) -> dict[str, int]:
        """What ``GET /info`` says of them."""
        names = ("max_pixels", "max_batch", "max_frames", "max_waiting", "max_total_pixels", "max_video_pixels")
        return {name: getattr(self, name) for name in names}


class Size(NamedTuple):
    """What a call makes or takes: so many pictures, or videos of so many frames, in pixels."""

    batch: int
    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.batch * self.frames * self.height * self.width

    def __str__(self) -> str:
        several = f"{self.batch} x " if self.batch > 1 else ""
        frames = f"{self.frames} frames of " if self.frames > 1 else ""
        return f"{several}{frames}{self.width}x{self.height}"


@dataclass(eq=False)
class Place:
    """What one request holds from its head to the end of its answer. Times are those of ``time.monotonic``.

    Attributes:
        pixels: that the VAE has to make or read.
        nbytes: of its body and its answer.
        size: of what it makes or takes; None until that is known.
        entered: when it was taken.
        moved: when the body last came further; None once it is here.
        begun, ended: of the VAE's work.
        dropped: set when another request takes the place of this upload.
        model: name of the VAE that it is for.
        stages: seconds by stage: "read", "decode_request", "queue", "predict", "answer", "send".
        batch, batch_pixels: pictures, or videos, that were made at once with its own, and their pixels; 0 before.
    """

    op: Op
    pixels: int
    nbytes: int
    size: Size | None = None
    entered: float = field(default_factory=time.monotonic)
    moved: float | None = field(default_factory=time.monotonic)
    arrived: float = 0.0
    begun: float | None = None
    ended: float | None = None
    dropped: asyncio.Event = field(default_factory=asyncio.Event)
    model: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    batch: int = 0
    batch_pixels: int = 0
    _gone: threading.Event = field(default_factory=threading.Event)

    def is_gone(self) -> bool:
        """Whether the client hung up."""
        return self._gone.is_set()

    def leave(self) -> None:
        """The client hung up."""
        self._gone.set()

    def is_stalled(self, patience: float) -> bool:
        """Whether its body has not come any further for so many seconds."""
        return self.moved is not None and time.monotonic() - self.moved > patience

    def times(self) -> tuple[float, float]:
        """Seconds that it waited, and that the VAE took; 0 for what has not happened."""
        begun = self.begun if self.begun is not None else (self.ended or self.arrived)
        return begun - self.arrived, (self.ended or begun) - begun


@dataclass(frozen=True)
class Closed:
    """Why nobody is let in. ``status``: what ``GET /health`` calls it; ``retry_after``: seconds."""

    status: str
    why: str
    retry_after: float = 5.0


class Admission:
    """The places of a server. For many threads.

    Args:
        limits: how many there are.
        workers: how many calls, or batches of them, are made side by side.

    Attributes:
        closed: why nobody is let in, while that is so.
    """

    def __init__(self, limits: Limits, workers: int = 1) -> None:
        self.limits = limits
        self.closed: Closed | None = None
        self._workers = workers
        self._lock = threading.RLock()
        self._places: set[Place] = set()
        # Seconds and pixels of the calls of late, by what they were: their quotient is what a pixel takes.
        self._measured: dict[tuple[str, Op], tuple[float, float]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nobody is in upload, waits, is worked for or reads an answer."""
        return not self._places

    def check(self) -> None:
        """Raises Busy: nobody is let in."""
        if self.closed is not None:
            raise Busy(f"{self.closed.why}; try again later", self.closed.retry_after)

    def enter(self, op: Op, pixels: int, nbytes: int, model: str = "") -> Place:
        """A place for a request whose body and answer have ``nbytes``; to be given back with ``leave``.

        Uploads that have stopped give up theirs for it.

        Raises:
            Busy: there is none, or the call would wait for longer than ``max_wait``; or nobody is let in.
        """
        self.check()
        with self._lock:
            wait = self.expected_wait()
            if wait > self.limits.max_wait:
                # By then there is room for as much again.
                raise Busy(f"calls for about {wait:.0f} s are waiting here; try again later", wait / 2)
            stalled = sorted(self._stalled(), key=lambda place: place.moved or 0.0)
            if not self._has_room(nbytes, without=stalled):
                raise Busy(f"{len(self._places)} requests are being worked on here; try again later", wait / 2)
            for upload in stalled:
                if self._has_room(nbytes):
                    break
                upload.dropped.set()
                self.leave(upload)
            place = Place(op, pixels, nbytes, model=model)
            self._places.add(place)
            return place

    def grow(self, place: Place, nbytes: int) -> None:
        """It takes so many bytes more than was known. Raises Busy: there is no room for them beside the others."""
        with self._lock:
            others = sum(each.nbytes for each in self._places if each is not place)
            if others and others + place.nbytes + nbytes > self.limits.max_bytes:
                raise Busy("what this request unpacks to has no room here now; try again later", self.expected_wait() / 2)
            place.nbytes += nbytes

    def leave(self, place: Place) -> None:
        """Give the place back; twice does no harm."""
        with self._lock:
            self._places.discard(place)

    def measure(self, places: Sequence[Place]) -> None:
        """What calls that were made at once took is what the next ones are expected to take."""
        first = places[0]
        if first.begun is not None and first.ended is not None:
            with self._lock:
                seconds, pixels = self._measured.get((first.model, first.op), (0.0, 0))
                # Each weighs half of the one after it: the first, which also loads the GPU's kernels, is soon forgotten.
                taken = sum(place.pixels for place in places)
                self._measured[first.model, first.op] = seconds / 2 + first.ended - first.begun, pixels / 2 + taken

    def expected_wait(self) -> float:
        """Seconds of work that lie before a call that comes now. An upload that takes its time is not before it."""
        with self._lock:
            since = time.monotonic() - self.limits.patience
            at_hand = (place for place in self._places if place.moved is None or place.entered > since)
            return sum(self._remaining(place) for place in at_hand if place.ended is None) / self._workers

    def is_uploading(self) -> bool:
        """Whether a body is on its way that should be here at any moment."""
        with self._lock:
            since = time.monotonic() - _MOMENT
            return any(place.moved is not None and place.entered > since for place in self._places)

    def _stalled(self) -> set[Place]:
        return {place for place in self._places if place.is_stalled(self.limits.patience)}

    def _remaining(self, place: Place) -> float:
        seconds, pixels = self._measured.get((place.model, place.op), (0.0, 0.0))
        whole = place.pixels * seconds / pixels if pixels else self.limits.max_wait / _UNMEASURED
        if place.begun is None:
            return whole
        # Those of a batch come to their end together.
        together = max(1.0, place.batch_pixels / max(1, place.pixels))
        return max(0.0, whole - (time.monotonic() - place.begun) / together)

    def _has_room(self, nbytes: int, without: Collection[Place] = ()) -> bool:
        places = self._places.difference(without)
        taken = sum(place.nbytes for place in places)
        fits = not places or taken + nbytes <= self.limits.max_bytes
        return fits and sum(place.ended is None for place in places) < self.limits.max_waiting


async def read_body(receive: Receive, place: Place, limit: int, stall: float) -> bytearray:
    """The body of the request that holds ``place``.

    Args:
        receive: of the ASGI server.
        place: is stalled, and may be dropped, while the body does not come.
        limit: bytes that it may have at most.
        stall: seconds in which it must come further.

    Raises:
        TooLarge: it is longer than ``limit``. Stalled: it does not come. ClientGone: the client hung up.
    """
    body = bytearray()
    mark = 0
    dropped = asyncio.ensure_future(place.dropped.wait())
    try:
        while True:
            message = await _next(receive, dropped, (place.moved or 0.0) + stall)
            if message["type"] == "http.disconnect":
                raise ClientGone(f"the client hung up after {len(body)} bytes of the body")
            body += message.get("body", b"")
            if len(body) > limit:
                raise TooLarge(f"the body is longer than the {limit} bytes that belong to this request")
            if not message.get("more_body", False):
                place.moved = None
                place.arrived = time.monotonic()
                place.stages["read"] = place.arrived - place.entered
                return body
            if len(body) - mark >= _PROGRESS:
                mark, place.moved = len(body), time.monotonic()
    finally:
        dropped.cancel()


async def _next(receive: Receive, dropped: asyncio.Future[Any], deadline: float) -> MutableMapping[str, Any]:
    coming = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({coming, dropped}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise Stalled("the body did not come any further, and others wait" if dropped.done() else "the body did not come")
        return coming.result()
    finally:
        coming.cancel()
