"""What stands in more than one document, or in a document and in a file of the project, is the same."""

from __future__ import annotations

import re

from remote_vae.extension.commands import server_commands
from remote_vae.settings import load_options, parse_toml, read_toml
from tests.readme import ROOT

PROJECT = parse_toml((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A requirement's name is what stands before versions, extras and markers.
_NAME = re.compile(r"[\w.-]+")
_ADDRESSED = re.compile(r"(?:git\+|git clone )(https://[^\s\"`]+)")


def required() -> set[tuple[str, str]]:
    """Each extra, "" for none, with the name of each package that it takes from an index."""
    extras = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    named = {(extra, _NAME.match(line)[0]) for extra, lines in extras.items() for line in lines}  # type: ignore[index]
    return {(extra, name) for extra, name in named if name != PROJECT["name"]}


def in_the_table() -> list[tuple[str, str]]:
    """The same, of the table in CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Dependencies")[2]
    found = []
    for cell in re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", text, re.M)[1:]:
        extra, names = re.fullmatch(r"(?:`(\w+)`: )?(.+)", cell).groups("")  # type: ignore[union-attr]
        found += [(extra, re.sub(r" \(.*\)", "", name)) for name in names.split(", ")]
    return found


def test_every_dependency_and_no_other_stands_in_the_table_with_its_reason() -> None:
    listed = in_the_table()
    assert sorted(listed) == sorted(required())


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", index)) == pages


def test_the_address_of_the_repository_is_one() -> None:
    texts = [path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]]
    addresses = [address for text in [*texts, *server_commands("", "")] for address in _ADDRESSED.findall(text)]
    assert len(addresses) > 5
    # The panel takes it from where this checkout was cloned from, where that is an address.
    assert set(addresses) - {PROJECT["urls"]["Repository"]} <= set(_ADDRESSED.findall(server_commands("", "")[0]))


def test_the_chinese_readme_has_the_commands_files_and_links_of_the_english_one() -> None:
    parts = README.partition("## What happens when things fail")
    english = parts[0] + parts[2].partition("## Command line")[2]
    for pattern in (
        r"remote-vae (?:serve|check|bench|decode|encode|plan|diagnosis|demo)(?: --(?:vae|family) [\w.-]+)*",
        r"(?:pip|apt|git|make) [a-z]+ [^`\n]*(?=[`\n])",
        r"[\w.-]+\.safetensors",
        r"`(\w+_\w+)`",
    ):
        found = {one.replace("YOUR-CHECKPOINT", "您的模型").strip() for one in re.findall(pattern, english)}
        assert found
        assert [one for one in sorted(found) if one not in CHINESE] == []


def test_both_readmes_name_what_is_pressed_as_the_panel_does() -> None:
    words = read_toml("words.toml")
    for text, language in ((README, "en"), (CHINESE, "zh")):
        options = load_options(language)
        named = [
            options["endpoint"].label,
            options["enabled"].label,
            words["test"][language],
            words["comfyui_enabled"][language],
        ]
        assert [label for label in named if f"**{label}**" not in text] == []
