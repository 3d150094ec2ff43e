"""The nodes for ComfyUI."""

from __future__ import annotations

from typing import Any, ClassVar

from remote_vae.hosts.comfyui import Wanted, adapter
from remote_vae.hosts.comfyui_weightless import does_without_weights, weightless_vae
from remote_vae.hosts.generation import FOLLOW, Request
from remote_vae.settings import load_options
from remote_vae.vae.families import Family, load_families

CATEGORY = "Remote VAE"
AUTO = "auto"
_MODES = (
    "auto: remote as the settings say, also while they are not switched on for every VAE. remote: every call, also those that "
    "the settings keep on this machine. off: this node does nothing. Whatever fails remotely is done on this machine."
)


def families() -> dict[str, Family]:
    """By what is shown in the list."""
    return {f"{family.label} ({key})": family for key, family in load_families().items()}


def _family(chosen: str) -> Family | None:
    return families().get(chosen)


def _transfer() -> tuple[list[str], dict[str, Any]]:
    option = load_options()["transfer"]
    return [FOLLOW, *option.choices], {"default": FOLLOW, "tooltip": option.help}


class RemoteVae:
    """VAE in, VAE out: decoded and encoded by the endpoint, and here whenever that fails."""

    DESCRIPTION = (
        "Sends what this VAE decodes and encodes to your Remote VAE server (Settings, Remote VAE). Any node that takes a VAE "
        "works with it, tiled ones too. Whatever goes wrong there is done here, by the same VAE: no picture is lost."
    )
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    SEARCH_ALIASES: ClassVar = ["remote decode", "remote encode", "vae server"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        return {
            "required": {
                "vae": (
                    "VAE",
                    {"tooltip": "The VAE of your checkpoint, or of Load VAE. It answers when the endpoint does not."},
                ),
                "mode": (["auto", "remote", "off"], {"default": "auto", "tooltip": _MODES}),
                "transfer": _transfer(),
                "family": (
                    [AUTO, *families()],
                    {
                        "default": AUTO,
                        "tooltip": "Of which models this VAE is. auto: by its weights, and what the endpoint says.",
                    },
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def make(self, vae: Any, mode: str, transfer: str, family: str, unique_id: str = "") -> tuple[Any]:
        if vae is None:
            raise ValueError("Remote VAE: there is no VAE; the checkpoint that it comes from does not contain one")
        wanted = Wanted(Request(mode, transfer), _family(family))
        adapter.say(str(unique_id), adapter.about(vae, wanted))
        return (adapter.remote(vae, wanted),)


class LoadRemoteVae:
    """A VAE without a file: latents in, pixels out, all of it by the endpoint."""

    DESCRIPTION = (
        "A VAE that needs no file on this machine: your Remote VAE server does everything. There are no weights here to fall "
        "back to: if the endpoint fails, the latents are saved in the output folder and the job stops with an error."
    )
    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "family": (
                    [AUTO, *(name for name, each in families().items() if does_without_weights(each))],
                    {"default": AUTO, "tooltip": "The model family of the endpoint's VAE. auto: the endpoint is asked."},
                ),
                "transfer": _transfer(),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> str:  # noqa: N802
        settings = adapter.settings.now()
        # ComfyUI keeps what this node made: without the last, that the endpoint has another VAE by now would never be seen.
        return f"{settings.endpoint} {settings.decode_endpoint} {settings.encode_endpoint} {adapter.doubts}"

    def make(self, family: str, transfer: str) -> tuple[Any]:
        found = _family(family) or adapter.family_of_endpoint()
        return (weightless_vae(adapter, found, Wanted(Request("remote", transfer))),)


class RemoteVaeReport:
    """Who made the pixels, as a text."""

    DESCRIPTION = (
        "Says which VAE calls a picture went through, and who answered them: the endpoint, or this machine and why. The same "
        'is in the saved picture\'s metadata, under "remote_vae".'
    )
    CATEGORY = CATEGORY
    FUNCTION = "tell"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "what happened")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"images": ("IMAGE", {"tooltip": "The picture, which is passed on as it is."})},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def tell(self, images: Any, unique_id: str = "") -> dict[str, Any]:
        job = adapter.jobs.current
        text = (job.text(str(unique_id)) if job is not None else "") or "Remote VAE was not asked"
        adapter.say(str(unique_id), text)
        return {"ui": {"text": [text]}, "result": (images, text)}


NODES = {"RemoteVAE": RemoteVae, "LoadRemoteVAE": LoadRemoteVae, "RemoteVAEReport": RemoteVaeReport}
NAMES = {"RemoteVAE": "Remote VAE", "LoadRemoteVAE": "Load Remote VAE", "RemoteVAEReport": "Remote VAE Report"}
