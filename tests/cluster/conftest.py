"""A real cluster on this machine: Ray, its proxy, the front and the replicas, each a process of its own."""

from __future__ import annotations

import os

# Before Ray is imported, which reads them then.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
import torch
from diffusers import AutoencoderKL
from ray import serve

from remote_vae.server.ray_app import app
from tests.vaes import small_kl, stirred

ROOT = Path(__file__).resolve().parent.parent.parent
# Small, as what is looked at here is not the pictures: a call of 256 px takes some 50 ms.
_WIDTHS = (16, 16, 32, 32)
_STORE = 100 << 20


def saved_vae(folder: Path, family: str, seed: int = 7, **changes: Any) -> str:
    """A small VAE of ``family``, saved as diffusers does."""
    vae = small_kl(family, **{"block_out_channels": _WIDTHS, "norm_num_groups": 8, **changes})
    torch.manual_seed(seed)
    stirred(vae)
    vae.save_pretrained(folder)
    return str(folder)


def two(vaes: Mapping[str, str]) -> dict[str, Any]:
    """One VAE with two replicas, and two fronts, so that one of each may die."""
    return {"vaes": {"sd1": vaes["sd1"]}, "num_cpus": 0.2, "min_replicas": 2, "fronts": 2}


class Cluster:
    """Ray with two processors, and the application on a free port."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.arguments: dict[str, Any] = {}
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=_STORE, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})

    def serve(self, **arguments: Any) -> None:
        """Start, or change, the application; returns when it is as wanted."""
        if arguments == self.arguments:
            return
        self.arguments = arguments
        serve.run(app(arguments))
        self.wait(lambda: all(model["loaded"] for model in self.info()["models"]))

    def begin(self, **arguments: Any) -> None:
        """As ``serve``, and returns when the front is there, whatever else is not."""
        self.arguments = arguments
        serve.run_many([serve.RunTarget(app(arguments))], wait_for_applications_running=False)
        self.wait(lambda: requests.get(f"{self.url}/health", timeout=120).ok)

    def info(self) -> dict[str, Any]:
        answer = requests.get(f"{self.url}/info", timeout=30)
        return answer.json() if answer.status_code == 200 else {"models": [{"loaded": False}]}

    def health(self) -> Mapping[str, Any]:
        document: Mapping[str, Any] = requests.get(f"{self.url}/health", timeout=30).json()
        return document

    def processes(self, deployment: str) -> list[int]:
        """Of its replicas, oldest first."""
        found = []
        for entry in Path("/proc").iterdir():
            title = self._title(entry)
            if title.startswith(f"ray::ServeReplica:default:{deployment}"):
                found.append(int(entry.name))
        return sorted(found)

    @staticmethod
    def _title(entry: Path) -> str:
        try:
            return (entry / "cmdline").read_text(encoding="utf-8", errors="replace") if entry.name.isdigit() else ""
        except OSError:
            return ""

    def kill(self, deployment: str) -> int:
        """kill -9 of one replica."""
        process = self.processes(deployment)[0]
        os.kill(process, signal.SIGKILL)
        return process

    @staticmethod
    def wait(what: Any, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "it did not come to be so"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small VAEs by name. Two are of one family."""
    folder = tmp_path_factory.mktemp("vaes")
    made = {"sd1": "sd1", "anime": "sd1", "flux": "flux"}
    return {name: saved_vae(folder / name, family, seed) for seed, (name, family) in enumerate(made.items())}


@pytest.fixture(scope="session")
def here(vaes: dict[str, str]) -> dict[str, AutoencoderKL]:
    """The same VAEs in this process."""
    return {name: AutoencoderKL.from_pretrained(path) for name, path in vaes.items()}


@pytest.fixture(scope="session")
def cluster(vaes: dict[str, str]) -> Iterator[Cluster]:
    torch.set_num_threads(1)
    running = Cluster()
    yield running
    serve.shutdown()
    ray.shutdown()


@contextmanager
def crowd_of(call: Callable[[int], str], threads: int = 4) -> Iterator[Crowd]:
    """A crowd that calls until the end of the context. ``call`` gives "", or what was wrong."""
    crowd = Crowd(call, threads)
    crowd.more(2 * threads)
    try:
        yield crowd
    finally:
        crowd.end()


class Crowd:
    """Threads that make one call after the other, each looked at as it comes."""

    def __init__(self, call: Callable[[int], str], threads: int) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self._call = call
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Returns when the last calls have theirs."""
        self._over.set()
        for thread in self._threads:
            thread.join(120)

    def more(self, calls: int) -> None:
        """Wait until so many more were answered."""
        until = self.answered + calls
        Cluster.wait(lambda: self.answered >= until)

    def _run(self, number: int) -> None:
        while not self._over.is_set():
            try:
                problem = self._call(number)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            with self._lock:
                if problem:
                    self.wrong.append(problem)
                else:
                    self.answered += 1
