"""How many frames a video VAE takes at once, and which sides a picture has that a VAE encodes.

Most take any number of either, and round it as their convolutions do; some fail.
"""

from __future__ import annotations

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family

# Their convolutions have no third dimension: of more frames they fail, or give the first one's latents.
_OF_ONE_FRAME = frozenset({"AutoencoderKLQwenImage21"})
# Their encoders fold frames into channels, and fail where some are left over.
_OF_WHOLE_CHUNKS = frozenset({"AutoencoderKLHunyuanVideo15", "AutoencoderKLLTX2Video"})
# Their encoders fold squares of pixels into channels at every level.
_OF_WHOLE_CELLS = frozenset(
    {
        "AutoencoderDC",
        "AutoencoderKLHunyuanImage",
        "AutoencoderKLHunyuanImageRefiner",
        "AutoencoderKLHunyuanVideo15",
        "AutoencoderKLLTX2Video",
        "AutoencoderKLQwenImage21",
    }
)
# So does Wan's of 16 pixels a cell (Wan 2.2 5B), and not that of 8.
_WAN, _WAN_CELL = "AutoencoderKLWan", 16
# Their decoders pad with the mirror image of the latents, for which a side needs a second cell.
_OF_TWO_CELLS = frozenset({"AutoencoderKLLTX2Video"})
# It folds once, before its first level.
_LTX, _LTX_SQUARE = "AutoencoderKLLTXVideo", 4


def check_latent_frames(family: Family, frames: int) -> None:
    """Raises InvalidRequest: the VAE of a video ``family`` cannot decode so many latent frames."""
    if frames > 1 and not _OF_ONE_FRAME.isdisjoint(family.classes):
        raise InvalidRequest(f"the VAE of {family.label} decodes single frames: got {frames}, send them one by one")


def check_cells(family: Family, height: int, width: int) -> None:
    """Raises InvalidRequest: the VAE of ``family`` cannot decode latents of so many cells."""
    if min(height, width) < 2 and not _OF_TWO_CELLS.isdisjoint(family.classes):
        raise InvalidRequest(f"the VAE of {family.label} decodes 2 x 2 latent cells or more: got {[height, width]}")


def check_frames(family: Family, frames: int) -> None:
    """Raises InvalidRequest: the VAE of a video ``family`` cannot encode so many frames."""
    if frames > 1 and not _OF_ONE_FRAME.isdisjoint(family.classes):
        raise InvalidRequest(f"the VAE of {family.label} encodes single frames: got {frames}, send them one by one")
    scale = family.frame_scale
    if (frames - 1) % scale and not _OF_WHOLE_CHUNKS.isdisjoint(family.classes):
        least = family.frames(family.latent_frames(frames))
        raise InvalidRequest(f"the VAE of {family.label} encodes 1 + {scale} n frames: got {frames}, send {least} of them")


def check_sides(family: Family, height: int, width: int) -> None:
    """Raises InvalidRequest: the VAE of ``family`` cannot encode pictures or frames of so many pixels."""
    cell, multiple = family.downscale, 1
    if not _OF_WHOLE_CELLS.isdisjoint(family.classes) or (_WAN in family.classes and cell >= _WAN_CELL):
        multiple = cell
    elif _LTX in family.classes:
        multiple = _LTX_SQUARE
    if min(height, width) < cell:
        raise InvalidRequest(f"a picture must have at least {cell} x {cell} pixels, not {[height, width]}")
    if height % multiple or width % multiple:
        raise InvalidRequest(
            f"the VAE of {family.label} encodes pictures whose sides are multiples of {multiple}: got {[height, width]}"
        )
