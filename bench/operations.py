"""Counts what a call asks of the compute device: operations, and the times that the host waits for it.

On a GPU every operation is a kernel that Python has to launch, and strips are many: what takes time there is how often, not how
much. The counts are those of the plan, whatever the values, and the same on a processor that plays a card (``counted``), with
tensors without values: a decode at 1024 px is counted in seconds. Statistics of a norm are some operations more there than with
CUDA's own kernels.

    python -m bench.operations

- Not an operation is what launches no kernel: views (an operation whose result is declared to share its argument's memory:
  ``view``, ``slice``, ``transpose``, ``detach``, ...; ``_unsafe_view``, which says nothing, too) and memory that nothing is
  written to (``empty`` and its kin). All others count once, also those that are some kernels inside.
- The host waits where it looks at a value (``item``, ``bool``, ``nonzero``, ``equal``), copies to or from the device without
  ``non_blocking``, and where it says so (``synchronize`` of a stream, an event or the device).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench import vae_call
from remote_vae.tiled import exact, offload
from remote_vae.tiled.budget import whole_values
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.tiled.offload import HostMemory, TemporaryFiles
from remote_vae.tiled.pinned import PinnedMemory
from remote_vae.tiled.policy import CARD

_ALLOCATES = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_"}
_SILENT_VIEWS = {"_unsafe_view", "_reshape_alias", "lift_fresh", "set_"}
_LOOKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
_COPIES = {"copy_", "_to_copy"}


class Operations(TorchDispatchMode):
    """Use as a context, under ``no_grad``: inference mode shows compound operations whole.

    Attributes:
        operations: those that are kernels.
        dispatched: all, views among them.
        synchronisations: how often the host waits.
        to_store, from_store: bytes of strips that were put away from the device and fetched again.
        names: how often which operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.dispatched = self.synchronisations = 0
        self.to_store = self.from_store = 0
        self.names: Counter[str] = Counter()
        self._patches = ExitStack()
        self._is_storing = False

    def __enter__(self) -> Operations:  # noqa: PYI034  # Self came with Python 3.11
        self._patches.enter_context(self._watching_store())
        self._patches.enter_context(self._watching_waits())
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace == "prim" or name == "promote_types":
            # Questions to tensors without values and to dtypes.
            return function(*args, **kwargs)
        self.dispatched += 1
        if name in _LOOKS or (name in _COPIES and self._waits(args, kwargs)):
            self.synchronisations += 1
        if not (name in _ALLOCATES or name in _SILENT_VIEWS or _is_view(function)):
            self.operations += 1
            self.names[name] += 1
        return function(*args, **kwargs)

    def _waits(self, args: Any, kwargs: Any) -> bool:
        """Whether a copy makes the host wait."""
        flags = [each for each in args if isinstance(each, bool)]
        if kwargs.get("non_blocking", flags[-1] if flags else False):
            return False
        devices = {leaf.device.type for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
        # A processor that plays a card copies from memory to memory.
        return len(devices) > 1 or self._is_storing

    @contextmanager
    def _watching_store(self) -> Iterator[None]:
        def noting(method: Any, *, is_put: bool, is_file: bool) -> Any:
            def noted(place: Any, given: Any) -> Any:
                size = given.form.nbytes if hasattr(given, "form") else given.nbytes
                self.to_store += size if is_put else 0
                self.from_store += 0 if is_put else size
                # Files are written by the processor itself.
                self._is_storing = not is_file
                try:
                    return method(place, given)
                finally:
                    self._is_storing = False

            return noted

        with ExitStack() as stack:
            for kind in (HostMemory, TemporaryFiles):
                for name in ("put", "fetch"):
                    noted = noting(getattr(kind, name), is_put=name == "put", is_file=kind is TemporaryFiles)
                    stack.enter_context(patch.object(kind, name, noted))
            yield

    @contextmanager
    def _watching_waits(self) -> Iterator[None]:
        def noting(method: Any) -> Any:
            def noted(*args: Any, **kwargs: Any) -> Any:
                self.synchronisations += 1
                return method(*args, **kwargs)

            return noted

        with ExitStack() as stack:
            if torch.cuda.is_available():
                for owner in (torch.cuda.Stream, torch.cuda.Event, torch.cuda):
                    stack.enter_context(patch.object(owner, "synchronize", noting(owner.synchronize)))
            yield


def _is_view(function: Any) -> bool:
    returns = function._schema.returns  # noqa: SLF001
    return bool(returns) and any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


class _Unread(TorchDispatchMode):
    """Tensors without values are finite and true for whoever looks."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001
            return 1
        return function(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Within, tensors have shapes and no values, and a whole decode takes neither time nor memory."""
    # What is taken of the host's memory has no values either, and is for nobody after it.
    with patch.object(offload, "PINNED", PinnedMemory()), FakeTensorMode(allow_non_fake_inputs=True), _Unread():
        yield


@dataclass(frozen=True)
class Counted:
    """What a call came to."""

    operations: int
    dispatched: int
    synchronisations: int
    to_store: int
    from_store: int


def counted(op: str, size: int, share: float | None = None, dtype: torch.dtype = torch.float32) -> Counted:
    """The exact tiled ``op`` of the sd architecture at ``size`` x ``size`` pixels on a card that a processor plays.

    Args:
        op: "decode" or "encode".
        size: of a side.
        share: of the bytes that are alive in the whole VAE, how many it may take; None: no limit.
        dtype: of weights and values.
    """
    with torch.no_grad(), without_values():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            vae = vae_call.load("sd")
        finally:
            torch.set_default_dtype(before)
        decodes = op == "decode"
        plan = decoder_plan(vae) if decodes else encoder_plan(vae)
        batch = torch.empty((1, 4, size // 8, size // 8) if decodes else (1, 3, size, size), dtype=dtype)
        whole = whole_values(plan, *batch.shape[2:]) * dtype.itemsize
        limits = exact.Limits(None if share is None else int(share * whole), policy=CARD)
        with Operations() as count:
            exact.run(plan, vae, batch, limits)
    return Counted(count.operations, count.dispatched, count.synchronisations, count.to_store, count.from_store)


def main() -> None:
    print(f"{'op':<8}{'px':>6}{'of the bytes':>14}{'operations':>12}{'with views':>12}{'waits':>7}{'MB out':>9}{'MB back':>9}")
    for dtype in (torch.float32, torch.float16):
        print(dtype)
        for op in ("decode", "encode"):
            for share in (None, 0.3, 0.1):
                made = counted(op, 1024, share, dtype)
                print(
                    f"{op:<8}{1024:>6}{share or 'no limit':>14}{made.operations:>12}{made.dispatched:>12}"
                    f"{made.synchronisations:>7}{made.to_store / 1e6:>9.0f}{made.from_store / 1e6:>9.0f}"
                )


if __name__ == "__main__":
    main()
