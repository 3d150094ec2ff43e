"""Pixels in their forms: tensors in [-1, 1], uint8, pictures of any mode, PNG and JPEG files, MP4."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

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

_VIDEO_DIMENSIONS = 5
_RGBA_CHANNELS = 4
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})

JPEG_QUALITY = 95
# Level 1 is four times faster than PIL's default 6 and 5 to 20 % larger.
PNG_LEVEL = 1
MP4_FPS = 24


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1], clamped, as diffusers' VaeImageProcessor.denormalize does, in the dtype of ``pixels``."""
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def to_uint8(pixels: torch.Tensor, *, truncate: bool = False) -> torch.Tensor:
    """``[B, C, H, W]`` in [-1, 1] to uint8 ``[B, H, W, C]``, rounded to the nearest level or, as A1111 does, down."""
    levels = to_unit(pixels.float()) * 255.0
    levels = (levels if truncate else levels.round_()).to(torch.uint8)
    return levels.movedim(1, -1).contiguous()


def from_uint8(
    levels: torch.Tensor, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> torch.Tensor:
    """uint8 levels to pixels in [-1, 1] such that rounding and truncating hosts get the levels back.

    Args:
        levels: ``[B, H, W, C]``, or ``[B, F, H, W, C]`` of videos, which are made frame by frame: beside the levels and the
            pixels a clip needs no memory.
        dtype: of the pixels.
        device: of the pixels; None: where the levels are.

    Returns:
        ``[B, C, H, W]``, or ``[B, C, F, H, W]``.
    """
    place = levels.device if device is None else device
    if levels.ndim == _VIDEO_DIMENSIONS:
        batch, frames, height, width, channels = levels.shape
        pixels = torch.empty((batch, channels, frames, height, width), dtype=dtype, device=place)
        for frame in range(frames):
            pixels[:, :, frame] = from_uint8(levels[:, frame], dtype, place)
        return pixels
    values = levels.to(place).to(torch.float32).add_(_QUARTER).mul_(2.0 / 255.0).sub_(1.0).to(dtype)
    # Last, on the fewest bytes: torch moves axes of uint8 several times slower.
    return values.movedim(-1, 1).contiguous()


def frames_of(pixels: torch.Tensor) -> Iterator[torch.Tensor]:
    """The pictures of a batch ``[B, C, H, W]``, or the frames of one video ``[1, C, F, H, W]``, as ``[1, C, H, W]`` each."""
    return iter(torch.split(pixels, 1) if pixels.ndim < _VIDEO_DIMENSIONS else pixels[:1].unbind(2))


def image_to_pixels(image: Image.Image, channels: int = 3) -> torch.Tensor:
    """A picture to float32 ``[1, channels, H, W]`` in [-1, 1] with the exact values of its 8-bit levels.

    Args:
        image: of any mode.
        channels: 3, or 4: with its alpha channel, which is opaque where it has none.

    Raises:
        InvalidRequest: as ``to_rgb``.
    """
    picture = to_rgb(image, alpha=channels == _RGBA_CHANNELS)
    if channels == _RGBA_CHANNELS:
        picture = picture.convert("RGBA")
    levels = torch.from_numpy(np.array(picture))
    return (levels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0).unsqueeze(0)


def to_rgb(image: Image.Image, *, alpha: bool = False) -> Image.Image:
    """8-bit RGB of a picture of any mode, without what its file said beside the pixels (EXIF tells places, for one).

    16-bit and floating point grey becomes 8-bit grey by its white, where Pillow itself cuts it off at 255.

    Args:
        image: the picture.
        alpha: whether its alpha is kept, where it has one: then the result is RGBA. Else it is dropped.

    Raises:
        InvalidRequest: its pixels cannot be read.
    """
    kept = alpha and (image.mode in _ALPHA_MODES or "transparency" in image.info)
    try:
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_levels(image))
        rgb = image.convert("RGBA" if kept else "RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # a file that is read only now may be damaged in as many ways as Pillow has errors
        raise InvalidRequest(f"the picture cannot be read: {one_line(str(error))}") from None
    rgb.info = {}
    return rgb


def _levels(image: Image.Image) -> np.ndarray:
    """uint8 ``[H, W]`` of a picture of whole numbers or floating point."""
    values = np.asarray(image, dtype=np.float32)
    largest = float(np.max(values, initial=0.0))
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
    """A file of ``image`` as RGB; ``image_format`` is png, which keeps an alpha channel, or jpg, which has none.

    JPEG is 4:4:4, so that no colour is halved.
    """
    buffer = io.BytesIO()
    if image_format == "jpg":
        to_rgb(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        to_rgb(image, alpha=True).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def image_from_bytes(data: Buffer, *, max_pixels: int) -> Image.Image:
    """Read a PNG or JPEG file as RGB, or RGBA where it has an alpha channel; its size is checked before any pixel is decoded.

    Returns:
        The image; ``format`` is "png" or "jpeg".

    Raises:
        InvalidRequest: not such a file, a cut or damaged one, or more than ``max_pixels``.
    """
    try:
        image = whole_files.decoded_picture(bytes(data), max_pixels)
        rgb = to_rgb(image, alpha=True)
    except InvalidRequest:
        raise
    except Exception as error:  # as above
        raise InvalidRequest(f"the picture cannot be read: {one_line(str(error))}") from None
    rgb.format = (image.format or "").lower()
    return rgb


def open_picture(path: Path, *, alpha: bool = False) -> Image.Image:
    """A user's picture file of any kind that Pillow knows, as RGB, upright as its EXIF says; an animation's first frame.

    With ``alpha`` as RGBA where it has an alpha channel.

    Raises:
        InvalidRequest: it cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image) or image
            upright.format = image.format
            return to_rgb(upright, alpha=alpha)
    except Exception as error:  # as above
        raise InvalidRequest(f"{path} cannot be read as a picture: {one_line(str(error))}") from None


def write_mp4(frames: Iterable[torch.Tensor], file: IO[bytes]) -> None:
    """Write an H.264 MP4 file at 24 frames a second, each frame as it comes. Needs the package av.

    Args:
        frames: uint8 ``[H, W, 3]`` each, all of one size. Odd last rows and columns are left out.
        file: seekable.

    Raises:
        InvalidRequest: av is not installed on this machine.
    """
    try:
        import av
    except ImportError:
        raise InvalidRequest("this server cannot make mp4: install the package av, or ask for output_type pt") from None
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=MP4_FPS)
        stream.pix_fmt = "yuv420p"
        for index, frame in enumerate(frames):
            # yuv420p halves the colour planes: sides must be even.
            even = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2].cpu().numpy())
            if index == 0:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())


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
