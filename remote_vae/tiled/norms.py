"""Norms of strips, and how the window of a convolution is filled with what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from remote_vae.tiled.local_steps import rms_normalised, wide
from remote_vae.tiled.moments import Affine, moments_of
from remote_vae.tiled.plan import RmsNorm, silu
from remote_vae.tiled.rows import NotFinite, Rows, Run
from remote_vae.tiled.weights import borrowed

Function = Callable[[torch.Tensor], torch.Tensor]
Fill = Callable[[torch.Tensor, torch.Tensor], None]


class NormInput(Rows):
    """What a norm is made of where the whole of it has to be seen before the first row can be given: all strips wait here.

    They are given as they are, for those who normalise them piece by piece.
    """

    def __init__(self, source: Rows) -> None:
        super().__init__(source, source.channels, source.height, source.width, phase=source.run.next_phase())
        self._source = source
        self._queue = source.queue()
        self._is_collected = False

    def read(self, *, last: bool = True) -> Iterator[torch.Tensor]:
        """As of all ``Rows``; not ``last``: they will be read once more."""
        if not self._is_collected:
            self._collect()
            self._is_collected = True
        yield from self._queue.read(last=last)

    def normalise(self, strip: torch.Tensor) -> torch.Tensor:
        """The rows of ``strip``, normalised, in a new tensor; in float32 where they are of half precision."""
        raise NotImplementedError

    def fill(self, function: Function | None) -> Fill:
        """What fills windows with normalised rows, of which ``function`` is taken."""
        return filler(self.normalise, function, self.run)

    def _collect(self) -> None:
        for strip in self._source.read():
            self._queue.append(strip)
            del strip


class GroupNormInput(NormInput):
    """What a GroupNorm is made of. Of one picture only."""

    def __init__(self, source: Rows, norm: nn.GroupNorm) -> None:
        super().__init__(source)
        self._norm = norm
        self._affine: Affine | None = None

    def normalise(self, strip: torch.Tensor) -> torch.Tensor:
        factor, summand = self._ready()
        return torch.addcmul(summand, strip.to(factor.dtype), factor)

    def fill(self, function: Function | None) -> Fill:
        run, plain = self.run, super().fill(function)
        if not run.policy.writes_parts:
            return plain

        def fill(strip: torch.Tensor, window: torch.Tensor) -> None:
            # A processor rounds to half precision once; there two kernels more cost nothing that counts.
            if run.policy.looks and window.dtype != wide(window.dtype):
                plain(strip, window)
                return
            factor, summand = self._ready()
            torch.addcmul(summand, strip, factor, out=window)
            made = window if function is None else function(window)
            if made is not window:
                window.copy_(made)

        return fill

    def _ready(self) -> Affine:
        if self._affine is None:
            raise AssertionError("nothing was read yet")
        return self._affine

    def _collect(self) -> None:
        """Factor and summand of each channel, when all strips have come."""
        run, norm = self.run, self._norm
        moments = moments_of(norm.num_groups, self.channels, norm.eps, run.device, run.policy, run.constants)
        for strip in self._source.read():
            moments.add(strip)
            self._queue.append(strip)
            del strip
        if run.finite and not moments.are_finite():
            raise NotFinite("a GroupNorm")
        if moments.second_pass():
            for strip in self._queue.read(last=False):
                moments.add(strip)
                del strip
        with borrowed(norm, run.device, wide(run.dtype)) as weights:
            self._affine = moments.affine(*weights)


class RmsNormInput(NormInput):
    """What an RMS norm is made of that attention follows, for which everything has to have come."""

    def __init__(self, source: Rows, norm: RmsNorm) -> None:
        super().__init__(source)
        self._normalise = rms_norm(norm, self.run)

    def normalise(self, strip: torch.Tensor) -> torch.Tensor:
        return self._normalise(strip)


def norm_input(source: Rows, norm: nn.GroupNorm | RmsNorm) -> NormInput:
    """All that ``norm`` is made of, waiting."""
    return RmsNormInput(source, norm) if isinstance(norm, RmsNorm) else GroupNormInput(source, norm)


def rms_norm(step: RmsNorm, run: Run) -> Function:
    """The norm of strips, in new tensors; in float32 where they are of half precision."""
    weights: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def normalise(strip: torch.Tensor) -> torch.Tensor:
        if not weights:
            with borrowed(step.module, run.device, wide(run.dtype)) as both:
                weights.append(both)
        return rms_normalised(strip.to(wide(run.dtype)), *weights[0], step.eps)

    return normalise


def filler(normalise: Function, function: Function | None, run: Run) -> Fill:
    """Fills the window of a convolution with what a norm, and the activation after it, make of a strip."""

    def fill(strip: torch.Tensor, window: torch.Tensor) -> None:
        values = normalise(strip)
        if function is silu and values.dtype == window.dtype and run.policy.writes_parts:
            torch.ops.aten.silu.out(values, out=window)
        else:
            window.copy_(values if function is None else function(values))

    return fill
