"""Hooks among other people's hooks."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from remote_vae.hosts.wrapping import is_ours, is_wrapped, unwrap, wrap

ADAPTER = object()


def door(original: Any, value: int) -> int:
    return original(value) + 1


def module() -> SimpleNamespace:
    return SimpleNamespace(work=lambda value: value)


def test_somebody_elses_wrapper_that_copies_our_attributes_is_not_ours() -> None:
    owner = module()
    wrap(owner, "work", door, ADAPTER)
    covered = owner.work

    @functools.wraps(covered)
    def theirs(value: int) -> int:
        return covered(value) * 10

    owner.work = theirs
    assert is_wrapped(owner.work)
    assert is_ours(covered, ADAPTER)
    assert not is_ours(owner.work, ADAPTER)
    unwrap(owner, "work", ADAPTER)
    assert owner.work is theirs
    assert owner.work(1) == 20


def test_the_hook_of_another_adapter_is_not_taken_away() -> None:
    owner = module()
    wrap(owner, "work", door, ADAPTER)
    unwrap(owner, "work", object())
    assert owner.work(1) == 2
