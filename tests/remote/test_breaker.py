from __future__ import annotations

from remote_vae.remote.breaker import Breaker, Breakers


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_endpoint_that_failed_is_left_alone_until_its_pause_is_over() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    assert breaker.enter(30.0) is None
    breaker.failed("503")
    assert breaker.enter(30.0) == "503; asked again in 30 s"
    clock.now = 29.9
    assert breaker.enter(30.0) is not None
    clock.now = 30.1
    assert breaker.enter(30.0) is None


def test_after_the_pause_one_call_probes_and_the_others_wait_for_what_it_finds() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed("503")
    clock.now = 31.0
    assert breaker.enter(30.0) is None
    assert "tried by another call" in (breaker.enter(30.0) or "")
    breaker.succeeded()
    assert breaker.enter(30.0) is None
    assert breaker.enter(30.0) is None


def test_a_probe_that_fails_begins_the_pause_anew() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed("503")
    clock.now = 31.0
    assert breaker.enter(30.0) is None
    breaker.failed("504")
    assert breaker.enter(30.0) == "504; asked again in 30 s"


def test_a_probe_that_the_user_cancelled_lets_the_next_call_probe() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed("503")
    clock.now = 31.0
    assert breaker.enter(30.0) is None
    breaker.left()
    assert breaker.enter(30.0) is None


def test_a_pause_of_zero_asks_every_time() -> None:
    breaker = Breaker(Clock())
    breaker.failed("503")
    assert breaker.enter(0.0) is None
    assert breaker.enter(0.0) is None


def test_an_answer_of_no_use_at_one_url_says_nothing_of_another() -> None:
    breakers = Breakers()
    breakers.of("http://a/decode").failed("503", answered=True)
    assert breakers.of("http://a/decode").enter(30.0) is not None
    assert breakers.of("http://a/encode").enter(30.0) is None


def test_a_machine_that_does_not_answer_is_not_asked_at_another_url() -> None:
    breakers = Breakers()
    breakers.of("http://a/decode").failed("no answer in time", answered=False)
    for url in ("http://a/decode", "http://a/encode"):
        assert (breakers.of(url).enter(30.0) or "").startswith("no answer in time; asked again in")
    assert breakers.of("http://b/decode").enter(30.0) is None
    assert breakers.of("http://a:81/decode").enter(30.0) is None


def test_a_refusal_by_the_url_is_no_probe_of_the_machine() -> None:
    breakers = Breakers()
    breakers.of("http://a/decode").failed("503", answered=True)
    assert breakers.of("http://a/decode").enter(30.0) is not None
    assert breakers.of("http://a/encode").enter(30.0) is None


def test_a_machine_that_answers_again_is_well_at_all_its_urls() -> None:
    breakers = Breakers()
    breakers.of("http://a/decode").failed("no answer in time", answered=False)
    assert breakers.of("http://a/encode").enter(0.0) is None
    breakers.of("http://a/encode").succeeded()
    assert breakers.of("http://a/decode").enter(30.0) is None


def test_a_call_that_was_cancelled_leaves_both_as_they_were() -> None:
    breakers = Breakers()
    assert breakers.of("http://a/decode").enter(30.0) is None
    breakers.of("http://a/decode").left()
    assert breakers.of("http://a/decode").enter(30.0) is None
    assert breakers.of("http://a/encode").enter(30.0) is None
