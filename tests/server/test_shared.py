"""The engine of a VAE that belongs to a host: whichever is loaded, taking turns, never changed."""

from __future__ import annotations

import asyncio
import copy
import threading
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae.server.admission import ClientGone, Limits, Place
from remote_vae.server.catalogue import NoModel, OneVae, OtherVae
from remote_vae.server.engine import Engine
from remote_vae.server.shared import create_shared_app
from remote_vae.vae.at_work import Op, whole_diffusers
from remote_vae.vae.families import family_of
from remote_vae.vae.fingerprint import fingerprint
from remote_vae.wire import DecodeRequest, HttpResponse, Output
from tests.hosts.a1111_standin import LdmVae
from tests.nearness import no_room_for_the_whole, out_of_memory, psnr
from tests.sharing import QueueLock, Sharing, ask, asked
from tests.vaes import small_vae


@pytest.fixture
def provider(vae: AutoencoderKL) -> Sharing:
    return Sharing(LdmVae(vae))


def engine(provider: Sharing, lock: Any = None) -> Engine:
    return Engine(OneVae(provider), turn=lock)


def decode(own: Engine, latents: torch.Tensor) -> HttpResponse:
    return answered(own, latents, Place("decode", latents.numel(), latents.nbytes))


def answered(own: Engine, latents: torch.Tensor, place: Place) -> HttpResponse:
    return own.submit(place, own.catalogue.entries()[0], DecodeRequest(latents, Output.TENSOR)).result(30)


def tensor(answer: HttpResponse, like: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(answer.body), dtype=like.dtype).reshape(like.shape)


def test_without_a_model_the_user_is_told_what_to_do(latents: torch.Tensor) -> None:
    for act in (lambda own: own.info(), lambda own: decode(own, latents)):
        with pytest.raises(NoModel, match="generate something first"):
            act(engine(Sharing()))


def test_the_switch_to_another_model_is_noticed(provider: Sharing, vae: AutoencoderKL, latents: torch.Tensor) -> None:
    own = engine(provider)
    first, before = own.info(), decode(own, latents).body
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.decoder.conv_out.bias += 0.25
        expected = other.decode(latents, return_dict=False)[0]
    provider.vae = LdmVae(other)
    after = decode(own, latents)
    assert after.body != before
    assert torch.equal(tensor(after, expected), expected)
    assert own.info()["fingerprint"] != first["fingerprint"]


def test_a_call_that_waited_while_the_host_took_another_vae_is_not_made_by_that(
    provider: Sharing, vae: AutoencoderKL, latents: torch.Tensor
) -> None:
    lock = QueueLock()
    own = engine(provider, lock)
    request = DecodeRequest(latents, Output.TENSOR, fingerprint=own.info()["fingerprint"])
    with lock:
        lock.asked.clear()
        waiting = own.submit(Place("decode", latents.numel(), latents.nbytes), own.catalogue.entries()[0], request)
        assert lock.asked.wait(30)
        other = copy.deepcopy(vae)
        with torch.no_grad():
            other.decoder.conv_out.bias += 0.25
        provider.vae = LdmVae(other)
    with pytest.raises(OtherVae, match="ask GET /info anew"):
        waiting.result(30)
    assert provider.vae.calls == []


def test_other_weights_in_the_same_vae_are_noticed(provider: Sharing, vae: AutoencoderKL) -> None:
    own = engine(provider)
    before = own.info()["fingerprint"]
    with torch.no_grad():
        for weight in vae.parameters():
            weight += 0.25
    assert own.info()["fingerprint"] == fingerprint(vae.state_dict()) != before


@pytest.mark.parametrize(("dtype", "key"), [(torch.float16, "fingerprint"), (torch.bfloat16, "fingerprint_bfloat16")])
def test_weights_have_the_fingerprint_that_suits_their_dtype(
    provider: Sharing, vae: AutoencoderKL, dtype: torch.dtype, key: str
) -> None:
    exact = fingerprint(vae.state_dict(), str(dtype).removeprefix("torch."))
    vae.to(dtype)
    info = engine(provider).info()
    assert {name: value for name, value in info.items() if name.startswith("fingerprint")} == {key: exact}


def test_of_weights_that_are_not_loaded_nothing_is_said(provider: Sharing) -> None:
    provider.changes = {"module": torch.nn.Linear(2, 2, device="meta")}
    assert "fingerprint" not in engine(provider).info()


@pytest.mark.parametrize(
    ("name", "sent", "taken"),
    [
        ("wan", (1, 16, 2, 2, 2), (1, 16, 2, 2, 2)),
        ("wan", (2, 16, 2, 2), (2, 16, 1, 2, 2)),
        ("flux2", (1, 128, 1, 1), (1, 32, 2, 2)),
    ],
)
def test_a_hosts_own_way_to_call_its_vae_gets_raw_latents_as_the_vae_takes_them(
    provider: Sharing, name: str, sent: tuple[int, ...], taken: tuple[int, ...]
) -> None:
    asked: list[torch.Tensor] = []

    def whole(module: Any, op: Op, tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor)
        return whole_diffusers(module, op, tensor)

    module = small_vae(name)
    provider.changes = {"module": module, "family": family_of(module), "whole": whole}
    latents = torch.randn(sent)
    answer = decode(engine(provider), latents)
    assert [tuple(each.shape) for each in asked] == [taken]
    pixels = whole_diffusers(module, "decode", asked[0])
    assert torch.equal(tensor(answer, pixels), pixels)
    assert answer.headers["shape"] == str([*pixels.shape[:2], *pixels.shape[2 + len(taken) - len(sent) :]])


def test_a_vae_that_does_not_fit_is_brought_and_tiled_in_its_context(
    provider: Sharing, vae: AutoencoderKL, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        whole = vae.decode(latents, return_dict=False)[0]
    no_room_for_the_whole(monkeypatch, vae)
    happened: list[str] = []

    class Context:
        def __enter__(self) -> None:
            happened.append("in")

        def __exit__(self, *_: object) -> None:
            happened.append("out")

    def bring(tensor: torch.Tensor) -> torch.Tensor:
        happened.append("brought")
        return tensor

    provider.changes = {"module": vae, "whole": whole_diffusers, "bring": bring}
    provider.serving = Context
    answer = decode(engine(provider), latents)
    assert psnr(tensor(answer, whole), whole) >= 100
    assert (happened[0], "brought" in happened[1:-1], happened[-1]) == ("in", True, "out")
    assert not vae.use_tiling


def test_without_room_for_the_vae_on_its_device_the_call_goes_on(
    provider: Sharing, vae: AutoencoderKL, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        whole = vae.decode(latents, return_dict=False)[0]
    provider.changes = {"module": vae, "whole": whole_diffusers, "bring": out_of_memory}
    assert psnr(tensor(decode(engine(provider), latents), whole), whole) >= 100


def test_weights_that_are_moved_in_a_call_can_be_written_to_later(provider: Sharing, latents: torch.Tensor) -> None:
    """As A1111 does with little memory; what is made in inference mode refuses load_state_dict."""
    assert provider.vae is not None
    module = provider.vae

    def move() -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()

    provider.watch = move
    decode(engine(provider), latents)
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    assert not any(parameter.is_inference() for parameter in module.parameters())


def test_a_client_that_left_while_the_host_generated_is_not_served(provider: Sharing, latents: torch.Tensor) -> None:
    assert provider.vae is not None
    place = Place("decode", 1, 1)
    place.leave()
    with pytest.raises(ClientGone):
        answered(engine(provider), latents, place)
    assert provider.vae.calls == []


def test_a_host_that_moves_its_models_comes_to_the_end_of_it_though_the_client_leaves(
    provider: Sharing, latents: torch.Tensor
) -> None:
    """With half of a model moved its next generation would fail."""
    place = Place("decode", 1, 1)
    unet = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))

    def bring(tensor: torch.Tensor) -> torch.Tensor:
        unet[0].to(torch.float64)
        place.leave()
        unet.to(torch.float64)
        return tensor

    provider.changes = {"bring": bring}
    with pytest.raises(ClientGone):
        answered(engine(provider), latents, place)
    assert {weight.dtype for weight in unet.parameters()} == {torch.float64}


def test_the_lock_is_free_again_after_an_error(provider: Sharing, latents: torch.Tensor) -> None:
    lock = QueueLock()
    provider.changes = {"whole": lambda *_: torch.zeros(())[0]}
    with pytest.raises(IndexError):
        decode(engine(provider, lock), latents)
    assert not lock.lock.locked()


def test_one_engine_answers_in_every_event_loop_also_when_calls_wait(provider: Sharing, latents: torch.Tensor) -> None:
    """The app is made in one thread and served in another, and Reload UI starts a new loop."""
    app = create_shared_app(provider, threading.Lock())
    query = "&".join(f"shape={size}" for size in latents.shape) + "&dtype=float32&output_type=pt"

    async def four() -> list[int]:
        body = latents.numpy().tobytes()
        return [
            each.status for each in await asyncio.gather(*(asked(app, "/decode", body=body, query=query) for _ in range(4)))
        ]

    results: list[int] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: results.extend(asyncio.run(four())))
        thread.start()
        thread.join(30)
    assert results == [200] * 8


def test_calls_beyond_the_limit_of_waiting_are_a_503(provider: Sharing, latents: torch.Tensor) -> None:
    lock = QueueLock()
    app = create_shared_app(provider, lock, limits=Limits(max_waiting=1))
    query = "&".join(f"shape={size}" for size in latents.shape) + "&dtype=float32&output_type=pt"
    body = latents.numpy().tobytes()

    async def two() -> tuple[int, int]:
        first = asyncio.ensure_future(asked(app, "/decode", body=body, query=query))
        await asyncio.get_running_loop().run_in_executor(None, lock.asked.wait, 10)
        second = await asked(app, "/decode", body=body, query=query)
        lock.lock.release()
        return (await first).status, second.status

    lock.lock.acquire()
    assert asyncio.run(two()) == (200, 503)


def test_a_body_that_does_not_come_gives_its_place_back_under_a_hosts_server_too(provider: Sharing) -> None:
    app = create_shared_app(provider, threading.Lock(), limits=Limits(stall=0.1, max_waiting=1))
    query = b"shape=1&shape=4&shape=2&shape=2&dtype=float32&output_type=pt"
    scope = {
        "type": "http", "method": "POST", "path": "/decode", "raw_path": b"/decode", "root_path": "", "query_string": query,
        "headers": [(b"host", b"127.0.0.1"), (b"content-length", b"64")], "client": ("127.0.0.1", 5), "http_version": "1.1",
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408
    assert ask(app, "/decode", body=bytes(64), query=query.decode()).status == 200
