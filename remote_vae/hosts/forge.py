"""The adapter for Forge: the two wrappers that its VAE's patcher offers.

What crosses them: raw latents ``[B, C, h, w]`` in, pixels ``[B, H, W, 3]`` in [0, 1] on the CPU out; pixels ``[1, H, W, 3]`` in
[0, 1] in, raw latents out. As long as nobody calls ``inner``, the VAE is not even brought to the GPU.

All copies of a model's parts share one patcher, and whoever clones it gets a deep copy of the wrappers: plain functions outlive
that, objects would lose their identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from remote_vae.call import Answer, VaeCall
from remote_vae.errors import OutOfMemory
from remote_vae.hosts.base import WebUi, is_picture
from remote_vae.hosts.wrapping import is_ours, is_wrapped, mark
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import recognise
from remote_vae.wire import DecodeAnswer

_WRAPPERS: dict[Op, str] = {"decode": "model_vae_decode_wrapper", "encode": "model_vae_encode_wrapper"}
_OWN_TILING: dict[Op, str] = {"decode": "decode_tiled_", "encode": "encode_tiled_"}


class Forge(WebUi):
    """Forge, from f2.0 on."""

    name = "Forge"

    def _models(self) -> list[Any]:
        from modules import sd_models

        model = getattr(sd_models.model_data, "sd_model", None)
        return [model] if hasattr(model, "forge_objects") else []

    def hook(self, model: Any) -> None:
        if not self.installed or not hasattr(model, "forge_objects"):
            return
        for patcher in _patchers(model):
            for op, key in _WRAPPERS.items():
                earlier = patcher.model_options.get(key)
                if is_wrapped(earlier):
                    continue
                wrapper = self._wrapper(op, earlier)
                mark(wrapper, earlier, self)
                setter = getattr(patcher, f"set_model_vae_{op}_wrapper")
                setter(wrapper)

    def _unhook(self, model: Any) -> None:
        for patcher in _patchers(model):
            options = patcher.model_options
            for key in _WRAPPERS.values():
                wrapper = options.get(key)
                if not is_ours(wrapper, self):
                    continue
                if wrapper.__wrapped__ is None:
                    del options[key]
                else:
                    options[key] = wrapper.__wrapped__

    def current(self) -> VaeAtWork | None:
        models = self._models()
        if not models:
            return None
        vae = models[0].forge_objects.vae
        model = str(getattr(getattr(models[0], "sd_checkpoint_info", None), "model_name", ""))
        return replace(_at_work(vae), model=model)

    @contextmanager
    def serving(self) -> Iterator[None]:
        # Forge's weights are made in inference mode.
        with super().serving(), torch.inference_mode():
            yield

    # --- the hook --------------------------------------------------------------------------------------------------------

    def _wrapper(self, op: Op, earlier: Callable[..., Any] | None) -> Callable[..., Any]:
        def wrapper(inner: Callable[..., Any], tensor: Any) -> Any:
            original = inner if earlier is None else partial(earlier, inner)
            vae = getattr(inner, "__self__", None)
            if not is_picture(tensor) or getattr(vae, "first_stage_model", None) is None or not self._takes():
                return original(tensor)
            return self._taken(lambda: self._call(op, vae, original, tensor), lambda: original(tensor))

        return wrapper

    def _call(self, op: Op, vae: Any, original: Callable[..., Any], tensor: torch.Tensor) -> VaeCall[Any]:
        def adopt(answer: Answer) -> Any:
            if isinstance(answer, DecodeAnswer):
                return _as_forge_pixels(answer.pixels(vae.output_device, torch.float32))
            latents = answer.latents.to(vae.device, vae.vae_dtype)
            moments = latents if answer.is_posterior else torch.cat([latents, latents], dim=1)
            return _drawn(vae, moments, deterministic=not answer.is_posterior)

        def whole() -> Any:
            with _no_own_tiling(vae, op):
                return original(tensor)

        return VaeCall(
            op=op,
            # A picture comes as a view with the colours last; what is sent and compared wants them first.
            tensor=tensor if op == "decode" else (tensor.movedim(-1, 1) * 2.0 - 1.0).contiguous(),
            vae=replace(_at_work(vae), picked=_picked_vae()),
            adopt=adopt,
            whole=whole,
            own_tiling=lambda: original(tensor),
            in_parts=True,
            truncates=True,
        )


def _patchers(model: Any) -> list[Any]:
    """Those of the VAE in all the sets of parts that Forge keeps of a model; an extension may have cloned one of them."""
    names = ("forge_objects", "forge_objects_original", "forge_objects_after_applying_lora")
    parts = [getattr(model, name, None) for name in names]
    vaes = [getattr(each, "vae", None) for each in parts]
    found = [vae.patcher for vae in vaes if vae is not None]
    return list({id(patcher): patcher for patcher in found}.values())


def _at_work(vae: Any) -> VaeAtWork:
    family = recognise(
        latent_channels=vae.latent_channels,
        scaling_factor=float(vae.first_stage_model.scaling_factor),
        shift_factor=float(vae.first_stage_model.shift_factor or 0.0),
        downscale=vae.downscale_ratio,
    )
    bring = partial(_brought, vae)
    return VaeAtWork(vae.first_stage_model, family, vae.device, vae.vae_dtype, whole=_whole, bring=bring)


def _whole(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
    # Without a regulation an encode would give a sample.
    made: torch.Tensor = module.decode(tensor) if op == "decode" else module.encode(tensor, lambda drawn: drawn.parameters)
    return made


def _brought(vae: Any, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` where and in what the VAE computes, after Forge has brought the VAE there and made room for one picture."""
    from backend import memory_management

    # Latents have more channels than a picture. For a picture taken for latents Forge would put every other model away.
    estimate = vae.memory_used_decode if tensor.shape[1] == vae.latent_channels else vae.memory_used_encode
    memory_management.load_models_gpu([vae.patcher], memory_required=estimate(tensor.shape, vae.vae_dtype))
    return tensor.to(vae.device, vae.vae_dtype)


def _picked_vae() -> str:
    """The VAE file among the modules that the user has picked beside the checkpoint; "" where there is none."""
    from modules import sd_models

    loading = getattr(sd_models.model_data, "forge_loading_parameters", None) or {}
    files = [Path(file) for file in loading.get("additional_modules", [])]
    # The others are text encoders, which Forge looks for in another folder.
    return next((file.name for file in files if file.parent.name.lower() == "vae"), "")


def _as_forge_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """``[B, 3, H, W]`` in [-1, 1] to ``[B, H, W, 3]`` in [0, 1]."""
    return ((pixels + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1)


def _drawn(vae: Any, moments: torch.Tensor, *, deterministic: bool) -> torch.Tensor:
    """What the VAE's own encode gives for the posterior: a sample, or what an extension's regulation makes of it."""
    from backend.nn.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(moments, deterministic=deterministic)
    regulation = vae.patcher.model_options.get("model_vae_regulation")
    latents: torch.Tensor = posterior.sample() if regulation is None else regulation(posterior)
    return latents.to(vae.output_device).float()


@contextmanager
def _no_own_tiling(vae: Any, op: Op) -> Iterator[None]:
    """Within, the VAE raises OutOfMemory where it would go to Forge's own tiling, which is not exact and slow."""
    name = _OWN_TILING[op]

    def refuse(*_: Any, **__: Any) -> Any:
        raise OutOfMemory("Forge's VAE ran out of memory, or is set to be tiled always", reason="out of memory")

    # Of the class, unless somebody has put another one into the VAE.
    theirs = vars(vae).get(name)
    setattr(vae, name, refuse)
    try:
        yield
    finally:
        delattr(vae, name)
        if theirs is not None:
            setattr(vae, name, theirs)


adapter = Forge()
