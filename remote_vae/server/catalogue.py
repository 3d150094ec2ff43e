"""The VAEs of a server by name, and which of them a request is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Optional, Protocol, TypeVar

import torch

from remote_vae.errors import InvalidRequest, RemoteVaeError, SettingsError
from remote_vae.vae.at_work import Provider, VaeAtWork
from remote_vae.vae.families import CUSTOM, Family, find_family
from remote_vae.vae.fingerprint import fingerprint_of
from remote_vae.vae.packed import batch_norm_of
from remote_vae.wire import FINGERPRINT_KEYS
from remote_vae.wire.errors import one_line

Fits = Callable[[Family], bool]
# None: wherever the provider has its VAE.
Device = Optional[torch.device]

One = TypeVar("One", bound="Described")

_NOTHING = "no model is loaded in this UI yet: generate something first"


class NoModel(RemoteVaeError):
    """There is no VAE at the moment."""


class UnknownModel(RemoteVaeError):
    """The server has no VAE of this name."""


class OtherVae(RemoteVaeError):
    """The VAE that the client means is not there: not any more, or it never was."""


class Described(Protocol):
    """What is known of one VAE of a server."""

    @property
    def name(self) -> str:
        """In the path ``/<name>/decode``."""
        ...

    @property
    def family(self) -> Family | None:
        """What it is; None: it was never loaded, and its name does not say it, or there is none."""
        ...

    @property
    def is_known(self) -> bool:
        """Whether nothing more could be found out of it by loading it."""
        ...

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of its weights, by the keys of ``GET /info``; empty where they are not known."""
        ...


class Entry(Described, Protocol):
    """One VAE of a server. Asked from any thread."""

    @property
    def is_loaded(self) -> bool:
        """Whether its weights are in the memory of a device."""
        ...

    @property
    def problem(self) -> str:
        """Why it cannot be had at the moment; "" where it can, also where it would have to be loaded first."""
        ...

    def info(self) -> dict[str, Any]:
        """What ``GET /info`` says of it. Raises NoModel."""
        ...

    def require(self) -> Family:
        """Its family. Raises NoModel: it is not known."""
        ...

    def is_at(self, device: Device) -> bool:
        """Whether calls can be made there now."""
        ...

    def vae(self, device: Device) -> VaeAtWork:
        """The VAE there. Raises NoModel: it is not there."""
        ...

    def held(self) -> AbstractContextManager[Any]:
        """A context in which it is not put away: that of a call from the queue to the end of its work."""
        ...

    def serving(self) -> AbstractContextManager[Any]:
        """The context of a call's work, held in the thread that makes it."""
        ...

    def make_room(self, device: Device, wanted: int) -> int:
        """Put others away that nobody calls, until they had so many bytes there, or none is left. Returns the bytes freed."""
        ...


class Catalogue(Protocol):
    """The VAEs of a server.

    Attributes:
        devices: on which they work, each with a thread of its own.
    """

    devices: Sequence[Device]

    def entries(self) -> Sequence[Entry]:
        """All, loaded or not, in the order given."""
        ...

    def load(self, entry: Entry, device: Device) -> Future[None]:
        """Load a VAE on a device in a thread; the same future for all who ask meanwhile. It raises NoModel, with the reason."""
        ...

    def is_loading(self, entry: Entry) -> bool:
        """Whether it is being loaded anywhere."""
        ...


class OneVae:
    """A catalogue of the one VAE of a provider, which may be another one at each call: what a host shares. And its entry.

    Args:
        provider: whose VAE it is. It is never changed.
        name: of the entry; None: the key of its family.
        about: what ``GET /info`` says besides; fingerprints, where those of the weights at work do not say all.
    """

    devices: Sequence[Device] = (None,)
    is_known = True

    def __init__(self, provider: Provider, name: str | None = None, about: Mapping[str, str] | None = None) -> None:
        self._provider = provider
        self._name = name
        self._about = about or {}

    def entries(self) -> Sequence[Entry]:
        return [self]

    def load(self, entry: Entry, device: Device) -> Future[None]:
        del entry, device
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def is_loading(self, entry: Entry) -> bool:
        del entry
        return False

    # --- its entry -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        family = self.family
        return self._name or (CUSTOM if family is None else family.key)

    @property
    def family(self) -> Family | None:
        vae = self._provider.current()
        return None if vae is None else vae.family

    @property
    def is_loaded(self) -> bool:
        return self._provider.current() is not None

    @property
    def problem(self) -> str:
        return "" if self.is_loaded else _NOTHING

    @property
    def fingerprints(self) -> Mapping[str, str]:
        known = {key: self._about[key] for key in FINGERPRINT_KEYS.values() if key in self._about}
        found = None if known else fingerprint_of(self.vae(None).module)
        # None while a host has only the shapes of the weights in memory: then nothing is said.
        return {FINGERPRINT_KEYS[found[0]]: found[1]} if found else known

    def info(self) -> dict[str, Any]:
        return {**info_of(self.vae(None)), **self.fingerprints, **self._about}

    def require(self) -> Family:
        return self.vae(None).family

    def is_at(self, device: Device) -> bool:
        # Also where there is none: the call is to hear so.
        del device
        return True

    def vae(self, device: Device) -> VaeAtWork:
        del device
        vae = self._provider.current()
        if vae is None:
            raise NoModel(_NOTHING)
        return vae

    def held(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def serving(self) -> AbstractContextManager[Any]:
        return self._provider.serving()

    def make_room(self, device: Device, wanted: int) -> int:
        # What else a host has in its memory is its own.
        del device, wanted
        return 0


def info_of(vae: VaeAtWork) -> dict[str, Any]:
    """What ``GET /info`` says of a VAE but for its fingerprints."""
    family = vae.family
    scaling = {"latents_mean": list(family.latents_mean), "latents_std": list(family.latents_std)}
    return {
        "model": vae.model,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "device": vae.device.type,
        "family": family.key,
        "latent_channels": family.latent_channels,
        "downscale": family.downscale,
        "pixel_channels": family.pixel_channels,
        "video": family.video,
        "frame_scale": family.frame_scale,
        "scaling_factor": family.scaling_factor,
        "shift_factor": family.shift_factor,
        **(scaling if family.latents_mean else {}),
        "batch_norm": batch_norm_of(vae.module) is not None,
        "posterior": vae.has_posterior,
    }


# --- which one ---------------------------------------------------------------------------------------------------------------


def pick(
    entries: Sequence[One],
    name: str | None = None,
    family: str | None = None,
    fingerprint: str | None = None,
    fits: Fits | None = None,
) -> One:
    """The one that a request is for.

    By the name in its path; else by the family that the client names: of several of it the one with that fingerprint, else the
    first. Without a family the first that the request fits, else the first. Where only loading it would tell, that is the one.

    Args:
        entries: in the order given.
        name: of the path.
        family: as ``find_family`` knows it.
        fingerprint: of the client's own VAE.
        fits: whether the tensor of the request is one for a VAE of that family.

    Raises:
        UnknownModel: none is called so. InvalidRequest, SettingsError: none is of that family.
    """
    called = named(entries, name)
    if called is not None:
        if called.family is not None:
            check_family(called.family, family)
        return called
    candidates = list(entries) if family is None or len(entries) == 1 else _of_family(entries, family, fits)
    if len(candidates) == 1:
        own = candidates[0].family
        if own is not None:
            check_family(own, family)
        return candidates[0]
    if fingerprint is not None:
        alike = [entry for entry in candidates if fingerprint in entry.fingerprints.values()]
        open_ones = [entry for entry in candidates if not entry.is_known]
        if alike or open_ones:
            return (alike or open_ones)[0]
    if family is None and fits is not None:
        taken = [entry for entry in candidates if entry.family is not None and fits(entry.family)]
        open_ones = [entry for entry in candidates if entry.family is None]
        return (taken or open_ones or candidates)[0]
    return candidates[0]


def named(entries: Sequence[One], name: str | None) -> One | None:
    """The one that is called ``name``; None where that is None. Raises UnknownModel."""
    if name is None:
        return None
    found = next((each for each in entries if each.name == name), None)
    if found is None:
        called = ", ".join(each.name for each in entries)
        raise UnknownModel(f"this server has no VAE called {one_line(name, 80)}; it has {called}")
    return found


def _of_family(entries: Sequence[One], name: str, fits: Fits | None) -> list[One]:
    """Those of the family, then those that may turn out to be, then those of no family, which answer for all."""
    wanted = None
    with suppress(SettingsError):
        wanted = find_family(name)
    alike = [entry for entry in entries if entry.family is not None and wanted is not None and entry.family.key == wanted.key]
    unknown = [entry for entry in entries if entry.family is None]
    custom = [entry for entry in entries if entry.family is not None and not entry.family.is_known]
    fitting = [entry for entry in custom if entry.family is not None and fits is not None and fits(entry.family)]
    found = [*alike, *unknown, *(fitting or custom)]
    if not found:
        owned = ", ".join(dict.fromkeys(entry.family.label for entry in entries if entry.family is not None))
        raise InvalidRequest(f"this server has the VAEs of {owned}, and the request is for {find_family(name).label}")
    return found


def check_family(own: Family, name: str | None) -> None:
    """Raises InvalidRequest: the VAE is of another family than ``name``. SettingsError: there is no such family."""
    if name is None or not own.is_known:
        return
    wanted = find_family(name)
    if wanted.key != own.key:
        raise InvalidRequest(f"this server has the VAE of {own.label}, and the request is for {wanted.label}")


def check_fingerprint(own: Described, fingerprint: str | None) -> None:
    """Raises OtherVae: the VAE is known to be another than the one with ``fingerprint``."""
    known = own.fingerprints if fingerprint is not None else {}
    if known and fingerprint not in known.values():
        theirs = next(iter(known.values()))
        raise OtherVae(f"the VAE here has the fingerprint {theirs}, and the request is for {fingerprint}: ask GET /info anew")
