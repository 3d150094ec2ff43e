"""Statistics of a GroupNorm from strips."""

from __future__ import annotations

import pytest
import torch

from remote_vae.tiled.moments import Moments

GROUPS, CHANNELS = 4, 8


def picture(mean: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(1, CHANNELS, 50, 33, generator=generator) * torch.linspace(0.1, 5, 50).view(1, 1, 50, 1)
    return values * spread + mean


def measured(values: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    moments = Moments(GROUPS, CHANNELS, values.device)
    for strip in values.split(rows, dim=2):
        moments.add(strip)
    if moments.second_pass():
        for strip in values.split(rows, dim=2):
            moments.add(strip)
    return moments.by_channel()


def true(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = values.double().reshape(GROUPS, -1)
    variance, mean = torch.var_mean(groups, dim=1, correction=0)
    return mean.repeat_interleave(CHANNELS // GROUPS), variance.repeat_interleave(CHANNELS // GROUPS)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (3.0, 0.1), (-1000.0, 1.0), (0.0, 1e-4)])
def test_they_are_those_of_the_whole_picture(rows: int, mean: float, spread: float, memory_format: torch.memory_format) -> None:
    values = picture(mean, spread).to(memory_format=memory_format)
    ours, theirs = measured(values, rows), true(values)
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-5, atol=1e-5 * spread)
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-5, atol=0)


def test_a_mean_far_above_the_deviation_needs_a_second_pass() -> None:
    moments = Moments(GROUPS, CHANNELS, torch.device("cpu"))
    moments.add(picture(1000.0))
    assert moments.second_pass()
    assert not moments.second_pass(), "one more is enough"


def test_an_ordinary_picture_needs_one_pass() -> None:
    moments = Moments(GROUPS, CHANNELS, torch.device("cpu"))
    moments.add(picture(1.0))
    assert not moments.second_pass()


def test_half_precision_is_summed_in_more() -> None:
    values = (picture() * 300).half()
    ours, theirs = measured(values, 7), true(values)
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_noticed(value: float) -> None:
    moments = Moments(GROUPS, CHANNELS, torch.device("cpu"))
    values = picture()
    moments.add(values)
    assert moments.are_finite()
    values[0, 3, 2, 1] = value
    moments.add(values)
    assert not moments.are_finite()


def test_one_value_a_group_has_no_variance() -> None:
    moments = Moments(CHANNELS, CHANNELS, torch.device("cpu"))
    moments.add(torch.full((1, CHANNELS, 1, 1), 7.0))
    mean, variance = moments.by_channel()
    assert mean.tolist() == [7.0] * CHANNELS
    assert variance.tolist() == [0.0] * CHANNELS
