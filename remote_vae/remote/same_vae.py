"""Whether an endpoint has the VAE of a call: the same, another one, or unknown. The question is asked here and nowhere else.

The means, the cheapest first: what the endpoint says of itself (``GET /info``: its family, the fingerprints of its weights); a
small test picture, made here and not the user's, that both sides encode or decode; for a public endpoint, whose VAE
families.toml names, the name of the file that the user picked. What none of them confirms is unknown, and unknown is not yet
yes: the call stays on this machine, and the endpoint is asked again soon.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from remote_vae.call import Answer, T, VaeCall
from remote_vae.errors import (
    AnotherVae,
    CallCancelled,
    EndpointError,
    MalformedAnswer,
    NotOffered,
    RouteFailed,
    VaeNotConfirmed,
)
from remote_vae.remote.client import POLL_SECONDS, Deadlines, beside, client_for, shown
from remote_vae.remote.comparison import Cancelled, Comparison, made_here
from remote_vae.settings import Settings, load_options
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import load_families
from remote_vae.vae.fingerprint import ByWeights, fingerprint_of, match_among, matches
from remote_vae.wire import THIS_PROCESS, Info

log = logging.getLogger("remote_vae")

# Seconds; after that, an endpoint that was started anew with another VAE is noticed by what it says, or by the test picture.
INFO_SECONDS = 60.0
KEPT_SECONDS = 600.0
# An endpoint that gave no answer is asked again after 2 s, 4 s, 8 s ... and at the latest after so many.
LONGEST_PAUSE = 300.0

Ask = Callable[[torch.Tensor], Answer]


@dataclass(frozen=True)
class Verdict:
    """What was found out.

    Attributes:
        is_same: False: it has another VAE; None: that is not known.
        why: in what the two differ, both named; or why it is not known.
        reason: the same in short, for the record.
        about: what it was found out about: the endpoint, or one kind of call to it.
    """

    is_same: bool | None
    why: str = ""
    reason: str = ""
    about: str = ""


@dataclass
class _Known:
    """What was found out about one VAE while its weights are what they are."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    picture: Comparison | None = None
    # By kind of call and URL: the verdict, until when it counts, and how often in a row nothing could be found out.
    verdicts: dict[tuple[Op, str], tuple[Verdict, float, int]] = field(default_factory=dict)


class SameVae:
    """Compares VAEs with those of endpoints, and remembers for a while what came of it. May be used from many threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._infos: dict[str, tuple[Info, float]] = {}
        self._known = ByWeights(_Known)
        self._said: dict[str, str] = {}

    def admit(self, call: VaeCall[T], url: str, settings: Settings, ask: Ask, *, public: bool = False) -> str:
        """Return if the call may go to ``url``, with what the record has to say of the VAE there; "" for the same.

        Args:
            ask: has the endpoint answer another tensor in the place of the call's.
            public: whether it is an endpoint of families.toml.

        Raises:
            AnotherVae, VaeNotConfirmed: the endpoint has another VAE, or it is not known which; the settings keep such calls on
                this machine. NotOffered: it is this UI itself. RouteFailed: it did not answer.
        """
        if call.vae.module is None:
            # Only the command line has none at hand, and its user has named the endpoint for this very call.
            return ""
        try:
            found = self.verdict(call, url, Deadlines.of(settings).quick, ask, public=public)
        except EndpointError:
            # What it makes of the call itself may be another matter.
            if settings.when_vae_differs == "remote":
                return "VAE not confirmed"
            raise
        if found.is_same:
            self._is_news(found.about, "")
            return ""
        label = load_options()["when_vae_differs"].label
        is_news = self._is_news(found.about, f"{settings.when_vae_differs} {found.why}")
        if settings.when_vae_differs == "remote":
            if is_news:
                log.warning("%s; its pictures are taken all the same, as %r is set to remote", found.why, label)
            return "VAE not confirmed" if found.is_same is None else "another VAE"
        does_it = f"{found.why}. So this machine does it, with your VAE"
        if found.is_same is None:
            message = f"{does_it}; the endpoint is asked again soon. To take its pictures all the same, set {label!r} to remote"
            raise VaeNotConfirmed(message, reason=found.reason, was_said=not is_news)
        advice = "Run a server that has your VAE"
        message = f"{does_it}. {advice}, or set {label!r} to remote to take the endpoint's pictures"
        raise AnotherVae(message, reason=found.reason, was_said=not is_news)

    def verdict(self, call: VaeCall[T], url: str, deadlines: Deadlines, ask: Ask, *, public: bool = False) -> Verdict:
        """Whether the endpoint at ``url`` has the VAE of ``call``. Raises as ``admit`` does where it was not answered."""
        cancelled = call.user.cancelled
        endpoint = shown(beside(url, "info")).removesuffix("/info")
        info = None if public else self.info(url, deadlines, cancelled)
        if info is not None and info.process == THIS_PROCESS:
            # It would wait for the end of the generation that waits for it.
            raise NotOffered(f"{endpoint} is this UI itself: enter another machine's address", reason="the endpoint is this UI")
        said = _by_what_it_says(endpoint, of_several(info or Info(), call.vae), call.vae)
        if said is not None:
            return said
        found = self._by_test_picture(call, url, endpoint, ask, is_silent=info is not None)
        if found.is_same is None and public and call.vae.family.is_standard_file(call.vae.picked):
            return Verdict(True, about=found.about)
        return found

    def info(self, url: str, deadlines: Deadlines, cancelled: Cancelled) -> Info | None:
        """What the endpoint at ``url`` says of itself: nothing at all, if it answers so; None if it may say more next time.

        Raises:
            EndpointUnreachable, DeadlineExceeded, CallCancelled: it did not answer; a call would not be answered either.
        """
        where = beside(url, "info")
        with self._lock:
            info, until = self._infos.get(where, (Info(), -math.inf))
        if self._clock() < until:
            return info
        try:
            info = client_for(where).info(deadlines, cancelled)
        except EndpointError as error:
            # A server that is busy, or one that has not been given its token yet, may say more next time.
            if error.status >= 500 or error.status in (401, 429):
                return None
            info = Info()
        except MalformedAnswer:
            info = Info()
        with self._lock:
            self._infos[where] = info, self._clock() + INFO_SECONDS
        return info

    def there(self, call: VaeCall[T], url: str, settings: Settings, *, public: bool = False) -> Info:
        """What the endpoint at ``url`` says of the VAE that ``call`` is for; nothing at all where it says nothing.

        Raises:
            CallCancelled: the user would not wait for that.
        """
        if public:
            return Info()
        if call.vae.module is None and len(call.tensor) == 1:
            # Who has none at hand asks nothing more than the call; of a batch, how much of it may come at once.
            with self._lock:
                known = self._infos.get(beside(url, "info"), (Info(), 0.0))[0]
            return of_several(known, call.vae)
        try:
            info = self.info(url, Deadlines.of(settings).quick, call.user.cancelled)
        except CallCancelled:
            raise
        except RouteFailed:
            # The call itself will be answered so.
            info = None
        return of_several(info or Info(), call.vae)

    def forget(self, url: str) -> None:
        """The endpoint at ``url`` failed; it may come back as another one."""
        with self._lock:
            self._infos.pop(beside(url, "info"), None)
        for known in self._known.all():
            for op in ("decode", "encode"):
                known.verdicts.pop((op, url), None)

    def _by_test_picture(self, call: VaeCall[T], url: str, endpoint: str, ask: Ask, *, is_silent: bool) -> Verdict:
        # A decoder may be another one where the encoder is the same.
        about = f"{call.op} {endpoint}"
        try:
            known = self._known.of(call.vae.module)
        except Exception as error:  # whatever a host keeps there
            return _unknown(about, endpoint, f"your VAE's weights cannot be read here: {error}")
        found, until, failures = known.verdicts.get((call.op, url), (None, -math.inf, 0))
        if found is None or self._clock() >= until:
            found = self._compared(known, call, endpoint, about, ask, is_silent=is_silent)
            failures = failures + 1 if found.is_same is None else 0
            kept = min(2.0**failures, LONGEST_PAUSE) if failures else KEPT_SECONDS
            known.verdicts[call.op, url] = found, self._clock() + kept, failures
        return found

    def _compared(self, known: _Known, call: VaeCall[T], endpoint: str, about: str, ask: Ask, *, is_silent: bool) -> Verdict:
        try:
            picture = self._picture(known, call.vae, call.user.cancelled)
        except CallCancelled:
            raise
        except Exception as error:  # whatever VAE that is
            return _unknown(about, endpoint, f"your VAE cannot make a test picture here: {error}")
        try:
            if picture.agrees(ask(picture.mean if call.op == "decode" else picture.pixels)):
                return Verdict(True, about=about)
        except (EndpointError, MalformedAnswer) as error:
            if isinstance(error, EndpointError) and _is_failure(error, is_silent=is_silent):
                raise
            # It may be starting or busy, or not take so small a picture.
            said = f": {error.detail}" if isinstance(error, EndpointError) and error.is_of_the_server else ""
            return _unknown(about, endpoint, error.reason, said)
        except RouteFailed:
            raise
        except Exception as error:
            return _unknown(about, endpoint, f"its answer to the test picture cannot be compared: {error}")
        made = "pictures of the same latents" if call.op == "decode" else "latents of the same picture"
        why = f"{endpoint} makes other {made} than your VAE ({_name(call.vae)})"
        return Verdict(False, why, "another VAE there", about)

    def _picture(self, known: _Known, vae: VaeAtWork, cancelled: Cancelled) -> Comparison:
        while not known.lock.acquire(timeout=POLL_SECONDS):
            if cancelled():
                raise CallCancelled("interrupted while waiting for the test picture", reason="interrupted")
        try:
            if known.picture is None:
                made = made_here(vae, cancelled)
                self._known.ensure_unchanged(vae.module, known)
                known.picture = made
            return known.picture
        finally:
            known.lock.release()

    def _is_news(self, about: str, text: str) -> bool:
        """Whether ``text`` is not the last that was said of ``about``."""
        with self._lock:
            before, self._said[about] = self._said.get(about, ""), text
            return before != text


def of_several(info: Info, vae: VaeAtWork) -> Info:
    """What is said of that one of the endpoint's VAEs which calls of ``vae`` are for.

    The same one; else one that may be the same, as it was never loaded, those of the family first; else the first of the
    family; else the first.
    """
    if len(info.models) < 2:
        return info
    family = [each for each in info.models if each.family == vae.family.key]
    likely = [*family, *(each for each in info.models if each not in family)]
    index = None if vae.module is None else match_among(vae.module, [each.fingerprints for each in likely])
    if index is not None:
        return likely[index]
    open_ones = [each for each in family if not each.fingerprints] + [each for each in info.models if not each.family]
    return next(iter([*open_ones, *likely]))


def _by_what_it_says(endpoint: str, info: Info, vae: VaeAtWork) -> Verdict | None:
    """None where the endpoint does not say enough."""
    if any(getattr(layer, "padding_mode", "") == "circular" for layer in vae.module.modules()):
        # The weights do not show it.
        why = f"your VAE makes seamless pictures (Tiling is on), and {endpoint} does not"
        return Verdict(False, why, "Tiling is on", endpoint)
    there = load_families().get(info.family)
    if there is not None and vae.family.is_known and there.key != vae.family.key:
        why = f"{endpoint} has a VAE for {there.label}, and yours ({_name(vae)}) is for {vae.family.label}"
        return Verdict(False, why, "another VAE there", endpoint)
    is_same = matches(vae.module, info.fingerprints)
    if is_same is None:
        return None
    if is_same:
        return Verdict(True, about=endpoint)
    rounding, name = fingerprint_of(vae.module) or ("", "unknown")
    theirs = f"{info.model or 'of no name'}, fingerprint {info.fingerprints.get(rounding, 'unknown')}"
    why = f"{endpoint} has another VAE ({theirs}) than yours ({_name(vae)}, fingerprint {name})"
    return Verdict(False, why, "another VAE there", endpoint)


def _is_failure(error: EndpointError, *, is_silent: bool) -> bool:
    """Whether ``error`` is what a call would be answered, too; not from an endpoint that has only said nothing of its VAE."""
    if error.status in (401, 403, 409):
        return True
    return not is_silent and (error.status >= 500 or error.status in (404, 429))


def _unknown(about: str, endpoint: str, cause: str, said: str = "") -> Verdict:
    """``said``: what the endpoint said of it, which is not for the record."""
    why = f"{endpoint} does not say which VAE it has, and the test picture did not tell ({cause}{said})"
    return Verdict(None, why, f"the endpoint does not say which VAE it has yet, {cause}", about)


def _name(vae: VaeAtWork) -> str:
    return vae.picked or "the model's own VAE"
