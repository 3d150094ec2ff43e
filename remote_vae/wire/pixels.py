"""Pixels in their forms: tensors in [-1, 1], uint8, pictures of any mode, PNG and JPEG files, MP4."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import whole_files
from remote_vae.wire.errors import one_line
from remote_vae.wire.http import Buffer

# A host turns [-1, 1] into 8 bits either by rounding (diffusers, SD.Next) or by truncation (A1111). A quarter level above
# the exact value survives both, in float16 as well; half a level would round up.
_QUARTER = 0.25

JPEG_QUALITY = 95
# Level 1 is four times faster than PIL's default 6 and 5 to 20 % larger.
PNG_LEVEL = 1
MP4_FPS = 24


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
    """A picture to float32 ``[1, 3, H, W]`` in [-1, 1] with the exact values of its 8-bit levels.

    Raises:
        InvalidRequest: as ``to_rgb``.
    """
    levels = torch.from_numpy(np.array(to_rgb(image)))
    return (levels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0).unsqueeze(0)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a picture of any mode, without what its file said beside the pixels (EXIF tells places, for one).

    16-bit and floating point grey becomes 8-bit grey by its white, where Pillow itself cuts it off at 255. Alpha is dropped.

    Raises:
        InvalidRequest: its pixels cannot be read.
    """
    try:
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_levels(image))
        rgb = image.convert("RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # a file that is read only now may be damaged in as many ways as Pillow has errors
        raise InvalidRequest(f"the picture cannot be read: {one_line(str(error))}") from None
    rgb.info = {}
    return rgb


def _levels(image: Image.Image) -> np.ndarray:
    """uint8 ``[H, W]`` of a picture of whole numbers or floating point."""
    values = np.asarray(image, dtype=np.float32)
    largest = float(values.max(initial=0.0))
    if not np.isfinite(values).all() or largest > 65535:
        raise InvalidRequest(f"the picture has values up to {largest:g}, expected grey from 0 to 65535")
    # A file's whole numbers are 16 bits; what was made in memory may hold 8-bit levels, and floating point 0 to 1 as well.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format) or largest > 255:
        white = 65535.0
    else:
        white = 1.0 if image.mode == "F" and largest <= 1 else 255.0
    levels: np.ndarray = np.rint(values.clip(0, white) * (255.0 / white)).astype(np.uint8)
    return levels


def image_to_bytes(image: Image.Image, image_format: str) -> bytes:
    """A PNG or JPEG (4:4:4, so that no colour is halved) file of ``image`` as RGB; ``image_format`` is png or jpg."""
    buffer = io.BytesIO()
    rgb = to_rgb(image)
    if image_format == "jpg":
        rgb.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        rgb.save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def image_from_bytes(data: Buffer, *, max_pixels: int) -> Image.Image:
    """Read a PNG or JPEG file as RGB; the size in its header is checked before any pixel is decoded.

    Returns:
        The image; ``format`` is "png" or "jpeg".

    Raises:
        InvalidRequest: not such a file, a cut or damaged one, or more than ``max_pixels``.
    """
    try:
        image = whole_files.decoded_picture(bytes(data), max_pixels)
        rgb = to_rgb(image)
    except InvalidRequest:
        raise
    except Exception as error:  # as above
        raise InvalidRequest(f"the picture cannot be read: {one_line(str(error))}") from None
    rgb.format = (image.format or "").lower()
    return rgb


def open_picture(path: Path) -> Image.Image:
    """A user's picture file of any kind that Pillow knows, as RGB, upright as its EXIF says; an animation's first frame.

    Raises:
        InvalidRequest: it cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image) or image
            upright.format = image.format
            return to_rgb(upright)
    except Exception as error:  # as above
        raise InvalidRequest(f"{path} cannot be read as a picture: {one_line(str(error))}") from None


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
    """The bytes, if they are a whole MP4 file.

    Raises:
        MalformedAnswer: they are not.
    """
    file = bytes(data)
    try:
        whole_files.check_mp4(file)
    except ValueError as error:
        raise MalformedAnswer(f"got a body that is no film: {error}") from None
    return file
