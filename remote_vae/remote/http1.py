"""HTTP/1.1 as far as one GET or POST and its answer need it, on a socket that somebody else watches.

Written out because of its price: http.client parses the head of an answer with the e-mail package, which costs a call whose
answer is there at once as much as a third of its transfer.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

HEAD_LIMIT = 64 * 1024
_PIECE = 16 * 1024
# Where the values of a body begin, in bytes: torch's own tensors lie so, and 4 is what the widest dtype needs.
_ALIGNMENT = 64
_NEEDED_ALIGNMENT = 4
_UNPRINTABLE = re.compile(r"[^\x21-\x7e]")
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}")
_LENGTH = re.compile(r"[0-9]{1,15}")
_HEAD_END = b"\r\n\r\n"


class Source(Protocol):
    """Where the bytes of an answer come from."""

    def fill(self, view: memoryview, least: int) -> int:
        """Receive at least ``least`` bytes into ``view``; fewer only at the end. Returns their number."""
        ...


def request_head(host: str, target: str, headers: Mapping[str, str], length: int | None) -> bytes:
    """The head of a POST with a body of ``length`` bytes, or of a GET where that is None.

    Raises:
        ValueError: a target or a header that would break out of its line.
    """
    return _request_head(host, target, tuple(headers.items()), length)


# A user's calls go to the same place again and again, and only their bodies differ.
@lru_cache(maxsize=64)
def _request_head(host: str, target: str, headers: tuple[tuple[str, str], ...], length: int | None) -> bytes:
    if _UNPRINTABLE.search(target):
        raise ValueError(f"the address {target[:80]!r} holds characters that must be percent-encoded")
    lines = [f"{'GET' if length is None else 'POST'} {target} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines += ["Accept-Encoding: identity"]
    if length is not None:
        lines += [f"Content-Length: {length}"]
    if any("\n" in line or "\r" in line for line in lines):
        raise ValueError("a header must be one line")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Size(NamedTuple):
    """Bytes of an answer."""

    head: int
    body: int


class Answer:
    """The head of an answer; its body is still to be read.

    Args:
        source: where it comes from.
        usual: what the last answer to such a request had. Head and body of such an answer go straight to where the body stays,
            in as few reads as they come in: a short read for the head and a pause to look at it cost a server that is quick a
            tenth of the whole call. Its memory is taken while the server works.

    Attributes:
        status: the HTTP status.
        headers: by lower-case name; of a repeated one the last.
        length: bytes of the body, or None where only its end will tell.
        keeps_alive: whether the connection can carry another request once the body has been read.
        size: bytes of the head, and of a body that says its length.

    Raises:
        http.client.HTTPException: what comes is not HTTP. ConnectionError: nothing comes.
    """

    def __init__(self, source: Source, usual: Size | None = None) -> None:
        self._source = source
        self._rest = bytearray()
        # What came behind the head stands at ``_start`` of ``_memory``, ``_ready`` bytes, or all of it in ``_rest``.
        self._memory, self._start = _memory_for(usual)
        self._ready = 0
        head = self._read_first()
        self._parse(head)
        while 100 <= self.status < 200:  # 100 Continue and its like stand before the answer
            self._move_to_rest()
            head = self._read_head()
            self._parse(head)
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length", "")
        self.length = int(length) if _LENGTH.fullmatch(length) and not self._chunked else None
        self.size = Size(len(head) + len(_HEAD_END), self.length or 0)
        connection = self.headers.get("connection", "").lower()
        by_default = connection != "close" if self._version_1_1 else connection == "keep-alive"
        self.keeps_alive = by_default and (self._chunked or self.length is not None)

    def _read_first(self) -> bytes:
        """The head, which the first read hardly ever cuts."""
        view = self._memory.data[self._start :]
        count = self._source.fill(view, 1)
        begin = bytes(view[: min(count, _PIECE)])
        end = begin.find(_HEAD_END)
        if end < 0:
            self._rest += view[:count]
            return self._read_head(more=count > 0)
        behind = end + len(_HEAD_END)
        self._start += behind
        self._ready = count - behind
        return begin[:end]

    def _read_head(self, *, more: bool = True) -> bytes:
        while (end := self._rest.find(_HEAD_END)) < 0 and len(self._rest) <= HEAD_LIMIT:
            if not more or not self._more():
                raise http.client.RemoteDisconnected("the connection was closed before an answer came")
        if not 0 <= end <= HEAD_LIMIT:
            raise http.client.LineTooLong("head")
        head = bytes(self._rest[:end])
        del self._rest[: end + len(_HEAD_END)]
        return head

    def _move_to_rest(self) -> None:
        """For those who read bit by bit."""
        self._rest += self._memory.data[self._start : self._start + self._ready]
        self._ready = 0

    def _parse(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        status = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not (status.isascii() and status.isdigit() and len(status) == 3):
            raise http.client.BadStatusLine(first[:80])
        self.status = int(status)
        self._version_1_1 = version == "HTTP/1.1"
        self.headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise http.client.HTTPException(f"a header line {line[:80]!r}")
            self.headers[name.lower()] = value.strip()

    def _more(self) -> int:
        view = memoryview(bytearray(_PIECE))
        count = self._source.fill(view, 1)
        self._rest += view[:count]
        return count

    def body(self) -> np.ndarray:
        """The body, whose length is known: uint8, in memory of its own, fit for every dtype.

        Raises:
            http.client.IncompleteRead: the connection ended before.
        """
        length = self.length or 0
        begun = self._memory[self._start : self._start + self._ready] if not self._rest else np.frombuffer(self._rest, np.uint8)
        body = self._memory[self._start : self._start + length]
        filled = min(len(begun), length)
        too_much = len(self._memory) > 2 * length + _PIECE + _ALIGNMENT
        if self._rest or too_much or len(body) < length or body.__array_interface__["data"][0] % _NEEDED_ALIGNMENT:
            body = np.empty(length, dtype=np.uint8)
            body[:filled] = begun[:filled]
        # A server that sends more than it said is no one to go on talking to.
        self.keeps_alive &= filled == len(begun)
        filled += self._source.fill(body.data[filled:], length - filled) if filled < length else 0
        if filled < length:
            raise http.client.IncompleteRead(b"", length - filled)
        return body

    def pieces(self) -> Iterator[bytes]:
        """The body piece by piece, whatever tells its end. Raises IncompleteRead when the connection ended before."""
        self._move_to_rest()
        yield from self._chunks() if self._chunked else self._unchunked()
        self.keeps_alive &= not self._rest

    def _unchunked(self) -> Iterator[bytes]:
        missing = self.length
        while missing is None or missing > 0:
            if not self._rest and not self._more():
                if missing is None:
                    return
                raise http.client.IncompleteRead(b"", missing)
            piece = bytes(self._rest[:missing])
            del self._rest[: len(piece)]
            missing = None if missing is None else missing - len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while True:
            size_text = self._line().partition(b";")[0].strip()
            if not _CHUNK_SIZE.fullmatch(size_text):
                raise http.client.HTTPException(f"a chunk of size {size_text[:20]!r}")
            missing = int(size_text, 16)
            if not missing:
                while self._line():
                    pass  # trailers
                return
            while missing:
                if not self._rest and not self._more():
                    raise http.client.IncompleteRead(b"", missing)
                piece = bytes(self._rest[:missing])
                del self._rest[: len(piece)]
                missing -= len(piece)
                yield piece
            if self._line():
                raise http.client.HTTPException("a chunk that is longer than its size")

    def _line(self) -> bytes:
        while (end := self._rest.find(b"\r\n")) < 0:
            if len(self._rest) > HEAD_LIMIT:
                raise http.client.LineTooLong("chunk")
            if not self._more():
                raise http.client.IncompleteRead(b"")
        line = bytes(self._rest[:end])
        del self._rest[: end + 2]
        return line


def _memory_for(usual: Size | None) -> tuple[np.ndarray, int]:
    """Memory for an answer, and where its head should begin so that its body lies well."""
    if usual is None:
        return np.empty(_PIECE, dtype=np.uint8), 0
    memory = np.empty(max(_PIECE, usual.head + usual.body) + _ALIGNMENT, dtype=np.uint8)
    return memory, -(memory.__array_interface__["data"][0] + usual.head) % _ALIGNMENT
