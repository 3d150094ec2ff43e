"""What the adapters of the web UIs share. The three are forks of one another, and these parts are the same in all.

Functions of the UI that are wrapped: ``single_sample_to_image``, to know a live preview, which never leaves the machine;
``process_images_inner``, to know a generation; and Interrupt, Skip and Stop.

The UIs execute ``scripts/*.py`` again on Reload UI, while this module stays. So there is one adapter a process, and ``install``
and ``uninstall`` may be called any number of times.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch

from remote_vae.call import T, VaeCall
from remote_vae.history import History
from remote_vae.hosts.generation import Generation, rising
from remote_vae.hosts.wrapping import unwrap, wrap
from remote_vae.router import Router
from remote_vae.settings import Settings, load_options
from remote_vae.vae.at_work import ServedVae

log = logging.getLogger("remote_vae")

# Of the options' names in the UI. SD.Next has options of its own that begin with remote_vae_.
PREFIX = "remotevae_"
_PRESSES = ("interrupt", "skip", "stop_generating")


class ThreadState(threading.local):
    """What a thread is doing.

    Attributes:
        passing: in how many previews, or calls that are being answered already, it is: what the VAE is asked within is the UI's
            own business.
        generation: what it is generating.
    """

    passing = 0
    generation: Optional[Generation] = None


class WebUi(ABC):
    """What stands between a web UI and its VAE."""

    # For the log.
    name: ClassVar[str]

    def __init__(self) -> None:
        self.router = Router(History())
        self.installed = False
        self._presses = 0
        self._thread = ThreadState()
        self._problems: tuple[str, ...] = ()

    # --- what each UI has of its own -------------------------------------------------------------------------------------

    @abstractmethod
    def hook(self, model: Any) -> None:
        """Stand in front of the VAE calls of ``model``, once; after ``uninstall`` do nothing.

        The UI announces the same model again and again.
        """

    @abstractmethod
    def _models(self) -> list[Any]:
        """The models that are loaded. Does not load any."""

    @abstractmethod
    def _unhook(self, model: Any) -> None:
        """Give ``model`` its own calls back."""

    @abstractmethod
    def current(self) -> ServedVae | None:
        """The VAE that is loaded now, to be shared with other UIs; None: none is. Loads nothing. For any thread."""

    # --- life cycle ------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Get in the way of every model that is loaded, and of the UI's functions. Safe to call again."""
        from modules import paths

        self.router = Router(self.router.history, Path(paths.data_path) / "remote-vae-rescue")
        self.installed = True
        for owner, name, door in self._doors():
            wrap(owner, name, door, self)
        self.hook_loaded()

    def hook_loaded(self) -> None:
        """Get in the way of every model that is loaded."""
        if not self.installed:
            return
        try:
            for model in self._models():
                self.hook(model)
        except Exception:
            # A model of a kind that nobody has thought of: its generation goes on without us.
            log.exception("a model could not be hooked")

    def uninstall(self) -> None:
        """Give the UI its own functions back. A hook that somebody has put over ours stays, and ours only passes on."""
        self.installed = False
        for owner, name, _ in self._doors():
            unwrap(owner, name, self)
        for model in self._models():
            self._unhook(model)

    # --- the doors -------------------------------------------------------------------------------------------------------

    def _doors(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """The functions of the UI that are wrapped: where they are, their names, and what is put around them."""
        from modules import processing, sd_samplers_common, shared

        return [
            (sd_samplers_common, "single_sample_to_image", self._preview_door),
            (processing, "process_images_inner", self._generation_door),
            *((shared.state, name, self._press_door) for name in _PRESSES if hasattr(shared.state, name)),
        ]

    def _preview_door(self, original: Callable[..., Any], sample: Any, approximation: Any = None) -> Any:
        """Around ``single_sample_to_image``. With an ``approximation`` named it makes a picture to keep, not a preview."""
        if approximation is not None:
            return original(sample, approximation)
        with self.passing_on():
            return original(sample)

    def _generation_door(self, original: Callable[..., Any], p: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``process_images_inner``."""
        # Whatever was loaded or put over our hooks since the last one.
        self.hook_loaded()
        outer = self._thread.generation
        self._thread.generation = Generation(p, outer)
        try:
            return original(p, *args, **kwargs)
        finally:
            self._thread.generation = outer

    def _press_door(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around Interrupt, Skip and Stop: a second press shows in no flag."""
        self._presses += 1
        return original(*args, **kwargs)

    # --- for other UIs ---------------------------------------------------------------------------------------------------

    def shares(self) -> bool:
        """Whether the user wants the VAE shared."""
        return self.installed and self.own_settings().share

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within, this thread asks the UI's VAE for another UI."""
        with self.passing_on(), torch.no_grad():
            yield

    # --- for the hooks ---------------------------------------------------------------------------------------------------

    @contextmanager
    def passing_on(self) -> Iterator[None]:
        """Within, VAE calls of this thread are the UI's own."""
        self._thread.passing += 1
        try:
            yield
        finally:
            self._thread.passing -= 1

    def _takes(self) -> bool:
        """Whether a VAE call of this thread is for us. Asked at every call, so it has to be quick."""
        if not self.installed or self._thread.passing:
            return False
        generation = self._thread.generation
        wanted = None if generation is None else generation.request.enabled
        return self._switched_on() if wanted is None else wanted

    def _switched_on(self) -> bool:
        from modules import shared

        enabled = getattr(shared.opts, PREFIX + "enabled", False)
        return enabled if isinstance(enabled, bool) else self.own_settings().enabled

    def _taken(self, make: Callable[[], VaeCall[T]], own: Callable[[], T]) -> T:
        """Answer the call that ``make`` makes. Where even that fails, which is our fault and not the VAE's, by ``own``."""
        try:
            call = make()
        except Exception:
            log.exception("this call was not understood; the UI's own VAE answers it")
            return own()
        return self._answer(call)

    def _answer(self, call: VaeCall[T], *, remote: bool = True, because: str = "") -> T:
        """Answer ``call`` by the best route, and let the user see how it goes."""
        settings = self._settings()
        generation = self._thread.generation
        # Another extension may have put its hook between two of ours.
        with self.passing_on(), self._shown(call) as shown:

            def run(asked: VaeCall[T]) -> T:
                return self.router.run(asked, settings, remote=remote, because=because)

            if call.op == "encode" and generation is not None:
                return generation.encode_once(shown, run)
            return run(shown)

    @contextmanager
    def _shown(self, call: VaeCall[T]) -> Iterator[VaeCall[T]]:
        """The call, with what happens in the UI's progress line and in the infotext."""
        from modules import shared

        state = shared.state
        before = getattr(state, "textinfo", None)
        generation = self._thread.generation

        def tell(text: str) -> None:
            state.textinfo = f"Remote VAE: {text}"

        try:
            yield replace(call, tell=tell) if generation is None else replace(call, tell=tell, recorded=generation.record)
        finally:
            state.textinfo = before

    def _interrupts(self) -> Callable[[], bool]:
        """Whether Interrupt, Skip or Stop is pressed from now on. A press during sampling asks for the picture so far."""
        from modules import shared

        presses = self._presses
        risen = rising(lambda: bool(shared.state.interrupted), lambda: bool(shared.state.skipped))
        return lambda: self._presses != presses or risen()

    def _settings(self) -> Settings:
        """The settings of what this thread generates."""
        settings, generation = self.own_settings(), self._thread.generation
        return settings if generation is None else generation.request.adjusted(settings)

    def own_settings(self) -> Settings:
        """What the user has set in the UI; what cannot be used is its default, with one line in the log."""
        from modules import shared

        values = {key: getattr(shared.opts, PREFIX + key, option.default) for key, option in load_options().items()}
        settings, problems = Settings.forgiving(values)
        if tuple(problems) != self._problems:
            self._problems = tuple(problems)
            for problem in problems:
                log.warning("Settings, Remote VAE: %s", problem)
        return settings
