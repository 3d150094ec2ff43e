"""What a browser sees of the server: a page without scripts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from remote_vae.vae.families import load_families
from remote_vae.version import __version__

HEADERS = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}

_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Remote VAE</title>
<style>body { font: 1em sans-serif; margin: 2em auto; max-width: 50em; padding: 0 1em } h2 { font-size: 1.1em }
th, td { text-align: left; padding: 0.1em 2em 0.1em 0; vertical-align: top } th { white-space: nowrap; font-weight: normal }
thead th { font-weight: bold }</style>
"""
_WHAT = "<p>This server does VAE decode and encode for image generators.</p>\n"
_ENTER = "<p>To use it, enter this in your UI, under Settings, Remote VAE:</p>\n"
_ONE_ALONE = "<p>It picks the VAE of your model. For one of them alone, whatever a client names:</p>\n"
_THIS_PAGE = "<p>To use it, enter the address of this page in your UI as the endpoint, under Settings, Remote VAE.</p>\n"
_FOOT = (
    '<p><a href="info">info</a> says the same and more for programs, <a href="health">health</a> whether it is at work, '
    '<a href="metrics">metrics</a> what it did; <a href="docs">docs</a> says how it is called.</p>\n'
)


def status_page(info: Mapping[str, Any] | None, status: Mapping[str, Any], endpoints: Sequence[str]) -> str:
    """The page for those who may use the server.

    Args:
        info: what ``Engine.info`` says; None: there is no VAE at the moment.
        status: what ``Engine.status`` says.
        endpoints: under which it is reached, if that is known.
    """
    models = [] if info is None else info["models"]
    several = models if len(models) > 1 else []
    parts = [_WHAT, _to_enter(endpoints, [each["name"] for each in several])]
    for each in models:
        parts.append(f"<h2>{escape(each['name'])}</h2>\n" if several else "")
        parts.append(_table(_of_vae(each)))
    if not models:
        parts.append(_table([("VAE", "no model is loaded yet")]))
    running = "one call is running" if status["running"] else "no call is running"
    rows = [
        ("running since", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["since"]))),
        ("calls made", f"{status['decodes']} decodes, {status['encodes']} encodes"),
        ("now", f"{running}, {status['waiting']} are waiting"),
        *([] if info is None else _of_limits(info["limits"], video=any(each.get("video") for each in models))),
    ]
    parts += ["<h2>the server</h2>\n" if several else "", _table(rows), _FOOT]
    return framed(f"Remote VAE {__version__}", "".join(parts))


def closed_page(why: str) -> str:
    """The page for everybody else: ``why`` they are refused, and nothing of the VAE or of who uses it."""
    return framed(f"Remote VAE {__version__}", f"{_WHAT}{_THIS_PAGE}<p>{escape(why)}</p>\n")


def framed(heading: str, body: str) -> str:
    """A whole page around ``body``, which is HTML."""
    return f"{_HEAD}<h1>{escape(heading)}</h1>\n{body}"


def lines_to_enter(endpoints: Sequence[str], name: str = "") -> list[str]:
    """What is typed into a UI, a line for each address of the server; of the VAE called ``name`` alone, where it is given."""
    return [f"Endpoint: {url}{'/' if name else ''}{name}" for url in endpoints]


def _to_enter(endpoints: Sequence[str], names: Sequence[str]) -> str:
    if not endpoints:
        return _THIS_PAGE
    how = _ENTER + _preformatted(lines_to_enter(endpoints))
    alone = [line for name in names for line in lines_to_enter(endpoints, name)]
    return how + (_ONE_ALONE + _preformatted(alone) if alone else "")


def _preformatted(lines: Sequence[str]) -> str:
    return "<pre>\n{}\n</pre>\n".format("\n".join(map(escape, lines)))


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>\n{lines}\n</table>\n"


def _of_vae(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of one that was never loaded no more than a few things are known."""
    known = load_families().get(model.get("family", ""))
    rows = [("VAE", str(model.get("model", model["name"])))]
    if "family" in model:
        rows.append(("family", known.label if known else "custom"))
    if "dtype" in model:
        rows.append(("computes in", f"{model['dtype']} on {model['device']}"))
    return rows if model["loaded"] else [*rows, ("loaded", "when it is asked for")]


def _of_limits(limits: Mapping[str, Any], *, video: bool) -> list[tuple[str, str]]:
    longest = ("longest video", f"{limits['max_frames']} frames, {limits['max_video_pixels']} pixels in all")
    return [
        ("largest picture or frame", f"{limits['max_pixels']} pixels"),
        ("at once", f"{limits['max_batch']} pictures, {limits['max_total_pixels']} pixels in all"),
        *([longest] if video else []),
        ("most that wait", f"{limits['max_waiting']} calls"),
    ]
