"""The forms that latents cross the wire in, and what they decode to.

As the VAE takes them, raw or model latents, ``[B, C, h, w]`` or ``[B, C, F, h, w]``; one picture's ``[C, h, w]``; packed, as
transformers take them: ``[B, S, 4 C]``, a token of 2 x 2 cells each, and Flux.2's ``[B, 4 C, h / 2, w / 2]``, normalised too.
"""

from __future__ import annotations

from typing import Optional

import torch

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family
from remote_vae.vae.packed import BatchNormed

# Flux packs 2 x 2 latent cells into one token: [B, (h / 2)(w / 2), 4 C] (diffusers' FluxPipeline._pack_latents).
PACK = 2
MIN_CHANNELS = 4

# Dimensions of the tensors of pictures and of videos.
PICTURES = 4
VIDEOS = 5

# The VAE whose packed latents are normalised by numbers that it keeps itself.
_BATCH_NORMED = "AutoencoderKLFlux2"
_SIZE_NEEDED = "`height` and `width` required for packed latents."


def decode_size(shape: tuple[int, ...], height: int | None, width: int | None, family: Family) -> tuple[int, int, int, int]:
    """What latents of ``shape`` decode to: pictures (or videos), pixel frames of each (1 for pictures), height and width.

    Needs the head of a request only, so that a server can refuse it before it takes memory for the body.

    Raises:
        InvalidRequest: the VAE of ``family`` cannot decode them.
    """
    batch, frames, rows, columns = _cells(shape, height, width, family)
    return batch, family.frames(frames) if family.video else 1, rows * family.downscale, columns * family.downscale


def as_the_vae_takes_them(
    latents: torch.Tensor, height: int | None, width: int | None, family: Family, batch_norm: Optional[BatchNormed] = None
) -> torch.Tensor:
    """Latents of any form as ``[B, C, h, w]``, or as ``[B, C, F, h, w]`` for a video VAE, whose picture is one frame.

    Args:
        latents: as they came.
        height, width: pixels, for packed ones.
        family: of the VAE.
        batch_norm: of a VAE that has one.

    Raises:
        InvalidRequest: the VAE of ``family`` cannot decode them.
    """
    shape = tuple(latents.shape)
    _cells(shape, height, width, family)
    if _is_packed_for(shape, height, width, family):
        latents = _unpacked(latents, height or 0, width or 0, family)
    elif len(shape) < PICTURES:
        latents = latents.unsqueeze(0)
    if latents.shape[1] != family.latent_channels:
        if batch_norm is None:
            raise InvalidRequest(f"packed latents of {family.label}: this VAE does not say by what they are normalised")
        latents = batch_norm.raw(latents if latents.is_floating_point() else latents.float())
    return latents.unsqueeze(2) if family.video and latents.ndim == PICTURES else latents


def as_packed(latents: torch.Tensor, family: Family, batch_norm: Optional[BatchNormed] = None) -> torch.Tensor:
    """Latents as the VAE gives them, packed: Flux.2's ``[B, 4 C, h / 2, w / 2]``, of others ``[B, (h / 2)(w / 2), 4 C]``.

    Raises:
        InvalidRequest: they cannot be packed.
    """
    if latents.ndim == VIDEOS:
        if latents.shape[2] != 1:
            raise InvalidRequest(f"packed latents are of one frame, and these are of {latents.shape[2]}")
        latents = latents.squeeze(2)
    if not is_batch_normed(family):
        return pack_latents(latents)
    if batch_norm is None:
        raise InvalidRequest(f"packed latents of {family.label}: this VAE does not say by what they are normalised")
    _check_even(latents)
    return batch_norm.normed(latents)


def is_batch_normed(family: Family) -> bool:
    """Whether packed latents of this VAE are normalised by its own numbers."""
    return _BATCH_NORMED in family.classes


def is_packed(shape: tuple[int, ...], height: int | None, width: int | None, downscale: int = 8) -> bool:
    """Whether 3-D latents are packed ``[B, S, 4 C]`` rather than one picture's ``[C, h, w]`` without its batch axis.

    S = (H / 16)(W / 16) and the last dimension decide. ``[C, h, w]`` has h = H / 8, which is S only for W = 32, and then w = 4,
    which would be packed latents of one channel; no VAE has fewer than four.
    """
    if len(shape) != 3 or not height or not width:
        return False
    cell = downscale * PACK
    channels, rest = divmod(shape[2], PACK * PACK)
    return shape[1] == (height // cell) * (width // cell) and channels >= MIN_CHANNELS and not rest


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """``[B, C, h, w]`` to ``[B, (h / 2)(w / 2), 4 C]``; odd last rows and columns cannot be packed.

    Raises:
        InvalidRequest: h or w is odd.
    """
    batch, channels, height, width = latents.shape
    _check_even(latents)
    cells = latents.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PACK * PACK)


def unpack_latents(packed: torch.Tensor, height: int, width: int, downscale: int = 8) -> torch.Tensor:
    """``[B, S, 4 C]`` to ``[B, C, h, w]``; ``height`` and ``width`` in pixels are rounded down to multiples of 16.

    Raises:
        InvalidRequest: S does not fit height and width.
    """
    rows, columns = height // (downscale * PACK), width // (downscale * PACK)
    batch, tokens, features = packed.shape
    if tokens != rows * columns or features % (PACK * PACK):
        raise InvalidRequest(
            f"packed latents for height {height} and width {width}: got shape {list(packed.shape)}, "
            f"expected [B, {rows * columns}, {PACK * PACK} x channels]"
        )
    cells = packed.reshape(batch, rows, columns, features // (PACK * PACK), PACK, PACK)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * PACK, columns * PACK)


def _cells(shape: tuple[int, ...], height: int | None, width: int | None, family: Family) -> tuple[int, int, int, int]:
    """Pictures (or videos), latent frames, rows and columns of what the VAE is to take. Raises InvalidRequest."""
    if len(shape) == 3:
        return _cells_of_three(shape, height, width, family)
    channels, packed_channels = family.latent_channels, family.latent_channels * PACK * PACK
    if len(shape) == PICTURES and is_batch_normed(family) and shape[1] == packed_channels:
        return shape[0], 1, shape[2] * PACK, shape[3] * PACK
    if len(shape) == VIDEOS and not family.video:
        wanted = f"picture latents [B, {channels}, h, w]"
        raise InvalidRequest(f"latents: got shape {list(shape)}, expected {wanted} for {family.label}")
    if len(shape) not in (PICTURES, VIDEOS) or shape[1] != channels:
        raise InvalidRequest(f"latents: got shape {list(shape)}, expected {channels} channels as this VAE has")
    return shape[0], shape[2] if len(shape) == VIDEOS else 1, shape[-2], shape[-1]


def _cells_of_three(shape: tuple[int, ...], height: int | None, width: int | None, family: Family) -> tuple[int, int, int, int]:
    channels, cell = family.latent_channels, family.downscale * PACK
    if not height or not width:
        raise InvalidRequest(_SIZE_NEEDED)
    if _is_packed_for(shape, height, width, family):
        return shape[0], 1, height // cell * PACK, width // cell * PACK
    if shape[0] == channels:
        return 1, 1, shape[1], shape[2]
    raise InvalidRequest(
        f"latents: got shape {list(shape)}, neither packed for {height} x {width} pixels nor [{channels}, h, w]"
    )


def _is_packed_for(shape: tuple[int, ...], height: int | None, width: int | None, family: Family) -> bool:
    return is_packed(shape, height, width, family.downscale) and shape[2] == family.latent_channels * PACK * PACK


def _unpacked(latents: torch.Tensor, height: int, width: int, family: Family) -> torch.Tensor:
    """``[B, S, 4 C]`` to ``[B, C, h, w]``, or, where they are normalised, to ``[B, 4 C, h / 2, w / 2]``."""
    if not is_batch_normed(family):
        return unpack_latents(latents, height, width, family.downscale)
    cell = family.downscale * PACK
    batch, _, channels = latents.shape
    return latents.movedim(2, 1).reshape(batch, channels, height // cell, width // cell)


def _check_even(latents: torch.Tensor) -> None:
    height, width = latents.shape[-2:]
    if height % PACK or width % PACK:
        raise InvalidRequest(f"latents to be packed: got {height} x {width} cells, expected even numbers")
