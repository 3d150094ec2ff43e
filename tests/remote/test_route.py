"""What the remote route makes of endpoints that fail, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

from remote_vae.call import User
from remote_vae.errors import CallCancelled, EndpointUnreachable, NotOffered, RouteFailed
from remote_vae.remote import endpoints
from remote_vae.remote.functions import PARALLEL
from remote_vae.settings import Settings
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.remote.conftest import Caller

BATCH = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(3)) * 5


@pytest.mark.parametrize("transfer", ["png", "jpg"])
def test_pictures_of_a_batch_that_have_arrived_are_kept_and_the_rest_asked_for_once_more(
    caller: Caller, chaos: Chaos, transfer: str
) -> None:
    chaos.reset("503", fail_at=1)
    chaos.info, chaos.extras = "pass", []
    assert caller.ask(Settings(endpoint=chaos.url, transfer=transfer), tensor=BATCH) == "remote"
    assert len(chaos.requests) == 4


def test_a_batch_that_is_refused_is_not_asked_for_again(caller: Caller, chaos: Chaos) -> None:
    chaos.reset("400", fail_at=1)
    chaos.info, chaos.extras = "pass", []
    with pytest.raises(RouteFailed, match="too small"):
        caller.ask(Settings(endpoint=chaos.url, transfer="png"), tensor=BATCH)
    assert len(chaos.requests) == 3


def test_after_an_interrupt_no_more_pictures_of_a_batch_are_asked_for(caller: Caller, chaos: Chaos) -> None:
    chaos.reset("hang")
    chaos.info, chaos.extras = "pass", []
    pressed = User(cancelled=lambda: len(chaos.requests) >= PARALLEL)
    with pytest.raises(CallCancelled):
        caller.ask(Settings(endpoint=chaos.url, transfer="png"), tensor=BATCH.repeat(PARALLEL, 1, 1, 1), user=pressed)
    assert len(chaos.requests) == PARALLEL


def test_a_slow_server_that_says_it_works_makes_the_batch_and_is_asked_again(caller: Caller, chaos: Chaos) -> None:
    settings = Settings(endpoint=chaos.url, first_byte_timeout=0.2)
    assert caller.ask(settings) == "remote"
    chaos.reset("late")
    chaos.info = "working"
    for _ in range(2):
        assert caller.ask(settings, tensor=BATCH) == "remote"


def test_what_an_endpoint_took_before_is_given_to_it_again(caller: Caller, chaos: Chaos) -> None:
    chaos.reset("late")
    chaos.info = "404 html"
    with pytest.raises(RouteFailed, match=r"no answer in 0\.2 s"):
        caller.ask(Settings(endpoint=chaos.url, first_byte_timeout=0.2, cooldown=0.0))
    assert caller.ask(Settings(endpoint=chaos.url)) == "remote"
    assert caller.ask(Settings(endpoint=chaos.url, first_byte_timeout=0.2, cooldown=0.0)) == "remote"


def test_a_server_that_comes_up_is_asked_in_its_pause(caller: Caller, chaos: Chaos) -> None:
    settings = Settings(endpoint=chaos.url)
    chaos.reset("503")
    for _ in range(2):
        with pytest.raises(RouteFailed):
            caller.ask(settings)
    assert len(chaos.requests) == 1
    chaos.reset("pass")
    assert caller.ask(settings) == "remote"


def test_the_record_of_a_call_in_the_pause_does_not_name_the_endpoint(caller: Caller, chaos: Chaos) -> None:
    chaos.reset("503")
    with pytest.raises(RouteFailed):
        caller.ask(Settings(endpoint=chaos.url))
    with pytest.raises(NotOffered) as caught:
        caller.ask(Settings(endpoint=chaos.url))
    assert caught.value.reason == "503, 0 s ago"
    assert str(caught.value).startswith(f"{chaos.url}/decode: 503, 0 s ago; asked again in ")


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


def test_an_address_without_a_port_is_our_servers_as_well(
    caller: Caller, chaos: Chaos, monkeypatch: pytest.MonkeyPatch, nobody: int
) -> None:
    monkeypatch.setattr(endpoints, "DEFAULT_PORT", int(chaos.url.rpartition(":")[2]))
    settings = Settings(endpoint="http://127.0.0.1")
    for _ in range(2):
        assert caller.ask(settings) == "remote"
    monkeypatch.setattr(endpoints, "DEFAULT_PORT", nobody)
    with pytest.raises(EndpointUnreachable, match=r"no port is given, and at port \d+: connection refused"):
        caller.ask(Settings(endpoint="http://127.0.0.2"))


def test_a_web_server_at_the_usual_port_does_not_hide_ours(
    caller: Caller, chaos: Chaos, server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    chaos.reset("404 html")
    monkeypatch.setattr(caller.route._endpoints, "addresses", lambda url: [f"{chaos.url}/decode", f"{server.url}/decode"])
    assert caller.ask(Settings(endpoint="http://studio")) == "remote"
    # It got the test picture and nothing of the user's.
    assert len(chaos.requests) == 1


def test_a_key_in_an_address_reaches_no_message(caller: Caller, chaos: Chaos) -> None:
    settings = Settings(decode_endpoint=f"{chaos.url}/decode?key=secret")
    chaos.reset("503")
    for _ in range(2):
        with pytest.raises(RouteFailed) as caught:
            caller.ask(settings)
        assert "secret" not in str(caught.value)


def test_an_interrupted_call_is_no_failure_of_the_endpoint(caller: Caller, chaos: Chaos) -> None:
    chaos.reset("hang")
    with pytest.raises(CallCancelled):
        caller.ask(Settings(endpoint=chaos.url), user=User(cancelled=lambda: True))
    chaos.reset("pass")
    assert caller.ask(Settings(endpoint=chaos.url)) == "remote"


def test_a_skipped_call_is_a_failure_of_the_endpoint(caller: Caller, chaos: Chaos) -> None:
    """A batch count of three would hang three times."""
    chaos.reset("hang")
    with pytest.raises(CallCancelled):
        caller.ask(Settings(endpoint=chaos.url), user=User(cancelled=lambda: True, gave_up=lambda: True))
    with pytest.raises(NotOffered, match="skipped, 0 s ago"):
        caller.ask(Settings(endpoint=chaos.url))
