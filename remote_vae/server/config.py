"""What ``remote-vae serve`` may be told: by flags, by a file (``--config server.toml``), or by both; flags win.

Each thing that may be said stands once, in ``FLAGS``: ``--max-pixels`` on the command line is ``max-pixels`` in the file.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from remote_vae.errors import SettingsError
from remote_vae.server.admission import Limits
from remote_vae.server.engine import BATCH_PIXELS, BATCH_WAIT
from remote_vae.server.own import Source
from remote_vae.settings import parse_toml
from remote_vae.tokens import TOKEN_VARIABLE
from remote_vae.vae.families import find_family, load_families
from remote_vae.wire.errors import one_line

Kind = Literal["text", "path", "whole", "number", "switch", "list"]

DTYPES = ("auto", "float32", "float16", "bfloat16")
# The first word of the server's own paths: no name of a VAE.
RESERVED = frozenset({"decode", "encode", "health", "info", "metrics", "docs", "openapi.json"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAMED = re.compile(rf"({_NAME.pattern})=(.+)", re.S)
_SIZE = re.compile(r"([1-9]\d{1,4})(?:x([1-9]\d{1,4}))?")
_EXPECTED: dict[Kind, str] = {
    "text": "a text",
    "path": "a path",
    "whole": "a whole number",
    "number": "a number",
    "switch": "true or false",
    "list": "a text, or a list of them",
}
_TOKEN_LIMIT = 4096
FAST_MODES = ("off", "exact", "compile")
FAST_SIZES = ("512", "1024")


def _key(name: str) -> str:
    """As an attribute: max-pixels is max_pixels."""
    return name.replace("-", "_")


@dataclass(frozen=True)
class Flag:
    """One thing that may be said. ``least``, ``most``: of numbers; ``choices``: of texts."""

    name: str
    kind: Kind
    default: Any
    help: str
    least: float = 0
    most: float = float("inf")
    choices: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        return "--" + self.name

    @property
    def key(self) -> str:
        return _key(self.name)

    def of_text(self, text: str) -> Any:
        """What is meant by the ``text`` of a command line. Raises SettingsError."""
        value: Any = text
        if self.kind in ("whole", "number"):
            try:
                value = int(text) if self.kind == "whole" else float(text)
            except ValueError:
                raise self._error(self.option, text) from None
        return self.checked(value, self.option)

    def checked(self, value: Any, where: str) -> Any:
        """``value``, if it is what it should be. Raises SettingsError."""
        if self.kind == "list" and isinstance(value, str):
            value = value.split(",")
        if not self._is_good(value):
            raise self._error(where, value)
        if self.kind == "list":
            return tuple(each.strip() for each in value)
        return float(value) if self.kind == "number" else value

    def _is_good(self, value: Any) -> bool:
        if self.kind == "switch":
            return isinstance(value, bool)
        if self.kind in ("whole", "number"):
            types = (int,) if self.kind == "whole" else (int, float)
            return isinstance(value, types) and not isinstance(value, bool) and self.least <= value <= self.most
        if self.kind == "list":
            return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each.strip() for each in value)
        return isinstance(value, str) and bool(value.strip()) and (not self.choices or value in self.choices)

    def _error(self, where: str, value: Any) -> SettingsError:
        expected = _EXPECTED[self.kind] if not self.choices else f"one of {', '.join(self.choices)}"
        if self.kind in ("whole", "number"):
            most = f" to {self.most:g}" if self.most != float("inf") else ""
            expected += f" from {self.least:g}{most or ' on'}"
        return SettingsError(f"{where}: got {one_line(repr(value), 60)}, expected {expected}")


_LIMITS = Limits()

FLAGS: tuple[Flag, ...] = (
    Flag("family", "text", None, f"where the file of a single --vae does not say it: {', '.join(load_families())}"),
    Flag("dtype", "text", "auto", "auto, float32, float16 or bfloat16 (auto: float16 on a GPU)", choices=DTYPES),
    Flag("device", "list", ("auto",), "auto (every GPU), cpu, cuda:1, mps, xpu; several: cuda:0,cuda:1"),
    Flag("preload", "switch", False, "load every VAE at the start; else the first one, and the others when they are asked for"),
    Flag("host", "text", "127.0.0.1", "address to listen on; 0.0.0.0 for other machines"),
    Flag("port", "whole", 7870, "7870; 0 for any free one", most=65535),
    Flag("token-file", "path", None, f"file with the token that clients must have; else it is that of {TOKEN_VARIABLE}"),
    Flag("tls-cert", "path", None, "certificate and its chain (PEM): the server then speaks https; with --tls-key"),
    Flag("tls-key", "path", None, "private key of the certificate (PEM), without a password"),
    Flag("log-format", "text", "text", "text or json: a line a call", choices=("text", "json")),
    Flag(
        "fast",
        "text",
        "exact",
        "off; exact: warmed up, the same bits; compile: torch.compile, at most one level of 255 off",
        choices=FAST_MODES,
    ),
    Flag("fast-sizes", "list", FAST_SIZES, "sizes in pixels that --fast prepares: 512,1024x1536 (WIDTHxHEIGHT)"),
    Flag("batch-pixels", "whole", None, f"pixels of one batch at the most; 0: no batches ({BATCH_PIXELS}, on CPUs alone 0)"),
    Flag("batch-wait", "number", BATCH_WAIT, "seconds that a call may wait for others of its size", most=1),
    Flag("max-pixels", "whole", _LIMITS.max_pixels, "largest picture or frame, width x height", least=1),
    Flag("max-batch", "whole", _LIMITS.max_batch, "pictures, or videos, in a request", least=1),
    Flag("max-frames", "whole", _LIMITS.max_frames, "frames of a video", least=1),
    Flag(
        "max-video-pixels",
        "whole",
        _LIMITS.max_video_pixels,
        "all frames of a video together (129 frames of 1280 x 720 fit)",
        least=1,
    ),
    Flag("max-waiting", "whole", _LIMITS.max_waiting, "requests at once, in upload, waiting or at work", least=1),
    Flag("max-wait", "number", _LIMITS.max_wait, "seconds that a call may be expected to wait; else it is refused", least=0.1),
    Flag("max-bytes", "whole", _LIMITS.max_bytes, "bytes of all bodies and answers together", least=1 << 20),
    Flag("stall", "number", _LIMITS.stall, "seconds in which a body or an answer must come further", least=0.1),
    Flag("patience", "number", _LIMITS.patience, "seconds until a body that does not come makes room for another", least=0.1),
)
_BY_KEY: dict[str, Flag] = {flag.key: flag for flag in FLAGS}
_OF_LIMITS = frozenset(each.name for each in fields(Limits))


@dataclass(frozen=True)
class ServerConfig:
    """All that a server is told. ``vaes`` are the sources in the order given; the rest as in ``FLAGS``."""

    vaes: tuple[Source, ...]
    device: tuple[str, ...] = ("auto",)
    preload: bool = False
    host: str = "127.0.0.1"
    port: int = 7870
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    log_format: str = "text"
    fast: str = "exact"
    fast_sizes: tuple[str, ...] = FAST_SIZES
    batch_pixels: int | None = None
    batch_wait: float = BATCH_WAIT
    limits: Limits = field(default_factory=Limits)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of what ``--fast`` prepares."""
        return sizes_of(self.fast_sizes)

    def token(self) -> str:
        """What clients must have; "": nothing. Raises SettingsError."""
        return token_of(self.token_file)


def token_of(file: str | None) -> str:
    """What clients must have, of the file or else of the environment; "": nothing.

    Raises:
        SettingsError: the file cannot be read, or has none.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        with Path(file).open(encoding="utf-8") as opened:
            token = opened.read(_TOKEN_LIMIT).strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"--token-file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not token or len(token.split()) != 1:
        raise SettingsError(f"--token-file {file}: expected one word, which is the token")
    return token


def sizes_of(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Height and width of each of ``--fast-sizes``. Raises SettingsError."""
    return tuple(map(_size, texts))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All that may be said, as flags of ``parser``. What is not given is not in its namespace."""
    parser.add_argument("--config", metavar="FILE", help="says what flags say (TOML); flags win")
    parser.add_argument(
        "--vae",
        action="append",
        metavar="[NAME=]SOURCE",
        default=argparse.SUPPRESS,
        help="diffusers folder, .safetensors file or Hugging Face id; several times for several VAEs, at /NAME/decode",
    )
    for flag in FLAGS:
        if flag.kind == "switch":
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag.option, action=action, default=argparse.SUPPRESS, help=flag.help)
        else:
            metavar = "{" + ",".join(flag.choices) + "}" if flag.choices else flag.kind.upper()
            usual = ",".join(flag.default) if isinstance(flag.default, tuple) else flag.default
            text = flag.help if usual is None or str(usual) in flag.help else f"{flag.help} ({usual})"
            parser.add_argument(flag.option, metavar=metavar, default=argparse.SUPPRESS, help=text.replace("%", "%%"))


def config_of(options: Mapping[str, Any]) -> ServerConfig:
    """What a command line says, and the file that it names.

    Args:
        options: of ``add_flags``, as texts.

    Raises:
        SettingsError: it cannot be: a name that there is not, a wrong type, two VAEs of one name, no VAE at all.
    """
    said = read_file(Path(options["config"])) if options.get("config") else {}
    for key, flag in _BY_KEY.items():
        if key in options:
            said[key] = options[key] if flag.kind == "switch" else flag.of_text(options[key])
    if "vae" in options:
        said["vae"] = [_of_argument(text) for text in options["vae"]]
    return _made(said)


def read_file(path: Path) -> dict[str, Any]:
    """What a file says, by the flags' names with underscores; paths in it are relative to its folder.

    Raises:
        SettingsError: it is not there, no TOML, or says what cannot be; with the file's and the key's name.
    """
    try:
        entries = parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # no UTF-8, no TOML
        raise SettingsError(f"--config {path} is not TOML: {error}") from None
    said: dict[str, Any] = {}
    for name, value in entries.items():
        key = _key(name)
        if key in said:
            raise SettingsError(f"{path}: {name} stands there twice, with - and with _")
        if key == "vae":
            said[key] = _vaes(value, path)
            continue
        flag = _BY_KEY.get(key)
        if flag is None:
            raise SettingsError(f"{path}: {_unknown(name, ['vae', *(each.name for each in FLAGS)])}")
        checked = flag.checked(value, f"{path}: {name}")
        said[key] = str(_beside(path, checked)) if flag.kind == "path" else checked
    return said


def _made(said: dict[str, Any]) -> ServerConfig:
    vaes: Sequence[Source] = said.pop("vae", ())
    family, dtype = said.pop("family", None), said.pop("dtype", "auto")
    if not vaes:
        raise SettingsError("no VAE is named: add --vae with a diffusers folder, a .safetensors file or a Hugging Face id")
    if family is not None and len(vaes) > 1:
        raise SettingsError("--family is for a single --vae; of several it is said in the file: [vae.NAME] family = ...")
    vaes = tuple(
        replace(each, family=each.family or family, dtype=dtype if each.dtype == "auto" else each.dtype) for each in vaes
    )
    _check_names(vaes)
    limits = Limits(**{key: said.pop(key) for key in list(said) if key in _OF_LIMITS})
    config = ServerConfig(vaes, limits=limits, **said)
    _check_devices(config.device)
    _ = config.sizes
    if (config.tls_cert is None) != (config.tls_key is None):
        raise SettingsError("--tls-cert and --tls-key go together: name both, or none")
    return config


def is_name(text: str) -> bool:
    """Whether a VAE may be called so: as a part of a path, and none of the server's own."""
    return _NAME.fullmatch(text) is not None and text not in RESERVED


def _check_names(vaes: Sequence[Source]) -> None:
    names = [each.name for each in vaes if each.name]
    for name in names:
        if not is_name(name):
            raise SettingsError(
                f"--vae {one_line(name, 80)}=...: a VAE's name has letters, digits, '.', '_', '-', at most 64, and is none of "
                f"{', '.join(sorted(RESERVED))}"
            )
        if names.count(name) > 1:
            raise SettingsError(f"--vae {name}=...: two VAEs are called {name}; give each a name of its own")
    for each in vaes:
        if each.family is not None:
            find_family(each.family)


def _check_devices(names: Sequence[str]) -> None:
    for name in names:
        try:
            _ = name == "auto" or torch.device(name)
        except RuntimeError:
            raise SettingsError(
                f"--device must be auto, cpu, cuda, cuda:1, mps or another of torch's, not {one_line(name, 60)}"
            ) from None
    if len(names) > 1 and ("auto" in names or len(set(names)) < len(names)):
        raise SettingsError(f"--device {','.join(names)}: of several each is named once, and none is auto")


def _of_argument(text: str) -> Source:
    """``NAME=SOURCE``, or a bare source. What exists as it stands is a source, whatever is in its name."""
    named = _NAMED.fullmatch(text)
    if named is None or Path(text).expanduser().exists():
        return Source(text)
    return Source(named[2], named[1])


def _vaes(value: Any, path: Path) -> list[Source]:
    """``vae`` of a file: a source, a list of them as on the command line, or a table of name and source or table."""
    expected = 'a source, a list of them, or a table of names: [vae] sdxl = "PATH"'
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        sources = [_of_argument(each) for each in value]
    elif isinstance(value, dict):
        sources = [_of_table(name, entry, path) for name, entry in value.items()]
    else:
        raise SettingsError(f"{path}: vae: got {one_line(repr(value), 60)}, expected {expected}")
    return [replace(each, source=_source_beside(path, each.source)) for each in sources]


def _of_table(name: str, entry: Any, path: Path) -> Source:
    where = f"{path}: vae.{one_line(name, 60)}"
    if isinstance(entry, str):
        entry = {"source": entry}
    if not isinstance(entry, dict):
        raise SettingsError(f"{where}: got {one_line(repr(entry), 60)}, expected a source, or a table with one")
    names = [each.name for each in fields(Source) if each.name != "name"]
    for key, value in entry.items():
        if key not in names:
            raise SettingsError(f"{where}: {_unknown(key, names)}")
        flag = Flag(key, "text", None, "", choices=DTYPES if key == "dtype" else ())
        flag.checked(value, f"{where}.{key}")
    if "source" not in entry:
        raise SettingsError(f'{where}: it lacks its source: source = "PATH or Hugging Face id"')
    return Source(name=name, **entry)


def _source_beside(path: Path, source: str) -> str:
    """A path in the file is relative to the file; what is not there may be a Hugging Face id."""
    there = _beside(path, source)
    return str(there) if there.exists() else source


def _beside(path: Path, name: str) -> Path:
    return path.resolve().parent / Path(name).expanduser()


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise SettingsError(f"--fast-sizes: got {one_line(text, 40)!r}, expected 1024 or WIDTHxHEIGHT, such as 1024x1536")
    return int(found[2] or found[1]), int(found[1])


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(_key(name), [_key(each) for each in known], 1)
    hint = next(each for each in known if _key(each) == near[0]) if near else ", ".join(sorted(known))
    return f"{one_line(name, 60)} is not known; {f'is {hint} meant?' if near else f'there are {hint}'}"
