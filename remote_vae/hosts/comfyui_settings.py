"""The settings as ComfyUI keeps them: those that were changed, in the user's comfy.settings.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from remote_vae.settings import Settings, load_options

log = logging.getLogger("remote_vae")

# Before the option's name in the file, and in the page.
PREFIX = "RemoteVAE."


class StoredSettings:
    """Reads the file when it has changed. May be used from many threads.

    Args:
        path: the file; None: there is none, and all is as it is by default.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._stamp: object = ()
        self._settings = Settings()

    def now(self) -> Settings:
        """The settings as they are now; what cannot be used is its default, with one line in the log. Never raises."""
        stamp = self._stamped()
        if stamp != self._stamp:
            values = self._read()
            # ComfyUI writes into the file itself: half of it is no reason to forget what was set.
            if values is not None:
                self._settings, problems = Settings.forgiving(values)
                self._stamp = stamp
                for problem in problems:
                    log.warning("Settings: %s", problem)
        return self._settings

    def locale(self) -> str:
        """The language that the user has chosen for ComfyUI, such as "zh"; "": none."""
        return str((self._stored() or {}).get("Comfy.Locale") or "")

    def _stamped(self) -> object:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size)

    def _read(self) -> dict[str, object] | None:
        stored = self._stored()
        return None if stored is None else {key: stored[PREFIX + key] for key in load_options() if PREFIX + key in stored}

    def _stored(self) -> dict[str, object] | None:
        """What is in the file; None: half of it, or something else."""
        if self._path is None or not self._path.exists():
            return {}
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored if isinstance(stored, dict) else None
