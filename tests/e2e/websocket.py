"""Reads what a server sends over a websocket; as much of the protocol as a driver on the loopback needs."""

from __future__ import annotations

import base64
import os
import socket
import struct
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import urlsplit

_BINARY = 2
_CLOSE = 8


def frames(url: str, path: str) -> Iterator[bytes]:
    """The binary messages that come, until the server closes or goes away."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80)) as connection:
            key = base64.b64encode(os.urandom(16)).decode()
            head = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            connection.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
            stream = connection.makefile("rb")
            while stream.readline().strip():
                continue
            yield from _messages(stream)
    except (OSError, struct.error):
        return


def _messages(stream: BinaryIO) -> Iterator[bytes]:
    while True:
        first, length = struct.unpack("!BB", stream.read(2))
        if length == 126:
            (length,) = struct.unpack("!H", stream.read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", stream.read(8))
        payload = stream.read(length)
        if first & 15 == _CLOSE:
            return
        if first & 15 == _BINARY:
            yield payload
