"""How many frames a video VAE takes at once. Most take any number, and round it as their convolutions do; some fail."""

from __future__ import annotations

from remote_vae.errors import InvalidRequest
from remote_vae.vae.families import Family

# Their convolutions have no third dimension: of more frames they fail, or give the first one's latents.
_OF_ONE_FRAME = frozenset({"AutoencoderKLQwenImage21"})
# Their encoders fold frames into channels, and fail where some are left over.
_OF_WHOLE_CHUNKS = frozenset({"AutoencoderKLHunyuanVideo15", "AutoencoderKLLTX2Video"})


def check_latent_frames(family: Family, frames: int) -> None:
    """Raises InvalidRequest: the VAE of a video ``family`` cannot decode so many latent frames."""
    if frames > 1 and not _OF_ONE_FRAME.isdisjoint(family.classes):
        raise InvalidRequest(f"the VAE of {family.label} decodes single frames: got {frames}, send them one by one")


def check_frames(family: Family, frames: int) -> None:
    """Raises InvalidRequest: the VAE of a video ``family`` cannot encode so many frames."""
    if frames > 1 and not _OF_ONE_FRAME.isdisjoint(family.classes):
        raise InvalidRequest(f"the VAE of {family.label} encodes single frames: got {frames}, send them one by one")
    scale = family.frame_scale
    if (frames - 1) % scale and not _OF_WHOLE_CHUNKS.isdisjoint(family.classes):
        least = family.frames(family.latent_frames(frames))
        raise InvalidRequest(f"the VAE of {family.label} encodes 1 + {scale} n frames: got {frames}, send {least} of them")
