"""Makes the options table of the README from settings/options.toml: python -m tests.readme."""

from __future__ import annotations

from pathlib import Path

from remote_vae.settings import Option, load_options

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- options: made by python -m tests.readme -->\n"
END = "<!-- end of options -->\n"


def options_table() -> str:
    rows = ["| option | default | | |", "|---|---|---|---|"]
    rows += [f"| `{option.key}` | {_default(option)} | {option.label} | {option.help} |" for option in load_options().values()]
    return "\n".join(rows) + "\n"


def _default(option: Option) -> str:
    if isinstance(option.default, bool):
        return "on" if option.default else "off"
    if isinstance(option.default, float):
        return f"{option.default:g} {option.unit} ({option.min:g} to {option.max:g})"
    if option.choices:
        return f"{option.default} ({', '.join(choice for choice in option.choices if choice != option.default)})"
    return option.default or "none"


def with_table(text: str) -> str:
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + options_table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
