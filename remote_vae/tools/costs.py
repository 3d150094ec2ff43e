"""Seconds that a card takes for a picture, from the published measurements in ``settings/vae_cost.csv``; bytes of a call."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from remote_vae.errors import SettingsError
from remote_vae.settings import settings_folder
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import Family

# Bytes a pixel of the ways in which pixels cross the wire: three channels in 8 bits; in float16; without loss, of the photo
# that needed most; JPEG at the quality that is sent.
BYTES_PER_PIXEL = {"u8": 3.0, "raw": 6.0, "compressed": 1.8, "png": 1.8, "jpg": 0.5}
# A latent's value, as UIs send it.
_LATENT_BYTES = 2
_FILE = "vae_cost.csv"


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    op: str
    family: str
    card: str
    pixels: int
    seconds: float


@cache
def measurements() -> Sequence[Measured]:
    """All rows that have a time; the others ran out of memory. Raises FileNotFoundError: the installation is incomplete."""
    with (settings_folder() / _FILE).open(encoding="utf-8", newline="") as file:
        return tuple(
            Measured(row["op"], row["family"], row["gpu"], int(row["width"]) * int(row["height"]), float(row["time_s"]))
            for row in csv.DictReader(file)
            if row["time_s"]
        )


def cards(op: Op) -> list[str]:
    """The names of the cards of which the table knows ``op``, quickest first."""
    found = {row.card: row.seconds / row.pixels for row in measurements() if row.op == op}
    return sorted(found, key=lambda card: found[card])


def seconds_of(op: Op, family: Family, card: str, pixels: int) -> float:
    """Seconds of one picture on ``card``, between the sizes that were measured; above them in proportion to its pixels.

    Args:
        family: that of the table's SD 1 and SDXL, or one whose VAE has as many computations as SD 1's.
        card: a name of the table; upper and lower case are the same.

    Raises:
        SettingsError: the table does not have it.
    """
    kind = family.key if family.key == "sdxl" else "sd1"
    if "AutoencoderKL" not in family.classes or family.video or family.key.startswith("tae"):
        raise SettingsError(f"nothing is published of the VAE of {family.label}: measure it, and give --seconds or --endpoint")
    rows = sorted(
        (row.pixels, row.seconds)
        for row in measurements()
        if row.op == op and row.family == kind and row.card.lower() == card.lower()
    )
    if not rows:
        known = ", ".join(cards(op))
        raise SettingsError(
            f"--card {card}: not among those of which {op}s are published ({known}); give --seconds or --endpoint"
        )
    return _between(rows, pixels)


def _between(rows: Sequence[tuple[int, float]], pixels: int) -> float:
    """By straight lines through the logarithms of the measured points."""
    above = next((index for index, (measured, _) in enumerate(rows) if measured >= pixels), len(rows))
    if above in (0, len(rows)):
        measured, seconds = rows[min(above, len(rows) - 1)]
        # Below the smallest it takes at least as long as starting it does.
        return seconds * max(1.0, pixels / measured)
    (less, quicker), (more, slower) = rows[above - 1], rows[above]
    share = math.log(pixels / less) / math.log(more / less)
    return math.exp(math.log(quicker) + share * math.log(slower / quicker))


def call_bytes(op: Op, family: Family, pixels: int, transfer: str) -> tuple[float, float]:
    """Bytes up and down of one call, without its head.

    Raises:
        SettingsError: no such ``transfer``.
    """
    if transfer not in BYTES_PER_PIXEL:
        raise SettingsError(f"--transfer must be {', '.join(BYTES_PER_PIXEL)}, not {transfer}")
    values = family.latent_channels * pixels / family.downscale**2
    channels = family.pixel_channels / 3
    if op == "decode":
        return values * _LATENT_BYTES, pixels * channels * BYTES_PER_PIXEL[transfer]
    # An encode's pixels go up in float16 where they are not a file, and the mean and the deviation of its latents come back.
    up = BYTES_PER_PIXEL["raw" if transfer == "u8" else transfer]
    return pixels * channels * up, 2 * values * _LATENT_BYTES
