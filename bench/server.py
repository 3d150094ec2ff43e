"""What the server costs beside the bare VAE: the time of one client, pictures a second of eight, and whether all are right.

A real server process, and clients in another one, which speak HTTP over sockets that they keep, as plain programs do. Each has
latents of its own. "bare" is a loop in a third process over the same VAE, from latents on the CPU to 8-bit levels on the CPU.
Both are measured in turns, so that a machine that changes its speed changes it for both.

An answer is right when it is, to the last bit, that of its own latents, made by the bare VAE alone or in a batch of a size that
the server makes. On a GPU what else is in the batch may choose another kernel: there one level off is right as well.

    python -m bench.server                      # assets/demo_vae, on the first GPU, else the CPU
    python -m bench.server --vae random-sd      # the architecture of Stable Diffusion's VAE with random weights
    python -m bench.server --sizes 512,1024 --calls 40 --json
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.load import ROOT, Server
from bench.vaes import SD, random_vae
from remote_vae.server.engine import BATCH_PIXELS, batch_pixels_on
from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.wire.pixels import to_uint8

CLIENTS = 8
DEMO = ROOT / "assets" / "demo_vae"
RANDOM_SD = "random-sd"
# What the server promises (issue 17).
MOST_OVERHEAD, LEAST_SHARE, MOST_SPREAD = 0.03, 0.97, 10.0


@dataclass(frozen=True)
class Row:
    """One size: milliseconds of a call, pictures a second, and answers that were wrong."""

    pixels: int
    bare_ms: float
    remote_ms: float
    overhead: float
    bare_rate: float
    rate: float
    share: float
    p99_ms: float
    spread: float
    batch_gain: float
    wrong: int
    answers: int


# --- the bare VAE, in a process of its own -----------------------------------------------------------------------------------


def latents_of(client: int, channels: int, side: int) -> torch.Tensor:
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(client)) * 5


def levels(vae: LoadedVae, latents: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, H, W, 3]`` on the CPU."""
    with torch.inference_mode():
        return to_uint8(vae.vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]).cpu()


def bare(pipe: Connection, source: str, device: str) -> None:
    """Answers ``(what, side, ...)`` until None comes."""
    vae = load_vae(source, device=device)
    channels, downscale = vae.family.latent_channels, vae.family.downscale
    pipe.send((channels, downscale, str(vae.device), str(vae.dtype)))
    while (asked := pipe.recv()) is not None:
        what, pixels, count = asked
        side = pixels // downscale
        if what == "times":
            pipe.send(_times(vae, latents_of(0, channels, side), count))
        elif what == "gain":
            one, many = (_times(vae, latents_of(0, channels, side).repeat(b, 1, 1, 1), 2)[-1] / b for b in (1, count))
            pipe.send(one / many)
        else:
            # Where the server makes none, none is right.
            pipe.send(_answers(vae, channels, side, most_at_once(pixels) if batch_pixels_on([vae.device]) else 1))


def _times(vae: LoadedVae, latents: torch.Tensor, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        levels(vae, latents)
        taken.append(time.perf_counter() - began)
    return taken


def most_at_once(pixels: int) -> int:
    """Pictures that a server which makes batches makes at once, of eight clients."""
    return max(1, min(CLIENTS, BATCH_PIXELS // pixels**2))


def _answers(vae: LoadedVae, channels: int, side: int, most: int) -> list[list[np.ndarray]]:
    """What each client may get: at every place of batches of every size."""
    found: list[dict[bytes, np.ndarray]] = [{} for _ in range(CLIENTS)]
    for batch in range(1, most + 1):
        for first in range(CLIENTS):
            members = [(first + place) % CLIENTS for place in range(batch)]
            made = levels(vae, torch.cat([latents_of(client, channels, side) for client in members])).numpy()
            for client, picture in zip(members, made, strict=True):
                found[client].setdefault(picture.tobytes(), picture)
    return [list(each.values()) for each in found]


# --- clients, in another process ---------------------------------------------------------------------------------------------


def clients(pipe: Connection, port: int, channels: int, downscale: int) -> None:
    """Answers ``(count of clients, side, calls of each)`` with seconds of each call, of all, and the answers that were new."""
    while (asked := pipe.recv()) is not None:
        count, pixels, calls = asked
        start = threading.Barrier(count + 1)
        with ThreadPoolExecutor(count) as pool:
            jobs = [pool.submit(_client, start, port, each, channels, pixels // downscale, calls) for each in range(count)]
            start.wait()
            began = time.perf_counter()
            results = [job.result() for job in jobs]
            taken = time.perf_counter() - began
        pipe.send((taken, [times for times, _ in results], [answers for _, answers in results]))


def _client(
    start: threading.Barrier, port: int, number: int, channels: int, side: int, calls: int
) -> tuple[list[float], dict[bytes, int]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.connect()
    body = latents_of(number, channels, side).numpy().tobytes()
    query = f"shape=1&shape={channels}&shape={side}&shape={side}&dtype=float32&output_type=pt&partial_postprocess=True"
    times: list[float] = []
    answers: dict[bytes, int] = {}
    start.wait()
    while len(times) < calls:
        began = time.perf_counter()
        connection.request("POST", f"/decode?{query}", body)
        response = connection.getresponse()
        answer = response.read()
        if response.status == 503:
            time.sleep(float(response.headers["Retry-After"]))
            continue
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answer[:200]!r}")
        times.append(time.perf_counter() - began)
        answers[answer] = answers.get(answer, 0) + 1
    connection.close()
    return times, answers


# --- the comparison ----------------------------------------------------------------------------------------------------------


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    try:
        yield ours
        ours.send(None)
        child.join(10)
    finally:
        child.kill()


def ask(pipe: Connection, *what: Any) -> Any:
    pipe.send(what)
    return pipe.recv()


def measure(vae: Connection, crowd: Connection, pixels: int, calls: int, *, exact: bool) -> Row:
    possible = ask(vae, "answers", pixels, 0)
    ask(vae, "times", pixels, 2)
    ask(crowd, 1, pixels, 2)
    bare_times, remote_times, bare_all, all_times, wrong, answers = [], [], 0.0, 0.0, 0, 0
    each: list[float] = []
    rounds = 3
    for _ in range(rounds):
        bare_times += ask(vae, "times", pixels, calls)
        _, times, got = ask(crowd, 1, pixels, calls)
        remote_times += times[0]
        wrong += wrong_ones(got, possible, exact=exact)
        answers += calls
        bare_all += sum(ask(vae, "times", pixels, CLIENTS))
        taken, times, got = ask(crowd, CLIENTS, pixels, calls)
        all_times += taken
        each += [seconds for own in times for seconds in own]
        wrong += wrong_ones(got, possible, exact=exact)
        answers += CLIENTS * calls
    bare_ms, remote_ms = 1000 * statistics.median(bare_times), 1000 * statistics.median(remote_times)
    bare_rate, rate = rounds * CLIENTS / bare_all, rounds * CLIENTS * calls / all_times
    p99 = 1000 * sorted(each)[int(0.99 * (len(each) - 1))]
    gain = ask(vae, "gain", pixels, most_at_once(pixels))
    return Row(
        pixels, bare_ms, remote_ms, remote_ms / bare_ms - 1, bare_rate, rate, rate / bare_rate, p99, p99 / remote_ms, gain,
        wrong, answers,
    )  # fmt: skip


def wrong_ones(got: list[dict[bytes, int]], possible: list[list[np.ndarray]], *, exact: bool) -> int:
    return sum(
        count for client, answers in enumerate(got) for answer, count in answers.items()
        if not is_right(answer, possible[client], exact=exact)
    )  # fmt: skip


def is_right(answer: bytes, possible: list[np.ndarray], *, exact: bool) -> bool:
    if any(answer == each.tobytes() for each in possible):
        return True
    values = np.frombuffer(answer, dtype=np.uint8).astype(int)
    return not exact and any(np.abs(values - each.reshape(-1)).max(initial=0) <= 1 for each in possible)


def verdicts(row: Row) -> list[str]:
    """What of the promises is not kept."""
    broken = []
    if row.pixels == 1024 and row.overhead > MOST_OVERHEAD:
        broken.append(f"{row.overhead:.1%} over the bare call, at most {MOST_OVERHEAD:.0%}")
    # Smaller ones: where the device gains by batches, which is then more than the wire costs.
    least = LEAST_SHARE if row.pixels >= 1024 else 1.0 if row.batch_gain > 1 else 0.0
    if row.share < least:
        broken.append(f"eight clients get {row.share:.2f} of the bare loop, at least {least}")
    if row.spread > MOST_SPREAD:
        broken.append(f"p99 is {row.spread:.1f} times a single call, at most {MOST_SPREAD:.0f}")
    if row.wrong:
        broken.append(f"{row.wrong} answers are wrong")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default=str(DEMO), help=f"folder or file; {RANDOM_SD}: Stable Diffusion's architecture")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", default="256,512,1024", help="sides of the pictures in pixels")
    parser.add_argument("--calls", type=int, default=0, help="of each client in each of three rounds (0: as fits the device)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(options.vae)
        if options.vae == RANDOM_SD:
            source = Path(folder)
            random_vae(SD).save_pretrained(source)
        server = Server(source, "--device", options.device)
        try:
            with process(bare, str(source), options.device) as vae:
                channels, downscale, device, dtype = vae.recv()
                with process(clients, server.port, channels, downscale) as crowd:
                    return report(options, vae, crowd, f"{device}, {dtype.removeprefix('torch.')}")
        finally:
            server.close()


def report(options: argparse.Namespace, vae: Connection, crowd: Connection, where: str) -> int:
    on_cpu = where.startswith("cpu")
    card = platform.processor() or platform.machine() if on_cpu else torch.cuda.get_device_name(0)
    provenance = f"{Path(options.vae).name}, {where} ({card}), torch {torch.__version__}, {torch.get_num_threads()} threads"
    rows = []
    if not options.json:
        print(provenance)
        print(f"{'px':>5}{'bare ms':>9}{'remote':>9}{'over':>8}{'bare/s':>8}{'8 get/s':>9}{'share':>7}{'p99 ms':>9}"
              f"{'x one':>7}{'gain':>6}{'wrong':>12}")  # fmt: skip
    for size in map(int, options.sizes.split(",")):
        calls = options.calls or max(2, (4 if on_cpu else 40) * 512 // size)
        row = measure(vae, crowd, size, calls, exact=on_cpu)
        rows.append(row)
        if not options.json:
            print(f"{size:5}{row.bare_ms:9.1f}{row.remote_ms:9.1f}{row.overhead:8.1%}{row.bare_rate:8.2f}{row.rate:9.2f}"
                  f"{row.share:7.2f}{row.p99_ms:9.0f}{row.spread:7.1f}{row.batch_gain:6.2f}{row.wrong:6}/{row.answers}",
                  flush=True)  # fmt: skip
            for broken in verdicts(row):
                print(f"      {broken}")
    if options.json:
        print(json.dumps({"where": provenance, "rows": [{**asdict(row), "broken": verdicts(row)} for row in rows]}))
    return int(any(map(verdicts, rows)))


if __name__ == "__main__":
    sys.exit(main())
