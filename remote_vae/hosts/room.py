"""Models of a host that leave a card for one call, and come back after it.

Their tensors are moved one by one and stay the same objects, so that whoever holds one (other modules, an extension's patches)
holds it still. What is no plain tensor, or belongs to somebody who moves it himself, is left alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from remote_vae.call import T, VaeCall
from remote_vae.local.memory import available_memory
from remote_vae.tiled.memory import free_memory

log = logging.getLogger("remote_vae")

# Cards with a memory of their own.
_CARDS = ("cuda", "xpu")
# Of the host's memory, what may be filled with models that wait.
_SHARE = 0.8
# What a module has that is moved or compiled by others: accelerate's offload, diffusers' groups, quantisation, torch.compile.
_OTHERS = ("_hf_hook", "_diffusers_hook", "hf_quantizer", "is_quantized", "quantization_method", "hf_device_map", "_orig_mod")


class _Away:
    """A module whose tensors wait in the host's memory. Whoever uses it meanwhile, in another thread, has it back at once.

    Within torch's inference mode (SD.Next's pipelines) a copy would make a tensor that can never be trained, nor leave again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.name = type(module).__name__
        # Each with its place.
        self._tensors: list[tuple[torch.Tensor, torch.device]] = []
        self._lock = threading.Lock()
        self._is_wanted = False
        self._hook = module.register_forward_pre_hook(lambda *_: self.bring_back())

    def put(self, tensor: torch.Tensor) -> None:
        """One more of its tensors. Raises what torch raises where there is no room; then the tensor stays where it is."""
        with self._lock, torch.inference_mode(False):
            if self._is_wanted:
                # Somebody uses the module who came while it was leaving.
                return
            home = tensor.device
            tensor.data = tensor.detach().to("cpu")
            self._tensors.append((tensor, home))

    def bring_back(self) -> None:
        """Everything to its place. Raises what torch raises where there is no room; then the rest comes the next time."""
        with self._lock, torch.inference_mode(False):
            self._is_wanted = True
            while self._tensors:
                tensor, home = self._tensors[-1]
                tensor.data = tensor.detach().to(home)
                self._tensors.pop()
        self._hook.remove()


class Room:
    """What leaves ``device`` while a call needs it, and comes back when the call has ended.

    Args:
        modules: gives the modules that may leave, the first ones first.
        device: gives the card.
    """

    def __init__(self, modules: Callable[[], Iterable[Any]], device: Callable[[], torch.device]) -> None:
        self._modules = modules
        self._device = device
        self._away: list[_Away] = []

    def make(self, wanted: int, least: int) -> int:
        """See ``VaeCall.make_room``."""
        try:
            return self._make(wanted, least)
        except Exception:  # whatever a host calls a model
            log.warning("no room could be made", exc_info=True)
            return 0

    def _make(self, wanted: int, least: int) -> int:
        device = self._device()
        if device.type not in _CARDS:
            return 0
        # A system that swaps, or ends the process, is worse than tiles.
        room = int(_SHARE * (available_memory(torch.device("cpu")) or 0))
        leaving, freed = [], 0
        for module in self._modules():
            tensors = [] if _is_of_others(module) else _movable(module, device)
            size = sum(tensor.nbytes for tensor in tensors)
            if tensors and freed < wanted and freed + size <= room:
                leaving.append((module, tensors))
                freed += size
        if freed < least:
            return 0
        for module, tensors in leaving:
            self._move_away(module, tensors)
        # Blocks that are free and held by torch are of the wrong sizes.
        free_memory()
        return freed

    def _move_away(self, module: nn.Module, tensors: list[torch.Tensor]) -> None:
        away = _Away(module)
        # Noted before anything moves: what goes wrong half-way comes back all the same.
        self._away.append(away)
        for tensor in tensors:
            away.put(tensor)
        log.info("%s waits in the host's memory until the picture is made", away.name)

    def restore(self) -> None:
        """Bring everything back. Where that cannot be done now, each module comes back when it is used next. Never raises."""
        while self._away:
            away = self._away.pop()
            try:
                try:
                    away.bring_back()
                except Exception:
                    free_memory()
                    away.bring_back()
            except Exception as error:
                log.warning("%s could not come back to the card yet: %s", away.name, error)


def _movable(module: Any, device: torch.device) -> list[torch.Tensor]:
    """The tensors of ``module`` on ``device``; none where one of them cannot be moved."""
    found = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    here = [tensor for tensor in found.values() if _is_on(tensor, device)]
    plain = all(tensor.layout is torch.strided and not tensor.is_inference() and _is_plain(tensor) for tensor in here)
    # Views of one another would come back as copies of one another.
    apart = len({tensor.untyped_storage()._cdata for tensor in here}) == len(here)  # noqa: SLF001
    return here if plain and apart else []


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is what it looks like: quantised weights and those that load themselves are of classes of their own."""
    return type(tensor) in (torch.Tensor, nn.Parameter)


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and (device.index is None or tensor.device.index == device.index)


def _is_of_others(module: Any) -> bool:
    """Whether somebody else moves ``module`` or a part of it, has compiled it, or it is none."""
    if not isinstance(module, nn.Module):
        return True
    return any(
        getattr(part, name, None) not in (None, False)
        for part in module.modules()
        for name in (*_OTHERS, "_compiled_call_impl")
    )


@contextmanager
def with_room(call: VaeCall[T], room: Room) -> Iterator[VaeCall[T]]:
    """The call, which may have ``room`` made for it; afterwards everything is back where it was."""
    try:
        yield replace(call, make_room=room.make)
    finally:
        room.restore()


def parts_of(pipe: Any, vae: Any) -> list[Any]:
    """The models of a pipeline of diffusers beside ``vae``, the largest first."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        return []
    parts = {id(part): part for part in components.values() if isinstance(part, nn.Module) and part is not vae}
    return sorted(parts.values(), key=lambda part: -sum(weight.nbytes for weight in part.parameters()))
