"""Loads the VAE that the server serves: a diffusers folder, a .safetensors file, or a Hugging Face model id."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remote_vae.errors import SettingsError, UnsupportedLayout
from remote_vae.server.weights import INDEX_SUFFIX, SUFFIXES, build, other_than, read_shards, read_weights, shard_names
from remote_vae.tiled.memory import is_out_of_memory
from remote_vae.vae.at_work import Op, VaeAtWork, has_posterior, is_of, whole_diffusers
from remote_vae.vae.families import Family, family_of, find_family
from remote_vae.vae.fingerprint import ROUNDINGS, fingerprint
from remote_vae.wire import FINGERPRINT_KEYS
from remote_vae.wire.tensors import DTYPES

log = logging.getLogger("remote_vae")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CLASS = re.compile(r"\w*Autoencoder\w*")
# As diffusers names them, in the order of preference: one file, or the index of several.
_WEIGHTS = tuple(
    f"diffusion_pytorch_model{name}"
    for variant in ("", ".fp16", ".bf16")
    for name in (f"{variant}.safetensors", f".safetensors.index{variant}.json")
)
# Where a folder or a repository has its VAE.
_PLACES = ("", "vae")
_HUB_SECONDS = 5.0
# Cells along a side of the latents that are tried when a VAE was loaded.
_TRIAL = 8


@dataclass(frozen=True)
class LoadedVae:
    """A VAE of the server's own, ready to run: in eval mode, on its device. It is the engine's ``Provider``.

    ``fingerprints`` are of its weights as they were stored, by rounding; ``whole`` is how it is called.
    """

    vae: Any
    family: Family
    source: str
    fingerprints: Mapping[str, str]
    whole: Callable[[Any, Op, torch.Tensor], torch.Tensor] = whole_diffusers

    @property
    def fingerprint(self) -> str:
        return self.fingerprints["float16"]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vae.device
        return device

    @property
    def about(self) -> dict[str, str]:
        """What ``GET /info`` says of the weights as they were stored."""
        return {key: self.fingerprints[rounding] for rounding, key in FINGERPRINT_KEYS.items()}

    def shares(self) -> bool:
        """A server is there to be asked."""
        return True

    def current(self) -> VaeAtWork:
        """Always this one."""
        return VaeAtWork(
            module=self.vae,
            family=self.family,
            device=self.device,
            dtype=self.dtype,
            whole=self.whole,
            model=public_name(self.source),
            has_posterior=has_posterior(self.vae),
        )

    def serving(self) -> AbstractContextManager[Any]:
        """Nobody trains here."""
        return torch.inference_mode()


def no_room_needed(_: int) -> None:
    """Nothing can be put away."""


def load_vae(
    source: str,
    *,
    family: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    make_room: Callable[[int], object] = no_room_needed,
) -> LoadedVae:
    """Load the VAE at ``source``; weights come from safetensors only, never from a pickle.

    Args:
        source: a folder with a diffusers VAE (or a pipeline with a ``vae`` folder), a .safetensors file with a VAE alone or
            inside a checkpoint, or a hub id such as "stabilityai/sd-vae-ft-mse".
        family: a key of families.toml; needed for a .safetensors file without its config.json whose names and shapes several
            families have (SD 1 and SDXL; SD 3 and Flux).
        dtype: "float32", "float16", "bfloat16", or "auto": on a GPU of Nvidia, AMD or Intel float16, or bfloat16 where the
            model is published so and is no AutoencoderKL; else float32.
        device: a torch device, or "auto": the first GPU, else the CPU.
        make_room: called with the bytes of the weights before they go to the device.

    Raises:
        SettingsError: nothing there, not a VAE, not one that makes pictures, or the family is needed and missing.
    """
    chosen = _device(device)
    _dtype(dtype, chosen, None)
    known = find_family(family) if family else None
    vae = _load(source, known)
    found = _family(vae, known, source)
    target = _dtype(dtype, chosen, found)
    state = vae.state_dict()
    names = {rounding: fingerprint(state, rounding) for rounding in ROUNDINGS}
    make_room(sum(tensor.numel() for tensor in state.values()) * target.itemsize)
    try:
        # Not diffusers' own to(), which warns of modules to keep in float32 that a VAE does not have. Gradients stay switched
        # on, as from_pretrained leaves them: the last bit of a matrix product depends on that, and is to be the pipeline's.
        vae = nn.Module.to(vae, chosen, target).eval()
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {device}: {_line(error)}") from None
    loaded = LoadedVae(vae, found, source, names)
    try:
        _try(loaded)
    except Exception as error:
        # Out of memory, a call will be done in tiles.
        if not is_out_of_memory(error):
            raise SettingsError(
                f"--vae {source}: {type(vae).__name__} does not make pictures of latents: {_line(error)}"
            ) from error
    return loaded


def _family(vae: Any, named: Family | None, source: str) -> Family:
    """What the VAE is by its class and config, or as what the user wants it served. Raises SettingsError: neither can be."""
    try:
        seen = family_of(vae)
    except UnsupportedLayout as error:
        raise SettingsError(f"--vae {source}: {error}") from None
    if named is None or named.key == seen.key:
        return seen
    if named.shape != seen.shape or not is_of(vae, *named.classes):
        raise SettingsError(f"--vae {source}: {other_than(type(vae).__name__, seen.shape, named)}")
    if seen.is_known:
        log.warning("--vae %s: by its config it is of %s, and it is served as that of %s", source, seen.label, named.label)
    return named


def _try(loaded: LoadedVae) -> None:
    """Make a small picture, of one frame, and encode it again; it also loads the kernels of a GPU.

    Raises whatever the VAE raises. ValueError: what it makes is no such picture or no such latents as its family says.
    """
    family, vae = loaded.family, loaded.current()
    frames = (1,) if family.video else ()
    side = _TRIAL * family.downscale
    latents = (1, family.latent_channels, *frames, _TRIAL, _TRIAL)
    picture = (1, family.pixel_channels, *frames, side, side)
    with loaded.serving():
        pixels = whole_diffusers(vae.module, "decode", torch.zeros(latents, device=vae.device, dtype=vae.dtype))
        if pixels.shape != picture:
            raise ValueError(f"latents {list(latents)} give {list(pixels.shape)}, and not a picture {list(picture)}")
        encoded = whole_diffusers(vae.module, "encode", pixels)
    expected = (1, family.latent_channels * (2 if vae.has_posterior else 1), *latents[2:])
    if encoded.shape != expected:
        raise ValueError(f"a picture {list(picture)} gives {list(encoded.shape)}, and not latents {list(expected)}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = next((kind for kind in ("cuda", "xpu", "mps") if _is_there(kind)), "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise SettingsError(f"--device {name} cannot be used here: {_line(error)}") from None
    return device


def devices_of(names: str) -> tuple[torch.device, ...]:
    """The devices that VAEs are to work on: "cuda:0,cuda:1", "cpu", or "auto": every GPU, else the CPU.

    Raises:
        SettingsError: one cannot be used here, or stands there twice.
    """
    if names.strip() == "auto":
        kind = _device("auto").type
        count = getattr(torch, kind).device_count() if kind in ("cuda", "xpu") else 1
        return tuple(torch.device(kind, index) for index in range(count)) if count > 1 else (_device("auto"),)
    devices = tuple(_device(name.strip()) for name in names.split(","))
    # "cuda" is the first of them.
    if len({(device.type, device.index or 0) for device in devices}) < len(devices):
        raise SettingsError(f"--device {names}: each device once, please")
    return devices


def _is_there(kind: str) -> bool:
    part = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    return part is not None and bool(part.is_available())


def _dtype(name: str, device: torch.device, family: Family | None) -> torch.dtype:
    """What to compute in; raises SettingsError for no dtype, also before there is a family.

    On a GPU the VAEs of AutoencoderKL's kind are in float16, which they are used in everywhere; others in what their models are
    published in, as float16 overflows in some (Sana, Wan).
    """
    if name == "auto":
        if device.type not in ("cuda", "xpu"):
            return torch.float32
        wants_bfloat16 = family is not None and "AutoencoderKL" not in family.classes and family.dtype == "bfloat16"
        has_bfloat16 = device.type == "xpu" or torch.cuda.is_bf16_supported()
        return torch.bfloat16 if wants_bfloat16 and has_bfloat16 else torch.float16
    if name not in DTYPES or name == "uint8":
        raise SettingsError(f"--dtype must be auto, float32, float16 or bfloat16, not {name}")
    return DTYPES[name]


def _load(source: str, family: Family | None) -> Any:
    path = Path(source).expanduser()
    if path.is_file():
        return _built(path, path.with_name("config.json"), family)
    if path.is_dir():
        return _from_folder(path, family)
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        return _from_hub(source, family)
    raise SettingsError(f"--vae {source}: no such folder or file, and not a model id such as stabilityai/sd-vae-ft-mse")


def _from_folder(folder: Path, family: Family | None) -> Any:
    failure = ""
    for place in _PLACES:
        config_file = folder / place / "config.json"
        if not config_file.is_file():
            continue
        if _read_config(config_file) is None:
            failure = failure or f"{config_file} is not a VAE's"
            continue
        files = sorted(file for file in config_file.parent.iterdir() if file.suffix.lower() in SUFFIXES)
        usual = [file for file in (config_file.with_name(name) for name in _WEIGHTS) if file.is_file()]
        if not usual and len(files) != 1:
            found = f"there are {len(files)}: name one of them" if files else "there are none"
            raise SettingsError(f"--vae {folder}: its weights cannot be loaded from safetensors files, as {found}")
        return _built((usual or files)[0], config_file, family)
    raise SettingsError(f"--vae {folder}: no VAE found there or in its folder vae ({failure or 'no config.json'})")


def _from_hub(source: str, family: Family | None) -> Any:
    """From the cache of Hugging Face where it is there, so that a server starts without a network as well."""
    import huggingface_hub

    try:
        files = _in_repository(source, cached=True)
        if files is None:
            # The downloads would try again for half a minute where there is no network.
            huggingface_hub.HfApi().model_info(source, timeout=_HUB_SECONDS)
            files = _in_repository(source, cached=False)
    except SettingsError:
        raise
    except Exception as error:  # of whichever HTTP library it uses
        raise SettingsError(
            f"--vae {source}: not on this machine, and not to be had from huggingface.co: {_line(error)}"
        ) from None
    if files is None:
        raise SettingsError(f"--vae {source}: no VAE with safetensors weights found there or in its folder vae")
    return _built(*files, family)


def _in_repository(source: str, *, cached: bool) -> tuple[Path, Path] | None:
    """Weights, or their index, and config of a repository's VAE, downloaded unless ``cached``; None: there is none.

    Raises what the hub's client raises.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def file(name: str, place: str) -> Path | None:
        try:
            return Path(hf_hub_download(source, name, subfolder=place or None, local_files_only=cached))
        except EntryNotFoundError:
            return None

    for place in _PLACES:
        config_file = file("config.json", place)
        if config_file is None or _read_config(config_file) is None:
            continue
        weights = next(filter(None, (file(name, place) for name in _WEIGHTS)), None)
        if weights is None:
            continue
        shards = shard_names(weights) if weights.suffix == INDEX_SUFFIX else []
        if all(file(name, place) for name in shards):
            return weights, config_file
    return None


def _built(weights: Path, config_file: Path, family: Family | None) -> Any:
    """The VAE of these weights, with the config beside them or the one that they show."""
    read = read_shards if weights.suffix == INDEX_SUFFIX else read_weights
    try:
        return build(read(weights), _read_config(config_file), family)
    except UnsupportedLayout as error:
        raise SettingsError(f"--vae {weights}: {error}") from None


def _read_config(path: Path) -> dict[str, Any] | None:
    """A VAE's config; None where there is none, or another model's."""
    import diffusers

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("_class_name", "") if isinstance(config, dict) else ""
    return config if isinstance(kind, str) and _CLASS.fullmatch(kind) and hasattr(diffusers, kind) else None


def public_name(source: str) -> str:
    """A hub id as it is; of a path the last part only, as the rest is nobody's business."""
    path = Path(source).expanduser()
    return source if _HUB_ID.fullmatch(source) and not path.exists() else path.name


def _line(error: Exception) -> str:
    """The first line of what it says."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
