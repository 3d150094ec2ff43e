"""What the server says of its own calls, to programs and to people."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from remote_vae.server.app import create_app
from remote_vae.server.catalogue import OneVae
from remote_vae.server.engine import Engine
from remote_vae.server.models import LoadedVae
from remote_vae.wire import DecodeRequest, EncodeRequest, Output
from remote_vae.wire.query import Scaling
from tests.sharing import ask

TOKEN = {"Authorization": "Bearer s3cret"}


def app(loaded: LoadedVae, token: str = "") -> Any:
    return create_app(Engine(OneVae(loaded, about=loaded.about)), token)


@pytest.fixture(scope="module")
def document(loaded: LoadedVae) -> dict[str, Any]:
    told = ask(app(loaded), "/openapi.json")
    assert told.status == 200
    made: dict[str, Any] = json.loads(told.body)
    return made


def parameters(document: dict[str, Any], path: str) -> set[str]:
    return {each["name"] for each in document["paths"][path]["post"]["parameters"]}


def test_every_path_is_there_with_what_it_answers(document: dict[str, Any]) -> None:
    calls = {"/decode", "/encode", "/{name}/decode", "/{name}/encode"}
    assert set(document["paths"]) == calls | {"/health", "/info", "/metrics", "/openapi.json", "/docs"}
    for path in calls:
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "404", "413", "503", "507"} <= set(operation["responses"])
        assert operation["requestBody"]["content"]
        assert all(each["description"] for each in operation["parameters"])


def test_every_key_that_our_client_sends_is_described(document: dict[str, Any]) -> None:
    scaling = Scaling(0.5, 0.1)
    decodes = [
        DecodeRequest(torch.zeros(1, 4, 8, 8), output, scaling, 64, 64, "sdxl", truncate=True)
        for output in Output
        if output is not Output.MP4
    ]
    pixels = torch.zeros(1, 3, 8, 8)
    encodes = [EncodeRequest(pixels, scaling, family="sdxl", packed=True), EncodeRequest(pixels, posterior=True)]
    for path, requests in (("/decode", decodes), ("/encode", encodes)):
        sent = {key for request in requests for key, _ in request.to_http().query}
        assert sent <= parameters(document, path)
        assert parameters(document, f"/{{name}}{path}") == parameters(document, path) | {"name"}


def test_the_page_says_the_same_without_a_script_or_another_machine(loaded: LoadedVae, document: dict[str, Any]) -> None:
    page = ask(app(loaded), "/docs").body.decode()
    for name in parameters(document, "/decode") | parameters(document, "/encode"):
        assert f"<th>{name}" in page
    assert "POST /decode" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"?(https?:)?//", page)


def test_what_may_not_be_seen_without_the_token(loaded: LoadedVae) -> None:
    guarded = app(loaded, "s3cret")
    for path in ("/docs", "/openapi.json", "/metrics", "/info", "/custom/info", "/custom"):
        told = ask(guarded, path)
        assert told.status == 401, path
        assert "REMOTE_VAE_TOKEN" in told.error
    for path in ("/docs", "/openapi.json", "/info", "/custom/info", "/custom"):
        assert ask(guarded, path, headers=TOKEN).status == 200, path
