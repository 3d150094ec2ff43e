"""One card, within six minutes: the exact tiled VAE against the whole one and against other tilings, and cards made small.

    python -m bench.gpu [--seconds 330] [--out FOLDER] [--only counts,whole,small,...]

It needs torch, diffusers and this checkout. Writes ``gpu.md`` and ``gpu.json`` to FOLDER after each row, so that what is known
stays if it is ended. When the time is up, it says what was left out. On a processor it counts operations as on a card, and runs
everything else with small sizes; no time of that is worth anything.

The VAE is the architecture of Stable Diffusion's with random weights, on a processor a narrow one. Times are medians of up to
five calls after one that is not counted; memory is how far the allocator's peak rises; "x" is the ratio to the whole VAE.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import card
from bench.card import DEVICE, GB, IS_CARD, Case, Measured
from bench.vaes import NARROW, SD, random_vae
from remote_vae.hosts.room import Room
from remote_vae.local.estimate import Need, whole_need
from remote_vae.local.memory import available_memory
from remote_vae.settings import Settings
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.vae.at_work import Op, whole_diffusers

OPS: tuple[Op, ...] = ("decode", "encode")
SHARES = (None, 0.30, 0.10)
# How long the calls of one measurement may take, and when one is given up.
ROW_SECONDS, MOST_SECONDS = 1.5, 25.0
ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured: the first ones are worth the most."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    sides: tuple[int, ...] = (1024, 2048, 512)
    # Pixels and GB free.
    small: tuple[tuple[int, float], ...] = (
        (2048, 2),
        (1024, 1),
        (4096, 4),
        (1024, 2),
        (2048, 4),
        (2048, 1),
        (4096, 6),
        (4096, 2),
    )
    counted: int = 1024
    room: int = 2048

    @classmethod
    def of_a_processor(cls) -> Sizes:
        """A few seconds each; float16 has no instructions on most."""
        return cls((torch.float32, torch.bfloat16), (128, 64), ((128, 0.004), (128, 0.001)))


class TimeIsUp(Exception):
    """No further row is begun."""


@dataclass
class Bench:
    """Rows as they come, and the time that is left.

    Attributes:
        ends: when no further row is begun (``time.perf_counter``).
        vae: what is called; in float32 on the processor.
        wholes: the whole VAE's calls, which the others are compared with.
    """

    vae: Any
    sizes: Sizes
    folder: Path
    ends: float
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wholes: dict[str, Measured] = field(default_factory=dict)
    _there: Any = None

    def add(self, part: str, what: str, **values: Any) -> None:
        """One more row, shown and written at once."""
        row = {"part": part, "what": what, **{key: _plain(value) for key, value in values.items()}}
        self.rows.append(row)
        print(_line(row), flush=True)
        self.write()

    def write(self) -> None:
        """The table and JSON of what there is so far."""
        everything = {**self.about, "rows": self.rows, "left_out": self.left_out}
        (self.folder / "gpu.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
        (self.folder / "gpu.md").write_text(_markdown(everything), encoding="utf-8")

    def check(self) -> None:
        """Raises TimeIsUp."""
        if time.perf_counter() > self.ends:
            raise TimeIsUp

    def deadline(self) -> float:
        """When the call that begins now is given up."""
        return time.perf_counter() + MOST_SECONDS

    def in_dtype(self, dtype: torch.dtype) -> Any:
        """The VAE on the device, in ``dtype``: one at a time, each of the same weights."""
        if self._there is None or self._there.dtype != dtype:
            self._there = None
            self._there = copy.deepcopy(self.vae).to(DEVICE, dtype)
        return self._there

    def whole(self, case: Case) -> Measured:
        """The whole VAE's call, measured once."""
        if str(case) not in self.wholes:
            vae = self.in_dtype(case.dtype)
            self.wholes[str(case)] = card.measure(partial(card.whole, vae, case), seconds=ROW_SECONDS)
        return self.wholes[str(case)]

    def seconds_of_whole(self, case: Case) -> float:
        """Of the call itself, or by pixels of a smaller one where the card has no room for it."""
        own = self.whole(case).seconds
        if not math.isnan(own):
            return own
        known = [(side, self.wholes.get(str(Case(case.op, side, case.dtype)))) for side in self.sizes.sides]
        side, largest = max(((side, each.seconds) for side, each in known if each and not each.failure), default=(1, math.nan))
        return largest * (case.side / side) ** 2

    def compared(self, case: Case, measured: Measured) -> dict[str, Any]:
        """What a row says of ``measured``."""
        base = self.whole(case)
        return {
            "ms": 1000 * measured.seconds,
            "x time": measured.seconds / self.seconds_of_whole(case),
            "first ms": 1000 * measured.first,
            "MB": measured.allocated / 1e6,
            "x memory": measured.allocated / base.allocated,
            "dB": card.nearness(measured.result, base.result, case.op),
            "by": measured.made_by,
            "failure": measured.failure,
        }


def need_of(vae: Any, case: Case) -> Need:
    plan = (decoder_plan if case.op == "decode" else encoder_plan)(vae)
    return whole_need(case.op, plan, torch.Size(case.shape), case.dtype, DEVICE)


# --- the parts --------------------------------------------------------------------------------------------------------------


def counts(bench: Bench) -> Iterator[None]:
    """Operations and synchronisations with the settings of a card, counted without values, and so on every machine alike."""
    # Here, as it needs what Windows does not have.
    from bench.operations import Operations, counted, without_values

    side = bench.sizes.counted
    for op in OPS:
        with torch.no_grad(), without_values():
            vae, batch = random_vae(SD, card.TILE), torch.empty(Case(op, side, torch.float32).shape)
            with Operations() as of_the_whole:
                whole_diffusers(vae, op, batch)
        bench.add("counts", f"{op} {side} whole", **_as_counted(of_the_whole))
        yield
        for share in SHARES:
            name = f"{op} {side} exact{'' if share is None else f' in {share:.0%}'}"
            bench.add("counts", name, **_as_counted(counted(op, side, share)))
            yield


def _as_counted(count: Any) -> dict[str, Any]:
    return {
        "operations": count.operations,
        "with views": count.dispatched,
        "synchronisations": count.synchronisations,
        "to store MB": count.to_store / 1e6,
        "from store MB": count.from_store / 1e6,
    }


def rows(bench: Bench) -> Iterator[None]:
    """Every way to make a call, in memory enough."""
    for side in bench.sizes.sides:
        for dtype in bench.sizes.dtypes:
            for op in OPS:
                case = Case(op, side, dtype)
                _estimate_row(bench, case)
                yield
                for name, way in _ways(bench, case):
                    bench.add("rows", f"{case} {name}", **bench.compared(case, card.measure(way, seconds=ROW_SECONDS)))
                    yield


def _estimate_row(bench: Bench, case: Case) -> None:
    """The whole VAE, and how true the estimate of it is."""
    whole, need = bench.whole(case), need_of(bench.in_dtype(case.dtype), case)
    bench.add(
        "rows",
        f"{case} whole",
        ms=1000 * whole.seconds,
        MB=whole.allocated / 1e6,
        failure=whole.failure,
        **{
            "reserved MB": whole.reserved / 1e6,
            "least MB": need.least / 1e6,
            "likely MB": need.likely / 1e6,
            "likely x reserved": need.likely / whole.reserved,
        },
    )


def _ways(bench: Bench, case: Case) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    vae, taken = bench.in_dtype(case.dtype), bench.whole(case).allocated
    alive = need_of(vae, case).counted if math.isnan(taken) else int(taken)
    for share in SHARES:
        limit = None if share is None else int(share * alive)
        name = "exact" if share is None else f"exact in {share:.0%}"
        yield name, lambda limit=limit: card.exact(vae, case, limit, bench.deadline())  # type: ignore[misc]
    yield "diffusers tiling", partial(card.diffusers_tiling, vae, case)
    yield "three passes", partial(card.three_passes, vae, case)


def small(bench: Bench) -> Iterator[None]:
    """What the product makes of it on a small card: something else has the rest, or this process may take no more."""
    for dtype in bench.sizes.dtypes:
        for side, gigabytes in bench.sizes.small:
            for op in OPS:
                case = Case(op, side, dtype)
                bench.whole(case)
                for name, made_small in _small_cards(first=dtype == bench.sizes.dtypes[0]):
                    measured = _answered(bench, case, made_small(int(gigabytes * GB)))
                    bench.add("small", f"{case} in {gigabytes:g} GB by {name}", **bench.compared(case, measured))
                    yield


def _small_cards(*, first: bool) -> list[tuple[str, Callable[[int], AbstractContextManager[None]]]]:
    if not IS_CARD:
        return [("word", card.told)]
    ways: list[tuple[str, Callable[[int], AbstractContextManager[None]]]] = [("ballast", card.ballast)]
    return [*ways, ("fraction", card.fraction)] if first else ways


def _answered(
    bench: Bench, case: Case, made_small: AbstractContextManager[None], settings: Settings | None = None, **more: Any
) -> Measured:
    vae, made_by = bench.in_dtype(case.dtype), ""

    def call() -> torch.Tensor:
        nonlocal made_by
        made, made_by = card.answered(vae, case, bench.deadline(), settings or Settings(), **more)
        return made

    with made_small:
        measured = card.measure(call, seconds=ROW_SECONDS, most=3)
    measured.made_by = made_by
    return measured


def room(bench: Bench) -> Iterator[None]:
    """A model of the host makes room for the whole VAE, and comes back; the same where it may not."""
    if not IS_CARD:
        return
    case = Case("decode", bench.sizes.room, bench.sizes.dtypes[0])
    need = need_of(bench.in_dtype(case.dtype), case)
    bench.whole(case)
    size = need.likely // 2
    unet = torch.nn.Linear(1 << 14, size >> 15, bias=False, device=DEVICE, dtype=torch.float16)
    for setting in ("auto", "off"):
        made = Room(lambda: [unet], lambda: DEVICE)

        def with_room(made: Room = made, setting: str = setting) -> Measured:
            def make(wanted: int, least: int) -> int:
                return made.make(wanted, least)

            try:
                return _answered(
                    bench, case, card.fraction(need.likely - size // 2), Settings(make_room=setting), make_room=make
                )
            finally:
                made.restore()

        bench.add("room", f"{case}, a model of {size / GB:.1f} GB, {setting}", **bench.compared(case, with_room()))
        yield


def elsewhere(bench: Bench) -> Iterator[None]:
    """On another device by choice."""
    others = [f"cuda:{index}" for index in range(1, torch.cuda.device_count())] if IS_CARD else []
    for device in [*others, *(["cpu"] if IS_CARD else [])]:
        for op in OPS:
            case = Case(op, 512, bench.sizes.dtypes[0])
            measured = _answered(bench, case, card.told(1 << 50), Settings(local_device=device))
            bench.add("elsewhere", f"{case} on {device}", **bench.compared(case, measured))
            yield


def switches(bench: Bench) -> Iterator[None]:
    """What else is said to make the whole VAE quicker."""
    if not IS_CARD:
        return
    case = Case("decode", bench.sizes.sides[0], bench.sizes.dtypes[0])
    vae = bench.in_dtype(case.dtype)
    bench.whole(case)
    before = torch.backends.cudnn.benchmark
    for name in ("cudnn.benchmark", "channels_last"):
        torch.backends.cudnn.benchmark = name == "cudnn.benchmark"
        vae.to(memory_format=torch.channels_last if name == "channels_last" else torch.contiguous_format)
        measured = card.measure(partial(card.whole, vae, case), seconds=ROW_SECONDS)
        bench.add("switches", f"{case} whole, {name}", **bench.compared(case, measured))
        yield
    torch.backends.cudnn.benchmark = before
    vae.to(memory_format=torch.contiguous_format)


PARTS: dict[str, Callable[[Bench], Iterator[None]]] = {
    each.__name__: each for each in (counts, rows, small, room, elsewhere, switches)
}
# So much of the time that is left at its beginning may a part take: each has its turn.
PART_SHARES = {"counts": 0.25 if IS_CARD else 0.7, "rows": 0.55, "small": 0.8, "room": 0.5, "elsewhere": 0.6, "switches": 1.0}


# --- the report -------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Nothing that JSON has no number for."""
    if isinstance(value, float):
        return None if math.isnan(value) else "inf" if math.isinf(value) else float(f"{value:.4g}")
    return value


def _line(row: Row) -> str:
    values = [f"{key} {value}" for key, value in row.items() if key not in ("part", "what") and value not in (None, "")]
    return f"{row['part']:<10}{row['what']:<46}{', '.join(values)}"


def _markdown(everything: dict[str, Any]) -> str:
    head = {key: value for key, value in everything.items() if key not in ("rows", "left_out")}
    lines = [", ".join(f"{key} {value}" for key, value in head.items())]
    for part in dict.fromkeys(row["part"] for row in everything["rows"]):
        those = [row for row in everything["rows"] if row["part"] == part]
        keys = list(
            dict.fromkeys(key for row in those for key in row if key != "part" and any(each.get(key) for each in those))
        )
        lines += ["", f"## {part}", "", _cells(keys), _cells(["---"] * len(keys))]
        lines += [_cells(["" if row.get(key) is None else str(row[key]) for key in keys]) for row in those]
    if everything["left_out"]:
        lines += ["", "Left out, as the time was up: " + ", ".join(everything["left_out"])]
    return "\n".join(lines) + "\n"


def _cells(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def _about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    free = available_memory(DEVICE)
    return {
        "device": torch.cuda.get_device_name(DEVICE) if IS_CARD else "processor",
        "GB free": round((free or 0) / GB, 1),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def run(bench: Bench, only: Sequence[str] = ()) -> None:
    """The parts, each within its share of the time."""
    ends = bench.ends
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        now = time.perf_counter()
        bench.ends = now + max(0.0, ends - now) * (1.0 if only else PART_SHARES[name])
        try:
            bench.check()
            for _ in part(bench):
                bench.check()
        except TimeIsUp:
            bench.left_out.append(f"the rest of {name}")
        except Exception as error:  # the other parts may do
            bench.add(name, "the part itself", failure=f"{type(error).__name__}: {error}".splitlines()[0])
        bench.write()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, and write the table and JSON."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=330.0, help="when no further row is begun")
    parser.add_argument("--out", default=".", help="folder of gpu.md and gpu.json")
    parser.add_argument("--only", default="", help=f"parts, with commas: {', '.join(PARTS)}")
    given = parser.parse_args(arguments)
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    about = _about()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    sizes = Sizes() if IS_CARD else Sizes.of_a_processor()
    vae = random_vae(SD if IS_CARD else NARROW, card.TILE)
    bench = Bench(vae, sizes, folder, began + given.seconds, about)
    try:
        run(bench, [name for name in given.only.split(",") if name])
    finally:
        bench.about["seconds"] = round(time.perf_counter() - began)
        bench.write()
    print(f"{bench.about['seconds']} s; left out: {', '.join(bench.left_out) or 'nothing'}")


if __name__ == "__main__":
    main()
