"""The adapter for AUTOMATIC1111's web UI: stands in front of ``decode_first_stage`` and ``encode_first_stage`` of its models.

Whatever makes a VAE call in this UI (img2img, inpaint, hires fix, ControlNet) makes it through these two methods of the loaded
model, so they are replaced on the instance. ``decode_latent_batch`` is wrapped as well, to send a whole batch at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch

from remote_vae.call import Answer, T, User, VaeCall
from remote_vae.errors import RouteFailed
from remote_vae.hosts.a1111_kinds import Kind, kind_of
from remote_vae.hosts.base import ThreadState, WebUi, is_picture
from remote_vae.hosts.room import Room, with_room
from remote_vae.hosts.wrapping import is_wrapped, place, unwrap
from remote_vae.router import wants_remote
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import Family, find_family, recognise
from remote_vae.wire import DecodeAnswer

log = logging.getLogger("remote_vae")

_METHODS: dict[Op, str] = {"decode": "decode_first_stage", "encode": "encode_first_stage"}


class _ThreadState(ThreadState):
    batch: Optional[_Batch] = None
    # What waits in the host's memory until all pictures of a batch are made.
    room: Optional[Room] = None


class _Batch:
    """The answer to a whole batch, given out picture by picture as the UI asks for them."""

    def __init__(self, latents: torch.Tensor, raw: torch.Tensor) -> None:
        self.latents = latents
        self.raw = raw
        self.answer: Answer | None = None
        self.failure = ""

    def index_of(self, latents: torch.Tensor) -> int | None:
        """Which picture of the batch ``latents`` ``[1, C, h, w]`` are, or None."""
        if latents.shape[1:] != self.latents.shape[1:] or latents.shape[0] != 1:
            return None
        # After NaN the UI asks again in float32 for what it has asked in half precision.
        wanted = latents[0].to(self.latents.dtype)
        return next((index for index, own in enumerate(self.latents) if torch.equal(own, wanted)), None)


class A1111(WebUi):
    """AUTOMATIC1111's web UI."""

    name = "AUTOMATIC1111"
    seams = ("decode_first_stage and encode_first_stage of each model",)
    version_at = "modules.launch_utils:git_tag"

    def __init__(self) -> None:
        super().__init__()
        self._thread: _ThreadState = _ThreadState()

    def _wrapped_functions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        from modules import processing

        return [*super()._wrapped_functions(), (processing, "decode_latent_batch", self._around_batch)]

    def _models(self) -> list[Any]:
        from modules import sd_models

        # Not shared.sd_model: reading that can start the loading of a model.
        data = sd_models.model_data
        models = [*getattr(data, "loaded_sd_models", []), data.sd_model]
        return [model for model in models if model is not None]

    def hook(self, model: Any) -> None:
        if not self.installed:
            return
        kind = kind_of(model)
        if kind is None:
            log.warning("%s: a kind of model that Remote VAE does not know; its VAE is left alone", type(model).__name__)
            return
        for op, method in _METHODS.items():
            current = getattr(model, method)
            if not is_wrapped(current):
                place(model, method, self._hooked(op, model, kind, current), self)

    def _unhook(self, model: Any) -> None:
        for method in _METHODS.values():
            unwrap(model, method, self)

    def current(self) -> VaeAtWork | None:
        from modules import sd_models

        model = sd_models.model_data.sd_model
        kind = kind_of(model) if model is not None else None
        if kind is None:
            return None
        return replace(_at_work(model, kind), model=_checkpoint(model))

    # --- a whole batch ---------------------------------------------------------------------------------------------------

    def _around_batch(self, original: Callable[..., Any], model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``decode_latent_batch``, which decodes picture after picture: the remote answer is fetched for all first."""
        before = self._thread.batch
        try:
            self._thread.batch = before or self._fetched(model, batch)
        except Exception:
            log.exception("the batch went wrong in Remote VAE; its pictures are decoded one by one")
        room = self._thread.room
        try:
            self._thread.room = room or _room(model)
            return original(model, batch, *args, **kwargs)
        finally:
            self._thread.batch = before
            if room is None and self._thread.room is not None:
                self._thread.room.restore()
            self._thread.room = room

    def _fetched(self, model: Any, batch: Any) -> _Batch | None:
        """The endpoint's answer to a batch, or why there is none; None where the pictures are not to be asked for together."""
        if not is_picture(batch) or batch.shape[0] == 1 or not self._takes():
            return None
        kind = kind_of(model)
        if kind is None or not _decodes_in_full() or not is_wrapped(getattr(model, _METHODS["decode"], None)):
            return None
        from modules import devices

        # The two conversions that the UI makes between here and the model.
        latents = batch.to(devices.dtype_vae).to(model.first_stage_model.dtype)
        raw = kind.unscale(latents)
        call: VaeCall[Answer] = VaeCall("decode", raw, _at_work(model, kind), adopt=lambda answer: answer, truncates=True)
        if not wants_remote(call, self._settings()):
            return None
        pending = _Batch(latents, raw)
        try:
            with self._shown(call) as shown:
                pending.answer = self.router.run_remote(shown, self._settings())
        except RouteFailed as error:
            log.log(logging.DEBUG if error.was_said else logging.WARNING, "remote decode of %d pictures: %s", len(batch), error)
            pending.failure = error.reason
        return pending

    def _roomy(self, call: VaeCall[T]) -> AbstractContextManager[VaeCall[T]]:
        room = self._thread.room
        if room is not None:
            return nullcontext(replace(call, make_room=room.make))
        model = next((each for each in self._models() if getattr(each, "first_stage_model", None) is call.vae.module), None)
        return nullcontext(call) if model is None else with_room(call, _room(model))

    # --- the hook --------------------------------------------------------------------------------------------------------

    def _hooked(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*args: Any, **kwargs: Any) -> Any:
            # Other arguments belong to training and to quantised VAEs; and nobody in the UI names the tensor.
            if len(args) != 1 or kwargs or not is_picture(args[0]) or not self._takes():
                return original(*args, **kwargs)
            return self._run(op, model, kind, original, args[0])

        return hooked

    def _run(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any], tensor: torch.Tensor) -> Any:
        batch = self._thread.batch if op == "decode" else None
        index, failure = None, ""
        if batch is not None:
            try:
                index, failure = batch.index_of(tensor), batch.failure
                if index is not None and isinstance(batch.answer, DecodeAnswer):
                    return batch.answer.picture(index).pixels(tensor.device, tensor.dtype)
            except Exception as error:  # no room for it on the device, for one
                log.exception("a picture of a batch went wrong in Remote VAE; it is made on this machine")
                failure = type(error).__name__

        def make() -> VaeCall[Any]:
            call = self._call(op, model, kind, original, tensor)
            if batch is None or index is None:
                return call
            # The UI gives up the whole batch with the first picture that fails.
            return replace(call, saved=batch.raw, user=User(part=f"{index + 1} of {len(batch.latents)}"))

        return self._taken(make, lambda: original(tensor), remote=index is None, because=failure)

    def _call(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any], tensor: torch.Tensor) -> VaeCall[Any]:
        def adopt(answer: Answer) -> Any:
            if isinstance(answer, DecodeAnswer):
                return answer.pixels(tensor.device, tensor.dtype)
            latents = answer.latents.to(tensor.device, tensor.dtype)
            return kind.from_moments(latents) if answer.is_posterior else kind.from_sample(latents)

        return VaeCall(
            op=op,
            tensor=kind.unscale(tensor) if op == "decode" else tensor,
            vae=_at_work(model, kind),
            adopt=adopt,
            whole=lambda: original(tensor),
            truncates=True,
        )


adapter = A1111()


def _decodes_in_full() -> bool:
    """Whether a final decode asks the VAE, and not one of the UI's approximations."""
    from modules import shared

    if shared.state.interrupted and getattr(shared.opts, "live_preview_fast_interrupt", False):
        return getattr(shared.opts, "show_progress_type", "Full") == "Full"
    return getattr(shared.opts, "sd_vae_decode_method", "Full") == "Full"


def _room(model: Any) -> Room:
    """What may leave the card while the VAE of ``model`` works: other loaded models, then its own UNet and conditioner.

    With --medvram and --lowvram the UI itself has one of them there at a time.
    """
    from modules import sd_models

    def modules() -> Iterator[Any]:
        if getattr(model, "lowvram", False):
            return
        for other in getattr(sd_models.model_data, "loaded_sd_models", []):
            if other is not model and not getattr(other, "lowvram", False):
                yield other
        yield from (part for part in model.children() if part is not model.first_stage_model)

    return Room(modules, lambda: next(model.first_stage_model.parameters()).device)


def _checkpoint(model: Any) -> str:
    return str(getattr(getattr(model, "sd_checkpoint_info", None), "model_name", ""))


def _at_work(model: Any, kind: Kind) -> VaeAtWork:
    from modules import devices, sd_vae

    vae = model.first_stage_model
    weight = next(vae.parameters())

    def whole(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = module.decode(tensor) if op == "decode" else kind.moments(module, tensor)
        return made

    return VaeAtWork(
        module=vae,
        family=_family(model, kind),
        # lowvram brings the weights there at the call. Otherwise they may have been unloaded to the CPU.
        device=torch.device(devices.device) if getattr(model, "lowvram", False) else weight.device,
        dtype=weight.dtype,
        whole=whole,
        # The one file that is picked for whichever model is in use; None: the checkpoint's own.
        picked=Path(getattr(sd_vae, "loaded_vae_file", None) or "").name,
    )


def _family(model: Any, kind: Kind) -> Family:
    """By what the UI says of the model; a model of a kind it has no name for, by its factors."""
    for attribute, name in (("is_sdxl", "sdxl"), ("is_sd3", "sd3"), ("is_sd2", "sd1"), ("is_sd1", "sd1")):
        if getattr(model, attribute, False):
            return find_family(name)
    return recognise(latent_channels=4, scaling_factor=kind.scaling_factor, shift_factor=kind.shift_factor)
