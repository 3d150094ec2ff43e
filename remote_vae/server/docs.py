"""The page of ``GET /docs``: the OpenAPI document as a page without scripts, so that it needs no other machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from remote_vae.server.page import framed


def docs_page(document: Mapping[str, Any]) -> str:
    """``document``, as ``app.openapi()`` gives it, for people to read."""
    info = document["info"]
    parts = [f'<p>{_text(info["description"])}</p><p><a href="openapi.json">openapi.json</a>: the same for programs.</p>']
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2>")
            parts.extend(_operation(operation))
    return framed(f"{info['title']} {info['version']}: its calls", "\n".join(parts))


def _operation(operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<p>{_text(operation.get('description') or operation.get('summary', ''))}</p>"
    body = operation.get("requestBody")
    if body:
        yield f"<p>Body: {_text(body['description'])} Content-Type: {escape(', '.join(body['content']))}.</p>"
    if operation.get("parameters"):
        yield _table((_named(each), _described(each)) for each in operation["parameters"])
    yield _table((status, _answer(response)) for status, response in operation["responses"].items())


def _named(parameter: Mapping[str, Any]) -> str:
    where = "" if parameter["in"] == "query" else f" ({parameter['in']})"
    return f"{parameter['name']}{where}{', needed' if parameter.get('required') else ''}"


def _described(parameter: Mapping[str, Any]) -> str:
    schema = parameter["schema"]
    kinds = [*map(str, schema.get("enum", [])), *[schema[key] for key in ("type",) if key in schema and "enum" not in schema]]
    bounds = [f"{word} {schema[key]:g}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema]
    usual = [f"usually {schema['default']}"] if "default" in schema else []
    return f"{parameter.get('description', '')} ({', '.join([*kinds, *bounds, *usual])})"


def _answer(response: Mapping[str, Any]) -> str:
    headers = "".join(f" Header {name}: {header['description']}" for name, header in response.get("headers", {}).items())
    kinds = ", ".join(response.get("content", {}))
    return f"{response['description']}{f' ({kinds})' if kinds else ''}{headers}"


def _table(rows: Any) -> str:
    lines = "\n".join(f"<tr><th>{escape(str(name))}</th><td>{_text(text)}</td></tr>" for name, text in rows)
    return f"<table>\n{lines}\n</table>"


def _text(text: str) -> str:
    return "</p><p>".join(escape(" ".join(part.split())) for part in text.split("\n\n"))
