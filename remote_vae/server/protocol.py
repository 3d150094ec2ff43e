"""Connections of the server: how many, and how long one may keep it waiting. uvicorn's own HTTP protocol, with bounds."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from remote_vae.wire import error_response

log = logging.getLogger("remote_vae")


class BoundedProtocol(H11Protocol):  # type: ignore[misc]  # of a module whose types are not read
    """One connection. Its bounds are those of the class.

    A connection that waits for nothing (silent, or kept open after its answer) is closed where a new one needs the place.

    Attributes:
        max_connections: at once.
        head_seconds: until the head of a request is here, from the connection or from its first byte on.
        stall_seconds: until a client has read on.
        goodbye_seconds: until an idle one has closed at the server's end.
    """

    max_connections = 512
    head_seconds = 10.0
    stall_seconds = 20.0
    goodbye_seconds = 0.5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self.active = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a place, if need be that of the connection which has waited for nothing for longest."""
        others: list[BoundedProtocol] = list(self.connections)
        full = len(others) >= self.max_connections
        idle = [each for each in others if not each.is_at_work]
        super().connection_made(transport)
        if full and idle:
            min(idle, key=lambda each: each.active).drop()
        elif full:
            log.warning("more than %d connections at once: the newest is refused", self.max_connections)
            self._refuse(503, "too many connections; try again later")
            return
        self._start(self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, whoever wanted it."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Whatever comes, until the head is complete it must be so in time."""
        self.active = self.loop.time()
        if not self.is_at_work and self._deadline is None:
            self._start(self.head_seconds)
        super().data_received(data)
        if self.is_at_work and not self.flow.write_paused:
            self._stop()

    def pause_writing(self) -> None:
        """The client does not read: from here on it has to."""
        super().pause_writing()
        self._stop()
        self._start(self.stall_seconds)

    def resume_writing(self) -> None:
        """It has read."""
        self._stop()
        super().resume_writing()
        if not self.is_at_work and self.conn.trailing_data[0]:
            self._start(self.head_seconds)

    def send_400_response(self, msg: str) -> None:
        """As JSON, like every error; nothing, where an answer is already under way."""
        log.debug("%s: %s", self.client, msg)
        self._refuse(400, msg)

    def timeout_keep_alive_handler(self) -> None:
        """The end of a connection that was kept open; at once, where its last answer was never read."""
        if self.transport.get_write_buffer_size():
            self.drop()
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """The server goes. Who speaks https is not waited for long to say goodbye as well."""
        super().shutdown()
        if not self.is_at_work:
            self.loop.call_later(self.goodbye_seconds, self.transport.abort)

    @property
    def is_at_work(self) -> bool:
        """Whether a request has come and its answer has not been written."""
        return self.cycle is not None and not self.cycle.response_complete

    def _start(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._too_late)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self.flow.write_paused:
            log.debug("%s does not read its answer: closed", self.client)
            self.drop()
        elif self.conn.trailing_data[0]:
            self._refuse(408, "the head of the request did not come in time")
        else:
            log.debug("%s asked for nothing: closed", self.client)
            self.drop()

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error_response(status, message)
            head = [*answer.headers.items(), ("Content-Length", str(len(answer.body))), ("Connection", "close")]
            events = (h11.Response(status_code=status, headers=head), h11.Data(data=bytes(answer.body)), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def drop(self) -> None:
        """The end at once. What it has not read is thrown away; ``close`` would wait for it to be read."""
        self.transport.abort()
