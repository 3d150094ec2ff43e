"""What the driver saw, held to the bars, as Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tests.e2e.host import Shot
from tests.e2e.rows import PREVIEW, SHARED_SOURCE, Row

REMOTE = ("remote raw", "remote u8")
HANGING = ("hangs", "hangs, /info too")
FAILING = ("refused", *HANGING, "503", "NaN")
# The default of first_byte_timeout.
HANG_DEADLINE = 20.0
CANCEL_DEADLINE = 0.2
# Seconds that a busy machine may add to what is measured.
SLACK = 1.0


@dataclass
class Cell:
    """One row in one situation.

    Attributes:
        shot, local: what came back, and from the host alone.
        requests: paths of the VAE calls that reached the endpoint.
        infos: the questions who it is.
        progress: the host's progress line while the endpoint was waited for.
        after_interrupt: seconds from Interrupt to the pictures; None: not pressed.
        problem: why there is no picture at all.
    """

    shot: Shot = field(default_factory=Shot)
    local: Shot = field(default_factory=Shot)
    requests: list[str] = field(default_factory=list)
    infos: list[str] = field(default_factory=list)
    progress: str = ""
    after_interrupt: float | None = None
    problem: str = ""

    @property
    def levels(self) -> int | None:
        """The largest difference to local; None where the pictures are not the same number or size."""
        return levels_between(self.shot.pictures, self.local.pictures)

    @property
    def extra(self) -> float:
        """Seconds more than local."""
        return self.shot.seconds - self.local.seconds

    @property
    def asked(self) -> str:
        """The requests, such as "1 encode, 1 decode"."""
        counts = Counter(path.strip("/") for path in self.requests)
        return ", ".join(f"{count} {op}" for op, count in sorted(counts.items(), reverse=True)) or "none"

    @property
    def claim(self) -> str:
        """What the infotext says of the VAE; empty where it says nothing."""
        found = re.search(r'Remote VAE: ("(?:[^"\\]|\\.)*"|[^,\n]*)', self.shot.infotext)
        return found[1].strip('"') if found else ""

    @property
    def text(self) -> str:
        if self.problem:
            return self.problem.splitlines()[0][:60]
        if self.levels is None:
            same = len(self.shot.pictures) == len(self.local.pictures)
            return "another size" if same else f"{len(self.shot.pictures)} of {len(self.local.pictures)} pictures"
        return str(self.levels)


def levels_between(pictures: list[np.ndarray], reference: list[np.ndarray]) -> int | None:
    """The largest difference in levels of 255; None where the pictures are not the same number or size."""
    if [picture.shape for picture in pictures] != [picture.shape for picture in reference]:
        return None
    return max((int(np.abs(a - b).max()) for a, b in zip(pictures, reference, strict=True)), default=None)


class Report:
    """All cells of one host.

    Args:
        host: its name and version.
        interrupt_ends_job: whether Interrupt ends the host's job; what is shown then is the next one.

    Attributes:
        untiled: rows that ask for overlapping tiles, by the host alone and without them.
        local, again: every row by the host alone, twice.
        baseline: the same from a run without the extension; empty where there is none.
        seconds: what the whole run took.
    """

    def __init__(self, host: str, *, interrupt_ends_job: bool = False) -> None:
        self.untiled: dict[str, Shot] = {}
        self.local: dict[str, Shot] = {}
        self.again: dict[str, Shot] = {}
        self.baseline: dict[str, Shot] = {}
        self.seconds = 0.0
        self._host = host
        self._interrupt_ends_job = interrupt_ends_job
        self._cells: dict[tuple[str, str], Cell] = {}
        self._rows: dict[str, Row] = {}
        self._situations: list[str] = []

    def reference(self, situation: str, row: Row) -> Shot:
        """What a cell is held to: an endpoint makes no tiles."""
        return self.untiled[row.name] if row.untiled and situation in (*REMOTE, "Interrupt") else self.local[row.name]

    def add(self, situation: str, row: Row, cell: Cell) -> None:
        self._cells[situation, row.name] = cell
        self._rows[row.name] = row
        if situation not in self._situations:
            self._situations.append(situation)

    # --- the bars ------------------------------------------------------------------------------------------------------

    def misses(self) -> list[str]:
        found = []
        for (situation, name), cell in self._cells.items():
            found += [f"{situation}, {name}: {miss}" for miss in self._misses_of(cell, situation, self._rows[name])]
        return found + [f"off, {name}: {text}" for name, text in self._against_baseline() if text]

    def _misses_of(self, cell: Cell, situation: str, row: Row) -> Iterator[str]:
        if cell.problem:
            yield cell.problem
            return
        allowed = self._allowed(situation, row)
        if len(cell.shot.pictures) != row.pictures:
            yield f"{len(cell.shot.pictures)} of {row.pictures} pictures"
        elif cell.shot.saved != cell.local.saved:
            yield f"{cell.shot.saved} files saved, {cell.local.saved} by the host alone"
        elif cell.levels is None or (allowed is not None and cell.levels > allowed):
            yield f"{cell.text} levels from local, {allowed} allowed"
        yield from self._misses_in_requests(cell, situation, row)
        yield from self._misses_in_infotext(cell, situation, row)
        if situation in HANGING:
            unanswered = len(cell.requests) + (len(cell.infos) if situation != "hangs" else 0)
            if unanswered > 1 or cell.extra > 1.5 * HANG_DEADLINE:
                yield f"{unanswered} requests waited for, {cell.extra:.1f} s more than local"
        if situation == "Interrupt":
            limit = CANCEL_DEADLINE + SLACK + (0.0 if self._interrupt_ends_job else cell.local.seconds)
            if cell.after_interrupt is None:
                yield "over before Interrupt was pressed"
            elif cell.after_interrupt > limit:
                yield f"{cell.after_interrupt:.1f} s from Interrupt to the picture, at most {limit:.1f} s with a local decode"

    def _noise(self, name: str) -> int:
        """How far two runs of the host alone are from each other: 0, or at least 1 where it draws without a seed."""
        if name not in self.again:
            return 0
        return levels_between(self.local[name].pictures, self.again[name].pictures) or 0

    def _allowed(self, situation: str, row: Row) -> int | None:
        """How many levels from local; None: any number, as 8 bits in between are what another pass begins with."""
        # The job after one that was interrupted is as remote as any.
        is_u8 = situation == "remote u8" or (situation == "Interrupt" and self._interrupt_ends_job)
        if is_u8 and row.decodes_in_between:
            return None
        some_are_remote = situation in (*REMOTE, "Interrupt") or (situation == "503" and row.batch > 1)
        return max(1 if some_are_remote else 0, self._noise(row.name))

    def _misses_in_requests(self, cell: Cell, situation: str, row: Row) -> Iterator[str]:
        encodes, decodes = cell.requests.count("/encode"), cell.requests.count("/decode")
        if situation == "off" and cell.requests + cell.infos:
            yield f"asked the endpoint all the same: {cell.asked}"
        if situation in (*REMOTE, "hangs", "503", "NaN") and not cell.requests:
            yield "asked the endpoint for nothing"
        if situation in REMOTE and row.name == PREVIEW and decodes > 1:
            yield f"{decodes - 1} requests from previews"
        if situation in REMOTE and row.name == SHARED_SOURCE and encodes != 1:
            yield f"{encodes} encodes of one source"

    def _misses_in_infotext(self, cell: Cell, situation: str, row: Row) -> Iterator[str]:
        says_remote = "remote" in cell.claim
        if situation in REMOTE and cell.requests and not says_remote:
            yield f"the infotext does not say remote: {cell.claim!r}"
        if situation in FAILING and not (situation == "503" and row.batch > 1) and says_remote:
            yield f"the infotext says remote: {cell.claim!r}"
        if situation == "off" and cell.claim:
            yield f"the infotext names the extension: {cell.claim!r}"

    def _against_baseline(self) -> Iterator[tuple[str, str]]:
        """Rows that the host without the extension gave, with what is wrong with "off", or nothing."""
        for name, shot in self.baseline.items():
            if name in self.local:
                levels = levels_between(self.local[name].pictures, shot.pictures)
                wrong = levels is None or levels > self._noise(name)
                yield name, f"{levels} levels from the host without the extension" if wrong else ""

    # --- Markdown ------------------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        ran = f"{len(self._cells)} cells, {sum(not cell.problem for cell in self._cells.values())} of them with pictures"
        lines = [f"## {self._host}", "", f"{ran}, {self.seconds / 60:.0f} minutes.", ""]
        lines += self._table()
        lines += [""] + [f"- {line}" for line in self._summary()] + [""]
        misses = self.misses()
        lines += ["Bars missed:", "", *(f"- {miss}" for miss in misses)] if misses else ["No bar was missed."]
        return "\n".join(lines) + "\n"

    def _table(self) -> list[str]:
        head = ["", "two local runs", *self._situations, "requests (remote raw)"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name in self._rows:
            cells = [(situation, self._cells[situation, name]) for situation in self._situations]
            texts = [self._text(situation, cell) for situation, cell in cells]
            raw = self._cells.get(("remote raw", name), Cell())
            lines.append("| " + " | ".join([name, str(self._noise(name)), *texts, raw.asked]) + " |")
        return lines

    def _text(self, situation: str, cell: Cell) -> str:
        text = cell.text.replace("|", "/")
        if situation in HANGING and not cell.problem:
            text += f" ({cell.extra:+.1f} s)"
        if cell.after_interrupt is not None:
            text += f" ({cell.after_interrupt:.1f} s)"
        return text

    def _summary(self) -> Iterator[str]:
        preview, shared = self._cells.get(("remote raw", PREVIEW)), self._cells.get(("remote raw", SHARED_SOURCE))
        if preview:
            yield f"live previews seen at {preview.shot.previews} steps; requests meanwhile: {preview.asked}"
        if shared:
            yield f"{SHARED_SOURCE}: {shared.asked}"
        for situation, name in (
            ("remote raw", "img2img"),
            ("remote u8", "txt2img"),
            *((failing, "img2img") for failing in FAILING),
            ("503", "batch of 3"),
            ("Interrupt", "txt2img"),
        ):
            cell = self._cells.get((situation, name))
            if cell and not cell.problem:
                yield f"infotext, {situation}, {name}: {f'`Remote VAE: {cell.claim}`' if cell.claim else 'no word of it'}"
        interrupt = self._cells.get(("Interrupt", "txt2img"))
        if interrupt and interrupt.after_interrupt is not None:
            whole = f"{interrupt.local.seconds:.2f} s is the whole of it locally"
            yield f"Interrupt to picture, txt2img: {interrupt.after_interrupt:.2f} s ({whole})"
            yield f"the host's progress line meanwhile: `{interrupt.progress}`"
        if self.baseline:
            compared = [not text for _, text in self._against_baseline()]
            near = f"{sum(compared)} of {len(compared)} rows as near as two local runs"
            yield f"off, against the host without the extension: {near}"
