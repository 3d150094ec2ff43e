"""How strips are worked on by kind of device: as data, so that a processor can play a card."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Policy:
    """What is fast on one kind of device.

    Attributes:
        strip_bytes: the most that a strip has.
        strip_flops: how much work there may be before somebody is asked whether to go on. A processor does this in a tenth of a
            second or so; a card is never waited for.
        spilled_bytes: the most that a strip has where some have to wait elsewhere: larger ones would only send out more.
        moving: how many strips are alive beside those at work where some wait elsewhere: those that were fetched, for a norm
            and for a shortcut; on a card the next ones too, and those that are on their way out.
        work_share: one part in so many is for work where not all can wait on the device: thinner strips leave more room, but
            take longer each.
        least_bytes: what a strip has at least where there is no limit, however small the picture is.
        share: of the whole VAE's memory, how much a call without a limit takes; None: strips of ``strip_bytes``.
        looks: whether values are looked at on the way. On a card the host would wait for all that it has asked for before.
        widens: whether strips of half precision are copied to float32 for a norm; CUDA's kernels take them as they are.
        writes_parts: whether operations write rightly into a part of a tensor.
        exact: what sums over the whole picture are kept in.
        files: whether strips that find no room wait in files, else in the host's memory.
        pins: whether that memory is pinned, for copies that nobody waits for.
    """

    strip_bytes: int
    strip_flops: float = float("inf")
    spilled_bytes: int = 24 << 20
    moving: int = 2
    work_share: int = 2
    least_bytes: int = 16 << 20
    share: float | None = None
    looks: bool = False
    widens: bool = True
    writes_parts: bool = True
    exact: torch.dtype = torch.float64
    files: bool = False
    pins: bool = False


# Strips that stay in the processor's cache.
CPU = Policy(8 << 20, strip_flops=16e9, spilled_bytes=8 << 20, work_share=3, looks=True, files=True)
# As large as memory allows: with 256 MB a decode takes the time of the whole VAE (float16, 1024 px, H100), with 16 MB 1.7 x it.
CARD = Policy(256 << 20, moving=4, share=0.45, widens=False, pins=True)
# Apple's GPUs have written wrong values into a part of a tensor. They, Intel's and DirectML have no float64.
OTHER = Policy(256 << 20, share=0.45, writes_parts=False, exact=torch.float32)

POLICIES = {"cpu": CPU, "cuda": CARD}


def policy_of(device: torch.device) -> Policy:
    """The policy for ``device``."""
    return POLICIES.get(device.type, OTHER)
