"""The command line: ``python -m remote_vae``, or ``python FOLDER/remote_vae`` where it is not installed, from anywhere."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Python puts the folder that it was given first, in which the package itself cannot be found.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from remote_vae.cli import main

sys.exit(main())
