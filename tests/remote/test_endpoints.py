from __future__ import annotations

from typing import Any

import pytest

from remote_vae.errors import DeadlineExceeded, EndpointError, EndpointUnreachable, MalformedAnswer, RouteFailed
from remote_vae.remote.client import Deadlines
from remote_vae.remote.endpoints import Endpoints, InPause, Turn
from remote_vae.settings import Settings
from tests.remote.conftest import Clock

URL = "http://a/decode"
REFUSED = EndpointUnreachable("http://a: connection refused", reason="connection refused")
SLOW = DeadlineExceeded("http://a: no answer in 20 s", reason="no answer in 20 s")
NO_CONNECTION = DeadlineExceeded("http://a: no connection in 3 s", reason="no connection in 3 s")
BUSY = EndpointError(503, "busy", "http://a")
BROKEN = EndpointError(500, "broken", "http://a")


class Caller:
    """Makes calls to endpoints at times that the test says; ``up`` is what /health answers."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.endpoints = Endpoints(self.clock)
        self.up = False
        self.asked_health = 0

    def _is_up(self) -> bool:
        self.asked_health += 1
        return self.up

    def enter(self, url: str = URL, **settings: Any) -> Turn:
        turn = self.endpoints.turn(url, Settings(**settings))
        turn.enter(self._is_up)
        return turn

    def fail(self, error: RouteFailed, url: str = URL, **settings: Any) -> None:
        self.enter(url, **settings).failed(error)

    def refusal(self, url: str = URL, **settings: Any) -> str:
        with pytest.raises(InPause) as caught:
            self.enter(url, **settings)
        return str(caught.value)


@pytest.fixture
def caller() -> Caller:
    return Caller()


def test_an_endpoint_that_failed_is_left_alone_until_its_pause_is_over(caller: Caller) -> None:
    caller.fail(BROKEN)
    assert caller.refusal() == "500, 0 s ago; asked again in 30 s"
    caller.clock.now += 29.9
    assert caller.refusal()
    caller.clock.now += 0.2
    caller.enter()


def test_what_is_recorded_of_a_call_in_the_pause_is_true(caller: Caller) -> None:
    """That call was never made: its record says when the failure was."""
    caller.fail(REFUSED)
    caller.clock.now += 12
    with pytest.raises(InPause) as caught:
        caller.enter()
    assert caught.value.reason == "connection refused, 12 s ago"


def test_after_the_pause_one_call_tries_and_the_others_wait_for_what_it_finds(caller: Caller) -> None:
    caller.fail(BROKEN)
    caller.clock.now += 31
    first = caller.enter()
    assert "another call is trying it" in caller.refusal()
    first.succeeded()
    caller.enter()
    caller.enter()


def test_a_trial_that_fails_begins_the_pause_anew(caller: Caller) -> None:
    caller.fail(BROKEN)
    caller.clock.now += 31
    caller.fail(BUSY)
    assert caller.refusal() == "503, 0 s ago; asked again in 30 s"


def test_a_trial_that_the_user_cancelled_lets_the_next_call_try(caller: Caller) -> None:
    caller.fail(BROKEN)
    caller.clock.now += 31
    caller.enter().left()
    caller.enter()


def test_only_the_call_that_tries_ends_the_trial(caller: Caller) -> None:
    """A call from before the failure that is cancelled now let a second and a third one try."""
    early = caller.enter()
    caller.fail(BROKEN)
    caller.clock.now += 31
    caller.enter()
    early.left()
    assert "another call is trying it" in caller.refusal()


def test_a_pause_of_zero_asks_every_time(caller: Caller) -> None:
    caller.fail(BROKEN, cooldown=0.0)
    caller.enter(cooldown=0.0)
    caller.enter(cooldown=0.0)


@pytest.mark.parametrize(
    "change", [{"first_byte_timeout": 60.0}, {"connect_timeout": 5.0}, {"cooldown": 20.0}, {"endpoint": "http://a"}]
)
def test_changed_settings_end_the_pause(caller: Caller, change: dict[str, Any]) -> None:
    caller.fail(SLOW)
    assert caller.refusal(transfer="png")
    caller.enter(**change)


@pytest.mark.parametrize("error", [REFUSED, NO_CONNECTION, BUSY])
def test_a_server_that_comes_up_ends_the_pause(caller: Caller, error: RouteFailed) -> None:
    caller.fail(error)
    assert caller.refusal()
    caller.up = True
    caller.enter()


@pytest.mark.parametrize("error", [BROKEN, SLOW, MalformedAnswer("no shape")])
def test_a_server_that_was_up_when_it_failed_is_not_asked_for_its_health(caller: Caller, error: RouteFailed) -> None:
    caller.up = True
    caller.fail(error)
    assert caller.refusal()
    assert caller.asked_health == 0


def test_the_pause_that_a_busy_server_asks_for_counts(caller: Caller) -> None:
    caller.up = True
    caller.fail(EndpointError(503, "busy", URL, retry_after=5.0))
    assert caller.refusal() == "503, 0 s ago; asked again in 5 s"
    caller.clock.now += 5.1
    caller.fail(EndpointError(503, "busy", URL, retry_after=100.0))
    caller.clock.now += 50
    assert caller.refusal() == "503, 50 s ago; asked again in 50 s"


def test_a_server_that_wants_years_is_asked_again_after_minutes(caller: Caller) -> None:
    caller.fail(EndpointError(503, "busy", URL, retry_after=999999999.0))
    caller.clock.now += 601
    caller.enter()


def test_an_answer_of_no_use_at_one_url_says_nothing_of_another(caller: Caller) -> None:
    caller.fail(BROKEN)
    assert caller.refusal()
    caller.enter("http://a/encode")
    assert caller.refusal()
    caller.enter("http://a/encode")


def test_a_machine_that_does_not_answer_is_not_asked_at_another_url(caller: Caller) -> None:
    caller.fail(SLOW)
    assert caller.refusal("http://a/encode").startswith("no answer in 20 s, 0 s ago")
    caller.enter("http://b/decode")
    caller.enter("http://a:81/decode")


def test_a_machine_that_answers_again_is_well_at_all_its_urls(caller: Caller) -> None:
    caller.fail(SLOW)
    caller.clock.now += 31
    caller.enter("http://a/encode").succeeded()
    caller.enter()
    caller.enter()


# --- how long an answer takes ----------------------------------------------------------------------------------------------

PICTURE = 1024 * 1024


def test_deadlines_grow_with_the_pixels_of_the_call() -> None:
    settings = Settings(first_byte_timeout=20.0, total_timeout=120.0)
    one, eight = Deadlines.of(settings), Deadlines.of(settings, 8 * PICTURE)
    assert (one.patience, one.total) == (20.0, 120.0)
    assert (eight.first_byte, eight.patience, eight.total) == (20.0, 160.0, 960.0)
    assert Deadlines.of(settings, PICTURE // 4) == one


def test_deadlines_grow_with_what_the_endpoint_took_before(caller: Caller) -> None:
    assert caller.endpoints.expected(URL, PICTURE) == 0
    caller.endpoints.took(URL, 2 * PICTURE, 60.0)
    assert caller.endpoints.expected(URL, PICTURE) == 30.0
    assert caller.endpoints.expected("http://b/decode", PICTURE) == 0
    assert Deadlines.of(Settings(), PICTURE, 30.0).patience == 90.0
    caller.endpoints.took(URL, PICTURE, 1.0)
    assert caller.endpoints.expected(URL, PICTURE) == 15.0


def test_a_small_picture_that_took_long_does_not_make_hours_of_a_large_one(caller: Caller) -> None:
    """A server that had to start, or a way that is long, takes as long for a small picture as for a large one."""
    caller.endpoints.took(URL, 64 * 64, 20.0)
    assert caller.endpoints.expected(URL, 64 * 64) == 20.0
    assert caller.endpoints.expected(URL, 4 * PICTURE) == 80.0


# --- where the user gave no port -------------------------------------------------------------------------------------------


def test_without_a_port_that_of_our_server_is_tried_as_well_and_what_answered_is_remembered(caller: Caller) -> None:
    both = ["http://a/decode", "http://a:7870/decode"]
    assert caller.endpoints.addresses(URL) == both
    caller.endpoints.found(URL, both[1])
    assert caller.endpoints.addresses("http://a/encode") == ["http://a:7870/encode", "http://a/encode"]
    assert caller.endpoints.addresses("http://b/decode")[0] == "http://b/decode"


@pytest.mark.parametrize("url", ["http://a:80/decode", "https://a/decode", "http://a:7860/remote-vae/decode"])
def test_an_address_that_is_whole_is_the_only_one(caller: Caller, url: str) -> None:
    assert caller.endpoints.addresses(url) == [url]
