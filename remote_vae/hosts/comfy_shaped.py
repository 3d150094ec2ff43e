"""The VAE object that grew alike in ComfyUI, Forge, Forge Neo, reForge and ersatzForge, and a call of it as a ``VaeCall``.

What crosses it: latents ``[B, C, h, w]`` in, pixels ``[B, H, W, 3]`` in [0, 1] out, and the other way; see ``vae.crossing``.
The VAE brings itself to its device: as long as its own call is not made, it is not even loaded.

What the hosts do differently is data: a ``Seam`` for each. There are two ways to stand in front of such a VAE, with the same
``around(method, original, vae, *args, **kwargs)``: all objects of its class (``class_hooks``), or one of them (``overriding``).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from remote_vae.call import Answer, VaeCall
from remote_vae.errors import OutOfMemory, UnsupportedLayout
from remote_vae.hosts.comfy_kinds import family_of, raw_module, whole
from remote_vae.hosts.wrapping import mark
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.crossing import Crossing
from remote_vae.vae.families import Family
from remote_vae.vae.packed import batch_norm_of
from remote_vae.wire import DecodeAnswer

log = logging.getLogger("remote_vae")

Around = Callable[..., Any]

# The methods of the seam, what each does, and the arguments beside the tensor with which a call is still the same one. A tiled
# call has an untiled answer: the picture without the marks of the tiles.
_METHODS: Mapping[str, Op] = {"decode": "decode", "encode": "encode", "decode_tiled": "decode", "encode_tiled": "encode"}
_TILES = ("tile_x", "tile_y", "overlap", "tile_t", "overlap_t")
_TENSORS = ("samples_in", "samples", "pixel_samples", "pixels")


@dataclass(frozen=True)
class Seam:
    """The comfy-shaped VAE of one host.

    Attributes:
        host: its name.
        vae: the class, as ``module:class``.
        memory: the module whose ``load_models_gpu`` brings the VAE to its device.
        methods: the methods that are asked from outside; where the tiled ones are left out, they are only parts of the others.
        distribution: the class that draws the sample that an encode gives, as ``module:class``; "": it gives the mean.
        is_regulated: whether an extension may say what becomes of the posterior (``model_vae_regulation``).
        factors: where the model's factors are, as attributes of the VAE: those of the latents' format, or of the module itself;
            "": the VAE does not know them.
        turning: methods of the VAE that make raw latents of what crosses it, and back; empty where the module does that itself.
        spreads: whether the normed latents of Flux.2 cross it as 32 channels, and not packed into 128.
        by_picture: whether a video VAE is asked for pictures ``[B, C, h, w]``, and knows no frames.
        picked: where the name of the VAE file is that the user has picked, as ``module:attribute``.
        version: what names the host's version, as ``module:attribute``.
    """

    host: str
    vae: str
    memory: str
    methods: tuple[str, ...] = tuple(_METHODS)
    distribution: str = ""
    is_regulated: bool = False
    factors: str = ""
    turning: tuple[str, ...] = ()
    spreads: bool = False
    by_picture: bool = False
    picked: str = "modules.sd_models:model_data.forge_loading_parameters"
    version: str = "modules_forge.forge_version:version"

    def vae_class(self) -> type:
        found: type = load(self.vae)
        return found


FORGE = Seam(
    "Forge",
    vae="backend.patcher.vae:VAE",
    memory="backend.memory_management",
    distribution="backend.nn.vae:DiagonalGaussianDistribution",
    is_regulated=True,
    factors="first_stage_model",
)
NEO = replace(
    FORGE,
    host="Forge Neo",
    is_regulated=False,
    factors="first_stage_model.latent_format",
    version="modules_forge.forge_version:release",
)
ERSATZ = replace(
    FORGE,
    host="ersatzForge",
    # Its tiled methods are parts of these: they take and give the colours first.
    methods=("decode", "encode"),
    is_regulated=False,
    spreads=True,
    by_picture=True,
)
REFORGE = Seam(
    "reForge",
    vae="ldm_patched.modules.sd:VAE",
    memory="ldm_patched.modules.model_management",
    turning=("_to_vae_latent", "_from_vae_latent"),
    picked="modules.sd_vae:loaded_vae_file",
)
COMFYUI = Seam(
    "ComfyUI",
    vae="comfy.sd:VAE",
    memory="comfy.model_management",
    picked="",
    version="comfyui_version:__version__",
)


def load(name: str) -> Any:
    """What ``module:attribute.attribute`` names in this host. Raises ImportError, AttributeError."""
    module, _, path = name.partition(":")
    return attrgetter(path)(importlib.import_module(module))


def attribute(owner: Any, path: str) -> Any:
    """What ``path``, as ``name.name``, leads to from ``owner``; None: nowhere."""
    try:
        return attrgetter(path)(owner) if path else None
    except AttributeError:
        return None


@dataclass(frozen=True)
class Known:
    """What is known of a VAE beside its object.

    Attributes:
        family: what the user says that it is; None: what can be seen.
        factors: the model's factors, where the VAE does not know them (``scale_factor``, ``shift_factor``).
        picked: the file that the user picked in the UI.
    """

    family: Family | None = None
    factors: Any = None
    picked: str = ""


_NOTHING = Known()

# --- standing in front of it -------------------------------------------------------------------------------------------


def class_hooks(seam: Seam, around: Around) -> list[tuple[Any, str, Callable[..., Any]]]:
    """What ``wrap`` is to put around the methods of all VAEs of the host: class, method, and what goes around it."""
    owner = seam.vae_class()
    return [(owner, method, partial(around, method)) for method in seam.methods if hasattr(owner, method)]


def overriding(seam: Seam, vae: Any, around: Around) -> Any:
    """A VAE like ``vae``, with its weights and whatever else it has, whose methods go through ``around``.

    It is an object of a subclass of the VAE's own class, made here. Of one that was made so before there is no second layer.
    """
    base = type(vae)
    if getattr(base, "remote_vae_base", None) is not None:
        base = base.remote_vae_base
    methods = {name: _overridden(name, around, getattr(base, name)) for name in seam.methods if hasattr(base, name)}
    made = type(base.__name__, (base,), {**methods, "remote_vae_base": base, "__module__": base.__module__})
    twin: Any = object.__new__(made)
    twin.__dict__.update(vars(vae))
    return twin


def _overridden(name: str, around: Around, original: Callable[..., Any]) -> Callable[..., Any]:
    def method(vae: Any, *args: Any, **kwargs: Any) -> Any:
        return around(name, original, vae, *args, **kwargs)

    mark(method, original, around)
    return method


# --- a call of it ------------------------------------------------------------------------------------------------------


def at_work(seam: Seam, vae: Any, known: Known = _NOTHING) -> VaeAtWork:
    """The VAE that a host's object holds.

    Raises:
        UnsupportedLayout: it is of a kind that is not known, or its weights are not what they seem; the message says why.
    """
    if getattr(vae, "first_stage_model", None) is None:
        raise UnsupportedLayout("the VAE has no weights")
    if any(getattr(vae.patcher, name, None) for name in ("patches", "object_patches")):
        # They change the weights only while it is loaded.
        raise UnsupportedLayout("patches change the weights of this VAE")
    family = family_of(vae, known.factors or attribute(vae, seam.factors), known.family)
    return VaeAtWork(
        module=raw_module(vae.first_stage_model),
        family=family,
        device=torch.device(vae.device),
        dtype=vae.vae_dtype,
        whole=partial(whole, by_picture=seam.by_picture),
        bring=partial(_brought, seam, vae, _crossing(seam, vae, family)),
        picked=known.picked,
    )


def vae_call(
    seam: Seam,
    method: str,
    original: Callable[..., Any],
    vae: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    known: Known = _NOTHING,
) -> VaeCall[Any] | None:
    """The call ``original(vae, *args, **kwargs)`` of ``method``.

    Returns:
        None where it is the host's own: with arguments, or of shapes, that are not known.

    Raises:
        UnsupportedLayout: as ``at_work`` does.
    """
    op, tensor = _METHODS[method], _tensor_of(args, kwargs)
    if tensor is None or not _is_plain(method, args, kwargs):
        return None
    at = at_work(seam, vae, known)
    crossing = _crossing(seam, vae, at.family)

    def own() -> Any:
        return original(vae, *args, **kwargs)

    def untiled() -> Any:
        with no_own_tiling(vae, op):
            return own()

    def adopt(answer: Answer) -> Any:
        if isinstance(answer, DecodeAnswer):
            return crossing.pixels(answer.pixels(vae.output_device, torch.float32), tensor).to(_output_dtype(vae))
        given = answer.latents.to(vae.device, vae.vae_dtype)
        latents = crossing.latents(_drawn(seam, vae, given, is_posterior=answer.is_posterior))
        return _turned(seam, vae, latents.to(vae.output_device, _output_dtype(vae)), back=True)

    if op == "decode":
        raw = crossing.raw_latents(_turned(seam, vae, tensor))
    else:
        raw = crossing.raw_pixels(_cropped(vae, tensor), as_frames=not _is_not_video(vae, kwargs))
    if raw is None:
        return None
    return VaeCall(
        op=op,
        tensor=raw,
        vae=at,
        adopt=adopt,
        # What was asked for in tiles is made in tiles here.
        whole=untiled if method == op else own,
        own_tiling=own,
        make_room=partial(_make_room, seam, vae),
        in_parts=True,
        truncates=True,
    )


def _crossing(seam: Seam, vae: Any, family: Family) -> Crossing:
    module = vae.first_stage_model
    # Mugen's, in Forge Neo, is Flux.2's and spreads them, too.
    return Crossing(family, seam.by_picture, batch_norm_of(module), seam.spreads or bool(getattr(module, "mugen", False)))


def _tensor_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The latents or pixels of a call, by position or by one of their names in the hosts; None where they are none for us."""
    given = args[0] if args else next((kwargs[name] for name in _TENSORS if name in kwargs), None)
    if not isinstance(given, torch.Tensor) or given.ndim not in (4, 5) or not given.is_floating_point() or 0 in given.shape:
        return None
    return None if given.requires_grad and torch.is_grad_enabled() else given


def _is_plain(method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether nothing beside the tensor makes it another call: the sizes of tiles do not, and options that are empty."""
    if method not in ("decode", "encode"):
        return set(kwargs) <= {*_TENSORS, *_TILES} and len(args) <= 1 + len(_TILES)
    more = {name: value for name, value in kwargs.items() if name not in _TENSORS}
    return len(args) <= 1 and not any(value for name, value in more.items() if name != "not_video")


def _is_not_video(vae: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether several pictures are no frames of one video, to ComfyUI."""
    asked = kwargs.get("not_video")
    return bool(getattr(vae, "not_video", False) if asked is None else asked)


def _cropped(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """As the host itself does: to multiples, in the middle, and to as many channels as there are colours."""
    crop = getattr(vae, "vae_encode_crop_pixels", None)
    return pixels if crop is None else crop(pixels)


def _turned(seam: Seam, vae: Any, latents: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Raw latents of what crosses, or ``back``, where the object itself turns them."""
    turn = getattr(vae, seam.turning[back], None) if seam.turning else None
    return latents if turn is None else turn(latents)


def _output_dtype(vae: Any) -> torch.dtype:
    dtype: torch.dtype = vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32
    return dtype


def _drawn(seam: Seam, vae: Any, given: torch.Tensor, *, is_posterior: bool) -> torch.Tensor:
    """What the host's own encode gives for the posterior: its mean, a sample, or what an extension's regulation makes of it.

    A sample that an endpoint has drawn is taken as it is.
    """
    if given.ndim == 5 or not seam.distribution:
        # Wan's give the mean in all of them.
        return given.chunk(2, dim=1)[0] if is_posterior else given
    moments = given if is_posterior else torch.cat([given, given], dim=1)
    posterior = load(seam.distribution)(moments, deterministic=not is_posterior)
    regulation = vae.patcher.model_options.get("model_vae_regulation") if seam.is_regulated else None
    drawn: torch.Tensor = posterior.sample() if regulation is None else regulation(posterior)
    return drawn


def _brought(seam: Seam, vae: Any, crossing: Crossing, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` where and in what the VAE computes, after the host has brought the VAE there and made room for one picture."""
    # A VAE has more latent channels than colours. For a picture taken for latents a host would put every other model away.
    is_decode = tensor.shape[1] == crossing.family.latent_channels
    estimate = vae.memory_used_decode if is_decode else vae.memory_used_encode
    shape = crossing.crossing_shape(tensor.shape) if is_decode else tensor.shape
    more = {"force_full_load": True} if getattr(vae, "disable_offload", False) else {}
    load(f"{seam.memory}:load_models_gpu")([vae.patcher], memory_required=estimate(shape, vae.vae_dtype), **more)
    return tensor.to(vae.device, vae.vae_dtype)


def _make_room(seam: Seam, vae: Any, wanted: int, least: int) -> int:
    """See ``VaeCall.make_room``. The host has made room for what it reckons with; it brings models back when they are used."""
    try:
        memory = importlib.import_module(seam.memory)
        device = torch.device(getattr(vae.patcher, "load_device", vae.device))
        loaded = [(each, getattr(each.model, "model", None)) for each in memory.current_loaded_models]
        keep = [each for each, model in loaded if model is vae.patcher.model]
        others = [model for _, model in loaded if isinstance(model, torch.nn.Module) and model is not vae.patcher.model]
        there = sum(weight.nbytes for model in others for weight in model.parameters() if weight.device == device)
        if device.type == "cpu" or there < least:
            return 0
        before = memory.get_free_memory(device)
        memory.free_memory(before + wanted, device, keep)
        return max(0, int(memory.get_free_memory(device) - before))
    except Exception:  # the picture is made in less
        log.warning("%s made no room", seam.host, exc_info=True)
        return 0


@contextmanager
def no_own_tiling(vae: Any, op: Op) -> Iterator[None]:
    """Within, the VAE raises OutOfMemory where it would go to the host's own tiling, which is not exact and slow."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OutOfMemory("the host's VAE ran out of memory, or is set to be tiled always", reason="out of memory")

    names = [name for name in dir(type(vae)) if name.lstrip("_").startswith(f"{op}_tiled")]
    # Of the class, unless somebody has put another one into the VAE.
    theirs = {name: vars(vae)[name] for name in names if name in vars(vae)}
    vars(vae).update(dict.fromkeys(names, refuse))
    try:
        yield
    finally:
        for name in names:
            vars(vae).pop(name, None)
        vars(vae).update(theirs)
