"""What a browser sees of the server: a page without scripts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from remote_vae.vae.families import load_families
from remote_vae.version import __version__

HEADERS = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}

_HEAD = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Remote VAE</title>
<style>body {{ font: 1em sans-serif; margin: 2em auto; max-width: 45em; padding: 0 1em }}
th {{ text-align: left; padding-right: 2em; vertical-align: top; white-space: nowrap; font-weight: normal }}</style>
<h1>Remote VAE {__version__}</h1>
<p>This server does VAE decode and encode for image generators.</p>
"""
_ENTER = "<p>To use it, enter this in your UI, under Settings, Remote VAE:</p>\n"
_THIS_PAGE = "<p>To use it, enter the address of this page in your UI as the endpoint, under Settings, Remote VAE.</p>\n"
_FOOT = (
    '<p><a href="info">info</a> says the same and more for programs, <a href="health">health</a> whether it is at work.</p>\n'
)


def status_page(info: Mapping[str, Any] | None, status: Mapping[str, Any], endpoints: Sequence[str]) -> str:
    """The page for those who may use the server.

    Args:
        info: what ``Engine.info`` says; None: there is no VAE at the moment.
        status: what ``Engine.status`` says.
        endpoints: under which it is reached, if that is known.
    """
    rows = [("VAE", "no model is loaded yet")] if info is None else _of_vae(info)
    rows += [
        ("running since", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["since"]))),
        ("calls made", f"{status['decodes']} decodes, {status['encodes']} encodes"),
        ("now", f"{'one call is running' if status['running'] else 'no call is running'}, {status['waiting']} are waiting"),
    ]
    table = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    lines = "\n".join(f"Endpoint: {escape(url)}" for url in endpoints)
    how = f"{_ENTER}<pre>\n{lines}\n</pre>\n" if lines else _THIS_PAGE
    return f"{_HEAD}{how}<table>\n{table}\n</table>\n{_FOOT}"


def closed_page(why: str) -> str:
    """The page for everybody else: ``why`` they are refused, and nothing of the VAE or of who uses it."""
    return f"{_HEAD}{_THIS_PAGE}<p>{escape(why)}</p>\n"


def _of_vae(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    limits = info["limits"]
    known = load_families().get(info["family"])
    return [
        ("VAE", str(info["model"])),
        ("family", known.label if known else "custom"),
        ("computes in", f"{info['dtype']} on {info['device']}"),
        ("largest picture or frame", f"{limits['max_pixels']} pixels"),
        ("at once", f"{limits['max_batch']} pictures, {limits['max_total_pixels']} pixels in all"),
        *(
            [("longest video", f"{limits['max_frames']} frames, {limits['max_video_pixels']} pixels in all")]
            if info["video"]
            else []
        ),
        ("most that wait", f"{limits['max_waiting']} calls"),
    ]
