"""What the settings page of ComfyUI asks for: the options, the line of state, and the Test button."""

from __future__ import annotations

import asyncio
from typing import Any

from remote_vae.diagnosis import diagnosis
from remote_vae.extension.commands import server_commands
from remote_vae.extension.language import language_of, say
from remote_vae.hosts.comfyui import adapter
from remote_vae.hosts.comfyui_settings import PREFIX
from remote_vae.settings import Option, load_options

# Of these something else is true in ComfyUI, where a node can switch it on as well; see words.toml.
_LABELS = frozenset({"enabled"})
_HELPS = frozenset({"enabled", "rescue_folder", "name_endpoint"})
# ComfyUI does not share its VAE.
_LEFT_OUT = frozenset({"share"})


def page(language: str = "en") -> list[dict[str, Any]]:
    """The options as the page's script takes them, in their order, in ``language``."""
    return [_entry(option, language) for key, option in load_options(language).items() if key not in _LEFT_OUT]


def _entry(option: Option, language: str) -> dict[str, Any]:
    label = say(f"comfyui_{option.key}", language) if option.key in _LABELS else option.label
    entry: dict[str, Any] = {
        "id": PREFIX + option.key,
        "name": f"{label} ({option.unit})" if option.unit else label,
        "group": option.group,
        "tooltip": say(f"comfyui_{option.key}_help", language) if option.key in _HELPS else option.help,
        "defaultValue": option.default,
        "type": "text",
    }
    if isinstance(option.default, bool):
        entry["type"] = "boolean"
    elif option.choices:
        entry |= {"type": "combo", "options": list(option.choices)}
    elif isinstance(option.default, float):
        entry |= {"type": "number", "attrs": {"min": option.min, "max": option.max, "step": 1, "maxFractionDigits": 1}}
    return entry


def commands() -> str:
    """The two for the other machine, a line each, with the VAE that was used here last."""
    return "\n".join(server_commands(*adapter.last_used()))


def report() -> str:
    """What a report of a problem should have in it."""
    settings = adapter.settings.now()
    lines = [adapter.seam_state().opening(settings), f"state: {adapter.state()}"]
    return diagnosis(settings, lines, adapter.router.history.records())


def add_routes(routes: Any) -> None:
    """Answer under /remote_vae/ of ComfyUI's own server."""
    from aiohttp import web

    @routes.get("/remote_vae/options")  # type: ignore[untyped-decorator]
    async def options(request: Any) -> Any:
        # What the user has chosen for ComfyUI, else the browser's.
        chosen = adapter.settings.locale() or request.headers.get("Accept-Language")
        return web.json_response(page(language_of(chosen)))

    @routes.get("/remote_vae/state")  # type: ignore[untyped-decorator]
    async def state(_: Any) -> Any:
        return web.json_response({"state": adapter.state(), "commands": commands(), "diagnosis": report()})

    @routes.post("/remote_vae/test")  # type: ignore[untyped-decorator]
    async def test(_: Any) -> Any:
        # It waits for the network; ComfyUI goes on meanwhile.
        trial = await asyncio.get_running_loop().run_in_executor(None, adapter.try_out)
        return web.json_response({"good": trial.is_good, "verdict": trial.verdict, "state": adapter.state()})
