"""Statistics of a GroupNorm from strips."""

from __future__ import annotations

import pytest
import torch

from remote_vae.tiled.moments import Constants, Moments, Parts, Sums, moments_of
from remote_vae.tiled.policy import CARD, CPU, OTHER, Policy
from tests.pretend_gpu import Card

GROUPS, CHANNELS, EPS = 4, 8, 1e-6


def picture(mean: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(1, CHANNELS, 50, 33, generator=generator) * torch.linspace(0.1, 5, 50).view(1, 1, 50, 1)
    return values * spread + mean


def moments(policy: Policy, values: torch.Tensor) -> Moments:
    return moments_of(GROUPS, CHANNELS, EPS, values.device, policy)


def normed(policy: Policy, values: torch.Tensor, rows: int) -> torch.Tensor:
    """``values`` normalised and scaled by channel, with statistics from strips of ``rows`` rows."""
    made = moments(policy, values)
    for strip in values.split(rows, dim=2):
        made.add(strip)
    if made.second_pass():
        for strip in values.split(rows, dim=2):
            made.add(strip)
    factor, summand = made.affine(*(each.to(values.device) for each in WEIGHTS))
    return torch.addcmul(summand.cpu().double(), values.cpu().double(), factor.cpu().double())


WEIGHTS = torch.linspace(0.5, 2, CHANNELS), torch.linspace(-1, 1, CHANNELS)


def true(values: torch.Tensor) -> torch.Tensor:
    weight, bias = (each.double() for each in WEIGHTS)
    return torch.nn.functional.group_norm(values.double(), GROUPS, weight, bias, EPS)


@pytest.mark.parametrize("policy", [CPU, CARD, OTHER], ids=["a processor", "a card", "another device"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (3.0, 0.1), (-1000.0, 1.0), (0.0, 1e-2)])
def test_a_norm_by_them_is_that_of_the_whole_picture(
    policy: Policy, rows: int, mean: float, spread: float, memory_format: torch.memory_format
) -> None:
    values = picture(mean, spread).to(memory_format=memory_format)
    # What the mean is above the deviation is lost to any float32.
    torch.testing.assert_close(
        normed(policy, values, rows), true(values), rtol=1e-5, atol=1e-5 * max(1, abs(mean) / spread / 5)
    )


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cudas_kernels_join_what_they_have_of_strips(card: Card, rows: int, dtype: torch.dtype) -> None:
    values = picture(3.0).to(dtype)
    torch.testing.assert_close(normed(CARD, card.put(values), rows), true(values), rtol=1e-5, atol=1e-5)


def test_a_mean_far_above_the_deviation_needs_a_second_pass() -> None:
    made = Sums(GROUPS, CHANNELS, EPS, torch.device("cpu"), CPU)
    made.add(picture(1000.0))
    assert made.second_pass()
    assert not made.second_pass(), "one more is enough"


def test_an_ordinary_picture_needs_one_pass() -> None:
    made = Sums(GROUPS, CHANNELS, EPS, torch.device("cpu"), CPU)
    made.add(picture(1.0))
    assert not made.second_pass()


@pytest.mark.parametrize("policy", [CPU, CARD], ids=["a processor", "a card"])
def test_half_precision_is_summed_in_more(policy: Policy) -> None:
    values = (picture() * 300).half()
    torch.testing.assert_close(normed(policy, values, 7), true(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_noticed_where_a_look_costs_nothing(value: float) -> None:
    made = Sums(GROUPS, CHANNELS, EPS, torch.device("cpu"), CPU)
    values = picture()
    made.add(values)
    assert made.are_finite()
    values[0, 3, 2, 1] = value
    made.add(values)
    assert not made.are_finite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_where_nobody_looks(value: float) -> None:
    made, values = Parts(GROUPS, EPS, Constants()), picture()
    values[0, 3, 2, 1] = value
    made.add(values[:, :, :7])
    made.add(values[:, :, 7:])
    factor, summand = made.affine(*WEIGHTS)
    assert not torch.isfinite(torch.addcmul(summand, values, factor)[:, 2:4]).any()


@pytest.mark.parametrize("policy", [CPU, CARD], ids=["a processor", "a card"])
def test_one_value_a_group_has_no_variance(policy: Policy) -> None:
    made = moments_of(CHANNELS, CHANNELS, EPS, torch.device("cpu"), policy)
    made.add(torch.full((1, CHANNELS, 1, 1), 7.0))
    factor, summand = made.affine(torch.ones(CHANNELS), None)
    assert factor.flatten().tolist() == pytest.approx([EPS**-0.5] * CHANNELS)
    assert (7 * factor + summand).flatten().tolist() == pytest.approx([0.0] * CHANNELS, abs=1e-3)
