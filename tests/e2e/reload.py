"""Presses Reload UI (SD.Next: Restart server) in a running web UI, and ends when it is back: for ``--reload`` of ``hosts``.

    python -m tests.e2e.reload http://127.0.0.1:7861 a1111.log

The second is the file that the host's output goes to. It is asked nothing before that says "Startup time" once more: a request
between the start of its page and that of its API ends AUTOMATIC1111.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.e2e.host import Host

BUTTONS = ("settings_restart_gradio", "restart_submit")
STARTED = b"Startup time"
SECONDS = 300.0


def press(host: Host) -> None:
    """What the page does when one of ``BUTTONS`` is pressed."""
    config = host.call("/config")
    found = [part["id"] for part in config["components"] if part.get("props", {}).get("elem_id") in BUTTONS]
    for place, dependency in enumerate(config["dependencies"]):
        # gradio 3 lists components, gradio 4 components with their events.
        targets = [target[0] if isinstance(target, list) else target for target in dependency["targets"]]
        if set(found) & set(targets):
            body = {
                "fn_index": dependency.get("id", place),
                "data": [None] * len(dependency["inputs"]),
                "session_hash": "reload",
            }
            # It goes away while it answers.
            with suppress(OSError):
                host.call("/run/predict", body)
            return
    raise SystemExit("no button that reloads this UI")


def is_back(host: Host, before: Any) -> bool:
    """Whether it is another start that answers."""
    try:
        return bool(host.call("/app_id") != before and host.call("/sdapi/v1/options"))
    except (OSError, ValueError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", help="its address")
    parser.add_argument("log", type=Path, help="the file that its output goes to")
    options = parser.parse_args()
    host = Host(options.host)
    before, starts = host.call("/app_id"), options.log.read_bytes().count(STARTED)
    press(host)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if options.log.read_bytes().count(STARTED) > starts and is_back(host, before):
            return 0
    raise SystemExit(f"{options.host} did not come back in {SECONDS:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
