"""How it stands between a UI and us: what was hooked, and whether its VAE calls come by. For the console and the panel."""

from __future__ import annotations

from dataclasses import dataclass

from remote_vae.remote.client import shown
from remote_vae.settings import Settings
from remote_vae.version import __version__


@dataclass(frozen=True)
class SeamState:
    """What the user can be told.

    Attributes:
        host: the UI and its version: "Forge Neo 2.26".
        hooked: where its VAE calls are taken; empty: nowhere.
        problem: what is wrong, and what to do; "": nothing is known to be.
        switch: what the settings' being off and on mean in this UI.
    """

    host: str
    hooked: tuple[str, ...] = ()
    problem: str = ""
    switch: tuple[str, str] = ("off", "on")

    def opening(self, settings: Settings) -> str:
        """The line at the start."""
        where = f"hooked {', '.join(self.hooked)}" if self.hooked else "nothing hooked"
        return f"{__version__} in {self.host}: {where}; {self.switch[settings.enabled]}, {_endpoints(settings)}"


def _endpoints(settings: Settings) -> str:
    addresses = (settings.endpoint, settings.decode_endpoint, settings.encode_endpoint)
    named = " and ".join(dict.fromkeys(shown(address) for address in addresses if address))
    if not named and settings.public_endpoints:
        named = "the public endpoints"
    return f"endpoint {named}" if named else "no endpoint set"


def not_entered(pictures: int, host: str) -> str:
    """What is said where pictures were made, and no VAE call came by."""
    made = "1 picture was" if pictures == 1 else f"{pictures} pictures were"
    return (
        f"{made} made without asking Remote VAE, although it is on: {host} did not decode with the VAE that is hooked. "
        "If its own settings name another decoder (such as TAESD), choose the full one"
    )
