"""A server from its start to its end: ready when it can answer, several VAEs, https, and nothing that has begun is lost."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import trustme

from remote_vae import remote_decode
from remote_vae.errors import EndpointUnreachable, SettingsError
from remote_vae.remote.client import EndpointClient
from remote_vae.remote.transport import Urllib3Transport
from remote_vae.server.admission import Closed
from remote_vae.server.models import LoadedVae
from remote_vae.server.own import OwnVaes, Source
from remote_vae.server.process import Tls
from remote_vae.wire import DecodeRequest, Output
from tests.conftest import DEMO_VAE, ServerThread
from tests.server.asking import TIMEOUT, body, decode, head, wait_until
from tests.vaes import tiny_flux

ROOT = Path(__file__).resolve().parent.parent.parent


def health(server: ServerThread) -> requests.Response:
    return requests.get(f"{server.url}/health", timeout=TIMEOUT)


class Held:
    """A VAE whose calls begin, and end when they may."""

    def __init__(self, loaded: LoadedVae) -> None:
        self.loaded = loaded
        self.begun, self.may_end = threading.Event(), threading.Event()
        loaded.vae.decoder.register_forward_pre_hook(self._hold)

    def _hold(self, *_: Any) -> None:
        self.begun.set()
        assert self.may_end.wait(TIMEOUT)


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held(tiny_flux())
    yield made
    made.may_end.set()


FLUX = torch.randn(1, 16, 4, 4)


# --- ready ---------------------------------------------------------------------------------------------------------------


def test_while_it_loads_it_says_so_and_lets_nobody_in(loaded: LoadedVae, latents: torch.Tensor) -> None:
    running = ServerThread(loaded)
    try:
        running.engine.admission.closed = Closed("loading", "this server is loading its VAE")
        answer = health(running)
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        refused = decode(running, latents)
        assert (refused.status_code, refused.json()["error"]) == (
            503,
            "this server is loading its VAE; try again later",
        )
        assert int(refused.headers["Retry-After"]) > 0
        running.engine.admission.closed = None
        assert health(running).json() == {"status": "ok", "running": False, "waiting": 0}
        assert decode(running, latents).ok
    finally:
        running.close()


def test_a_vae_that_cannot_be_loaded_makes_it_unready_until_it_can(loaded: LoadedVae, latents: torch.Tensor) -> None:
    broken = True

    def load(source: str, **_: Any) -> LoadedVae:
        if broken:
            raise SettingsError(f"--vae {source}: no such folder or file")
        return loaded

    running = ServerThread(loaded, catalogue=OwnVaes([Source("/secret/place/vae", "demo")], load=load))
    try:
        # Nobody has asked for it yet.
        assert health(running).status_code == 200
        refused = decode(running, latents)
        assert refused.status_code == 503
        assert "the VAE demo cannot be loaded" in refused.json()["error"]
        assert "/secret" not in refused.text
        assert health(running).status_code == 503
        assert "cannot be loaded" in health(running).json()["error"]
        broken = False
        assert decode(running, latents).ok
        assert health(running).status_code == 200
    finally:
        running.close()


# --- several VAEs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(loaded: LoadedVae) -> Iterator[ServerThread]:
    made = {"demo": loaded, "flux": tiny_flux()}
    sources = [Source("demo", "small"), Source("flux", "flux")]
    running = ServerThread(loaded, catalogue=OwnVaes(sources, load=lambda source, **_: made[source]))
    yield running
    running.close()


def test_each_vae_answers_under_its_name_and_beside_it_says_which_it_is(several: ServerThread, loaded: LoadedVae) -> None:
    for name, shape in (("small", (1, 4, 8, 8)), ("flux", (1, 16, 8, 8))):
        latents = torch.randn(shape)
        for path in (f"/{name}/decode", f"/{name}", f"/{name}/"):
            params = {**head(latents), "output_type": "pt"}
            answer = requests.post(several.url + path, params=params, data=body(latents), timeout=TIMEOUT)
            assert answer.status_code == 200, (path, answer.text)
            assert answer.headers["shape"] == "[1, 3, 64, 64]"
        info = requests.get(f"{several.url}/{name}/info", timeout=TIMEOUT).json()
        assert (info["latent_channels"], [each["name"] for each in info["models"]]) == (shape[1], [name])
        assert requests.get(f"{several.url}/{name}/health", timeout=TIMEOUT).status_code == 200
    assert [each["name"] for each in requests.get(f"{several.url}/info", timeout=TIMEOUT).json()["models"]] == ["small", "flux"]


def test_without_a_name_the_latents_say_which_vae_is_meant(several: ServerThread) -> None:
    assert decode(several, torch.randn(1, 16, 8, 8)).ok
    assert decode(several, torch.randn(1, 4, 8, 8)).ok


def test_a_name_that_there_is_not_is_a_404_whatever_is_asked_for(several: ServerThread) -> None:
    latents = torch.randn(1, 4, 8, 8)
    for method, path in (("POST", "/sdxl/decode"), ("POST", "/sdxl/encode"), ("GET", "/sdxl/info"), ("GET", "/sdxl")):
        answer = requests.request(method, several.url + path, params=head(latents), data=body(latents), timeout=TIMEOUT)
        assert answer.status_code == 404, path
        assert "no VAE called sdxl; it has small, flux" in answer.json()["error"]


def test_our_client_is_pointed_at_one_of_several(several: ServerThread, loaded: LoadedVae, latents: torch.Tensor) -> None:
    picture = remote_decode(f"{several.url}/small", latents, scaling_factor=1.0, output_type="pt", partial_postprocess=True)
    assert picture.size == (96, 64)


def test_the_page_lists_all_and_the_lines_to_enter(several: ServerThread) -> None:
    assert decode(several, torch.randn(1, 4, 8, 8)).ok
    page = requests.get(several.url, timeout=TIMEOUT).text
    assert re.findall(r"<h2>(\w+)</h2>", page)[:2] == ["small", "flux"]
    assert "when it is asked for" in page


# --- https ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificates(tmp_path: Path) -> tuple[trustme.CA, Tls]:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1", "localhost")
    cert, key = tmp_path / "server.pem", tmp_path / "key.pem"
    for blob in made.cert_chain_pems:
        blob.write_to_path(str(cert), append=True)
    made.private_key_pem.write_to_path(str(key))
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    return authority, Tls(str(cert), str(key))


def test_https_is_for_those_who_trust_its_certificate(
    loaded: LoadedVae,
    certificates: tuple[trustme.CA, Tls],
    latents: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = ServerThread(loaded, tls=certificates[1])
    try:
        request = DecodeRequest(latents, Output.UINT8)
        with closing(Urllib3Transport()) as untrusting, pytest.raises(EndpointUnreachable, match="certificate not accepted"):
            EndpointClient(f"{running.url}/decode", untrusting).decode(request)
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.get(running.url.replace("https", "http"), timeout=TIMEOUT)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
        with closing(Urllib3Transport()) as trusting:
            assert EndpointClient(f"{running.url}/decode", trusting).decode(request).answer.size == (64, 96)
        context = ssl.create_default_context(cafile=str(tmp_path / "authority.pem"))
        with (
            socket.create_connection(("127.0.0.1", running.port), TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            assert connection.version() in ("TLSv1.2", "TLSv1.3")
    finally:
        running.close()


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_is_loaded(
    certificates: tuple[trustme.CA, Tls], tmp_path: Path
) -> None:
    good = certificates[1]
    good.check()
    other = trustme.CA().issue_cert("localhost")
    other.private_key_pem.write_to_path(str(tmp_path / "other.pem"))
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", good.key, "-out", str(encrypted)]
    bad = [(good.cert, str(tmp_path / "other.pem")), (str(tmp_path / "missing.pem"), good.key), (good.key, good.key)]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        bad.append((good.cert, str(encrypted)))
    for cert, key in bad:
        with pytest.raises(SettingsError, match="--tls-"):
            Tls(cert, key).check()


# --- the end -------------------------------------------------------------------------------------------------------------


def test_what_has_begun_is_ended_what_comes_new_is_refused_and_then_it_goes(held: Held) -> None:
    running = ServerThread(held.loaded)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(decode, running, FLUX)
        assert held.begun.wait(TIMEOUT)
        running.process.handle_exit(signal.SIGTERM, None)
        refused = decode(running, FLUX)
        assert refused.status_code == 503
        assert "being stopped" in refused.json()["error"]
        assert int(refused.headers["Retry-After"]) > 0
        # Who waits for the call hears that it is being worked on.
        assert (health(running).status_code, health(running).json()["running"]) == (200, True)
        held.may_end.set()
        assert first.result().status_code == 200
    wait_until(lambda: not running.is_running())


def test_what_does_not_end_holds_it_up_only_so_long(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_vae.server.process._GOODBYE", 0.3)
    monkeypatch.setattr("remote_vae.server.process._LAST_BYTES", 0.3)
    running = ServerThread(held.loaded)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(decode, running, FLUX)
        assert held.begun.wait(TIMEOUT)
        running.process.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: not running.is_running())
        held.may_end.set()
        assert first.result().status_code == 503
        assert "stopped before the call was done" in first.result().json()["error"]


def test_the_second_signal_is_meant(held: Held) -> None:
    running = ServerThread(held.loaded)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(decode, running, FLUX)
        assert held.begun.wait(TIMEOUT)
        for _ in range(2):
            running.process.handle_exit(signal.SIGINT, None)
        wait_until(lambda: not running.is_running())
        held.may_end.set()
        assert first.result().status_code == 503


ENDLESS = """
import sys, time
from remote_vae.server import fast, process, run
process._GOODBYE = run._END_SECONDS = 0.3
fast.load_vae = lambda *_, **__: time.sleep(600)
from remote_vae.cli import main
sys.exit(main(["serve", "--vae", sys.argv[1], "--port", "0"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGTERM")
@pytest.mark.parametrize("source", ["endless", "sd1=endless"], ids=["at the start", "for a call"])
def test_a_vae_that_is_being_loaded_does_not_hold_up_the_end(source: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, source], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        if source == "endless":
            assert next(lines) == "loading endless ...\n"
        else:
            url = next(line.split()[-1] for line in lines if line.startswith("Endpoint: "))
            with pytest.raises(requests.exceptions.Timeout):
                requests.post(f"{url}/decode", params=head(FLUX), data=body(FLUX), timeout=0.5)
            assert requests.get(f"{url}/health", timeout=TIMEOUT).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGTERM")
@pytest.mark.usefixtures("visited_home")
def test_a_process_that_is_told_to_end_by_its_supervisor_ends_well(
    tmp_path: Path, certificates: tuple[trustme.CA, Tls]
) -> None:
    config = tmp_path / "server.toml"
    tls = certificates[1]
    config.write_text(
        f'vae = ["one={DEMO_VAE}", "two={DEMO_VAE}"]\npreload = true\nport = 0\nlog-format = "json"\n'
        f'tls-cert = "{tls.cert}"\ntls-key = "{tls.key}"\n'
    )
    command = [sys.executable, "-m", "remote_vae", "serve", "--config", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().rstrip() for _ in range(9)]
        assert [lines.pop(0) for _ in range(2)] == [f"loading {DEMO_VAE} ..."] * 2
        assert re.fullmatch(r"Remote VAE serves one \(custom VAE, .*\), two \(custom VAE, .*\)\. Enter in your UI.*", lines[0])
        (url,) = re.findall(r"^Endpoint: (https://127\.0\.0\.1:\d+)$", lines[1])
        assert lines[3:5] == [f"Endpoint: {url}/one", f"Endpoint: {url}/two"]
        assert "https" in lines[5]
        latents = torch.randn(1, 4, 8, 8)
        params = {**head(latents), "output_type": "pt"}
        for name in ("one", "two"):
            answer = requests.post(
                f"{url}/{name}/decode",
                params=params,
                data=body(latents),
                timeout=TIMEOUT,
                verify=str(tmp_path / "authority.pem"),
            )
            assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, out) == (0, "")
        records = [json.loads(line) for line in errors.splitlines()]
        assert [(each["model"], each["status"], each["size"]) for each in records] == [
            ("one", 200, "64x64"),
            ("two", 200, "64x64"),
        ]
    finally:
        process.kill()
        process.communicate()
