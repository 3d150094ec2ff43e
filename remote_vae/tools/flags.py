"""The options of ``settings/options.toml`` as flags of a command."""

from __future__ import annotations

import argparse

from remote_vae.settings import Option, Settings, load_options

# Those that make no sense in a command that does one call and ends.
PANEL_ONLY = frozenset(
    {"enabled", "decode", "encode", "when_vae_differs", "cooldown", "rescue_folder", "share", "name_endpoint"}
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Each option as a flag."""
    group = parser.add_argument_group("options (those of the settings panel)")
    for option in load_options().values():
        if option.key not in PANEL_ONLY:
            _add_option(group, option)


def settings_of(options: argparse.Namespace) -> Settings:
    """What the flags say. Raises SettingsError."""
    given = {key: getattr(options, key, None) for key in load_options() if key not in PANEL_ONLY}
    return Settings.from_mapping({key: value for key, value in given.items() if value is not None})


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    flag = "--" + option.key.replace("_", "-")
    text = f"{option.label}. {option.help}".replace("%", "%%")
    if isinstance(option.default, bool):
        group.add_argument(flag, dest=option.key, action="store_const", const=True, help=text)
    else:
        unit = option.unit or ("URL" if option.key.endswith("endpoint") else "TEXT")
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else unit.upper()
        group.add_argument(flag, dest=option.key, metavar=metavar, help=text)
