"""What ``remote-vae serve`` is told, by flags and by a file."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import pytest

from remote_vae.errors import SettingsError
from remote_vae.server.admission import Limits
from remote_vae.server.config import FLAGS, ServerConfig, add_flags, config_of
from remote_vae.server.own import Source
from remote_vae.settings import settings_folder
from tests.conftest import DEMO_VAE

FILE = """
host = "0.0.0.0"
port = 7999
device = ["cuda:0", "cuda:1"]
dtype = "float32"
preload = true
fast = "compile"
fast-sizes = ["512", "768x1024"]
batch-pixels = 4194304
batch-wait = 0.01
max-pixels = 1048576
max_batch = 4
max-wait = 5
stall = 7.5
token-file = "secret/token"
tls-cert = "/etc/ssl/server.pem"
tls-key = "key.pem"
log-format = "json"

[vae]
sdxl = "models/sdxl.safetensors"
flux2 = { source = "black-forest-labs/FLUX.2-dev", family = "flux2", dtype = "bfloat16" }

[vae.wan]
source = "demo"
"""


PAGE = (settings_folder().parent / "docs" / "server.md").read_text(encoding="utf-8")


def said(*arguments: str) -> ServerConfig:
    """What a command line means."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return config_of(vars(parser.parse_args(list(arguments))))


def file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "server.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_says_all_that_flags_say(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sdxl.safetensors").touch()
    config = said("--config", file(tmp_path, FILE))
    assert config == ServerConfig(
        vaes=(
            Source(str(tmp_path / "models" / "sdxl.safetensors"), "sdxl", dtype="float32"),
            Source("black-forest-labs/FLUX.2-dev", "flux2", "flux2", "bfloat16"),
            Source("demo", "wan", dtype="float32"),
        ),
        device=("cuda:0", "cuda:1"),
        preload=True,
        host="0.0.0.0",
        port=7999,
        token_file=str(tmp_path / "secret" / "token"),
        tls_cert="/etc/ssl/server.pem",
        tls_key=str(tmp_path / "key.pem"),
        log_format="json",
        fast="compile",
        fast_sizes=("512", "768x1024"),
        batch_pixels=4194304,
        batch_wait=0.01,
        limits=Limits(max_pixels=1048576, max_batch=4, max_wait=5.0, stall=7.5),
    )
    assert config.sizes == ((512, 512), (1024, 768))


def test_every_flag_can_be_said_in_the_file_and_every_field_of_the_limits_by_a_flag(tmp_path: Path) -> None:
    usual = {"text": '"x"', "path": '"x"', "whole": "7", "number": "0.5", "switch": "true", "list": '["cpu"]'}
    for flag in FLAGS:
        value = f'"{flag.choices[-1]}"' if flag.choices else usual[flag.kind]
        value = {"max-bytes": "2000000", "family": '"sdxl"', "fast-sizes": '["256"]'}.get(flag.name, value)
        other = {"tls-cert": 'tls-key = "x"', "tls-key": 'tls-cert = "x"'}.get(flag.name, "")
        assert said("--config", file(tmp_path, f'vae = "x"\n{flag.name} = {value}\n{other}')) != said("--vae", "x"), flag.name
    limits = {flag.key for flag in FLAGS}
    assert set(Limits.__dataclass_fields__) <= limits


def test_several_are_a_list_in_the_file_or_one_text_as_in_a_flag(tmp_path: Path) -> None:
    for text in ('["512", "768x1024"]', '"512, 768x1024"'):
        assert said("--config", file(tmp_path, f'vae = "x"\nfast-sizes = {text}')).sizes == ((512, 512), (1024, 768))
    assert said("--vae", "x", "--fast-sizes", "512,768x1024").sizes == ((512, 512), (1024, 768))


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, FILE)
    config = said("--config", path, "--port", "0", "--no-preload", "--vae", "a=one", "--device", "cpu", "--max-batch", "9")
    assert (config.port, config.preload, config.device, config.limits.max_batch) == (0, False, ("cpu",), 9)
    assert [each.name for each in config.vaes] == ["a"]
    # What no flag says is the file's.
    assert config.limits.max_pixels == 1048576


def test_without_a_file_the_values_are_the_ones_that_the_help_says() -> None:
    config = said("--vae", "x")
    assert config == ServerConfig((Source("x"),))
    for flag in FLAGS:
        if flag.key in Limits.__dataclass_fields__:
            assert getattr(config.limits, flag.key) == flag.default
        elif flag.key not in ("family", "dtype"):
            assert getattr(config, flag.key) == flag.default


@pytest.mark.parametrize(
    ("argument", "source"),
    [
        ("sdxl=/models/x.safetensors", Source("/models/x.safetensors", "sdxl")),
        ("sd-1.5=stabilityai/sd-vae-ft-mse", Source("stabilityai/sd-vae-ft-mse", "sd-1.5")),
        ("stabilityai/sd-vae-ft-mse", Source("stabilityai/sd-vae-ft-mse")),
        ("/models/a=b.safetensors", Source("/models/a=b.safetensors")),
        ("a=b=c", Source("b=c", "a")),
    ],
)
def test_a_vae_is_a_source_or_a_name_and_a_source(argument: str, source: Source) -> None:
    assert said("--vae", argument).vaes == (source,)


def test_a_file_whose_name_has_an_equals_sign_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.safetensors").touch()
    assert said("--vae", "a=b.safetensors").vaes == (Source("a=b.safetensors"),)


def test_a_family_and_a_dtype_are_those_of_the_vae() -> None:
    (vae,) = said("--vae", "x", "--family", "sdxl", "--dtype", "float16").vaes
    assert (vae.family, vae.dtype) == ("sdxl", "float16")
    assert {each.dtype for each in said("--vae", "a=x", "--vae", "b=y", "--dtype", "float16").vaes} == {"float16"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot is not known; is port meant?"),
        ("bananas = 1", "bananas is not known; there are"),
        ('port = "7870"', "port: got '7870', expected a whole number from 0 to 65535"),
        ("port = true", "port: got True, expected a whole number"),
        ("port = 1.5", "port: got 1.5, expected a whole number"),
        ("port = 65536", "port: got 65536, expected a whole number from 0 to 65535"),
        ("max-pixels = 0", "max-pixels: got 0, expected a whole number from 1 on"),
        ('preload = "yes"', "preload: got 'yes', expected true or false"),
        ("host = 5", "host: got 5, expected a text"),
        ('host = ""', "host: got '', expected a text"),
        ("device = []", "device: got [], expected a text, or a list of them"),
        ("device = [0]", "device: got [0], expected a text, or a list of them"),
        ('device = "banana"', "not banana"),
        ('device = ["auto", "cuda:1"]', "none is auto"),
        ('device = ["cpu", "cpu"]', "each is named once"),
        ('fast = "very"', "fast: got 'very', expected one of off, exact, compile"),
        ('fast-sizes = "big"', "--fast-sizes: got 'big', expected 1024 or WIDTHxHEIGHT"),
        ('dtype = "int8"', "dtype: got 'int8', expected one of auto, float32, float16, bfloat16"),
        ("batch-wait = nan", "batch-wait: got nan, expected a number from 0 to 1"),
        ("max-wait = inf\n[x]", "x is not known"),
        ("max-batch = 1\nmax_batch = 2", "stands there twice"),
        ('tls-cert = "a.pem"', "--tls-cert and --tls-key go together"),
        ("vae = 5", "vae: got 5, expected a source, a list of them, or a table"),
        ("vae = [1]", "vae: got [1], expected a source"),
        ("[vae]\nsdxl = 5", "vae.sdxl: got 5, expected a source, or a table with one"),
        ('[vae.sdxl]\nfamily = "sdxl"', "vae.sdxl: it lacks its source"),
        ('[vae.sdxl]\nsource = "x"\nfamiliy = "sdxl"', "vae.sdxl: familiy is not known; is family meant?"),
        ('[vae.sdxl]\nsource = "x"\ndtype = 16', "vae.sdxl.dtype: got 16, expected one of auto"),
        ('[vae.sdxl]\nsource = "x"\nfamily = "sd77"', "sd77"),
        ('[vae.decode]\nsource = "x"', "--vae decode=...: a VAE's name"),
        ('[vae."a/b"]\nsource = "x"', "--vae a/b=...: a VAE's name"),
        ('family = "sdxl"\n[vae]\na = "x"\nb = "y"', "[vae.NAME] family"),
        ("vae = []", "no VAE is named"),
        ("port = ", "is not TOML"),
        ("\x00", "is not TOML"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name_and_what_is_expected(tmp_path: Path, text: str, message: str) -> None:
    if "vae" not in text:
        text = f'vae = "x"\n{text}'
    with pytest.raises(SettingsError) as caught:
        said("--config", file(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value).partition("is not TOML")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no VAE is named: add --vae"),
        (["--vae", "x", "--port", "many"], "--port: got 'many', expected a whole number from 0 to 65535"),
        (["--vae", "x", "--max-wait", "soon"], "--max-wait: got 'soon', expected a number"),
        (["--vae", "a=x", "--vae", "a=y"], "two VAEs are called a"),
        (["--config", "missing.toml"], "missing.toml cannot be read: No such file"),
    ],
)
def test_what_no_command_line_can_mean_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        said(*arguments)
    assert message in str(caught.value)


def test_a_relative_path_in_the_file_is_beside_it_and_one_of_a_flag_where_the_user_is(tmp_path: Path) -> None:
    path = file(tmp_path, 'vae = "vae"\ntoken-file = "token"')
    (tmp_path / "vae").mkdir()
    config = said("--config", path)
    assert (config.vaes[0].source, config.token_file) == (str(tmp_path / "vae"), str(tmp_path / "token"))
    assert said("--vae", "x", "--token-file", "token").token_file == "token"


def test_the_token_comes_from_its_file_else_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_VAE_TOKEN", " of-the-environment ")
    assert said("--vae", "x").token() == "of-the-environment"
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    assert said("--vae", "x", "--token-file", str(path)).token() == "s3cret"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"two words", b"\xff\xfe"])
def test_a_token_file_without_a_token_lets_nobody_in_by_mistake(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match="--token-file"):
        said("--vae", "x", "--token-file", str(path)).token()


def test_a_vae_of_this_machine_is_found_from_the_file_and_a_hub_id_stays_one(tmp_path: Path) -> None:
    relative = os.path.relpath(DEMO_VAE, tmp_path)
    config = said("--config", file(tmp_path, f'vae = ["demo={relative}", "stabilityai/sd-vae-ft-mse"]'))
    assert Path(config.vaes[0].source).resolve() == DEMO_VAE.resolve()
    assert config.vaes[1].source == "stabilityai/sd-vae-ft-mse"


def test_the_page_on_the_server_has_a_file_that_is_taken_and_flags_that_there_are(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    assert [each.name for each in said("--config", file(tmp_path, text)).vaes] == ["sdxl", "flux2", "pony"]
    of_serve = PAGE.partition("## Many machines")[0]
    others = {"--help", "--vae", "--config", "--endpoint", "--upgrade", "--index-url", "--now", "--directory", "--owner"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"### Docker.*?(?=## Watching)", "", of_serve, flags=re.S))) <= {
        *(flag.option for flag in FLAGS),
        *others,
    }
