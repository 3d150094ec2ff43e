"""Makes docs/troubleshooting.md: python -m tests.troubleshooting.

The messages are those that the code raises, a placeholder for each value in them; the rest is of docs/troubleshooting.toml.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from remote_vae import errors
from remote_vae.settings import read_toml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "remote_vae"
PAGE = ROOT / "docs" / "troubleshooting.md"
_HEAD = """# Troubleshooting by message

Made from the code by `python -m tests.troubleshooting`; `…` stands for a name, a number or a path. Look for a few words of
what you read. If it does not help: **Settings, Remote VAE, Diagnosis** (without a UI: `python -m remote_vae diagnosis`) is
what a report should have in it.
"""
# Shorter ones are all placeholder.
_SHORTEST = 8


@lru_cache(maxsize=1)
def sections() -> list[dict[str, object]]:
    found: list[dict[str, object]] = read_toml("../docs/troubleshooting.toml")["section"]
    return found


def page() -> str:
    parts = [_HEAD]
    messages = {file: list(messages_of(file)) for file in files()}
    for number, section in enumerate(sections()):
        mine = sorted({message for file, found in messages.items() if section_of(file) == number for message in found})
        listed = "".join(f"- `{each}`\n" for each in mine)
        parts.append(f"## {section['title']}\n\n{str(section['advice']).strip()}\n\n{listed}")
    return "\n".join(parts)


def files() -> list[str]:
    """Of the package, those with a message, by their path in it."""
    every = (path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py")))
    return [file for file in every if any(messages_of(file))]


def section_of(file: str) -> int | None:
    """The first section that names the file or, with a / at the end, its folder; None: there is none."""
    for number, section in enumerate(sections()):
        names = section["files"]
        assert isinstance(names, list)
        if any(file == name or (name.endswith("/") and file.startswith(name)) for name in names):
            return number
    return None


def messages_of(file: str) -> Iterator[str]:
    """The messages, and the short reasons beside them, of the errors that a file makes."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    kinds = _kinds()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in kinds:
            texts = [*node.args[:1], *(each.value for each in node.keywords if each.arg == "reason")]
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and file == "remote/reasons.py":
            texts = node.value.elts[:1]
        else:
            continue
        yield from (text for each in texts if len((text := _text(each)).strip("… :;,")) >= _SHORTEST)


@lru_cache(maxsize=1)
def _kinds() -> set[str]:
    """The names of our errors' classes, those of errors.py and those made of them elsewhere."""
    kinds = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, Exception)}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while more := {each.name for each in classes if {_name(base) for base in each.bases} & kinds} - kinds:
        kinds |= more
    return kinds


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    return f"{_text(node.left)}{_text(node.right)}" if isinstance(node, ast.BinOp) else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
