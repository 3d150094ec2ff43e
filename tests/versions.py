"""What later versions brought than the oldest that is tested (requirements-oldest.txt): a test of it is skipped there.

Where the installed version should have it and does not, that is an error as ever.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

# What diffusers did not have before, and the version that brought it.
_CAME_WITH_DIFFUSERS = {
    "AutoencoderKLMagvit": (0, 33),
    "AutoencoderKLWan": (0, 33),
    "WanPipeline": (0, 33),
    "WanTransformer3DModel": (0, 33),
    "remote_decode": (0, 33),
    "AutoencoderKLCosmos": (0, 34),
    "AutoencoderKLQwenImage": (0, 35),
    "QwenImageImg2ImgPipeline": (0, 35),
    "QwenImagePipeline": (0, 35),
    "QwenImageTransformer2DModel": (0, 35),
    "AutoencoderKLFlux2": (0, 36),
    "AutoencoderKLHunyuanImage": (0, 36),
    "AutoencoderKLHunyuanImageRefiner": (0, 36),
    "AutoencoderKLHunyuanVideo15": (0, 36),
    "Flux2Pipeline": (0, 36),
    "AutoencoderKLLTX2Video": (0, 37),
    "AutoencoderKLQwenImage21": (0, 41),
    "QwenImage21Pipeline": (0, 41),
}


def version(module: Any) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


def _before(module: Any, since: tuple[int, int], what: str) -> str:
    if version(module) >= since:
        return ""
    return f"{what} came with {module.__name__} {since[0]}.{since[1]}, here is {module.__version__}"


def missing(name: str) -> str:
    """Why the installed diffusers has no ``name``; empty where it has it."""
    return _before(diffusers, _CAME_WITH_DIFFUSERS.get(name, (0, 0)), name)


def of_diffusers(name: str) -> Any:
    """A class of diffusers. Called while a test or a fixture runs, it skips what an older diffusers has not."""
    skip_if(missing(name))
    return getattr(diffusers, name)


def before_diffusers(major: int, minor: int, what: str) -> str:
    """Why the installed diffusers has not ``what`` this version brought; empty where it has."""
    return _before(diffusers, (major, minor), what)


def skip_if(why: str) -> None:
    """Skip the test that runs where ``why`` says something."""
    if why:
        pytest.skip(why)


def before_torch(major: int, minor: int, what: str) -> str:
    """Why the installed torch has not ``what`` this version brought; empty where it has."""
    return _before(torch, (major, minor), what)


NO_HALF = before_torch(2, 2, "half precision on processors")
needs_half = pytest.mark.skipif(bool(NO_HALF), reason=NO_HALF)
# Before, the Python object of a storage outlived it.
NO_END_OF_STORAGES = before_torch(2, 2, "to hear of the end of a storage")
