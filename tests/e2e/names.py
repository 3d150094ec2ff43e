"""Whether a checkout of a host still has the names that the adapters rely on: read from its files, without starting it.

    python -m tests.e2e.names ~/stable-diffusion-webui ~/ComfyUI

A name is ``module:attribute.attribute``, as ``hosts/detect.py`` asks for it in a running host; beside those stand here the
names that an adapter uses when a call comes by. What a class gets from a base class of another file, and whatever is set while
the host runs, cannot be seen. Ends with status 1 if any name is missing.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from remote_vae.hosts import a1111, comfy_shaped, detect, forge_kin, sdnext
from remote_vae.hosts.comfy_shaped import Seam

# What a comfy-shaped VAE is asked for, whoever's it is.
_VAE = ("device", "downscale_ratio", "first_stage_model", "latent_channels", "memory_used_decode", "memory_used_encode")
_MORE_OF_VAE = ("output_device", "patcher", "vae_dtype")
_STATE = "modules.shared_state:State"
_COMMON = (
    f"{_STATE}.interrupted",
    f"{_STATE}.skipped",
    f"{_STATE}.interrupt",
    f"{_STATE}.skip",
    f"{_STATE}.textinfo",
    "modules.script_callbacks:on_app_started",
    "modules.script_callbacks:on_before_ui",
    "modules.scripts:AlwaysVisible",
    "modules.scripts:scripts_data",
    "modules.shared:OptionInfo",
)


@dataclass(frozen=True)
class Host:
    """A host, the file that only it has of those that are still to come, and the names that its adapter relies on."""

    name: str
    own: str
    names: tuple[str, ...]


def _needed(adapter: object) -> tuple[str, ...]:
    """What ``detect`` asks for in a running host. Packages that a host installs are in no checkout."""
    [known] = [known for known in detect._KNOWN if known.adapter is adapter]
    names = (*detect._COMMON, *known.needs, *_COMMON)
    return tuple(name for name in names if not name.startswith(("diffusers:", "ldm.")))


def _of_seam(seam: Seam) -> tuple[str, ...]:
    more = [name for name in (seam.distribution, seam.version, f"{seam.memory}:load_models_gpu") if name]
    methods = [*seam.methods, *seam.turning]
    return (*(f"{seam.vae}.{name}" for name in (*methods, *_VAE, *_MORE_OF_VAE)), *more)


_FORGE_MODELS = ("modules.sd_models:SdModelData.sd_model",)
_FORGE_FACTORS = (
    "backend.nn.vae:IntegratedAutoencoderKL.scaling_factor",
    "backend.nn.vae:IntegratedAutoencoderKL.shift_factor",
)

HOSTS = (
    Host(
        "ComfyUI",
        "comfy/sd.py",
        (
            *_of_seam(comfy_shaped.COMFYUI),
            "comfy.model_management:InterruptProcessingException",
            "comfy.model_management:processing_interrupted",
            "comfy.model_management:throw_exception_if_processing_interrupted",
            "comfy_execution.utils:get_executing_context",
            "execution:PromptExecutor.execute",
            "folder_paths:get_output_directory",
            "folder_paths:get_user_directory",
            "server:PromptServer.instance",
        ),
    ),
    Host(
        "Forge Neo",
        "backend/nn/_vae.py",
        (*_needed(forge_kin.neo), *_of_seam(comfy_shaped.NEO), *_FORGE_MODELS, "backend.nn._vae:ProcessLatent.latent_format"),
    ),
    Host(
        "ersatzForge",
        "backend/nn/vae_wan.py",
        (*_needed(forge_kin.ersatz), *_of_seam(comfy_shaped.ERSATZ), *_FORGE_MODELS, *_FORGE_FACTORS),
    ),
    Host(
        "reForge", "ldm_patched/modules/sd.py", (*_needed(forge_kin.reforge), *_of_seam(comfy_shaped.REFORGE), *_FORGE_MODELS)
    ),
    Host(
        "Forge",
        "backend/patcher/vae.py",
        (*_needed(forge_kin.forge), *_of_seam(comfy_shaped.FORGE), *_FORGE_MODELS, *_FORGE_FACTORS),
    ),
    Host(
        "SD.Next",
        "modules/modeldata.py",
        (*_needed(sdnext.adapter), "modules.modeldata:ModelData.sd_model", "modules.modeldata:ModelData.sd_refiner"),
    ),
    Host(
        "AUTOMATIC1111",
        "modules/sd_models.py",
        (
            *_needed(a1111.adapter),
            *_FORGE_MODELS,
            "modules.sd_models:SdModelData.loaded_sd_models",
            "modules.sd_vae:loaded_vae_file",
            "modules.devices:dtype_vae",
            "modules.devices:device",
            "modules.launch_utils:git_tag",
        ),
    ),
)


def host_of(folder: Path) -> Host | None:
    """Which host's checkout ``folder`` is, or None."""
    return next((host for host in HOSTS if (folder / host.own).is_file()), None)


def missing(folder: Path, host: Host) -> list[str]:
    """The names that the checkout lacks."""
    return [name for name in dict.fromkeys(host.names) if not _has(folder, name)]


def _has(folder: Path, name: str) -> bool:
    module, _, path = name.partition(":")
    tree = _tree(folder, module)
    if tree is None:
        return False
    # What lies deeper than a class's own names is made while the host runs.
    first, *rest = path.split(".")
    found = _defined(tree).get(first)
    if found is None:
        return any(_has(folder, f"{other}:{path}") for other in _passed_on(tree))
    return not rest or not isinstance(found, ast.ClassDef) or rest[0] in _of_class(tree, found)


def _passed_on(tree: ast.Module) -> list[str]:
    """The modules all of whose names this one has."""
    imports = [node for node in _statements(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return [str(node.module) for node in imports if any(alias.name == "*" for alias in node.names)]


@cache
def _tree(folder: Path, module: str) -> ast.Module | None:
    path = folder.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8-sig"), filename=str(file))
    return None


def _defined(tree: ast.AST) -> dict[str, ast.AST]:
    """Names that are bound in a module or a class, also within its ifs and trys, with what binds them."""
    found: dict[str, ast.AST] = {}
    for node in _statements(tree):
        for name in _bound(node):
            found[name] = node
    return found


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            yield from _statements(node)


def _bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))


def _of_class(tree: ast.Module, kind: ast.ClassDef) -> set[str]:
    """What a class and its bases of the same file bind, and what their methods set on ``self`` and on the class."""
    names = set(_defined(kind))
    for node in ast.walk(kind):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            names |= {node.attr} if node.value.id in ("self", "cls", kind.name) else set()
    for base in kind.bases:
        found = _defined(tree).get(base.id) if isinstance(base, ast.Name) else None
        if isinstance(found, ast.ClassDef) and found is not kind:
            names |= _of_class(tree, found)
    return names


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+", type=Path, help="a checkout of a host")
    lacking = 0
    for folder in parser.parse_args(arguments).folder:
        host = host_of(folder)
        if host is None:
            print(f"{folder}: none of {', '.join(each.name for each in HOSTS)}")
            lacking += 1
            continue
        names = missing(folder, host)
        lacking += len(names)
        print(f"{folder}: {host.name}, {len(set(host.names))} names, {'missing ' + ', '.join(names) if names else 'all there'}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
