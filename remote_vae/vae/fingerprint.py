"""Which VAE a torch module is: a fingerprint of its weights, to compare with what an endpoint says of its own."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
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

# An excerpt of the weights: so many tensors, spread over encoder and decoder, and so many values of each.
_EXCERPT_TENSORS = 16
_EXCERPT_VALUES = 4
# A VAE that is now in float32 and now in float16, as in diffusers' SDXL pipelines, is known in both.
_KEPT_EXCERPTS = 12

# What modules keep among their weights and do not compute with, or not as weights: projections of time steps that no VAE has,
# and the factors of the latents that ComfyUI keeps beside a TAESD.
_NOT_WEIGHTS = re.compile(r"(^|\.)(temb_proj\.\w+|vae_scale|vae_shift)$")

Excerpt = tuple[Union[torch.dtype, bytes], ...]
V = TypeVar("V")


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
    for name, tensor in state.items():
        # Whole numbers are counters, such as the training steps of a batch norm, and not every file has them.
        if not tensor.is_floating_point() or _NOT_WEIGHTS.search(name):
            continue
        values = tensor.detach().to("cpu")
        for dtype in ROUNDINGS[rounding]:
            values = values.to(dtype)
        values = values.contiguous()
        shape = ",".join(str(size) for size in values.shape if size != 1)
        digest = hashlib.sha256(shape.encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def fingerprint_of(module: Any) -> tuple[str, str] | None:
    """The rounding that suits the dtype of ``module``, and its fingerprint in that; None where its weights cannot be read.

    The weights are hashed once: see ``ByWeights``.
    """
    try:
        dtypes = {weight.dtype for weight in _weights(module).values() if weight.is_floating_point()}
        rounding = "bfloat16" if dtypes == {torch.bfloat16} else "float16"
        return rounding, _remembered(module, rounding)
    except Exception as error:  # whatever a host keeps there, the call goes on without
        log.debug("no fingerprint of %s: %s", type(module).__name__, error)
        return None


def matches(module: Any, theirs: Mapping[str, str]) -> bool | None:
    """Whether ``theirs``, fingerprints by rounding, are of the weights of ``module``; None where that cannot be told.

    One that agrees is enough, whatever the roundings: see ``ROUNDINGS``.
    """
    own = fingerprint_of(module) if theirs else None
    if own is None:
        return None
    rounding, name = own
    if name in theirs.values():
        return True
    if any(_is_among(module, theirs.values(), other) for other in ROUNDINGS if other != rounding):
        return True
    return False if rounding in theirs else None


def match_among(module: Any, several: Sequence[Mapping[str, str]]) -> int | None:
    """Which of several VAEs, by their fingerprints, ``module`` is, as in ``matches``; None: none of them, or not known."""
    own = fingerprint_of(module) if any(several) else None
    if own is None:
        return None
    for rounding in (own[0], *(other for other in ROUNDINGS if other != own[0])):
        for index, theirs in enumerate(several):
            if theirs and _is_among(module, theirs.values(), rounding):
                return index
    return None


def excerpt(module: Any) -> Excerpt | None:
    """A few bytes of the weights: others when the host loads other weights or converts them. None: they cannot be read."""
    try:
        return _excerpt(module)
    except Exception:  # as above
        return None


class ByWeights(Generic[V]):
    """What is known of each VAE of the process while its weights are what they are. Keeps no VAE alive. For many threads.

    Args:
        make: gives what is known at first.
    """

    def __init__(self, make: Callable[[], V]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._by_module: weakref.WeakKeyDictionary[Any, dict[Excerpt, V]] = weakref.WeakKeyDictionary()

    def of(self, module: Any) -> V:
        """The same object until the host loads other weights into ``module`` or converts them.

        Raises:
            ValueError: the weights cannot be read.
        """
        found = _excerpt(module)
        with self._lock:
            by_excerpt = self._by_module.setdefault(module, {})
            if found not in by_excerpt:
                while len(by_excerpt) >= _KEPT_EXCERPTS:
                    del by_excerpt[next(iter(by_excerpt))]
                by_excerpt[found] = self._make()
            return by_excerpt[found]

    def ensure_unchanged(self, module: Any, known: V) -> None:
        """What was just found out of ``module`` is of ``known``. Raises ValueError: the weights were changed meanwhile."""
        if self.of(module) is not known:
            raise ValueError("its weights are being changed")

    def all(self) -> list[V]:
        """Of every VAE and all its weights."""
        with self._lock:
            return [known for by_excerpt in self._by_module.values() for known in by_excerpt.values()]


@dataclass
class _Fingerprints:
    """Those of one VAE by rounding."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    by_rounding: dict[str, str] = field(default_factory=dict)


_fingerprints = ByWeights(_Fingerprints)


def _remembered(module: Any, rounding: str) -> str:
    """From memory where it is known. Raises ValueError."""
    known = _fingerprints.of(module)
    with known.lock:
        if rounding not in known.by_rounding:
            name = fingerprint(_weights(module), rounding)
            _fingerprints.ensure_unchanged(module, known)
            known.by_rounding[rounding] = name
        return known.by_rounding[rounding]


def _is_among(module: Any, theirs: Collection[str], rounding: str) -> bool:
    try:
        return _remembered(module, rounding) in theirs
    except Exception:  # as above
        return False


def _weights(module: Any) -> dict[str, torch.Tensor]:
    """The state dict of ``module``, with the weights that accelerate has put away.

    Raises:
        ValueError: there are none, or only their shapes are here.
    """
    weights: dict[str, torch.Tensor] = {
        name: _put_away(module, name) if tensor.is_meta else tensor for name, tensor in module.state_dict().items()
    }
    if not weights:
        raise ValueError("it has no weights")
    return weights


def _put_away(module: Any, name: str) -> torch.Tensor:
    """One weight that accelerate's sequential offload brings in only while its layer runs. Raises ValueError."""
    layer, _, weight = name.rpartition(".")
    hook = getattr(module.get_submodule(layer), "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        found = getattr(part, "weights_map", None)
        if found is not None:
            tensor: torch.Tensor = found[weight]
            return tensor
    raise ValueError("its weights are not here")


def _excerpt(module: Any) -> Excerpt:
    """What changes with the weights and with their dtype, and not with their device. Reads a few bytes."""
    weights = list(_weights(module).values())
    values = []
    for weight in weights[:: max(1, len(weights) // _EXCERPT_TENSORS)]:
        while weight.ndim > 1:
            weight = weight[0]
        values.append(weight.detach().reshape(-1)[:_EXCERPT_VALUES].to("cpu").to(torch.float32).numpy().tobytes())
    return (*(weight.dtype for weight in weights), *values)
