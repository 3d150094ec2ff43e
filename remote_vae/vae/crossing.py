"""What crosses the VAE of ComfyUI and of Forge and its kin, and what is raw: the one place where one becomes the other.

At that VAE a picture is ``[B, H, W, C]`` in [0, 1], and a video ``[B, F, H, W, C]``; several pictures that are given to a video
VAE are frames of one, or each is for itself, as the host has it. Raw is what the wire and the VAE's own layers know: pixels
``[B, C, H, W]`` or ``[B, C, F, H, W]`` in [-1, 1], and latents that have not been scaled, normed or packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from remote_vae.vae.at_work import VIDEO_DIMENSIONS
from remote_vae.vae.families import Family
from remote_vae.vae.packed import BatchNormed, patched, unpatched


@dataclass(frozen=True)
class Crossing:
    """One host's VAE, as far as shapes go.

    Attributes:
        family: what it is.
        by_picture: whether the host asks a video VAE for pictures, and knows no frames.
        batch_norm: of Flux.2, whose latents cross it normed and packed into four times as many channels; None: they are raw.
        spreads: whether the normed latents that it encodes are not packed.
    """

    family: Family
    by_picture: bool = False
    batch_norm: BatchNormed | None = None
    spreads: bool = False

    def raw_latents(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Raw latents of those that the host gives to a decode, or None where they are of a shape that is not known."""
        raw: torch.Tensor | None = latents
        if self.family.video:
            raw = latents.unsqueeze(2) if latents.ndim == 4 and self.by_picture else latents
        elif latents.ndim == VIDEO_DIMENSIONS and latents.shape[2] == 1:
            # As ComfyUI does, whose latents of some models have one frame.
            raw = latents[:, :, 0]
        if self.batch_norm is not None and raw is not None and raw.ndim == 4:
            raw = self._unpacked(self.batch_norm, raw)
        return None if raw is None else self._known(raw, self.family.latent_channels)

    def latents(self, raw: torch.Tensor) -> torch.Tensor:
        """What the host's own encode gives for the raw latents of its posterior."""
        if self.family.video:
            return raw.squeeze(2) if self.by_picture else raw
        if self.batch_norm is None:
            return raw
        normed = self.batch_norm.normed(raw)
        return unpatched(normed) if self.spreads else normed

    def crossing_shape(self, raw: torch.Size) -> torch.Size:
        """The shape in which raw latents cross: the host's estimates of memory go by it."""
        if self.batch_norm is None or self.spreads:
            return raw
        batch, channels, height, width = raw
        return torch.Size((batch, channels * 4, height // 2, width // 2))

    def raw_pixels(self, pixels: torch.Tensor, *, as_frames: bool = True) -> torch.Tensor | None:
        """Raw pixels of those that the host gives to an encode, or None where they are of a shape that is not known.

        Args:
            pixels: ``[B, H, W, C]`` or ``[B, F, H, W, C]`` in [0, 1], of any strides.
            as_frames: whether several pictures given to a video VAE are the frames of one video.
        """
        raw = pixels.movedim(-1, 1)
        if self.family.video and raw.ndim == 4:
            raw = raw.movedim(1, 0).unsqueeze(0) if as_frames and not self.by_picture else raw.unsqueeze(2)
        if self.batch_norm is not None and any(side // self.family.downscale % 2 for side in raw.shape[-2:]):
            # Not to be packed: the host has its own way, or none.
            return None
        known = self._known(raw, self.family.pixel_channels)
        # One copy, as of a long video each counts; what is sent and compared wants the colours first in memory, too.
        return None if known is None else known.clone(memory_format=torch.contiguous_format).mul_(2.0).sub_(1.0)

    def pixels(self, raw: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """What the host's own decode of the latents ``given`` gives, for raw pixels."""
        picture = raw.squeeze(2) if self.family.video and given.ndim == 4 else raw
        # In place, as of a long video every copy counts.
        return (picture + 1.0).div_(2.0).clamp_(0.0, 1.0).movedim(1, -1)

    def _unpacked(self, batch_norm: BatchNormed, latents: torch.Tensor) -> torch.Tensor | None:
        if latents.shape[1] == batch_norm.channels:
            return batch_norm.raw(latents)
        is_even = not any(side % 2 for side in latents.shape[-2:])
        return batch_norm.raw(patched(latents)) if latents.shape[1] == self.family.latent_channels and is_even else None

    def _known(self, raw: torch.Tensor, channels: int) -> torch.Tensor | None:
        dimensions = VIDEO_DIMENSIONS if self.family.video else 4
        return raw if raw.ndim == dimensions and raw.shape[1] == channels else None
