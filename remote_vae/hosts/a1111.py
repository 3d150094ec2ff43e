"""The adapter for AUTOMATIC1111's web UI: stands in front of ``decode_first_stage`` and ``encode_first_stage`` of its models.

Whatever makes a VAE call in this UI (img2img, inpaint, hires fix, ControlNet) makes it through these two methods of the loaded
model, so they are replaced on the instance. Two functions of the UI are wrapped as well: ``single_sample_to_image``, to know a
live preview, which never leaves the machine, and ``decode_latent_batch``, to send a whole batch at once.

The UI executes ``scripts/*.py`` again on Reload UI, while this module stays. So there is one ``Adapter`` a process, and
``install`` and ``uninstall`` may be called any number of times.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch

from remote_vae.errors import RouteFailed
from remote_vae.families import Family, find_family, recognise
from remote_vae.history import History
from remote_vae.hosts.edges import rising
from remote_vae.hosts.ldm import Kind, kind_of
from remote_vae.router import Router, wants_remote
from remote_vae.routes import Op, Remote, Spare, VaeCall
from remote_vae.settings import Settings, load_options
from remote_vae.tiled.spares import on_cpu
from remote_vae.wire import DecodeAnswer, EncodeAnswer

log = logging.getLogger("remote_vae.hosts.a1111")

PREFIX = "remote_vae_"
_METHODS: dict[Op, str] = {"decode": "decode_first_stage", "encode": "encode_first_stage"}
# Attribute of a hook that names the adapter it belongs to.
_MARK = "remote_vae_adapter"


class _ThreadState(threading.local):
    # Previews and calls that are being answered already: what the VAE is asked within is the UI's own business.
    passing = 0
    batch: Optional[_Batch] = None


class _Batch:
    """The answer to a whole batch, given out picture by picture as the UI asks for them."""

    def __init__(self, latents: torch.Tensor) -> None:
        self.latents = latents
        self.raw = latents
        self.answer: Remote | None = None
        self.failure = ""

    def index_of(self, latents: torch.Tensor) -> int | None:
        """Which picture of the batch ``latents`` ``[1, C, h, w]`` are, or None."""
        if latents.shape[1:] != self.latents.shape[1:] or latents.shape[0] != 1:
            return None
        # After NaN the UI asks again in float32 for what it has asked in half precision.
        wanted = latents[0].to(self.latents.dtype)
        return next((index for index, own in enumerate(self.latents) if torch.equal(own, wanted)), None)


class Adapter:
    """What stands between this UI and its VAE. One a process: see ``adapter``."""

    def __init__(self) -> None:
        self.router = Router(History())
        self._installed = False
        self._presses = 0
        self._thread = _ThreadState()
        self._problems: tuple[str, ...] = ()

    # --- life cycle ----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Get in the way of every model that is loaded, and of the two functions. Safe to call again."""
        from modules import paths, processing, sd_models, sd_samplers_common, shared

        self.router = Router(self.router.history, Path(paths.data_path) / "remote-vae-rescue")
        self._installed = True
        self._wrap(sd_samplers_common, "single_sample_to_image", self._preview_door)
        self._wrap(processing, "decode_latent_batch", self._batch_door)
        for name in ("interrupt", "skip"):
            self._wrap(shared.state, name, self._press_door)
        # Not shared.sd_model: reading that can start the loading of a model.
        data = sd_models.model_data
        for model in [*getattr(data, "loaded_sd_models", []), data.sd_model]:
            if model is not None:
                self.hook(model)

    def uninstall(self) -> None:
        """Give the UI its own functions back. A hook that somebody has put over ours stays, and ours only passes on."""
        from modules import processing, sd_models, sd_samplers_common, shared

        self._installed = False
        self._unwrap(sd_samplers_common, "single_sample_to_image")
        self._unwrap(processing, "decode_latent_batch")
        for name in ("interrupt", "skip"):
            self._unwrap(shared.state, name)
        data = sd_models.model_data
        for model in [*getattr(data, "loaded_sd_models", []), data.sd_model]:
            if model is not None:
                for method in _METHODS.values():
                    self._unwrap(model, method)

    def hook(self, model: Any) -> None:
        """Stand in front of the VAE calls of ``model``, once. The UI announces the same model again on every VAE change."""
        if not self._installed:
            return
        kind = kind_of(model)
        if kind is None:
            log.warning("%s: a kind of model that Remote VAE does not know; its VAE is left alone", type(model).__name__)
            return
        for op, method in _METHODS.items():
            current = getattr(model, method)
            if _finds_ours(current):
                continue
            self._place(model, method, self._hooked(op, model, kind, current))

    def _wrap(self, owner: Any, name: str, door: Callable[..., Any]) -> None:
        """Put ``door`` around the function ``name`` of a module or an object, once."""
        current = getattr(owner, name)
        if not _finds_ours(current):
            self._place(owner, name, lambda *args, **kwargs: door(current, *args, **kwargs))

    def _place(self, owner: Any, name: str, hook: Any) -> None:
        setattr(hook, _MARK, self)
        hook.__wrapped__ = getattr(owner, name)
        # A method of the class is not put back on the instance: taking the hook away uncovers it.
        hook.covers_class = name not in vars(owner)
        setattr(owner, name, hook)

    def _unwrap(self, owner: Any, name: str) -> None:
        current = vars(owner).get(name)
        if getattr(current, _MARK, None) is not self:
            return
        if current.covers_class:
            delattr(owner, name)
        else:
            setattr(owner, name, current.__wrapped__)

    # --- the doors -----------------------------------------------------------------------------------------------------

    def _preview_door(self, original: Callable[..., Any], sample: Any, approximation: Any = None) -> Any:
        """Around ``single_sample_to_image``. With an ``approximation`` named it makes a picture to keep, not a preview."""
        if approximation is not None:
            return original(sample, approximation)
        with self._passing_on():
            return original(sample, approximation)

    def _press_door(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around Interrupt and Skip: a second press shows in no flag."""
        self._presses += 1
        return original(*args, **kwargs)

    def _batch_door(self, original: Callable[..., Any], model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``decode_latent_batch``, which decodes picture after picture: the remote answer is fetched for all first."""
        kind = kind_of(model)
        takes = (
            self._active()
            and self._thread.batch is None
            and isinstance(batch, torch.Tensor)
            and batch.shape[0] > 1
            and _decodes_in_full()
            and _finds_ours(getattr(model, _METHODS["decode"], None))
        )
        if not takes or kind is None:
            return original(model, batch, *args, **kwargs)
        with self._prefetched(model, kind, batch, self._settings()):
            return original(model, batch, *args, **kwargs)

    @contextmanager
    def _prefetched(self, model: Any, kind: Kind, batch: torch.Tensor, settings: Settings) -> Iterator[None]:
        from modules import devices

        # The two conversions that the UI makes between here and the model.
        latents = batch.to(devices.dtype_vae).to(model.first_stage_model.dtype)
        pending = _Batch(latents)
        call: VaeCall[Remote] = VaeCall(
            op="decode",
            tensor=kind.unscale(latents),
            family=_family(model, kind),
            whole=None,
            adopt=lambda answer: answer,
            truncates=True,
            cancelled=self._interrupts(),
        )
        pending.raw = call.tensor
        if wants_remote(call, settings):
            try:
                pending.answer = self.router.run_remote(call, settings)
            except RouteFailed as error:
                log.warning("remote decode of %d pictures: %s", batch.shape[0], error)
                pending.failure = error.reason
        self._thread.batch = pending
        try:
            yield
        finally:
            self._thread.batch = None

    # --- the hook ------------------------------------------------------------------------------------------------------

    def _hooked(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            # Other arguments belong to training and to quantised VAEs.
            if not self._active() or args or kwargs or self._thread.passing:
                return original(tensor, *args, **kwargs)
            if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4:
                return original(tensor)
            # Another extension may have put its hook between two of ours.
            with self._passing_on():
                return self._run(op, model, kind, original, tensor)

        return hooked

    @contextmanager
    def _passing_on(self) -> Iterator[None]:
        self._thread.passing += 1
        try:
            yield
        finally:
            self._thread.passing -= 1

    def _run(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any], tensor: torch.Tensor) -> Any:
        settings = self._settings()
        batch = self._thread.batch if op == "decode" else None
        index = batch.index_of(tensor) if batch is not None else None
        if batch is not None and index is not None and isinstance(batch.answer, DecodeAnswer):
            return batch.answer.picture(index).pixels(tensor.device, tensor.dtype)
        call = self._call(op, model, kind, original, tensor)
        if batch is None or index is None:
            return self.router.run(call, settings)
        # The UI gives up the whole batch with the first picture that fails.
        call = replace(call, lost=batch.raw)
        return self.router.run(call, settings, remote=not batch.failure, because=batch.failure)

    def _call(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any], tensor: torch.Tensor) -> VaeCall[Any]:
        def adopt(answer: Remote) -> Any:
            if isinstance(answer, DecodeAnswer):
                return answer.pixels(tensor.device, tensor.dtype)
            return _encoded(kind, answer, tensor)

        def finish(result: torch.Tensor) -> Any:
            return result.to(tensor.device, tensor.dtype) if op == "decode" else kind.from_moments(result)

        def cpu() -> Any:
            vae = on_cpu(model.first_stage_model)
            if op == "decode":
                raw = kind.unscale(tensor).to("cpu", torch.float32)
                # Through the class: lowvram replaces the method on the instance.
                return type(vae).decode(vae, raw).to(tensor.device, tensor.dtype)
            encoded = type(vae).encode(vae, tensor.to("cpu", torch.float32))
            return kind.from_vae(encoded, tensor.device, tensor.dtype)

        return VaeCall(
            op=op,
            tensor=kind.unscale(tensor) if op == "decode" else tensor,
            family=_family(model, kind),
            whole=lambda: original(tensor),
            adopt=adopt,
            vae=model.first_stage_model,
            finish=finish,
            spares=(Spare("whole VAE on the CPU", cpu),),
            truncates=True,
            cancelled=self._interrupts(),
        )

    def _interrupts(self) -> Callable[[], bool]:
        """Whether Interrupt or Skip is pressed from now on. A press during sampling asks for the picture so far."""
        from modules import shared

        presses = self._presses
        risen = rising(lambda: bool(shared.state.interrupted), lambda: bool(shared.state.skipped))
        return lambda: self._presses != presses or risen()

    def _active(self) -> bool:
        from modules import shared

        enabled = getattr(shared.opts, PREFIX + "enabled", False)
        return self._installed and (enabled if isinstance(enabled, bool) else self._settings().enabled)

    def _settings(self) -> Settings:
        from modules import shared

        values = {key: getattr(shared.opts, PREFIX + key, option.default) for key, option in load_options().items()}
        settings, problems = Settings.forgiving(values)
        if tuple(problems) != self._problems:
            self._problems = tuple(problems)
            for problem in problems:
                log.warning("Settings, Remote VAE: %s", problem)
        return settings


adapter = Adapter()


def _encoded(kind: Kind, answer: EncodeAnswer, like: torch.Tensor) -> Any:
    latents = answer.latents.to(like.device, like.dtype)
    return kind.from_moments(latents) if answer.is_posterior else kind.from_sample(latents)


def _finds_ours(function: Any) -> bool:
    """Whether one of our hooks is in the chain of wrappers that begins with ``function``."""
    for _ in range(32):
        if function is None:
            return False
        if getattr(function, _MARK, None) is not None:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _decodes_in_full() -> bool:
    """Whether a final decode asks the VAE, and not one of the UI's approximations."""
    from modules import shared

    if shared.state.interrupted and getattr(shared.opts, "live_preview_fast_interrupt", False):
        return getattr(shared.opts, "show_progress_type", "Full") == "Full"
    return getattr(shared.opts, "sd_vae_decode_method", "Full") == "Full"


def _family(model: Any, kind: Kind) -> Family:
    """By what the UI says of the model; a model of a kind it has no name for, by its factors."""
    for attribute, name in (("is_sdxl", "sdxl"), ("is_sd3", "sd3"), ("is_sd2", "sd1"), ("is_sd1", "sd1")):
        if getattr(model, attribute, False):
            return find_family(name)
    return recognise(latent_channels=4, scaling_factor=kind.scaling_factor, shift_factor=kind.shift_factor)
