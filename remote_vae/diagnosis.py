"""What a report of a problem should have in it: versions, settings, the last calls. No token, prompt or public host name."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import torch

from remote_vae.history import Record
from remote_vae.settings import Settings, load_options
from remote_vae.version import __version__

_PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "requests",
    "urllib3",
    "safetensors",
    "gradio",
    "fastapi",
    "diffusers",
    "zstandard",
    "av",
)
# Whether they are set is worth knowing; what they hold is nobody's business.
_VARIABLES = (
    "REMOTE_VAE_TOKEN", "HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE",
)  # fmt: skip
_URLS = re.compile(r"https?://[^\s;,'\"]+")
_CALLS = 12


def diagnosis(settings: Settings | None = None, lines: Iterable[str] = (), records: Iterable[Record] = ()) -> str:
    """The text, of some forty lines.

    Args:
        settings: those that differ from the defaults are named.
        lines: what a host says of itself: its name, what is hooked, the state.
        records: the calls so far; the last of them are named.
    """
    parts = [*_machine(), *lines]
    if settings is not None:
        parts += _settings(settings)
    last = list(records)[-_CALLS:]
    parts += ["last calls:", *(f"  {record}" for record in last)] if last else ["no calls yet"]
    return _without_names("\n".join(parts)) + "\n"


def _machine() -> Iterator[str]:
    yield f"Remote VAE {__version__}{_commit()}"
    yield f"Python {platform.python_version()}, {platform.platform(terse=True)}, {os.cpu_count()} cores"
    yield ", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    yield f"devices: {', '.join(_devices()) or 'CPU only'}"
    given = [name for name in _VARIABLES if os.environ.get(name) or os.environ.get(name.lower())]
    yield f"set in the environment: {', '.join(given) or 'nothing that matters here'}"


def _commit() -> str:
    """Of a checkout, as extensions are installed; "" elsewhere."""
    git = Path(__file__).resolve().parents[1] / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        commit = (git / head.removeprefix("ref: ")).read_text(encoding="utf-8") if head.startswith("ref: ") else head
    except OSError:
        return ""
    return f" ({commit.strip()[:9]})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> Iterator[str]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield f"{card.name}, {card.total_memory / 2**30:.1f} GiB"
        yield f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    for kind in ("xpu", "mps"):
        part = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
        if part is not None and part.is_available():
            yield kind.upper()


def _settings(settings: Settings) -> Iterator[str]:
    options = load_options()
    changed = [key for key, option in options.items() if getattr(settings, key) != option.default]
    # A folder has the user's name in it.
    shown = {key: "(a folder)" if key == "rescue_folder" else str(getattr(settings, key)) for key in changed}
    yield f"settings: {', '.join(f'{key} = {value}' for key, value in shown.items()) or 'the defaults'}"
    yield from (f"  {problem}" for problem in settings.problems.values())


def _without_names(text: str) -> str:
    """Hosts that others could find become HOST; the home's folder becomes ~."""
    home = str(Path.home())
    text = text.replace(home, "~") if len(home) > 1 else text
    hosts = {_host(url) for url in _URLS.findall(text)}
    text = _URLS.sub(lambda found: _masked(found.group()), text)
    # The line of state has them without a scheme.
    for host in sorted(filter(None, hosts), key=len, reverse=True):
        if not _is_private(host):
            text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "HOST", text, flags=re.IGNORECASE)
    return text


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _masked(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "(an address)"
    shown = host if _is_private(host) else "HOST"
    return f"{parts.scheme}://{f'[{shown}]' if ':' in shown else shown}{f':{port}' if port else ''}{parts.path}"


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or (bool(host) and "." not in host)
