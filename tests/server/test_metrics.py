"""What Prometheus reads of a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
import torch
from prometheus_client.parser import text_string_to_metric_families

from remote_vae.server.app import create_app
from remote_vae.server.catalogue import OneVae
from remote_vae.server.engine import Engine
from remote_vae.server.models import LoadedVae
from tests.conftest import ServerThread
from tests.server.asking import TIMEOUT, Raw, decode, wait_until
from tests.sharing import ask

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def running(loaded: LoadedVae) -> Iterator[ServerThread]:
    server = ServerThread(loaded)
    yield server
    server.close()


def samples(server: ServerThread) -> Samples:
    answer = requests.get(f"{server.url}/metrics", timeout=TIMEOUT)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def count(server: ServerThread, name: str, **labels: str) -> float:
    return samples(server).get((name, tuple(sorted(labels.items()))), 0)


def test_calls_are_counted_by_model_route_and_status_with_their_bytes_and_stages(
    running: ServerThread, latents: torch.Tensor
) -> None:
    for _ in range(2):
        assert decode(running, latents).ok
    assert decode(running, latents * torch.nan).status_code == 400
    call = {"model": "custom", "route": "decode"}
    wait_until(lambda: count(running, "remote_vae_requests_total", status="400", **call) == 1)
    found = samples(running)
    assert found["remote_vae_requests_total", (("model", "custom"), ("route", "decode"), ("status", "200"))] == 2
    assert count(running, "remote_vae_received_bytes_total", **call) == 3 * latents.nbytes
    assert count(running, "remote_vae_sent_bytes_total", **call) > 2 * 3 * 64 * 96 * 4
    for stage in ("read", "send"):
        assert count(running, "remote_vae_stage_seconds_count", stage=stage, **call) == 3
    assert (count(running, "remote_vae_running"), count(running, "remote_vae_waiting")) == (0, 0)


def test_a_client_that_hangs_up_and_a_request_that_is_refused_are_counted(running: ServerThread) -> None:
    with Raw(running) as connection:
        connection.post("/decode", (1, 4, 8, 8), 1024, sent=100)
    wait_until(lambda: count(running, "remote_vae_requests_total", model="custom", route="decode", status="499") == 1)
    assert requests.post(f"{running.url}/encode", params={"shape": "x"}, timeout=TIMEOUT).status_code == 400
    assert count(running, "remote_vae_requests_total", model="", route="encode", status="400") == 1


def test_no_client_makes_a_label_of_its_own(running: ServerThread) -> None:
    before = set(samples(running))
    for path in ("/nobody/decode", "/nobody", "/decode?family=nobody", "/decode/nobody"):
        requests.post(running.url + path, data=b"x", headers={"X": "nobody"}, timeout=TIMEOUT)
    added = {labels for name, labels in set(samples(running)) - before if name == "remote_vae_requests_total"}
    assert added
    assert "nobody" not in str(added)


def test_without_the_package_the_path_says_what_is_missing(loaded: LoadedVae) -> None:
    """As in a host that shares its VAE."""
    told = ask(create_app(Engine(OneVae(loaded))), "/metrics")
    assert told.status == 404
    assert "prometheus-client" in told.error
