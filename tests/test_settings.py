from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from remote_vae.errors import SettingsError
from remote_vae.settings import Settings, load_options, read_toml


def test_settings_and_options_toml_name_the_same_options_with_the_same_types() -> None:
    hints = get_type_hints(Settings)
    assert [field.name for field in fields(Settings)] == [*load_options(), "problems"]
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
        ("endpoint", "HTTP:/studio:7870/", "http://studio:7870"),
        ("endpoint", "http:\\\\studio:7870", "http://studio:7870"),
        ("endpoint", '"http://studio:7870"', "http://studio:7870"),
        ("endpoint", "<http://studio>\n", "http://studio"),
        ("endpoint", "http://studio:7870/decode", "http://studio:7870"),
        ("endpoint", "http://studio:7870/vae/encode/?key=1", "http://studio:7870/vae?key=1"),
        ("endpoint", "http://studio:7860/remote-vae/", "http://studio:7860/remote-vae"),
        ("endpoint", "http://studio:7870/docs#top", "http://studio:7870"),
        ("decode_endpoint", "http://studio:7870/decode", "http://studio:7870/decode"),
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
        ("endpoint", "ftp://host", "begin with http:// or https://"),
        ("endpoint", "http://a:7870, http://b:7870", "more than one address"),
        ("endpoint", "http://studio :7870", "blanks"),
        ("endpoint", "http://studio:78700", "a port is a number from 1 to 65535"),
        ("endpoint", "http://studio:0", "a port is a number"),
        ("endpoint", "http://studio:port", "a port is a number"),
        ("endpoint", "http://a..b:7870", "the name of the host"),
        ("endpoint", f"http://{'a' * 70}.local", "the name of the host"),
        ("endpoint", "http://[::1:7870", "address such as"),
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
    for address in ("http://me:secret@host", "ftp://me:secret@host:99999", "me:secret@host x"):
        with pytest.raises(SettingsError) as caught:
            Settings(endpoint=address)
        assert "secret" not in str(caught.value)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"unknown option endpont; known are .*endpoint"):
        Settings.from_mapping({"endpont": "x"})


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["", "on", "1e999", "http://[", "a b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*load_options(), "something else"]), ANYTHING))
def test_whatever_a_host_has_stored_gives_settings_that_can_be_used(stored: dict[str, object]) -> None:
    settings, problems = Settings.forgiving(stored)
    assert replace(settings) == settings
    for key, option in load_options().items():
        value = getattr(settings, key)
        assert type(value) is type(option.default)
        assert option.parse(value) == value
        if key in stored and key not in settings.problems:
            assert option.parse(stored[key]) == value
    assert problems == list(settings.problems.values())


def nested(levels: int) -> object:
    value: object = 0
    for _ in range(levels):
        value = [value]
    return value


HUGE = {"an int": 10**400, "an int of more digits than are printed": 10**5000, "a nest": nested(5000), "a text": " x " * 10**6}


@pytest.mark.parametrize("what", HUGE)
@pytest.mark.parametrize("key", load_options())
def test_what_is_too_large_to_be_printed_is_one_short_line(key: str, what: str) -> None:
    if key == "rescue_folder" and what == "a text":
        return
    _, [problem] = Settings.forgiving({key: HUGE[what]})
    assert problem.startswith(load_options()[key].label)
    assert len(problem) < 250


@pytest.mark.parametrize(
    ("key", "value", "used", "words"),
    [
        ("transfer", "gif", "u8", "Transfer: must be one of raw, u8, png, jpg, not 'gif'; using u8, the default"),
        ("transfer", None, "u8", "not None; using u8"),
        ("enabled", None, False, "Use the remote VAE: must be true or false, not None; using off, the default"),
        ("connect_timeout", -3, 0.1, "must be from 0.1 to 60, not -3; using 0.1"),
        ("connect_timeout", "1e9", 60.0, "using 60"),
        ("connect_timeout", float("inf"), 60.0, "using 60"),
        ("connect_timeout", "abc", 3.0, "Longest wait for a connection: must be a number, not 'abc'; using 3, the default"),
        ("connect_timeout", None, 3.0, "using 3, the default"),
        ("endpoint", "ftp://host", "", "using nothing"),
        ("rescue_folder", 7, "", "Folder for rescued latents: must be text, not 7; using nothing"),
    ],
)
def test_a_bad_value_is_the_nearest_good_one_and_is_named(key: str, value: object, used: object, words: str) -> None:
    settings, [problem] = Settings.forgiving({key: value})
    assert getattr(settings, key) == used
    assert words in problem
    assert settings.problems == {key: problem}


@pytest.mark.parametrize(
    ("stored", "decode", "encode"),
    [
        ({}, "no endpoint is set", "no endpoint is set"),
        ({"endpoint": None}, "no endpoint is set", "no endpoint is set"),
        ({"endpoint": "ftp://host"}, "the endpoint cannot be used", "the endpoint cannot be used"),
        ({"endpoint": "host"}, "", ""),
        ({"decode_endpoint": "host"}, "", ""),
        ({"decode_endpoint": "host", "endpoint": "a b"}, "", "the endpoint cannot be used"),
        ({"decode_endpoint": "a b", "encode_endpoint": "host"}, "the endpoint cannot be used", ""),
        ({"public_endpoints": True}, "", ""),
    ],
)
def test_why_there_is_no_endpoint_is_known(stored: dict[str, object], decode: str, encode: str) -> None:
    settings, _ = Settings.forgiving(stored)
    assert (settings.no_endpoint("decode"), settings.no_endpoint("encode")) == (decode, encode)


def test_switched_on_without_an_endpoint_the_user_is_told_so() -> None:
    _, [problem] = Settings.forgiving({"enabled": True})
    assert "Endpoint: none is set" in problem
    for stored in ({}, {"enabled": True, "endpoint": "host"}, {"enabled": True, "public_endpoints": True}):
        assert Settings.forgiving(stored)[1] == []
    # That one is not missing.
    _, [problem] = Settings.forgiving({"enabled": True, "endpoint": "ftp://host"})
    assert "ftp://host" in problem


def test_what_says_where_pictures_and_tokens_go_is_not_for_the_hosts_api() -> None:
    restricted = {key for key, option in load_options().items() if option.restricted}
    assert restricted == {"endpoint", "decode_endpoint", "encode_endpoint", "public_endpoints", "rescue_folder", "share"}


def test_every_option_and_every_word_of_the_panel_is_there_in_chinese() -> None:
    english, chinese = load_options(), load_options("zh")
    assert list(english) == list(chinese)
    for key, option in chinese.items():
        for text in (option.label, option.help, option.group):
            assert any("\u4e00" <= letter <= "\u9fff" for letter in text), key
        assert (option.default, option.choices) == (english[key].default, english[key].choices)
    for word, entry in read_toml("words.toml").items():
        assert set(entry) == {"en", "zh"}, word


@pytest.mark.parametrize(("given", "expected"), [("", ""), (" CPU ", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_device_for_the_vae_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch, given: str, expected: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Settings(local_device=given).local_device == expected


@pytest.mark.parametrize("given", ["cuda:2", "gpu", "mps", "cuda:", "cpu:0", "disk"])
def test_another_device_is_refused_with_those_that_are_there(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(SettingsError, match="local_device: must be one of cpu, cuda:0, cuda:1"):
        Settings(local_device=given)
    settings, problems = Settings.forgiving({"local_device": given})
    assert settings.local_device == ""
    assert "cuda:1" in problems[0]
