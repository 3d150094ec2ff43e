"""The server's own VAEs: loaded on first use, a copy a device, and put away where others need the memory."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remote_vae.errors import SettingsError
from remote_vae.local.estimate import usual_bytes
from remote_vae.local.memory import available_memory
from remote_vae.server.catalogue import Device, Entry, NoModel, info_of
from remote_vae.server.models import LoadedVae, load_vae, public_name
from remote_vae.tiled.memory import free_memory
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import Family, find_family

log = logging.getLogger("remote_vae")

# Beside the weights there is to be room for a decode of so many pixels.
_CALL_PIXELS = 1024 * 1024

Load = Callable[..., LoadedVae]


@dataclass(frozen=True)
class Source:
    """A VAE that the server is to have.

    Attributes:
        source: a diffusers folder, a .safetensors file or a Hugging Face id.
        name: of its paths, /<name>/decode; None: that of its family.
        family: a key of families.toml; None: by its config, its weights or its name.
        dtype: as ``load_vae`` takes it.
    """

    source: str
    name: str | None = None
    family: str | None = None
    dtype: str = "auto"


class OwnVae:
    """One of them, an entry of the catalogue. All that changes in it is changed under the lock of ``OwnVaes``.

    Attributes:
        users: calls in the queue and at work.
        copies: those that are loaded, by device.
        failure: why the last load failed; "" where it did not.
        used: when a call last used it, of ``time.monotonic``.
    """

    def __init__(self, owner: OwnVaes, source: Source) -> None:
        self._owner = owner
        self.source = source
        self.called = source.name
        self.wanted_family = source.family or _family_named(source.name)
        self.users = 0
        self.copies: dict[torch.device, LoadedVae] = {}
        self.used = 0.0
        self.failure = ""
        self._info: Mapping[str, Any] = {}
        self._family: Family | None = None
        self._fingerprints: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        return self.called or "vae"

    @property
    def family(self) -> Family | None:
        if self._family is not None:
            return self._family
        return find_family(self.wanted_family) if self.wanted_family else None

    @property
    def is_known(self) -> bool:
        return self._family is not None

    @property
    def is_loaded(self) -> bool:
        return bool(self.copies)

    @property
    def problem(self) -> str:
        return "" if self.is_loaded else self.failure

    @property
    def fingerprints(self) -> Mapping[str, str]:
        return self._fingerprints

    def info(self) -> dict[str, Any]:
        if self._info:
            return dict(self._info)
        family = self.family
        return {"family": family.key} if family is not None else {}

    def require(self) -> Family:
        if self._family is None:
            raise NoModel(f"the VAE {self.name} is not loaded yet; try again")
        return self._family

    def is_at(self, device: Device) -> bool:
        return device in self.copies

    def vae(self, device: Device) -> VaeAtWork:
        copy = self.copies.get(device) if device is not None else None
        if copy is None:
            raise NoModel(f"the VAE {self.name} has just been put away; try again")
        self.used = time.monotonic()
        return copy.current()

    def held(self) -> AbstractContextManager[Any]:
        return self._owner.held(self)

    def serving(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    def make_room(self, device: Device, wanted: int) -> int:
        return self._owner.make_room(device, wanted, beside=self) if device is not None else 0

    def learn(self, loaded: LoadedVae) -> None:
        """What a load has shown of it."""
        self._info = {**info_of(loaded.current()), **loaded.about}
        self._fingerprints = loaded.about
        # The last, as others look meanwhile: from here on it counts as known.
        self._family = loaded.family
        self.called = self.called or self._owner.free_name(loaded.family.key)


class OwnVaes:
    """The catalogue of a server of its own.

    Args:
        sources: the VAEs in their order.
        devices: one or more; each gets a copy of a VAE that is wanted there.
        load: as ``load_vae``.
        available: bytes that are free on a device; None where that is not known.

    Raises:
        SettingsError: two have the same name.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        devices: Sequence[torch.device] = (torch.device("cpu"),),
        load: Load = load_vae,
        available: Callable[[torch.device], int | None] = available_memory,
    ) -> None:
        named = [source.name for source in sources if source.name]
        twice = {name for name in named if named.count(name) > 1}
        if twice:
            raise SettingsError(f"--vae: two VAEs are called {sorted(twice)[0]}; give each a name of its own")
        self.devices: Sequence[Device] = tuple(devices)
        self._load = load
        self._available = available
        self._lock = threading.RLock()
        self._loading: dict[tuple[OwnVae, torch.device], Future[None]] = {}
        # One VAE at a time: two would take twice the memory of the host on their way, and come from one disk.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="remote-vae-load")
        self._vaes = [OwnVae(self, source) for source in sources]

    def entries(self) -> Sequence[Entry]:
        return self._vaes

    def start(self, *, preload: bool = False) -> None:
        """Load those whose name is that of their family, and with ``preload`` all, as far as there is room for them.

        Raises:
            SettingsError: one cannot be loaded.
        """
        for vae in self._vaes:
            if vae.called is None:
                self._load_on(vae, self._first)
        if preload:
            for device in filter(None, self.devices):
                self._fill(device)

    def _fill(self, device: torch.device) -> None:
        for vae in self._vaes:
            if vae.is_at(device):
                continue
            if any(other.is_at(device) for other in self._vaes) and not self._has_room(device, _room_for_calls(device)):
                log.warning("no room on %s for %s before it is called", device, vae.name)
                return
            self._load_on(vae, device)

    @property
    def _first(self) -> torch.device:
        return next(filter(None, self.devices))

    def load(self, entry: Entry, device: Device) -> Future[None]:
        if not isinstance(entry, OwnVae):
            raise TypeError(f"{type(entry).__name__} is no VAE of this catalogue")
        key = entry, device or self._first
        with self._lock:
            known = self._loading.get(key)
            if known is not None:
                return known
            future = self._loading[key] = self._loader.submit(self._load_for_a_call, *key)
        # At once, where it has ended already.
        future.add_done_callback(lambda _: self._loaded(key))
        return future

    def _loaded(self, key: tuple[OwnVae, torch.device]) -> None:
        with self._lock:
            del self._loading[key]

    def close(self) -> None:
        """No more is loaded."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def is_loading(self, entry: Entry) -> bool:
        with self._lock:
            return any(vae is entry for vae, _ in self._loading)

    def _load_for_a_call(self, vae: OwnVae, device: torch.device) -> None:
        if vae.is_at(device):
            return
        try:
            self._load_on(vae, device)
        except Exception as error:
            log.warning("%s: %s", vae.name, error)
            # Where its files lie is nobody's business.
            source, reason = vae.source.source, str(error)
            for path in (str(Path(source).expanduser()), source):
                reason = reason.replace(path, public_name(source))
            vae.failure = f"the VAE {vae.name} cannot be loaded: {reason}"
            raise NoModel(vae.failure) from None

    def _load_on(self, vae: OwnVae, device: torch.device) -> None:
        log.info("loading %s on %s", vae.source.source, device)
        loaded = self._load(
            vae.source.source,
            family=vae.wanted_family,
            dtype=vae.source.dtype,
            device=str(device),
            make_room=lambda weights: self._make_room_for(weights, device, vae),
        )
        with self._lock:
            vae.learn(loaded)
            vae.failure = ""
            vae.copies[device] = loaded
            vae.used = time.monotonic()

    def free_name(self, name: str) -> str:
        """``name``, or with a number behind it where another has it."""
        taken = {vae.called for vae in self._vaes}
        names = (name, *(f"{name}-{number}" for number in range(2, len(self._vaes) + 2)))
        return next(each for each in names if each not in taken)

    # --- what is kept --------------------------------------------------------------------------------------------------

    @contextmanager
    def held(self, vae: OwnVae) -> Iterator[None]:
        """See ``Entry.held``."""
        with self._lock:
            vae.users += 1
        try:
            yield
        finally:
            with self._lock:
                vae.users -= 1

    def make_room(self, device: torch.device, wanted: int, beside: OwnVae) -> int:
        """Put away those that nobody calls, least lately used first, until they had so many bytes, or none is left.

        Returns:
            The bytes of the weights that were put away.
        """
        freed = 0
        while freed < wanted:
            with self._lock:
                idle = [vae for vae in self._vaes if vae is not beside and not vae.users and device in vae.copies]
                if not idle:
                    break
                least = min(idle, key=lambda vae: vae.used)
                freed += _bytes(least.copies.pop(device))
            log.info("%s is put away: its memory on %s is needed", least.name, device)
            free_memory()
        return freed

    def _make_room_for(self, weights: int, device: torch.device, vae: OwnVae) -> None:
        """For weights of so many bytes, and a call."""
        wanted = weights + _room_for_calls(device)
        # One after the other: what is free then shows whether it is enough.
        while not self._has_room(device, wanted) and self.make_room(device, 1, beside=vae):
            pass

    def _has_room(self, device: torch.device, wanted: int) -> bool:
        free = self._available(device)
        return free is None or free >= wanted


def _family_named(name: str | None) -> str | None:
    """The family that a VAE's name says."""
    if name is not None:
        with suppress(SettingsError):
            return find_family(name).key
    return None


def _bytes(loaded: LoadedVae) -> int:
    return sum(tensor.nbytes for tensor in (*loaded.vae.parameters(), *loaded.vae.buffers()))


def _room_for_calls(device: torch.device) -> int:
    # What the VAE that is to come computes in is not known before it is there: auto is half precision on a card.
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    return usual_bytes("decode", _CALL_PIXELS, dtype, device)
