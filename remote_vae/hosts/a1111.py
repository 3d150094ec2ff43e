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
        self.answer: Remote | None = None
        self.failure = ""

    def index_of(self, latents: torch.Tensor) -> int | None:
        """Which picture of the batch ``latents`` ``[1, C, h, w]`` are, or None."""
        if latents.shape[1:] != self.latents.shape[1:] or latents.shape[0] != 1 or latents.dtype != self.latents.dtype:
            return None
        return next((index for index, own in enumerate(self.latents) if torch.equal(own, latents[0])), None)


class Adapter:
    """What stands between this UI and its VAE. One a process: see ``adapter``."""

    def __init__(self) -> None:
        self.router = Router(History())
        self._installed = False
        self._thread = _ThreadState()
        self._problems: tuple[str, ...] = ()

    # --- life cycle ----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Get in the way of every model that is loaded, and of the two functions. Safe to call again."""
        from modules import paths, processing, sd_models, sd_samplers_common

        self.router = Router(self.router.history, Path(paths.data_path) / "remote-vae-rescue")
        self._installed = True
        self._wrap(sd_samplers_common, "single_sample_to_image", self._preview_door)
        self._wrap(processing, "decode_latent_batch", self._batch_door)
        # Not shared.sd_model: reading that can start the loading of a model.
        data = sd_models.model_data
        for model in [*getattr(data, "loaded_sd_models", []), data.sd_model]:
            if model is not None:
                self.hook(model)

    def uninstall(self) -> None:
        """Give the UI its own functions back. A hook that somebody has put over ours stays, and ours only passes on."""
        from modules import processing, sd_models, sd_samplers_common

        self._installed = False
        self._unwrap(sd_samplers_common, "single_sample_to_image")
        self._unwrap(processing, "decode_latent_batch")
        data = sd_models.model_data
        for model in [*getattr(data, "loaded_sd_models", []), data.sd_model]:
            if model is not None:
                self._unhook(model)

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
            setattr(model, method, self._hooked(op, model, kind, current))

    def _unhook(self, model: Any) -> None:
        for method in _METHODS.values():
            current = vars(model).get(method)
            if getattr(current, _MARK, None) is not self:
                continue
            if current.was_on_instance:
                setattr(model, method, current.__wrapped__)
            else:
                delattr(model, method)

    def _wrap(self, module: Any, name: str, door: Callable[..., Any]) -> None:
        current = getattr(module, name)
        if _finds_ours(current):
            return

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return door(current, *args, **kwargs)

        setattr(wrapped, _MARK, self)
        wrapped.__wrapped__ = current  # type: ignore[attr-defined]
        setattr(module, name, wrapped)

    def _unwrap(self, module: Any, name: str) -> None:
        current = getattr(module, name)
        if getattr(current, _MARK, None) is self:
            setattr(module, name, current.__wrapped__)

    # --- the doors -----------------------------------------------------------------------------------------------------

    def _preview_door(self, original: Callable[..., Any], sample: Any, approximation: Any = None) -> Any:
        """Around ``single_sample_to_image``. With an ``approximation`` named it makes a picture to keep, not a preview."""
        if approximation is not None:
            return original(sample, approximation)
        with self._passing_on():
            return original(sample, approximation)

    def _batch_door(self, original: Callable[..., Any], model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``decode_latent_batch``, which decodes picture after picture: the remote answer is fetched for all first."""
        if not self._active() or not isinstance(batch, torch.Tensor) or batch.shape[0] < 2 or not _decodes_in_full():
            return original(model, batch, *args, **kwargs)
        settings = self._settings()
        hook = getattr(model, _METHODS["decode"], None)
        kind = kind_of(model)
        if kind is None or not _finds_ours(hook):
            return original(model, batch, *args, **kwargs)
        with self._prefetched(model, kind, batch, settings):
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
            cancelled=_interrupts(),
        )
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

        setattr(hooked, _MARK, self)
        hooked.__wrapped__ = original  # type: ignore[attr-defined]
        hooked.was_on_instance = _METHODS[op] in vars(model)  # type: ignore[attr-defined]
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
        if batch is not None and index is not None and batch.failure:
            return self.router.run(call, settings, remote=False, because=batch.failure)
        return self.router.run(call, settings)

    def _call(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any], tensor: torch.Tensor) -> VaeCall[Any]:
        def adopt(answer: Remote) -> Any:
            if isinstance(answer, DecodeAnswer):
                return answer.pixels(tensor.device, tensor.dtype)
            return _encoded(kind, answer, tensor)

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
            spares=(Spare("whole VAE on the CPU", cpu),),
            truncates=True,
            cancelled=_interrupts(),
        )

    def _active(self) -> bool:
        from modules import shared

        return self._installed and bool(getattr(shared.opts, PREFIX + "enabled", False))

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
    from modules import shared

    return getattr(shared.opts, "sd_vae_decode_method", "Full") == "Full"


def _interrupts() -> Callable[[], bool]:
    """Whether Interrupt or Skip is pressed from now on. One that was pressed during sampling asks for the picture so far."""
    from modules import shared

    return rising(lambda: bool(shared.state.interrupted), lambda: bool(shared.state.skipped))


def _family(model: Any, kind: Kind) -> Family:
    """By what the UI says of the model; a model of a kind it has no name for, by its factors."""
    for attribute, name in (("is_sdxl", "sdxl"), ("is_sd3", "sd3"), ("is_sd2", "sd1"), ("is_sd1", "sd1")):
        if getattr(model, attribute, False):
            return find_family(name)
    return recognise(latent_channels=4, scaling_factor=kind.scaling_factor, shift_factor=kind.shift_factor)
