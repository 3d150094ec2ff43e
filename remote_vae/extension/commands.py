"""What to type on the other machine."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
_REPOSITORY = "https://ADDRESS-OF-THIS-REPOSITORY"


def server_commands(checkpoint: str, family: str) -> tuple[str, str]:
    """What to type on the other machine: to install the server, and to start it with the VAE of the user's checkpoint.

    Args:
        checkpoint: path or name of the file that is loaded here; "" where none is.
        family: its key in families.toml; "" where it is not known.
    """
    name = Path(checkpoint).name if checkpoint else "YOUR-CHECKPOINT.safetensors"
    named = f" --family {family}" if family and family != "custom" else ""
    return (
        # Debian's and Ubuntu's Python refuse to install outside of an environment.
        f'python3 -m venv remote-vae && remote-vae/bin/pip install "sd-webui-remote-vae[server] @ git+{repository()}"',
        f"remote-vae/bin/remote-vae serve --vae {shlex.quote(name)}{named} --host 0.0.0.0",
    )


def repository() -> str:
    """Where this checkout was cloned from; what stands for it where that cannot be told."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        config.read(_CHECKOUT / ".git" / "config", encoding="utf-8")
        url = config.get('remote "origin"', "url")
    except (OSError, configparser.Error, UnicodeDecodeError):
        return _REPOSITORY
    # Not a folder of this machine, and never a token that somebody has put into the address.
    return url if url.startswith("https://") and "@" not in url else _REPOSITORY
