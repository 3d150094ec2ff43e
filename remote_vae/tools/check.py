"""``remote-vae check``: whether an endpoint is reached, what it has, how quick it is, and what to do next."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from remote_vae.call import User
from remote_vae.errors import (
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    NotOffered,
    RouteFailed,
)
from remote_vae.history import Record
from remote_vae.remote.client import Deadlines, beside, client_for, shown
from remote_vae.remote.endpoints import endpoint_for
from remote_vae.remote.reasons import advice_for
from remote_vae.settings import Settings
from remote_vae.tools.asking import family_of, info_at, made, sample, side_of
from remote_vae.tools.flags import add_options, settings_of
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import Family, find_family, load_families
from remote_vae.wire import DecodeRequest, EncodeRequest, Info, Output

# Sides of the picture that is asked for, and of the one that says how quick the line is.
_SIDE = 256
_LARGE_SIDE = 1024
# A server that takes longer than this for the small one (seconds) is not asked for the large one.
_QUICK = 1.0
# Bytes that went over so quickly (seconds) say nothing of the line but that it is not what is waited for.
_AT_ONCE = 0.002
_NOBODY_THERE = "is the server running there (remote-vae serve), is this its address, does its firewall let you through?"
_NO_ENDPOINT = "no endpoint is set; use --endpoint http://HOST:7870"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``remote-vae check``."""
    parser.add_argument("--family", help="whose VAE the endpoint has, where it does not say so itself (sd1)")
    parser.add_argument("--vae", help="a VAE of this machine (folder, file or Hugging Face id), to compare those there with")
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is found; 0 where both kinds of calls work, and the VAE of ``--vae`` is among those there."""
    settings, has_mine = settings_of(options), True
    url, public = endpoint_for("decode", find_family(options.family or "sd1"), settings)
    info = info_at(beside(url, "info"), settings) if url and not public else Info()
    # Why it says nothing of itself, where it does not, the calls will show.
    if isinstance(info, Info):
        for line in _vaes(info):
            print(line)
        if options.vae:
            line, has_mine = _compared(options.vae, options.family, info)
            print(line)
    outcomes = []
    for op in ("decode", "encode"):
        outcomes.append(_tried(op, options.family, settings))
        print(f"{op}: {outcomes[-1].text}")
    failures = [outcome.error for outcome in outcomes if outcome.error is not None]
    if not failures and all(outcome.seconds < _QUICK for outcome in outcomes):
        print(f"line: {_line(outcomes, settings)}")
    print(f"next: {_advice(failures, settings, has_mine=has_mine, compared=bool(options.vae))}")
    return 0 if has_mine and not failures else 1


# --- what is there -------------------------------------------------------------------------------------------------------


def _vaes(info: Info) -> Iterator[str]:
    for each in info.models:
        family = load_families().get(each.family)
        named = dict.fromkeys((each.name, family.label if family else each.family or "family not known yet", each.model))
        prints = [f"fingerprint {print_}" for print_ in list(each.fingerprints.values())[:1]]
        yield f"VAE: {', '.join([*filter(None, named), *prints, *([] if each.is_loaded else ['loaded when it is asked for'])])}"


def _compared(source: str, family: str | None, info: Info) -> tuple[str, bool]:
    """Whether the user's VAE is among those of the endpoint, in words."""
    from remote_vae.server.models import load_vae

    own = set(load_vae(source, family=family, device="cpu").fingerprints.values())
    same = [each for each in info.models or [info] if own & set(each.fingerprints.values())]
    if same:
        return f"yours: the same as {same[0].name or 'its own'}", True
    if any(not each.fingerprints for each in info.models or [info]):
        return "yours: not among those that are known; one that was never loaded may be it", True
    return f"yours: another one; your UI would make its pictures itself. Serve it: remote-vae serve --vae {source}", False


# --- whether it works ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """What came of one small call: the line that is printed, whose VAE made it in how many seconds, or the error."""

    op: Op
    text: str
    family: Family | None = None
    seconds: float = 0.0
    error: RouteFailed | None = None


def _tried(op: Op, named: str | None, settings: Settings) -> _Outcome:
    if not endpoint_for(op, find_family(named or "sd1"), settings)[0]:
        return _Outcome(op, _NO_ENDPOINT, error=NotOffered(_NO_ENDPOINT))
    records: list[Record] = []
    try:
        family = family_of(op, named, settings, otherwise="sd1")
        made(op, sample(op, family, _SIDE), family, settings, User(recorded=records.append))
    except RouteFailed as error:
        return _Outcome(op, f"failed: {error}", error=error)
    side = side_of(family, _SIDE)
    text = f"works, {family.label}, {side} x {side}{''.join(map(_cost, records))}"
    return _Outcome(op, text, family, sum(record.ms for record in records) / 1000)


def _cost(record: Record) -> str:
    moved, there = record.bytes_up + record.bytes_down, record.vae_ms
    vae = f" ({there:.0f} in the VAE, {moved / max(record.ms - there, 0.1) / 1e3:.1f} MB/s on the way)" if there else ""
    return f", {record.ms:.0f} ms{vae}, {record.bytes_up} bytes up, {record.bytes_down} down"


def _line(outcomes: Sequence[_Outcome], settings: Settings) -> str:
    """How quick the way is, by a picture that goes as raw values."""
    rates = []
    for outcome in outcomes:
        if outcome.family is not None:
            with suppress(RouteFailed):
                rates.append(_rate(outcome.op, outcome.family, settings))
    return ", ".join(filter(None, rates)) or "not measured"


def _rate(op: Op, family: Family, settings: Settings) -> str:
    url, public = endpoint_for(op, family, settings)
    client, deadlines = client_for(url, public=public), Deadlines.of(settings, _LARGE_SIDE**2)
    tensor = sample(op, family, _LARGE_SIDE)
    if op == "decode":
        down = client.decode(DecodeRequest(tensor, Output.TENSOR, family=family.known_key), deadlines)
        return _per_second("down", down.bytes_down, down.seconds_down)
    up = client.encode(EncodeRequest(tensor, family=family.known_key), deadlines)
    # What the server says of it: what the system here has taken over is not over the line yet.
    return _per_second("up", up.bytes_up, up.stages["read"]) if "read" in up.stages else ""


def _per_second(way: str, nbytes: int, seconds: float) -> str:
    if seconds < _AT_ONCE:
        return f"{way} {nbytes / 1e6:.1f} MB at once"
    return f"{way} {nbytes / seconds / 1e6:.0f} MB/s"


# --- what to do next -----------------------------------------------------------------------------------------------------


def _advice(failures: Sequence[RouteFailed], settings: Settings, *, has_mine: bool, compared: bool) -> str:
    if failures:
        return next(_for_failures(failures, settings.endpoint or settings.decode_endpoint or settings.encode_endpoint))
    if not has_mine:
        return "serve the VAE that your UI uses: what another one makes is not taken"
    where = (
        f"enter {shown(settings.endpoint)} as Endpoint in your UI"
        if settings.endpoint
        else "your UI can use it as it is set here"
    )
    return where if compared else f"{where}; --vae YOUR-CHECKPOINT compares the VAE there with yours"


def _for_failures(failures: Sequence[RouteFailed], url: str) -> Iterator[str]:
    for error in failures:
        if isinstance(error, EndpointError) and error.status in (401, 403):
            yield "it wants a token: set REMOTE_VAE_TOKEN to the server's here"
        if isinstance(error, EndpointUnreachable):
            yield advice_for(error.reason, url) or _NOBODY_THERE
        if isinstance(error, (DeadlineExceeded, EndpointError)) and getattr(error, "status", 503) in (502, 503, 504):
            yield "it is starting, or busy: try again in a minute"
    yield _NO_ENDPOINT if str(failures[0]) == _NO_ENDPOINT else "look at what the server prints"
