"""Mean and variance of the groups of a GroupNorm, from strips of the picture, as a factor and a summand of each channel.

Averages of the strips' variances would be wrong: they leave out how the strips differ from each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch

from remote_vae.tiled.policy import Policy

# One pass takes the variance as a difference, mean(x^2) - mean(x)^2, which loses as many digits as mean^2 is above it. Beyond
# this, a second pass with the mean taken off first. Up to here the error is 3e-6 of the variance at most.
_ONE_PASS_RATIO = 32.0

Affine = tuple[torch.Tensor, torch.Tensor]


class Moments(Protocol):
    """The statistics of ``[1, C, H, W]``, strip by strip."""

    def add(self, strip: torch.Tensor) -> None:
        """Take in rows of the picture, ``[1, C, n, W]``."""

    def second_pass(self) -> bool:
        """Whether the strips have to be added once more."""

    def are_finite(self) -> bool:
        """False when a NaN or an infinity is in the picture; True as well where a look would make the host wait."""

    def affine(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Affine:
        """Factor and summand ``[1, C, 1, 1]`` of each channel's values: the norm and what it is scaled by."""


def moments_of(
    groups: int, channels: int, eps: float, device: torch.device, policy: Policy, constants: Constants | None = None
) -> Moments:
    """Those that are quick on ``device``; ``constants`` may be those of other norms of the same call."""
    return Sums(groups, channels, eps, device, policy) if policy.looks else Parts(groups, eps, constants or Constants())


class Sums:
    """On a processor: sums of the rows in float32 (torch adds them pairwise), of the rows' sums in float64."""

    def __init__(self, groups: int, channels: int, eps: float, device: torch.device, policy: Policy) -> None:
        self._dtype = policy.exact
        self._groups = groups
        self._per_group = channels // groups
        self._eps = eps
        self._device = device
        self._count = 0
        self._sum = self._zeros()
        self._squares = self._zeros()
        self._centre: torch.Tensor | None = None

    def add(self, strip: torch.Tensor) -> None:
        values = strip.float()
        if self._centre is not None:
            values = values - self._centre.repeat_interleave(self._per_group).float().view(1, -1, 1, 1)
        # channels_last: there a row of one channel is no run of memory, and a norm of it takes ten times as long.
        if values.stride(1) == 1:
            sums, squares = values.sum(dim=(2, 3)), (values * values).sum(dim=(2, 3)).to(self._dtype)
        else:
            sums, squares = values.sum(dim=3), torch.linalg.vector_norm(values, dim=3).to(self._dtype).square_()
        if self._centre is None:
            self._sum += self._by_group(sums)
        self._squares += self._by_group(squares)
        self._count += strip.shape[2] * strip.shape[3] * self._per_group

    def second_pass(self) -> bool:
        """Whether the strips have to be added once more, as the mean is too large against the variance."""
        if self._centre is not None:
            return False
        mean, square = self._sum / self._count, self._squares / self._count
        if not bool((mean * mean > _ONE_PASS_RATIO * (square - mean * mean)).any()):
            return False
        self._centre = mean
        self._squares, self._count = self._zeros(), 0
        return True

    def are_finite(self) -> bool:
        return bool(torch.isfinite(self._sum + self._squares).all())

    def affine(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Affine:
        mean = self._sum / self._count if self._centre is None else self._centre
        variance = self._squares / self._count
        if self._centre is None:
            variance = (variance - mean * mean).clamp_(min=0)
        return _affine(mean, (variance + self._eps).rsqrt_(), weight, bias)

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self._groups, dtype=self._dtype, device=self._device)

    def _by_group(self, rows: torch.Tensor) -> torch.Tensor:
        # [1, C, n] or [1, C]: the channels of a group are neighbours.
        return rows.to(self._dtype).reshape(self._groups, -1).sum(dim=1)


class Parts:
    """On a card: mean and variance of each strip, one kernel a strip, joined at the end without a look at them.

    CUDA has kernels for both, made for SyncBatchNorm; they are of channels, elsewhere statistics are of groups at once.
    """

    def __init__(self, groups: int, eps: float, constants: Constants) -> None:
        self._groups = groups
        self._eps = eps
        self._constants = constants
        self._means: list[torch.Tensor] = []
        # Variances; with CUDA's kernels 1 / sqrt(variance + eps).
        self._spreads: list[torch.Tensor] = []
        self._counts: list[int] = []

    def add(self, strip: torch.Tensor) -> None:
        if strip.device.type == "cuda":
            mean, spread = torch.batch_norm_stats(strip, self._eps)
        else:
            parts = strip if strip.dtype in (torch.float32, torch.float64) else strip.float()
            spread, mean = torch.var_mean(parts.view(1, self._groups, -1, *strip.shape[2:]), (0, 2, 3, 4), correction=0)
        self._means.append(mean)
        self._spreads.append(spread)
        self._counts.append(strip.shape[2] * strip.shape[3])

    def second_pass(self) -> bool:
        return False

    def are_finite(self) -> bool:
        return True

    def affine(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Affine:
        if self._means[0].device.type == "cuda":
            means, spreads = (torch.stack(each, 1).view(self._groups, -1).t() for each in (self._means, self._spreads))
            counts = self._constants.of(self._counts, means.shape[0] // len(self._counts), means)
            # Of the first it takes the dtype alone.
            joined = (means, means, spreads, None, None, 0.0, self._eps, counts)
            mean, deviation = torch.batch_norm_gather_stats_with_counts(*joined)
        else:
            mean, variance = self._joined()
            deviation = (variance + self._eps).rsqrt_()
        return _affine(mean, deviation, weight, bias)

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each group."""
        if len(self._means) == 1:
            return self._means[0], self._spreads[0]
        means, variances = torch.stack(self._means + self._spreads).view(2, len(self._means), -1)
        total = sum(self._counts)
        shares = self._constants.of([count / total for count in self._counts], 1, means)
        mean = shares @ means
        away = means - mean
        return mean, shares @ torch.addcmul(variances, away, away)


class Constants:
    """Numbers for each strip, on the device: written there once, as a copy would be waited for."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], torch.Tensor] = {}

    def of(self, values: Sequence[float], times: int, like: torch.Tensor) -> torch.Tensor:
        """``values``, ``times`` times one after the other, where and as ``like`` is."""
        key = (*values, times, like.dtype)
        if key not in self._made:
            most, _ = Counter(values).most_common(1)[0]
            made = like.new_full((times, len(values)), most)
            for index, value in enumerate(values):
                if value != most:
                    made[:, index].fill_(value)
            self._made[key] = made.view(-1)
        return self._made[key]


def _affine(mean: torch.Tensor, deviation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Affine:
    """Of ``mean`` and 1 / standard deviation of each group; in float64 where ``weight`` is, else in float32."""
    groups = mean.shape[0]
    factor = weight.view(groups, -1) * deviation.view(groups, 1)
    if bias is None:
        summand = factor * -mean.view(groups, 1)
    else:
        summand = torch.addcmul(bias.view(groups, -1), factor, mean.view(groups, 1), value=-1)
    return factor.to(weight.dtype).view(1, -1, 1, 1), summand.to(weight.dtype).view(1, -1, 1, 1)
