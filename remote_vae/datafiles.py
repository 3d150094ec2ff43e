"""Finds and reads the data files of ``settings/``: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def settings_folder() -> Path:
    """The folder that holds options.toml and families.toml.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_settings", _PACKAGE.parent / "settings"):
        if (folder / "options.toml").is_file():
            return folder
    raise FileNotFoundError(f"settings/options.toml is missing beside {_PACKAGE}: reinstall Remote VAE")


@cache
def read_toml(name: str) -> dict[str, Any]:
    """Read one file of ``settings/`` once; the caller must not change what it gets."""
    with (settings_folder() / name).open("rb") as file:
        data: dict[str, Any] = _toml_reader().load(file)
    return data


def _toml_reader() -> ModuleType:
    # tomllib came with Python 3.11. install.py adds tomli on 3.10; pip's own copy serves where it could not (no network).
    for module in ("tomllib", "tomli", "pip._vendor.tomli"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise ImportError("Remote VAE needs the package tomli on Python 3.10: pip install tomli")
