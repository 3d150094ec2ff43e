"""The router: who answers a VAE call, in which order, and what happened."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from remote_vae import local, rescue
from remote_vae.call import Outcome, T, VaeCall
from remote_vae.errors import RouteFailed, VaeCallFailed
from remote_vae.history import History, Record
from remote_vae.remote.client import shown
from remote_vae.remote.endpoints import endpoint_for
from remote_vae.remote.route import RemoteRoute
from remote_vae.remote.trial import Trial, try_out
from remote_vae.settings import Settings
from remote_vae.tiled.memory import forget_frames
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import find_family

log = logging.getLogger("remote_vae")


class Router:
    """Answers VAE calls by an endpoint or on this machine, and keeps the history. May be used from many threads.

    Args:
        history: where the records go; a new one by default.
        rescue_folder: where latents go when all fails and the settings name no folder, or one that cannot be written to.
    """

    def __init__(self, history: History | None = None, rescue_folder: Path | None = None) -> None:
        self.history = history or History()
        self._rescue_folder = rescue_folder
        self._remote = RemoteRoute()

    def run(self, call: VaeCall[T], settings: Settings, *, remote: bool = True, because: str = "") -> T:
        """Answer ``call``: remote, and on any failure on this machine.

        Args:
            remote: False keeps the call on this machine whatever the settings say.
            because: why an earlier attempt at this very call failed, for the record.

        Raises:
            VaeCallFailed: nothing could; the latents of a decode were saved, and the message says where.
        """
        started = time.perf_counter()
        reasons = [because]
        outcome = self._asked(call, settings, reasons) if remote else None
        if outcome is None:
            try:
                outcome = local.answer(call, settings)
            except Exception as error:
                self._record(call, settings, Outcome(None, "failed"), started, [*reasons, str(error)])
                raise self.failed(call, settings, error) from error
        self._record(call, settings, outcome, started, [*reasons, outcome.because])
        return outcome.value

    def run_remote(self, call: VaeCall[T], settings: Settings) -> T:
        """Answer ``call`` remotely or not at all; nothing is recorded when it fails.

        Raises:
            RouteFailed: the endpoint could not.
        """
        started = time.perf_counter()
        outcome = self._remote.run(call, settings)
        self._record(call, settings, outcome, started, [])
        return outcome.value

    def try_endpoint(self, vae: VaeAtWork | None, settings: Settings) -> Trial:
        """Whether the endpoint works, for a user who asks; nothing is recorded. ``vae``: the one here, if one is loaded.

        A pause after failures is not waited for, and where the endpoint works now it is over.
        """
        trial = try_out(settings, vae)
        if trial.is_good:
            self._remote.forget(endpoint_for("decode", find_family("sd1") if vae is None else vae.family, settings)[0])
        return trial

    def _asked(self, call: VaeCall[T], settings: Settings, reasons: list[str]) -> Outcome[T] | None:
        try:
            if wants_remote(call, settings):
                return self._remote.run(call, settings)
            if settings.enabled and _wanted(call, settings):
                reasons.append(_no_endpoint(call, settings))
        except RouteFailed as error:
            log.log(logging.DEBUG if error.was_said else logging.WARNING, "remote %s: %s", call.op, error)
            reasons.append(error.reason)
            forget_frames(error)
        except Exception as error:
            # Ours, and not the host's VAE that went wrong.
            log.exception("remote %s", call.op)
            reasons.append(type(error).__name__)
            forget_frames(error)
        return None

    def _record(self, call: VaeCall[T], settings: Settings, outcome: Outcome[Any], started: float, reasons: list[str]) -> None:
        # What is known of a picture is not worth the picture.
        try:
            because = ", then ".join(filter(None, reasons))
            endpoint = outcome.endpoint
            if not endpoint and because:
                endpoint = shown(endpoint_for(call.op, call.vae.family, settings)[0])
            batch, height, width = call.size
            record = Record(
                op=call.op,
                route=outcome.route,
                detail=outcome.detail,
                endpoint=endpoint,
                images=batch,
                height=height,
                width=width,
                bytes_up=outcome.bytes_up,
                bytes_down=outcome.bytes_down,
                ms=(time.perf_counter() - started) * 1000.0,
                fallback_reason=because,
                when=time.time(),
                vae_ms=outcome.vae_ms,
            )
            self.history.add(record)
            call.user.recorded(record)
            log.info("%s", record)
        except Exception:
            log.debug("the record was lost", exc_info=True)

    def failed(self, call: VaeCall[T], settings: Settings, error: Exception) -> VaeCallFailed:
        """What to raise for a call that nothing could answer, in the end for ``error``; the latents of a decode are saved."""
        if call.op == "encode":
            return VaeCallFailed(f"the picture could not be encoded: {error}")
        folders = [folder for folder in (settings.rescue_folder, self._rescue_folder) if folder]
        latents = call.tensor if call.saved is None else call.saved
        try:
            path = rescue.save(latents, call.vae.family, folders, str(error))
        except Exception as problem:  # whatever stops the saving, the first error is the one to report
            return VaeCallFailed(f"the latents could not be decoded: {error}. Nor could they be saved: {problem}")
        return VaeCallFailed(
            f"the latents could not be decoded: {error}. They are saved in {path}. To make pictures of them, type into a "
            f"terminal, with --endpoint ADDRESS or --vae FILE after it: {rescue.command(path)}",
            rescued=str(path),
        )


def wants_remote(call: VaeCall[T], settings: Settings) -> bool:
    """Whether the settings send this call away, and there is somewhere to send it."""
    return _wanted(call, settings) and bool(endpoint_for(call.op, call.vae.family, settings)[0])


def _wanted(call: VaeCall[T], settings: Settings) -> bool:
    return settings.decode if call.op == "decode" else settings.encode


def _no_endpoint(call: VaeCall[T], settings: Settings) -> str:
    """Why a call that was to go to an endpoint has none; "" where the user has set none for this kind of call."""
    if settings.public_endpoints:
        return "no public endpoint for this VAE"
    return settings.no_endpoint(call.op)
