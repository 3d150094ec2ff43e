"""Whether a picture's or a film's file is whole, before anything decodes it.

Pillow must not be asked: other extensions set ``ImageFile.LOAD_TRUNCATED_IMAGES``, a switch of the whole process with which it
takes cut and damaged files, and leaves black what is missing.
"""

from __future__ import annotations

import io
import struct
import zlib
from types import FunctionType

from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from remote_vae.wire.http import Buffer

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"

# The chunks that the pixels are made of. Texts (which may inflate to gigabytes), profiles, EXIF, and the further pictures of an
# animation never reach a decoder.
_PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
# Values a pixel, by the header's colour type.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# First column and row, and the steps, of each pass of an interlaced file.
_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]

# Scans of a progressive JPEG, each of which goes over the whole picture: cameras and libjpeg make ten.
_MAX_SCANS = 100


def decoded_picture(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """The picture of a whole PNG or JPEG file, its pixels decoded; its size is checked before.

    Raises:
        ValueError: another kind of file, a cut or damaged one, or more than ``max_pixels``.
        Exception: whatever else Pillow raises for a damaged one, down to struct.error and SyntaxError.
    """
    kind: type[ImageFile.ImageFile]
    if data.startswith(PNG):
        kind, data = PngImageFile, _png_pixels(data)
    elif data.startswith(JPEG):
        kind = JpegImageFile
        _check_jpeg(data)
    else:
        raise ValueError("it is not a PNG or JPEG file")
    # Not Image.open, which has a limit of pixels that is one of the whole process as well.
    image = kind(io.BytesIO(data))
    if image.width * image.height > max_pixels:
        raise ValueError(f"it has {image.width} x {image.height} pixels, expected at most {max_pixels} in all")
    _load(image)
    if kind is PngImageFile:
        _check_png_rows(data, image)
    return image


def picture_size(data: Buffer) -> tuple[int, int]:
    """Width and height that a PNG or JPEG file says it has, before any of it is decoded; zeros: it is none."""
    try:
        if bytes(data[: len(PNG)]) == PNG:
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
        return JpegImageFile(io.BytesIO(data)).size if bytes(data[: len(JPEG)]) == JPEG else (0, 0)
    except Exception:  # whatever Pillow raises for a damaged one, which says so when it is decoded
        return 0, 0


def _load(image: ImageFile.ImageFile) -> None:
    """Decode the pixels as Pillow does with LOAD_TRUNCATED_IMAGES off, whatever the switch says, in whichever thread.

    Raises:
        OSError: they are cut or damaged.
    """
    # Pillow has no other way: its function reads the switch from its module, so it is given another view of the module.
    usual = ImageFile.ImageFile.load
    strict = FunctionType(
        usual.__code__, {**usual.__globals__, "LOAD_TRUNCATED_IMAGES": False}, None, usual.__defaults__, usual.__closure__
    )
    strict(image)


def _png_pixels(data: bytes) -> bytes:
    """The PNG file with nothing in it but what its pixels need; every checksum is right.

    Raises:
        ValueError: it is cut or damaged.
    """
    kept: list[bytes | memoryview] = [PNG]
    view, start, name = memoryview(data), len(PNG), b""
    while name != b"IEND":
        if len(data) < start + 12:
            raise ValueError("the PNG file is cut off")
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if len(data) < end:
            raise ValueError("the PNG file is cut off")
        if zlib.crc32(view[start + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ValueError("the PNG file is damaged")
        if name in _PNG_CHUNKS:
            kept.append(view[start:end])
        start = end
    return b"".join(kept)


def _check_png_rows(data: bytes, image: Image.Image) -> None:
    """Whether a file of ``_png_pixels`` holds all the rows that its header promises; Pillow leaves black what is missing.

    Counting takes as long again as decoding. So it is done only where the last row is black, or the rows are not in order.

    Args:
        data: the file.
        image: what was decoded of it.

    Raises:
        ValueError, zlib.error: it does not.
    """
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, len(PNG) + 8)
    if not interlaced and image.crop((0, height - 1, width, height)).getbbox():
        return
    passes = _ADAM7 if interlaced else [(0, 0, 1, 1)]
    expected = 0
    for x, y, step_x, step_y in passes:
        columns, rows = -((x - width) // step_x), -((y - height) // step_y)
        if columns > 0 and rows > 0:
            expected += rows * (1 + (columns * bits * _PNG_CHANNELS[colour] + 7) // 8)
    if len(zlib.decompressobj().decompress(_idat(data), expected)) < expected:
        raise ValueError("the PNG file is truncated: rows are missing")


def _idat(data: bytes) -> bytes:
    found, start = [], len(PNG)
    while start < len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        if name == b"IDAT":
            found.append(data[start + 8 : start + 8 + length])
        start += 12 + length
    return b"".join(found)


def _check_jpeg(data: bytes) -> None:
    """Whether a JPEG file reaches its end. It has no checksums: damage within its pixels cannot be told from a picture.

    Raises:
        ValueError: it is cut, or made to take hours.
    """
    # Within pixels FF is followed by 00 or by a restart marker, so that these two are markers there, or chance within a header.
    if data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"):
        raise ValueError("the JPEG file is cut off")
    if data.count(b"\xff\xda") > _MAX_SCANS:
        raise ValueError(f"the JPEG file has more than {_MAX_SCANS} scans")


def check_mp4(data: bytes) -> None:
    """Whether an MP4 file is its boxes, one after the other to the end (ISO 14496-12: length, type, content).

    Raises:
        ValueError: it is cut, or something else.
    """
    names, start = [], 0
    while start < len(data):
        if len(data) < start + 16:
            raise ValueError("the mp4 file is cut off")
        length, name, long_length = struct.unpack_from(">I4sQ", data, start)
        # 1: the length stands behind the type; 0: to the end of the file
        length = {0: len(data) - start, 1: long_length}.get(length, length)
        names.append(name)
        if names[0] != b"ftyp" or length < 8:
            raise ValueError("not an mp4 file")
        start += length
    if start != len(data) or b"moov" not in names:
        raise ValueError("the mp4 file is cut off")
