"""Attention in portions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from remote_vae.tiled import attention
from remote_vae.tiled.attention import attend
from tests.nearness import rmse
from tests.versions import before_torch, needs_half

NO_KERNEL = before_torch(2, 3, "the kernel for processors")
CHANNELS = 16
# Every part of the keys is rounded by itself; a mistake makes it thousands.
MORE = 4


@pytest.fixture(params=["torch's kernel", "a torch without it"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch's kernel" and NO_KERNEL:
        pytest.skip(NO_KERNEL)
    if request.param == "a torch without it":
        monkeypatch.setattr(attention, "_kernel", lambda: None)
    return request.param


def tokens(queries: int, keys: int, *, spread: float = 1.0, heads: int = 1) -> Iterator[torch.Tensor]:
    """As the executor has them: of all heads, a view of ``[1, n, heads d]``."""
    generator = torch.Generator().manual_seed(queries + keys)
    for count in (queries, keys, keys):
        values = torch.randn(1, count, heads * CHANNELS, generator=generator)
        # A trend, so that parts of the keys have very different shares.
        values += torch.linspace(-1, 1, count).view(1, -1, 1)
        yield (values * spread).reshape(1, count, heads, -1).transpose(1, 2)


def attended(given: Iterator[torch.Tensor], *, flops: float, scores_bytes: int = 1 << 24) -> tuple[float, list[float]]:
    """How much further from float64 it is than torch's own in one call, as a ratio; and the ticks."""
    queries, keys, values = given
    ticks: list[float] = []
    ours = attend(queries, keys, values, flops=flops, scores_bytes=scores_bytes, tick=ticks.append)
    theirs = scaled_dot_product_attention(queries, keys, values)
    true = scaled_dot_product_attention(queries.double(), keys.double(), values.double())
    assert ours.dtype == theirs.dtype
    # Where torch's is exact by chance: a part of a step of the dtype.
    step = torch.finfo(ours.dtype).eps * true.abs().max().item() / 16
    return rmse(ours, true) / max(step, rmse(theirs, true)), ticks


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 5000), (1100, 1100), (3000, 2000)])
@pytest.mark.parametrize("heads", [1, 3])
def test_it_is_the_whole_attention(
    way: str, queries: int, keys: int, spread: float, heads: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = tokens(queries, keys, spread=spread, heads=heads)
    # So few that the keys have to be parted.
    error, _ = attended(given, flops=2e7)
    assert error < MORE


def test_scores_that_no_exponential_can_hold_are_as_good(way: str) -> None:
    queries, keys, values = tokens(800, 4000)
    error, ticks = attended(iter((queries * 1000, keys, values)), flops=2e7)
    assert len(ticks) > 2
    assert error < MORE


@pytest.mark.parametrize(("queries", "keys"), [(100, 60000), (2000, 3000), (4000, 40)])
def test_what_is_done_between_two_ticks_is_bounded_and_comes_to_the_whole(
    way: str, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    work, most = 4.0 * CHANNELS * queries * keys, 1e8
    _, ticks = attended(tokens(queries, keys), flops=most)
    assert sum(ticks) == pytest.approx(work)
    assert max(ticks) <= most
    assert len(ticks) <= 3 * work / most + ceil(queries / 1024)


def test_no_work_is_so_dear_that_there_is_none(way: str) -> None:
    error, ticks = attended(tokens(3, 600), flops=1.0, scores_bytes=1)
    assert len(ticks) == (2 if way == "torch's kernel" else 3), "512 keys at least, or one query"
    assert error < MORE


def test_scores_that_torch_computes_as_a_whole_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_kernel", lambda: None)
    _, ticks = attended(tokens(1000, 1000), flops=1e12, scores_bytes=400_000)
    assert max(ticks) <= 4.0 * CHANNELS * 100_000


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=needs_half), torch.bfloat16])
def test_half_precision_is_rounded_no_more_often_than_by_torch(dtype: torch.dtype) -> None:
    error, ticks = attended((each.to(dtype) for each in tokens(1024, 4096)), flops=2e7)
    assert len(ticks) > 2
    assert error < 1.01


@pytest.mark.parametrize(
    "kernel",
    [
        None,
        lambda queries, keys, values: scaled_dot_product_attention(queries, keys, values),
        lambda queries, keys, values: (scaled_dot_product_attention(queries, keys, values), keys.new_zeros(1, 2, 4)),
        lambda queries, keys, values: (values, (queries @ keys.mT).logsumexp(3)),
        lambda queries: queries,
    ],
    ids=["is not there", "gives one thing", "gives other sums", "gives another result", "takes other things"],
)
@pytest.mark.skipif(bool(NO_KERNEL), reason=NO_KERNEL)
def test_a_torch_whose_kernel_is_another_is_not_asked_for_it(
    kernel: Callable[..., Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Operators:
        pass

    if kernel is not None:
        Operators._scaled_dot_product_flash_attention_for_cpu = staticmethod(kernel)  # type: ignore[attr-defined]
    assert attention._kernel() is not None, "torch 2.13 has it"
    attention._kernel.cache_clear()
    monkeypatch.setattr(torch.ops, "aten", Operators())
    try:
        assert attention._kernel() is None
    finally:
        attention._kernel.cache_clear()
