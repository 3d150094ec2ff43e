"""Drives a running AUTOMATIC1111, Forge, Forge Neo, SD.Next or ComfyUI with the extension installed, and writes the tables.

    python -m tests.e2e.hosts --host http://127.0.0.1:7861 --server http://127.0.0.1:7870 --markdown a1111.md

The server must have the VAE of the host's checkpoint: remote-vae serve --vae CHECKPOINT.safetensors --family sd1.
AUTOMATIC1111, Forge and Forge Neo keep the endpoint from their API: set it to http://127.0.0.1:7979 in the panel (--port names
another).
Everything is generated with the extension switched off first; every cell is the largest difference to that, in levels of 255.
The extension has its default settings but for what a column's name says; each picture has to be saved as the host alone does.
Ends with status 1 and a list if a bar is missed.

With --save-baseline FILE nothing is compared: the host, started without the extension, gives the pictures that a later run with
--baseline FILE holds "off" to.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.chaos import Chaos
from tests.e2e.comfyui import ComfyRows, ComfyUi
from tests.e2e.host import EXTENSION, Host, Shot, find_host
from tests.e2e.report import REMOTE, Cell, Report
from tests.e2e.rows import Names, Row, Rows


@dataclass(frozen=True)
class Situation:
    """A column: the extension's options and what the endpoint does.

    Attributes:
        mode: of the ``Chaos`` in between; "refused": it does not listen.
        fail_at: number of the request that ``mode`` is for, by the row and the requests it made when all was well.
        info: the mode for the endpoint's /info; "mode" for the same.
        interrupt: whether Interrupt is pressed while that request is waited for.
    """

    name: str
    options: dict[str, object] = field(default_factory=dict)
    mode: str = "pass"
    fail_at: Callable[[Row, list[str]], int | None] = lambda *_: None
    info: str = "pass"
    interrupt: bool = False


def one_of_the_batch(row: Row, requests: list[str]) -> int | None:
    """The second picture of a batch, as png goes out in parallel; all requests where there is no batch."""
    return None if row.batch == 1 else requests.count("/encode") + 1


def the_last(_: Row, requests: list[str]) -> int | None:
    return len(requests) - 1


SITUATIONS = (
    Situation("remote raw", {"transfer": "raw"}),
    Situation("remote u8", {"transfer": "u8"}),
    Situation("refused", mode="refused"),
    Situation("hangs", mode="hang"),
    Situation("hangs, /info too", mode="hang", info="mode"),
    Situation("503", {"transfer": "png"}, "503", one_of_the_batch),
    Situation("NaN", mode="nan"),
    Situation("Interrupt", mode="hang", fail_at=the_last, interrupt=True),
    # Last, so that it shows what the others have left behind.
    Situation("off", {"enabled": False}),
)


class Interrupter(threading.Thread):
    """Presses Interrupt half a second after request ``number`` has reached ``chaos``."""

    def __init__(self, host: Host, chaos: Chaos, number: int) -> None:
        super().__init__(daemon=True)
        self._host, self._chaos, self._number = host, chaos, number
        self.over = threading.Event()
        self.pressed: float | None = None
        # The host's progress line while the endpoint was waited for.
        self.progress = ""

    def run(self) -> None:
        while len(self._chaos.requests) <= self._number:
            if self.over.wait(0.01):
                return
        time.sleep(0.5)
        self.progress = self._host.progress_text()
        self.pressed = time.monotonic()
        self._host.interrupt()


class Driver:
    """Runs rows in situations and keeps what came out in a ``Report``."""

    def __init__(self, host: Host, server: str, port: int, rows: list[Row], report: Report) -> None:
        self._host, self._server, self._port = host, server, port
        self._rows = rows
        self._report = report
        # What each row asks for when all is well.
        self._requests: dict[str, list[str]] = {}
        self._cells = 0

    def local(self) -> dict[str, Shot]:
        """Every row by the host alone, in the way it is set up."""
        shots = {}
        for row in self._rows:
            shots[row.name] = row.run()
            print(f"{'local':18}{row.name:34}{shots[row.name].seconds:.1f} s", flush=True)
            if any(picture.std() < 1.0 for picture in shots[row.name].pictures):
                raise SystemExit(f"{row.name}: the host alone gives an empty picture, which proves nothing")
            if row.untiled is not None and row.name not in self._report.untiled:
                self._report.untiled[row.name] = row.untiled()
        return shots

    def run(self, situations: list[Situation]) -> None:
        """All rows of one situation come before the next one: no row follows itself, whose picture a host might show again."""
        for situation in situations:
            for row in self._rows:
                cell = self._cell(row, situation)
                self._report.add(situation.name, row, cell)
                print(f"{situation.name:18}{row.name:34}{cell.text}   {cell.asked}", flush=True)

    def _cell(self, row: Row, situation: Situation) -> Cell:
        chaos = Chaos(self._server, self._port)
        try:
            fail_at = situation.fail_at(row, self._requests.get(row.name, []))
            if situation.interrupt and fail_at is not None and fail_at < 0:
                return Cell(problem="no request to wait for")
            chaos.info = situation.info
            chaos.reset(situation.mode, fail_at)
            if situation.mode == "refused":
                chaos.close()
            # Changed settings end the pause after an earlier failure.
            self._cells += 1
            self._host.extension(**{"enabled": True, **situation.options, "connect_timeout": 3 + self._cells / 1000})
            presser = Interrupter(self._host, chaos, fail_at or 0)
            if situation.interrupt:
                presser.start()
            shot = self._shot(row, presser)
            requests, infos, ended = list(chaos.requests), list(chaos.infos), shot.ended
            if situation.interrupt and self._host.interrupt_ends_job:
                if len(shot.pictures) == row.pictures:
                    return Cell(problem="pictures of a job that was interrupted", requests=requests)
                # The next job is remote as ever: the press was no failure of the endpoint.
                chaos.reset("pass")
                shot, requests = row.run(), list(chaos.requests)
            cell = Cell(shot, self._report.reference(situation.name, row), requests, infos, progress=presser.progress)
            if situation.interrupt:
                cell.after_interrupt = None if presser.pressed is None else ended - presser.pressed
        except (urllib.error.URLError, subprocess.CalledProcessError) as error:
            body = error.read()[:300].decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            return Cell(problem=f"{error} {body}".strip(), requests=list(chaos.requests))
        finally:
            chaos.close()
        if situation.name in REMOTE:
            # One that was sent again, on a new connection, is not asked for the next time.
            known = self._requests.get(row.name, cell.requests)
            self._requests[row.name] = min(known, cell.requests, key=len)
        return cell

    def _shot(self, row: Row, presser: Interrupter) -> Shot:
        try:
            return row.run()
        finally:
            presser.over.set()
            if presser.is_alive():
                presser.join()


def wait_for(server: str, seconds: float = 300.0) -> None:
    """Until the server has loaded its VAE: it answers 503 before, and refuses connections before that."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while True:
        try:
            opener.open(f"{server.rstrip('/')}/health", timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"{server}: no Remote VAE server that is ready: {error}") from None
        time.sleep(0.5)


def save_baseline(path: Path, shots: dict[str, Shot]) -> None:
    pictures = {f"{name}/{index}": each for name, shot in shots.items() for index, each in enumerate(shot.pictures)}
    np.savez_compressed(path, **{name: each.astype(np.uint8) for name, each in pictures.items()})


def load_baseline(path: Path) -> dict[str, Shot]:
    shots: dict[str, Shot] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            shots.setdefault(key.rpartition("/")[0], Shot()).pictures.append(arrays[key].astype(int))
    return shots


def chosen(names: list[str], only: list[str]) -> list[str]:
    """Those that begin with one of ``only``; all where none does."""
    return [name for name in names if any(name.startswith(wanted) for wanted in only)] or names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="address of the running host")
    parser.add_argument("--server", default="", help="address of a Remote VAE server with the same VAE")
    parser.add_argument("--port", type=int, default=7979, help="of the endpoint in between, before the server (7979)")
    parser.add_argument("--vae", default="", help="another VAE, by the host's name; without it no VAE switch")
    parser.add_argument("--checkpoint", default="", help="another checkpoint, by the host's name; without it no model switch")
    parser.add_argument("--reload", default="", help="command that reloads the UI and ends when it is back")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    parser.add_argument("--baseline", type=Path, help="pictures of the host without the extension (.npz)")
    parser.add_argument("--save-baseline", type=Path, help="write them; the host must run without the extension")
    parser.add_argument("--by-node", action="store_true", help="ComfyUI: switch on by the node Remote VAE in each graph")
    parser.add_argument("--round-trip", default="", help="ComfyUI: only encode and decode, by the VAE of this name")
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of the names of rows and of columns")
    options = parser.parse_args()

    # Whoever ends the driver gets the host's model and settings back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started = time.monotonic()
    host = find_host(options.host)
    if options.server:
        wait_for(options.server)
    host.options(host.no_previews)
    switches = Names(options.vae, options.checkpoint, options.reload, options.round_trip)
    if isinstance(host, ComfyUi):
        host.by_node = options.by_node
        host.listen()
        rows = ComfyRows(host, switches).all()
    else:
        rows = Rows(host, switches).all()
    names = chosen([row.name for row in rows], options.only)
    rows = [row for row in rows if row.name in names]
    report = Report(f"{host.name} {host.version()}", interrupt_ends_job=host.interrupt_ends_job)
    driver = Driver(host, options.server, options.port, rows, report)
    if options.save_baseline:
        save_baseline(options.save_baseline, driver.local())
        return 0
    if not options.server:
        parser.error("--server is needed")
    if options.baseline:
        report.baseline = load_baseline(options.baseline)

    names = chosen([situation.name for situation in SITUATIONS], options.only)
    # What each row asks for is known from these.
    situations = [situation for situation in SITUATIONS if situation.name in (*names, *REMOTE)]
    host.extension()
    host.set_endpoint(f"http://127.0.0.1:{options.port}")
    try:
        with tempfile.TemporaryDirectory() as folder, host.saving_into(Path(folder)):
            report.local, report.again = driver.local(), driver.local()
            for name, shot in report.local.items():
                # Whatever comes first has something to load.
                shot.seconds = min(shot.seconds, report.again[name].seconds)
            driver.run(situations)
    finally:
        host.extension(**EXTENSION)
    report.seconds = time.monotonic() - started
    text = report.markdown()
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    return 1 if report.misses() else 0


if __name__ == "__main__":
    sys.exit(main())
