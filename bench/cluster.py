"""Ray Serve on this machine: what a second replica brings, whether ``remote-vae plan`` says how long calls wait, large bodies.

Two replicas of one thread each, so that it wants two cores with nothing else to do. The demo's VAE decodes 512 px pictures, a
picture a call, as replicas take one call at a time here.

    make test-cluster        # installs Ray
    RAY_AUTH_MODE=disabled python -m bench.cluster [--quick]
"""

from __future__ import annotations

import argparse
import os

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")

import random
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import ray
import torch
from diffusers import AutoencoderKL
from ray import serve

from remote_vae import remote_encode
from remote_vae.remote.client import client_for
from remote_vae.server.ray_app import app
from remote_vae.tools.simulation import Load, Servers, quantile, simulate
from remote_vae.wire import DecodeRequest, Output

ROOT = Path(__file__).resolve().parent.parent
VAE = ROOT / "assets" / "demo_vae"
STORE = 400 << 20
# The share of the time in which the cards are to be at work while waits are looked at.
AT_WORK = 0.7
UIS = 8
LARGE = 4096


def latents(side: int) -> torch.Tensor:
    return torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))


def seconds_of_a_call(url: str, side: int) -> float:
    started = time.perf_counter()
    client_for(f"{url}/decode").decode(DecodeRequest(latents(side), Output.UINT8))
    return time.perf_counter() - started


def rate(url: str, side: int, clients: int, calls: int) -> tuple[float, list[float]]:
    """Pictures a second of clients that never pause, and the seconds of each call."""
    with ThreadPoolExecutor(clients) as executor:
        list(executor.map(lambda _: seconds_of_a_call(url, side), range(clients)))
        started = time.perf_counter()
        took = list(executor.map(lambda _: seconds_of_a_call(url, side), range(calls)))
        return calls / (time.perf_counter() - started), took


def by_chance(url: str, side: int, uis: int, every: float, calls: int) -> list[float]:
    """Seconds of each call of UIs that pause by chance between them, as the simulation has it."""
    took: list[float] = []
    lock = threading.Lock()

    def ui(seed: int) -> None:
        chance = random.Random(seed)
        while len(took) < calls:
            time.sleep(chance.expovariate(1.0 / every))
            seconds = seconds_of_a_call(url, side)
            with lock:
                took.append(seconds)

    with ThreadPoolExecutor(uis) as executor:
        list(executor.map(ui, range(uis)))
    return took


def show_waits(name: str, waits: Sequence[float]) -> None:
    each = "".join(f"{quantile(sorted(waits), share) * 1000:>9.0f}" for share in (0.5, 0.95, 0.99))
    print(f"{name:<12}{statistics.mean(waits) * 1000:>9.0f}{each}")


def large(folder: Path, url: str) -> None:
    """A picture of 4096 px goes up as raw values, and its latents are those of the VAE here, bit by bit."""
    vae = AutoencoderKL.from_pretrained(folder)
    pixels = torch.rand(1, 3, LARGE, LARGE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    started = time.perf_counter()
    came = remote_encode(f"{url}/encode", pixels)
    took = time.perf_counter() - started
    with torch.inference_mode():
        wanted = vae.encode(pixels).latent_dist.mode()
    verdict = "bit-equal" if torch.equal(came, wanted) else "DIFFERENT"
    print(f"\nencode of {LARGE} px, {pixels.nbytes / 1e6:.0f} MB up: {verdict}, {took:.1f} s")


def thin_vae(folder: Path) -> Path:
    """One that encodes 4096 px in little memory: four channels, and no attention over a quarter of a million cells."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, mid_block_add_attention=False, **blocks
    )
    vae.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the calls, and no large picture")
    parser.add_argument("--side", type=int, default=512)
    options = parser.parse_args()
    side, calls = options.side, 12 if options.quick else 40
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=STORE, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    busy = psutil.cpu_percent(2)
    print(f"torch {torch.__version__}, ray {ray.__version__}, {os.cpu_count()} cores, {busy:.0f} % of them busy before")
    rates = {}
    for replicas in (1, 2):
        serve.run(
            app({"vaes": {"demo": str(VAE)}, "min_replicas": replicas, "max_ongoing_requests": 1, "max_queued_requests": 99})
        )
        rates[replicas], _ = rate(url, side, 2 * replicas, calls * replicas)
        print(f"{replicas} replica(s): {rates[replicas]:.3g} pictures of {side} px a second")
    print(f"two to one: {rates[2] / rates[1]:.2f}")

    _, both = rate(url, side, 2, calls)
    each = statistics.median(both)
    every = UIS * each / (2 * AT_WORK)
    took = by_chance(url, side, UIS, every, 4 * calls)
    outcome = simulate(Load(UIS, every), Servers(2, both))
    print(f"\n{UIS} UIs, a call of {each * 1000:.0f} ms every {every:.2f} s, two replicas; waits in ms")
    print(f"{'':<12}{'mean':>9}{'median':>9}{'p95':>9}{'p99':>9}")
    show_waits("measured", [max(0.0, seconds - each) for seconds in took])
    show_waits("simulated", outcome.waits)
    print(f"simulated: the replicas are at work {outcome.utilisation:.0%} of the time")
    if not options.quick:
        folder = thin_vae(ROOT / "bench" / "out" / "thin_vae")
        serve.run(app({"vaes": {"thin": str(folder)}}))
        large(folder, url)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
