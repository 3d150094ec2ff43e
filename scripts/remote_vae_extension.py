"""The host executes this file; everything is in the package beside it."""

from remote_vae.extension import start

# The host looks for scripts among the names of this module.
RemoteVaeScript = start.load()
