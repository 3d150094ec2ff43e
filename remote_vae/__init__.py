"""Remote VAE: VAE encode and decode by a remote endpoint, with the local VAE as the fallback.

The public face is four names::

    from remote_vae import Settings, attach, remote_decode, remote_encode

    image = remote_decode("http://studio:7870/decode", latents, scaling_factor=0.18215)
    handle = attach(pipe, Settings(endpoint="http://studio:7870"))
"""

from __future__ import annotations

from remote_vae.hosts.diffusers import Handle, attach
from remote_vae.remote.functions import remote_decode, remote_encode
from remote_vae.settings import Settings
from remote_vae.version import __version__

__all__ = ["Handle", "Settings", "__version__", "attach", "remote_decode", "remote_encode"]
