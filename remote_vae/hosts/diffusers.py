"""The adapter for plain diffusers: stands in front of ``decode`` and ``encode`` of one VAE instance.

A pipeline calls both itself (img2img and inpaint encode through ``vae.encode``), so the instance is the one seam that all of
them pass. Nothing of diffusers is imported before the first call.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MethodType
from typing import Any, Union

from remote_vae.call import User
from remote_vae.errors import UnsupportedLayout, VaeCallFailed
from remote_vae.history import History
from remote_vae.hosts.diffusers_calls import parameters_of, vae_call
from remote_vae.hosts.room import Room, parts_of, with_room
from remote_vae.router import Router
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import Family, family_of

log = logging.getLogger("remote_vae")

_OPS: tuple[Op, ...] = ("decode", "encode")


def attach(
    pipe: Any,
    settings: Union[Settings, Mapping[str, object], None] = None,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Handle:
    """Send the VAE calls of ``pipe`` to the endpoint of ``settings``, and do them locally whenever that fails.

    Args:
        pipe: a diffusers pipeline, or a VAE itself, of pictures or of videos, of a class that families.toml names.
        settings: ``Settings``, a mapping of its fields, or None for the defaults. Its ``enabled`` is the host UIs' switch and
            does not count here: attaching switches on, ``handle.enabled = False`` switches off.
        cancelled: asked about every 0.05 s while an endpoint is being waited for; True ends the wait, and the call is done
            locally.

    Returns:
        A handle: ``handle.history`` tells what happened, ``handle.settings`` can be replaced, ``handle.detach()`` undoes it.
        Attaching to an attached VAE replaces the earlier handle.

    Raises:
        SettingsError: a setting cannot be used.
        UnsupportedLayout: there is no VAE, or one whose kind is not known; the message lists the known ones.
    """
    if not isinstance(settings, Settings):
        settings = Settings.from_mapping(settings or {})
    vae = getattr(pipe, "vae", None)
    vae = pipe if vae is None else vae
    # A compiled module passes calls on to the one that it was made of.
    vae = getattr(vae, "_orig_mod", vae)
    if not all(callable(getattr(vae, op, None)) for op in _OPS):
        raise UnsupportedLayout(f"{type(pipe).__name__} is not a diffusers pipeline with a VAE, nor a VAE of diffusers")
    family = family_of(vae)
    for op in _OPS:
        current = vae.__dict__.get(op)
        if isinstance(getattr(current, "handle", None), Handle):
            current.handle.detach()
    return Handle(vae, family, settings, cancelled, pipe)


class Handle:
    """A VAE whose calls go through the router. Made by ``attach``.

    Attributes:
        enabled: False passes every call on to the VAE, at the price of a function call.
        settings: the settings of the next call; assign another ``Settings`` to change them.
        history: the records of this VAE's calls.
    """

    def __init__(self, vae: Any, family: Family, settings: Settings, cancelled: Callable[[], bool], pipe: Any = None) -> None:
        self.enabled = True
        self.settings = settings
        self._router = Router(History())
        self._vae = vae
        self._family = family
        self._cancelled = cancelled
        # The VAE outlives its pipeline, and does not keep the models of it.
        self._pipe = _reference(pipe)
        self._hooks: dict[Op, Callable[..., Any]] = {}
        self._before = {op: vae.__dict__[op] for op in _OPS if op in vae.__dict__}
        for op in _OPS:
            self._hooks[op] = _Hook(self, vae, op, getattr(vae, op))
            # nn.Module keeps what is no module in __dict__, where it stands before the class's method.
            setattr(vae, op, self._hooks[op])

    @property
    def history(self) -> History:
        return self._router.history

    def detach(self) -> None:
        """Give the VAE its own calls back. Twice is as good as once.

        Where somebody else has put a hook over ours meanwhile, ours stays below it and only passes calls on.
        """
        self.enabled = False
        for op, hook in self._hooks.items():
            if self._vae.__dict__.get(op) is not hook:
                continue
            if op in self._before:
                setattr(self._vae, op, self._before[op])
            else:
                delattr(self._vae, op)

    def answer(
        self,
        vae: Any,
        op: Op,
        original: Callable[..., Any],
        names: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What ``original(*args, **kwargs)`` gives, by the router where that knows such calls."""
        try:
            call = vae_call(VaeAtWork(vae, self._family), op, original, names, args, kwargs)
            if call is not None:
                vae_device = call.vae.device
                call = replace(call, user=User(cancelled=self._cancelled))
                with with_room(call, Room(lambda: parts_of(self._pipe(), vae), lambda: vae_device)) as roomy:
                    return self._router.run(roomy, self.settings)
        except VaeCallFailed:
            raise
        except Exception:
            log.exception("this call went wrong in Remote VAE; the VAE answers it itself")
        return original(*args, **kwargs)


def _reference(pipe: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(pipe)
    except TypeError:
        return lambda: None


class _Hook:
    """In front of one method of a VAE. Nothing is asked and nothing changed while its handle is disabled."""

    def __init__(self, handle: Handle, vae: Any, op: Op, original: Callable[..., Any]) -> None:
        self.handle = handle
        self._vae = vae
        self._op = op
        self._original = original
        self._names = parameters_of(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.handle.enabled:
            return self._original(*args, **kwargs)
        return self.handle.answer(self._vae, self._op, self._original, self._names, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the VAE has weights of its own, and nobody has attached it."""
        copied = memo.get(id(self._vae))
        return self if copied is None else MethodType(getattr(type(copied), self._op), copied)
