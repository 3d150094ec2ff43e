"""A host's web app with the shared VAE in it, asked by the extension of another UI."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import torch
import uvicorn
from diffusers import AutoencoderKL
from fastapi import FastAPI, Request, Response
from starlette.middleware.gzip import GZipMiddleware

from remote_vae.call import Answer, VaeCall
from remote_vae.errors import EndpointError, NotOffered
from remote_vae.extension.share import mount
from remote_vae.remote import same_vae
from remote_vae.remote.route import RemoteRoute
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op, VaeAtWork
from remote_vae.vae.families import find_family
from remote_vae.vae.fingerprint import fingerprint
from remote_vae.wire import DecodeAnswer, EncodeAnswer
from tests.hosts.a1111_standin import LdmVae
from tests.sharing import QueueLock, Sharing

TIMEOUT = 30


def host_app() -> FastAPI:
    """With what the hosts' apps have: middleware, and a route that takes every path."""
    app = FastAPI()
    app.add_middleware(GZipMiddleware, minimum_size=1000)

    @app.middleware("http")
    async def timed(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["X-Process-Time"] = "0"
        return response

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def everything(path: str) -> str:
        return f"gradio {path}"

    return app


class Ui:
    """A host under uvicorn; the VAE is shared after it has started, as ``on_app_started`` comes then."""

    def __init__(self, provider: Sharing) -> None:
        self.provider = provider
        self.lock = QueueLock()
        self.app = host_app()
        self._server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        assert requests.get(f"{self.url}/remote-vae/info", timeout=TIMEOUT).json() == "gradio remote-vae/info"
        mount(self.app, provider, self.lock)

    def get(self, path: str) -> requests.Response:
        return requests.get(f"{self.url}/remote-vae{path}", timeout=TIMEOUT)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        answer = remote(self, "decode", latents)
        assert isinstance(answer, DecodeAnswer)
        return answer.pixels(torch.device("cpu"), torch.float32)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def ui(vae: AutoencoderKL) -> Iterator[Ui]:
    running = Ui(Sharing(LdmVae(vae)))
    yield running
    running.close()


def remote(ui: Ui, op: Op, tensor: torch.Tensor) -> Answer:
    """A VAE call of another UI, whose endpoint is this one."""
    settings = Settings(endpoint=f"{ui.url}/remote-vae", transfer="raw")
    call: VaeCall[Answer] = VaeCall(op, tensor, VaeAtWork(None, find_family("sd1")), adopt=lambda answer: answer)
    return RemoteRoute().run(call, settings).value


def test_another_ui_gets_what_this_ones_vae_makes_to_the_last_bit(ui: Ui, latents: torch.Tensor, pixels: torch.Tensor) -> None:
    assert ui.provider.vae is not None
    with torch.no_grad():
        expected = ui.provider.vae.decode(latents)
        moments = ui.provider.vae.encode(pixels).parameters
    assert torch.equal(ui.decode(latents), expected)
    encoded = remote(ui, "encode", pixels)
    assert isinstance(encoded, EncodeAnswer)
    assert encoded.is_posterior
    assert torch.equal(encoded.latents, moments)
    assert ui.provider.vae.calls == ["decode", "encode"] * 2


def test_info_says_which_vae_it_is(ui: Ui) -> None:
    assert ui.provider.vae is not None
    info = ui.get("/info").json()
    assert (info["server"], info["family"], info["posterior"], info["model"]) == ("remote-vae", "sd1", True, "demo")
    assert info["fingerprint"] == fingerprint(ui.provider.vae.state_dict())
    assert info["dtype"] == "float32"


def test_a_ui_that_is_its_own_endpoint_does_not_wait_for_itself(
    ui: Ui, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ui.provider.vae is not None
    at_work = VaeAtWork(ui.provider.vae, find_family("sd1"))
    call: VaeCall[Answer] = VaeCall("decode", latents, at_work, adopt=lambda answer: answer)
    settings = Settings(endpoint=f"{ui.url}/remote-vae")
    with ui.lock.lock, pytest.raises(NotOffered, match="is this UI itself"):
        RemoteRoute().run(call, settings)
    # As another process sees it.
    monkeypatch.setattr(same_vae, "THIS_PROCESS", "another")
    assert isinstance(RemoteRoute().run(call, settings).value, DecodeAnswer)


def test_while_the_option_is_off_there_is_nothing_here(ui: Ui, latents: torch.Tensor) -> None:
    ui.provider.on = False
    for path in ("/info", "/health", "/"):
        answer = ui.get(path)
        assert answer.status_code == 404
        assert "Share this UI's VAE" in answer.json()["error"]
    with pytest.raises(EndpointError, match="404"):
        ui.decode(latents)
    ui.provider.on = True
    assert ui.get("/info").ok


def test_while_no_model_is_loaded_a_call_is_a_503_and_says_why(ui: Ui, latents: torch.Tensor) -> None:
    vae, ui.provider.vae = ui.provider.vae, None
    assert ui.get("/info").status_code == 503
    with pytest.raises(EndpointError, match="generate something first") as caught:
        ui.decode(latents)
    assert caught.value.status == 503
    ui.provider.vae = vae
    assert ui.decode(latents).shape == (1, 3, 64, 96)


def test_latents_of_another_family_are_refused_at_once(ui: Ui) -> None:
    sdxl = {"shape": [1, 4, 8, 8], "dtype": "float32", "output_type": "pt", "family": "sdxl"}
    with ui.lock:
        answer = requests.post(f"{ui.url}/remote-vae/decode", params=sdxl, data=bytes(1024), timeout=TIMEOUT)
        assert answer.status_code == 400
        answer = requests.post(f"{ui.url}/remote-vae/encode", params={"family": "sdxl"}, data=b"x", timeout=TIMEOUT)
        assert answer.status_code == 400
        assert "request is for SDXL" in answer.json()["error"]


def test_a_call_holds_the_hosts_lock_and_waits_while_the_host_has_it(ui: Ui, latents: torch.Tensor) -> None:
    held: list[bool] = []
    ui.provider.watch = lambda: held.append(ui.lock.lock.locked())
    made: list[torch.Tensor] = []
    client = threading.Thread(target=lambda: made.append(ui.decode(latents)))
    ui.lock.lock.acquire()
    client.start()
    assert ui.lock.asked.wait(10)
    # A generation runs; who asks what there is does not wait for it.
    assert ui.get("/info").ok
    assert ui.get("/health").json() == {"status": "ok", "running": True, "waiting": 0}
    assert (made, held) == ([], [])
    ui.lock.lock.release()
    client.join(10)
    assert len(made) == 1
    assert held == [True]
    assert not ui.lock.lock.locked()


def test_a_client_that_leaves_while_the_host_generates_is_not_served(ui: Ui, latents: torch.Tensor) -> None:
    """Behind the host's middleware as well."""
    assert ui.provider.vae is not None
    ui.lock.lock.acquire()
    query = "shape=1&shape=4&shape=8&shape=8&dtype=float32&output_type=pt"
    head = f"POST /remote-vae/decode?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1024\r\n\r\n"
    with socket.create_connection(("127.0.0.1", ui.port)) as leaver:
        leaver.sendall(head.encode() + bytes(1024))
        assert ui.lock.asked.wait(10)
    for _ in range(5):
        # Each makes the server go round once more; by then it has seen who left.
        ui.get("/health")
    ui.lock.lock.release()
    assert ui.decode(latents).shape == (1, 3, 64, 96)
    assert ui.provider.vae.calls == ["decode"]


def test_mounting_again_changes_nothing_and_a_new_app_gets_its_own(ui: Ui) -> None:
    def mounts(app: FastAPI) -> int:
        return sum(getattr(route, "name", "") == "remote-vae" for route in app.router.routes)

    mount(ui.app, ui.provider, ui.lock)
    assert mounts(ui.app) == 1
    reloaded = host_app()
    mount(reloaded, ui.provider, ui.lock)
    assert mounts(reloaded) == 1


def test_the_rest_of_the_hosts_app_stays_and_every_error_here_is_json(ui: Ui) -> None:
    assert requests.get(f"{ui.url}/sdapi/v1/options", timeout=TIMEOUT).json() == "gradio sdapi/v1/options"
    assert requests.get(f"{ui.url}/remote-vae-other", timeout=TIMEOUT).json() == "gradio remote-vae-other"
    assert ui.get("/nowhere").status_code == 404
    assert ui.get("/nowhere").json()["error"]


def test_a_page_and_a_proxy_are_refused_in_the_hosts_app_too(ui: Ui) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"X-Forwarded-For": "127.0.0.1"}, {"Host": "evil.example"}):
        assert requests.get(f"{ui.url}/remote-vae/info", headers=headers, timeout=TIMEOUT).status_code == 403


def test_the_token_of_the_environment_is_asked_for(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_VAE_TOKEN", " s3cret ")
    ui = Ui(Sharing(LdmVae(vae)))
    try:
        answers = [
            requests.get(f"{ui.url}/remote-vae/info", headers={"Authorization": f"Bearer {token}", "Via": "x"}, timeout=TIMEOUT)
            for token in ("s3cret", "wrong")
        ]
        assert [answer.status_code for answer in answers] == [200, 401]
    finally:
        ui.close()
