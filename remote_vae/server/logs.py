"""What the server writes while it works: a line a call, as text or as JSON. A client can never make two lines of it."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

from remote_vae.wire.errors import one_line

# A line a call: ``remote-vae serve`` shows them.
calls = logging.getLogger("remote_vae.calls")

_TIME = "%Y-%m-%d %H:%M:%S"
# Of what a client has chosen (a path, the text of an error), so much is written.
_SHOWN = 300


@dataclass(frozen=True)
class CallLine:
    """What is written of one call.

    Attributes:
        route: decode or encode; of a request that was refused by its head, the path.
        client: the address it came from.
        status: of the answer; 499: the client hung up before it.
        model: name of the VAE; "" where none was picked.
        size: what it made or took, as ``Size`` writes it; "" where that is not known.
        batch: pictures, or videos, that were made at once with its own; 0: it did not come to that.
        waited, took: seconds before the VAE began, and that it worked.
        received, sent: bytes of the bodies.
        error: what the client was told, where that was an error.
    """

    route: str
    client: str
    status: int
    model: str = ""
    size: str = ""
    batch: int = 0
    waited: float = 0.0
    took: float = 0.0
    received: int = 0
    sent: int = 0
    error: str = ""

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.route, self.model, self.size)))
        came = self.error or f"{self.sent / 1e6:.1f} MB"
        together = f", {self.batch} in a batch" if self.batch > 1 else ""
        times = f"; waited {self.waited:.2f} s, took {self.took:.2f} s{together}" if self.model else ""
        return one_line(f"{what} for {self.client}: {self.status}, {came}{times}", 2 * _SHOWN)

    def as_json(self) -> dict[str, Any]:
        """Its fields; those that a client chooses are cut."""
        entries = {name: one_line(value, _SHOWN) if isinstance(value, str) else value for name, value in asdict(self).items()}
        return {**entries, "waited": round(self.waited, 4), "took": round(self.took, 4)}


def write(line: CallLine) -> None:
    """One line of the log."""
    calls.info("%s", line, extra={"call": line})


def set_format(log_format: str, *, verbose: bool = False) -> None:
    """What the process writes to its standard error from here on: "text" or "json".

    Args:
        verbose: whether text also says where an error comes from; JSON always does.
    """
    form: logging.Formatter = _Json() if log_format == "json" else _Text(verbose=verbose)
    for handler in logging.getLogger().handlers:
        # Those of others (a test's, a service's) stay as they are.
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(form)


class _Text(logging.Formatter):
    """The time and the text."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__("%(asctime)s %(message)s", _TIME)
        self._verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if self._verbose else f"{self.formatTime(record, _TIME)} {record.getMessage()}"


class _Json(logging.Formatter):
    """An object a line: time (UTC), level, logger, message; of a call its fields; of an error its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entries: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = getattr(record, "call", None)
        if isinstance(call, CallLine):
            entries |= call.as_json()
        if record.exc_info:
            entries["traceback"] = self.formatException(record.exc_info)
        # ASCII alone: no terminal, file or collector makes a line end of what a client has sent.
        return json.dumps(entries, ensure_ascii=True, default=str)
