"""The front of a cluster, with the real app behind it in this process. Ray itself: tests/cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from remote_vae.server.admission import Limits
from remote_vae.server.app import create_app
from remote_vae.server.catalogue import OneVae
from remote_vae.server.engine import Engine
from remote_vae.server.front import AllBusy, Front, Head, Message, ReplicaGone
from remote_vae.server.models import LoadedVae
from tests.server.asking import body, head, locally, tensor_of
from tests.vaes import loaded as loaded_vae
from tests.vaes import small_kl


class Here:
    """Replicas of a VAE in this process, that die when and where they are told to: ``fate`` is asked before each message."""

    def __init__(
        self, name: str, loaded: LoadedVae | None, fate: Callable[[int, int], None] = lambda call, message: None
    ) -> None:
        self.name = name
        self.calls = 0
        self._fate = fate
        self._engine = None if loaded is None else Engine(OneVae(loaded, name, loaded.about))

    async def ask(self, head: Head, body: bytes | bytearray) -> AsyncIterator[Sequence[Message]]:
        self.calls += 1
        messages: list[Message] = []
        came = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive() -> Message:
            if not came:
                await asyncio.Event().wait()
            return came.pop()

        async def send(message: Message) -> None:
            messages.append(message)

        self._fate(self.calls, 0)
        assert self._engine is not None
        await create_app(self._engine)(head.scope(), receive, send)
        for number, message in enumerate(messages):
            yield [message]
            self._fate(self.calls, number + 1)

    async def healths(self) -> Sequence[Mapping[str, Any]]:
        return [] if self._engine is None else [self._engine.health()]

    async def infos(self) -> Sequence[Mapping[str, Any]]:
        if self._engine is None:
            return []
        return [{"server": "remote-vae", **await self._engine.ask_info()}]


@pytest.fixture(scope="module")
def flux() -> LoadedVae:
    return loaded_vae(small_kl("flux"), "flux")


def asked(front: Front, latents: torch.Tensor, path: str = "/decode", **params: Any) -> Any:
    client = TestClient(front)
    return client.post(path, params={**head(latents), "output_type": "pt", **params}, content=body(latents))


async def sent_for(front: Front, latents: torch.Tensor) -> list[Message]:
    """What is sent to a client that stays."""
    came = [{"type": "http.request", "body": body(latents), "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not came:
            await asyncio.Event().wait()
        return came.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    query = "&".join([*(f"shape={size}" for size in latents.shape), "dtype=float32"])
    await front(Head("POST", "/decode", query.encode()).scope(), receive, send)
    return sent


def test_a_replica_that_dies_before_its_answer_is_made_up_for_by_another(loaded: LoadedVae, latents: torch.Tensor) -> None:
    def first_dies(call: int, message: int) -> None:
        if call == 1:
            raise ReplicaGone("killed")

    replicas = Here("sd1", loaded, first_dies)
    answer = asked(Front([replicas]), latents)
    assert torch.equal(tensor_of(answer), locally(loaded, latents))
    assert replicas.calls == 2


def test_a_call_that_ends_every_replica_ends_two_of_them(loaded: LoadedVae, latents: torch.Tensor) -> None:
    def dies(call: int, message: int) -> None:
        raise ReplicaGone("the replica of sd1 that worked on it has ended")

    replicas = Here("sd1", loaded, dies)
    answer = asked(Front([replicas]), latents)
    # In JSON: our own client takes it for the server's word, and does not ask again.
    assert (answer.status_code, answer.json()) == (500, {"error": "the replica of sd1 that worked on it has ended"})
    assert replicas.calls == 2


@pytest.mark.parametrize("error", [ReplicaGone("killed"), RuntimeError("an error of the cluster's own")])
def test_an_answer_whose_replica_died_in_it_is_cut_off_and_nothing_else_follows(
    loaded: LoadedVae, latents: torch.Tensor, error: Exception
) -> None:
    def dies_in_it(call: int, message: int) -> None:
        if message == 1:
            raise error

    replicas = Here("sd1", loaded, dies_in_it)
    sent = asyncio.run(sent_for(Front([replicas]), latents))
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert replicas.calls == 1


def test_a_full_queue_is_a_503_that_says_when(loaded: LoadedVae, latents: torch.Tensor) -> None:
    def full(call: int, message: int) -> None:
        raise AllBusy("as many calls as may are waiting for sd1; try again later")

    answer = asked(Front([Here("sd1", loaded, full)]), latents)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert "sd1" in answer.json()["error"]


def test_of_several_vaes_the_one_that_is_named_or_fits_is_asked(
    loaded: LoadedVae, flux: LoadedVae, latents: torch.Tensor
) -> None:
    first, second = Here("photo", loaded), Here("flux", flux)
    front = Front([first, second])
    sixteen = torch.randn(1, 16, 8, 8)
    assert torch.equal(tensor_of(asked(front, latents)), locally(loaded, latents))
    assert torch.equal(tensor_of(asked(front, sixteen)), locally(flux, sixteen))
    assert torch.equal(tensor_of(asked(front, sixteen, "/flux/decode")), locally(flux, sixteen))
    assert torch.equal(tensor_of(asked(front, sixteen, "/", family="flux")), locally(flux, sixteen))
    assert (first.calls, second.calls) == (1, 3)
    assert asked(front, sixteen, "/photo/decode").status_code == 400
    assert asked(front, latents, "/nobody/decode").status_code == 404
    # None of it has got to a replica.
    assert (first.calls, second.calls) == (1, 3)


def test_info_and_health_speak_for_all_of_them(loaded: LoadedVae, flux: LoadedVae) -> None:
    client = TestClient(Front([Here("late", None), Here("photo", loaded), Here("flux", flux)]))
    info = client.get("/info").json()
    assert [(model["name"], model["loaded"]) for model in info["models"]] == [
        ("late", False),
        ("photo", True),
        ("flux", True),
    ]
    assert info["fingerprint"] == loaded.about["fingerprint"]
    assert client.get("/flux/info").json()["family"] == "flux"
    assert client.get("/late/info").status_code == 503
    health = client.get("/health").json()
    assert (health["status"], health["running"], health["waiting"]) == ("ok", False, 0)
    assert health["replicas"] == {"late": 0, "photo": 1, "flux": 1}
    assert client.delete("/info").status_code == 405
    client = TestClient(Front([Here("late", None)]))
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "no model")


class Away(Here):
    """Replicas of which there are none, as where none can be placed; ``asked``: how often somebody wanted to know."""

    def __init__(self, name: str, *, hangs: bool = False) -> None:
        super().__init__(name, None)
        self.asked = 0
        self._hangs = hangs

    async def ask(self, head: Head, body: bytes | bytearray) -> AsyncIterator[Sequence[Message]]:
        self.calls += 1
        await asyncio.Event().wait()
        yield []

    async def healths(self) -> Sequence[Mapping[str, Any]]:
        return await self.infos()

    async def infos(self) -> Sequence[Mapping[str, Any]]:
        self.asked += 1
        if self._hangs:
            await asyncio.Event().wait()
        raise RuntimeError("the deployment is not there")


class Slow(Here):
    async def ask(self, head: Head, body: bytes | bytearray) -> AsyncIterator[Sequence[Message]]:
        await asyncio.sleep(0.3)
        async for messages in super().ask(head, body):
            yield messages


def test_a_vae_without_replicas_costs_the_others_nothing(loaded: LoadedVae, latents: torch.Tensor) -> None:
    front = Front([Here("sd1", loaded), Away("flux")])
    assert torch.equal(tensor_of(asked(front, latents)), locally(loaded, latents))
    client = TestClient(front)
    assert client.get("/health").json()["replicas"] == {"sd1": 1, "flux": 0}
    assert [model["loaded"] for model in client.get("/info").json()["models"]] == [True, False]


def test_a_call_whose_vae_has_no_replica_is_told_so_and_does_not_wait_for_ever(
    loaded: LoadedVae, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remote_vae.server.front._NONE_SECONDS", 0.05)
    front = Front([Here("sd1", loaded), Away("flux")])
    answer = asked(front, latents, "/flux/decode")
    assert (answer.status_code, answer.json()) == (503, {"error": "no replica of flux is there; try again in a few minutes"})
    # One that works for long is there, and is waited for.
    assert torch.equal(tensor_of(asked(Front([Slow("sd1", loaded)]), latents)), locally(loaded, latents))


def test_one_that_does_not_answer_is_waited_for_by_the_first_call_alone(
    loaded: LoadedVae, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remote_vae.server.front._AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("remote_vae.server.front._ASK_SECONDS", 0.05)
    away = Away("flux", hangs=True)
    front = Front([Here("sd1", loaded), away])

    async def call() -> None:
        assert (await sent_for(front, latents))[0]["status"] == 200

    async def calls() -> None:
        await call()
        # It is asked again beside the next ones, and would never answer them.
        monkeypatch.setattr("remote_vae.server.front._ASK_SECONDS", 1e6)
        for _ in range(2):
            await asyncio.wait_for(call(), 30)

    asyncio.run(calls())
    assert away.asked == 2


def test_limits_hold_before_a_body_is_read(loaded: LoadedVae, latents: torch.Tensor) -> None:
    replicas = Here("sd1", loaded)
    front = Front([replicas], limits=Limits(max_pixels=64 * 64))
    refused = asked(front, latents)
    assert refused.status_code == 400
    assert "4096" in refused.json()["error"]
    client = TestClient(Front([replicas]))
    large = client.post("/decode", params=head(latents), content=b"0" * 1_000_000)
    assert large.status_code == 413
    assert large.headers["Connection"] == "close"
    pieces = client.post("/decode", params=head(latents), content=iter([b"0" * 1000] * 1000))
    assert pieces.status_code == 413
    assert replicas.calls == 0


def test_without_the_token_nobody_learns_more_than_that_it_runs(loaded: LoadedVae, latents: torch.Tensor) -> None:
    replicas = Here("sd1", loaded)
    front = Front([replicas], token="secret")
    assert asked(front, latents).status_code == 401
    client = TestClient(front)
    assert client.get("/info").status_code == 401
    assert client.get("/").status_code == 401
    assert client.get("/health").json() == {"status": "ok"}
    client.headers["Authorization"] = "Bearer secret"
    assert client.get("/info").status_code == 200
    assert replicas.calls == 0
