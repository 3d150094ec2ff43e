"""What the adapters of the web UIs share. The three are forks of one another, and these parts are the same in all.

Functions of the UI that are wrapped: ``single_sample_to_image``, to know a live preview, which never leaves the machine;
``process_images_inner``, to know a generation; and Interrupt, Skip and Stop.

The UIs execute ``scripts/*.py`` again on Reload UI, while this module stays. So there is one adapter a process, and ``install``
and ``uninstall`` may be called any number of times.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Optional

import torch

from remote_vae.call import T, VaeCall
from remote_vae.history import History, Record
from remote_vae.hosts.generation import Generation, fallback
from remote_vae.hosts.own_calls import OwnCalls
from remote_vae.hosts.seam_state import SeamState, not_entered
from remote_vae.hosts.wrapping import unwrap, wrap
from remote_vae.remote import trial
from remote_vae.router import Router
from remote_vae.settings import Settings, load_options
from remote_vae.vae.at_work import Op, VaeAtWork

log = logging.getLogger("remote_vae")

# For so many seconds a warning is news.
_NEWS = 60.0

# Of the options' names in the UI. SD.Next has options of its own that begin with remote_vae_.
PREFIX = "remotevae_"
_PRESSES = ("interrupt", "skip", "stop_generating")
_FLAGS = ("interrupted", "skipped")
# How long an endpoint may take to begin its answer after a press that did not end the wait for it.
_HURRY_SECONDS = 3.0


class ThreadState(threading.local):
    """What a thread is doing.

    Attributes:
        generation: what it is generating.
    """

    generation: Optional[Generation] = None


class WebUi(ABC):
    """What stands between a web UI and its VAE."""

    # What users call it.
    name: str
    # Where its VAE calls are taken, for the console, and what names its version there, as ``module:attribute``.
    seams: tuple[str, ...] = ()
    version_at: str = ""

    def __init__(self) -> None:
        self.router = Router(History())
        self.installed = False
        self._presses = 0
        self._thread = ThreadState()
        self._problems: tuple[str, ...] = ()
        self.own_calls = OwnCalls()
        # What is wrong with the seam since the last generation.
        self._not_entered = ""
        # The last fallback that was shown over the page.
        self._warned = ""
        # A warning of a thread that has no page, and when it was.
        self._unshown: tuple[str, float] = ("", 0.0)

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

    def version(self) -> str:
        """What the UI's own people call the version that runs; "" where that cannot be told."""
        return version_at(self.version_at)

    @abstractmethod
    def current(self) -> VaeAtWork | None:
        """The VAE that is loaded now, to be shared with other UIs; None: none is. Loads nothing. For any thread."""

    # --- life cycle ------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Get in the way of every model that is loaded, and of the UI's functions. Safe to call again."""
        from modules import paths

        self.router = Router(self.router.history, Path(paths.data_path) / "remote-vae-rescue")
        self.installed = True
        self._warned = ""
        for owner, name, around in self._wrapped_functions():
            wrap(owner, name, around, self)
        self.hook_loaded()

    def show_in_tabs(self, title: str) -> None:  # noqa: B027
        """Let the UI show the script of this title in its tabs: most do so without being asked."""

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
        for owner, name, _ in self._wrapped_functions():
            unwrap(owner, name, self)
        for model in self._models():
            self._unhook(model)

    # --- around the functions of the UI ---------------------------------------------------------------------------------------

    def _wrapped_functions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """The functions of the UI that are wrapped: where they are, their names, and what is put around them."""
        from modules import processing, sd_samplers_common, shared

        return [
            (sd_samplers_common, "single_sample_to_image", self._around_preview),
            (processing, "process_images_inner", self._around_generation),
            *((shared.state, name, self._around_press) for name in _PRESSES if hasattr(shared.state, name)),
        ]

    def _around_preview(self, original: Callable[..., Any], sample: Any, approximation: Any = None) -> Any:
        """Around ``single_sample_to_image``. With an ``approximation`` named it makes a picture to keep, not a preview."""
        if approximation is not None:
            return original(sample, approximation)
        with self.own_calls.passing_on():
            return original(sample)

    def _around_generation(self, original: Callable[..., Any], p: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``process_images_inner``."""
        # Whatever was loaded or put over our hooks since the last one.
        self.hook_loaded()
        outer = self._thread.generation
        generation = self._thread.generation = Generation(p, outer)
        try:
            processed = original(p, *args, **kwargs)
        finally:
            self._thread.generation = outer
            if generation.stops:
                self._pass_on_stop(outer)
        self._look_back(generation, processed)
        return processed

    def _look_back(self, generation: Generation, processed: Any) -> None:
        """Say it where pictures were made and the seam was not entered: else nobody notices that nothing is remote."""
        from modules import shared

        try:
            pictures = len(getattr(processed, "images", None) or ())
            if generation.outer is not None:
                generation.outer.entered = generation.outer.entered or generation.entered
            if any(getattr(shared.state, flag, False) for flag in _FLAGS):
                # What was begun may have been made by an approximation (live_preview_fast_interrupt).
                return
            wanted = generation.request.enabled
            if not pictures or not self.installed or not (self._switched_on() if wanted is None else wanted):
                return
            before, self._not_entered = self._not_entered, "" if generation.entered else not_entered(pictures, self.name)
            if self._not_entered and not before:
                log.warning("%s", self._not_entered)
        except Exception:
            log.debug("a generation could not be looked back at", exc_info=True)

    def _pass_on_stop(self, outer: Generation | None) -> None:
        """What is around the generation that has ended, a plot or a loop over pictures, is to end as well."""
        from modules import shared

        if outer is not None:
            outer.stops = outer.hurried = True
        elif hasattr(shared.state, "stopping_generation"):
            shared.state.stopping_generation = True
        else:
            shared.state.interrupted = True

    def _around_press(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around Interrupt, Skip and Stop: a second press shows in no flag."""
        self._presses += 1
        return original(*args, **kwargs)

    def seam_state(self) -> SeamState:
        """How it stands between the UI and us now. For any thread."""
        return SeamState(self._name_and_version, self.seams, self._not_entered)

    @cached_property
    def _name_and_version(self) -> str:
        # Once: some UIs ask git.
        return f"{self.name} {self.version()}".strip()

    def state(self) -> str:
        """How things stand, in one line: "on: studio:7870, same VAE, last call 1.1 s". For any thread."""
        problem = self.seam_state().problem
        return problem or trial.state(self.own_settings(), self.router.history.last_asked)

    # --- for other UIs ---------------------------------------------------------------------------------------------------

    def shares(self) -> bool:
        """Whether the user wants the VAE shared."""
        return self.installed and self.own_settings().share

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within, this thread asks the UI's VAE for another UI."""
        with self.own_calls.passing_on(), torch.no_grad():
            yield

    # --- for the hooks ---------------------------------------------------------------------------------------------------

    def _takes(self) -> bool:
        """Whether a VAE call of this thread is for us. Asked at every call, so it has to be quick."""
        if not self.installed or self.own_calls.are_passed_on:
            return False
        generation = self._thread.generation
        if generation is not None:
            generation.entered = True
        try:
            wanted = None if generation is None else generation.request.enabled
            return self._switched_on() if wanted is None else wanted
        except Exception:
            log.exception("whether Remote VAE is switched on cannot be told; the UI's own VAE answers")
            return False

    def _switched_on(self) -> bool:
        from modules import shared

        enabled = getattr(shared.opts, PREFIX + "enabled", False)
        return enabled if isinstance(enabled, bool) else self.own_settings().enabled

    def _taken(
        self, make: Callable[[], VaeCall[T] | None], own: Callable[[], T], *, remote: bool = True, because: str = ""
    ) -> T:
        """Answer the call that ``make`` makes; None is a call that is the VAE's own.

        Args:
            own: the UI's own call. It answers whatever else goes wrong with what is ours.
            remote, because: for the router.

        Raises:
            VaeCallFailed: nothing could answer, the UI's own VAE neither.
        """
        return self.own_calls.unless_taken(make, lambda call: self._answer(call, remote=remote, because=because), own)

    def _answer(self, call: VaeCall[T], *, remote: bool, because: str) -> T:
        """Answer ``call`` by the best way there is, and let the user see how it goes."""
        generation = self._thread.generation
        # Another extension may have put its hook between two of ours.
        with self.own_calls.passing_on(), self._shown(call) as shown:
            settings = self._settings()
            if generation is not None:
                generation.names_endpoint = settings.name_endpoint

            def run(asked: VaeCall[T]) -> T:
                with self._roomy(asked) as roomy:
                    return self.router.run(roomy, settings, remote=remote, because=because)

            if call.op == "encode" and generation is not None:
                return generation.encode_once(shown, run)
            return run(shown)

    def _roomy(self, call: VaeCall[T]) -> AbstractContextManager[VaeCall[T]]:
        """The call with what the UI can put away to make room for it; after the context that is back."""
        return nullcontext(call)

    @contextmanager
    def _shown(self, call: VaeCall[T]) -> Iterator[VaeCall[T]]:
        """The call, with what happens in the UI's progress line and in the infotext.

        Interrupt or Skip meanwhile ends the waiting, and nothing else of this picture: what was sampled is made and saved as
        any other. Only then is what the press asked for done.
        """
        from modules import shared

        state = shared.state
        text = getattr(state, "textinfo", None)
        presses, flags = self._presses, [flag for flag in _FLAGS if not getattr(state, flag, False)]
        generation = self._thread.generation

        def risen(*wanted: str) -> bool:
            return any(getattr(state, flag, False) for flag in flags if flag in wanted)

        def tell(text: str) -> None:
            state.textinfo = f"Remote VAE: {text}"

        user = replace(
            call.user,
            cancelled=lambda: self._presses != presses or risen(*_FLAGS),
            gave_up=lambda: risen("skipped"),
            tell=tell,
            recorded=partial(self._recorded, generation),
        )
        try:
            yield replace(call, user=user)
        finally:
            state.textinfo = text
            self._after(call.op, [flag for flag in flags if getattr(state, flag, False)])

    def _recorded(self, generation: Generation | None, record: Record) -> None:
        """A call has ended: it goes into the infotext, and what has gone wrong over the page, once a cause."""
        if generation is not None:
            generation.record(record)
        if record.route == "remote":
            self._warned = ""
        problem = fallback(record)
        # The same of another endpoint is another cause.
        cause = f"{problem} {record.endpoint}"
        if problem and cause != self._warned:
            self._warned = cause
            text = f"Remote VAE: {problem}"
            self._unshown = ("", 0.0) if warn(text) else (text, time.monotonic())

    def unshown_warning(self) -> str:
        """What no page has shown, for the next that asks; "" where there is nothing, or nothing of now. For any thread."""
        (text, when), self._unshown = self._unshown, ("", 0.0)
        return text if time.monotonic() - when < _NEWS else ""

    def _after(self, op: Op, pressed: list[str]) -> None:
        """A call of this thread is over; ``pressed`` are the flags that have risen in it, and have ended its wait."""
        from modules import shared

        state, generation = shared.state, self._thread.generation
        for flag in pressed:
            setattr(state, flag, False)
        stops = "interrupted" in pressed
        if generation is not None:
            generation.hurried = generation.hurried or bool(pressed)
            generation.stops = stops = generation.stops or stops
        # An encode comes before the sampling of its picture, which this would end.
        if stops and op == "decode" and hasattr(state, "stopping_generation"):
            state.stopping_generation = True
        elif stops and generation is None:
            state.interrupted = True

    def _settings(self) -> Settings:
        """The settings of what this thread generates."""
        from modules import shared

        settings, generation = self.own_settings(), self._thread.generation
        if generation is not None:
            settings = generation.request.adjusted(settings)
        hurried = generation is not None and generation.hurried
        if hurried or any(getattr(shared.state, flag, False) for flag in _FLAGS):
            # Pressed during sampling, or in an earlier call: the picture is wanted as it is, and soon.
            settings = replace(
                settings,
                connect_timeout=min(settings.connect_timeout, _HURRY_SECONDS),
                first_byte_timeout=min(settings.first_byte_timeout, _HURRY_SECONDS),
            )
        return settings

    def own_settings(self) -> Settings:
        """What the user has set in the UI; what cannot be used is its default, with one line in the log."""
        from modules import shared

        values = {key: getattr(shared.opts, PREFIX + key, option.default) for key, option in load_options().items()}
        settings, problems = Settings.forgiving(values)
        if tuple(problems) != self._problems:
            self._problems = tuple(problems)
            for problem in problems:
                log.warning("Settings: %s", problem)
        return settings


def version_at(where: str) -> str:
    """A version by ``module:attribute``, which names it or makes the name; "" where that cannot be told."""
    module, _, attribute = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        return str(found() if callable(found) else found)
    except Exception:  # as any host pleases
        return ""


def warn(text: str) -> bool:
    """As a message over the page. False: this thread has none, as in the host's API, and where the UI generates in another."""
    # It warns Python where there is no page.
    with suppress(Exception), warnings.catch_warnings(record=True) as missed:
        import gradio as gr

        warnings.simplefilter("always")
        gr.Warning(text)
        return not missed
    return False


def is_picture(tensor: Any) -> bool:
    """Whether ``tensor`` is a batch of pictures, or of their latents, that nobody wants a gradient of."""
    return isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and not (tensor.requires_grad and torch.is_grad_enabled())
