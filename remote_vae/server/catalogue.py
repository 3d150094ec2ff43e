"""The VAEs of a server by name, and which of them a request is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from remote_vae.errors import InvalidRequest, RemoteVaeError
from remote_vae.vae.at_work import Provider, VaeAtWork
from remote_vae.vae.families import CUSTOM, Family, find_family
from remote_vae.vae.fingerprint import fingerprint_of
from remote_vae.vae.packed import batch_norm_of
from remote_vae.wire import FINGERPRINT_KEYS

Fits = Callable[[Family], bool]

_NOTHING = "no model is loaded in this UI yet: generate something first"


class NoModel(RemoteVaeError):
    """There is no VAE at the moment."""


class UnknownModel(RemoteVaeError):
    """The server has no VAE of this name."""


class Entry(Protocol):
    """One VAE of a server."""

    @property
    def name(self) -> str:
        """In the path ``/<name>/decode``."""
        ...

    @property
    def family(self) -> Family | None:
        """What it is; None: it was never loaded, and its name does not say it."""
        ...

    @property
    def is_loaded(self) -> bool:
        """Whether its weights are in the memory of a device."""
        ...

    @property
    def problem(self) -> str:
        """Why it cannot be had at the moment; "" where it can, also where it would have to be loaded first."""
        ...

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of its weights, as ``GET /info`` names them; empty where they are not known."""
        ...

    def info(self) -> dict[str, Any]:
        """What ``GET /info`` says of it. Raises NoModel."""
        ...

    def current(self) -> VaeAtWork:
        """The VAE. Raises NoModel."""
        ...

    def serving(self) -> AbstractContextManager[Any]:
        """The context of a call, held in the thread that makes it."""
        ...


class Catalogue(Protocol):
    """The VAEs of a server."""

    def entries(self) -> Sequence[Entry]:
        """All, loaded or not, in the order given."""
        ...

    def pick(
        self, name: str | None = None, family: str | None = None, fingerprint: str | None = None, fits: Fits | None = None
    ) -> Entry:
        """The one that a request is for.

        By the name in its path; else by the family that the client names, of several of it the one with that fingerprint, else
        the first; else the first that it fits; else the first.

        Args:
            name: of the path.
            family: as ``find_family`` knows it.
            fingerprint: of the client's own VAE.
            fits: whether the tensor of the request is one for a VAE of that family.

        Raises:
            UnknownModel: none is called so. InvalidRequest: none is of that family. NoModel: there is none.
        """
        ...


class OneVae:
    """A catalogue of the one VAE of a provider, which may be another one at each call: what a host shares.

    Args:
        provider: whose VAE it is. It is never changed.
        name: of the entry; None: the key of its family.
        about: what ``GET /info`` says besides; fingerprints, where those of the weights at work do not say all.
    """

    def __init__(self, provider: Provider, name: str | None = None, about: Mapping[str, str] | None = None) -> None:
        self.provider = provider
        self._name = name
        self._about = about or {}

    # --- the catalogue -------------------------------------------------------------------------------------------------

    def entries(self) -> Sequence[Entry]:
        return [self]

    def pick(
        self, name: str | None = None, family: str | None = None, fingerprint: str | None = None, fits: Fits | None = None
    ) -> Entry:
        del fingerprint, fits
        if name is not None and name != self.name:
            raise UnknownModel(f"this server has no VAE called {name}; it has {self.name}")
        if family is not None:
            check_family(self.current().family, family)
        return self

    # --- its entry -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        vae = self.provider.current()
        return self._name or (CUSTOM if vae is None else vae.family.key)

    @property
    def family(self) -> Family | None:
        vae = self.provider.current()
        return None if vae is None else vae.family

    @property
    def is_loaded(self) -> bool:
        return self.provider.current() is not None

    @property
    def problem(self) -> str:
        return "" if self.is_loaded else _NOTHING

    @property
    def fingerprints(self) -> Mapping[str, str]:
        known = {key: self._about[key] for key in FINGERPRINT_KEYS.values() if key in self._about}
        if known:
            return known
        found = fingerprint_of(self.current().module)
        # None while a host has only the shapes of the weights in memory: then nothing is said.
        return {FINGERPRINT_KEYS[found[0]]: found[1]} if found else {}

    def info(self) -> dict[str, Any]:
        return {**info_of(self.current()), **self.fingerprints, **self._about}

    def current(self) -> VaeAtWork:
        vae = self.provider.current()
        if vae is None:
            raise NoModel(_NOTHING)
        return vae

    def serving(self) -> AbstractContextManager[Any]:
        return self.provider.serving()


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


def check_family(own: Family, name: str | None) -> None:
    """Raises InvalidRequest: the VAE is of another family than ``name``. SettingsError: there is no such family."""
    if name is None or not own.is_known:
        return
    wanted = find_family(name)
    if wanted.key != own.key:
        raise InvalidRequest(f"this server has the VAE of {own.label}, and the request is for {wanted.label}")
