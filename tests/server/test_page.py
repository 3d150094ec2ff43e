"""The page that a browser sees at GET /."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import requests
import torch

from remote_vae.server.app import create_app
from remote_vae.server.catalogue import OneVae
from remote_vae.server.engine import Engine
from remote_vae.server.models import LoadedVae
from tests.conftest import ServerThread
from tests.server.asking import TIMEOUT, decode
from tests.sharing import Sharing, ask

URLS = ("http://192.168.1.20:7870", "http://studio:7870")


def app(loaded: LoadedVae, token: str = "") -> Any:
    return create_app(Engine(OneVae(loaded, about=loaded.about)), token, endpoints=URLS)


def text(app: Any, **given: Any) -> str:
    told = ask(app, "/", **given)
    assert told.status == 200
    return told.body.decode()


def rows(page: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))


def test_it_says_which_vae_there_is_what_is_allowed_and_what_to_enter(loaded: LoadedVae) -> None:
    page = text(app(loaded))
    found = rows(page)
    assert (found["VAE"], found["family"], found["computes in"]) == ("demo_vae", "custom", "float32 on cpu")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", found["running since"])
    assert found["largest picture or frame"] == "16777216 pixels"
    assert "longest video" not in found
    assert all(f"Endpoint: {url}\n" in page for url in URLS)


def test_it_counts_the_calls_that_were_made(loaded: LoadedVae, latents: torch.Tensor) -> None:
    running = ServerThread(loaded)
    try:
        for _ in range(2):
            assert decode(running, latents).ok
        assert decode(running, latents * torch.nan).status_code == 400
        found = rows(requests.get(running.url, timeout=TIMEOUT).text)
    finally:
        running.close()
    assert found["calls made"] == "2 decodes, 0 encodes"
    assert found["now"] == "no call is running, 0 are waiting"


def test_it_has_no_scripts_and_the_browser_runs_none(server: ServerThread) -> None:
    answer = requests.get(server.url, timeout=TIMEOUT)
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "<script" not in answer.text


def test_without_the_token_it_says_that_one_is_needed_and_nothing_else(loaded: LoadedVae) -> None:
    guarded = app(loaded, "s3cret")
    closed = text(guarded, headers={"Authorization": "Bearer wrong"})
    assert "REMOTE_VAE_TOKEN" in closed
    for secret in ("demo_vae", "float32", "192.168.1.20", "studio", "decodes", "since", "s3cret"):
        assert secret not in closed
    assert rows(text(guarded, headers={"Authorization": "Bearer s3cret"}))["VAE"] == "demo_vae"


def test_a_name_of_a_file_is_no_markup(loaded: LoadedVae) -> None:
    assert rows(text(app(replace(loaded, source="<b>&"))))["VAE"] == "&lt;b&gt;&amp;"


def test_while_a_ui_has_no_model_it_says_so() -> None:
    page = text(create_app(Engine(OneVae(Sharing()))))
    assert rows(page)["VAE"] == "no model is loaded yet"
    assert "address of this page" in page
