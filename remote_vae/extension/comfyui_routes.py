"""What the settings page of ComfyUI asks for: the options, the line of state, and the Test button."""

from __future__ import annotations

import asyncio
from typing import Any

from remote_vae.extension.commands import server_commands
from remote_vae.hosts.comfyui import adapter
from remote_vae.hosts.comfyui_settings import PREFIX
from remote_vae.settings import Option, load_options

# In ComfyUI a node can switch it on as well.
_LABELS = {"enabled": "Use the remote VAE for every VAE"}
_HELPS = {
    "enabled": "Every node that decodes or encodes asks the endpoint first, and this machine on any error. Off: only those "
    "with a VAE behind the node Remote VAE do.",
    "rescue_folder": "If nothing can decode, latents are saved here; empty: in remote-vae-rescue in ComfyUI's output folder.",
    "name_endpoint": "Writes the endpoint's host name into the metadata of the pictures that it made: "
    '"decode remote studio (u8)". Off: "decode remote (u8)", as pictures that you post tell the name to everybody.',
}
# ComfyUI does not share its VAE.
_LEFT_OUT = frozenset({"share"})


def page() -> list[dict[str, Any]]:
    """The options as the page's script takes them, in their order."""
    return [_entry(option) for key, option in load_options().items() if key not in _LEFT_OUT]


def _entry(option: Option) -> dict[str, Any]:
    label = _LABELS.get(option.key, option.label)
    entry: dict[str, Any] = {
        "id": PREFIX + option.key,
        "name": f"{label} ({option.unit})" if option.unit else label,
        "group": option.group,
        "tooltip": _HELPS.get(option.key, option.help),
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


def add_routes(routes: Any) -> None:
    """Answer under /remote_vae/ of ComfyUI's own server."""
    from aiohttp import web

    @routes.get("/remote_vae/options")  # type: ignore[untyped-decorator]
    async def options(_: Any) -> Any:
        return web.json_response(page())

    @routes.get("/remote_vae/state")  # type: ignore[untyped-decorator]
    async def state(_: Any) -> Any:
        return web.json_response({"state": adapter.state(), "commands": commands()})

    @routes.post("/remote_vae/test")  # type: ignore[untyped-decorator]
    async def test(_: Any) -> Any:
        # It waits for the network; ComfyUI goes on meanwhile.
        trial = await asyncio.get_running_loop().run_in_executor(None, adapter.try_out)
        return web.json_response({"good": trial.is_good, "verdict": trial.verdict, "state": adapter.state()})
