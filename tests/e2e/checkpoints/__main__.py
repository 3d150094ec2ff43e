"""Makes small checkpoints of random weights for a host, where it looks for them: those that the tables of docs/hosts.md need.

    python -m tests.e2e.checkpoints a1111 ~/stable-diffusion-webui

Kinds are a1111, forge (Forge Neo too), sdnext and comfyui. The folder is the host's own, of a clone that is for this alone: for
a1111 and forge it also makes the host's configuration of SD 1 smaller, so that real checkpoints do not load there any more (git
checkout in the clone takes that back). A config.json is written where there is none. The same seed makes the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.e2e.checkpoints.kinds import KINDS, Made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path, help="of the host; made if it is not there")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    options = parser.parse_args(arguments)

    folder = options.folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    made = KINDS[options.kind](folder, options.seed)
    for path in made.written:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        print(f"{sum(file.stat().st_size for file in files) / 2**20:8.1f} MiB  {path}")
    if made.settings:
        print(settings(folder / "config.json", made))
    print("\nServe its VAE, and drive the host (docs/hosts.md says how it is started):\n")
    print(f"  remote-vae serve --vae {made.serve} --family sd1 --port 7899")
    print("  python -m tests.e2e.hosts --host ADDRESS --server http://127.0.0.1:7899 \\")
    print(f"      --vae {made.vae} --checkpoint {made.checkpoint}")
    return 0


def settings(path: Path, made: Made) -> str:
    """Write the host's settings unless it has some; what to say of it."""
    wanted = json.dumps(made.settings, indent=2)
    if path.exists():
        return f"\n{path} is there, and is left as it is. It has to say:\n{wanted}"
    path.write_text(wanted + "\n", encoding="utf-8")
    return f"\n{path} was written."


if __name__ == "__main__":
    sys.exit(main())
