"""python -m remote_vae: the command line."""

from __future__ import annotations

import sys

from remote_vae.cli import main

sys.exit(main())
