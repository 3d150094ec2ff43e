"""Whether a body is worth compressing: where the network is quicker than the processor it costs more than it saves."""

from __future__ import annotations

from remote_vae.tokens import is_loopback
from remote_vae.wire.compression import SMALLEST, Coding, best
from remote_vae.wire.extras import Extras

# What is saved at least of a photo; of most two thirds are.
_SAVED = 0.5


def worth(nbytes: int, pace: float | None, coding: Coding, *, near: bool) -> bool:
    """Whether ``nbytes`` arrive sooner compressed.

    Args:
        nbytes: of the body as it is.
        pace: bytes a second that came from there of late; None: nothing has been measured.
        coding: how it would be compressed.
        near: whether the endpoint's address is this machine's own: then what has not been measured is taken for quick.
    """
    if nbytes < SMALLEST:
        return False
    if pace is None:
        return not near
    return _SAVED / pace > coding.seconds_per_byte


def wanted(extras: Extras, nbytes: int, pace: float | None, url: str) -> Extras:
    """``extras`` for a call of ``nbytes`` to ``url``: with one coding, or with none."""
    coding = best(extras.codings)
    if coding is not None and worth(nbytes, pace, coding, near=is_loopback(url)):
        return Extras(extras.late, extras.pictures, (coding.name,))
    return Extras(extras.late, extras.pictures)
