"""The contract that every web UI's adapter keeps, against a stand-in for its host and a real server with the same VAE."""

from __future__ import annotations

import copy
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae.errors import VaeCallFailed
from remote_vae.hosts import detect
from remote_vae.hosts.generation import MODES
from remote_vae.local import route
from remote_vae.rescue import load_latents
from remote_vae.server.models import LoadedVae
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op, VaeAtWork
from tests.conftest import ServerThread
from tests.hosts import forge_models, forge_standin, sdnext_standin
from tests.hosts.contract import OWN, TITLE, UIS, WAYS, Endpoint, Made, Ui, hooks_in, levels_apart, make, same, source, without
from tests.hosts.webui_standin import sampled
from tests.nearness import psnr, psnr_of_moments
from tests.vaes import tiny_flux

only_forge = pytest.mark.parametrize("name", ["forge"], indirect=True)
only_sdnext = pytest.mark.parametrize("name", ["sdnext"], indirect=True)
DEADLINE = 0.3


@pytest.fixture(scope="module", params=UIS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(name: str, loaded: LoadedVae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """What the host makes without the extension, by the names of ``WAYS``."""
    with pytest.MonkeyPatch.context() as patch:
        ui = UIS[name](patch, tmp_path_factory.mktemp(name), loaded.vae)
        return {way: make(ui, way) for way in WAYS}


@pytest.fixture
def bare(name: str, loaded: LoadedVae, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ui]:
    """A host before its extensions are loaded; afterwards nothing of ours may be left in it."""
    log = logging.getLogger("remote_vae")
    before = list(log.handlers), list(log.filters), log.level, log.propagate
    # Where somebody listens already, the extension adds no handler; and pytest listens at the root.
    log.handlers, log.propagate = [logging.NullHandler()], True
    log.setLevel(logging.INFO)
    ui = UIS[name](monkeypatch, tmp_path, loaded.vae)
    monkeypatch.setattr(ui.adapter, "_problems", ())
    ui.adapter.router.history.clear()
    yield ui
    ui.adapter.uninstall()
    ui.adapter.router.history.clear()
    log.handlers, log.filters, log.level, log.propagate = before
    own = {op: vars(AutoencoderKL)[op] for op in OWN}
    for op, function in OWN.items():
        setattr(AutoencoderKL, op, function)
    assert own == OWN
    assert not [place for place, value in ui.callables().items() if hasattr(value, "remote_vae_adapter")]
    assert ui.host.offences == []
    assert ui.adapter._thread.generation is None
    assert ui.adapter._thread.passing == 0


@pytest.fixture
def ui(bare: Ui) -> Ui:
    """A host with the extension in it, as its own script loads it."""
    bare.host.load_extension()
    return bare


# One that lives for the whole file: to stop one takes half a second.
@pytest.fixture(scope="module")
def proxy(server: ServerThread) -> Iterator[Endpoint]:
    running = Endpoint(server.url)
    yield running
    running.close()


@pytest.fixture
def endpoint(proxy: Endpoint) -> Iterator[Endpoint]:
    """The way to the real server. Whether it says who it is does not fail with its VAE calls."""
    proxy.released, proxy.info = threading.Event(), "pass"
    proxy.reset("pass")
    yield proxy
    proxy.released.set()


def refusing() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def local_only(ui: Ui, reason: str = "") -> None:
    """The infotexts tell of a fallback, and of nothing remote."""
    assert ui.host.infotexts
    for text in ui.host.infotexts:
        assert f"{TITLE}: " in text
        assert f"local ({reason}" in text
        assert " remote " not in text


# --- found by what the host has ----------------------------------------------------------------------------------------


def test_a_host_is_known_by_what_it_has(ui: Ui) -> None:
    assert detect.detect() is ui.adapter
    assert ui.adapter.installed
    assert [other.installed for other in (each.adapter for each in UIS.values()) if other is not ui.adapter] == [False] * 2
    assert hooks_in(ui.seam()) == 1


def test_in_a_host_that_lacks_anything_there_is_no_hook_and_one_warning_that_names_it(
    bare: Ui, alone: dict[str, Made], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [known] = [each for each in detect._KNOWN if each.adapter is bare.adapter]
    scripts = list(bare.host.scripts.scripts_data)
    for needed in (*detect._COMMON, *known.needs):
        module, _, attribute = needed.partition(":")
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, without(sys.modules[module], attribute))
            bare.host.load_extension()
        [warning] = [record.getMessage() for record in caplog.records]
        assert needed.replace(":", ".") in warning
        assert bare.callables() == bare.before, needed
        assert not any(bare.host.script_callbacks.callbacks.values())
        assert bare.host.scripts.scripts_data == scripts
    assert not bare.adapter.installed
    assert same(make(bare, "txt2img").pictures, alone["txt2img"].pictures)


def test_a_missing_module_is_told_as_well(bare: Ui, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "modules.sd_samplers_common", None)
    bare.host.load_extension()
    assert "no modules.sd_samplers_common.single_sample_to_image" in caplog.text
    assert bare.callables() == bare.before


def test_a_module_that_fails_when_it_is_loaded_counts_as_missing(
    bare: Ui, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "modules.call_queue":
                raise RuntimeError("CUDA is not here")

    monkeypatch.delitem(sys.modules, "modules.call_queue")
    monkeypatch.setattr(sys, "meta_path", [Fails(), *sys.meta_path])
    bare.host.load_extension()
    assert "no modules.call_queue.queue_lock" in caplog.text


def test_after_uninstalling_every_function_is_the_hosts_own_again(ui: Ui) -> None:
    during = ui.callables()
    ui.host.script_callbacks.script_unloaded_callback()
    assert ui.callables() == ui.before
    assert during != ui.before
    ui.adapter.uninstall()
    assert ui.callables() == ui.before


# --- off ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "by"), [*((way, "the settings") for way in WAYS), ("batch of 3", "the request"), ("inpaint", "the request")]
)
def test_switched_off_everything_is_as_without_the_extension(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint, way: str, by: str
) -> None:
    ui.turn_on(endpoint.url, enabled=by == "the request")
    ui.host.alwayson = {TITLE: ["off"]} if by == "the request" else {}
    made, expected = make(ui, way), alone[way]
    assert same(made.pictures, expected.pictures)
    assert torch.equal(made.rng, expected.rng)
    assert [text.replace(f", {TITLE} mode: off", "") for text in made.infotexts] == expected.infotexts
    assert (by == "the request") is (made.infotexts != expected.infotexts)
    assert endpoint.requests == endpoint.infos == ui.records() == []


# --- remote ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transfer", ["raw", "u8"])
def test_remote_pictures_are_the_local_ones_for_as_many_requests_as_it_takes(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint, way: str, transfer: str
) -> None:
    ui.turn_on(endpoint.url, transfer=transfer)
    made = make(ui, way)
    # A batch is added up in another order than pictures one by one, and what is encoded again was rounded before.
    assert levels_apart(made.pictures, alone[way].pictures) <= (0 if way == "txt2img" else 1)
    assert len(made.pictures) == len(made.infotexts) == WAYS[way].pictures
    assert tuple(endpoint.requests) == WAYS[way].requests
    assert all(route.endswith(" remote") for route in ui.routes())
    assert ui.calls == []
    text = f"{TITLE}: decode remote ({transfer})"
    if "/encode" in WAYS[way].requests:
        text += f", encode remote ({transfer})"
    assert made.infotexts == [f"{expected}, {text}" for expected in alone[way].infotexts]


@pytest.mark.parametrize("way", ["img2img", "img2img, batch of 3", "inpaint", "hires, pixel"])
def test_a_remote_encode_draws_as_much_from_the_generator_as_a_local_one(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint, way: str
) -> None:
    ui.turn_on(endpoint.url)
    assert torch.equal(make(ui, way).rng, alone[way].rng)


def test_two_pictures_are_two_encodes(ui: Ui, endpoint: Endpoint) -> None:
    ui.turn_on(endpoint.url)
    assert len(ui.host.img2img(torch.cat([source(), source().flip(3)]))) == 2
    assert endpoint.requests == ["/encode", "/encode", "/decode"]


def test_the_same_picture_in_the_next_generation_is_asked_for_again(ui: Ui, endpoint: Endpoint) -> None:
    ui.turn_on(endpoint.url)
    ui.host.img2img(source())
    ui.host.img2img(source())
    assert endpoint.requests == ["/encode", "/decode"] * 2


@torch.no_grad()
def test_calls_that_another_extension_makes_go_remote_too(ui: Ui, endpoint: Endpoint) -> None:
    latents, pixels = sampled(1, 1), source() * 2 - 1
    torch.manual_seed(5)
    local = ui.decode(latents), ui.encode(pixels)
    ui.turn_on(endpoint.url)
    torch.manual_seed(5)
    remote = ui.decode(latents), ui.encode(pixels)
    assert endpoint.requests == ["/decode", "/encode"]
    for one, other in zip(remote, local, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["a1111"], indirect=True)
@pytest.mark.parametrize("enabled", [True, False])
def test_the_methods_of_a_model_can_be_called_by_keyword(ui: Ui, endpoint: Endpoint, enabled: bool) -> None:
    latents, pixels = sampled(1, 1), source() * 2 - 1
    decoded, encoded = ui.model.decode_first_stage(latents), ui.model.encode_first_stage(pixels).mode()
    ui.turn_on(endpoint.url, enabled=enabled)
    torch.testing.assert_close(ui.model.decode_first_stage(z=latents), decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ui.model.encode_first_stage(x=pixels).mode(), encoded, rtol=1e-4, atol=1e-4)


def test_what_an_endpoint_decodes_is_switched_apart_from_what_it_encodes(ui: Ui, endpoint: Endpoint) -> None:
    ui.turn_on(endpoint.url, decode=False)
    ui.host.img2img(source())
    assert endpoint.requests == ["/encode"]
    assert ui.host.infotexts == [f"Seed: 1, {TITLE}: decode local, encode remote (raw)"]


# --- the endpoint fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["batch of 3", "inpaint", "hires, pixel"])
@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refused", "connection refused"),
        ("503", "503"),
        ("nan", "bad answer"),
        ("shape", "bad answer"),
        ("200 html", "bad answer"),
    ],
)
def test_when_the_endpoint_fails_the_pictures_are_the_local_ones_and_say_so(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint, way: str, mode: str, reason: str
) -> None:
    weights = copy.deepcopy(ui.module.state_dict())
    endpoint.reset(mode)
    ui.turn_on(refusing() if mode == "refused" else endpoint.url)
    made = make(ui, way)
    assert same(made.pictures, alone[way].pictures)
    assert torch.equal(made.rng, alone[way].rng)
    local_only(ui, reason)
    assert len(made.infotexts) == WAYS[way].pictures
    assert ui.host.devices.dtype_vae == torch.float32
    after = ui.module.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in weights.items())


def test_nan_answers_leave_a_vae_in_half_precision_as_it_is(ui: Ui, name: str, endpoint: Endpoint) -> None:
    ui.host.devices.dtype_vae = torch.bfloat16
    ui.module.to(torch.bfloat16)
    if name == "forge":
        ui.model.forge_objects.vae.vae_dtype = torch.bfloat16
    local = make(ui, "img2img").pictures
    endpoint.reset("nan")
    ui.turn_on(endpoint.url)
    assert same(make(ui, "img2img").pictures, local)
    assert endpoint.requests == ["/encode", "/decode"]
    assert ui.host.devices.dtype_vae == torch.bfloat16
    assert {weight.dtype for weight in ui.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("way", ["batch of 3", "inpaint", "hires, pixel"])
def test_an_endpoint_that_hangs_is_waited_for_once_in_all_passes(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint, way: str
) -> None:
    endpoint.reset("hang")
    ui.turn_on(endpoint.url, first_byte_timeout=DEADLINE, cooldown=600.0)
    made = make(ui, way)
    assert same(made.pictures, alone[way].pictures)
    assert endpoint.requests == [WAYS[way].requests[0]]
    local_only(ui, f"no answer in {DEADLINE} s")
    # Else every picture had a text of its own.
    assert "asked again" not in "".join(made.infotexts)
    # Nor in the next generation.
    assert same(make(ui, way).pictures, alone[way].pictures)
    assert len(endpoint.requests) == 1


def test_a_batch_of_png_of_which_one_fails_is_there_in_full(ui: Ui, alone: dict[str, Made], endpoint: Endpoint) -> None:
    endpoint.reset("503", fail_at=1)
    ui.turn_on(endpoint.url, transfer="png")
    assert same(make(ui, "batch of 3").pictures, alone["batch of 3"].pictures)
    assert 2 <= len(endpoint.requests) <= 3
    local_only(ui, "503")


def test_a_batch_of_png_is_a_request_a_picture(ui: Ui, alone: dict[str, Made], endpoint: Endpoint) -> None:
    ui.turn_on(endpoint.url, transfer="png")
    assert levels_apart(make(ui, "batch of 3").pictures, alone["batch of 3"].pictures) <= 1
    assert endpoint.requests == ["/decode"] * 3


def test_an_endpoint_that_dies_between_two_iterations_is_in_the_infotexts_of_the_second(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    ui.host.n_iter = 2
    endpoint.reset("cut", fail_at=1)
    ui.turn_on(endpoint.url)
    made = make(ui, "txt2img")
    assert len(made.pictures) == 2
    assert levels_apart(made.pictures[:1], alone["txt2img"].pictures) <= 1
    first, second = made.infotexts
    assert first.endswith(f"{TITLE}: decode remote (raw)")
    assert f"{TITLE}: decode local (" in second
    assert " remote " not in second


class Broken(torch.nn.Module):
    def forward(self, _: torch.Tensor) -> torch.Tensor:
        raise ValueError("the weights are of the wrong size")


def test_latents_that_nothing_can_decode_are_saved_and_the_next_generation_is_well(
    ui: Ui, name: str, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    endpoint.reset("503")
    ui.turn_on(endpoint.url)
    decoder = getattr(ui.module, "inner", ui.module).decoder
    whole, decoder.conv_in = decoder.conv_in, Broken()
    try:
        if name == "sdnext":
            # It logs the error, and goes without the pictures.
            assert ui.host.txt2img(batch=3) == []
        else:
            with pytest.raises(VaeCallFailed, match="wrong size"):
                ui.host.txt2img(batch=3)
    finally:
        decoder.conv_in = whole
    [file] = (Path(ui.host.paths.data_path) / "remote-vae-rescue").iterdir()
    rescued = load_latents(file)
    torch.testing.assert_close(rescued.latents, sampled(3, 1) / 0.18215)
    assert rescued.family.key == "sd1"
    assert ui.routes() == ["decode failed"]
    assert same(make(ui, "batch of 3").pictures, alone["batch of 3"].pictures)


# --- previews ----------------------------------------------------------------------------------------------------------


def test_a_preview_never_leaves_the_machine(ui: Ui, endpoint: Endpoint) -> None:
    shown = ui.host.preview(sampled(1, 9))
    calls = list(ui.calls)
    ui.turn_on(endpoint.url)
    assert np.array_equal(np.asarray(ui.host.preview(sampled(1, 9))), np.asarray(shown))
    assert ui.calls == calls * 2
    assert endpoint.requests == ui.records() == []


def test_a_preview_on_another_thread_stays_here_while_a_generation_waits(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    shown = np.asarray(ui.host.preview(sampled(1, 9)))
    endpoint.reset("hang")
    ui.turn_on(endpoint.url, first_byte_timeout=60.0)
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(make, ui, "txt2img")
        wait_for(lambda: bool(endpoint.requests))
        assert np.array_equal(np.asarray(ui.host.preview(sampled(1, 9))), shown)
        assert not generation.done()
        assert endpoint.requests == ["/decode"]
        endpoint.released.set()
        assert same(generation.result(30).pictures, alone["txt2img"].pictures)


# --- the user's presses, and the progress line -------------------------------------------------------------------------


@pytest.mark.parametrize("press", ["interrupt", "skip", "stop_generating"])
@pytest.mark.parametrize("way", ["txt2img", "batch of 3"])
def test_a_press_ends_the_wait_and_the_picture_is_made_here(
    ui: Ui, name: str, alone: dict[str, Made], endpoint: Endpoint, press: str, way: str
) -> None:
    if not hasattr(ui.host.state, press):
        assert name == "sdnext"
        return
    endpoint.reset("hang")
    ui.turn_on(endpoint.url, first_byte_timeout=60.0)
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(make, ui, way)
        wait_for(lambda: bool(endpoint.requests))
        getattr(ui.host.state, press)()
        # The deadline is a minute away.
        made = generation.result(30)
    assert same(made.pictures, alone[way].pictures)
    assert {record.fallback_reason for record in ui.records()} == {"interrupted"}
    assert endpoint.requests == ["/decode"]


def test_after_interrupt_in_a_wait_no_further_batch_is_begun(ui: Ui, alone: dict[str, Made], endpoint: Endpoint) -> None:
    endpoint.reset("hang")
    ui.host.n_iter = 3
    ui.turn_on(endpoint.url, first_byte_timeout=60.0)
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(make, ui, "txt2img")
        wait_for(lambda: bool(endpoint.requests))
        ui.host.state.interrupt()
        made = generation.result(30)
    assert same(made.pictures, alone["txt2img"].pictures)
    assert endpoint.requests == ["/decode"]


def test_a_flag_that_the_host_itself_raises_ends_the_wait(ui: Ui, endpoint: Endpoint) -> None:
    endpoint.reset("hang")
    ui.turn_on(endpoint.url, first_byte_timeout=60.0)
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(make, ui, "txt2img")
        wait_for(lambda: bool(endpoint.requests))
        ui.host.state.interrupted = True
        generation.result(30)
    assert [record.fallback_reason for record in ui.records()] == ["interrupted"]


def test_interrupt_ends_the_wait_for_an_encode(ui: Ui, endpoint: Endpoint) -> None:
    endpoint.reset("hang")
    ui.turn_on(endpoint.url, first_byte_timeout=60.0)
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(make, ui, "img2img")
        wait_for(lambda: bool(endpoint.requests))
        ui.host.state.interrupt()
        assert len(generation.result(30).pictures) == 1
    assert endpoint.requests == ["/encode", "/decode"]
    # Nobody has to press again for the decode.
    assert [record.fallback_reason for record in ui.records()] == ["interrupted", "no answer in 3 s"]


def test_a_press_while_sampling_asks_for_the_picture_so_far(ui: Ui, name: str, endpoint: Endpoint) -> None:
    ui.turn_on(endpoint.url)
    ui.host.state.skip()
    assert len(ui.host.txt2img()) == (0 if name == "sdnext" else 1)
    assert ui.routes() == ([] if name == "sdnext" else ["decode remote"])


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_the_progress_line_says_what_is_waited_for_and_is_given_back(ui: Ui, endpoint: Endpoint, way: str) -> None:
    endpoint.reset("hang")
    ui.turn_on(endpoint.url, first_byte_timeout=60.0)
    ui.host.state.textinfo = "of the host"
    work = (lambda: ui.decode(sampled(1, 1))) if way == "decode" else (lambda: ui.encode(source() * 2 - 1))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(torch.no_grad()(work))
        wait_for(lambda: bool(endpoint.requests))
        line = ui.host.state.textinfo
        endpoint.released.set()
        call.result(30)
    assert line == f"Remote VAE: {way[:-1]}ing on {endpoint.url.removeprefix('http://')}"
    assert ui.host.state.textinfo == "of the host"


def test_the_progress_line_of_a_batch_says_how_many(ui: Ui, endpoint: Endpoint) -> None:
    endpoint.reset("hang")
    ui.turn_on(endpoint.url, first_byte_timeout=60.0)
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(make, ui, "batch of 3")
        wait_for(lambda: bool(endpoint.requests))
        line = ui.host.state.textinfo
        endpoint.released.set()
        generation.result(30)
    assert line == f"Remote VAE: decoding 3 pictures on {endpoint.url.removeprefix('http://')}"
    assert ui.host.state.textinfo is None


# --- accordion, API and plot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_a_request_wins_over_the_settings(ui: Ui, endpoint: Endpoint, mode: str, enabled: bool) -> None:
    ui.turn_on(endpoint.url, enabled=enabled)
    ui.host.alwayson = {TITLE.lower(): [mode]}
    asked = {"follow settings": enabled, "off": False, "auto": True, "remote": True}[mode]
    assert len(ui.host.txt2img()) == 1
    assert endpoint.requests == ["/decode"] * asked
    [text] = ui.host.infotexts
    assert (f"{TITLE} mode: {mode}" in text) is (mode != "follow settings")
    assert (f"{TITLE}: decode remote (raw)" in text) is asked


@pytest.mark.parametrize(("mode", "requests"), [("auto", ["/encode"]), ("remote", ["/encode", "/decode"])])
def test_auto_leaves_here_what_the_settings_leave_here_and_remote_does_not(
    ui: Ui, endpoint: Endpoint, mode: str, requests: list[str]
) -> None:
    ui.turn_on(endpoint.url, enabled=False, decode=False)
    ui.host.alwayson = {TITLE: [mode]}
    ui.host.img2img(source())
    assert endpoint.requests == requests


@pytest.mark.parametrize("transfer", ["raw", "u8", "png", "jpg"])
def test_a_transfer_of_a_request_wins_over_the_settings(ui: Ui, endpoint: Endpoint, transfer: str) -> None:
    ui.turn_on(endpoint.url, transfer="png" if transfer == "raw" else "raw")
    ui.host.alwayson = {TITLE: ["remote", transfer]}
    assert len(ui.host.txt2img()) == 1
    assert [record.detail for record in ui.records()] == [transfer]
    assert ui.host.infotexts[0].endswith(f"{TITLE} transfer: {transfer}, {TITLE}: decode remote ({transfer})")


@pytest.mark.parametrize("args", [[], [None], ["banana", 7], [["off"], {}], ["", "", "too", "many"]])
def test_nonsense_and_too_few_or_too_many_arguments_follow_the_settings(ui: Ui, endpoint: Endpoint, args: list[Any]) -> None:
    ui.turn_on(endpoint.url)
    ui.host.alwayson = {TITLE: args}
    assert len(ui.host.txt2img()) == 1
    assert endpoint.requests == ["/decode"]
    assert ui.host.infotexts == [f"Seed: 1, {TITLE}: decode remote (raw)"]


def test_settings_overridden_in_a_request_count_for_it_alone(ui: Ui, endpoint: Endpoint) -> None:
    ui.host.create_ui()
    ui.turn_on(endpoint.url, enabled=False)
    ui.host.override_settings = {"remotevae_enabled": True}
    ui.host.txt2img()
    assert endpoint.requests == ["/decode"]
    assert f"{TITLE}: decode remote" in ui.host.infotexts[0]
    ui.host.override_settings = {}
    ui.host.txt2img()
    assert endpoint.requests == ["/decode"]
    assert TITLE not in ui.host.infotexts[0]


def test_where_pictures_and_tokens_go_is_not_for_a_request_to_say(ui: Ui, endpoint: Endpoint, tmp_path: Path) -> None:
    ui.host.create_ui()
    ui.turn_on("")
    ui.host.override_settings = {
        "remotevae_endpoint": endpoint.url,
        "remotevae_decode_endpoint": endpoint.url,
        "remotevae_public_endpoints": True,
        "remotevae_rescue_folder": str(tmp_path),
        "remotevae_share": True,
    }
    inner = ui.host.processing.process_images_inner
    during: list[Settings] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ui.host.processing, "process_images_inner", lambda p: during.append(ui.adapter.own_settings()) or inner(p)
        )
        ui.host.txt2img()
    assert endpoint.requests == []
    assert during == [Settings(enabled=True, transfer="raw", cooldown=0.0)]


def test_where_our_script_is_left_out_the_settings_count(
    ui: Ui, name: str, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "sdnext":
        ui.host.control_tab = True
    else:
        runner = ui.runner_without_ours()
        monkeypatch.setattr(ui.host, "runner", lambda is_img2img: runner)
    ui.host.txt2img()
    assert endpoint.requests == []
    ui.turn_on(endpoint.url)
    ui.host.img2img(source())
    assert endpoint.requests == ["/encode", "/decode"]
    text = f"{TITLE}: decode remote (raw), encode remote (raw)"
    assert ui.host.infotexts == [f"Seed: 1, {text}"]


def test_the_axis_of_the_mode_makes_each_cell_its_own_way(ui: Ui, alone: dict[str, Made], endpoint: Endpoint) -> None:
    ui.host.create_ui()
    ui.turn_on(endpoint.url, enabled=False)
    cells = ui.host.xyz(TITLE, ["off", "remote", "off", "auto", "follow settings"])
    assert endpoint.requests == ["/decode", "/decode"]
    [expected] = alone["txt2img"].infotexts
    remote = f"{expected}, {TITLE}: decode remote (raw)"
    assert ui.host.infotexts == [expected, remote, expected, remote, expected]
    assert [levels_apart(cell, alone["txt2img"].pictures) <= 1 for cell in cells] == [True] * 5


def test_the_axis_of_the_transfer_makes_each_cell_its_own_way(ui: Ui, endpoint: Endpoint) -> None:
    ui.host.create_ui()
    ui.turn_on(endpoint.url)
    ui.host.xyz(f"{TITLE} transfer", ["raw", "png", "u8"])
    assert [record.detail for record in ui.records()] == ["raw", "png", "u8"]
    assert ui.host.infotexts == [f"Seed: 1, {TITLE}: decode remote ({transfer})" for transfer in ("raw", "png", "u8")]


def test_a_plot_over_a_request_with_a_mode_goes_by_the_cell(ui: Ui, endpoint: Endpoint) -> None:
    ui.host.create_ui()
    ui.turn_on(endpoint.url)
    ui.host.alwayson = {TITLE: ["remote", "png"]}
    ui.host.xyz(TITLE, ["off", "auto"])
    assert [record.detail for record in ui.records()] == ["png"]


@pytest.mark.parametrize("label", [TITLE, f"{TITLE} transfer"])
def test_a_cell_that_no_one_knows_is_refused_before_the_plot_begins(ui: Ui, endpoint: Endpoint, label: str) -> None:
    ui.host.create_ui()
    ui.turn_on(endpoint.url)
    with pytest.raises(RuntimeError, match="banana"):
        ui.host.xyz(label, ["remote" if label == TITLE else "raw", "banana"])
    assert endpoint.requests == []


def test_after_reload_ui_the_plot_has_each_axis_once(ui: Ui) -> None:
    ui.host.create_ui()
    ui.host.reload_ui()
    ui.host.script_callbacks.before_ui_callback()
    labels = [axis.label for axis in ui.host.scripts.scripts_data[0].module.axis_options]
    assert (labels.count(TITLE), labels.count(f"{TITLE} transfer")) == (1, 1)


# --- a generation within a generation ----------------------------------------------------------------------------------


def with_a_detailer(ui: Ui, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each generation from now on has another one within it, before its own decode; what those gave."""
    runner = ui.host.runner(False)
    process, inner = runner.process, []

    def detailed(p: Any) -> None:
        process(p)
        inner.append(ui.detail()[1])

    monkeypatch.setattr(runner, "process", detailed)
    return inner


@pytest.mark.parametrize(("mode", "enabled", "requests"), [("off", True, 0), ("remote", False, 2), ("auto", False, 2)])
def test_a_generation_within_a_generation_does_as_that_one(
    ui: Ui, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, mode: str, enabled: bool, requests: int
) -> None:
    inner = with_a_detailer(ui, monkeypatch)
    ui.turn_on(endpoint.url, enabled=enabled)
    ui.host.alwayson = {TITLE: [mode, "u8"]}
    assert len(ui.host.txt2img()) == 1
    assert endpoint.requests == ["/decode"] * requests
    assert {record.detail for record in ui.records()} == ({"u8"} if requests else set())
    [within] = inner
    remote = f"{TITLE}: decode remote (u8)"
    assert within.infotexts == ([f"Seed: 9, {remote}"] if requests else ["Seed: 9"])


@pytest.mark.parametrize(("fails", "ways"), [(0, ("local (503)", "remote")), (1, ("remote", "local (503)"))])
def test_each_of_two_nested_generations_has_its_own_infotext(
    ui: Ui, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, fails: int, ways: tuple[str, str]
) -> None:
    inner = with_a_detailer(ui, monkeypatch)
    endpoint.reset("503", fail_at=fails)
    ui.turn_on(endpoint.url)
    ui.host.txt2img()
    texts = [inner[0].infotexts[0], ui.host.infotexts[0]]
    for text, way in zip(texts, ways, strict=True):
        assert f"{TITLE}: decode {way}" in text
        assert ("remote" in text.lower().replace(TITLE.lower(), "")) is (way == "remote")


def test_a_generation_that_fails_leaves_nothing_for_the_next(
    ui: Ui, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ui.host.runner(False)

    def fail(p: Any) -> None:
        raise KeyError("a script")

    ui.turn_on(endpoint.url, enabled=False)
    ui.host.alwayson = {TITLE: ["remote", "png"]}
    with monkeypatch.context() as patch:
        patch.setattr(runner, "process", fail)
        with pytest.raises(KeyError):
            ui.host.txt2img()
    assert ui.adapter._thread.generation is None
    ui.host.alwayson = {}
    assert len(ui.host.txt2img()) == 1
    assert endpoint.requests == []
    assert TITLE not in ui.host.infotexts[0]
    ui.decode(sampled(1, 1))
    assert endpoint.requests == []


# --- life cycle --------------------------------------------------------------------------------------------------------


def reload_ui_twice(ui: Ui) -> None:
    ui.host.reload_ui()
    ui.host.reload_ui()


def announce_again(ui: Ui) -> None:
    ui.host.script_callbacks.model_loaded_callback(ui.model)


def switch_the_model(ui: Ui) -> None:
    ui.host.load(ui.made("sd1"))


def swap_there_and_back(ui: Ui) -> None:
    ui.host.load(ui.made("sd1"))
    ui.host.txt2img()
    ui.host.swap_to(ui.model)


def switch_the_vae(ui: Ui) -> None:
    ui.change_vae(copy.deepcopy(ui.vae.state_dict()))


def take_out_and_put_in(ui: Ui) -> None:
    ui.adapter.uninstall()
    ui.adapter.uninstall()
    ui.adapter.install()
    ui.adapter.install()


EVENTS = [reload_ui_twice, announce_again, switch_the_model, swap_there_and_back, switch_the_vae, take_out_and_put_in]


@pytest.mark.parametrize("event", EVENTS)
def test_whatever_happens_a_call_is_one_request_through_one_hook(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint, event: Callable[[Ui], None]
) -> None:
    ui.host.txt2img()
    event(ui)
    ui.adapter.router.history.clear()
    ui.turn_on(endpoint.url)
    made = make(ui, "inpaint")
    assert tuple(endpoint.requests) == WAYS["inpaint"].requests
    assert len(ui.records()) == 3
    assert levels_apart(made.pictures, alone["inpaint"].pictures) <= 1
    assert hooks_in(ui.seam()) == 1
    assert hooks_in(ui.host.processing.process_images_inner) == 1
    assert hooks_in(ui.host.sd_samplers_common.single_sample_to_image) == 1
    assert hooks_in(ui.host.state.interrupt) == 1


def test_after_a_vae_switch_what_falls_back_is_made_with_the_new_weights(ui: Ui, alone: dict[str, Made]) -> None:
    ui.change_vae({key: value * 0.9 for key, value in ui.vae.state_dict().items()})
    local = make(ui, "img2img").pictures
    assert not same(local, alone["img2img"].pictures)
    ui.turn_on(refusing())
    assert same(make(ui, "img2img").pictures, local)


def test_with_another_vae_than_the_endpoints_the_call_stays_here_unless_the_request_says_remote(
    ui: Ui, endpoint: Endpoint
) -> None:
    ui.change_vae({key: value * 0.9 for key, value in ui.vae.state_dict().items()})
    local = make(ui, "img2img").pictures
    ui.turn_on(endpoint.url)
    assert same(make(ui, "img2img").pictures, local)
    assert endpoint.requests == []
    local_only(ui, "another VAE there")
    ui.host.alwayson = {TITLE: ["remote"]}
    ui.host.img2img(source())
    assert endpoint.requests == ["/encode", "/decode"]
    assert {record.detail for record in ui.records()[-2:]} == {"raw, another VAE"}


def test_a_model_that_is_loaded_while_the_extension_is_out_is_left_alone(ui: Ui, endpoint: Endpoint) -> None:
    ui.adapter.uninstall()
    ui.turn_on(endpoint.url)
    ui.host.load(ui.made("sd1"))
    assert len(ui.host.txt2img()) == 1
    assert endpoint.requests == []
    assert not [place for place, value in ui.callables().items() if hasattr(value, "remote_vae_adapter")]


def test_two_models_of_two_families_are_each_asked_for_by_their_own(ui: Ui, endpoint: Endpoint) -> None:
    ui.turn_on(endpoint.url)
    first, second = ui.model, ui.host.load(ui.made("sdxl"))
    ui.host.img2img(source())
    ui.host.swap_to(first)
    ui.host.img2img(source())
    ui.host.swap_to(second)
    ui.host.img2img(source())
    assert endpoint.requests == ["/encode", "/decode"] * 3
    families = [query.partition("family=")[2].partition("&")[0] for query in endpoint.queries]
    assert families == ["sdxl", "sdxl", "sd1", "sd1", "sdxl", "sdxl"]


# --- beside other extensions -------------------------------------------------------------------------------------------


def test_a_hook_that_was_there_before_ours_is_asked_for_what_is_made_here_and_comes_back(
    bare: Ui, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    notes: list[str] = []
    theirs = bare.put_over(notes, chaining=True)
    bare.host.load_extension()
    assert same(make(bare, "txt2img").pictures, alone["txt2img"].pictures)
    assert notes == ["theirs"]
    bare.turn_on(endpoint.url)
    assert levels_apart(make(bare, "txt2img").pictures, alone["txt2img"].pictures) <= 1
    assert (notes, endpoint.requests) == (["theirs"], ["/decode"])
    endpoint.reset("503")
    assert same(make(bare, "txt2img").pictures, alone["txt2img"].pictures)
    assert notes == ["theirs"] * 2
    bare.adapter.uninstall()
    assert bare.seam() is theirs
    bare.clear_seam()


@pytest.mark.parametrize("chaining", [True, False])
def test_a_hook_that_somebody_puts_over_ours_keeps_working_and_stays(
    ui: Ui, name: str, alone: dict[str, Made], endpoint: Endpoint, chaining: bool
) -> None:
    notes: list[str] = []
    theirs = ui.put_over(notes, chaining=chaining)
    assert same(make(ui, "txt2img").pictures, alone["txt2img"].pictures)
    assert notes == ["theirs"]
    ui.turn_on(endpoint.url)
    assert levels_apart(make(ui, "txt2img").pictures, alone["txt2img"].pictures) <= 1
    # Who puts a method of its own into a class of diffusers is not covered again before Reload UI.
    reached = chaining or name != "sdnext"
    assert endpoint.requests == ["/decode"] * reached
    ui.host.reload_ui()
    endpoint.reset("pass")
    assert levels_apart(make(ui, "txt2img").pictures, alone["txt2img"].pictures) <= 1
    assert endpoint.requests == ["/decode"]
    endpoint.reset("503")
    notes.clear()
    assert same(make(ui, "txt2img").pictures, alone["txt2img"].pictures)
    assert notes == ["theirs"]
    assert endpoint.requests == ["/decode"]
    ui.adapter.uninstall()
    assert ui.seam() is theirs
    endpoint.reset("pass")
    assert same(make(ui, "txt2img").pictures, alone["txt2img"].pictures)
    assert endpoint.requests == []
    ui.clear_seam()


@pytest.mark.parametrize("door", ["processing.process_images_inner", "sd_samplers_common.single_sample_to_image"])
def test_a_function_that_somebody_put_around_ours_stays_and_ours_below_it_does_nothing_more(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint, door: str
) -> None:
    module, _, function = door.partition(".")
    owner = getattr(ui.host, module)
    ours = getattr(owner, function)
    notes: list[str] = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        notes.append("theirs")
        return ours(*args, **kwargs)

    setattr(owner, function, theirs)
    ui.turn_on(endpoint.url)
    ui.adapter.uninstall()
    assert getattr(owner, function) is theirs
    ui.host.preview(sampled(1, 9))
    assert same(make(ui, "txt2img").pictures, alone["txt2img"].pictures)
    assert (notes, endpoint.requests) == (["theirs"], [])
    ui.host.reload_ui()
    ui.host.preview(sampled(1, 9))
    assert levels_apart(make(ui, "txt2img").pictures, alone["txt2img"].pictures) <= 1
    assert (notes, endpoint.requests) == (["theirs"] * 2, ["/decode"])
    assert ui.host.infotexts == [f"Seed: 1, {TITLE}: decode remote (raw)"]
    ui.adapter.uninstall()
    assert getattr(owner, function) is theirs
    delattr(owner, function)


# --- Forge -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_tiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of Forge's own tilings were begun."""
    begun: list[str] = []
    for tiling in ("decode_tiled_", "encode_tiled_"):
        original = getattr(forge_models.VAE, tiling)

        def noted(vae: Any, *args: Any, tiling: str = tiling, original: Any = original) -> Any:
            begun.append(tiling)
            return original(vae, *args)

        monkeypatch.setattr(forge_models.VAE, tiling, noted)
    return begun


@only_forge
@pytest.mark.parametrize("why", ["no memory", "always tiled"])
def test_forges_own_tiling_is_not_used_where_the_exact_one_can(
    ui: Ui, alone: dict[str, Made], own_tiles: list[str], why: str
) -> None:
    ui.host.memory_management.VAE_ALWAYS_TILED = why == "always tiled"
    ui.turn_on("")
    with forge_standin.no_memory(ui.model, times=2 if why == "no memory" else 0):
        made = make(ui, "img2img, batch of 3")
    assert levels_apart(made.pictures, alone["img2img, batch of 3"].pictures) <= 1
    assert torch.equal(made.rng, alone["img2img, batch of 3"].rng)
    assert own_tiles == []
    assert {record.detail for record in ui.records()} == {"exact"}
    assert not {"decode_tiled_", "encode_tiled_"} & set(vars(ui.model.forge_objects.vae))
    local_only(ui, "no endpoint is set, then out of memory")


@only_forge
def test_a_tiling_that_somebody_put_into_forges_vae_is_still_there_after_a_local_decode(ui: Ui) -> None:
    vae = ui.host.activate().forge_objects.vae
    theirs = vae.decode_tiled_ = lambda *_: torch.zeros(1, 3, 32, 48)
    ui.turn_on("")
    ui.host.txt2img()
    assert vae.decode_tiled_ is theirs
    del vae.decode_tiled_


@only_forge
def test_forges_own_tiling_is_the_last_resort_and_its_own_when_off(
    ui: Ui, own_tiles: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with forge_standin.no_memory(ui.model, times=1):
        off = ui.host.txt2img()
    assert own_tiles == ["decode_tiled_"]
    monkeypatch.setattr(route, "available_memory", lambda device: 1000)
    ui.turn_on("")
    # What its own tiling tries before.
    with forge_standin.no_memory(ui.model, times=1):
        assert same(ui.host.txt2img(), off)
    assert own_tiles == ["decode_tiled_"] * 2
    assert [record.detail for record in ui.records()] == ["the VAE's own tiling"]


@only_forge
@torch.inference_mode()
def test_forge_gets_the_latents_of_a_picture_whose_sides_are_no_multiples_of_eight(ui: Ui, endpoint: Endpoint) -> None:
    pixels = source(height=250, width=333)
    torch.manual_seed(5)
    local = ui.encode(pixels * 2 - 1)
    ui.turn_on(endpoint.url)
    torch.manual_seed(5)
    remote = ui.encode(pixels * 2 - 1)
    assert remote.shape == local.shape == (1, 4, 31, 41)
    torch.testing.assert_close(remote, local, rtol=1e-4, atol=1e-4)
    small = source(height=45, width=61)
    assert [picture.shape for picture in ui.host.img2img(small)] == [(40, 56, 3)]
    assert endpoint.requests == ["/encode", "/encode", "/decode"]


@only_forge
@torch.inference_mode()
def test_a_clone_of_forges_vae_goes_remote_and_after_the_extension_is_out_does_not(ui: Ui, endpoint: Endpoint) -> None:
    twin = ui.host.activate().forge_objects.vae.clone()
    latents = sampled(1, 1)
    local = twin.decode(latents)
    ui.turn_on(endpoint.url)
    torch.testing.assert_close(twin.decode(latents), local, rtol=1e-4, atol=1e-4)
    assert twin.encode(source().movedim(1, -1)).shape == (1, 4, 4, 6)
    assert endpoint.requests == ["/decode", "/encode"]
    ui.adapter.uninstall()
    assert torch.equal(twin.decode(latents), local)
    assert len(endpoint.requests) == 2


@only_forge
@torch.inference_mode()
def test_a_regulation_of_the_posterior_is_applied_to_a_remote_one(ui: Ui, endpoint: Endpoint) -> None:
    vae = ui.host.activate().forge_objects.vae
    vae.patcher.set_model_vae_regulation(lambda posterior: posterior.mode())
    pixels = source().movedim(1, -1)
    local = vae.encode(pixels)
    ui.turn_on(endpoint.url)
    torch.testing.assert_close(vae.encode(pixels), local, rtol=1e-4, atol=1e-4)
    assert endpoint.requests == ["/encode"]


@only_forge
def test_an_engine_of_sixteen_channels_and_a_shift_is_right(ui: Ui) -> None:
    flux = tiny_flux()
    model = ui.host.load(forge_standin.Flux(copy.deepcopy(flux.vae)))
    torch.manual_seed(5)
    local = ui.host.img2img(source()) + ui.host.txt2img(batch=2)
    server = ServerThread(flux)
    through = Endpoint(server.url)
    try:
        ui.turn_on(through.url)
        torch.manual_seed(5)
        remote = ui.host.img2img(source()) + ui.host.txt2img(batch=2)
    finally:
        through.close()
        server.close()
    assert levels_apart(remote, local) <= 1
    assert through.requests == ["/encode", "/decode", "/decode"]
    assert all("family=flux" in query for query in through.queries)
    assert model.calls == ["encode", "decode", "decode"]


@only_forge
def test_a_remote_answer_leaves_forges_vae_off_its_device(ui: Ui, endpoint: Endpoint) -> None:
    ui.turn_on(endpoint.url)
    ui.host.memory_management.loaded.clear()
    ui.host.hires_pixel()
    assert ui.host.memory_management.loaded == []


# --- SD.Next -----------------------------------------------------------------------------------------------------------


@only_sdnext
def test_a_vae_of_a_preprocessor_is_none_of_our_business(ui: Ui, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ui.made("sd1").vae
    local = ui.host.preprocess(other, source())
    runner = ui.host.runner(False)
    within: list[torch.Tensor] = []
    monkeypatch.setattr(runner, "process", lambda p: within.append(ui.host.preprocess(other, source())))
    ui.turn_on(endpoint.url)
    assert torch.equal(ui.host.preprocess(other, source()), local)
    assert endpoint.requests == ui.records() == []
    ui.host.txt2img()
    assert torch.equal(within[0], local)
    assert endpoint.requests == ["/decode"]


@only_sdnext
def test_a_vae_that_was_put_into_the_pipeline_without_a_word_is_taken_and_the_old_one_is_not(
    ui: Ui, endpoint: Endpoint
) -> None:
    before = ui.module
    switch_the_vae(ui)
    ui.turn_on(endpoint.url)
    ui.host.img2img(source())
    assert endpoint.requests == ["/encode", "/decode"]
    assert ui.calls == []
    ui.host.preprocess(before, source())
    assert len(endpoint.requests) == 2


@only_sdnext
def test_the_refiners_vae_and_that_of_a_pipeline_within_a_model_are_taken(
    ui: Ui, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    refiner = ui.host.load_refiner(ui.made("sdxl"))
    local = ui.host.refine()
    ui.turn_on(endpoint.url)
    assert levels_apart(ui.host.refine(), local) <= 1
    assert endpoint.requests == ["/decode"]
    assert "family=sdxl" in endpoint.queries[0]
    assert refiner.vae.asked == ["decode"]
    ui.host.load(sdnext_standin.PipelineHolder(ui.model))
    endpoint.reset("pass")
    assert levels_apart(make(ui, "img2img").pictures, alone["img2img"].pictures) <= 1
    assert endpoint.requests == ["/encode", "/decode"]


@only_sdnext
@pytest.mark.parametrize("mode", ["pass", "503"])
@torch.no_grad()
def test_what_a_pipeline_asks_of_the_class_comes_back_in_its_own_form(ui: Ui, endpoint: Endpoint, mode: str) -> None:
    vae, latents, pixels = ui.module, sampled(1, 1), source() * 2 - 1

    def everything() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        decoded = [
            vae.decode(latents, return_dict=True).sample,
            vae.decode(latents).sample,
            vae.decode(latents, False)[0],
            vae.decode(latents, return_dict=False, generator=generator)[0],
        ]
        distributions = [vae.encode(pixels).latent_dist, vae.encode(pixels, return_dict=False)[0]]
        drawn = [distribution.sample(generator) for distribution in distributions]
        return [*decoded, *drawn, *(each.mode() for each in distributions), generator.get_state()]

    local = everything()
    endpoint.reset(mode)
    ui.turn_on(endpoint.url)
    for one, other in zip(everything(), local, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert endpoint.requests == ["/decode"] * 4 + ["/encode"] * 2


@only_sdnext
@pytest.mark.parametrize("enabled", [True, False])
@torch.no_grad()
def test_the_class_can_be_called_in_every_way_that_diffusers_allows(ui: Ui, endpoint: Endpoint, enabled: bool) -> None:
    vae, latents, pixels = ui.module, sampled(1, 1), source() * 2 - 1
    decoded, encoded = vae.decode(latents).sample, vae.encode(pixels).latent_dist.mode()
    ui.turn_on(endpoint.url, enabled=enabled)
    for way in (
        vae.decode(z=latents).sample,
        vae.decode(z=latents, return_dict=False)[0],
        vae.decode(latents, False, torch.Generator())[0],
    ):
        torch.testing.assert_close(way, decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.encode(x=pixels).latent_dist.mode(), encoded, rtol=1e-4, atol=1e-4)


@only_sdnext
@pytest.mark.parametrize("enabled", [True, False])
def test_what_a_pipeline_passes_beside_the_tensor_reaches_the_class(
    bare: Ui, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    seen: list[dict[str, Any]] = []

    def noted(vae: Any, z: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return OWN["decode"](vae, z, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", noted)
    bare.host.load_extension()
    bare.turn_on("", enabled=enabled)
    generator = torch.Generator()
    with torch.no_grad():
        bare.module.decode(sampled(1, 1), return_dict=False, generator=generator)
    bare.adapter.uninstall()
    assert seen == [{"return_dict": False, "generator": generator}]
    assert AutoencoderKL.decode is noted
    bare.clear_seam()


@only_sdnext
def test_a_picture_that_is_rounded_is_the_local_one_in_eight_bits_too(ui: Ui, endpoint: Endpoint) -> None:
    """Those that are saved before the second pass, or worked on further; the final ones are cut off."""
    _, local = ui.host.hires_latent(2, save_before=True)
    ui.turn_on(endpoint.url, transfer="u8")
    _, remote = ui.host.hires_latent(2, save_before=True)
    assert same([np.asarray(picture) for picture in remote], [np.asarray(picture) for picture in local])


@only_sdnext
def test_the_hosts_own_options_of_a_like_name_stay_its_own(bare: Ui) -> None:
    """SD.Next has a remote VAE of its own."""
    own = {key: bare.host.shared.OptionInfo(False, key) for key in ("remote_vae_type", "remote_vae_encode")}
    for key, info in own.items():
        bare.host.opts.add_option(key, info)
    bare.host.load_extension()
    bare.host.create_ui()
    assert {key: bare.host.opts.data_labels[key] for key in own} == own


# --- our own faults --------------------------------------------------------------------------------------------------------


def test_a_call_that_we_do_not_understand_is_the_uis_own(
    ui: Ui, endpoint: Endpoint, alone: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AttributeError("nobody has thought of this")

    monkeypatch.setattr(ui.adapter, "_call", fail)
    ui.turn_on(endpoint.url)
    assert same(make(ui, "img2img").pictures, alone["img2img"].pictures)
    assert endpoint.requests == []


def test_a_model_that_cannot_be_hooked_is_generated_with_all_the_same(ui: Ui) -> None:
    def fail() -> Any:
        raise AttributeError("nobody has thought of this")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ui.adapter, "_models", fail)
        assert len(ui.host.txt2img()) == 1


# --- the VAE for other UIs -----------------------------------------------------------------------------------------------


def shared(vae: VaeAtWork, op: Op, tensor: torch.Tensor) -> torch.Tensor:
    return vae.whole(vae.module, op, vae.bring(tensor))


def test_what_is_shared_is_the_vae_in_use_and_it_gives_what_the_model_gives(ui: Ui) -> None:
    served = ui.adapter.current()
    assert served is not None
    assert served.module is ui.module
    assert (served.family.key, served.dtype, served.device) == ("sd1", torch.float32, torch.device("cpu"))
    latents, pixels = sampled(2, 3), torch.rand(1, 3, 32, 48) * 2 - 1
    with ui.adapter.serving():
        decoded, moments = shared(served, "decode", latents), shared(served, "encode", pixels)
        whole = ui.vae.decode(latents).sample, ui.vae.encode(pixels).latent_dist.parameters
    assert psnr(decoded, whole[0]) > 100
    assert psnr_of_moments(moments, whole[1]) > 100
    # A call for another UI is nobody's generation.
    assert ui.records() == []


def test_a_call_for_another_ui_does_not_go_out_again(ui: Ui, endpoint: Endpoint) -> None:
    ui.turn_on(endpoint.url)
    served = ui.adapter.current()
    assert served is not None
    with ui.adapter.serving():
        shared(served, "decode", sampled(1, 3))
        shared(served, "encode", torch.rand(1, 3, 32, 48))
    assert endpoint.requests == []


def test_after_a_switch_the_other_model_is_shared(ui: Ui) -> None:
    ui.model = ui.host.load(ui.made("sdxl"))
    assert ui.module is not None
    served = ui.adapter.current()
    assert served is not None
    assert served.family.key == "sdxl"


def test_while_nothing_is_loaded_nothing_is_shared_and_nothing_is_loaded_for_it(ui: Ui) -> None:
    with pytest.MonkeyPatch.context() as patch:
        before = ui.host.loads
        patch.setattr(ui.host.sd_models.model_data, "sd_model", None)
        assert ui.adapter.current() is None
        assert ui.host.loads == before


def test_only_who_ticked_the_box_shares(ui: Ui) -> None:
    assert not ui.adapter.shares()
    ui.host.set_options(share=True)
    assert ui.adapter.shares()
    ui.adapter.uninstall()
    assert not ui.adapter.shares()
