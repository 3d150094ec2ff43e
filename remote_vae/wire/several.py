"""Several picture files in one answer, which the protocol has no form for.

Content type ``application/vnd.remote-vae.pictures``. Each file comes after its length, four bytes, the highest first.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from remote_vae.wire.http import Buffer

PICTURES_TYPE = "application/vnd.remote-vae.pictures"

_LENGTH = struct.Struct(">I")


def joined(files: Sequence[Buffer]) -> bytes:
    """The body of such an answer."""
    return b"".join(part for file in files for part in (_LENGTH.pack(len(file)), file))


def parted(body: memoryview, count: int) -> list[memoryview]:
    """The files of such an answer. Raises ValueError: there are not ``count``, or their lengths are not those of the body."""
    files: list[memoryview] = []
    start = 0
    for _ in range(count):
        if len(body) - start < _LENGTH.size:
            raise ValueError(f"got {len(files)} pictures, expected {count}")
        end = start + _LENGTH.size + _LENGTH.unpack_from(body, start)[0]
        if end > len(body):
            raise ValueError(f"picture {len(files) + 1} of {count} is cut off")
        files.append(body[start + _LENGTH.size : end])
        start = end
    if start != len(body):
        raise ValueError(f"got more than {count} pictures")
    return files
