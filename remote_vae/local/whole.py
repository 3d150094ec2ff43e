"""The local route: the host's own VAE call, untouched."""

from __future__ import annotations

from remote_vae.call import Outcome, T, VaeCall
from remote_vae.errors import OutOfMemory
from remote_vae.settings import Settings
from remote_vae.tiled.memory import is_out_of_memory


class LocalRoute:
    """The host's own call on the whole picture."""

    name = "local"

    def run(self, call: VaeCall[T], settings: Settings) -> Outcome[T]:
        """Raises OutOfMemory where the picture does not fit; every other error is the host's own."""
        if call.whole is None:
            raise OutOfMemory("the whole VAE does not fit in memory")
        try:
            return Outcome(call.whole())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(f"the whole VAE: {error}", reason="out of memory") from error
