"""One endpoint: sends a request of the wire to it and gives back the checked answer."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
from urllib3.exceptions import HTTPError

from remote_vae import wire
from remote_vae.errors import (
    CallCancelled,
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    InvalidRequest,
    MalformedAnswer,
)
from remote_vae.remote.addresses import beside, shown, without_user
from remote_vae.remote.reasons import CONNECTION_LOST, reason_of
from remote_vae.remote.transport import Exchange, Sent, Transport, Urllib3Transport
from remote_vae.remote.waiting import POLL_SECONDS, A, Call, Cancelled, Deadlines, Expect, Redirected, Wait, by_proxy, sleep
from remote_vae.tokens import auth_headers
from remote_vae.version import __version__
from remote_vae.wire import Expected, HttpRequest
from remote_vae.wire.timing import read_timing

__all__ = ["POLL_SECONDS", "Deadlines", "EndpointClient", "Health", "Reply", "beside", "client_for", "never", "shown"]

# A word on whether the server works is worth so many seconds.
_HEALTH_SECONDS = 2.0
_HEALTH_LIMIT = 4096
_MAX_REDIRECTS = 3
_SERVER_ERROR = 500
_BAD_GATEWAY = 502


def never() -> bool:
    """Nobody cancels this call."""
    return False


DEFAULT_DEADLINES = Deadlines(connect=10.0, first_byte=120.0, total=300.0, patience=120.0)


@dataclass(frozen=True)
class Reply(Generic[A]):
    """A checked answer.

    Attributes:
        bytes_up, bytes_down: of the two bodies, as they went over the network.
        seconds_down: from the first byte of the answer's body to its last.
        stages: seconds that the server says the call took there, by stage: "queue", "predict" ...
    """

    answer: A
    bytes_up: int
    bytes_down: int
    seconds_down: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Health:
    """What ``GET /health`` says: whether a call is running or waiting there."""

    is_working: bool


class EndpointClient:
    """The endpoint at one URL, for one kind of call. Cheap to make: connections are the transport's.

    Args:
        url: of the endpoint; a user name and password in it are sent as HTTP's basic authentication, and shown nowhere.
        transport: what carries the requests.
        public: whether it is one of families.toml's, which do not get the user's REMOTE_VAE_TOKEN.
    """

    def __init__(self, url: str, transport: Transport, *, public: bool = False) -> None:
        self.url, self._basic = without_user(url)
        self._transport = transport
        self._public = public

    def decode(
        self, request: wire.DecodeRequest, deadlines: Deadlines = DEFAULT_DEADLINES, cancelled: Cancelled = never
    ) -> Reply[wire.DecodeAnswer]:
        """Decode ``request.latents`` remotely.

        Raises:
            RouteFailed: unreachable, too slow, cancelled, an error status, or an answer that is not believed.
        """
        return self._ask(request.to_http(), partial(wire.expect_decode, request), deadlines, cancelled)

    def encode(
        self, request: wire.EncodeRequest, deadlines: Deadlines = DEFAULT_DEADLINES, cancelled: Cancelled = never
    ) -> Reply[wire.EncodeAnswer]:
        """Encode ``request.image`` remotely. Raises as ``decode`` does."""
        return self._ask(request.to_http(), partial(wire.expect_encode, request), deadlines, cancelled)

    def info(self, deadlines: Deadlines = DEFAULT_DEADLINES, cancelled: Cancelled = never) -> wire.Info:
        """What the server says of itself; ``url`` is that of its /info. Raises as ``decode`` does."""
        return self._follow(self.url, None, wire.expect_info, deadlines, cancelled).answer

    def health(self, seconds: float = _HEALTH_SECONDS, cancelled: Cancelled = never) -> Health:
        """What the server says of its work, asked beside ``url``. Raises as ``decode`` does."""
        deadlines = Deadlines(seconds, seconds, seconds)
        return self._follow(beside(self.url, "health"), None, _expect_health, deadlines, cancelled).answer

    def _ask(self, request: HttpRequest, expect: Expect[A], deadlines: Deadlines, cancelled: Cancelled) -> Reply[A]:
        started = time.monotonic()
        try:
            return self._follow(self.url, request, expect, deadlines, cancelled)
        except (EndpointError, EndpointUnreachable) as error:
            pause = _pause(error)
            # The user was ready to wait so long for the answer's first byte.
            if pause is None or pause > deadlines.first_byte:
                raise
        sleep(pause, self.url, cancelled)
        rest = max(0.1, deadlines.total - (time.monotonic() - started))
        return self._follow(self.url, request, expect, replace(deadlines, total=rest), cancelled)

    def _follow(
        self, url: str, request: HttpRequest | None, expect: Expect[A], deadlines: Deadlines, cancelled: Cancelled
    ) -> Reply[A]:
        for _ in range(_MAX_REDIRECTS):
            try:
                return self._once(url, request, expect, deadlines, cancelled)
            except Redirected as redirected:
                url = _without(redirected.to, request)
        raise EndpointError(310, f"it redirects in a circle, lastly to {shown(url)}", shown(self.url))

    def _once(
        self, url: str, request: HttpRequest | None, expect: Expect[A], deadlines: Deadlines, cancelled: Cancelled
    ) -> Reply[A]:
        if cancelled():
            # Of a large batch most pictures are still to be asked for when the user presses.
            raise CallCancelled(f"interrupted before {shown(url)} was asked", reason="interrupted")
        exchange = Exchange(deadlines.connect, deadlines.total)
        sent = self._sent(url, request)
        call = Call(self._transport, sent, expect, exchange, shown(url))
        works = partial(self._works, min(_HEALTH_SECONDS, deadlines.first_byte)) if request is not None else None
        try:
            received = Wait(call, deadlines, cancelled, works).result()
        except (HTTPError, OSError, http.client.HTTPException, ValueError) as error:
            raise _unreachable(self._transport, url, error) from error
        try:
            answer = received.expected.finish(received.body)
        except MalformedAnswer as error:
            raise error.by(shown(url)) from None
        stages = read_timing(received.named)
        return Reply(answer, len(sent.body or b""), received.body.nbytes, received.seconds, stages)

    def _sent(self, url: str, request: HttpRequest | None) -> Sent:
        # The token is read anew each time: one that is set after the start of the UI counts.
        headers = {"User-Agent": f"remote-vae/{__version__}", **(request.headers if request else {})}
        headers |= auth_headers(url, public=self._public) or self._basic
        if any("\n" in value or "\r" in value for value in headers.values()):
            raise InvalidRequest(f"{shown(url)}: a token or a header has more than one line")
        if urlsplit(url).scheme not in ("http", "https"):
            raise InvalidRequest(f"{shown(url)}: an endpoint's address begins with http:// or https://")
        target, _, query = (request.url(url) if request else url).partition("#")[0].partition("?")
        return Sent("POST" if request else "GET", target, query, headers, memoryview(request.body) if request else None)

    def _works(self, seconds: float, cancelled: Cancelled) -> bool | None:
        """Whether the server says that it works; None: it says nothing."""
        try:
            return self.health(seconds, cancelled).is_working
        except (EndpointError, MalformedAnswer):
            return None
        except (EndpointUnreachable, DeadlineExceeded):
            return False


_transport = Urllib3Transport()


def client_for(url: str, *, public: bool = False) -> EndpointClient:
    """A client for the exact ``url``, over the process's connections."""
    return EndpointClient(url, _transport, public=public)


def _pause(error: EndpointError | EndpointUnreachable) -> float | None:
    """Seconds after which the same call is worth another try; None: it would bring nothing else.

    Where a server died under the call, another at the same address may do it, or the same one when it is back. A call changes
    nothing, so that it is made anew at once. What stands before a cluster then answers itself, and not as a VAE server does.
    """
    if isinstance(error, EndpointError):
        died = error.status == _BAD_GATEWAY or (error.status == _SERVER_ERROR and not error.is_of_the_server)
        return 0.0 if died else error.retry_after
    return 0.0 if error.reason == CONNECTION_LOST else None


def _without(url: str, request: HttpRequest | None) -> str:
    """``url`` without what ``request`` puts into the query: most servers redirect with it, and a shape twice is none."""
    parts = urlsplit(url)
    if request is None or not parts.query:
        return url
    own = {key for key, _ in request.query}
    rest = [(key, value) for key, value in parse_qsl(parts.query, keep_blank_values=True) if key not in own]
    return urlunsplit(parts._replace(query=urlencode(rest)))


def _expect_health(headers: Mapping[str, str]) -> Expected[Health]:
    del headers
    return Expected(_health, _HEALTH_LIMIT)


def _health(body: np.ndarray) -> Health:
    try:
        entries = json.loads(body.tobytes())
        return Health(entries["running"] is True or int(entries["waiting"]) > 0)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise MalformedAnswer("not what /health of a Remote VAE server says") from None


def _unreachable(transport: Transport, url: str, error: Exception) -> EndpointUnreachable:
    reason, more = reason_of(error, url)
    by = by_proxy(transport, url)
    if by:
        reason, more = f"by a proxy: {reason}", f"{more}; it goes through{by}"
    return EndpointUnreachable(f"{shown(url)}: {reason}{more}", reason=reason)
