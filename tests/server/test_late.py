"""Calls that take long: who takes a sign of life gets one, whoever else waits as before."""

from __future__ import annotations

import copy
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import requests
import torch

from remote_vae.errors import EndpointError
from remote_vae.remote.client import Deadlines, client_for
from remote_vae.server.late import Late
from remote_vae.server.models import LoadedVae
from remote_vae.server.own import OwnVaes, Source
from remote_vae.wire import DecodeRequest, Output
from remote_vae.wire.extras import Extras
from remote_vae.wire.late import LATE_TYPE
from tests.conftest import ServerThread
from tests.server.asking import Raw, decode, locally, tensor_of, wait_until

ACCEPT = "X-Remote-VAE-Accept: late\r\n"
SHAPE = (1, 4, 8, 8)


@dataclass
class Slow:
    """A server whose VAE makes a picture when it may.

    Attributes:
        may: go on.
        is_broken: whether it gives NaN.
    """

    server: ServerThread
    may: threading.Event = field(default_factory=threading.Event)
    is_broken: bool = False


@pytest.fixture
def slow(loaded: LoadedVae, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    monkeypatch.setattr(Late, "after", 0.2)
    monkeypatch.setattr(Late, "every", 0.05)
    own = copy.copy(loaded.vae)
    made = Slow(None)  # type: ignore[arg-type]  # it comes

    def wait(latents: torch.Tensor, **kwargs: Any) -> Any:
        assert made.may.wait(20)
        pixels = loaded.vae.decode(latents, **kwargs)[0]
        return (torch.full_like(pixels, torch.nan) if made.is_broken else pixels,)

    object.__setattr__(own, "decode", wait)
    made.server = ServerThread(replace(loaded, vae=own))
    yield made
    made.may.set()
    made.server.close()


def ask(slow: Slow, headers: str = ACCEPT) -> Raw:
    return Raw(slow.server).post("/decode", SHAPE, 4 * 4 * 64, headers=headers)


def begun(raw: Raw) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(raw.socket)
    answer.begin()
    return answer


def test_a_client_that_takes_it_hears_dots_and_then_the_answer(slow: Slow, loaded: LoadedVae) -> None:
    with ask(slow) as raw:
        answer = begun(raw)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == LATE_TYPE
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert answer.read(4) == b"...."
        slow.may.set()
        dots, line, body = answer.read().split(b"\n", 2)
        assert not dots.strip(b".")
        head = json.loads(line)
        assert (head["status"], head["length"]) == (200, len(body))
        assert head["headers"]["shape"] == "[1, 3, 64, 64]"
        assert "Server-Timing" in head["headers"]
        made = torch.frombuffer(bytearray(body), dtype=torch.float32).reshape(1, 3, 64, 64)
        torch.testing.assert_close(made, locally(loaded, torch.zeros(SHAPE)), rtol=0, atol=1e-5)


def test_who_waits_for_a_vae_of_which_nothing_is_known_yet_hears_of_it_too(
    loaded: LoadedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Late, "after", 0.2)
    monkeypatch.setattr(Late, "every", 0.05)
    may = threading.Event()

    def load(*_: Any, **__: Any) -> LoadedVae:
        assert may.wait(20)
        return loaded

    server = ServerThread(loaded, catalogue=OwnVaes([Source("somewhere", "mine")], load=load))
    try:
        with Raw(server).post("/mine/decode", SHAPE, 4 * 4 * 64, headers=ACCEPT) as raw:
            answer = begun(raw)
            assert (answer.getheader("content-type"), answer.read(3)) == (LATE_TYPE, b"...")
            may.set()
            _, line, body = answer.read().split(b"\n", 2)
            assert json.loads(line)["status"] == 200
            made = torch.frombuffer(bytearray(body), dtype=torch.float32).reshape(1, 3, 64, 64)
            torch.testing.assert_close(made, locally(loaded, torch.zeros(SHAPE)), rtol=0, atol=1e-5)
    finally:
        may.set()
        server.close()


def test_a_plain_client_sees_nothing_of_it(slow: Slow) -> None:
    threading.Timer(0.5, slow.may.set).start()
    with ask(slow, "") as raw:
        status, headers, body = raw.answer()
    assert status == 200
    assert headers["content-type"] == "tensor/binary"
    assert int(headers["content-length"]) == len(body) == 3 * 64 * 64 * 4


def test_a_quick_call_is_answered_as_ever(server: ServerThread) -> None:
    with Raw(server).post("/decode", SHAPE, 4 * 4 * 64, headers=ACCEPT) as raw:
        status, headers, _ = raw.answer()
    assert (status, headers["content-type"]) == (200, "tensor/binary")


def test_an_error_that_comes_late_has_its_status_in_the_line(slow: Slow) -> None:
    slow.is_broken = True
    with ask(slow) as raw:
        answer = begun(raw)
        assert answer.read(1) == b"."
        slow.may.set()
        _, line, body = answer.read().split(b"\n", 2)
        assert json.loads(line)["status"] == 422
        assert "NaN" in json.loads(body)["error"]


def test_the_connection_carries_the_next_call(slow: Slow) -> None:
    with ask(slow) as raw:
        answer = begun(raw)
        answer.read(2)
        slow.may.set()
        answer.read()
        raw.post("/decode", SHAPE, 4 * 4 * 64)
        assert raw.answer()[0] == 200


def test_who_hangs_up_between_two_dots_gives_up_the_place(slow: Slow) -> None:
    with ask(slow) as raw:
        assert begun(raw).read(2) == b".."
    waiting = ask(slow)
    slow.may.set()
    with waiting as raw:
        assert begun(raw).status == 200
    url = f"{slow.server.url}/health"
    wait_until(lambda: requests.get(url, timeout=30).json()["running"] is False)
    assert tensor_of(decode(slow.server, torch.zeros(SHAPE))).shape == (1, 3, 64, 64)


def test_the_clients_first_byte_deadline_does_not_end_a_call_that_is_heard_of(slow: Slow) -> None:
    request = DecodeRequest(torch.zeros(SHAPE), Output.UINT8, extras=Extras(late=True))
    threading.Timer(1.5, slow.may.set).start()
    reply = client_for(f"{slow.server.url}/decode").decode(request, Deadlines(2.0, 0.5, 20.0))
    assert reply.answer.size == (64, 64)
    assert reply.bytes_down == 3 * 64 * 64


def test_an_error_that_comes_late_is_that_error_to_the_client(slow: Slow) -> None:
    slow.is_broken = True
    request = DecodeRequest(torch.zeros(SHAPE), Output.UINT8, extras=Extras(late=True))
    threading.Timer(0.5, slow.may.set).start()
    with pytest.raises(EndpointError, match=r"answered 422: .*NaN"):
        client_for(f"{slow.server.url}/decode").decode(request, Deadlines(2.0, 5.0, 20.0))
