"""The adapters for Forge and those that came of it: Forge Neo, reForge and ersatzForge.

Whatever makes a VAE call in them makes it through the methods of one class, which are wrapped: a switch of model or VAE may put
another object in place of the one that was there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from remote_vae.call import VaeCall
from remote_vae.errors import UnsupportedLayout
from remote_vae.hosts import comfy_shaped
from remote_vae.hosts.base import WebUi, version_at
from remote_vae.hosts.comfy_shaped import Known, Seam
from remote_vae.hosts.wrapping import wrap
from remote_vae.vae.at_work import VaeAtWork

# In "2.0.1v1.10.1" and "1.0.0v2-v1.10.1RC".
_OF_A1111 = re.compile(r"-?v1\.\d.*")
_COMMIT = re.compile("[0-9a-f]{40}")


class ForgeKin(WebUi):
    """One of them, by its seam."""

    def __init__(self, seam: Seam) -> None:
        super().__init__()
        self.name = seam.host
        self.seams = (f"{seam.vae.replace(':', '.')}: {', '.join(seam.methods)}",)
        self.version_at = seam.version
        self._seam = seam

    def _wrapped_functions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        return [*super()._wrapped_functions(), *comfy_shaped.class_hooks(self._seam, self._around_vae)]

    def version(self) -> str:
        """Its own number, without A1111's behind it, and the commit where it knows that: the number stays for years."""
        number = _OF_A1111.sub("", super().version())
        commit = version_at("modules.launch_utils:commit_hash")
        return f"{number} ({commit[:7]})".strip() if _COMMIT.fullmatch(commit) else number

    def _models(self) -> list[Any]:
        from modules import sd_models

        model = getattr(sd_models.model_data, "sd_model", None)
        return [model] if hasattr(model, "forge_objects") else []

    def hook(self, model: Any) -> None:
        """Nothing to do: the class is hooked, and its objects are looked at when they are called."""

    def _unhook(self, model: Any) -> None:
        """Nothing was done."""

    def hook_loaded(self) -> None:
        """Get in the way again where somebody has put a method of their own into the class."""
        if self.installed:
            for owner, name, around in comfy_shaped.class_hooks(self._seam, self._around_vae):
                wrap(owner, name, around, self)

    def current(self) -> VaeAtWork | None:
        models = self._models()
        vae = getattr(models[0].forge_objects, "vae", None) if models else None
        try:
            at_work = None if vae is None else comfy_shaped.at_work(self._seam, vae, self._known(vae))
        except (UnsupportedLayout, AttributeError):
            # Another kind of VAE, or an object of another extension's making.
            return None
        model = str(getattr(getattr(models[0], "sd_checkpoint_info", None), "model_name", "")) if models else ""
        return None if at_work is None else replace(at_work, model=model)

    @contextmanager
    def serving(self) -> Iterator[None]:
        # The weights are made in inference mode.
        with super().serving(), torch.inference_mode():
            yield

    # --- the hook --------------------------------------------------------------------------------------------------------

    def _around_vae(self, method: str, original: Callable[..., Any], vae: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the methods of the class."""
        own = partial(original, vae, *args, **kwargs)
        if not self._takes():
            return own()
        return self._taken(lambda: self._call(method, original, vae, args, kwargs), own)

    def _call(
        self, method: str, original: Callable[..., Any], vae: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> VaeCall[Any] | None:
        return comfy_shaped.vae_call(self._seam, method, original, vae, args, kwargs, self._known(vae))

    def _known(self, vae: Any) -> Known:
        """What the UI knows of its VAE."""
        return Known(factors=self._factors_of(vae), picked=_picked_vae(self._seam.picked))

    def _factors_of(self, vae: Any) -> Any:
        """The format of the latents of the loaded model, if ``vae`` is that model's."""
        for model in self._models():
            parts = model.forge_objects
            if getattr(parts.vae, "first_stage_model", None) is vae.first_stage_model:
                return comfy_shaped.attribute(parts, "unet.model.model_config.latent_format")
        return None


def _picked_vae(where: str) -> str:
    """The VAE file that the user has picked beside the checkpoint; "" where there is none."""
    try:
        found = comfy_shaped.load(where)
    except (ImportError, AttributeError):
        # A fork keeps it elsewhere: then a standard VAE is not known by its file's name, and else nothing is lost.
        return ""
    if isinstance(found, dict):
        # The others are text encoders, which are looked for in another folder.
        files = [Path(file) for file in found.get("additional_modules") or ()]
        found = next((file for file in files if "vae" in (folder.name.lower() for folder in file.parents)), "")
    return Path(found or "").name


forge = ForgeKin(comfy_shaped.FORGE)
neo = ForgeKin(comfy_shaped.NEO)
ersatz = ForgeKin(comfy_shaped.ERSATZ)
reforge = ForgeKin(comfy_shaped.REFORGE)
