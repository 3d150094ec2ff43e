"""Strips of another size than is fast, so that small pictures are cut as large ones are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remote_vae.tiled import policy


def cut_strips(monkeypatch: pytest.MonkeyPatch, size: int, device: str = "cpu") -> None:
    """``size`` bytes a strip, with a limit and without one."""
    changed = replace(policy.POLICIES[device], strip_bytes=size, spilled_bytes=size, least_bytes=size, share=None)
    monkeypatch.setitem(policy.POLICIES, device, changed)
