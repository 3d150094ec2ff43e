"""The adapter for plain diffusers: stands in front of ``decode`` and ``encode`` of one VAE instance.

A pipeline calls both itself (img2img and inpaint encode through ``vae.encode``), so the instance is the one seam that all of
them pass. Nothing of diffusers is imported before the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Union

import torch

from remote_vae.call import Op, Remote, Spare, VaeCall
from remote_vae.errors import UnsupportedLayout
from remote_vae.history import History
from remote_vae.local.own import on_cpu, own_tiling
from remote_vae.router import Router
from remote_vae.settings import Settings
from remote_vae.vae.families import Family, recognise_config
from remote_vae.vae.fingerprint import Identity
from remote_vae.wire import DecodeAnswer, EncodeAnswer

_OPS: tuple[Op, ...] = ("decode", "encode")


def attach(
    pipe: Any,
    settings: Union[Settings, Mapping[str, object], None] = None,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Handle:
    """Send the VAE calls of ``pipe`` to the endpoint of ``settings``, and do them locally whenever that fails.

    Args:
        pipe: a diffusers pipeline, or a VAE itself (``AutoencoderKL`` and whatever has the same ``decode`` and ``encode``).
        settings: ``Settings``, a mapping of its fields, or None for the defaults. Its ``enabled`` is the host UIs' switch and
            does not count here: attaching switches on, ``handle.enabled = False`` switches off.
        cancelled: asked about every 0.05 s while an endpoint is being waited for; True ends the wait, and the call is done
            locally.

    Returns:
        A handle: ``handle.history`` tells what happened, ``handle.settings`` can be replaced, ``handle.detach()`` undoes it.
        Attaching to an attached VAE replaces the earlier handle.

    Raises:
        SettingsError: a setting cannot be used.
        UnsupportedLayout: there is no VAE, or one whose kind is not known.
    """
    if not isinstance(settings, Settings):
        settings = Settings.from_mapping(settings or {})
    vae = getattr(pipe, "vae", None) or pipe
    family = recognise_config(getattr(vae, "config", None) or {})
    if family is None or not all(callable(getattr(vae, op, None)) for op in _OPS):
        raise UnsupportedLayout(
            f"{type(pipe).__name__} is not a diffusers pipeline with a VAE, nor a VAE with a scaling factor"
        )
    for op in _OPS:
        current = vae.__dict__.get(op)
        if isinstance(getattr(current, "handle", None), Handle):
            current.handle.detach()
    return Handle(vae, family, settings, cancelled)


class Handle:
    """A VAE whose calls go through the router. Made by ``attach``.

    Attributes:
        enabled: False passes every call on to the VAE, at the price of a function call.
        settings: the settings of the next call; assign another ``Settings`` to change them.
        history: the records of this VAE's calls.
    """

    def __init__(self, vae: Any, family: Family, settings: Settings, cancelled: Callable[[], bool]) -> None:
        self.enabled = True
        self.settings = settings
        self._router = Router(History())
        self._vae = vae
        self._family = family
        self._cancelled = cancelled
        self._hooks: dict[Op, Callable[..., Any]] = {}
        self._before = {op: vae.__dict__[op] for op in _OPS if op in vae.__dict__}
        for op in _OPS:
            self._hooks[op] = self._hook(op, getattr(vae, op))
            # nn.Module keeps plain functions in __dict__, where they stand before the class's method.
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

    def _hook(self, op: Op, original: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*args: Any, **kwargs: Any) -> Any:
            # Who names the tensor, or gives a generator by its place, asks the VAE itself.
            plain = len(args) in (1, 2) and isinstance(args[0], torch.Tensor)
            if not self.enabled or not plain or not takes(op, args[0], self._family):
                return original(*args, **kwargs)
            return answered(*args, **kwargs)

        def answered(tensor: torch.Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
            call = vae_call(self._vae, self._family, op, original, tensor, return_dict, kwargs, self._cancelled)
            return self._router.run(replace(call, identity=Identity(self._vae)), self.settings)

        hooked.handle = self  # type: ignore[attr-defined]  # attach() finds an earlier hook by it
        return hooked


def vae_call(
    vae: Any,
    family: Family,
    op: Op,
    original: Callable[..., Any],
    tensor: torch.Tensor,
    return_dict: bool,
    kwargs: dict[str, Any],
    cancelled: Callable[[], bool],
) -> VaeCall[Any]:
    """A call of ``vae.decode`` or ``vae.encode``; ``original`` is the VAE's own method, bound to it."""

    def whole() -> Any:
        return original(tensor, return_dict=return_dict, **kwargs)

    def tiled() -> Any:
        with own_tiling(vae):
            return whole()

    def adopt(answer: Remote) -> Any:
        if isinstance(answer, DecodeAnswer):
            return _decoder_output(answer.pixels(tensor.device, tensor.dtype), return_dict)
        return _encoder_output(_distribution(answer, tensor.device, tensor.dtype), return_dict)

    def finish(result: torch.Tensor) -> Any:
        return _decoder_output(result, return_dict) if op == "decode" else _encoder_output(_gaussian(result), return_dict)

    def cpu() -> Any:
        return _on_cpu(vae, op, tensor, return_dict)

    return VaeCall(
        op=op,
        tensor=tensor,
        family=family,
        whole=whole,
        adopt=adopt,
        vae=None if op == "encode" and type(vae).__name__ == "AutoencoderTiny" else vae,
        finish=finish,
        spares=(Spare("the VAE's own tiling", tiled), Spare("whole VAE on the CPU", cpu)),
        cancelled=cancelled,
    )


def _on_cpu(original: Any, op: Op, tensor: torch.Tensor, return_dict: bool) -> Any:
    vae = on_cpu(original)
    result = getattr(vae, op)(tensor.to("cpu", torch.float32))
    if op == "decode":
        return _decoder_output(result.sample.to(tensor.device, tensor.dtype), return_dict)
    if not hasattr(result, "latent_dist"):
        # AutoencoderTiny's: latents, and no distribution.
        result.latents = result.latents.to(tensor.device, tensor.dtype)
        return result if return_dict else (result.latents,)
    moments = result.latent_dist.parameters.to(tensor.device, tensor.dtype)
    return _encoder_output(_gaussian(moments), return_dict)


def takes(op: Op, tensor: torch.Tensor, family: Family) -> bool:
    """Whether the router knows this call: pictures, not videos, with the channels that belong to it."""
    channels = family.latent_channels if op == "decode" else 3
    return tensor.ndim == 4 and tensor.shape[1] == channels and not family.video


def _decoder_output(pixels: torch.Tensor, return_dict: bool) -> Any:
    if not return_dict:
        return (pixels,)
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=pixels)


def _encoder_output(distribution: Any, return_dict: bool) -> Any:
    if not return_dict:
        return (distribution,)
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return AutoencoderKLOutput(latent_dist=distribution)


def _distribution(answer: EncodeAnswer, device: torch.device, dtype: torch.dtype) -> Any:
    latents = answer.latents.to(device, dtype)
    if answer.is_posterior:
        return _gaussian(latents)
    # A sample that is already drawn: whatever is asked of the distribution, this is it.
    return _gaussian(torch.cat([latents, torch.zeros_like(latents)], dim=1), deterministic=True)


def _gaussian(moments: torch.Tensor, *, deterministic: bool = False) -> Any:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(moments, deterministic=deterministic)
