"""Requests to a server: as clients make them, and byte by byte."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import requests
import torch

from remote_vae.server.models import LoadedVae
from tests.conftest import ServerThread

TIMEOUT = 30


def body(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def head(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[-1]}


def decode(server: ServerThread, latents: torch.Tensor, **params: Any) -> requests.Response:
    """One decode to raw values."""
    asked = {**head(latents), "output_type": "pt", **params}
    return requests.post(f"{server.url}/decode", data=body(latents), params=asked, timeout=TIMEOUT)


def tensor_of(answer: requests.Response) -> torch.Tensor:
    assert answer.status_code == 200, answer.text
    dtype = getattr(torch, answer.headers["dtype"])
    return torch.frombuffer(bytearray(answer.content), dtype=dtype).reshape(json.loads(answer.headers["shape"]))


def locally(loaded: LoadedVae, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.vae.decode(latents.to(loaded.dtype), return_dict=False)[0]


def wait_until(what: Callable[[], bool]) -> None:
    """Until ``what`` is so; half a minute is far beyond what any of it takes."""
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Raw:
    """A connection that sends what it is told to."""

    def __init__(self, server: ServerThread, *, receive_bytes: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(("127.0.0.1", server.port))

    def send(self, data: bytes) -> Raw:
        self.socket.sendall(data)
        return self

    def post(self, path: str, shape: tuple[int, ...], length: int, sent: int | None = None, headers: str = "") -> Raw:
        """The head of a request of raw float32 values, and as many bytes of its body as ``sent`` says; all by default."""
        query = "&".join(f"shape={size}" for size in shape) + "&dtype=float32&output_type=pt"
        text = f"POST {path}?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{headers}\r\n"
        return self.send(text.encode() + bytes(length if sent is None else sent))

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with lower-case names, and body."""
        response = http.client.HTTPResponse(self.socket)
        response.begin()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def is_closed(self) -> bool:
        """Whether the server has ended it without a further byte; waits for that."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def __enter__(self) -> Raw:  # noqa: PYI034  # Self came with Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
