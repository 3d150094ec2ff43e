"""Putting a function around another one so that it can be found again, and taken away without harm to who came later."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

# Attribute of a hook that names the adapter it belongs to.
_MARK = "remote_vae_adapter"
# Longer chains of wrappers are a ring.
_DEEPEST = 32


def wrap(owner: Any, name: str, around: Callable[..., Any], adapter: object) -> None:
    """Put ``around(original, *args, **kwargs)`` around the function ``name`` of a module, a class or an object, once."""
    current = getattr(owner, name)
    if not is_wrapped(current):
        place(owner, name, lambda *args, **kwargs: around(current, *args, **kwargs), adapter)


def place(owner: Any, name: str, hook: Any, adapter: object) -> None:
    """Set ``hook`` in place of the attribute ``name``, which it covers."""
    mark(hook, getattr(owner, name), adapter)
    # A method of the class is not put back on the instance: taking the hook away uncovers it.
    hook.covers_class = name not in vars(owner)
    setattr(owner, name, hook)


def mark(hook: Any, covered: Any, adapter: object) -> None:
    """Make ``hook`` known as one of ours, around ``covered``."""
    # functools.wraps copies attributes: by the name of the function, a copy of the mark on somebody else's is told apart.
    setattr(hook, _MARK, (adapter, weakref.ref(hook)))
    hook.__wrapped__ = covered


def unwrap(owner: Any, name: str, adapter: object) -> None:
    """Take our hook away. Where somebody has put another one over it meanwhile, ours stays, to pass calls on."""
    current = vars(owner).get(name)
    if not is_ours(current, adapter):
        return
    if current.covers_class:
        delattr(owner, name)
    else:
        setattr(owner, name, current.__wrapped__)


def is_ours(function: Any, adapter: object) -> bool:
    """Whether ``function`` itself is a hook of ``adapter``."""
    owner, marked = getattr(function, _MARK, (None, lambda: None))
    return owner is adapter and marked() is function


def is_wrapped(function: Any) -> bool:
    """Whether one of our hooks is in the chain of wrappers that begins with ``function``."""
    for _ in range(_DEEPEST):
        if function is None:
            return False
        if hasattr(function, _MARK):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
