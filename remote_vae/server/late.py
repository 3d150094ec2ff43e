"""A sign of life while a call takes long, for clients that take it: see ``wire.late``."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from remote_vae.server.heads import Send
from remote_vae.wire.late import DOT, LATE_AFTER, LATE_EVERY, LATE_TYPE

T = TypeVar("T")

# nginx hands pieces on as they come where it is told so.
_HEADERS = {"content-type": LATE_TYPE, "cache-control": "no-store", "x-accel-buffering": "no"}


class Late:
    """The answer to one request, which may begin before it is made.

    Args:
        send: of the ASGI server.
        is_wanted: whether the client takes it.

    Attributes:
        has_begun: then what follows is ``late_head`` and the body, and no head of its own.
        after, every: seconds until it begins, and between two signs.
    """

    after = LATE_AFTER
    every = LATE_EVERY

    def __init__(self, send: Send, *, is_wanted: bool) -> None:
        self.has_begun = False
        self._send = send
        self._is_wanted = is_wanted

    async def until(self, job: Coroutine[Any, Any, T]) -> T:
        """What comes of ``job``; meanwhile the client hears that it is being made."""
        if not self._is_wanted:
            return await job
        task = asyncio.ensure_future(job)
        try:
            seconds = self.after
            while not (await asyncio.wait({task}, timeout=seconds))[0]:
                await self._sign()
                seconds = self.every
            return task.result()
        finally:
            task.cancel()

    async def _sign(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": DOT, "more_body": True})
