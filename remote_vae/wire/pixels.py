"""Pixels in their forms: tensors in [-1, 1], uint8, PNG and JPEG files, MP4."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire.tensors import Buffer

# A host turns [-1, 1] into 8 bits either by rounding (diffusers, SD.Next) or by truncation (A1111). A quarter level above
# the exact value survives both, in float16 as well; half a level would round up.
_QUARTER = 0.25

JPEG_QUALITY = 95
# Level 1 is four times faster than PIL's default 6 and 5 to 20 % larger.
PNG_LEVEL = 1
MP4_FPS = 24

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1], clamped, as diffusers' VaeImageProcessor.denormalize does, in the dtype of ``pixels``."""
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def to_uint8(pixels: torch.Tensor, *, truncate: bool = False) -> torch.Tensor:
    """``[B, 3, H, W]`` in [-1, 1] to uint8 ``[B, H, W, 3]``, rounded to the nearest level or, as A1111 does, down."""
    levels = to_unit(pixels.float()) * 255.0
    levels = (levels if truncate else levels.round_()).to(torch.uint8)
    return levels.movedim(1, -1).contiguous()


def from_uint8(levels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 ``[B, H, W, 3]`` to ``[B, 3, H, W]`` in [-1, 1] such that rounding and truncating hosts get the levels back."""
    values = levels.to(torch.float32).add_(_QUARTER).mul_(2.0 / 255.0).sub_(1.0).to(dtype)
    # Last, on the fewest bytes: torch moves axes of uint8 several times slower.
    return values.movedim(-1, 1).contiguous()


def image_to_pixels(image: Image.Image) -> torch.Tensor:
    """A picture to float32 ``[1, 3, H, W]`` in [-1, 1] with the exact values of its levels."""
    levels = torch.from_numpy(np.array(image.convert("RGB")))
    return (levels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0).unsqueeze(0)


def image_to_bytes(image: Image.Image, image_format: str) -> bytes:
    """A PNG or JPEG (4:4:4, so that no colour is halved) file of ``image`` as RGB; ``image_format`` is png or jpg."""
    buffer = io.BytesIO()
    rgb = image.convert("RGB")
    if image_format == "jpg":
        rgb.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        rgb.save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def image_from_bytes(data: Buffer, *, max_pixels: int) -> Image.Image:
    """Open a PNG, JPEG or WebP file as RGB; the size in its header is checked before any pixel is decoded.

    Returns:
        The image; ``format`` is "png", "jpeg" or "webp".

    Raises:
        InvalidRequest: not such a file, a damaged one, or more than ``max_pixels``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise InvalidRequest(
                    f"the picture has {image.width} x {image.height} pixels; at most {max_pixels} pixels are taken"
                )
            name = (image.format or "").lower()
            rgb: Image.Image = image.convert("RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # PIL raises a dozen kinds, down to struct.error and SyntaxError, for a damaged file
        raise InvalidRequest(f"the body is not a PNG, JPEG or WebP picture ({error})") from None
    rgb.format = name
    return rgb


def video_to_mp4(frames: torch.Tensor) -> bytes:
    """uint8 ``[F, H, W, 3]`` to an H.264 MP4 file at 24 frames a second. Needs the package av.

    Raises:
        InvalidRequest: av is not installed on this machine.
    """
    try:
        import av
    except ImportError:
        raise InvalidRequest("this server cannot make mp4: install the package av, or ask for output_type pt") from None
    buffer = io.BytesIO()
    # yuv420p halves the colour planes: sides must be even.
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=MP4_FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def check_mp4(data: Buffer) -> bytes:
    """The bytes, if they begin like an MP4 file (ISO 14496-12: the box type ftyp at offset 4).

    Raises:
        MalformedAnswer: they do not.
    """
    file = bytes(data)
    if file[4:8] != b"ftyp":
        raise MalformedAnswer("the body is not an mp4 file")
    return file
