"""Counts the bytes of all tensors that are alive, from the operations that make them.

Peak RSS has in it whatever the allocator keeps and the libraries do, and where a host's memory is the store for a GPU it cannot
tell the two apart. Here every storage that comes out of an operation counts from then on until it is freed, once, however
many tensors look at it. What an operation needs only while it runs (a convolution's workspace) is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from remote_vae.tiled.offload import HostMemory, TemporaryFiles

STORE = "store"


class LiveBytes(TorchDispatchMode):
    """Use as a context, under ``no_grad``: inference mode shows compound operations whole, and not what they make inside.

    Attributes:
        now, peak: bytes by device ("cpu", "cuda:0"); under "store" strips that the tiled VAE has put away.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._counted: set[int] = set()
        self._is_storing = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # A view of something older than the count: nothing new.
        given = {_key(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if _key(storage) not in given and _key(storage) not in self._counted:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        label = STORE if self._is_storing else str(storage.device)
        key, size = _key(storage), storage.nbytes()
        self._counted.add(key)
        self._change(label, size)
        weakref.finalize(storage, self._remove, key, label, size).atexit = False

    def _remove(self, key: int, label: str, size: int) -> None:
        self._counted.discard(key)
        self._change(label, -size)

    def _change(self, label: str, size: int) -> None:
        self.now[label] += size
        self.peak[label] = max(self.peak[label], self.now[label])

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Within, strips that the tiled VAE puts away count as stored: those in files, and copies that stay on the CPU."""
        put, put_file, drop_file = HostMemory.put, TemporaryFiles.put, TemporaryFiles.drop

        def to_host(place: HostMemory, strip: torch.Tensor) -> Any:
            self._is_storing = True
            try:
                return put(place, strip)
            finally:
                self._is_storing = False

        def to_file(place: TemporaryFiles, strip: torch.Tensor) -> Any:
            self._change(STORE, strip.nbytes)
            return put_file(place, strip)

        def from_file(place: TemporaryFiles, stored: Any) -> None:
            self._change(STORE, -stored.form.nbytes)
            drop_file(place, stored)

        HostMemory.put, TemporaryFiles.put, TemporaryFiles.drop = to_host, to_file, from_file  # type: ignore[method-assign]
        try:
            yield
        finally:
            HostMemory.put, TemporaryFiles.put, TemporaryFiles.drop = put, put_file, drop_file  # type: ignore[method-assign]


def _key(storage: torch.UntypedStorage) -> int:
    """The same for all Python objects of one storage; used again when it is freed."""
    return storage._cdata  # noqa: SLF001


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()
