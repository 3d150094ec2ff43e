"""Linear attention over a whole picture, exactly, in strips: its sums over all positions come first, and then every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch.nn.functional import linear

from remote_vae.tiled.convolution import SlidingConv, flops_of
from remote_vae.tiled.local_steps import rms_normalised, wide
from remote_vae.tiled.plan import LinearAttention
from remote_vae.tiled.rows import NotFinite, Rows, pieces
from remote_vae.tiled.store import RowReader
from remote_vae.tiled.weights import borrowed

# A position's share in the float32 sums of its own head, and its query's answer from them.
_OF_A_PAIR = 4.0


class LinearlyAttended(Rows):
    """Linear attention and its residual. What waits for the sums are the queries of each scale, and the residual."""

    def __init__(self, source: Rows, step: LinearAttention) -> None:
        positions = source.height * source.width
        self._inner = step.inner
        mixing = _OF_A_PAIR * self._inner * (step.head + 1) * (1 + len(step.scales))
        scales = sum(flops_of(conv, source) for scale in step.scales for conv in scale)
        phase = source.run.next_phase()
        super().__init__(source, source.channels, source.height, source.width, (mixing + scales) * positions, phase=phase)
        self._mixing = mixing * self.width / 2
        self._source = source
        self._step = step
        self._heads = [_Heads(source, self._inner // step.head, step) for _ in range(1 + len(step.scales))]
        self._taken_rows = source.rows_of(self.width, 3 * self._inner, self._mixing)
        self._rows = self.rows_of(self.width, 3 * self._inner, self._mixing)

    def read(self) -> Iterator[torch.Tensor]:
        step, run = self._step, self.run
        waiting = self._source.queue()
        self._collect(waiting.append)
        dtype = wide(run.dtype)
        queries = [RowReader(heads.queries.read(last=True)) for heads in self._heads]
        with (
            borrowed(step.out, run.device, run.dtype) as out,
            borrowed(step.norm.module, run.device, dtype) as norm,
        ):
            for strip in waiting.read(last=True):
                for piece in pieces(strip, self._rows):
                    parts = [self._mix(*both, piece.shape[2]) for both in zip(self._heads, queries, strict=True)]
                    mixed = linear(torch.cat(parts, 1).movedim(1, -1), out[0].flatten(1), out[1]).movedim(-1, 1)
                    del parts
                    yield rms_normalised(mixed.to(dtype), *norm, step.norm.eps).add_(piece).to(piece.dtype)
                    del mixed
                    run.tick(self._mixing * piece.shape[2])
                    del piece
                del strip

    def _collect(self, keep: Callable[[torch.Tensor], None]) -> None:
        """Every row's keys and values into the sums."""
        step, run = self._step, self.run
        base, *others = self._heads
        with ExitStack() as open_weights:
            parts = [
                open_weights.enter_context(borrowed(part, run.device, run.dtype)) for part in (step.query, step.key, step.value)
            ]
            joined = torch.cat([weight.flatten(1) for weight, _ in parts])
            biases = [bias for _, bias in parts if bias is not None]
            bias = torch.cat(biases) if len(biases) == len(parts) else None
            like = Rows(run, 3 * self._inner, self.height, self.width, phase=self._source.phase)
            chains = [[open_weights.enter_context(SlidingConv(conv, like, None)) for conv in scale] for scale in step.scales]
            for strip in self._source.read():
                keep(strip)
                for piece in pieces(strip, self._taken_rows):
                    tokens = linear(piece.to(run.dtype).movedim(1, -1), joined, bias).movedim(-1, 1)
                    base.add(tokens)
                    for heads, chain in zip(others, chains, strict=True):
                        for scaled in _through(chain, tokens):
                            heads.add(scaled)
                            del scaled
                    run.tick(self._mixing * piece.shape[2])
                    del piece, tokens
                del strip
        if run.finite and not all(heads.are_finite() for heads in self._heads):
            raise NotFinite("a linear attention")

    def _mix(self, heads: _Heads, queries: RowReader, rows: int) -> torch.Tensor:
        return torch.cat([heads.answer(query) for query in queries.read(rows)], 2)


class _Heads:
    """Sums over all positions of one scale: for each head keys times values, and keys. Queries wait for them here."""

    def __init__(self, source: Rows, count: int, step: LinearAttention) -> None:
        run = source.run
        self.queries = source.queue()
        self._head, self._eps, self._dtype = step.head, step.eps, run.dtype
        self._sums = torch.zeros(count, step.head + 1, step.head, device=run.device, dtype=run.policy.exact)

    def add(self, joined: torch.Tensor) -> None:
        """Queries, keys and values of some rows, ``[1, 3 C, n, W]``."""
        heads = joined.reshape(-1, 3 * self._head, *joined.shape[2:])
        query, key, value = heads.chunk(3, 1)
        self.queries.append(query.relu().reshape(1, -1, *joined.shape[2:]))
        dtype = wide(self._dtype)
        key, value = key.to(dtype).relu().flatten(2), value.to(dtype).flatten(2)
        self._sums[:, :-1] += value @ key.transpose(1, 2)
        self._sums[:, -1] += key.sum(2)

    def answer(self, query: torch.Tensor) -> torch.Tensor:
        """``[1, C, n, W]`` of the queries of some rows."""
        dtype = wide(self._dtype)
        mixed = self._sums.to(dtype) @ query.to(dtype).reshape(self._sums.shape[0], self._head, -1)
        return (mixed[:, :-1] / mixed[:, -1:].add_(self._eps)).reshape(query.shape).to(self._dtype)

    def are_finite(self) -> bool:
        return bool(torch.isfinite(self._sums).all())


def _through(chain: list[SlidingConv], strip: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows that have become possible at the end of some convolutions."""
    first, *rest = chain
    for out in first.push(strip):
        if rest:
            yield from _through(rest, out)
        else:
            yield out
        del out
