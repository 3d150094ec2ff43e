"""What stands around everything that is ours in a host: else the host's own call is made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from remote_vae.errors import UnsupportedLayout, VaeCallFailed

log = logging.getLogger("remote_vae")

T = TypeVar("T")
Made = TypeVar("Made")


class OwnCalls:
    """Which calls are the host's own, and what becomes of those that we could not answer. For any thread.

    Args:
        is_press: whether an exception is what the host raises at Interrupt, which ends the call and is no failure.
    """

    def __init__(self, is_press: Callable[[BaseException], bool] = lambda _: False) -> None:
        self._is_press = is_press
        self._thread = threading.local()
        # Why VAEs were left to the host; each is said once.
        self._said: set[str] = set()

    @property
    def are_passed_on(self) -> bool:
        """Whether this thread is in a preview, or in a call that is being answered: what the VAE is asked there is not ours."""
        return getattr(self._thread, "depth", 0) > 0

    @contextmanager
    def passing_on(self) -> Iterator[None]:
        """Within, VAE calls of this thread are the host's own."""
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            yield
        finally:
            self._thread.depth = depth

    def unless_taken(self, make: Callable[[], Made | None], answer: Callable[[Made], T], own: Callable[[], T]) -> T:
        """Answer what ``make`` makes of a call; where it makes None, or anything goes wrong, the host's ``own`` call does.

        Raises:
            VaeCallFailed: nothing could answer, the host's own VAE neither. What the host raises at Interrupt.
        """
        try:
            made = make()
            if made is not None:
                return answer(made)
        except VaeCallFailed:
            raise
        except UnsupportedLayout as error:
            self._say_once(str(error))
        except Exception as error:
            if self._is_press(error):
                raise
            log.exception("this call went wrong in Remote VAE; the UI's own VAE answers it")
        with self.passing_on():
            return own()

    def _say_once(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.warning("the UI's own VAE answers, and no endpoint: %s", why)
