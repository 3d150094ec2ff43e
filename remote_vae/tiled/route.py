"""The tiled route: the whole VAE, and on a memory error its own tiling and whatever else the host adapter knows."""

from __future__ import annotations

import logging

from remote_vae.errors import OutOfMemory, UnsupportedLayout
from remote_vae.memory import free_memory, is_out_of_memory
from remote_vae.routes import Outcome, Spare, T, VaeCall
from remote_vae.settings import Settings

log = logging.getLogger("remote_vae.tiled")


class TiledRoute:
    """Tries the whole VAE first, as it is exact and fastest where it fits, then the call's spares in their order."""

    name = "tiled"

    def run(self, call: VaeCall[T], settings: Settings) -> Outcome[T]:
        """Raises OutOfMemory when nothing fits; an error that is not about memory is the host's own."""
        ways = list(call.spares)
        if call.whole is not None:
            ways.insert(0, Spare("whole VAE", call.whole))
        failure: BaseException | None = None
        for way in ways:
            try:
                return Outcome(way.run(), detail=way.name)
            except UnsupportedLayout as error:
                log.info("%s cannot be used here: %s", way.name, error)
                failure = failure or error
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("%s ran out of memory for a %s of %s", way.name, call.op, call.size)
                # The traceback's frames hold the tensors that filled the memory.
                failure = error.with_traceback(None)
            free_memory()
        raise OutOfMemory(
            f"this machine has too little memory for the {call.op} ({failure})", reason="out of memory"
        ) from failure
