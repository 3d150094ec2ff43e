from __future__ import annotations

import re
from pathlib import Path

import pytest

from remote_vae.cli import _parser
from remote_vae.vae.families import load_families
from tests.readme import PAGES, README, ROOT, support, with_table

TEXT = README.read_text(encoding="utf-8")
# What people read.
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINKS = re.compile(r"\]\(([\w./-]+)(?:#[\w-]+)?\)")
_FILES = re.compile(r"`((?:tests|assets|bench|settings|remote_vae)/[\w./]+\.\w+)`")


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_are_those_of_the_data(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    assert with_table(name, text) == text, "run: python -m tests.readme"


def test_every_family_has_its_row_and_every_no_its_reason() -> None:
    columns, reasons, vaes = support()
    assert load_families().keys() <= vaes.keys()
    assert {entry[column] for entry in vaes.values() for column in columns} == {"yes", "seen", "not tried", *reasons}


@pytest.mark.parametrize("document", DOCUMENTS, ids=[each.name for each in DOCUMENTS])
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [name for name in _LINKS.findall(text) if not (document.parent / name).exists()]
    missing += [name for name in _FILES.findall(text) if not (ROOT / name).exists()]
    assert missing == []


def test_the_commands_of_the_readme_exist() -> None:
    commands = set(re.findall(r"remote-vae ([a-z]+)", TEXT))
    assert {"serve", "check", "decode"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            _parser().parse_args([command, "--help"])
        assert caught.value.code == 0


def test_windows_lines_install_what_make_installs() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for requirement in ("torch==2.13.0", "-r requirements-dev.txt"):
        assert requirement in makefile
        assert requirement in TEXT


def test_every_pinned_requirement_is_exact_and_none_moves_torch() -> None:
    lines = (Path(README.parent) / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", pin) for pin in pins)
    assert not [pin for pin in pins if re.match(r"(torch|triton|nvidia|cuda)", pin)]
