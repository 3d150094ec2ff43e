"""The data files of ``settings/``, and the options: read once from ``options.toml`` into one frozen ``Settings``."""

from __future__ import annotations

import importlib
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Union
from urllib.parse import urlsplit

from remote_vae.errors import SettingsError

_PACKAGE = Path(__file__).resolve().parent


def settings_folder() -> Path:
    """The folder that holds options.toml and families.toml.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_settings", _PACKAGE.parent / "settings"):
        if (folder / "options.toml").is_file():
            return folder
    raise FileNotFoundError(f"settings/options.toml is missing beside {_PACKAGE}: reinstall Remote VAE")


@cache
def read_toml(name: str) -> dict[str, Any]:
    """Read one file of ``settings/`` once; the caller must not change what it gets."""
    with (settings_folder() / name).open("rb") as file:
        data: dict[str, Any] = _toml_reader().load(file)
    return data


def parse_toml(text: str) -> dict[str, Any]:
    """The entries of a file of the user's. Raises ValueError: it is no TOML."""
    data: dict[str, Any] = _toml_reader().loads(text)
    return data


def _toml_reader() -> ModuleType:
    # tomllib came with Python 3.11. install.py adds tomli on 3.10; pip's own copy serves where it could not (no network).
    for module in ("tomllib", "tomli", "pip._vendor.tomli"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise ImportError("Remote VAE needs the package tomli on Python 3.10: pip install tomli")


Value = Union[bool, float, str]

_URL_KEYS = frozenset({"endpoint", "decode_endpoint", "encode_endpoint"})

_QUOTES = " \t\r\n\"'`<>\u201c\u201d\u201e\u2018\u2019"
_SCHEME = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*):/+)?(.*)", re.S)
_OWN_PATHS = re.compile(r"/*(/(decode|encode|info|health|docs))?/*(?=$|\?)")

# Of a value that is not what it should be, so much is shown.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


@dataclass(frozen=True)
class Option:
    """One entry of options.toml; see there."""

    key: str
    default: Value
    label: str
    help: str
    group: str
    choices: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    unit: str = ""
    restricted: bool = False
    label_zh: str = ""
    help_zh: str = ""
    group_zh: str = ""

    def parse(self, value: object) -> Value:
        """Check ``value`` and bring it to the option's type.

        Text is accepted for every type, as the command line and a host's config file may hold it.

        Raises:
            SettingsError: wrong type, out of bounds, not one of the choices, or not a URL.
        """
        if isinstance(self.default, bool):
            return self._parse_bool(value)
        if isinstance(self.default, float):
            return self._parse_number(value)
        return self._parse_text(value)

    def forgive(self, value: object) -> tuple[Value, str]:
        """The nearest value that can be used: a number out of bounds becomes the bound, anything else the default.

        Returns:
            The value, and what was wrong for the user to read, "" if nothing was. Never raises.
        """
        try:
            return self.parse(value), ""
        except SettingsError as error:
            problem = str(error).removeprefix(f"{self.key}: ")
        except Exception as error:  # whatever a host's file holds
            problem = f"cannot be used ({type(error).__name__})"
        nearest = self._nearest(value)
        shown = _shown(nearest) if nearest != self.default or nearest == "" else f"{_shown(nearest)}, the default"
        return nearest, f"{self.label}: {problem}; using {shown}"

    def _nearest(self, value: object) -> Value:
        if self.min is None or self.max is None or isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return self.default
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return self.default
        return self.default if math.isnan(number) else min(max(number, self.min), self.max)

    def _parse_bool(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in ("true", "yes", "on", "1"):
            return True
        if isinstance(value, str) and value.strip().lower() in ("false", "no", "off", "0"):
            return False
        raise self._error(value, "must be true or false")

    def _parse_number(self, value: object) -> float:
        try:
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            raise self._error(value, "must be a number") from None
        if not math.isfinite(number):
            raise self._error(value, "must be a finite number")
        if (self.min is not None and number < self.min) or (self.max is not None and number > self.max):
            raise self._error(value, f"must be from {self.min:g} to {self.max:g}")
        return number

    def _parse_text(self, value: object) -> str:
        if value is None and not self.choices:
            return ""
        if not isinstance(value, str):
            raise self._error(value, "must be text")
        text = value.strip()
        if self.choices and text not in self.choices:
            raise self._error(value, "must be one of " + ", ".join(self.choices))
        if self.key in _URL_KEYS and text:
            try:
                text = _address(text)
            except ValueError as problem:
                raise SettingsError(f"{self.key}: {problem}") from None
        if self.key == "endpoint":
            # What a browser or another client was pointed at; the path for each kind of call is added.
            text = _OWN_PATHS.sub("", text)
        if self.key == "local_device" and text:
            text = self._parse_device(text)
        return text

    def _parse_device(self, text: str) -> str:
        there = devices()
        # A first card is meant by the name of its kind alone.
        name = text.lower() if ":" in text or text.lower() in there else f"{text.lower()}:0"
        if name not in there:
            raise self._error(text, f"must be one of {', '.join(there)}, which are there, or nothing")
        return name

    def _error(self, value: object, what: str) -> SettingsError:
        try:
            shown = _SHORT.repr(value)
        except Exception:  # a number of more digits than Python prints
            shown = f"this {type(value).__name__}"
        return SettingsError(f"{self.key}: {what}, not {shown}")


def devices() -> list[str]:
    """The devices of this machine, in torch's names."""
    # Most settings name none, and torch takes its time.
    import torch

    there = ["cpu"]
    for kind in ("cuda", "xpu"):
        api = getattr(torch, kind, None)
        if api is not None and api.is_available():
            there += [f"{kind}:{index}" for index in range(api.device_count())]
    return [*there, "mps"] if torch.backends.mps.is_available() else there


def _address(text: str) -> str:
    """What a user typed, as a URL with scheme and host. Raises ValueError: why it is none, without a password in it."""
    text = text.strip(_QUOTES).replace("\\", "/")
    if "@" in text.partition("?")[0]:
        # The address is shown in logs and records.
        raise ValueError(
            "the address must not hold a user name or password; put the token into the environment variable REMOTE_VAE_TOKEN"
        )
    plain = text.partition("?")[0]  # a query may hold a key
    like = f"must be an address such as http://192.168.1.20:7870, not {_SHORT.repr(plain)}"
    if re.search(r"\s|[,;]\s*\S*:", plain):
        raise ValueError(f"{like}: it holds blanks, or is more than one address")
    scheme, rest = _SCHEME.fullmatch(text).groups()  # type: ignore[union-attr]  # it takes any text
    # "studio:7870" is what people type, and "http:/studio:7870".
    scheme = (scheme or "http").lower()
    if scheme not in ("http", "https"):
        raise ValueError(f"{like}: it must begin with http:// or https://")
    try:
        url = urlsplit(f"{scheme}://{rest}")._replace(fragment="")
        host, port = url.hostname or "", url.port
        host.encode("idna")
    except ValueError as error:
        why = "the name of the host is none" if isinstance(error, UnicodeError) else "a port is a number from 1 to 65535"
        raise ValueError(f"{like}: {why}") from None
    if not host or port == 0:
        raise ValueError(f"{like}: {'no host is named' if not host else 'a port is a number from 1 to 65535'}")
    return url.geturl()


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else value or "nothing"


@lru_cache(maxsize=2)
def load_options(language: str = "en") -> dict[str, Option]:
    """Every option of options.toml by its key, in the file's order; label, help and group in ``language``, "en" or "zh"."""
    options = {}
    for key, entry in read_toml("options.toml").items():
        entry = dict(entry)
        entry["choices"] = tuple(entry.get("choices", ()))
        options[key] = Option(key=key, **entry)
    if language != "zh":
        return options
    groups = {option.group: option.group_zh for option in options.values() if option.group_zh}
    return {
        key: replace(option, label=option.label_zh, help=option.help_zh, group=groups[option.group])
        for key, option in options.items()
    }


def _option(key: str) -> Any:
    return field(default_factory=lambda: load_options()[key].default)


@dataclass(frozen=True)
class Settings:
    """All options, checked. Fields, defaults and bounds are those of ``settings/options.toml``; times are seconds.

    Attributes:
        problems: what ``forgiving`` found, by the option's key, for the user to read.

    Raises:
        SettingsError: a value cannot be used.
    """

    enabled: bool = _option("enabled")
    endpoint: str = _option("endpoint")
    decode: bool = _option("decode")
    encode: bool = _option("encode")
    transfer: str = _option("transfer")
    when_vae_differs: str = _option("when_vae_differs")
    decode_endpoint: str = _option("decode_endpoint")
    encode_endpoint: str = _option("encode_endpoint")
    public_endpoints: bool = _option("public_endpoints")
    connect_timeout: float = _option("connect_timeout")
    first_byte_timeout: float = _option("first_byte_timeout")
    total_timeout: float = _option("total_timeout")
    cooldown: float = _option("cooldown")
    cpu_bfloat16: bool = _option("cpu_bfloat16")
    make_room: str = _option("make_room")
    local_device: str = _option("local_device")
    rescue_folder: str = _option("rescue_folder")
    share: bool = _option("share")
    name_endpoint: bool = _option("name_endpoint")
    problems: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for option in load_options().values():
            object.__setattr__(self, option.key, option.parse(getattr(self, option.key)))

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Settings:
        """Settings from a mapping; unknown keys are an error that names the known ones.

        Raises:
            SettingsError: an unknown key, or a value that cannot be used.
        """
        unknown = sorted(set(values) - set(load_options()))
        if unknown:
            raise SettingsError(f"unknown option {', '.join(unknown)}; known are {', '.join(load_options())}")
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks every value

    @classmethod
    def forgiving(cls, values: Mapping[str, object]) -> tuple[Settings, list[str]]:
        """Settings from a host's options, which anyone can write anything to; see ``Option.forgive``. Never raises.

        Returns:
            The settings, and one message for each value that was replaced and for an endpoint that is missing.
        """
        settings, problems = cls(), {}
        for key, option in load_options().items():
            if key in values:
                value, problem = option.forgive(values[key])
                object.__setattr__(settings, key, value)
                if problem:
                    problems[key] = problem
        object.__setattr__(settings, "problems", problems)
        if settings.enabled and settings.no_endpoint("decode") == "no endpoint is set":
            problems["enabled"] = (
                "Endpoint: none is set, so everything is done on this machine; enter the address of your Remote VAE server"
            )
        return settings, list(problems.values())

    def no_endpoint(self, op: str) -> str:
        """Why the user has no endpoint for ``op`` ("decode" or "encode"), in a few words.

        "" where there is one, where the public ones may be used, or where one is set for the other kind of call only.
        """
        own = f"{op}_endpoint"
        if self.endpoint or getattr(self, own) or self.public_endpoints:
            return ""
        if {"endpoint", own} & set(self.problems):
            return "the endpoint cannot be used"
        return "" if self.decode_endpoint or self.encode_endpoint else "no endpoint is set"
