"""What a server is like for one well-behaved client while others misbehave: time of its calls, and memory of the server.

A real server of the small trained VAE in a process of its own. Beside each kind of crowd one client decodes 256 px pictures,
one after the other; a 503 is waited out as its Retry-After says.

    python -m bench.load
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).resolve().parent.parent
CALLS = 20
CLIENTS = 100
SILENT = 400
# Longer than the server is patient with a body that does not come.
RETRIES = 10

SMALL = ((1, 4, 32, 32), 16_384)  # float32 latents of 256 px
LARGE = ((4, 3, 2896, 2896), 402_554_880)  # pixels of an encode, 400 MB


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds and MB. ``crowd``: what became of those beside the client."""

    name: str
    median: float
    longest: float
    served: int
    retries: int
    memory: float
    crowd: str


class Server:
    """``remote-vae serve`` and the memory that it takes. ``options`` of the command stand behind the VAE."""

    def __init__(self, vae: Path = ROOT / "assets" / "demo_vae", *options: str) -> None:
        command = [sys.executable, "-m", "remote_vae", "serve", "--vae", str(vae), "--port", "0", *options]
        # Its errors alone would be worth a look, and they stand among a line for each of thousands of calls.
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = next(line for line in self._process.stdout or () if line.startswith("Endpoint: "))
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        self._memory = psutil.Process(self._process.pid)

    def megabytes(self) -> float:
        return float(self._memory.memory_info().rss) / 1e6

    @contextmanager
    def peak(self) -> Iterator[Callable[[], float]]:
        """The most that it takes from here on."""
        with peak_of(self.megabytes) as peak:
            yield peak

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


@contextmanager
def peak_of(megabytes: Callable[[], float]) -> Iterator[Callable[[], float]]:
    """The most that ``megabytes`` says from here on, asked every 20 ms."""
    seen = [megabytes()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(seen)
    finally:
        done.set()
        watcher.join()


# --- crowds --------------------------------------------------------------------------------------------------------------


def connected(server: Server, count: int, first: bytes = b"", receive_bytes: int | None = None) -> list[socket.socket]:
    sockets = []
    for _ in range(count):
        each = socket.socket()
        if receive_bytes:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        each.connect(("127.0.0.1", server.port))
        each.sendall(first)
        sockets.append(each)
    return sockets


def head(path: str, shape: tuple[int, ...], length: int) -> bytes:
    query = "&".join(f"shape={size}" for size in shape) + "&dtype=float32&output_type=pt"
    return f"POST {path}?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


@contextmanager
def nobody(server: Server) -> Iterator[Callable[[], str]]:
    del server
    yield lambda: ""


@contextmanager
def silent(server: Server) -> Iterator[Callable[[], str]]:
    sockets = connected(server, SILENT)
    yield lambda: f"{SILENT} connections"
    close(sockets)


@contextmanager
def dripping_heads(server: Server) -> Iterator[Callable[[], str]]:
    sockets = connected(server, CLIENTS, b"POST /decode HTTP/1.1\r\nX: ")
    done = threading.Event()
    cut: set[int] = set()

    def drip() -> None:
        while not done.wait(0.2):
            for number, each in enumerate(sockets):
                try:
                    each.sendall(b"x")
                except OSError:
                    cut.add(number)

    thread = threading.Thread(target=drip)
    thread.start()
    yield lambda: f"{CLIENTS} heads of a byte each 0.2 s; {len(cut)} cut off"
    done.set()
    thread.join()
    close(sockets)


@contextmanager
def stopped_uploads(server: Server) -> Iterator[Callable[[], str]]:
    sockets = connected(server, CLIENTS, head("/decode", *SMALL) + bytes(1000))
    yield lambda: f"{CLIENTS} bodies that stop"
    close(sockets)


@contextmanager
def large_uploads(server: Server) -> Iterator[Callable[[], str]]:
    sockets = connected(server, 5)
    for each in sockets:
        each.settimeout(2)
        # It may be refused, which is the server's right.
        with suppress(OSError):
            each.sendall(head("/encode", *LARGE) + bytes(20_000_000))
    yield lambda: "5 bodies of 400 MB that stop after 20 MB"
    close(sockets)


@contextmanager
def unread_answers(server: Server) -> Iterator[Callable[[], str]]:
    sockets = connected(server, CLIENTS // 2, head("/decode", *SMALL) + bytes(SMALL[1]), receive_bytes=4096)
    yield lambda: f"{CLIENTS // 2} answers that are not read"
    close(sockets)


@contextmanager
def clients(server: Server) -> Iterator[Callable[[], str]]:
    """A hundred at once, who take a 503 for an answer."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        calls = [pool.submit(lambda: decode(server).status_code) for _ in range(CLIENTS)]
        yield lambda: "; ".join(f"{count} x {status}" for status, count in Counter(call.result() for call in calls).items())


def close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


CROWDS = {
    "nobody else": nobody,
    "100 clients at once": clients,
    "silent": silent,
    "slow-loris, heads": dripping_heads,
    "slow-loris, bodies": stopped_uploads,
    "large uploads": large_uploads,
    "unread answers": unread_answers,
}


# --- the client ----------------------------------------------------------------------------------------------------------


def decode(server: Server) -> requests.Response:
    shape, length = SMALL
    params = {"shape": list(shape), "dtype": "float32", "output_type": "pt", "partial_postprocess": "True"}
    return requests.post(f"{server.url}/decode", params=params, data=bytes(length), timeout=120)


def measure(server: Server, name: str, calls: int) -> Row:
    times, retries, served = [], 0, 0
    before = server.megabytes()
    with server.peak() as peak, CROWDS[name](server) as crowd:
        for _ in range(calls):
            started = time.perf_counter()
            for _ in range(RETRIES):
                answer = decode(server)
                if answer.status_code != 503:
                    break
                retries += 1
                time.sleep(float(answer.headers["Retry-After"]))
            served += answer.status_code == 200
            times.append((time.perf_counter() - started) * 1000)
        became = crowd()
        most = peak()
    return Row(name, statistics.median(times), max(times), served, retries, most - before, became)


def main() -> None:
    server = Server()
    try:
        decode(server)
        print(f"{'beside':22}{'median ms':>11}{'longest ms':>12}{'served':>9}{'retries':>9}{'MB more':>9}  the others")
        for name in CROWDS:
            row = measure(server, name, CALLS)
            numbers = f"{row.median:11.0f}{row.longest:12.0f}{row.served:>6}/{CALLS}{row.retries:9}{row.memory:9.0f}"
            print(f"{row.name:22}{numbers}  {row.crowd}", flush=True)
    finally:
        server.close()


if __name__ == "__main__":
    main()
