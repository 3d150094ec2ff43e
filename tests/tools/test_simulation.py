from __future__ import annotations

import statistics

import pytest

from remote_vae.tools.simulation import Load, Outcome, Servers, quantile, simulate


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_one_card_and_many_uis_wait_as_the_theory_of_queues_says(utilisation: float) -> None:
    """M/D/1: arrivals by chance, one server, equal work. The mean wait is rho / (2 (1 - rho)) of the work."""
    outcome = simulate(Load(20_000, 20_000 / utilisation), Servers(1, [1.0]), calls=40_000)
    assert outcome.utilisation == pytest.approx(utilisation, abs=0.03)
    rho = outcome.utilisation
    assert statistics.mean(outcome.waits) == pytest.approx(rho / (2 * (1 - rho)), rel=0.2)


def test_who_is_alone_waits_for_nobody() -> None:
    outcome = simulate(Load(1, 0.5, bytes_up=1e5, bytes_down=3e6), Servers(1, [0.5], 1.25e8), calls=500)
    assert outcome.waits[-1] == pytest.approx(0.0, abs=1e-9)


def test_uis_that_never_pause_keep_every_card_at_work_and_wait_for_the_others() -> None:
    outcome = simulate(Load(12, 1e-6), Servers(3, [0.5]), calls=2_000)
    assert outcome.utilisation == pytest.approx(1.0, abs=0.01)
    assert outcome.rate == pytest.approx(6.0, rel=0.02)
    assert outcome.wait(0.5) == pytest.approx(1.5, rel=0.02)


def test_a_narrow_line_is_waited_for_and_more_cards_do_not_help() -> None:
    load = Load(10, 1e-6, bytes_down=1e6)
    few, many = (simulate(load, Servers(cards, [0.001], 1e7), calls=2_000) for cards in (1, 20))
    assert few.rate == pytest.approx(10.0, rel=0.02)
    assert many.rate == pytest.approx(10.0, rel=0.02)
    assert many.wait(0.5) == pytest.approx(0.9, rel=0.05)


def test_calls_of_two_kinds_take_the_time_of_both() -> None:
    outcome = simulate(Load(1, 1e-6), Servers(1, [0.1, 0.3]), calls=4_000)
    assert outcome.rate == pytest.approx(5.0, rel=0.05)


def test_a_seed_is_an_outcome() -> None:
    load, servers = Load(20, 1.0), Servers(2, [0.1])
    assert simulate(load, servers, 2_000, seed=1) == simulate(load, servers, 2_000, seed=1)
    assert simulate(load, servers, 2_000, seed=1) != simulate(load, servers, 2_000, seed=2)


def test_a_wait_is_the_one_that_so_many_do_not_exceed() -> None:
    outcome = Outcome([float(number) for number in range(1, 101)], 0.5, 1.0)
    assert (outcome.wait(0.5), outcome.wait(0.95), outcome.wait(0.99), outcome.wait(1.0)) == (50.0, 95.0, 99.0, 100.0)
    assert outcome.longer_than(90.0) == 0.1
    assert quantile([], 0.5) == 0.0
