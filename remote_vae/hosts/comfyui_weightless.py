"""A VAE object for ComfyUI that has no weights: every call goes to the endpoint; what cannot be done without them says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from remote_vae.call import Answer, VaeCall
from remote_vae.errors import RemoteVaeError
from remote_vae.hosts.comfyui import ComfyUi, Wanted
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.crossing import Crossing
from remote_vae.vae.families import Family
from remote_vae.wire import DecodeAnswer

_NO_WEIGHTS = (
    "Load Remote VAE has no weights here, so it cannot {}: load the VAE's file with Load VAE, and put Remote VAE behind it"
)
# Of diffusers. ComfyUI's own VAEs of these change the latents by numbers among their weights (TAESD's scale, the mean and
# deviation of LTX and Cosmos), or lay frames out in another way: what crosses them is not what the wire carries.
_NOT_RAW = frozenset({
    "AutoencoderTiny",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLCosmos",
    "AutoencoderKLTemporalDecoder",
    "AutoencoderKLHunyuanImageRefiner",
})  # fmt: skip


def does_without_weights(family: Family) -> bool:
    """Whether raw latents of ``family`` are what crosses ComfyUI's VAE, so that no weights are needed to turn them."""
    return _NOT_RAW.isdisjoint(family.classes)


def weightless_vae(adapter: ComfyUi, family: Family, wanted: Wanted) -> Any:
    """A VAE object of ComfyUI's own class, of ``family``, that asks the endpoint for everything.

    Raises:
        RemoteVaeError: with no weights its latents cannot be turned into those that the endpoint takes.
    """
    if not does_without_weights(family):
        raise RemoteVaeError(_NO_WEIGHTS.format(f"decode or encode for {family.label}"))
    import comfy.model_patcher
    import comfy.sd
    from comfy import model_management

    vae: Any = object.__new__(_class(adapter, comfy.sd.VAE))
    # ComfyUI's own defaults for all that its nodes may ask a VAE for. It has a line for the log that there are no weights.
    root = logging.getLogger()
    root.addFilter(_says_no_weights)
    try:
        comfy.sd.VAE.__init__(vae, sd={})
    finally:
        root.removeFilter(_says_no_weights)
    vae.first_stage_model = torch.nn.Module()
    vae.device = vae.output_device = model_management.intermediate_device()
    vae.vae_dtype = torch.float32
    vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, load_device=vae.device, offload_device=vae.device)
    vae.size = 0
    vae.memory_used_encode = vae.memory_used_decode = lambda *_, **__: 0
    crossing = _crossing(family)
    vae.remote_vae_wanted = replace(wanted, family=crossing)
    # The numbers that norm them are among the weights: only where those are can it be done.
    vae.remote_vae_packs = crossing != family
    _shape(vae, crossing)
    return vae


def _says_no_weights(record: logging.LogRecord) -> bool:
    return "No VAE weights detected" not in record.getMessage()


def _crossing(family: Family) -> Family:
    """``family`` as its latents cross a VAE of ComfyUI: those of Flux.2 are packed, and a server takes and gives them so."""
    if family.key != "flux2":
        return family
    return replace(family, latent_channels=4 * family.latent_channels, downscale=2 * family.downscale)


def _shape(vae: Any, family: Family) -> None:
    """What nodes ask a VAE for before they call it."""
    scale = family.downscale
    vae.latent_channels = family.latent_channels
    vae.output_channels = family.pixel_channels
    vae.latent_dim = 3 if family.video else 2
    vae.not_video = False
    if family.video:
        vae.upscale_ratio = (family.frames, scale, scale)
        vae.downscale_ratio = (family.latent_frames, scale, scale)
        vae.upscale_index_formula = vae.downscale_index_formula = (family.frame_scale, scale, scale)
    else:
        vae.upscale_ratio = vae.downscale_ratio = scale


_classes: dict[type, type] = {}


def _class(adapter: ComfyUi, cls: type) -> type:
    """Made at run time, as ComfyUI's class is."""
    if cls in _classes:
        return _classes[cls]

    def decode(self: Any, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        pixels = adapter.ask(_call(self, "decode", _latents(adapter, self, samples)), self.remote_vae_wanted)
        return _on(self, Crossing(self.remote_vae_wanted.family).pixels(pixels, samples))

    def encode(self: Any, pixels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        family = self.remote_vae_wanted.family
        raw = Crossing(family).raw_pixels(self.vae_encode_crop_pixels(pixels))
        if raw is None:
            raise RemoteVaeError(
                f"Load Remote VAE: got a picture of shape {list(pixels.shape)}, expected [B, H, W, {family.pixel_channels}] "
                f"for {family.label}"
            )
        return _on(self, adapter.ask(_call(self, "encode", raw), self.remote_vae_wanted))

    methods = {
        "decode": decode,
        "decode_tiled": decode,
        "encode": encode,
        "encode_tiled": encode,
        "get_sd": _refusal("be saved"),
        "__module__": __name__,
    }
    _classes[cls] = type("WeightlessVAE", (cls,), methods)
    return _classes[cls]


def _latents(adapter: ComfyUi, vae: Any, samples: torch.Tensor) -> torch.Tensor:
    if vae.latent_dim == 2 and samples.ndim == 5:
        samples = samples[:, :, 0]
    wanted = vae.latent_channels
    if samples.ndim != vae.latent_dim + 2 or samples.shape[1] != wanted:
        # The user may serve the right one now.
        adapter.doubts += 1
        frames = "F, " if vae.latent_dim == 3 else ""
        raise RemoteVaeError(
            f"Load Remote VAE: got latents of shape {list(samples.shape)}, expected [B, {wanted}, {frames}h, w] of "
            f"{vae.remote_vae_wanted.family.label}; the endpoint's VAE is for another model than the one that made them"
        )
    return samples


def _call(vae: Any, op: Op, tensor: torch.Tensor) -> VaeCall[torch.Tensor]:
    def adopt(answer: Answer) -> torch.Tensor:
        if isinstance(answer, DecodeAnswer):
            return answer.pixels(vae.output_device, torch.float32)
        return answer.latents.chunk(2, dim=1)[0] if answer.is_posterior else answer.latents

    packed = op == "encode" and vae.remote_vae_packs
    return VaeCall(op, tensor, VaeAtWork(None, vae.remote_vae_wanted.family), adopt, truncates=True, packed=packed)


def _on(vae: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(vae.output_device, torch.float32)


def _refusal(what: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RemoteVaeError(_NO_WEIGHTS.format(what))

    return refuse
