"""Loads the VAE that the server serves: a diffusers folder, a .safetensors file, or a Hugging Face model id."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remote_vae.errors import SettingsError, UnsupportedLayout
from remote_vae.server.weights import SUFFIXES, infer_config, load_into, read_weights
from remote_vae.tiled.memory import is_out_of_memory
from remote_vae.vae.at_work import VaeAtWork, has_posterior, whole_diffusers
from remote_vae.vae.families import Family, find_family, recognise_config
from remote_vae.vae.fingerprint import ROUNDINGS, fingerprint
from remote_vae.wire import FINGERPRINT_KEYS
from remote_vae.wire.tensors import DTYPES

log = logging.getLogger("remote_vae")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CLASS = re.compile(r"\w*Autoencoder\w*")
# As diffusers names them, in the order of preference.
_WEIGHTS = tuple(f"diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16", ".bf16"))
# Where a folder or a repository has its VAE.
_PLACES = ("", "vae")
_HUB_SECONDS = 5.0
# Cells along a side of the latents that are tried when a VAE was loaded.
_TRIAL = 8


@dataclass(frozen=True)
class LoadedVae:
    """A VAE of the server's own, ready to run: in eval mode, on its device. It is the engine's ``Provider``.

    ``fingerprints`` are of its weights as they were stored, by rounding.
    """

    vae: Any
    family: Family
    source: str
    fingerprints: Mapping[str, str]

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
            model=_public_name(self.source),
            has_posterior=has_posterior(self.vae),
        )

    def serving(self) -> AbstractContextManager[Any]:
        """Nobody trains here."""
        return torch.inference_mode()


def load_vae(source: str, *, family: str | None = None, dtype: str = "auto", device: str = "auto") -> LoadedVae:
    """Load the VAE at ``source``; weights come from safetensors only, never from a pickle.

    Args:
        source: a folder with a diffusers VAE (or a pipeline with a ``vae`` folder), a .safetensors file with a VAE alone or
            inside a checkpoint, or a hub id such as "stabilityai/sd-vae-ft-mse".
        family: a key of families.toml; needed for a .safetensors file without its config.json, as its factors are not in it.
        dtype: "float32", "float16", "bfloat16", or "auto": float16 on a GPU of Nvidia, AMD or Intel, else float32.
        device: a torch device, or "auto": the first GPU, else the CPU.

    Raises:
        SettingsError: nothing there, not a VAE, not one that makes pictures, or the family is needed and missing.
    """
    chosen = _device(device)
    target = _dtype(dtype, chosen)
    known = find_family(family) if family else None
    vae = _load(source, known)
    seen = recognise_config(vae.config, type(vae).__name__)
    found = known or seen
    if known is not None and seen is not None and seen.is_known and seen.key != known.key:
        log.warning("--vae %s: by its config it is of %s, and it is served as that of %s", source, seen.label, known.label)
    if found is None:
        raise SettingsError(f"--vae {source}: {type(vae).__name__} has no scaling factor; name its family with --family")
    channels = vae.config.get("latent_channels", found.latent_channels)
    if channels != found.latent_channels:
        raise SettingsError(f"--vae {source}: it has {channels} latent channels, and {found.label} has {found.latent_channels}")
    state = vae.state_dict()
    names = {rounding: fingerprint(state, rounding) for rounding in ROUNDINGS}
    try:
        # Not diffusers' own to(), which warns of modules to keep in float32 that a VAE does not have.
        vae = nn.Module.to(vae, chosen, target).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {device}: {_line(error)}") from None
    loaded = LoadedVae(vae, found, source, names)
    try:
        return replace(loaded, family=_tried(loaded))
    except Exception as error:
        if is_out_of_memory(error):
            # A call will be done in tiles.
            return loaded
        raise SettingsError(
            f"--vae {source}: {type(vae).__name__} does not make pictures of latents: {_line(error)}"
        ) from error


def _tried(loaded: LoadedVae) -> Family:
    """The family, with the downscale that a small picture turns out to have; it also loads the kernels of a GPU.

    Raises whatever the VAE raises when it is asked for a picture. ValueError: what it makes is none.
    """
    family, vae = loaded.family, loaded.current()
    shape = (1, family.latent_channels, *((1,) if family.video else ()), _TRIAL, _TRIAL)
    with loaded.serving():
        pixels = whole_diffusers(vae.module, "decode", torch.zeros(shape, device=vae.device, dtype=vae.dtype))
        if pixels.ndim != len(shape) or pixels.shape[1] != 3 or pixels.shape[-1] != pixels.shape[-2]:
            raise ValueError(f"latents {list(shape)} do not give a picture but {list(pixels.shape)}")
        latents = whole_diffusers(vae.module, "encode", pixels)
    channels = family.latent_channels * (2 if vae.has_posterior else 1)
    if latents.shape[1] != channels or latents.shape[-1] != _TRIAL:
        raise ValueError(f"a picture {list(pixels.shape)} does not give latents {list(shape)} but {list(latents.shape)}")
    downscale = pixels.shape[-1] // _TRIAL
    if family.is_known and downscale != family.downscale:
        raise ValueError(f"it makes {downscale} pixels of a latent cell, and the VAE of {family.label} {family.downscale}")
    return replace(family, downscale=downscale)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = next((kind for kind in ("cuda", "xpu", "mps") if _is_there(kind)), "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise SettingsError(f"--device {name} cannot be used here: {_line(error)}") from None
    return device


def _is_there(kind: str) -> bool:
    part = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    return part is not None and bool(part.is_available())


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type in ("cuda", "xpu") else torch.float32
    if name not in DTYPES or name == "uint8":
        raise SettingsError(f"--dtype must be auto, float32, float16 or bfloat16, not {name}")
    return DTYPES[name]


def _load(source: str, family: Family | None) -> Any:
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path, _read_config(path.with_name("config.json")), family)
    if path.is_dir():
        return _from_folder(path)
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        return _from_hub(source)
    raise SettingsError(f"--vae {source}: no such folder or file, and not a model id such as stabilityai/sd-vae-ft-mse")


def _from_folder(folder: Path) -> Any:
    failure = ""
    for place in _PLACES:
        config_file = folder / place / "config.json"
        if not config_file.is_file():
            continue
        config = _read_config(config_file)
        if config is None:
            failure = failure or f"{config_file} is not a VAE's"
            continue
        files = sorted(file for file in config_file.parent.iterdir() if file.suffix.lower() in SUFFIXES)
        usual = [file for name in _WEIGHTS for file in files if file.name == name]
        if not usual and len(files) != 1:
            found = f"there are {len(files)}: name one of them" if files else "there are none"
            raise SettingsError(f"--vae {folder}: its weights cannot be loaded from safetensors files, as {found}")
        return _from_file((usual or files)[0], config, None)
    raise SettingsError(f"--vae {folder}: no VAE found there or in its folder vae ({failure or 'no config.json'})")


def _from_hub(source: str) -> Any:
    """From the cache of Hugging Face where it is there, so that a server starts without a network as well."""
    import huggingface_hub

    try:
        vae = _in_repository(source, cached=True)
        if vae is None:
            # The downloads would try again for half a minute where there is no network.
            huggingface_hub.HfApi().model_info(source, timeout=_HUB_SECONDS)
            vae = _in_repository(source, cached=False)
    except SettingsError:
        raise
    except Exception as error:  # of whichever HTTP library it uses
        raise SettingsError(
            f"--vae {source}: not on this machine, and not to be had from huggingface.co: {_line(error)}"
        ) from None
    if vae is None:
        raise SettingsError(f"--vae {source}: no VAE with safetensors weights found there or in its folder vae")
    return vae


def _in_repository(source: str, *, cached: bool) -> Any:
    """The VAE of a repository, downloaded unless ``cached``; None: there is none. Raises what the hub's client raises."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def file(name: str, place: str) -> Path | None:
        try:
            return Path(hf_hub_download(source, name, subfolder=place or None, local_files_only=cached))
        except EntryNotFoundError:
            return None

    for place in _PLACES:
        config_file = file("config.json", place)
        config = _read_config(config_file) if config_file else None
        weights = next(filter(None, (file(name, place) for name in _WEIGHTS)), None) if config else None
        if weights is not None:
            return _from_file(weights, config, None)
    return None


def _from_file(path: Path, config: Mapping[str, Any] | None, family: Family | None) -> Any:
    """That file, with the architecture of ``config``, or else the usual one of ``family``."""
    import diffusers

    state = read_weights(path)
    try:
        if config is not None:
            try:
                vae = getattr(diffusers, config["_class_name"]).from_config(config)
                load_into(vae, state)
                return vae
            except UnsupportedLayout as error:
                if family is None:
                    raise
                log.info("the config.json beside %s is not its own: %s", path, error)
        if family is None:
            raise SettingsError(
                f"--vae {path}: a single file does not say which family it is; add --family, for example --family sd1"
            )
        vae = diffusers.AutoencoderKL.from_config(infer_config(state, family))
        load_into(vae, state)
    except UnsupportedLayout as error:
        raise SettingsError(f"--vae {path}: {error}") from None
    return vae


def _read_config(path: Path) -> dict[str, Any] | None:
    """A VAE's config; None where there is none, or another model's."""
    import diffusers

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("_class_name", "") if isinstance(config, dict) else ""
    return config if isinstance(kind, str) and _CLASS.fullmatch(kind) and hasattr(diffusers, kind) else None


def _public_name(source: str) -> str:
    """A hub id as it is; of a path the last part only, as the rest is nobody's business."""
    path = Path(source).expanduser()
    return path.name if path.exists() else source


def _line(error: Exception) -> str:
    """The first line of what it says."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
