"""The tiled VAE on this machine: what answers when nothing remote does."""

from __future__ import annotations

from remote_vae.tiled.exact import decode, encode

__all__ = ["decode", "encode"]
