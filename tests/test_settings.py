from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import get_type_hints

import pytest

from remote_vae.errors import SettingsError
from remote_vae.settings import Settings, load_options


def test_settings_and_options_toml_name_the_same_options_with_the_same_types() -> None:
    hints = get_type_hints(Settings)
    assert [field.name for field in fields(Settings)] == list(load_options())
    assert {key: hints[key] for key in load_options()} == {key: type(option.default) for key, option in load_options().items()}


def test_every_default_is_allowed_and_every_option_explains_itself() -> None:
    for option in load_options().values():
        assert option.parse(option.default) == option.default
        assert option.label
        assert option.help.endswith((".", "?"))
        assert option.group


def test_public_endpoints_and_the_extension_itself_are_off_until_the_user_turns_them_on() -> None:
    assert not Settings().enabled
    assert not Settings().public_endpoints


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().enabled = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("enabled", "yes", True),
        ("enabled", "False", False),
        ("connect_timeout", "1.5", 1.5),
        ("connect_timeout", 2, 2.0),
        ("endpoint", " studio:7870 ", "http://studio:7870"),
        ("endpoint", "https://host/vae?key=1", "https://host/vae?key=1"),
        ("endpoint", None, ""),
        ("endpoint", "[::1]:7870", "http://[::1]:7870"),
        ("transfer", "png", "png"),
    ],
)
def test_values_are_brought_to_their_type(key: str, value: object, expected: object) -> None:
    assert getattr(Settings.from_mapping({key: value}), key) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("enabled", "perhaps", "true or false"),
        ("enabled", 1, "true or false"),
        ("connect_timeout", 0, "from 0.1 to 60"),
        ("connect_timeout", "soon", "number"),
        ("connect_timeout", True, "number"),
        ("connect_timeout", float("nan"), "finite"),
        ("transfer", "gif", "raw, u8, png, jpg"),
        ("endpoint", "ftp://host", "address such as"),
        ("endpoint", "http://", "address such as"),
        ("endpoint", "http://host:99999", "address such as"),
        ("endpoint", "two words", "address such as"),
        ("endpoint", 7870, "text"),
        ("endpoint", "http://me:secret@host", "REMOTE_VAE_TOKEN"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_to_do(key: str, value: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_mapping({key: value})


def test_a_password_in_an_address_is_not_repeated_in_the_error() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(endpoint="http://me:secret@host")
    assert "secret" not in str(caught.value)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"unknown option endpont; known are .*endpoint"):
        Settings.from_mapping({"endpont": "x"})


def test_a_hosts_nonsense_becomes_the_default_and_the_rest_stays() -> None:
    settings, problems = Settings.forgiving({"transfer": "gif", "endpoint": "host:1", "something": "else"})
    assert settings == Settings(endpoint="http://host:1")
    assert len(problems) == 1
    assert "transfer" in problems[0]
    assert "u8" in problems[0]
