"""One endpoint: sends a request of the wire to it and gives back the checked answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit, urlunsplit

from remote_vae import wire
from remote_vae.remote.http import Deadlines, HttpClient, Reply
from remote_vae.tokens import auth_headers

DEFAULT_DEADLINES = Deadlines(connect=10.0, first_byte=120.0, total=300.0)


def never() -> bool:
    """Nobody cancels this call."""
    return False


class EndpointClient:
    """The endpoint at one URL, for one kind of call. Cheap to make: connections are shared by origin (see ``client_for``)."""

    def __init__(self, url: str, http: HttpClient, *, public: bool = False) -> None:
        self.url = url
        self._http = http
        self._public = public

    def decode(
        self,
        request: wire.DecodeRequest,
        deadlines: Deadlines = DEFAULT_DEADLINES,
        cancelled: Callable[[], bool] = never,
    ) -> Reply[wire.DecodeAnswer]:
        """Decode ``request.latents`` remotely.

        Raises:
            RouteFailed: unreachable, too slow, cancelled, an error status, or an answer that is not believed.
        """
        return self._http.post(
            self.url, request.to_http(), self._headers(), partial(wire.expect_decode, request), deadlines, cancelled
        )

    def encode(
        self,
        request: wire.EncodeRequest,
        deadlines: Deadlines = DEFAULT_DEADLINES,
        cancelled: Callable[[], bool] = never,
    ) -> Reply[wire.EncodeAnswer]:
        """Encode ``request.image`` remotely. Raises as ``decode`` does."""
        return self._http.post(
            self.url, request.to_http(), self._headers(), partial(wire.expect_encode, request), deadlines, cancelled
        )

    def info(self, deadlines: Deadlines = DEFAULT_DEADLINES, cancelled: Callable[[], bool] = never) -> wire.Info:
        """What the server says of itself. Raises as ``decode`` does."""
        return self._http.get(self.url, self._headers(), wire.expect_info, deadlines, cancelled).answer

    def _headers(self) -> dict[str, str]:
        # Read anew each time: a token set after the start of the UI counts.
        return auth_headers(self.url, public=self._public)


def shown(url: str) -> str:
    """``url`` for logs and records, without its query, which may hold a key."""
    return urlunsplit(urlsplit(url)._replace(query="", fragment=""))


class Connections:
    """The process's open connections, one pool for each origin, so that every caller finds them warm."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_origin: dict[tuple[str, str], HttpClient] = {}

    def to(self, url: str) -> HttpClient:
        parts = urlsplit(url)
        origin = parts.scheme, parts.netloc
        with self._lock:
            client = self._by_origin.get(origin)
            if client is None:
                client = self._by_origin[origin] = HttpClient(url)
            return client


_connections = Connections()


def client_for(url: str, *, public: bool = False) -> EndpointClient:
    """A client for the exact ``url``; ``public`` endpoints do not get the user's REMOTE_VAE_TOKEN."""
    return EndpointClient(url, _connections.to(url), public=public)
