"""Whether an endpoint has the VAE of the call, and what it means if not."""

from __future__ import annotations

import logging
import threading

from remote_vae.call import T, VaeCall
from remote_vae.errors import AnotherVae, NotOffered
from remote_vae.remote.client import Deadlines, shown
from remote_vae.remote.info import Infos, info_url
from remote_vae.remote.sample import Ask, Samples
from remote_vae.settings import Settings, load_options
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import Family, load_families
from remote_vae.vae.fingerprint import Identity
from remote_vae.wire import THIS_PROCESS, Info

log = logging.getLogger("remote_vae")


class VaeCheck:
    """Compares the VAE of a call with that of an endpoint before anything of the user's is sent. May be used from many threads.

    Args:
        infos: what the endpoints say; a new memory by default.
        samples: for endpoints that say nothing; None: then a file's name has to tell.
    """

    def __init__(self, infos: Infos | None = None, samples: Samples | None = None) -> None:
        self._infos = infos or Infos()
        self._samples = samples
        self._lock = threading.Lock()
        self._told: dict[str, str] = {}

    def check(self, call: VaeCall[T], url: str, settings: Settings, ask: Ask, *, public: bool) -> None:
        """Return if the call may go to ``url``; ``ask`` sends a tensor in its place.

        Raises:
            AnotherVae: the endpoint has another VAE, and the settings keep such calls on this machine.
            RouteFailed: the endpoint did not answer.
        """
        if call.vae.module is None:
            return
        identity, family = Identity(call.vae.module, call.vae.picked), call.vae.family
        info = Info()
        if not public:
            info = self._infos.of(url, Deadlines.of(settings).quick, call.user.cancelled)
        endpoint = shown(info_url(url)).removesuffix("/info")
        if info.process == THIS_PROCESS:
            # It would wait for the end of the generation that waits for it.
            raise NotOffered(f"{endpoint} is this UI itself: enter another machine's address", reason="the endpoint is this UI")
        difference, told = _difference(endpoint, info, family, identity), endpoint
        if difference is None:
            same = None
            if self._samples is not None:
                same = self._samples.compare(identity, call.op, url, ask, call.user.cancelled)
            # Its decoder may be another one where its encoder is the same.
            difference = _unsaid_difference(endpoint, same, call.op, family, identity)
            told = f"{call.op} {endpoint}"
        if not difference:
            self._tell(told, "")
            return
        option = load_options()["when_vae_differs"].label
        if settings.when_vae_differs == "remote":
            message = f"{difference}; its pictures are different from yours, and are taken as {option!r} is set to remote"
            if self._tell(told, message):
                log.warning("%s", message)
            return
        message = (
            f"{difference}. So this machine does it, with your VAE. Run a server that has it "
            f"(remote-vae serve --vae), or set {option!r} to remote to have the endpoint's pictures"
        )
        raise AnotherVae(message, told=not self._tell(told, message))

    def forget(self, url: str) -> None:
        """The endpoint at ``url`` failed: ask it anew next time."""
        self._infos.forget(url)
        if self._samples is not None:
            self._samples.forget(url)

    def _tell(self, about: str, message: str) -> bool:
        """Whether ``message`` is news: not the last that was said of ``about``."""
        with self._lock:
            before, self._told[about] = self._told.get(about, ""), message
            return before != message


def _difference(endpoint: str, info: Info, family: Family, identity: Identity) -> str | None:
    """In what the two VAEs differ, both named; "" where they are the same; None where the endpoint does not say enough."""
    there = load_families().get(info.family)
    if there is not None and family.is_known and there.key != family.key:
        return f"{endpoint} has a VAE for {there.label}, and yours ({_here(identity)}) is for {family.label}"
    same = identity.matches(info.fingerprints)
    if same is False:
        rounding, name = identity.fingerprint() or ("", "unknown")
        theirs = info.fingerprints.get(rounding, "unknown")
        return (
            f"{endpoint} has another VAE ({info.model or 'of no name'}, fingerprint {theirs}) "
            f"than yours ({_here(identity)}, fingerprint {name})"
        )
    return "" if same else None


def _unsaid_difference(endpoint: str, same: bool | None, op: Op, family: Family, identity: Identity) -> str:
    """As above for an endpoint that does not say; ``same`` is what a sample told."""
    if same is False:
        made = "pictures of the same latents" if op == "decode" else "latents of the same picture"
        return f"{endpoint} makes other {made} than your VAE ({_here(identity)})"
    if same is None and identity.picked and not family.is_standard_file(identity.picked):
        usual = f"not the standard VAE of {family.label}" if family.is_known else "of no known family"
        return f"{endpoint} does not tell whether it has your VAE, and {identity.picked} is {usual}"
    return ""


def _here(identity: Identity) -> str:
    return identity.picked or "the model's own VAE"
