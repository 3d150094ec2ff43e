"""This machine: the whole VAE where it fits, and less and less memory where it does not."""

from __future__ import annotations

from remote_vae.local.route import answer, likely_bytes, whole_fits

__all__ = ["answer", "likely_bytes", "whole_fits"]
