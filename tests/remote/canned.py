"""A transport without a server: it answers with bytes that the test writes down."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from remote_vae.errors import RouteFailed
from remote_vae.remote.client import EndpointClient, Reply
from remote_vae.remote.transport import Answer, Exchange, Sent
from remote_vae.wire import DecodeAnswer, DecodeRequest, Output

# What is asked for, 1 x 8 x 8 pixels, and the head and body of its answer.
REQUEST = DecodeRequest(torch.zeros(1, 4, 1, 1), Output.UINT8)
BODY = bytes(range(192))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: tensor/binary\r\nshape: [1, 8, 8, 3]\r\ndtype: uint8\r\n"


class _Wire(io.BytesIO):
    """Stands for the socket, as far as http.client looks at one."""

    def makefile(self, mode: str) -> io.BytesIO:
        return self


class Canned:
    """Gives these answers, one after the other, the last one for ever, and notes what was sent."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self.sent: list[Sent] = []
        self.kept: list[bool] = []

    @contextmanager
    def open(self, sent: Sent, exchange: Exchange) -> Iterator[Answer]:
        self.sent.append(sent)
        answer = Answer(_Wire(self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]), method=sent.method)
        answer.begin()
        exchange.is_sent = True
        yield answer
        self.kept.append(answer.is_whole)

    def proxy_for(self, url: str) -> str:
        return ""


def ask(*answers: bytes, url: str = "http://studio:7870/decode") -> Reply[DecodeAnswer]:
    """The reply to ``REQUEST`` where these are the bytes that come. Raises RouteFailed."""
    return EndpointClient(url, Canned(*answers)).decode(REQUEST)


def failure(*answers: bytes, url: str = "http://studio:7870/decode") -> RouteFailed:
    """Why there is no reply."""
    try:
        ask(*answers, url=url)
    except RouteFailed as error:
        return error
    raise AssertionError("the answer was taken")
