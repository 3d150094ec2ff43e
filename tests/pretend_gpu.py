"""A GPU for machines that have none: its tensors say that they are on ``cuda:0``, and values, memory and order are kept.

The values are computed on the processor. Beside them, as CUDA does it:

- an operation on tensors of both devices is an error, and so is a look at a tensor of the card from outside;
- the card has a size: what finds no room in it is ``torch.cuda.OutOfMemoryError``;
- what crosses over into another dtype is converted before, where it comes from, and needs room there;
- a copy that does not block is done when somebody waits for its stream, and its target is NaN until then;
- mistakes that a real card answers with wrong pictures, now and then, are noted: reading in a stream what another has not
  finished, and letting go of memory that another stream is still to use.

It knows no kernels: what they cost, what they need while they run and how they round is not seen here.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from remote_vae.tiled import memory, offload, pinned
from tests.versions import NO_END_OF_STORAGES

DEVICE = torch.device("cuda", 0)
LATENTS = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
PIXELS = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2)) * 2 - 1
_FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "as_tensor", "linspace", "rand", "randn", "eye"}
# These would need the values where the processor can see them.
_OUTSIDE = {"numpy", "__array__", "__dlpack__", "data_ptr", "share_memory_"}
# The host has to wait for them.
_LOOKS = {"item", "tolist", "__bool__", "__float__", "__int__", "nonzero", "equal"}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ixor__"}
# They change the tensor object itself, not what is in its memory.
_OF_THE_OBJECT = {"__set__", "requires_grad_", "detach_"}


def _batch_norm_stats(given: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel."""
    variance, mean = torch.var_mean(given.float() if given.dtype.itemsize < 4 else given, (0, 2, 3), correction=0)
    return mean, (variance + eps).rsqrt()


def _gather_stats(
    given: torch.Tensor,
    means: torch.Tensor,
    spreads: torch.Tensor,
    running_mean: None,
    running_var: None,
    momentum: float,
    eps: float,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of parts ``[N, C]`` of so many values, one after the other as CUDA's kernel joins them."""
    if counts.dtype != given.dtype or means.dtype != torch.promote_types(given.dtype, torch.float32):
        raise RuntimeError(f"expected scalar type {given.dtype} but found {counts.dtype}")
    mean, squares, count = torch.zeros_like(means[0]), torch.zeros_like(means[0]), 0.0
    for other, spread, more in zip(means, spreads, counts.tolist(), strict=True):
        squares = squares + (spread**-2 - eps) * more + (mean - other) ** 2 * count * more / (count + more)
        mean = (count * mean + more * other) / (count + more)
        count += more
    return mean, (squares / count + eps).rsqrt()


# What only CUDA has.
_KERNELS = {"batch_norm_stats": _batch_norm_stats, "batch_norm_gather_stats_with_counts": _gather_stats}


class OnCard(torch.Tensor):
    """A tensor whose values are on the card."""

    device = property(lambda _: DEVICE)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]

    def record_stream(self, stream: Any) -> None:
        """Not an operation here, as torch's takes no stream but its own."""
        _card().record(self, stream)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Card.active is None:
            return func(*tree_map(_values, args), **tree_map(_values, kwargs or {}))
        return Card.active.call(func, args, kwargs or {})


class Stream:
    """As ``torch.cuda.Stream``. Copies wait in it until somebody waits for them."""

    def __init__(self, device: Any = DEVICE, **_: Any) -> None:
        if torch.device(device).type != "cuda":
            raise ValueError(f"a stream of {device}")
        self.clock = 0
        self.seen: dict[Stream, int] = {}
        self.pending: list[tuple[int, Callable[[], Any]]] = []

    def record_event(self) -> Event:
        return Event(self, self.clock, dict(self.seen))

    def wait_event(self, event: Event) -> None:
        event.finish()
        for stream, clock in (*event.seen.items(), (event.stream, event.clock)):
            self.seen[stream] = max(self.seen.get(stream, 0), clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        _card().waits += 1
        for stream in _card().streams:
            stream.wait_stream(self)

    def finish(self, until: int) -> None:
        """Everything that was asked for up to a time is done."""
        while self.pending and self.pending[0][0] <= until:
            self.pending.pop(0)[1]()


@dataclass
class Event:
    """As ``torch.cuda.Event``: a time of a stream, and what that had seen of others."""

    stream: Stream
    clock: int
    seen: dict[Stream, int]

    def query(self) -> bool:
        return not self.stream.pending or self.stream.pending[0][0] > self.clock

    def finish(self) -> None:
        for stream, clock in self.seen.items():
            stream.finish(clock)
        self.stream.finish(self.clock)


@dataclass
class _Block:
    """Memory of the card.

    Attributes:
        owner: the stream that it was taken in.
        writer, written: the stream that wrote it last, and when.
        users, recorded: the streams that have used it and when, and those that it is kept for.
    """

    size: int
    owner: Stream
    writer: Stream
    written: int
    users: dict[Stream, int] = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)


class Card(TorchFunctionMode):
    """Use as a context.

    Attributes:
        size: bytes.
        live, peak: bytes in use, and the most there have been.
        put_away: bytes that were copied to pinned memory without waiting for it.
        most_pinned: how many bytes the system lets be pinned.
        pinned_bytes, kept_pinned_bytes: those in use, and those that torch keeps for the next who asks.
        waits: how often the host has waited for the card.
        mistakes: what a real card might have answered with a wrong picture.
    """

    active: Card | None = None

    def __init__(self, size: int = 1 << 40) -> None:
        super().__init__()
        self.size = size
        self.live = self.peak = self.put_away = 0
        self.most_pinned = 1 << 40
        self.pinned_bytes = self.kept_pinned_bytes = 0
        self.waits = 0
        self.mistakes: list[str] = []
        self.streams = [Stream()]
        self._current = [self.streams[0]]
        self._blocks: dict[int, _Block] = {}
        self._pinned: set[int] = set()

    # --- for tests ---------------------------------------------------------------------------------------------------

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` on the card."""
        return self._wrap(tensor.detach().clone())

    def put_module(self, module: Any) -> Any:
        """Move ``module`` itself, as ``module.cuda()`` does."""
        for part in module.modules():
            for held, made in ((part._parameters, nn.Parameter), (part._buffers, None)):
                for name, tensor in held.items():
                    if tensor is not None:
                        moved = self.put(tensor)
                        held[name] = moved if made is None else made(moved, requires_grad=False)
        return module

    def taken_by(self, call: Callable[[], Any]) -> int:
        """How many bytes more than before are in use at the peak of ``call``, none after it. Then the peak counts anew."""
        if NO_END_OF_STORAGES:
            pytest.skip(NO_END_OF_STORAGES)
        self.peak = before = self.live
        call()
        assert self.live == before
        taken, self.peak = self.peak - before, self.live
        return taken

    # --- as torch.cuda -----------------------------------------------------------------------------------------------

    def new_stream(self, device: Any = DEVICE, **_: Any) -> Stream:
        stream = Stream(device)
        self.streams.append(stream)
        return stream

    def current_stream(self, device: Any = None) -> Stream:
        return self._current[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        """``stream`` will use ``tensor``: its memory is not to be given to others before that is done."""
        self._block(tensor).recorded.add(stream)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.size - self.live, self.size

    def empty_host_cache(self) -> None:
        self.kept_pinned_bytes = 0

    def memory_allocated(self, device: Any = None) -> int:
        return self.live

    # --- what is called ----------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]
        if func == torch.Tensor.data.__set__:
            return self._replace(*args)
        if name in _OF_THE_OBJECT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in ("to", "cpu", "cuda"):
            return self._to(*args, **{**kwargs, **({} if name == "to" else {"device": name})})
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if name in _KERNELS:
            return self._compute(_KERNELS[name], name, args, kwargs)
        if name in _FACTORIES or name.endswith("_like") or name.startswith("new_"):
            return self._make(func, args, kwargs)
        return self._compute(func, name, args, kwargs)

    def _compute(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
        if not ours:
            return func(*args, **kwargs)
        if name in _OUTSIDE:
            raise TypeError(f"can't convert cuda:0 device type tensor: {name}")
        if name not in ("__getitem__", "__setitem__") and any(
            not isinstance(tensor, OnCard) and tensor.dim() for tensor in tensors
        ):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {name}")
        for tensor in ours:
            self._read(tensor)
        if name in _LOOKS:
            self.waits += 1
        result = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
            target = kwargs.get("out", args[0] if args else None)
            self._write(target)
            return target
        return tree_map(lambda leaf: self._wrap(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)

    def _make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args and isinstance(args[0], torch.Tensor) else None
        device = kwargs.pop("device", None)
        is_ours = isinstance(given, OnCard) if device is None else torch.device(device).type == "cuda"
        is_pinned = kwargs.pop("pin_memory", False)
        if is_pinned and is_ours:
            raise RuntimeError("only memory of the host can be pinned")
        made = func(*tree_map(_values, args), **kwargs)
        if is_pinned:
            self._pin(made)
        return self._wrap(made) if is_ours else made

    def _pin(self, tensor: torch.Tensor) -> None:
        key, size = _key(tensor), tensor.nbytes
        reused = size if self.kept_pinned_bytes >= size else 0
        if self.pinned_bytes + self.kept_pinned_bytes + size - reused > self.most_pinned:
            # Which older ones have no name of its own for.
            raise getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory")
        self.kept_pinned_bytes -= reused
        self._pinned.add(key)
        self.pinned_bytes += size

        def unpin() -> None:
            self._pinned.discard(key)
            self.pinned_bytes -= size
            self.kept_pinned_bytes += size

        weakref.finalize(tensor.untyped_storage(), unpin).atexit = False

    def _to(self, tensor: torch.Tensor, *args: Any, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        rest = []
        for each in args:
            if isinstance(each, (str, torch.device)):
                device = each
            elif isinstance(each, torch.Tensor):
                device = each.device
                rest.append(each.dtype)
            elif each is not None:
                rest.append(each)
        is_ours = isinstance(tensor, OnCard)
        goes = is_ours if device is None else torch.device(device).type == "cuda"
        if is_ours:
            self._read(tensor)
        values = _values(tensor)
        if goes is is_ours:
            result = values.to(*rest, **kwargs)
            return tensor if result is values else self._wrap(result) if is_ours else result
        moved = values.to(*rest, **{**kwargs, "copy": True})
        if is_ours and moved.dtype != values.dtype:
            self._wrap(moved.clone())
        result = self._wrap(moved) if goes else moved
        if not non_blocking:
            self.waits += 1
        else:
            if not goes:
                raise NotImplementedError("a copy to memory that torch would pin by itself")
            self._later(result, values, waits=not self._is_pinned(values))
        return result

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        for tensor in (target, source):
            if isinstance(tensor, OnCard):
                self._read(tensor)
        crosses = isinstance(target, OnCard) is not isinstance(source, OnCard)
        if crosses and isinstance(source, OnCard) and target.dtype != source.dtype:
            self._wrap(_values(source).to(target.dtype))
        if crosses and not non_blocking:
            self.waits += 1
        if non_blocking and crosses:
            outside = source if isinstance(target, OnCard) else target
            self._later(target, _values(source), waits=not self._is_pinned(outside))
        else:
            _values(target).copy_(_values(source))
            self._write(target)
        return target

    def _later(self, target: torch.Tensor, source: torch.Tensor, *, waits: bool) -> None:
        """Copy when the current stream comes to it; ``waits``: for memory that is not pinned that is at once."""
        stream, values = self._current[-1], _values(target)
        is_ours = isinstance(target, OnCard)
        if not waits and not is_ours:
            self.put_away += target.nbytes
        if waits:
            self.waits += 1
            values.copy_(source)
        else:
            # What is on the card is kept by those who have it alone, and the mistake noted where they do not.
            given = source if is_ours else source.clone()
            values.fill_(torch.nan if values.is_floating_point() else 0)
            stream.clock += 1
            stream.pending.append((stream.clock, lambda: values.copy_(given)))
        self._write(target)

    def _replace(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """``tensor.data = values``: the same object may be on the other device afterwards."""
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(tensor, _values(values))
        tensor.__class__ = OnCard if isinstance(values, OnCard) else nn.Parameter

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, OnCard) and _key(tensor) in self._pinned

    # --- memory and order --------------------------------------------------------------------------------------------

    def _wrap(self, tensor: torch.Tensor) -> torch.Tensor:
        storage, key, stream = tensor.untyped_storage(), _key(tensor), self._current[-1]
        if key not in self._blocks:
            size = storage.nbytes()
            if self.live + size > self.size:
                raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
            stream.clock += 1
            self._blocks[key] = _Block(size, stream, stream, stream.clock)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key).atexit = False
        # Not as_subclass, whose result keeps the tensor that it was made of.
        return torch.Tensor._make_subclass(OnCard, tensor)

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        self.live -= block.size
        owner = block.owner
        others = block.users.keys() - block.recorded - {owner}
        if any(owner.seen.get(stream, 0) < block.users[stream] for stream in others):
            self.mistakes.append("memory was let go of that another stream may still be using")

    def _block(self, tensor: torch.Tensor) -> _Block:
        return self._blocks[_key(tensor)]

    def _read(self, tensor: torch.Tensor) -> None:
        stream, block = self._current[-1], self._block(tensor)
        stream.clock += 1
        block.users[stream] = stream.clock
        if block.writer is not stream and stream.seen.get(block.writer, 0) < block.written:
            self.mistakes.append("a stream reads what it has not waited for")

    def _write(self, tensor: Any) -> None:
        if not isinstance(tensor, OnCard):
            return
        stream, block = self._current[-1], self._block(tensor)
        if any(stream.seen.get(user, 0) < clock for user, clock in block.users.items() if user is not stream):
            self.mistakes.append("a stream overwrites what another may still be using")
        stream.clock += 1
        block.writer, block.written = stream, stream.clock
        block.users[stream] = stream.clock


def on_card(card: Card, vae: Any, op: str, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Move ``vae`` to the card.

    Returns:
        What goes into ``op``, on the card; what it gives on the processor; how many bytes it takes on the card.
    """
    given = (LATENTS if op == "decode" else PIXELS).repeat(batch, 1, 1, 1)
    true = values(getattr(vae, op)(given))
    given = card.put(given)
    card.put_module(vae)
    return given, true, card.taken_by(lambda: getattr(vae, op)(given))


def values(output: Any) -> torch.Tensor:
    """Of diffusers' outputs: pixels or moments."""
    tensor: torch.Tensor = output.sample if hasattr(output, "sample") else output.latent_dist.parameters
    return tensor


def _card() -> Card:
    assert Card.active is not None
    return Card.active


def _values(leaf: Any) -> Any:
    """Of the card's tensors what is in them, as the processor's; all else as it is."""
    if not isinstance(leaf, OnCard):
        return leaf
    with torch._C.DisableTorchFunctionSubclass():
        return leaf.as_subclass(torch.Tensor)


def _key(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()._cdata


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A card, which ``torch.cuda`` speaks of. At the end there must not have been a mistake."""
    card = Card()
    # Nothing that was pinned for another card.
    fresh = pinned.PinnedMemory()
    for module in (pinned, offload, memory):
        monkeypatch.setattr(module, "PINNED", fresh)
    faces: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "mem_get_info": card.mem_get_info,
        "memory_allocated": card.memory_allocated,
        "memory_reserved": card.memory_allocated,
        "Stream": card.new_stream,
        "current_stream": card.current_stream,
        "stream": card.stream,
        "empty_cache": lambda: None,
    }
    for name, face in faces.items():
        monkeypatch.setattr(torch.cuda, name, face)
    monkeypatch.setattr(torch._C, "_host_emptyCache", card.empty_host_cache, raising=False)
    monkeypatch.setattr(Card, "active", card)
    with card:
        yield card
    assert not any(stream.pending for stream in card.streams)
    # What is only held by a circle of references is let go of now.
    gc.collect()
    assert not card.mistakes
