"""Mean and variance of the groups of a GroupNorm, from strips of the picture.

Sums of the rows in float32 (torch adds them pairwise), of the rows' sums in float64. Averages of the strips' variances would be
wrong: they leave out how the strips differ from each other.
"""

from __future__ import annotations

import torch

# One pass takes the variance as a difference, mean(x^2) - mean(x)^2, which loses as many digits as mean^2 is above it. Beyond
# this, a second pass with the mean taken off first. Up to here the error is 3e-6 of the variance at most.
_ONE_PASS_RATIO = 32.0


class Moments:
    """The statistics of ``[1, C, H, W]`` in ``groups`` groups, strip by strip."""

    def __init__(self, groups: int, channels: int, device: torch.device) -> None:
        # Apple's and Intel's GPUs and DirectML have no float64.
        self._dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        self._groups = groups
        self._per_group = channels // groups
        self._device = device
        self._count = 0
        self._sum = self._zeros()
        self._squares = self._zeros()
        self._centre: torch.Tensor | None = None

    def add(self, strip: torch.Tensor) -> None:
        """Take in rows of the picture, ``[1, C, n, W]``."""
        values = strip.float()
        if self._centre is not None:
            values = values - self._by_channel(self._centre).float().view(1, -1, 1, 1)
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
        """False when a NaN or an infinity is in the picture."""
        return bool(torch.isfinite(self._sum + self._squares).all())

    def by_channel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and (biased) variance of each channel's group, float32 ``[C]``."""
        if self._centre is not None:
            mean, variance = self._centre, self._squares / self._count
        else:
            mean = self._sum / self._count
            variance = (self._squares / self._count - mean * mean).clamp_(min=0)
        return self._by_channel(mean).float(), self._by_channel(variance).float()

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self._groups, dtype=self._dtype, device=self._device)

    def _by_group(self, rows: torch.Tensor) -> torch.Tensor:
        # [1, C, n] or [1, C]: the channels of a group are neighbours.
        return rows.to(self._dtype).reshape(self._groups, -1).sum(dim=1)

    def _by_channel(self, values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(self._per_group)
