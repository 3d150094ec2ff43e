"""``remote-vae plan``: how many cards so many UIs need, how wide a line, and how long they wait for each other."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from remote_vae.errors import SettingsError
from remote_vae.tools.costs import call_bytes, cards, seconds_of
from remote_vae.tools.simulation import Load, Outcome, Servers, simulate
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import Family, find_family, load_families

# What a server refuses, to be asked again later or done where it was asked.
REFUSED_AFTER = 15.0
# More than this share of a line's bits is never pictures.
_OF_A_LINE = 0.9
_MOST_UIS = 100_000
# So many lines of the table stand on each side of what is needed.
_BESIDE = 2
# Simulated of each number of cards.
_CALLS = 30_000
_GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Question:
    """What is to be planned for.

    Attributes:
        load: who asks for how much.
        seconds: of the calls on one card.
        line: of all servers together, in bytes a second each way; 0 for one that is never full.
        wait: seconds within which 95 of 100 calls are to get their turn.
    """

    load: Load
    seconds: Sequence[float]
    line: float
    wait: float


@dataclass(frozen=True)
class Row:
    """What so many cards make of it."""

    cards: int
    outcome: Outcome


def plan(question: Question, seed: int = 0) -> tuple[int, list[Row]]:
    """How many cards are needed, and what some fewer and some more make of it.

    Raises:
        SettingsError: the line is too narrow for any number of cards.
    """
    load = question.load
    widest = load.rate * max(load.bytes_up, load.bytes_down)
    if question.line and widest > _OF_A_LINE * question.line:
        raise SettingsError(
            f"{widest / _GIGABIT:.2g} Gbit/s of pictures do not go over a line of {question.line / _GIGABIT:.3g}: "
            "give a wider one with --line, or send less with --transfer compressed or jpg"
        )
    seen: dict[int, Outcome] = {}

    def outcome(count: int) -> Outcome:
        if count not in seen:
            servers = Servers(count, question.seconds, question.line)
            seen[count] = simulate(load, servers, max(_CALLS, 5 * load.uis), seed)
        return seen[count]

    mean = sum(question.seconds) / len(question.seconds)
    needed = max(1, math.ceil(0.9 * min(load.rate * mean, load.uis)))
    while outcome(needed).wait(0.95) > question.wait:
        if needed >= load.uis:
            raise SettingsError("with a card for each UI the line alone takes longer: give a wider one with --line")
        needed += 1
    while needed > 1 and outcome(needed - 1).wait(0.95) <= question.wait:
        needed -= 1
    around = range(max(1, needed - _BESIDE), needed + _BESIDE + 1)
    return needed, [Row(count, outcome(count)) for count in around]


# --- the command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``remote-vae plan``."""
    parser.add_argument("--uis", type=int, required=True, help="how many UIs share the servers")
    parser.add_argument("--every", type=float, default=20.0, help="seconds from one picture of a UI to its next (20)")
    parser.add_argument("--size", type=int, default=1024, help="side of a picture in pixels (1024)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time (1)")
    parser.add_argument("--encodes", type=float, default=0.0, help="share of the pictures with an encode first, 0 to 1 (0)")
    parser.add_argument("--family", default="sdxl", help=f"whose VAE: {', '.join(load_families())} (sdxl)")
    parser.add_argument("--card", default="RTX 4090", help=f"of which a time is published: {', '.join(cards('decode'))}")
    parser.add_argument("--seconds", type=float, help="that one picture was measured to take, instead of --card")
    parser.add_argument("--endpoint", default="", help="URL of a server to measure it on, instead of --card")
    parser.add_argument("--transfer", default="u8", help="how pixels cross the wire: u8, raw, compressed, png, jpg (u8)")
    parser.add_argument("--line", type=float, default=10.0, help="of all servers together, Gbit/s each way (10); 0: never full")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds that 95 of 100 calls may wait for their turn (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    _check(options)
    family, pixels = find_family(options.family), options.size**2 * options.batch
    seconds, source = _seconds(options, family)
    # An encode is a call of its own, which its picture waits for.
    calls = _kinds(options)
    sizes = {op: call_bytes(op, family, pixels, options.transfer) for op in _ops(options)}
    up, down = (sum(sizes[op][way] for op in calls) / len(calls) for way in (0, 1))
    load = Load(options.uis, options.every / (1.0 + options.encodes), up, down)
    question = Question(load, [seconds[op] for op in calls], options.line * _GIGABIT, options.wait)
    needed, rows = plan(question, options.seed)
    print("\n".join(_lines(options, family, question, source, needed, rows)))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises SettingsError."""
    bounds = {
        "uis": (1, _MOST_UIS), "every": (0.01, 1e6), "size": (64, 16384), "batch": (1, 64), "encodes": (0.0, 1.0),
        "line": (0.0, 1e4), "wait": (0.001, 600.0),
    }  # fmt: skip
    for name, (least, most) in bounds.items():
        if not least <= getattr(options, name) <= most:
            raise SettingsError(f"--{name} must be from {least:g} to {most:g}, not {getattr(options, name):g}")
    if options.seconds is not None and not 0.0 < options.seconds <= 3600.0:
        raise SettingsError(f"--seconds must be more than 0 and at most 3600, not {options.seconds:g}")


def _ops(options: argparse.Namespace) -> list[Op]:
    return ["decode", "encode"] if options.encodes else ["decode"]


def _kinds(options: argparse.Namespace) -> list[Op]:
    """Calls of each kind in their proportion, to the hundredth."""
    decodes: list[Op] = ["decode"] * 100
    encodes: list[Op] = ["encode"] * round(100 * options.encodes)
    return decodes + encodes if encodes else ["decode"]


def _seconds(options: argparse.Namespace, family: Family) -> tuple[dict[Op, float], str]:
    """Of each kind of call on one card, and where that is from."""
    pixels = options.size**2
    if options.seconds is not None:
        return dict.fromkeys(_ops(options), options.seconds * options.batch), "as given"
    if options.endpoint:
        from remote_vae.tools.asking import measured_seconds

        found = {op: measured_seconds(op, family, options.size, options.batch, options.endpoint) for op in _ops(options)}
        return found, f"measured at {options.endpoint}, the way there and back included"
    found = {op: seconds_of(op, family, options.card, pixels) * options.batch for op in _ops(options)}
    return found, f"published for {options.card}"


def _lines(
    options: argparse.Namespace, family: Family, question: Question, source: str, needed: int, rows: Sequence[Row]
) -> Iterator[str]:
    load, pictures = question.load, f"{options.batch} x " if options.batch > 1 else ""
    share = f", {options.encodes:.0%} of them with an encode before" if options.encodes else ""
    yield (
        f"{options.uis} UIs, each {pictures}{options.size} x {options.size} every {options.every:g} s{share}: "
        f"{load.rate:.3g} calls a second"
    )
    each = sum(question.seconds) / len(question.seconds)
    yield f"A call of {family.label} keeps a card for {each:.3g} s ({source})"
    yield ""
    over = f"over {REFUSED_AFTER:g} s"
    yield f"{'cards':>7}  {'at work':>7}  {'calls/s':>8}  {'waits: median':>13}  {'p95':>8}  {'p99':>8}  {over:>9}"
    for row in rows:
        mark, seen = "*" if row.cards == needed else "", row.outcome
        waits = (f"{seen.wait(of) * 1000:.0f} ms" for of in (0.5, 0.95, 0.99))
        median, most, nearly_all = waits
        refused = f"{seen.longer_than(REFUSED_AFTER):.1%}"
        yield (
            f"{mark:>2}{row.cards:>5}  {seen.utilisation:>7.0%}  {seen.rate:>8.3g}  {median:>13}  {most:>8}  {nearly_all:>8}  "
            f"{refused:>9}"
        )
    yield ""
    name = f" {options.card}" if options.seconds is None and not options.endpoint else ""
    yield (
        f"Needed: {needed}{name}, so that 95 of 100 calls wait at most {options.wait:g} s for their turn; one more lets a card "
        "fail, or be updated, unnoticed"
    )
    up, down = load.rate * load.bytes_up, load.rate * load.bytes_down
    line = f" of the line's {options.line:g}" if options.line else ""
    yield (
        f"Bandwidth ({options.transfer}): up {up / 1e6:.3g} MB/s ({up / _GIGABIT:.2g} Gbit/s), "
        f"down {down / 1e6:.3g} MB/s ({down / _GIGABIT:.2g} Gbit/s){line}"
    )
    yield f"Calls that would wait longer than {REFUSED_AFTER:g} s are refused, and made where they were asked"
