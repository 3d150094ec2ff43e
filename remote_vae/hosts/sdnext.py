"""The adapter for SD.Next: stands in front of ``decode`` and ``encode`` of diffusers' ``AutoencoderKL``, the class.

SD.Next puts other VAEs into its pipelines without telling anybody, and pipelines call ``vae.encode`` themselves; the class is
what all of them pass. Only calls of the VAE of a loaded model are taken: the preprocessors of its Control tab own VAEs as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from remote_vae.call import VaeCall
from remote_vae.hosts.base import ThreadState, WebUi
from remote_vae.hosts.diffusers_calls import parameters_of, vae_call
from remote_vae.vae.at_work import Op, VaeAtWork, has_posterior
from remote_vae.vae.families import recognise_config

# What SD.Next calls the VAE that comes with the model.
_OWN_VAE = ("Automatic", "Default", "None", "")
_OPS: tuple[Op, ...] = ("decode", "encode")


class _ThreadState(ThreadState):
    # Whether what is being decoded becomes 8 bits by rounding.
    rounds = False


class SdNext(WebUi):
    """SD.Next with diffusers."""

    name = "SD.Next"
    seams = ("diffusers.AutoencoderKL.decode and encode",)
    version_at = "installer:git_commit"

    def __init__(self) -> None:
        super().__init__()
        self._thread: _ThreadState = _ThreadState()

    def _wrapped_functions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        import diffusers
        from modules import processing_diffusers, processing_vae

        return [
            *super()._wrapped_functions(),
            (processing_diffusers, "process_diffusers", self._around_batch),
            (processing_vae, "vae_decode", self._around_decode),
            *((diffusers.AutoencoderKL, op, partial(self._around_vae, op)) for op in _OPS),
        ]

    def hook(self, model: Any) -> None:
        """Nothing to do: the class is hooked, and its instances are looked at when they are called."""

    def _unhook(self, model: Any) -> None:
        """Nothing was done."""

    def current(self) -> VaeAtWork | None:
        from modules import devices

        models = self._models()
        vaes = [vae for vae in map(_vae_of, models) if vae is not None]
        family = recognise_config(vaes[0].config, type(vaes[0]).__name__) if vaes else None
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

    def _around_preview(self, original: Callable[..., Any], sample: Any, approximation: Any = None) -> Any:
        """In this UI the approximation is named for previews as well."""
        with self.passing_on():
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

    def _around_vae(self, op: Op, original: Callable[..., Any], vae: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``decode`` and ``encode`` of the class."""
        own = partial(original, vae, *args, **kwargs)
        if not self._takes() or not self._is_loaded(vae):
            return own()
        return self._taken(lambda: self._call(op, vae, partial(original, vae), args, kwargs), own)

    def _call(
        self, op: Op, vae: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> VaeCall[Any] | None:
        family = recognise_config(vae.config, type(vae).__name__)
        if family is None:
            return None
        at_work = VaeAtWork(vae, family, bring=partial(_brought, vae), picked=_picked_vae())
        call = vae_call(at_work, op, own, parameters_of(getattr(vae, op)), args, kwargs)
        return None if call is None else replace(call, truncates=not self._thread.rounds)

    def _is_loaded(self, vae: Any) -> bool:
        """Whether ``vae`` belongs to the model or its refiner, or to the pipeline within either."""
        return any(vae is _vae_of(model) for model in self._models())


def _vae_of(model: Any) -> Any:
    """The VAE of a pipeline, or of the pipeline within; None where there is none."""
    own = getattr(model, "vae", None)
    return getattr(getattr(model, "pipe", None), "vae", None) if own is None else own


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
