"""Which web UI this is, by what it has and not by its name: forks come and go."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from typing import Any

from remote_vae.hosts import a1111, forge_kin, sdnext
from remote_vae.hosts.base import WebUi
from remote_vae.hosts.seam_state import SeamState
from remote_vae.vae.at_work import VaeAtWork

log = logging.getLogger("remote_vae")

# What the panel and the accordion stand on.
_PANEL = (
    "modules.script_callbacks:on_ui_settings",
    "modules.scripts:Script",
    "modules.shared:opts",
)
# What every adapter stands on: module and attribute.
_COMMON = (
    *_PANEL,
    "modules.call_queue:queue_lock",
    "modules.paths:data_path",
    "modules.processing:process_images_inner",
    "modules.sd_samplers_common:single_sample_to_image",
    "modules.script_callbacks:on_model_loaded",
    "modules.script_callbacks:on_script_unloaded",
    "modules.shared:state",
)


@dataclass(frozen=True)
class _Known:
    """A UI that there is an adapter for.

    Attributes:
        own: a module, or what is in one, that only this UI has of those that are still to come; "" for the one that the others
            are forks of.
        needs: what its adapter stands on beside ``_COMMON``.
    """

    adapter: WebUi
    own: str
    needs: tuple[str, ...]


_BACKEND = (
    "backend.memory_management:load_models_gpu",
    "backend.nn.vae:DiagonalGaussianDistribution",
    "backend.patcher.vae:VAE.decode",
    "backend.patcher.vae:VAE.encode",
    "modules.sd_models:model_data",
)
_REFORGE = (
    "ldm_patched.modules.model_management:load_models_gpu",
    "ldm_patched.modules.sd:VAE.decode",
    "ldm_patched.modules.sd:VAE.encode",
    "ldm_patched.modules.sd:VAE.vae_encode_crop_pixels",
    "modules.sd_models:model_data",
    "modules.sd_vae:loaded_vae_file",
)

# In this order: the others are forks of Forge, and all of them have its modules_forge.
_KNOWN = (
    _Known(forge_kin.neo, "backend.nn._vae:ProcessLatent", _BACKEND),
    _Known(forge_kin.ersatz, "backend.nn.vae_wan", _BACKEND),
    _Known(forge_kin.reforge, "ldm_patched.modules.sd", _REFORGE),
    _Known(forge_kin.forge, "modules_forge", (*_BACKEND, "backend.patcher.vae:VAE.decode_inner")),
    _Known(
        sdnext.adapter,
        "modules.modeldata",
        (
            "modules.errors:display",
            "modules.modeldata:model_data",
            "modules.processing_diffusers:process_diffusers",
            "modules.processing_vae:vae_decode",
            "diffusers:AutoencoderKL",
        ),
    ),
    _Known(
        a1111.adapter,
        "",
        (
            "modules.processing:decode_latent_batch",
            "modules.sd_models:model_data",
            "ldm.modules.distributions.distributions:DiagonalGaussianDistribution",
        ),
    ),
)


class NoSeam(WebUi):
    """In a UI whose VAE nobody knows how to stand in front of: the panel is there, and says so."""

    def __init__(self, looks_like: WebUi, missing: list[str]) -> None:
        super().__init__()
        self.name = f"a UI like {looks_like.name}"
        self._looks_like = looks_like
        self._problem = (
            f"this UI looks like {looks_like.name}, but it has no {', no '.join(missing)}: it is too old, too new or unknown, "
            f"and its VAE is left alone. Remote VAE was made for {', '.join(each.adapter.name for each in _KNOWN)}"
        )

    def version(self) -> str:
        return self._looks_like.version()

    def install(self) -> None:
        log.warning("%s", self._problem)

    def uninstall(self) -> None:
        """Nothing was done."""

    def hook(self, model: Any) -> None:
        """There is nothing to hook."""

    def _models(self) -> list[Any]:
        return []

    def _unhook(self, model: Any) -> None:
        """Nothing was done."""

    def current(self) -> VaeAtWork | None:
        return None

    def seam_state(self) -> SeamState:
        return replace(super().seam_state(), problem=self._problem)


def detect() -> WebUi | None:
    """The adapter for the UI that this runs in; one that does nothing where there is none for it.

    Returns:
        None, with a line in the log, where not even a panel can be shown.
    """
    known = next(known for known in _KNOWN if not known.own or _has(known.own))
    missing = [name.replace(":", ".") for name in (*_COMMON, *known.needs) if not _has(name)]
    if not missing:
        return known.adapter
    without_panel = [name for name in _PANEL if not _has(name)]
    if without_panel:
        log.warning("this is no UI that Remote VAE knows: it has no %s", ", no ".join(without_panel).replace(":", "."))
        return None
    return NoSeam(known.adapter, missing)


def _has(name: str) -> bool:
    """Whether there is ``module`` or ``module:attribute.attribute``."""
    module, _, attributes = name.partition(":")
    try:
        found = importlib.import_module(module)
        for attribute in filter(None, attributes.split(".")):
            found = getattr(found, attribute)
    except (ImportError, AttributeError):
        return False
    except Exception:
        # A host's module may do anything when it is loaded, and fail at it.
        log.debug("%s could not be loaded", module, exc_info=True)
        return False
    return True
