"""The extension's lines in the host's console."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("remote_vae")


def show_log() -> None:
    """One line a VAE call in the host's console, where the host shows no INFO lines itself."""
    if not any(isinstance(each, _Named) for each in log.filters):
        log.addFilter(_Named())
    if log.handlers:
        return
    log.addHandler(_Console())
    log.setLevel(logging.INFO)
    log.propagate = False


class _Named(logging.Filter):
    """Puts the extension's name before its lines, whoever prints them: SD.Next gives every logger its own handlers.

    The text is made here: one of SD.Next's handlers writes it into the record's ``msg`` and leaves its ``args``, at which the
    handlers after it fail.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = f"Remote VAE: {record.getMessage()}", None
        return True


class _Console(logging.Handler):
    """Prints to what is standard output by then: SD.Next redirects it while it loads scripts."""

    def emit(self, record: logging.LogRecord) -> None:
        # A line is not worth a picture: there may be no console, or one that has not all letters.
        try:
            stream = sys.stdout
            line = self.format(record).encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")
            stream.write(line.decode(getattr(stream, "encoding", None) or "utf-8") + "\n")
            # ComfyUI's keeps lines back where it is no terminal.
            stream.flush()
        except Exception:
            self.handleError(record)
