"""``Server-Timing``: how long an answer took, stage by stage (https://www.w3.org/TR/server-timing/)."""

from __future__ import annotations

import re
from collections.abc import Mapping

TIMING = "Server-Timing"

# More than that is not read.
_LIMIT = 1000
_ENTRY = re.compile(r"(?:^|,) *([a-z_]{1,40}); *dur=([0-9]{1,9}(?:\.[0-9]{1,6})?)(?=[;, ]|$)")


def timing_header(stages: Mapping[str, float]) -> dict[str, str]:
    """The header for seconds by stage: "read", "queue", "predict", "answer" ..., in their order."""
    entries = ", ".join(f"{stage};dur={1000.0 * seconds:.1f}" for stage, seconds in stages.items())
    return {TIMING: entries} if entries else {}


def read_timing(headers: Mapping[str, str]) -> dict[str, float]:
    """Seconds by stage, of headers with lower-case names; what makes no sense is left out."""
    return {stage: float(dur) / 1000.0 for stage, dur in _ENTRY.findall(headers.get(TIMING.lower(), "")[:_LIMIT])}
