"""Makes the tables of docs/options.md and docs/support.md: python -m tests.readme.

The options are those of settings/options.toml, the VAEs those of settings/families.toml and docs/support.toml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remote_vae.settings import Option, load_options, read_toml
from remote_vae.vae.families import load_families

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


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


def support() -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, Any]]]:
    """The columns, the reasons, and the VAEs with what each column has for them."""
    data = read_toml("../docs/support.toml")
    columns = data["columns"]
    defaults = {"class": "AutoencoderKL", **dict.fromkeys(columns, "yes")}
    vaes = {key: {**defaults, **entry} for key, entry in data.items() if key not in ("columns", "reasons")}
    return columns, data["reasons"], vaes


def support_table() -> str:
    columns, reasons, vaes = support()
    used = list(dict.fromkeys(entry[column] for entry in vaes.values() for column in columns if entry[column] in reasons))
    rows = [f"| VAE | models | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    for key, entry in vaes.items():
        cells = [f"no, {used.index(entry[column]) + 1}" if entry[column] in used else entry[column] for column in columns]
        rows.append(f"| {' | '.join([*_named(key, entry), *cells])} |")
    notes = [f"{number}. {reasons[reason]}" for number, reason in enumerate(used, 1)]
    return "\n".join([*rows, "", *notes]) + "\n"


def _named(key: str, entry: dict[str, Any]) -> tuple[str, str]:
    family = load_families().get(key)
    label = entry["label"] if family is None else family.label
    models = entry.get("models", ()) if family is None else family.shared_by
    public = family is not None and family.decode_endpoint
    return f"{label} (public endpoint)" if public else label, ", ".join(models)


TABLES = {"options": options_table, "support": support_table}
PAGES = {name: ROOT / "docs" / f"{name}.md" for name in TABLES}


def with_table(name: str, text: str) -> str:
    begin, end = f"<!-- {name}: made by python -m tests.readme -->\n", f"<!-- end of {name} -->\n"
    head, _, rest = text.partition(begin)
    return head + begin + TABLES[name]() + end + rest.partition(end)[2]


if __name__ == "__main__":
    for name, page in PAGES.items():
        page.write_text(with_table(name, page.read_text(encoding="utf-8")), encoding="utf-8")
