"""Flags of a host that count only from the moment they rise."""

from __future__ import annotations

from collections.abc import Callable


def rising(*flags: Callable[[], bool]) -> Callable[[], bool]:
    """A function that is True once any of ``flags`` is True that was False when ``rising`` was called."""
    watched = [flag for flag in flags if not flag()]
    return lambda: any(flag() for flag in watched)
