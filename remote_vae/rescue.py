"""The last resort: latents that nothing could decode are saved with what is needed to decode them later."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import torch

# Here, as a process that has lost its working folder may be able to load nothing any more (Python 3.13).
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family, load_families

FORMAT = "remote-vae-latents-1"
FOLDER = "remote-vae-rescue"
_TENSOR = "latents"
# What else than the four "factors" is kept of a family.
_MORE_LISTS = ("latents_mean", "latents_std")
_MORE: Mapping[str, Callable[[Any], Any]] = {"pixel_channels": int, "video": bool, "frame_scale": int}


@dataclass(frozen=True)
class Rescued:
    """Raw latents ``[B, C, h, w]``, of a video VAE ``[B, C, F, h, w]``, from a file, and the family that they belong to."""

    latents: torch.Tensor
    family: Family


def save(latents: torch.Tensor, family: Family, folders: Iterable[str | Path], why: str) -> Path:
    """Write raw ``latents`` to a new .safetensors file in the first place that takes it; ``load_latents`` reads it.

    Args:
        folders: where to, best first; "~" is the home. Then come a folder in the home, in the working folder and in the
            temporary folder.
        why: what went wrong, kept in the file.

    Returns:
        The file, with its whole path.

    Raises:
        OSError: no place took it; the message has each with its reason.
    """
    data = _serialised(latents, family, why)
    problems = []
    for place in _places(folders):
        try:
            return _written(data, place().absolute())
        except (OSError, RuntimeError, ValueError) as error:  # also no home, a null byte in a path
            where = getattr(error, "filename", None)
            problems.append(f"{where}: {getattr(error, 'strerror', error)}" if where else str(error))
    raise OSError("; ".join(dict.fromkeys(problems)))


def write(latents: torch.Tensor, family: Family, path: Path, why: str) -> None:
    """Write raw ``latents`` to ``path``, which is replaced if it is there, and left as it was if that fails.

    Raises:
        OSError: it cannot be written.
    """
    replace(path, lambda part: part.write_bytes(_serialised(latents, family, why)))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, and put it in its place when it is whole.

    Raises:
        OSError: that failed, and nothing was left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        write(part)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def command(path: Path) -> str:
    """What decodes the file ``path`` when it is typed into a terminal of this machine, wherever that stands."""
    words = [sys.executable or "python", str(Path(__file__).resolve().parent), "decode", str(path)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def load_latents(path: Path) -> Rescued:
    """Read a file of ``save`` or ``write``.

    Raises:
        InvalidRequest: it is not such a file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT or _TENSOR not in list(file.keys()):
                raise InvalidRequest(f"{path} does not hold latents saved by Remote VAE")
            latents = file.get_tensor(_TENSOR)
        family = _family(metadata)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
    dimensions, axes = (5, "F, h, w") if family.video else (4, "h, w")
    if latents.ndim != dimensions or latents.shape[1] != family.latent_channels or not latents.numel():
        raise InvalidRequest(
            f"{path}: got latents of shape {list(latents.shape)}, expected [B, {family.latent_channels}, {axes}]"
        )
    return Rescued(latents, family)


def _family(metadata: Mapping[str, str]) -> Family:
    """The family that the file says, with the numbers of the VAE that the latents were made for.

    Raises KeyError, TypeError or ValueError: it does not say one.
    """
    key = metadata.get("family", "")
    channels, downscale, scaling, shift = json.loads(metadata["factors"])
    # Files of earlier versions do not have it.
    more = json.loads(metadata.get("more", "{}"))
    numbers: dict[str, Any] = {
        "latent_channels": int(channels),
        "downscale": int(downscale),
        "scaling_factor": float(scaling),
        "shift_factor": float(shift),
    }
    numbers |= {name: tuple(map(float, more[name])) for name in _MORE_LISTS if name in more}
    numbers |= {name: kind(more[name]) for name, kind in _MORE.items() if name in more}
    known = load_families().get(key)
    return replace_fields(known, **numbers) if known and more else known or Family(key, "custom VAE", **numbers)


def _serialised(latents: torch.Tensor, family: Family, why: str) -> bytes:
    metadata = {
        "format": FORMAT,
        "family": family.key,
        "factors": json.dumps([family.latent_channels, family.downscale, family.scaling_factor, family.shift_factor]),
        "more": json.dumps({name: getattr(family, name) for name in (*_MORE_LISTS, *_MORE)}),
        "why": why[:500],
    }
    data: bytes = to_bytes({_TENSOR: latents.detach().to("cpu").contiguous()}, metadata=metadata)
    return data


def _places(folders: Iterable[str | Path]) -> Iterator[Callable[[], Path]]:
    """Each as a function, as some cannot even be named: no HOME, no entry in passwd, a working folder that is gone."""
    for folder in folders:
        yield Path(folder).expanduser
    yield lambda: Path.home() / FOLDER
    yield lambda: Path.cwd() / FOLDER
    yield lambda: Path(tempfile.gettempdir()) / FOLDER


def _written(data: bytes, folder: Path) -> Path:
    """A new file in ``folder``, whole or not there at all."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = time.strftime("latents-%Y%m%d-%H%M%S")
    for number in range(1000):
        path = folder / f"{stem}{f'-{number}' if number else ''}.safetensors"
        part = path.with_suffix(".part")
        try:
            # Who has made this one has the name, among all threads and processes.
            file = part.open("xb")
        except FileExistsError:
            continue
        try:
            with file:
                if path.exists():
                    continue
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
            return path
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    raise OSError(f"{folder} already holds a thousand files named {stem}")
