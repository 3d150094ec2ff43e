"""The adapter for ComfyUI: its jobs, its settings, its Interrupt. What crosses the VAE itself is in ``comfy_shaped``.

A VAE call is answered remotely for two reasons: a node has made the VAE object a remote one (``ComfyUi.remote``), or the user
wants it for every VAE; for those, the methods of ComfyUI's class are hooked.

Interrupt ends a job of ComfyUI at once, also while an endpoint is being waited for: nothing is done here in its place.
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlsplit

from remote_vae import rescue
from remote_vae.call import User, VaeCall
from remote_vae.errors import EndpointError, RouteFailed, UnsupportedLayout
from remote_vae.history import History, Record
from remote_vae.hosts import comfy_shaped
from remote_vae.hosts.comfyui_jobs import Job, Jobs
from remote_vae.hosts.comfyui_settings import StoredSettings
from remote_vae.hosts.generation import Request
from remote_vae.hosts.own_calls import OwnCalls
from remote_vae.hosts.seam_state import SeamState
from remote_vae.hosts.wrapping import unwrap, wrap
from remote_vae.remote.endpoints import endpoint_for
from remote_vae.remote.trial import Trial, family_there, state
from remote_vae.router import Router
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import Family

log = logging.getLogger("remote_vae")

# How often a text on a node may change while tiles are made, in seconds.
_TEXT_SECONDS = 0.1


class _Ended(BaseException):
    """Interrupt was pressed. Nobody between the waiting and the node takes it for a failure."""


@dataclass(frozen=True)
class Wanted:
    """What a node, or the settings, want of the calls of a VAE.

    Attributes:
        request: remote or not, and by which transfer.
        family: what the user says the VAE is; None: what it looks like.
    """

    request: Request = field(default_factory=Request)
    family: Optional[Family] = None


_NOTHING = Wanted()
# What a server answers to latents or pixels that are not its VAE's.
_REFUSED = frozenset({400, 409, 422})
_OPS: tuple[Op, ...] = ("decode", "encode")
# The attribute of a VAE object that has it.
_WANTED = "remote_vae_wanted"


class ComfyUi:
    """What stands between ComfyUI and its VAEs."""

    name = "ComfyUI"

    def __init__(self) -> None:
        self.router = Router(History())
        self.jobs = Jobs()
        self.settings = StoredSettings()
        self.installed = False
        self.own_calls = OwnCalls(is_interrupt)
        self._last_vae: Callable[[], Any] = lambda: None
        self._last_file = ""
        # How often an endpoint was found to have another VAE than it said when a VAE without weights was made.
        self.doubts = 0

    # --- life cycle ------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Get in the way of ComfyUI's VAE class and of its jobs. Safe to call again."""
        import folder_paths

        self.router = Router(self.router.history, Path(folder_paths.get_output_directory()) / rescue.FOLDER)
        self.settings = StoredSettings(Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json")
        self.installed = True
        for owner, name, around in self._wrapped_functions():
            wrap(owner, name, around, self)

    def uninstall(self) -> None:
        """Give ComfyUI its own functions back."""
        self.installed = False
        for owner, name, _ in self._wrapped_functions():
            unwrap(owner, name, self)

    def _wrapped_functions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        import execution

        calls = comfy_shaped.class_hooks(comfy_shaped.COMFYUI, self._around_call)
        return [*calls, (execution.PromptExecutor, "execute", self._around_job)]

    def _around_job(self, original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``PromptExecutor.execute(prompt, prompt_id, extra_data, execute_outputs)``."""
        job = None
        try:
            given = dict(zip(("prompt", "prompt_id", "extra_data"), args, strict=False)) | kwargs
            metadata = (given.get("extra_data") or {}).get("extra_pnginfo")
            job = self.jobs.begin(given["prompt"], metadata if isinstance(metadata, dict) else None)
        except Exception:
            log.exception("the job is not known to Remote VAE")
        try:
            return original(executor, *args, **kwargs)
        finally:
            if job is not None:
                self.jobs.end(job)

    # --- the calls -------------------------------------------------------------------------------------------------------

    def remote(self, vae: Any, wanted: Wanted) -> Any:
        """A VAE object like ``vae``, with the same weights, whose calls are answered as ``wanted``."""
        twin = comfy_shaped.overriding(comfy_shaped.COMFYUI, vae, self._around_call)
        setattr(twin, _WANTED, wanted)
        return twin

    def _around_call(self, method: str, original: Callable[..., Any], vae: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the methods of ComfyUI's VAE class, and of objects that ``remote`` has made.

        Raises:
            VaeCallFailed: nothing could answer, the VAE itself neither. What ComfyUI raises at Interrupt.
        """
        own = partial(original, vae, *args, **kwargs)
        if self.own_calls.are_passed_on:
            return own()

        def make() -> tuple[VaeCall[Any], Wanted, _Node] | None:
            wanted = getattr(vae, _WANTED, _NOTHING)
            node = _Node.now(self.jobs.current)
            self.jobs.begins_call(node.job, node.name)
            self._last_vae = _reference(vae)
            self._last_file = "" if node.job is None else node.job.vae_file(node.name)
            if not self._takes(wanted):
                return None
            known = comfy_shaped.Known(family=wanted.family)
            call = comfy_shaped.vae_call(comfy_shaped.COMFYUI, method, original, vae, args, kwargs, known)
            return None if call is None else (call, wanted, node)

        return self.own_calls.unless_taken(make, lambda made: self._answer(*made), own)

    def ask(self, call: VaeCall[Any], wanted: Wanted) -> Any:
        """Have ``call``, of a VAE without weights, answered by the endpoint or not at all.

        Raises:
            VaeCallFailed: with what went wrong; the latents of a decode were saved. What ComfyUI raises at Interrupt.
        """
        return self._answer(call, wanted, _Node.now(self.jobs.current), here=False)

    def _takes(self, wanted: Wanted) -> bool:
        asked = wanted.request.enabled
        return self.installed and (self.settings.now().enabled if asked is None else asked)

    def _answer(self, call: VaeCall[Any], wanted: Wanted, node: _Node, *, here: bool = True) -> Any:
        from comfy import model_management

        settings = wanted.request.adjusted(self.settings.now())

        def tell(text: str) -> None:
            if model_management.processing_interrupted():
                raise _Ended
            node.show(text)

        def recorded(record: Record) -> None:
            node.last = record
            self.jobs.record(node.job, node.name, record, names_endpoint=settings.name_endpoint)

        user = User(cancelled=model_management.processing_interrupted, tell=tell, recorded=recorded)
        call = replace(call, user=user, whole=_ending(call.whole), own_tiling=_ending(call.own_tiling))
        try:
            with self.own_calls.passing_on():
                if here:
                    return self.router.run(call, settings)
                return self._asked(call, settings)
        except _Ended:
            model_management.throw_exception_if_processing_interrupted()
            # Somebody has taken the press away meanwhile; this job has ended all the same.
            raise model_management.InterruptProcessingException from None
        finally:
            node.show_last()

    def _asked(self, call: VaeCall[Any], settings: Any) -> Any:
        from comfy import model_management

        try:
            return self.router.run_remote(call, settings)
        except RouteFailed as error:
            if model_management.processing_interrupted():
                raise _Ended from None
            if isinstance(error, EndpointError) and error.status in _REFUSED:
                self.doubts += 1
            raise self.router.failed(call, settings, error) from error

    # --- what the user wants to know -------------------------------------------------------------------------------------

    def say(self, node: str, text: str) -> None:
        """Show ``text`` on one of our own nodes in the job that runs."""
        found = _Node.now(self.jobs.current)
        found.name = node
        found.send(text)

    def about(self, vae: Any, wanted: Wanted) -> str:
        """What is to be expected of a VAE, for the node that makes it remote as ``wanted``. Never raises."""
        if wanted.request.mode == "off":
            return "off: this VAE does everything itself"
        try:
            at_work = comfy_shaped.at_work(comfy_shaped.COMFYUI, vae, comfy_shaped.Known(family=wanted.family))
        except UnsupportedLayout as error:
            return f"this VAE is left alone: {error}"
        except Exception as error:  # whatever a pack of nodes calls a VAE
            log.debug("the VAE cannot be told", exc_info=True)
            return f"this VAE is left alone: it is of no kind that is known ({type(error).__name__}: {error})"
        settings = wanted.request.adjusted(self.settings.now())
        wants = {"decode": settings.decode, "encode": settings.encode}
        found = {op: endpoint_for(op, at_work.family, settings)[0] for op in _OPS if wants[op]}
        hosts = list(dict.fromkeys(urlsplit(url).netloc for url in found.values() if url))
        if hosts:
            return f"asks {' and '.join(hosts)}"
        return "no endpoint is set: Settings, Remote VAE, Endpoint" if found else "the settings keep decode and encode here"

    def family_of_endpoint(self) -> Family:
        """What the endpoint says that its VAE is.

        Raises:
            RemoteVaeError: it does not, or there is none.
        """
        return family_there(self.settings.now())

    def seam_state(self) -> SeamState:
        """Where the calls are taken, for the line at the start."""
        version = getattr(sys.modules.get("comfyui_version"), "__version__", "of unknown version")
        hooked = (comfy_shaped.COMFYUI.vae.replace(":", "."),) if self.installed else ()
        return SeamState(f"{self.name} {version}", hooked, switch=("off but for the node Remote VAE", "on for every VAE"))

    def state(self) -> str:
        """One line for the settings page."""
        return state(self.settings.now(), self.router.history.last_asked, on="by the node Remote VAE only")

    def try_out(self) -> Trial:
        """Whether the endpoint works, and has the VAE that was used here last. Takes seconds; for any thread."""
        return self.router.try_endpoint(self._last_at_work(), self.settings.now())

    def last_used(self) -> tuple[str, str]:
        """File and family (its key) of the VAE that was used here last; "" for what cannot be told. For any thread."""
        at_work = self._last_at_work()
        return self._last_file, "" if at_work is None else at_work.family.key

    def _last_at_work(self) -> VaeAtWork | None:
        vae = self.last_vae()
        with suppress(Exception):  # whatever a pack of nodes calls a VAE
            return None if vae is None else comfy_shaped.at_work(comfy_shaped.COMFYUI, vae)
        return None

    def last_vae(self) -> Any:
        """The VAE object that was used last, as long as it is there; else None."""
        return self._last_vae()


class _Node:
    """The node that makes a call, and the text on it. Made in the thread of the job."""

    def __init__(self, job: Job | None, name: str, server: Any) -> None:
        self.job = job
        self.name = name
        self.last: Record | None = None
        self._server = server
        self._shown = 0.0

    @classmethod
    def now(cls, job: Job | None) -> _Node:
        from comfy_execution.utils import get_executing_context
        from server import PromptServer

        context, server = get_executing_context(), getattr(PromptServer, "instance", None)
        # A call from a thread without one belongs to no job, whichever is running.
        return cls(None, "", server) if context is None else cls(job, str(context.node_id), server)

    def show(self, text: str) -> None:
        """Show ``text`` on a node of ComfyUI's own, to whoever has sent the job. Called from any thread."""
        self.send(f"Remote VAE: {text}")

    def send(self, text: str) -> None:
        """Show ``text`` as it is."""
        now = time.monotonic()
        client = getattr(self._server, "client_id", None)
        if not self.name or client is None or (text.endswith("%") and now - self._shown < _TEXT_SECONDS):
            return
        self._shown = now
        # A text is not worth a picture.
        try:
            self._server.send_progress_text(text, self.name, client)
        except Exception:
            log.debug("the node shows no text", exc_info=True)

    def show_last(self) -> None:
        """Leave on the node what has happened, until it runs again."""
        record = self.last
        if record is None:
            return
        how = f"remote, {record.detail}" if record.route == "remote" else "on this machine"
        why = f" ({record.fallback_reason})" if record.fallback_reason else ""
        self.show(f"{record.op}d {how}{why}, {record.ms / 1000:.1f} s")


def is_interrupt(error: BaseException) -> bool:
    """Whether ``error`` is what ComfyUI raises at Interrupt: an Exception in 0.3.64, none in 0.33."""
    from comfy import model_management

    return isinstance(error, model_management.InterruptProcessingException)


def _ending(own: Callable[[], Any] | None) -> Callable[[], Any] | None:
    """``own`` with an Interrupt in the midst of it made known as such."""
    if own is None:
        return None

    def ending() -> Any:
        try:
            return own()
        except BaseException as error:
            if is_interrupt(error):
                # ComfyUI has taken the press away as it raised.
                raise _Ended from None
            raise

    return ending


def _reference(vae: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(vae)
    except TypeError:
        return lambda: None


adapter = ComfyUi()
