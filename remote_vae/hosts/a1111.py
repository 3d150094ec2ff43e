"""The adapter for AUTOMATIC1111's web UI: stands in front of ``decode_first_stage`` and ``encode_first_stage`` of its models.

Whatever makes a VAE call in this UI (img2img, inpaint, hires fix, ControlNet) makes it through these two methods of the loaded
model, so they are replaced on the instance. ``decode_latent_batch`` is wrapped as well, to send a whole batch at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch

from remote_vae.call import Op, Remote, Spare, VaeCall
from remote_vae.errors import RouteFailed
from remote_vae.hosts.a1111_kinds import Kind, kind_of
from remote_vae.hosts.base import ThreadState, WebUi
from remote_vae.hosts.wrapping import is_wrapped, place, unwrap
from remote_vae.local.own import on_cpu
from remote_vae.router import wants_remote
from remote_vae.settings import Settings
from remote_vae.vae.at_work import ServedVae
from remote_vae.vae.families import Family, find_family, recognise
from remote_vae.vae.fingerprint import Identity
from remote_vae.wire import DecodeAnswer, EncodeAnswer

log = logging.getLogger("remote_vae")

_METHODS: dict[Op, str] = {"decode": "decode_first_stage", "encode": "encode_first_stage"}


class _ThreadState(ThreadState):
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


class A1111(WebUi):
    """AUTOMATIC1111's web UI."""

    name = "AUTOMATIC1111"

    def __init__(self) -> None:
        super().__init__()
        self._thread: _ThreadState = _ThreadState()

    def _doors(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        from modules import processing

        return [*super()._doors(), (processing, "decode_latent_batch", self._batch_door)]

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

    def current(self) -> ServedVae | None:
        from modules import devices, sd_models

        model = sd_models.model_data.sd_model
        kind = kind_of(model) if model is not None else None
        if kind is None:
            return None
        vae = model.first_stage_model
        dtype = next(vae.parameters()).dtype
        return ServedVae(
            module=vae,
            family=_family(model, kind),
            dtype=dtype,
            # lowvram brings the weights there at the call. Otherwise they may have been unloaded to the CPU.
            device=torch.device(devices.device) if getattr(model, "lowvram", False) else next(vae.parameters()).device,
            decode=lambda latents: vae.decode(latents),
            encode=lambda pixels: kind.moments(vae, pixels),
            name=_checkpoint(model),
            calling=self.serving,
        )

    # --- a whole batch ---------------------------------------------------------------------------------------------------

    def _batch_door(self, original: Callable[..., Any], model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``decode_latent_batch``, which decodes picture after picture: the remote answer is fetched for all first."""
        kind = kind_of(model)
        takes = (
            self._takes()
            and self._thread.batch is None
            and isinstance(batch, torch.Tensor)
            and batch.shape[0] > 1
            and _decodes_in_full()
            and is_wrapped(getattr(model, _METHODS["decode"], None))
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
            identity=_identity(model),
            truncates=True,
            cancelled=self._interrupts(),
        )
        pending.raw = call.tensor
        if wants_remote(call, settings):
            try:
                with self._shown(call) as shown:
                    pending.answer = self.router.run_remote(shown, settings)
            except RouteFailed as error:
                log.log(logging.DEBUG if error.told else logging.WARNING, "remote decode of %d pictures: %s", len(batch), error)
                pending.failure = error.reason
        self._thread.batch = pending
        try:
            yield
        finally:
            self._thread.batch = None

    # --- the hook --------------------------------------------------------------------------------------------------------

    def _hooked(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*args: Any, **kwargs: Any) -> Any:
            # Other arguments belong to training and to quantised VAEs; and nobody in the UI names the tensor.
            plain = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and args[0].ndim == 4
            if not plain or not self._takes():
                return original(*args, **kwargs)
            return self._run(op, model, kind, original, args[0])

        return hooked

    def _run(self, op: Op, model: Any, kind: Kind, original: Callable[..., Any], tensor: torch.Tensor) -> Any:
        batch = self._thread.batch if op == "decode" else None
        index = batch.index_of(tensor) if batch is not None else None
        if batch is not None and index is not None and isinstance(batch.answer, DecodeAnswer):
            return batch.answer.picture(index).pixels(tensor.device, tensor.dtype)
        if batch is None or index is None:
            return self._taken(lambda: self._call(op, model, kind, original, tensor), lambda: original(tensor))
        call = self._call(op, model, kind, original, tensor)
        # The UI gives up the whole batch with the first picture that fails.
        call = replace(call, lost=batch.raw, part=f"{index + 1} of {len(batch.latents)}")
        return self._answer(call, remote=not batch.failure, because=batch.failure)

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
            identity=_identity(model),
            finish=finish,
            spares=(Spare("whole VAE on the CPU", cpu),),
            truncates=True,
            cancelled=self._interrupts(),
        )


adapter = A1111()


def _encoded(kind: Kind, answer: EncodeAnswer, like: torch.Tensor) -> Any:
    latents = answer.latents.to(like.device, like.dtype)
    return kind.from_moments(latents) if answer.is_posterior else kind.from_sample(latents)


def _decodes_in_full() -> bool:
    """Whether a final decode asks the VAE, and not one of the UI's approximations."""
    from modules import shared

    if shared.state.interrupted and getattr(shared.opts, "live_preview_fast_interrupt", False):
        return getattr(shared.opts, "show_progress_type", "Full") == "Full"
    return getattr(shared.opts, "sd_vae_decode_method", "Full") == "Full"


def _checkpoint(model: Any) -> str:
    return str(getattr(getattr(model, "sd_checkpoint_info", None), "model_name", ""))


def _identity(model: Any) -> Identity:
    from modules import sd_vae

    # The one file that is picked for whichever model is in use; None: the checkpoint's own.
    return Identity(model.first_stage_model, Path(getattr(sd_vae, "loaded_vae_file", None) or "").name)


def _family(model: Any, kind: Kind) -> Family:
    """By what the UI says of the model; a model of a kind it has no name for, by its factors."""
    for attribute, name in (("is_sdxl", "sdxl"), ("is_sd3", "sd3"), ("is_sd2", "sd1"), ("is_sd1", "sd1")):
        if getattr(model, attribute, False):
            return find_family(name)
    return recognise(latent_channels=4, scaling_factor=kind.scaling_factor, shift_factor=kind.shift_factor)
