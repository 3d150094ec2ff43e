"""What a host brings to share its VAE: an adapter's answers, its queue lock, and a request from anywhere."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import find_family
from tests.hosts.a1111_standin import LdmVae


class Sharing:
    """A provider. ``vae``: an ldm-like VAE, or None while nothing is loaded; ``on``: the user's option."""

    def __init__(self, vae: LdmVae | None = None) -> None:
        self.on = True
        self.vae = vae
        # Called at each VAE call.
        self.watch: Callable[[], None] = lambda: None
        self.changes: dict[str, Any] = {}

    def shares(self) -> bool:
        return self.on

    def current(self) -> VaeAtWork | None:
        vae = self.vae
        if vae is None:
            return None

        def whole(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
            self.watch()
            made: torch.Tensor = module.decode(tensor) if op == "decode" else module.encode(tensor).parameters
            return made

        served = VaeAtWork(vae, find_family("sd1"), torch.device("cpu"), vae.dtype, whole, model="demo")
        return replace(served, **self.changes)

    def serving(self) -> AbstractContextManager[Any]:
        return torch.no_grad()


class QueueLock:
    """The host's lock. ``asked`` is set when somebody wants it."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> bool:
        self.asked.set()
        return self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@dataclass(frozen=True)
class Told:
    """The answer of an app."""

    status: int
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


def ask(app: Any, path: str, **given: Any) -> Told:
    """One request to the ASGI ``app``, in an event loop of its own. See ``asked``."""
    return asyncio.run(asked(app, path, **given))


async def asked(
    app: Any,
    path: str,
    *,
    client: str | None = "127.0.0.1",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    query: str = "",
) -> Told:
    """One request from wherever ``client`` is: a GET, or with a ``body`` a POST."""
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET" if body is None else "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "root_path": "", "query_string": query.encode(), "server": ("127.0.0.1", 7860),
        "client": None if client is None else (client, 50000),
        "headers": [
            (name.lower().encode(), value.encode("latin1"))
            for name, value in {"Host": "127.0.0.1:7860", **(headers or {})}.items()
        ],
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body or b"", "more_body": False}]
    done = asyncio.Event()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    done.set()
    return Told(sent[0]["status"], b"".join(message.get("body", b"") for message in sent))
