"""The adapter for SD.Next: stands in front of ``decode`` and ``encode`` of the VAE of a loaded model, at its class.

SD.Next puts other VAEs into its pipelines without telling anybody, and pipelines call ``vae.encode`` themselves; the class is
what all of them pass. Only calls of the VAE of a loaded model are taken: the preprocessors of its Control tab own VAEs as well.

In front of the VAEs of 26 kinds of pipelines (Flux.2, Qwen-Image, Wan ...) SD.Next stands itself, at the instance
(``modules/sd_hijack_vae.py``): it moves the VAE to the card, calls it, and on any error logs that and gives None, which costs
the picture. There we stand in front of it: what it cannot do is done in another way, and a remote call moves nothing.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, Optional
from weakref import WeakSet

import torch

from remote_vae.call import T, VaeCall
from remote_vae.errors import UnsupportedLayout
from remote_vae.hosts.base import ThreadState, WebUi
from remote_vae.hosts.diffusers_calls import parameters_of, vae_call
from remote_vae.hosts.generation import REQUEST, Request
from remote_vae.hosts.room import Room, parts_of, with_room
from remote_vae.hosts.wrapping import is_ours, is_wrapped, place, unwrap, wrap
from remote_vae.local.memory import available_memory
from remote_vae.vae.at_work import Op, VaeAtWork, has_posterior, is_of
from remote_vae.vae.families import Family, family_of

log = logging.getLogger("remote_vae")

# What SD.Next calls the VAE that comes with the model.
_OWN_VAE = ("Automatic", "Default", "None", "")
# What it calls the VAE type that Hugging Face's public endpoints answer.
_THEIR_REMOTE = "Remote"
_OPS: tuple[Op, ...] = ("decode", "encode")


class _ThreadState(ThreadState):
    # Whether what is being decoded becomes 8 bits by rounding.
    rounds = False
    # The last error that SD.Next has shown, and gone on from.
    shown: Optional[BaseException] = None


class SdNext(WebUi):
    """SD.Next with diffusers."""

    name = "SD.Next"
    seams = ("decode and encode of the class of each VAE",)

    def __init__(self) -> None:
        super().__init__()
        self._thread: _ThreadState = _ThreadState()
        # That we stand in front of, beside AutoencoderKL.
        self._classes: set[type] = set()
        self._vaes: WeakSet[Any] = WeakSet()

    def _wrapped_functions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        import diffusers
        from modules import errors, processing_diffusers, processing_vae

        return [
            *super()._wrapped_functions(),
            (processing_diffusers, "process_diffusers", self._around_batch),
            (processing_vae, "vae_decode", self._around_decode),
            (errors, "display", self._around_display),
            *self._of_class(diffusers.AutoencoderKL),
        ]

    def _of_class(self, kind: type) -> list[tuple[Any, str, Callable[..., Any]]]:
        return [(kind, op, partial(self._around_vae, op)) for op in _OPS]

    def version(self) -> str:
        """Its commit and the day of that: it has no numbers."""
        with suppress(Exception):  # as its installer pleases
            # It asks git once, where it has not when it was started.
            known = importlib.import_module("installer").get_version()
            if known["commit"] != "unknown":
                return f"{known['commit']} of {known['updated']}"
        return ""

    def show_in_tabs(self, title: str) -> None:
        """Have the script shown in the Control tab, the only one of its default theme, where it lists the scripts."""
        shown = getattr(importlib.import_module("installer"), "control_extensions", None)
        if isinstance(shown, list) and title not in shown:
            shown.append(title)

    def hook(self, model: Any) -> None:
        """Stand in front of the class of its VAE, and of what SD.Next has put before the VAE itself."""
        vae = _vae_of(model)
        if not self.installed or vae is None or _family(vae) is None:
            return
        for other in list(self._vaes):
            if not self._is_loaded(other):
                self._uncover(other)
        # Once: who puts a method of its own there afterwards is not covered again. AutoencoderKL is with the UI's functions.
        if type(vae) not in self._classes and not is_of(vae, "AutoencoderKL"):
            self._classes.add(type(vae))
            for owner, name, around in self._of_class(type(vae)):
                wrap(owner, name, around, self)
        for op in _OPS:
            before = vars(vae).get(op)
            if callable(before) and not is_wrapped(before):
                place(vae, op, self._over(op, vae, before), self)
                self._vaes.add(vae)

    def _over(self, op: Op, vae: Any, theirs: Callable[..., Any]) -> Callable[..., Any]:
        # A function, and not a partial: a deep copy of the VAE would copy all that is in that.
        return lambda *args, **kwargs: self._around_theirs(op, vae, theirs, *args, **kwargs)

    def _unhook(self, model: Any) -> None:
        """All is undone by ``uninstall``: a VAE that was hooked may belong to no loaded model any more."""

    def _uncover(self, vae: Any) -> None:
        """Give ``vae`` back what SD.Next has put before it."""
        self._vaes.discard(vae)
        for op in _OPS:
            unwrap(vae, op, self)
            # What SD.Next calls below its own was taken when the pipeline was loaded: it may be our hook of the class.
            bound = vars(vae).get(f"orig_{op}")
            if is_ours(getattr(bound, "__func__", None), self):
                setattr(vae, f"orig_{op}", MethodType(bound.__func__.__wrapped__, vae))

    def uninstall(self) -> None:
        """As in every UI; and every VAE that has been hooked, and its class, is as it was."""
        super().uninstall()
        for vae in list(self._vaes):
            self._uncover(vae)
        for kind in self._classes:
            for op in _OPS:
                unwrap(kind, op, self)
        self._classes.clear()

    def current(self) -> VaeAtWork | None:
        from modules import devices

        models = self._models()
        vaes = [vae for vae in map(_vae_of, models) if vae is not None]
        family = _family(vaes[0]) if vaes else None
        if family is None:
            return None
        vae = vaes[0]
        return VaeAtWork(
            module=vae,
            family=family,
            device=torch.device(devices.device),
            dtype=vae.dtype,
            bring=partial(_brought, vae),
            model=str(getattr(getattr(models[0], "sd_checkpoint_info", None), "name", "")),
            has_posterior=has_posterior(vae),
        )

    def _models(self) -> list[Any]:
        from modules import modeldata

        data = modeldata.model_data
        # Not its property sd_model of modules.shared: reading that can start the loading of a model.
        models = (getattr(data, name, None) for name in ("sd_model", "sd_refiner"))
        return [model for model in models if model is not None]

    def _around_generation(self, original: Callable[..., Any], p: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``process_images_inner``. SD.Next's own "Remote" sends pictures to Hugging Face, and past our endpoint."""
        if getattr(p, "vae_type", None) != _THEIR_REMOTE or not self._is_on_for(p):
            return super()._around_generation(original, p, *args, **kwargs)
        log.info(
            "VAE type %s: it is asked of Remote VAE's endpoint, as Remote VAE is on, and not of SD.Next's own", _THEIR_REMOTE
        )
        p.vae_type = "Full"
        try:
            return super()._around_generation(original, p, *args, **kwargs)
        finally:
            p.vae_type = _THEIR_REMOTE

    def _is_on_for(self, p: Any) -> bool:
        asked = getattr(p, REQUEST, None)
        wanted = asked.enabled if isinstance(asked, Request) else None
        return self.installed and (self._switched_on() if wanted is None else wanted)

    def _around_preview(self, original: Callable[..., Any], sample: Any, approximation: Any = None) -> Any:
        """In this UI the approximation is named for previews as well."""
        with self.own_calls.passing_on():
            return original(sample, approximation)

    def _around_batch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``process_diffusers``, which makes the pictures of one of several batches."""
        from modules import shared

        generation = self._thread.generation
        if generation is None or not generation.stops:
            return original(*args, **kwargs)
        # As after Interrupt between two batches. What was made before is saved by now.
        shared.state.current_image = None
        shared.state.interrupted = True
        return []

    def _around_decode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``vae_decode``: PIL pictures, which are worked on further, are rounded; arrays are cut off to 8 bits later."""
        before = self._thread.rounds
        self._thread.rounds = kwargs.get("output_type") == "pil"
        try:
            return original(*args, **kwargs)
        finally:
            self._thread.rounds = before

    def _around_display(self, original: Callable[..., Any], error: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``errors.display``, which tells of an error that SD.Next then goes on from."""
        if isinstance(error, BaseException):
            self._thread.shown = error
        return original(error, *args, **kwargs)

    def _around_vae(self, op: Op, original: Callable[..., Any], vae: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``decode`` and ``encode`` of a class."""
        own = partial(original, vae, *args, **kwargs)
        if not self._takes() or not self._is_loaded(vae):
            return own()
        return self._taken(lambda: self._call(op, vae, partial(original, vae), args, kwargs), own)

    def _around_theirs(self, op: Op, vae: Any, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around what SD.Next, or another extension, has put in the place of ``decode`` or ``encode`` of this very VAE."""
        own = partial(theirs, *args, **kwargs)
        if not self._takes() or not self._is_loaded(vae):
            return own()

        def make() -> VaeCall[Any] | None:
            given = tuple(_as_computed(vae, value) if index == 0 else value for index, value in enumerate(args))
            return self._call(op, vae, partial(self._unless_lost, theirs), given, kwargs)

        return self._taken(make, own)

    def _unless_lost(self, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call of SD.Next. Raises the error that it has shown where it gives None instead of what was asked for."""
        self._thread.shown = None
        try:
            made = theirs(*args, **kwargs)
            if made is None:
                raise self._thread.shown or RuntimeError("SD.Next's own call gave nothing; its log says why")
            return made
        finally:
            self._thread.shown = None

    def _call(
        self, op: Op, vae: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> VaeCall[Any] | None:
        family = _family(vae)
        if family is None:
            return None
        at_work = VaeAtWork(vae, family, bring=partial(_brought, vae), picked=_picked_vae())
        call = vae_call(at_work, op, own, parameters_of(MethodType(getattr(type(vae), op), vae)), args, kwargs)
        return None if call is None else replace(call, truncates=not self._thread.rounds)

    def _roomy(self, call: VaeCall[T]) -> AbstractContextManager[VaeCall[T]]:
        from modules import sd_models, shared

        mode = getattr(shared.opts, "diffusers_offload_mode", "none")
        pipe = next((model for model in self._models() if _vae_of(model) is call.vae.module), None)
        if mode == "none":
            parts = partial(parts_of, getattr(pipe, "pipe", pipe), call.vae.module)
            return with_room(call, Room(parts, lambda: call.vae.device))
        if mode != "balanced" or pipe is None:
            # Its models are on the card one at a time.
            return nullcontext(call)

        def make_room(_wanted: int, _least: int) -> int:
            """What SD.Next leaves on the card below its watermark goes as well, and comes back when it is used."""
            before = available_memory(call.vae.device) or 0
            try:
                sd_models.apply_balanced_offload(pipe, exclude=["vae"], force=True)
            except Exception:  # the picture is made in less
                log.warning("SD.Next made no room", exc_info=True)
            return max(0, (available_memory(call.vae.device) or 0) - before)

        return nullcontext(replace(call, make_room=make_room))

    def _is_loaded(self, vae: Any) -> bool:
        """Whether ``vae`` belongs to the model or its refiner, or to the pipeline within either."""
        return any(vae is _vae_of(model) for model in self._models())


def _vae_of(model: Any) -> Any:
    """The VAE of a pipeline, or of the pipeline within; None where there is none."""
    own = getattr(model, "vae", None)
    return getattr(getattr(model, "pipe", None), "vae", None) if own is None else own


def _family(vae: Any) -> Family | None:
    """None: calls of such a VAE are its own."""
    try:
        return family_of(vae)
    except UnsupportedLayout:
        return None


def _as_computed(vae: Any, value: Any) -> Any:
    """A tensor where and in what SD.Next has a VAE compute whose calls it takes; anything else as it is."""
    from modules import devices

    return value.to(devices.device, vae.dtype) if isinstance(value, torch.Tensor) else value


def _brought(vae: Any, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` where and in what the VAE computes, after SD.Next has brought the VAE there."""
    from modules import devices, sd_models, shared

    if getattr(shared.opts, "diffusers_offload_mode", "none") != "sequential":
        sd_models.move_model(vae, devices.device)
    return tensor.to(devices.device, vae.dtype)


def _picked_vae() -> str:
    """The VAE that the user has picked; "" for the model's own."""
    from modules import shared

    # Not sd_vae.loaded_vae_file, which keeps the name after the user has gone back.
    picked = getattr(shared.opts, "sd_vae", None)
    return "" if not isinstance(picked, str) or picked in _OWN_VAE else picked


adapter = SdNext()
