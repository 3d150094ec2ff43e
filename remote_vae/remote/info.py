"""Asks endpoints which VAE they have, and remembers the answers for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

from remote_vae.errors import EndpointError, MalformedAnswer
from remote_vae.remote.client import Deadlines, client_for
from remote_vae.wire import Info

# Seconds; after that, a server that was started anew with another VAE is noticed.
KEPT_SECONDS = 60.0


class Infos:
    """What endpoints say of themselves. May be used from many threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Info]] = {}

    def of(self, url: str, deadlines: Deadlines, cancelled: Callable[[], bool]) -> Info:
        """What the endpoint at ``url`` says; an empty ``Info`` where it answers that it has nothing to say.

        Raises:
            EndpointUnreachable, DeadlineExceeded, CallCancelled: it did not answer; a call would not be answered either.
        """
        where = info_url(url)
        with self._lock:
            since, info = self._known.get(where, (-KEPT_SECONDS, Info()))
            if where in self._known and self._clock() - since < KEPT_SECONDS:
                return info
        try:
            info = client_for(where).info(deadlines, cancelled)
        except EndpointError as error:
            # A server that is busy, or one that has not been given its token yet, may say more next time.
            if error.status >= 500 or error.status == 401:
                return Info()
            info = Info()
        except MalformedAnswer:
            info = Info()
        with self._lock:
            self._known[where] = self._clock(), info
        return info

    def forget(self, url: str) -> None:
        """The endpoint at ``url`` failed; it may come back as another one."""
        with self._lock:
            self._known.pop(info_url(url), None)


def info_url(url: str) -> str:
    """Where the endpoint at ``url`` says who it is: beside /decode or /encode, else below ``url``. The query stays."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    folder, _, name = path.rpartition("/")
    base = folder if name in ("decode", "encode") else path
    return urlunsplit(parts._replace(path=f"{base}/info"))
