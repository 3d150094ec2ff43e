"""The host executes this file; everything is in the package beside it."""

from remote_vae.webui import extension

extension.load()
