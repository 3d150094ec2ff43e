"""Which endpoint a call goes to, whether it may be asked now, and what is known of it from before.

After a failure an endpoint is left alone for a pause; then one call may try it, and the others wait for what that finds. The
pause ends early when ``GET /health`` answers again, or when the user has changed the settings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from remote_vae.errors import DeadlineExceeded, EndpointError, EndpointUnreachable, NotOffered, RouteFailed
from remote_vae.remote.addresses import shown
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import Family

# Where ``remote-vae serve`` listens; tried where the user gave no port.
DEFAULT_PORT = 7870
# Seconds for which an endpoint is left alone at most, however long it wants to be.
LONGEST_PAUSE = 600.0
# A smaller picture takes no less time: what it takes is the way there, or the start of the server.
_SMALLEST = 1024 * 1024
# Bytes of an answer by which the network is measured.
_MEASURED = 128 * 1024


class InPause(NotOffered):
    """The endpoint failed a while ago, and is not asked."""


def endpoint_for(op: Op, family: Family, settings: Settings) -> tuple[str, bool]:
    """The URL for a call, and whether it is a public endpoint; "" where there is none.

    To ``endpoint`` /decode or /encode is added; the other two options are exact URLs.
    """
    exact = settings.decode_endpoint if op == "decode" else settings.encode_endpoint
    if exact:
        return exact, False
    if settings.endpoint:
        parts = urlsplit(settings.endpoint)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{op}")), False
    if settings.public_endpoints and family.is_known:
        return family.public_endpoint(op), True
    return "", False


@dataclass(frozen=True)
class _Failure:
    """The last that was heard of an endpoint.

    Attributes:
        at: when, by the clock.
        why: in a few words.
        pause: seconds for which it wants to be left alone; None: as the settings say.
        settings: what was set then.
        is_silent: whether it could not be reached at all, so that any answer of /health is news.
    """

    at: float
    why: str
    pause: float | None
    settings: object
    is_silent: bool


class Breaker:
    """Whether one endpoint may be asked now. May be used from many threads; ``turn`` is the call that asks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failure: _Failure | None = None
        self._tried_by: object = None

    def enter(self, turn: object, pause: float, settings: object = None) -> InPause | None:
        """None: go ahead, and report by ``succeeded``, ``failed`` or ``left``. Otherwise why not; ``pause`` in seconds."""
        with self._lock:
            failure = self._failure
            if failure is None or failure.settings != settings:
                self._failure = self._tried_by = None
                return None
            age = self._clock() - failure.at
            why = f"{failure.why}, {age:.0f} s ago"
            rest = (pause if failure.pause is None else failure.pause) - age
            if rest > 0:
                return InPause(f"{why}; asked again in {rest:.0f} s", reason=why)
            if self._tried_by is not None and pause > 0:
                return InPause(f"{why}; another call is trying it", reason=why)
            self._tried_by = turn
            return None

    def succeeded(self) -> None:
        """The endpoint answers."""
        with self._lock:
            self._failure = self._tried_by = None

    def failed(
        self, turn: object, why: str, settings: object = None, *, pause: float | None = None, is_silent: bool = False
    ) -> None:
        """The call was not answered."""
        with self._lock:
            self._failure = _Failure(self._clock(), why, pause, settings, is_silent)
        self.left(turn)

    def left(self, turn: object) -> None:
        """The call says nothing about the endpoint: cancelled by the user, or a request it was right to refuse."""
        with self._lock:
            # Only who tries it ends the trial.
            if self._tried_by is turn:
                self._tried_by = None

    @property
    def is_silent(self) -> bool:
        failure = self._failure
        return failure is not None and failure.is_silent


class Turn:
    """One call's leave to ask an endpoint, until it says what came of it.

    Behind an endpoint's breaker stands that of its machine: who does not answer at one path is not waited for at another.
    """

    def __init__(self, machine: Breaker, own: Breaker, settings: Settings) -> None:
        self._machine = machine
        self._own = own
        self._cooldown = settings.cooldown
        # A pause is over when any of these is changed.
        addresses = settings.endpoint, settings.decode_endpoint, settings.encode_endpoint, settings.public_endpoints
        times = settings.connect_timeout, settings.first_byte_timeout, settings.total_timeout, settings.cooldown
        self._settings = addresses, times

    def enter(self, is_up: Callable[[], bool]) -> None:
        """``is_up`` asks whether an endpoint that could not be reached can be now. Raises InPause."""
        refusal = self._refusal()
        if refusal is not None and (self._machine.is_silent or self._own.is_silent) and is_up():
            self.succeeded()
            refusal = self._refusal()
        if refusal is not None:
            raise refusal

    def _refusal(self) -> InPause | None:
        refusal = self._machine.enter(self, self._cooldown, self._settings)
        if refusal is None:
            refusal = self._own.enter(self, self._cooldown, self._settings)
            if refusal is not None:
                self._machine.left(self)
        return refusal

    def succeeded(self) -> None:
        """The call was answered."""
        self._machine.succeeded()
        self._own.succeeded()

    def failed(self, error: RouteFailed) -> None:
        """The call failed by ``error``."""
        if isinstance(error, (DeadlineExceeded, EndpointUnreachable)):
            silent = isinstance(error, EndpointUnreachable) or error.reason.startswith("no connection")
            self._machine.failed(self, error.reason, self._settings, is_silent=silent)
            self._own.left(self)
            return
        pause = error.retry_after if isinstance(error, EndpointError) else None
        if pause is not None:
            pause = min(pause, LONGEST_PAUSE)
        starting = isinstance(error, EndpointError) and error.status in (502, 503, 504) and pause is None
        self._machine.succeeded()
        self._own.failed(self, error.reason, self._settings, pause=pause, is_silent=starting)

    def left(self) -> None:
        """The call says nothing about the endpoint."""
        self._machine.left(self)
        self._own.left(self)


class Endpoints:
    """What a process knows of its endpoints. May be used from many threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._breakers: dict[str, Breaker] = {}
        self._pace: dict[str, float] = {}
        # Bytes and seconds of the answers of late, by machine.
        self._came: dict[str, tuple[int, float]] = {}
        self._found: dict[str, str] = {}

    def turn(self, url: str, settings: Settings) -> Turn:
        """For a call to ``url``; it is still to be entered."""
        with self._lock:
            machine = self._breakers.setdefault(_machine(url), Breaker(self._clock))
            return Turn(machine, self._breakers.setdefault(url, Breaker(self._clock)), settings)

    def forget(self, url: str) -> None:
        """The failures of ``url`` and of its machine count no more."""
        with self._lock:
            for each in (_machine(url), url):
                self._breakers.pop(each, None)

    def took(self, url: str, pixels: int, seconds: float) -> None:
        """An answer of so many pixels came after ``seconds``."""
        with self._lock:
            # One quick answer is no promise that the next one will be.
            self._pace[url] = max(seconds / max(_SMALLEST, pixels), 0.5 * self._pace.get(url, 0.0))

    def came(self, url: str, nbytes: int, seconds: float) -> None:
        """The body of an answer came in so long; 0: nobody knows. Small ones come in one piece, and say nothing."""
        if nbytes >= _MEASURED and seconds > 0:
            with self._lock:
                before, took = self._came.get(_machine(url), (0, 0.0))
                # Each weighs half of the one after it.
                self._came[_machine(url)] = before // 2 + nbytes, took / 2 + seconds

    def pace(self, url: str) -> float | None:
        """Bytes a second that came from the machine of ``url`` of late; None: nothing was measured."""
        with self._lock:
            nbytes, seconds = self._came.get(_machine(url), (0, 0.0))
        return nbytes / seconds if nbytes else None

    def expected(self, url: str, pixels: int) -> float:
        """Seconds that an answer of ``pixels`` takes by what was seen before; 0 where nothing was."""
        with self._lock:
            return self._pace.get(url, 0.0) * max(_SMALLEST, pixels)

    def addresses(self, url: str) -> list[str]:
        """``url``, and where it names no port that of ``remote-vae serve`` as well; first what has answered before."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.port is not None or parts.hostname is None:
            return [url]
        both = [url, urlunsplit(parts._replace(netloc=f"{parts.netloc}:{DEFAULT_PORT}"))]
        with self._lock:
            found = self._found.get(parts.netloc)
        return sorted(both, key=lambda each: _machine(each) != found) if found else both

    def found(self, url: str, address: str) -> None:
        """``address`` of ``addresses(url)`` answered."""
        with self._lock:
            self._found[urlsplit(url).netloc] = _machine(address)


def _machine(url: str) -> str:
    return urlunsplit((*urlsplit(url)[:2], "", "", ""))


def in_pause(url: str, refusal: InPause) -> InPause:
    """``refusal`` with the name of the endpoint in its message."""
    return InPause(f"{shown(url)}: {refusal}", reason=refusal.reason)
