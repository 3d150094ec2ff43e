"""Whether an endpoint works, in plain words: for a button that the user presses, and for the line of state beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import torch

from remote_vae.call import Answer, Outcome, VaeCall, never
from remote_vae.errors import (
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    MalformedAnswer,
    NotOffered,
    RouteFailed,
    SettingsError,
)
from remote_vae.history import Record
from remote_vae.remote.client import Deadlines, beside, client_for, shown
from remote_vae.remote.endpoints import endpoint_for
from remote_vae.remote.reasons import advice_for
from remote_vae.remote.route import RemoteRoute
from remote_vae.remote.same_vae import SameVae, of_several
from remote_vae.settings import Settings
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import Family, find_family, load_families
from remote_vae.vae.fingerprint import matches
from remote_vae.wire import THIS_PROCESS, Info

# Cells of a side of the latents that the trial sends.
_CELLS = 16


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        is_good: whether pictures will be made by the endpoint.
        verdict: in a sentence or two, with what to do next.
    """

    is_good: bool
    verdict: str


def family_said(info: Info) -> Family | None:
    """The family of an endpoint's VAE by what it says; None: it does not say."""
    return load_families().get(info.family, info.vae)


def family_there(settings: Settings) -> Family:
    """The family of the VAE that the endpoint of ``settings`` has.

    Raises:
        SettingsError: none is set, or it does not say. RouteFailed: it does not answer.
    """
    # For the user's own endpoint any family will do.
    url, _ = endpoint_for("decode", find_family("sd1"), replace(settings, public_endpoints=False))
    if not url:
        raise SettingsError("no endpoint is set: Settings, Remote VAE, Endpoint")
    try:
        info = client_for(beside(url, "info")).info(Deadlines.of(settings).quick)
    except (EndpointError, MalformedAnswer):
        info = Info()
    if len({each.family for each in info.models}) > 1:
        names = ", ".join(each.name for each in info.models)
        raise SettingsError(f"{shown(url)} has several VAEs ({names}); choose the family, or put a name behind the address")
    found = family_said(info)
    if found is None:
        raise SettingsError(f"{shown(url)} does not say which VAE it has; choose the family")
    return found


def state(settings: Settings, last: Record | None, on: str = "") -> str:
    """One line: "off", "on: studio:7870, last call 1.1 s", "on, but ...: pictures are made here".

    Args:
        last: of the last call that was to be remote; None: there was none.
        on: what else than the settings switches it on, in words.
    """
    if not settings.enabled and not on:
        return "off"
    on = "on" if settings.enabled else on
    url, _ = endpoint_for("decode", find_family("sd1"), settings)
    if not url:
        return f"{on}, but {settings.no_endpoint('decode') or 'no endpoint is set for a decode'}: pictures are made here"
    name = urlsplit(url).netloc
    set_here = {
        urlsplit(each).netloc for each in (settings.endpoint, settings.decode_endpoint, settings.encode_endpoint) if each
    }
    # What another endpoint did before the setting was changed says nothing of this one.
    if last is None or (last.endpoint and set_here and urlsplit(last.endpoint).netloc not in set_here):
        return f"{on}: {name}, not asked yet"
    if last.route != "remote":
        return (
            f"{on}, but {last.fallback_reason or 'the settings keep this call here'} ({name}): the last picture was made here"
        )
    notes = [note for note in ("another VAE", "VAE not confirmed") if note in last.detail]
    return f"{on}: {name}, {''.join(notes) or 'same VAE'}, last call {last.ms / 1000:.1f} s"


def try_out(settings: Settings, vae: VaeAtWork | None) -> Trial:
    """Ask the endpoint of ``settings`` who it is, and for one small picture.

    Args:
        vae: the one that is loaded here, of which only the weights are read; None: none is.
    """
    family = vae.family if vae else find_family("sd1")
    url, public = endpoint_for("decode", family, settings)
    if not url:
        why = settings.no_endpoint("decode") or "no endpoint is set for a decode"
        return Trial(False, f"{why}: enter the address of your server as Endpoint.")
    name = urlsplit(url).netloc
    same_vae = SameVae()
    try:
        info = Info() if public else _info(url, settings, same_vae)
        if vae is not None:
            info = of_several(info, vae)
        there = family_said(info) or family
        outcome, milliseconds = _measured(settings, there, same_vae)
    except RouteFailed as error:
        return Trial(False, f"{name} does not work: {error.reason}. {_advice(error, url)}")
    took = f"{milliseconds:.0f} ms there and back for {_CELLS * there.downscale} px"
    if outcome.vae_ms:
        took = f"{took}, {outcome.vae_ms:.0f} of them in the VAE"
    return _compared(f"{name} answers: {info.model or there.label}, {took}.", info, vae, settings)


def _info(url: str, settings: Settings, same_vae: SameVae) -> Info:
    """Nothing at all of a plain endpoint; what else may be wrong, the picture will tell."""
    info = same_vae.info(url, Deadlines.of(settings).quick, never) or Info()
    if info.process == THIS_PROCESS:
        raise NotOffered("the endpoint is this UI itself", reason="it is this UI itself")
    return info


def _measured(settings: Settings, family: Family, same_vae: SameVae) -> tuple[Outcome[Answer], float]:
    """A picture that nobody wants, and milliseconds for it."""
    frames = (1,) if family.video else ()
    shape = (1, family.latent_channels, *frames, _CELLS, _CELLS)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def adopt(answer: Answer) -> Answer:
        return answer

    started = time.perf_counter()
    outcome = RemoteRoute(same_vae=same_vae).run(VaeCall("decode", latents, VaeAtWork(None, family), adopt), settings)
    return outcome, (time.perf_counter() - started) * 1000.0


def _compared(reached: str, info: Info, vae: VaeAtWork | None, settings: Settings) -> Trial:
    if vae is None or vae.module is None:
        return Trial(True, f"{reached} No VAE has been used here yet, so the two are compared with your first picture.")
    try:
        is_same = matches(vae.module, info.fingerprints)
    except Exception:  # whatever a host keeps there
        is_same = None
    if is_same:
        return Trial(True, f"{reached} It is the VAE that was used here last: all is well.")
    if is_same is None:
        return Trial(True, f"{reached} It does not say which VAE it has, so the two are compared with your next picture.")
    differs = f"{reached} It is another VAE than the one used here last"
    if settings.when_vae_differs == "remote":
        return Trial(True, f"{differs}; you have chosen to take its pictures all the same.")
    return Trial(False, f"{differs}, so pictures are made here. Serve yours there: the commands stand on this page.")


def _advice(error: RouteFailed, url: str) -> str:
    if isinstance(error, EndpointUnreachable):
        if known := advice_for(error.reason, url):
            return f"{known[0].upper()}{known[1:]}."
        return f"Is the server running there, is {urlsplit(url).netloc} its address, and does its firewall let it through?"
    if isinstance(error, DeadlineExceeded):
        return "It may be starting, or busy: try again in a minute."
    if isinstance(error, EndpointError) and error.status in (401, 403):
        return "It wants a token: set REMOTE_VAE_TOKEN to the same value on both machines, and start both again."
    return "Look at what the server prints."
