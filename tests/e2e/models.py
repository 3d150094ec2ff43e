"""Every pipeline of diffusers whose VAE is known, with this project's server, and without.

    python -m tests.e2e.models [--markdown docs/models.md] [--only NAME ...]

Runs on a CPU in minutes and needs no network. Each pipeline of ``tests.e2e.pipelines`` is built with tiny random parts, its VAE
is saved to a folder, and this project's server serves that folder in a process of its own. Then the same picture or video is
made from the same seed:

- off: by the pipeline alone;
- remote: attached, with transfer raw, which must give the same bits where the VAE is called with contiguous tensors, and with
  u8, which may be one level of 255 off;
- killed: the server's process is killed (SIGKILL) while its VAE works on the first call. It waits there, in a hook before the
  first layer, so that the call is never done sooner. The picture must be the one of the pipeline alone, to the bit;
- short of memory: no server, and encoder and decoder run out of memory when they are called with a whole picture.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import torch

import remote_vae
from remote_vae.history import Record
from tests.e2e.picture_pipelines import PICTURE_PIPELINES
from tests.e2e.pipelines import Case
from tests.e2e.video_pipelines import VIDEO_PIPELINES
from tests.nearness import out_of_memory, psnr

CASES = (*PICTURE_PIPELINES, *VIDEO_PIPELINES)
LEVEL = 1 / 255
# Rounding to 8 bits, and back to float32.
SLACK = 0.02 / 255
# What other strides of the same numbers make in float32.
STRIDES = 1e-4
EXACT_DB = 100.0
# Of the VAE's own tiles, in latent cells, so that a small picture has some.
TILE, STRIDE = 4, 3
SERVER_SECONDS = 120.0


@dataclass
class Row:
    """What became of one pipeline.

    Attributes:
        calls: of its VAE, in order.
        contiguous: whether all of them had contiguous tensors.
        raw, u8, killed, short: what is said of each.
        problems: bars that were missed.
    """

    case: Case
    calls: list[str] = field(default_factory=list)
    contiguous: bool = True
    raw: str = ""
    u8: str = ""
    killed: str = ""
    short: str = ""
    problems: list[str] = field(default_factory=list)


# --- the server ------------------------------------------------------------------------------------------------------------


def _serve(folder: str, parent: Connection, holds: bool) -> None:
    """This project's server of the VAE in ``folder``. ``holds``: its VAE says when it is at work, and never ends."""
    from remote_vae.server.catalogue import OneVae
    from remote_vae.server.engine import Engine, batch_pixels_on
    from remote_vae.server.models import load_vae
    from remote_vae.server.process import make_server
    from remote_vae.server.run import listen

    torch.set_num_threads(1)
    loaded = load_vae(folder, dtype="float32", device="cpu")

    def hold(*_: Any) -> None:
        parent.send("at work")
        time.sleep(SERVER_SECONDS)

    if holds:
        for part in (loaded.vae.encoder, loaded.vae.decoder):
            part.register_forward_pre_hook(hold)
    listener = listen("127.0.0.1", 0)
    parent.send(listener.getsockname()[1])
    make_server(Engine(OneVae(loaded, about=loaded.about), batch_pixels=batch_pixels_on([loaded.device]))).run(
        sockets=[listener]
    )


@contextmanager
def served(folder: Path, *, holds: bool = False) -> Iterator[tuple[str, Any, Connection]]:
    """The server in a process of its own: its address, the process, and what it says."""
    # The processes are made from one that has only imported: a second each would be half of the time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remote_vae.server.run", "remote_vae.server.models", "diffusers.models.autoencoders"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(str(folder), theirs, holds), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(SERVER_SECONDS):
            raise RuntimeError("the server did not start")
        yield f"http://127.0.0.1:{ours.recv()}", process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


# --- one pipeline ----------------------------------------------------------------------------------------------------------


def look_at(case: Case, folder: Path) -> Row:
    """Make the picture of ``case`` in each way."""
    row = Row(case)
    try:
        pipe = case.make()
        pipe.vae.save_pretrained(folder)
        # Weights that were read from a file and equal ones that were not are multiplied in another order at times.
        pipe.vae = type(pipe.vae).from_pretrained(folder).eval().requires_grad_(False)
        local = _noted(row, pipe)
        with served(folder) as (url, _, _):
            _remote(row, pipe, url, local)
        with served(folder, holds=True) as (url, process, said):
            _killed(row, pipe, url, process, said, local)
        _short(row, pipe, local)
    except Exception as error:
        traceback.print_exc()
        row.problems.append(f"{type(error).__name__}: {error}")
    return row


def _noted(row: Row, pipe: Any) -> torch.Tensor:
    """What the pipeline makes alone; its calls are noted."""

    def noted(op: str, own: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            row.calls.append(op)
            row.contiguous = row.contiguous and tensor.is_contiguous()
            return own(tensor, *args, **kwargs)

        return call

    for op in ("decode", "encode"):
        setattr(pipe.vae, op, noted(op, getattr(pipe.vae, op)))
    try:
        return row.case.call(pipe)
    finally:
        del pipe.vae.decode, pipe.vae.encode


def _remote(row: Row, pipe: Any, url: str, local: torch.Tensor) -> None:
    for transfer in ("raw", "u8"):
        handle = remote_vae.attach(pipe, {"endpoint": url, "transfer": transfer})
        made = row.case.call(pipe)
        records = handle.history.records()
        handle.detach()
        elsewhere = [record for record in records if record.route != "remote"]
        if elsewhere or [record.op for record in records] != _asked(row, records):
            row.problems.append(f"{transfer}: {_told(records)}")
        said, passes = _compared(made, local, transfer, contiguous=row.contiguous)
        setattr(row, transfer, said)
        if not passes:
            row.problems.append(f"{transfer}: {said}")


def _asked(row: Row, records: list[Record]) -> list[str]:
    """Every call of the pipeline must be one of ours."""
    return row.calls if len(records) <= len(row.calls) else [record.op for record in records]


def _compared(made: torch.Tensor, local: torch.Tensor, transfer: str, *, contiguous: bool) -> tuple[str, bool]:
    """What is said of a remote picture, and whether it is what was promised."""
    if made.shape != local.shape:
        return f"{list(made.shape)} instead of {list(local.shape)}", False
    if torch.equal(made, local):
        return "same bits", True
    worst = float((made.double() - local.double()).abs().max())
    if transfer == "raw":
        return f"{worst:.0e} off (other strides)", not contiguous and worst <= STRIDES
    return f"{worst / LEVEL:.2f} levels", worst <= LEVEL + SLACK


def _killed(row: Row, pipe: Any, url: str, process: Any, said: Connection, local: torch.Tensor) -> None:
    seen = []

    def kill() -> None:
        with suppress(EOFError, OSError):
            seen.append(said.recv())
        process.kill()

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    handle = remote_vae.attach(pipe, {"endpoint": url, "transfer": "raw"})
    made = row.case.call(pipe)
    records = handle.history.records()
    handle.detach()
    process.kill()
    watcher.join(5)
    same = torch.equal(made, local)
    row.killed = "same bits" if same else "another picture"
    if not same or seen != ["at work"] or any(record.route != "local" for record in records):
        row.problems.append(f"killed: {row.killed}, the server said {seen}: {_told(records)}")


def _short(row: Row, pipe: Any, local: torch.Tensor) -> None:
    with no_room(pipe.vae, _cells(pipe)):
        handle = remote_vae.attach(pipe, {})
        made = row.case.call(pipe)
        records = handle.history.records()
        handle.detach()
    ways = Counter(record.detail or record.route for record in records)
    names = ", ".join(ways)
    if made.shape != local.shape or "failed" in {record.route for record in records} or not records:
        row.problems.append(f"short of memory: {_told(records)}")
    row.short = names
    if set(ways) == {"exact"}:
        nearness = psnr(made, local)
        row.short = f"exact, {'same bits' if nearness == float('inf') else f'{nearness:.0f} dB'}"
        if nearness < EXACT_DB:
            row.problems.append(f"short of memory: {row.short}")


def _cells(pipe: Any) -> int:
    from remote_vae.vae.families import family_of

    return family_of(pipe.vae).downscale


@contextmanager
def no_room(vae: Any, downscale: int) -> Iterator[None]:
    """Encoder and decoder of ``vae`` run out of memory on more than one of its own tiles, which are made small."""
    tiles = {name: value for name, value in vars(vae).items() if name.startswith("tile_") and "frames" not in name}
    for name in tiles:
        cells = STRIDE if "stride" in name else TILE
        value = 1 - STRIDE / TILE if "overlap_factor" in name else cells if "latent" in name else cells * downscale
        setattr(vae, name, value)
    for part, limit in ((vae.encoder, TILE * downscale), (vae.decoder, TILE)):

        def limited(tensor: torch.Tensor, *args: Any, own: Any = part.forward, limit: int = limit, **kwargs: Any) -> Any:
            if max(tensor.shape[-2:]) > limit:
                out_of_memory()
            return own(tensor, *args, **kwargs)

        part.forward = limited
    try:
        yield
    finally:
        del vae.encoder.forward, vae.decoder.forward
        vars(vae).update(tiles)


def _told(records: list[Record]) -> str:
    return "; ".join(map(str, records)) or "no call was ours"


# --- the table -------------------------------------------------------------------------------------------------------------


def markdown(rows: list[Row]) -> str:
    """The table, with what it was made with."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    for row in rows:
        case = row.case
        kind = f"`{case.pipeline}`" + (" (only its calls)" if case.calls else "")
        calls = ", ".join(f"{count} {op}" for op, count in Counter(row.calls).items())
        cells = (case.name, kind, f"`{_class_of(case)}`", calls, row.raw, row.u8, row.killed, row.short)
        lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| | **{problem}** | | | | | | |" for problem in row.problems]
    return _TEXT.format(table="\n".join(lines), made_with=_made_with(), date=date.today().isoformat(), tile=TILE)


_COLUMNS = (
    "pipeline", "class of diffusers", "VAE", "its calls",
    "remote, raw", "remote, u8", "server killed in mid-call", "short of memory",
)  # fmt: skip
_TEXT = """# Pipelines of diffusers with this project's server

Made by `python -m tests.e2e.models --markdown docs/models.md` on {date} ({made_with}).
Anyone can repeat it on a CPU, in minutes and without a network: every pipeline is built with tiny random parts, and its VAE is
the real class with the shapes and factors of the real model and few channels inside. The same seed in each column:

- **remote**: `attach(pipe)` with this project's server of the same VAE in a process of its own. raw: bit for bit what the
  pipeline makes alone, where it hands the VAE contiguous tensors. Pictures that go in are often views with other strides, which
  a convolution sums in another order. u8: off by at most so many of 255 levels.
- **server killed in mid-call**: the server's process is killed while its VAE works on the first call. Same bits: the picture is
  that of the pipeline alone.
- **short of memory**: no server, and the VAE's encoder and decoder raise `OutOfMemoryError` on anything larger than
  {tile} x {tile} latent cells. exact: in exact tiles, with the PSNR to the picture of the pipeline alone; the VAE's own tiling:
  overlapping tiles, blended by diffusers, which is another picture; on the CPU: a copy of the whole VAE there.

{table}
"""


def _class_of(case: Case) -> str:
    return type(case.make().vae).__name__


def _made_with() -> str:
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"Remote VAE {remote_vae.__version__}, {versions}, float32 on the CPU"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="pipelines whose name contains one of these")
    options = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    wanted = [case for case in CASES if not options.only or any(part.lower() in case.name.lower() for part in options.only)]
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for number, case in enumerate(wanted):
            started = time.monotonic()
            row = look_at(case, Path(folder) / str(number))
            rows.append(row)
            said = "; ".join((row.raw, row.u8, row.killed, row.short, *row.problems))
            print(f"{case.name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
