"""The exact tiled VAE against the whole VAE and against other tilings: memory, time and error, each bar with its verdict.

Two VAEs in float32: "sd" is the real architecture with random weights, "small" the trained one of the demo. Memory, live bytes
and times are each measured in a fresh process, after a call on a small corner that loads the libraries:

- memory: how far peak RSS rises during one call (on a GPU: its allocator's peak);
- live: peak of the bytes of all tensors alive on the compute device (``bench.live_bytes``), the result included and files not;
- x time: of exact, the median over pairs of calls in turns with the whole VAE in one process; of the others, their one call
  against the whole VAE's one call.

Max err is in levels of 255, after clamping as a picture is. PSNR is against a peak-to-peak of 2 for pixels and against the
standard deviation for moments, both of float32 and of everything the whole VAE gives.

    python -m bench.tiled [--quick] [--only sd-decode-1024,bounded,...] [--peer FOLDER] [--pictures-only]

Everything takes some hours on two cores, most of it the sd VAE at 2048 px and in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import peer_tilevae, tiled_pictures, vae_call
from bench.client_overhead import photo_pixels
from bench.vae_call import Call

ROOT = Path(__file__).resolve().parent.parent
PSNR_BAR = 100.0
TIME_BAR = 1.0
MEMORY_BARS = {"decode": 0.40, "encode": 0.45}
MEMORY_BAR_SIZE = 1024
BOUNDED_SHARE = 0.10
BOUNDED_TIME_BAR = 1.3
HUGE_MEMORY_BAR = 24e9
HALF_BAR = 1.0
TICK_BAR = 0.2


@dataclass(frozen=True)
class Sizes:
    """Sides in pixels of what is measured. Smaller ones are for trying the bench itself."""

    rows: tuple[int, ...] = (512, 1024, 2048)
    bounded: int = 2048
    huge: int = 4096
    halves: tuple[int, ...] = (256, 512)
    fast_path: int = 512

    @classmethod
    def from_argument(cls, text: str) -> Sizes:
        rows = tuple(int(part) for part in text.split(","))
        return cls(rows, rows[-1], 2 * rows[-1], rows[:2], rows[0])


@dataclass(frozen=True)
class Bar:
    """A claim with a number to it."""

    claim: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        holds = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "PASS" if holds else "MISS"

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.verdict}: {self.claim:<58} {self.value:>10.4g}   (bar: {sign} {self.limit:g})"


@dataclass
class Bench:
    """Runs measurements in child processes, each once, and gathers the bars."""

    folder: Path
    peer: str
    bars: list[Bar] = field(default_factory=list)
    _done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def memory(self, call: Call) -> dict[str, Any]:
        return self._child("memory", call)

    def live(self, call: Call) -> dict[str, Any]:
        if call.is_long and call.method == "whole":
            # Four times the pixels: four times the bytes of every tensor, save the attention's small ones.
            half = self.live(replace(call, size=call.size // 2))
            return {name: 4 * size for name, size in half.items()}
        return self._child("live", call)

    def pairs(self, base: Call, other: Call) -> dict[str, Any]:
        if not base.is_long:
            return self._child("pairs", base, other)
        ours, theirs = self.memory(base)["seconds"], self.memory(other)["seconds"]
        return {"base": ours, "other": theirs, "ratio": theirs / ours, "pairs": 1}

    def ticks(self, call: Call) -> dict[str, Any]:
        return self._child("ticks", call)

    def result(self, call: Call) -> torch.Tensor:
        self.memory(call)
        return torch.load(self.folder / _result_name(call))

    def error(self, call: Call, base: Call) -> tuple[float, float]:
        """Max error in levels and PSNR in dB of one call's result to another's."""
        ours, theirs = self.result(call), self.result(base)
        rmse, deviation = _rmse(ours, theirs), 2.0 if call.op == "decode" else theirs.double().std().item()
        levels = (ours.clamp(-1, 1) - theirs.clamp(-1, 1)).abs().max().item() * 127.5
        return levels, 20 * math.log10(deviation / rmse) if rmse else math.inf

    def check(self, claim: str, value: float, limit: float, *, at_least: bool = False) -> None:
        self.bars.append(Bar(claim, value, limit, at_least))

    def _child(self, job: str, *calls: Call) -> dict[str, Any]:
        order = json.dumps({"job": job, "calls": [asdict(call) for call in calls]})
        if order not in self._done:
            for call in calls:
                self._write_input(call)
            command = [sys.executable, "-m", "bench.tiled", "--child", order, "--folder", str(self.folder)]
            child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if child.returncode:
                lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
                raise ChildFailed(f"{job} of {calls[-1].input_name}, {calls[-1].method}: {lines[-1]}")
            self._done[order] = json.loads(child.stdout.splitlines()[-1])
        return self._done[order]

    def _write_input(self, call: Call) -> None:
        path = self.folder / f"{call.input_name}.pt"
        if not path.exists():
            torch.save(_input(call), path)


class ChildFailed(RuntimeError):
    """A measurement did not come to its end."""


def _result_name(call: Call) -> str:
    parts = (call.input_name, call.method, call.weights, call.dtype, str(call.max_bytes))
    return f"result-{'-'.join(parts).replace(' ', '_')}.pt"


def _input(call: Call) -> torch.Tensor:
    """A photo, and for the trained VAE the latents of a photo; for random weights, random latents."""
    if call.op == "encode":
        return photo_pixels(call.size).float()
    if call.vae == "sd":
        return torch.randn(1, 4, call.size // 8, call.size // 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        latents = vae_call.load(call.vae).encode(photo_pixels(512).float()).latent_dist.mean
        return torch.nn.functional.interpolate(latents, size=call.size // 8, mode="bilinear").clone()


def _rmse(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours.double() - theirs.double()).square().mean().sqrt().item()


# --- the parts of the report ------------------------------------------------------------------------------------------------


def print_rows(bench: Bench, whole: Call) -> None:
    """Every method on one VAE, operation and size."""
    print(f"\n{whole.vae} {whole.op} {whole.size} px")
    print(f"  {'method':<20}{'s':>8}{'x time':>8}{'memory MB':>11}{'x':>6}{'live MB':>9}{'x':>6}{'max err':>10}{'PSNR dB':>9}")
    base, base_live = bench.memory(whole), bench.live(whole)
    others = () if whole.is_long else ("diffusers tiling", *_peers(bench.peer))
    for method in ("whole", "exact", *others):
        call = replace(whole, method=method, peer=bench.peer if method.startswith("multidiffusion") else "")
        try:
            seconds, ratio = _time(bench, whole, call)
            memory = bench.memory(call)["memory"]
            counted = method == "whole" or (method == "exact" and not whole.is_long)
            live = bench.live(call)["live"] if counted else math.nan
            levels, psnr = bench.error(call, whole)
        except ChildFailed as error:
            print(f"  {method:<20} failed: {error}")
            seconds = ratio = memory = live = levels = psnr = math.nan
        else:
            print(
                f"  {method:<20}{seconds:>8.2f}{ratio:>8.2f}{memory / 1e6:>11.0f}{memory / base['memory']:>6.2f}"
                f"{live / 1e6:>9.0f}{live / base_live['live']:>6.2f}"
                f"{levels if whole.op == 'decode' else math.nan:>10.2g}{psnr:>9.1f}".replace("nan", "  -")
            )
        if method == "exact":
            name = f"exact, {whole.vae} {whole.op} {whole.size} px:"
            bench.check(f"{name} PSNR, dB", psnr, PSNR_BAR, at_least=True)
            bench.check(f"{name} time x whole", ratio, TIME_BAR)
            if whole.size == MEMORY_BAR_SIZE:
                bench.check(f"{name} memory x whole", memory / base["memory"], MEMORY_BARS[whole.op])
    if not bench.peer:
        print("  multidiffusion       not installed (--peer FOLDER)")


def _time(bench: Bench, whole: Call, call: Call) -> tuple[float, float]:
    """Seconds and ratio to the whole VAE."""
    if call.method == "exact":
        pairs = bench.pairs(whole, call)
        how = "one call each" if whole.is_long else f"in turns, {pairs['pairs']} pairs"
        print(f"  exact and whole, {how}: {pairs['other']:.2f} s and {pairs['base']:.2f} s")
        return pairs["other"], pairs["ratio"]
    seconds = bench.memory(call)["seconds"]
    return seconds, seconds / bench.memory(whole)["seconds"]


def _peers(folder: str) -> tuple[str, ...]:
    return ("multidiffusion", "multidiffusion fast") if folder else ()


def print_bounded(bench: Bench, vae: str, size: int) -> None:
    """A tenth of the whole VAE's live bytes; what finds no room waits in files, or in the host's memory beside a GPU."""
    whole = Call(vae, "decode", size)
    whole_live = bench.live(whole)["live"]
    bounded = replace(whole, method="exact", max_bytes=int(BOUNDED_SHARE * whole_live))
    print(f"\n{vae} decode {size} px in {bounded.max_bytes / 1e6:.0f} MB, {BOUNDED_SHARE:.0%} of the whole VAE's live bytes")
    live, pairs = bench.live(bounded), bench.pairs(whole, bounded)
    _, psnr = bench.error(bounded, whole)
    print(
        f"  live {live['live'] / 1e6:.0f} MB and {live['stored'] / 1e6:.0f} MB put away (whole: {whole_live / 1e6:.0f} MB);"
        f" {pairs['other']:.2f} s (whole: {pairs['base']:.2f} s); {psnr:.1f} dB"
    )
    name = f"bounded, {vae} decode {size} px:"
    bench.check(f"{name} PSNR, dB", psnr, PSNR_BAR, at_least=True)
    bench.check(f"{name} live bytes x whole", live["live"] / whole_live, BOUNDED_SHARE)
    bench.check(f"{name} time x whole", pairs["ratio"], BOUNDED_TIME_BAR)


def print_huge(bench: Bench, measured: int, size: int) -> None:
    """A picture whose whole decode would not fit."""
    factor = (size / measured) ** 2
    whole_live = bench.live(Call("small", "decode", measured))["live"] * factor
    call = Call("small", "decode", size, "exact", max_bytes=int(BOUNDED_SHARE * whole_live))
    print(f"\nsmall decode {size} px in {call.max_bytes / 1e6:.0f} MB, {BOUNDED_SHARE:.0%} of the whole VAE's live bytes")
    print(f"  (the whole VAE's: {whole_live / 1e6:.0f} MB, {factor:g} x what was measured at {measured} px)")
    run, live = bench.memory(call), bench.live(call)
    print(
        f"  {run['seconds']:.1f} s; peak RSS rises by {run['memory'] / 1e6:.0f} MB; "
        f"live {live['live'] / 1e6:.0f} MB and {live['stored'] / 1e6:.0f} MB put away"
    )
    name = f"huge, small decode {size} px:"
    bench.check(f"{name} live bytes x whole", live["live"] / whole_live, BOUNDED_SHARE)
    bench.check(f"{name} peak RSS of the process, GB", run["process"] / 1e9, HUGE_MEMORY_BAR / 1e9)
    bench.check(f"{name} every value finite", float(run["finite"]), 1.0, at_least=True)


def print_half(bench: Bench, whole: Call, weights: str) -> None:
    """In half precision: not farther from float32 than the whole VAE in half precision is."""
    errors = {}
    for method in ("whole", "exact"):
        half = bench.result(replace(whole, method=method, weights=weights))
        errors[method] = _rmse(half, bench.result(whole))
    name = f"{weights}, {whole.vae} {whole.op} {whole.size} px"
    print(f"  {name:<34} RMSE to float32: whole {errors['whole']:.4g}, exact {errors['exact']:.4g}")
    # A whole VAE that overflows is as far off as can be.
    limit = errors["whole"] if math.isfinite(errors["whole"]) else math.inf
    bench.check(f"{name}: exact's RMSE x whole's", errors["exact"] / limit, HALF_BAR)


def print_ticks(bench: Bench, call: Call) -> None:
    """How long an Interrupt waits at worst."""
    ticks = bench.ticks(call)
    name = f"{call.vae} {call.op} {call.size} px"
    print(f"  {name}: {ticks['ticks']} ticks, at most {ticks['longest']:.3f} s between two")
    bench.check(f"exact, {name}: longest wait for a tick, s", ticks["longest"], TICK_BAR)


def print_fast_path(bench: Bench, vae: str, size: int) -> None:
    """bfloat16 on a processor that has units for it; no bar."""
    exact = Call(vae, "decode", size, "exact")
    quick = replace(exact, dtype="bfloat16")
    pairs = bench.pairs(exact, quick)
    _, psnr = bench.error(quick, exact)
    print(
        f"  {vae} decode {size} px, exact in bfloat16: {pairs['ratio']:.2f} x the time of exact in float32 "
        f"({pairs['other']:.2f} s and {pairs['base']:.2f} s), {psnr:.1f} dB"
    )


# --- the run ----------------------------------------------------------------------------------------------------------------


def parts(bench: Bench, sizes: Sizes, *, quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every part of the report with its name, the short ones first."""
    for size in sizes.rows:
        for vae in ("small", "sd"):
            if quick and size >= (2048 if vae == "small" else 1024):
                continue
            for op in ("decode", "encode"):
                yield f"{vae}-{op}-{size}", _part(print_rows, bench, Call(vae, op, size))
    for vae in ("small",) if quick else ("small", "sd"):
        yield f"bounded-{vae}", _part(print_bounded, bench, vae, sizes.bounded)
    yield "huge", _part(print_huge, bench, sizes.bounded, sizes.huge)
    # Most processors have no instructions for float16, and take minutes.
    halves = {"small": ("float16", "bfloat16"), "sd": ("bfloat16",)}
    calls = [(weights, vae, size) for vae in halves for weights in halves[vae] for size in sizes.halves]
    for weights, vae, size in (*calls, ("float16", "sd", sizes.halves[0] // 2)):
        for op in ("decode", "encode"):
            yield f"half-{weights}-{vae}-{op}-{size}", _part(print_half, bench, Call(vae, op, size), weights)
    for op in ("decode", "encode"):
        yield f"ticks-{op}", _part(print_ticks, bench, Call("sd", op, sizes.rows[: 1 if quick else 2][-1], "exact"))
    for vae in ("small", "sd"):
        yield f"fast-path-{vae}", _part(print_fast_path, bench, vae, sizes.fast_path)
    yield "pictures", _part(tiled_pictures.write, bench.peer)


def _part(function: Callable[..., None], *args: Any) -> Callable[[], None]:
    return lambda: function(*args)


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _work_for_parent(json.loads(arguments.child), Path(arguments.folder))
        return
    if arguments.peer and peer_tilevae.find(Path(arguments.peer)) is None:
        raise SystemExit(f"no tilevae.py below {arguments.peer}")
    only = "pictures" if arguments.pictures_only else arguments.only
    sizes = Sizes.from_argument(arguments.sizes) if arguments.sizes else Sizes()
    print(f"torch {torch.__version__}, {vae_call.DEVICE}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.peer)
        try:
            for name, part in parts(bench, sizes, quick=arguments.quick):
                if any(name.startswith(wanted) for wanted in only.split(",")):
                    _print_part(bench, name, part)
        finally:
            # Also what an interrupted run has found.
            print("\n" + "\n".join(str(bar) for bar in bench.bars))


def _print_part(bench: Bench, name: str, part: Callable[[], None]) -> None:
    try:
        part()
    except ChildFailed as error:
        print(f"  failed: {error}")
        bench.check(f"{name} comes to its end", 0.0, 1.0, at_least=True)
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tiled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without sd at 1024 and 2048 px and small at 2048 px")
    parser.add_argument("--only", default="", help="beginnings of names, with commas: sd-decode-1024, bounded, huge")
    parser.add_argument("--sizes", default="", help="other sides of the rows, with commas, to try the bench: 64,128")
    parser.add_argument("--peer", default="", help="folder of multidiffusion's Tiled VAE, to be measured too")
    parser.add_argument("--pictures-only", action="store_true", help="only docs/tiled-difference.png")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _work_for_parent(order: dict[str, Any], folder: Path) -> None:
    calls = [Call(**call) for call in order["calls"]]
    if order["job"] == "memory":
        answer = vae_call.measure_memory(folder, calls[0], _result_name(calls[0]))
    elif order["job"] == "ticks":
        answer = vae_call.measure_ticks(folder, calls[0])
    elif order["job"] == "live":
        answer = vae_call.measure_live(folder, calls[0])
    else:
        answer = vae_call.measure_pairs(folder, *calls)
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
