"""Two hundred clients before a queue of 32: nothing is lost, nobody gets another's picture, and memory stays as it is."""

from __future__ import annotations

import http.client
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.load import Server
from tests.server.asking import wait_until
from tests.vaes import small_kl

CLIENTS = 200
QUEUE = 32
SHAPE = (1, 4, 16, 16)
QUERY = "&".join(f"shape={size}" for size in SHAPE) + "&dtype=float32&output_type=pt"
# What the C library keeps of batches of sizes that were not made before. That nothing is kept of a call: test_batching.
MOST_MEGABYTES = 150
# Seconds after which a server that nobody calls gives back what it does not use.
REST = 1.5


def tiny() -> Any:
    """A VAE that takes 10 ms for a picture."""
    return small_kl("sd1", block_out_channels=(8,) * 4, norm_num_groups=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    tiny().save_pretrained(path)
    return path


@pytest.fixture
def process(folder: Path) -> Iterator[Server]:
    server = Server(folder, "--device", "cpu", "--max-waiting", str(QUEUE), "--batch-pixels", "1048576")
    yield server
    server.close()


def latents(client: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(client))


def call(server: Server, client: int, refused: Counter[int]) -> torch.Tensor:
    """The picture of one client, who comes back when he is told to."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = latents(client).numpy().tobytes()
    while True:
        connection.request("POST", f"/decode?{QUERY}", body)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 503:
            break
        refused[client] += 1
        time.sleep(float(response.headers["Retry-After"]))
    connection.close()
    assert response.status == 200, answer
    return torch.frombuffer(bytearray(answer), dtype=torch.float32).reshape(1, 3, 128, 128)


def test_of_200_clients_before_a_queue_of_32_each_gets_its_own_picture(process: Server, folder: Path) -> None:
    refused: Counter[int] = Counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        # What a process keeps from its first calls on, it has now.
        list(pool.map(lambda client: call(process, client, Counter()), range(2 * QUEUE)))
        time.sleep(REST)
        before = process.megabytes()
        made = list(pool.map(lambda client: call(process, client, refused), range(CLIENTS)))
    vae = tiny()
    with torch.inference_mode():
        expected = torch.cat([vae.decode(torch.cat([latents(client) for client in range(start, start + 20)])).sample
                              for start in range(0, CLIENTS, 20)])  # fmt: skip
    off = (torch.cat(made) - expected).abs().amax(dim=(1, 2, 3))
    # In which batch a picture was made shows in its last bits.
    assert off.max() < 1e-4
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert len(refused) >= CLIENTS - 2 * QUEUE
    # What is over goes back to the system.
    wait_until(lambda: process.megabytes() < before + MOST_MEGABYTES)
