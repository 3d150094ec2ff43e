"""The server's own VAEs: when they are loaded, which one a request gets, and which are put away."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from remote_vae.errors import InvalidRequest, SettingsError
from remote_vae.local.estimate import whole_need
from remote_vae.server.admission import ClientGone, Place
from remote_vae.server.calling import Calls
from remote_vae.server.catalogue import NoModel, UnknownModel, pick
from remote_vae.server.engine import Engine
from remote_vae.server.models import LoadedVae, devices_of, load_vae
from remote_vae.server.own import OwnVae, OwnVaes, Source
from remote_vae.tiled.layouts import decoder_plan
from remote_vae.vae.fingerprint import fingerprint
from remote_vae.wire import DecodeRequest, Output
from tests.conftest import ServerThread
from tests.server.asking import TIMEOUT, body, head, locally, tensor_of, wait_until
from tests.vaes import small_kl

LATENTS = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
WIDE = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
CPUS = torch.device("cpu", 0), torch.device("cpu", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VAEs as users have them."""
    path = tmp_path_factory.mktemp("vaes")
    small_kl("sdxl").save_pretrained(path / "xl")
    other = small_kl("sdxl")
    with torch.no_grad():
        other.decoder.conv_out.bias += 0.25
    other.save_pretrained(path / "anime")
    small_kl("flux").save_pretrained(path / "flux")
    small_kl("sd1", scaling_factor=0.5).save_pretrained(path / "custom")
    return path


class Loading:
    """Loads as the server does. ``loaded``: what, in order; ``held``: a load waits for this."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.held = threading.Event()
        self.held.set()

    def __call__(self, source: str, **given: Any) -> LoadedVae:
        self.loaded.append(Path(source).name)
        assert self.held.wait(20)
        return load_vae(source, **given)


@pytest.fixture
def loading() -> Loading:
    return Loading()


@pytest.fixture
def make(folder: Path, loading: Loading) -> Callable[..., OwnVaes]:
    def make(*sources: str, **given: Any) -> OwnVaes:
        texts = [text.replace("@", f"{folder}/").rpartition("=") for text in sources]
        return OwnVaes([Source(source, name or None) for name, _, source in texts], load=loading, **given)

    return make


@pytest.fixture
def serving(loaded: LoadedVae) -> Iterator[Callable[..., ServerThread]]:
    running: list[ServerThread] = []

    def serve(vaes: OwnVaes) -> ServerThread:
        running.append(ServerThread(loaded, catalogue=vaes))
        return running[-1]

    yield serve
    for each in running:
        each.close()


def picked(vaes: OwnVaes, **given: Any) -> str:
    return asyncio.run(Engine(vaes).pick(**given)).name


def decode(server: ServerThread, path: str = "/decode", latents: torch.Tensor = LATENTS, **params: Any) -> requests.Response:
    asked = {**head(latents), "output_type": "pt", **params}
    return requests.post(server.url + path, data=body(latents), params=asked, timeout=TIMEOUT)


# --- names -----------------------------------------------------------------------------------------------------------------


def test_two_of_one_name_are_refused(make: Callable[..., OwnVaes]) -> None:
    with pytest.raises(SettingsError, match="two VAEs are called xl"):
        make("xl=@xl", "xl=@anime")


def test_without_a_name_it_has_that_of_its_family_which_is_known_at_the_start(
    make: Callable[..., OwnVaes], loading: Loading
) -> None:
    vaes = make("@xl", "@anime", "lazy=@flux")
    vaes.start()
    assert [entry.name for entry in vaes.entries()] == ["sdxl", "sdxl-2", "lazy"]
    assert loading.loaded == ["xl", "anime"]


# --- which one -------------------------------------------------------------------------------------------------------------


def test_the_name_in_the_path_decides(make: Callable[..., OwnVaes], loading: Loading) -> None:
    vaes = make("xl=@xl", "anime=@anime", "flux=@flux")
    assert picked(vaes, name="anime") == "anime"
    assert loading.loaded == ["anime"]
    with pytest.raises(UnknownModel, match="no VAE called sd3; it has xl, anime, flux"):
        picked(vaes, name="sd3")
    with pytest.raises(InvalidRequest, match="the VAE of SDXL, and the request is for Flux"):
        picked(vaes, name="anime", family="flux")


def test_else_the_family_that_the_client_names_decides_and_nothing_else_is_loaded(
    make: Callable[..., OwnVaes], loading: Loading
) -> None:
    vaes = make("sdxl=@xl", "flux=@flux")
    assert picked(vaes, family="chroma") == "flux"
    assert loading.loaded == ["flux"]
    with pytest.raises(InvalidRequest, match=r"the VAEs of SDXL, Flux.*, and the request is for SD 3"):
        picked(vaes, family="sd3")


def test_of_several_of_a_family_the_fingerprint_decides(make: Callable[..., OwnVaes], loading: Loading, folder: Path) -> None:
    vaes = make("sdxl=@xl", "anime=@anime", "flux=@flux")
    theirs = fingerprint(load_vae(str(folder / "anime"), device="cpu").vae.state_dict(), "bfloat16")
    assert picked(vaes, family="sdxl", fingerprint=theirs) == "anime"
    # Which one it is was found out by loading what may have been it.
    assert loading.loaded == ["xl", "anime"]
    assert picked(vaes, family="sdxl", fingerprint="0" * 16) == "sdxl"
    assert picked(vaes, family="sdxl") == "sdxl"


def test_without_a_family_the_latents_decide(make: Callable[..., OwnVaes]) -> None:
    vaes = make("sdxl=@xl", "flux=@flux")
    assert picked(vaes, fits=lambda family: family.latent_channels == 16) == "flux"
    assert picked(vaes, fits=lambda family: family.latent_channels == 5) == "sdxl"
    assert picked(vaes) == "sdxl"


def test_a_vae_of_no_family_answers_for_all_that_no_other_is_of(make: Callable[..., OwnVaes]) -> None:
    vaes = make("mine=@custom", "flux=@flux")
    assert picked(vaes, family="sd1") == "mine"
    assert picked(vaes, family="flux") == "flux"


# --- when ------------------------------------------------------------------------------------------------------------------


def test_a_vae_is_loaded_by_its_first_call_while_others_are_served(
    make: Callable[..., OwnVaes], loading: Loading, serving: Callable[..., ServerThread], folder: Path
) -> None:
    server = serving(make("sdxl=@xl", "flux=@flux"))
    assert decode(server).status_code == 200
    loading.held.clear()
    with ThreadPoolExecutor() as pool:
        first = [pool.submit(decode, server, "/decode", WIDE) for _ in range(2)]
        wait_until(lambda: loading.loaded == ["xl", "flux"])
        models = requests.get(f"{server.url}/info", timeout=TIMEOUT).json()["models"]
        assert [(each["name"], each["loaded"], each["family"]) for each in models] == [
            ("sdxl", True, "sdxl"),
            ("flux", False, "flux"),
        ]
        assert requests.get(f"{server.url}/health", timeout=TIMEOUT).ok
        assert decode(server, "/sdxl/decode").status_code == 200
        loading.held.set()
        expected = locally(load_vae(str(folder / "flux"), device="cpu"), WIDE)
        # They may be made at once, which changes the last bits.
        assert all(torch.allclose(tensor_of(each.result()), expected, atol=1e-4) for each in first)
    assert loading.loaded == ["xl", "flux"]


def test_a_load_that_fails_is_a_503_with_the_reason_and_tried_again_by_the_next_call(
    make: Callable[..., OwnVaes], serving: Callable[..., ServerThread], folder: Path, tmp_path: Path
) -> None:
    server = serving(make("sdxl=@xl", f"flux={tmp_path}/moved"))
    for _ in range(2):
        answer = decode(server, "/flux/decode", WIDE)
        assert answer.status_code == 503
        assert "no such folder or file" in answer.json()["error"]
        assert str(tmp_path) not in answer.text
    assert decode(server).status_code == 200
    shutil.copytree(folder / "flux", tmp_path / "moved")
    assert decode(server, "/flux/decode", WIDE).status_code == 200


def test_preload_loads_all_at_the_start_on_every_device(make: Callable[..., OwnVaes], loading: Loading) -> None:
    vaes = make("sdxl=@xl", "flux=@flux", devices=CPUS)
    vaes.start(preload=True)
    assert loading.loaded == ["xl", "flux"] * 2
    assert all(entry.is_at(device) for entry in vaes.entries() for device in CPUS)


def test_at_the_start_a_vae_that_cannot_be_loaded_ends_it(make: Callable[..., OwnVaes], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such folder"):
        make(f"{tmp_path}/none").start()
    with pytest.raises(SettingsError, match="no such folder"):
        make(f"a={tmp_path}/none").start(preload=True)


# --- memory ----------------------------------------------------------------------------------------------------------------


class Memory:
    """Takes so many VAEs, as it is asked."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.vaes: OwnVaes | None = None

    def __call__(self, device: torch.device) -> int:
        assert self.vaes is not None
        there = sum(entry.is_at(device) for entry in self.vaes.entries())
        return 1 << 60 if there < self.most else 0


@pytest.fixture
def two(make: Callable[..., OwnVaes]) -> OwnVaes:
    """Three VAEs and memory for two."""
    memory = Memory(2)
    memory.vaes = vaes = make("sdxl=@xl", "anime=@anime", "flux=@flux", available=memory)
    return vaes


def loaded_of(vaes: OwnVaes) -> list[str]:
    return [entry.name for entry in vaes.entries() if entry.is_loaded]


def test_what_was_used_least_lately_is_put_away_for_another_and_comes_back_from_where_it_came(
    two: OwnVaes, serving: Callable[..., ServerThread], loading: Loading
) -> None:
    server = serving(two)
    first = tensor_of(decode(server, "/sdxl/decode"))
    tensor_of(decode(server, "/anime/decode"))
    assert torch.equal(tensor_of(decode(server, "/sdxl/decode")), first)
    tensor_of(decode(server, "/flux/decode", WIDE))
    assert loaded_of(two) == ["sdxl", "flux"]
    info = requests.get(f"{server.url}/info", timeout=TIMEOUT).json()["models"][1]
    # What it is stays known.
    assert (info["loaded"], len(info["fingerprint"])) == (False, 16)
    tensor_of(decode(server, "/anime/decode"))
    assert loaded_of(two) == ["anime", "flux"]
    assert loading.loaded == ["xl", "anime", "flux", "anime"]


def test_one_that_is_called_is_never_put_away(two: OwnVaes) -> None:
    vaes = {entry.name: entry for entry in two.entries()}
    for name in ("sdxl", "anime"):
        two.load(vaes[name], two.devices[0]).result(20)
    with vaes["sdxl"].held():
        two.load(vaes["flux"], two.devices[0]).result(20)
        assert loaded_of(two) == ["sdxl", "flux"]
    with vaes["sdxl"].held(), vaes["flux"].held():
        # More than there is room for, as far as that is known; whether it fits is seen.
        two.load(vaes["anime"], two.devices[0]).result(20)
        assert loaded_of(two) == ["sdxl", "anime", "flux"]


def test_for_a_call_that_does_not_fit_others_are_put_away_before_it_is_made_in_less(
    make: Callable[..., OwnVaes], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(2)
    memory.vaes = vaes = make("sdxl=@xl", "flux=@flux", available=memory)
    sdxl, flux = vaes.entries()
    for entry in (sdxl, flux):
        vaes.load(entry, vaes.devices[0]).result(20)
    memory.most = 1
    module = sdxl.vae(vaes.devices[0]).module
    whole, tried = module.decode, []

    def decode(z: torch.Tensor, **given: Any) -> Any:
        tried.append(flux.is_loaded)
        if flux.is_loaded:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return whole(z, **given)

    module.decode = decode
    engine = Engine(vaes)
    with sdxl.held():
        answer = engine.submit(Place("decode", 1, 1), sdxl, DecodeRequest(LATENTS, Output.TENSOR)).result(20)
    assert answer.status == 200
    assert tried == [True, False]
    engine.close()


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_room_is_made_for_what_the_call_of_this_vae_takes(folder: Path, family: str) -> None:
    loaded = load_vae(str(folder / {"sdxl": "xl"}.get(family, family)), device="cpu")
    latents, wanted = LATENTS if family == "sdxl" else WIDE, []

    def fails(*_: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    def make_room(nbytes: int) -> int:
        wanted.append(nbytes)
        return 0

    vae = replace(loaded.current(), whole=fails)
    (made,) = Calls(vae, "decode", make_room=make_room).made([lambda dtype: latents.to(dtype)])
    # In tiles.
    assert isinstance(made, torch.Tensor)
    need = whole_need("decode", decoder_plan(loaded.vae), latents.shape, torch.float32, torch.device("cpu"))
    assert wanted[0] == need.likely


# --- devices ---------------------------------------------------------------------------------------------------------------


def test_a_call_for_a_vae_that_is_busy_on_one_device_gets_a_copy_on_another(make: Callable[..., OwnVaes]) -> None:
    vaes = make("sdxl=@xl", devices=CPUS)
    entry = vaes.entries()[0]
    vaes.load(entry, CPUS[0]).result(20)
    gate, engine = threading.Event(), Engine(vaes, batch_pixels=0)
    first = entry.vae(CPUS[0]).module
    first.decoder.register_forward_pre_hook(lambda *_: (gate.wait(20), None)[1])
    with entry.held():
        held, other = (engine.submit(Place("decode", 1, 1), entry, DecodeRequest(LATENTS, Output.TENSOR)) for _ in range(2))
        wait_until(lambda: entry.is_at(CPUS[1]))
        third = engine.submit(Place("decode", 1, 1), entry, DecodeRequest(LATENTS, Output.TENSOR)).result(20)
        gate.set()
        assert third.body == held.result(20).body == other.result(20).body
    assert entry.is_at(CPUS[1])
    engine.close()


def test_devices_are_those_that_are_named_each_once() -> None:
    assert devices_of("auto") == (torch.device("cpu"),)
    assert devices_of("cpu:0, cpu:1") == CPUS
    with pytest.raises(SettingsError, match="each device once"):
        devices_of("cpu,cpu:0")
    with pytest.raises(SettingsError, match="cannot be used here"):
        devices_of("cpu,nonsense")


def test_with_several_gpus_auto_is_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_vae.server.models._device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("auto") == (torch.device("cuda", 0), torch.device("cuda", 1))


def test_nothing_is_asked_of_who_is_not_named(make: Callable[..., OwnVaes]) -> None:
    """One VAE answers as it always did, also before it is loaded."""
    assert pick(make("sdxl=@xl").entries(), family=None).name == "sdxl"
    with pytest.raises(NoModel):
        make("sdxl=@xl").entries()[0].require()


# --- who waits for a load --------------------------------------------------------------------------------------------------


async def run(engine: Engine, entry: Any, leaving: Any = None) -> Any:
    async def stays() -> None:
        await asyncio.Event().wait()

    def read(_: bytearray) -> DecodeRequest:
        return DecodeRequest(LATENTS, Output.TENSOR)

    return await engine.run(Place("decode", 1, 1), entry, read, bytearray(), (leaving or stays)())


def test_who_leaves_while_a_vae_is_loaded_does_not_wait_for_it(make: Callable[..., OwnVaes], loading: Loading) -> None:
    vaes = make("sdxl=@xl")
    engine = Engine(vaes)
    loading.held.clear()

    async def gone() -> None:
        while not loading.loaded:
            await asyncio.sleep(0.01)

    async def leaves() -> None:
        call = asyncio.ensure_future(run(engine, vaes.entries()[0], gone))
        assert (await asyncio.wait({call}, timeout=5))[0]
        with pytest.raises(ClientGone):
            await call

    try:
        # Not by the end of the load, which comes later.
        asyncio.run(leaves())
        assert engine.health() == {"status": "ok", "running": False, "waiting": 0}
    finally:
        loading.held.set()
    engine.close()


def test_a_request_that_is_cancelled_does_not_end_the_load_for_the_others(
    make: Callable[..., OwnVaes], loading: Loading
) -> None:
    vaes = make("sdxl=@xl", "flux=@flux")
    sdxl, flux = vaes.entries()
    engine = Engine(vaes)
    loading.held.clear()

    async def both() -> Any:
        # One VAE is loaded at a time: the load of the other still lies in the queue.
        vaes.load(flux, None)
        first, second = (asyncio.ensure_future(run(engine, sdxl)) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.wait({first})
        loading.held.set()
        return await second

    assert asyncio.run(both()).status == 200
    engine.close()


def test_what_is_known_of_a_vae_is_known_all_at_once(make: Callable[..., OwnVaes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who asks in that moment for its weights gets another one's pictures."""
    vaes, seen = make("sdxl=@xl"), []
    entry = vaes.entries()[0]

    def set_and_look(self: OwnVae, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name != "_owner" and self.is_known:
            seen.append((name, bool(self.fingerprints), "model" in self.info()))

    monkeypatch.setattr(OwnVae, "__setattr__", set_and_look)
    vaes.load(entry, None).result(20)
    assert seen
    assert all(each[1:] == (True, True) for each in seen)
