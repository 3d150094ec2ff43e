"""``remote-vae bench``: how fast an endpoint is, by the size of the pictures, their form, and the number of clients."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remote_vae.errors import SettingsError
from remote_vae.remote.endpoints import endpoint_for
from remote_vae.settings import Settings
from remote_vae.tools.asking import family_of, side_of
from remote_vae.tools.crowd import FORMATS, Cell, Crowd, Row
from remote_vae.vae.families import Family

_SIZES = "256,512,1024"
_MOST_CLIENTS = 32
# Largest side in pixels, clients and seconds that are taken for what is meant.
_LARGEST, _CROWD, _LONGEST = 16384, 256, 3600.0
_HEAD = (
    f"{'px':>6} {'format':>7} {'clients':>8} {'pictures/s':>11} {'median ms':>10} {'p99 ms':>8} "
    f"{'MB up':>8} {'MB down':>8} {'refused':>8}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``remote-vae bench``."""
    parser.add_argument("endpoint", help="URL of the server, such as http://HOST:7870")
    parser.add_argument("--family", help="whose VAE the endpoint has, where it does not say so itself")
    parser.add_argument("--sizes", default=_SIZES, help=f"sides of the pictures in pixels ({_SIZES})")
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help=f"what is asked for ({','.join(FORMATS)}); encode: latents"
    )
    parser.add_argument("--clients", type=int, default=_MOST_CLIENTS, help="at once, from 1 doubled up to so many (32)")
    parser.add_argument(
        "--clients-size", type=int, help="side of their pictures in pixels (512, or else the smallest of --sizes)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for which each line of the table asks (3)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it as well; needs matplotlib")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table; 0 where a picture came of each line's calls, 130 where it was interrupted."""
    sizes, forms = _checked(options)
    write = _plotter(options.plot) if options.plot else None
    settings = Settings.from_mapping({"endpoint": options.endpoint})
    family = family_of("decode", options.family, settings)
    url, _ = endpoint_for("decode", family, settings)
    crowd, rows, status = Crowd(url, family, options.seconds), [], 0
    cells = list(_cells(family, sizes, forms, options))
    try:
        with _progress(len(cells)) as progress:
            for cell in cells:
                progress(cell)
                rows.append(crowd.measured(cell))
    except KeyboardInterrupt:
        status = 130
    print(f"{family.label} at {options.endpoint}, {options.seconds:g} s a line; MB are those of a picture")
    print("\n".join([_HEAD, *map(_line, rows)]))
    if write is not None and rows:
        write(rows)
        print(f"plot: {options.plot}")
    return status or int(not all(row.milliseconds for row in rows))


def _checked(options: argparse.Namespace) -> tuple[list[int], list[str]]:
    """The sizes and the forms. Raises SettingsError."""
    forms = [form.strip() for form in options.formats.split(",")]
    for form in forms:
        if form not in FORMATS:
            raise SettingsError(f"--formats must be of {', '.join(FORMATS)}, not {form}")
    try:
        sizes = sorted({int(size) for size in options.sizes.split(",")})
    except ValueError:
        raise SettingsError(f"--sizes must be sides in pixels, such as {_SIZES}, not {options.sizes}") from None
    if options.clients_size is None:
        options.clients_size = 512 if 512 in sizes else sizes[0]
    for size in (*sizes, options.clients_size):
        if not 8 <= size <= _LARGEST:
            raise SettingsError(f"a side must be from 8 to {_LARGEST} pixels, not {size}")
    if not 1 <= options.clients <= _CROWD:
        raise SettingsError(f"--clients must be from 1 to {_CROWD}, not {options.clients}")
    if not 0.0 < options.seconds <= _LONGEST:
        raise SettingsError(f"--seconds must be more than 0 and at most {_LONGEST:g}, not {options.seconds:g}")
    return sizes, forms


def _cells(family: Family, sizes: Sequence[int], forms: Sequence[str], options: argparse.Namespace) -> Iterator[Cell]:
    """What is measured: each size in each form with one client, then one of them with more and more."""
    for side in dict.fromkeys(side_of(family, size) for size in sizes):
        for form in forms:
            yield Cell(side, form, 1)
    form = "u8" if "u8" in forms else forms[0]
    clients = 1 if options.clients_size not in sizes else 2
    while clients <= options.clients:
        yield Cell(side_of(family, options.clients_size), form, clients)
        clients *= 2


def _line(row: Row) -> str:
    head = f"{row.cell.side:>6} {row.cell.form:>7} {row.cell.clients:>8}"
    if not row.milliseconds:
        return f"{head} {row.problem or 'no answer'}"
    problem = f"  {row.failed} failed: {row.problem}" if row.failed else ""
    return (
        f"{head} {row.rate:>11.3g} {row.quantile(0.5):>10.0f} {row.quantile(0.99):>8.0f} "
        f"{row.megabytes_up:>8.3g} {row.megabytes_down:>8.3g} {row.refused:>8}{problem}"
    )


# --- progress and plot ---------------------------------------------------------------------------------------------------


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Cell], None]]:
    """Says on standard error what is measured now: as a bar where tqdm is installed, else a line each."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = iter(range(1, total + 1))
        yield lambda cell: print(f"{next(done)}/{total}: {cell}", file=sys.stderr, flush=True)
        return
    with tqdm(total=total, file=sys.stderr, leave=False, unit="line") as bar:
        # The first is being measured, and not done.
        begun = iter([0, *[1] * total])

        def show(cell: Cell) -> None:
            bar.set_description_str(str(cell), refresh=False)
            bar.update(next(begun))
            bar.refresh()

        yield show


def _plotter(path: Path) -> Callable[[Sequence[Row]], None]:
    """What draws rows into ``path``. Raises ImportError: no matplotlib; SettingsError: no place for it."""
    from matplotlib.figure import Figure

    kinds: Any = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise SettingsError(f"--plot {path}: name a picture file, such as bench.png")
    if not path.parent.is_dir():
        raise SettingsError(f"--plot {path}: there is no folder {path.parent}")
    return lambda rows: _draw(Figure(figsize=(10, 7), layout="constrained"), rows, path)


def _draw(figure: Any, rows: Sequence[Row], path: Path) -> None:
    good = [row for row in rows if row.milliseconds]
    last = good[-1].cell if good else Cell(0, "", 0)
    alone = [row for row in good if row.cell.clients == 1]
    crowd = [row for row in good if (row.cell.side, row.cell.form) == (last.side, last.form)]
    of_sides, of_clients = figure.subplots(2, 2)
    for form in dict.fromkeys(row.cell.form for row in alone):
        lines = [row for row in alone if row.cell.form == form]
        _draw_lines(of_sides, [row.cell.side for row in lines], lines, form, 0.5)
    _draw_lines(of_clients, [row.cell.clients for row in crowd], crowd, f"{last.form}, {last.side} px", 0.99)
    for (rate, wait), along, named in ((of_sides, "side, px (one client)", "median"), (of_clients, "clients", "p99")):
        rate.set(ylabel="pictures/s", xlabel=along, ylim=(0, None))
        wait.set(ylabel=f"ms, {named}", xlabel=along, ylim=(0, None))
        rate.legend()
    figure.savefig(path, dpi=120)


def _draw_lines(pair: Any, along: Sequence[int], rows: Sequence[Row], label: str, quantile: float) -> None:
    """One line in each of two places: pictures a second, and milliseconds."""
    pair[0].plot(along, [row.rate for row in rows], marker="o", label=label)
    pair[1].plot(along, [row.quantile(quantile) for row in rows], marker="o", label=label)
