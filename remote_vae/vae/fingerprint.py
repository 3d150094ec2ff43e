"""Which VAE it is: a name for the weights that a host has loaded, to compare with what an endpoint says of its own."""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, Union

import torch

log = logging.getLogger("remote_vae")

# What a fingerprint can be made of: the weights rounded to these dtypes, one after the other. Two that hold the same VAE in
# different dtypes agree in one of them: float32 and float16 copies in the first, float32 and bfloat16 copies in the second, and
# a float32 copy with a bfloat16 one that was made of a float16 one in the third.
ROUNDINGS: Mapping[str, tuple[torch.dtype, ...]] = {
    "float16": (torch.float16,),
    "bfloat16": (torch.bfloat16,),
    "float16_bfloat16": (torch.float16, torch.bfloat16),
}

# A look at the weights: so many tensors, spread over encoder and decoder, and so many values of each.
_LOOK_TENSORS = 16
_LOOK_VALUES = 4
# A VAE that is now in float32 and now in float16, as in diffusers' SDXL pipelines, is known in both.
_KEPT_LOOKS = 12

_Look = tuple[Union[torch.dtype, bytes], ...]
V = TypeVar("V")


@dataclass(frozen=True)
class Identity:
    """The VAE of a call. May be used from many threads; a new one for the same VAE costs nothing.

    Attributes:
        vae: the torch module, of any project, on any device.
        picked: name of the VAE file that the user picked in the UI; "" for the model's own.
    """

    vae: Any
    picked: str = ""

    def fingerprint(self) -> tuple[str, str] | None:
        """The rounding that suits the VAE's dtype, and its fingerprint in that; None where the weights cannot be read."""
        try:
            dtypes = {weight.dtype for weight in _weights(self.vae)}
            rounding = "bfloat16" if dtypes == {torch.bfloat16} else "float16"
            return rounding, _fingerprint(self.vae, rounding)
        except Exception as error:  # whatever a host keeps there, the call goes on without
            log.debug("no fingerprint of %s: %s", type(self.vae).__name__, error)
            return None

    def look(self) -> object:
        """What changes with the weights, at the price of a few bytes; None where they cannot be read."""
        try:
            return _look(self.vae)
        except Exception:  # as above
            return None

    def matches(self, theirs: Mapping[str, str]) -> bool | None:
        """Whether ``theirs``, fingerprints by rounding, are of this VAE; None where that cannot be told.

        One that agrees is enough, whatever the roundings: see ``families.ROUNDINGS``.
        """
        own = self.fingerprint() if theirs else None
        if own is None:
            return None
        rounding, name = own
        if name in theirs.values():
            return True
        if any(self._in(theirs.values(), other) for other in ROUNDINGS if other != rounding):
            return True
        return False if rounding in theirs else None

    def _in(self, theirs: Collection[str], rounding: str) -> bool:
        try:
            return _fingerprint(self.vae, rounding) in theirs
        except Exception:  # as above
            return False


class ByLook(Generic[V]):
    """What is known of each VAE of the process while its weights are what they are. Keeps no VAE alive. For many threads.

    Args:
        make: gives what is known at first.
    """

    def __init__(self, make: Callable[[], V]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._by_vae: weakref.WeakKeyDictionary[Any, dict[_Look, V]] = weakref.WeakKeyDictionary()

    def of(self, vae: Any) -> V:
        """The same object until the host loads other weights into ``vae`` or converts them.

        Raises:
            ValueError: the weights cannot be read.
        """
        look = _look(vae)
        with self._lock:
            by_look = self._by_vae.setdefault(vae, {})
            if look not in by_look:
                while len(by_look) >= _KEPT_LOOKS:
                    del by_look[next(iter(by_look))]
                by_look[look] = self._make()
            return by_look[look]

    def still(self, vae: Any, known: V) -> None:
        """What was just found out of ``vae`` is of ``known``. Raises ValueError: the weights were changed meanwhile."""
        if self.of(vae) is not known:
            raise ValueError("its weights are being changed")

    def all(self) -> list[V]:
        """Of every VAE and look."""
        with self._lock:
            return [known for by_look in self._by_vae.values() for known in by_look.values()]


@dataclass
class _Names:
    """The fingerprints of one VAE by rounding."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    by_rounding: dict[str, str] = field(default_factory=dict)


_names = ByLook(_Names)


def _fingerprint(vae: Any, rounding: str) -> str:
    """From memory where it is known. Raises ValueError."""
    names = _names.of(vae)
    with names.lock:
        if rounding not in names.by_rounding:
            name = fingerprint(vae.state_dict(), rounding)
            _names.still(vae, names)
            names.by_rounding[rounding] = name
        return names.by_rounding[rounding]


def _weights(vae: Any) -> list[torch.Tensor]:
    """The parameters of ``vae``. Raises ValueError where there are none, or where offloading has left only their shapes."""
    weights = [parameter.detach() for parameter in vae.parameters()]
    if not weights or any(weight.is_meta for weight in weights):
        raise ValueError("its weights are not here")
    return weights


def _look(vae: Any) -> _Look:
    """What changes with the weights and with their dtype, and not with their device. Reads a few bytes."""
    weights = _weights(vae)
    values = []
    for weight in weights[:: max(1, len(weights) // _LOOK_TENSORS)]:
        while weight.ndim > 1:
            weight = weight[0]
        values.append(weight.reshape(-1)[:_LOOK_VALUES].to("cpu").to(torch.float32).numpy().tobytes())
    return (*(weight.dtype for weight in weights), *values)


def fingerprint(state: Mapping[str, torch.Tensor], rounding: str = "float16") -> str:
    """A name for the weights that does not depend on who stores them how.

    Each tensor is rounded, to float16 by default, and hashed with its shape less the axes of length 1, and the hashes are
    hashed in sorted order. So the same VAE gives the same text in float32 and float16, with diffusers' names and ldm's, with
    linear attention and with 1x1 convolutions.

    Args:
        state: the weights, on any device; they come to the CPU one by one.
        rounding: a key of ``ROUNDINGS``.

    Returns:
        16 hexadecimal digits (64 bit).
    """
    digests = []
    for tensor in state.values():
        values = tensor.detach().to("cpu")
        for dtype in ROUNDINGS[rounding]:
            values = values.to(dtype)
        values = values.contiguous()
        shape = ",".join(str(size) for size in values.shape if size != 1)
        digest = hashlib.sha256(shape.encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]
