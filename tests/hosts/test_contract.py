"""The contract that every web UI's adapter keeps, against a stand-in for its host and a real server with the same VAE."""

from __future__ import annotations

import copy
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from remote_vae.errors import VaeCallFailed
from remote_vae.hosts import detect
from remote_vae.rescue import load_latents
from remote_vae.vae.at_work import Op, VaeAtWork
from tests.hosts.conftest import ALL, WAYS, Endpoint, Made, make
from tests.hosts.standin import TITLE, Host, Request, hooks_in, levels_apart, same, sampled, source
from tests.nearness import psnr, psnr_of_moments

DEADLINE = 0.3
# What an endpoint is asked.
REQUESTS = {"txt2img": ["/decode"], "batch": ["/decode"], "img2img": ["/encode", "/decode"]}


def refusing() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def pressed_while_it_hangs(
    host: Host, endpoint: Endpoint, press: Callable[[], object], work: Callable[[], Any], **options: Any
) -> Any:
    """What ``work`` gives when ``press`` comes while the endpoint, whose deadline is a minute away, is waited for."""
    endpoint.reset("hang")
    host.turn_on(endpoint.url, first_byte_timeout=60.0, **options)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        wait_for(lambda: bool(endpoint.requests))
        press()
        return running.result(30)


def local_only(host: Host, reason: str = "") -> None:
    """The infotexts tell of a fallback, and of nothing remote."""
    assert host.infotexts
    for text in host.infotexts:
        assert f"{TITLE}: " in text
        assert f"local ({reason}" in text
        assert " remote " not in text


def remote(transfer: str = "raw") -> str:
    return f"{TITLE}: decode remote ({transfer})"


# --- found by what the host has ----------------------------------------------------------------------------------------


def test_a_host_is_known_by_what_it_has(host: Host) -> None:
    assert detect.detect() is host.adapter
    assert [each.adapter.installed for each in ALL.values()] == [each.adapter is host.adapter for each in ALL.values()]


class Without(ModuleType):
    """A module, or a class in it, that has all but the attribute at the end of ``path``."""

    def __init__(self, whole: Any, path: str) -> None:
        super().__init__(whole.__name__)
        self._whole, (self._name, _, self._rest) = whole, path.partition(".")

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._whole, name)
        if not self._rest:
            raise AttributeError(name)
        return Without(getattr(self._whole, name), self._rest)


def test_in_a_host_that_lacks_anything_nothing_is_hooked_and_the_panel_is_there_and_says_what_is_missing(
    bare: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [known] = [each for each in detect._KNOWN if each.adapter is bare.adapter]
    before, scripts = bare.callables(), list(bare.scripts.scripts_data)
    for needed in {*detect._COMMON, *known.needs} - {*detect._PANEL}:
        module, _, attribute = needed.partition(":")
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, Without(sys.modules[module], attribute))
            bare.load_extension()
        assert bare.callables() == before, needed
        [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert needed.replace(":", ".") in warning
        assert "nothing hooked; off" in caplog.messages[-1]
        # The panel, and nothing that would follow the UI.
        assert [event for event, callbacks in bare.script_callbacks.callbacks.items() if callbacks] == ["ui_settings"]
        bare.script_callbacks.fire("ui_settings")
        assert "remotevae_enabled" in bare.opts.data_labels
        [script] = bare.scripts.scripts_data[len(scripts) :]
        assert script.script_class().title() == TITLE
        bare.script_callbacks.callbacks["ui_settings"].clear()
        bare.scripts.scripts_data[:] = scripts
    assert not bare.adapter.installed


def test_in_what_is_no_ui_nothing_is_registered_and_one_warning_says_what_is_missing(
    bare: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, scripts = bare.callables(), list(bare.scripts.scripts_data)
    for needed in detect._PANEL:
        module, _, attribute = needed.partition(":")
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, Without(sys.modules[module], attribute))
            bare.load_extension()
        assert [needed.replace(":", ".") in record.getMessage() for record in caplog.records] == [True]
        assert bare.callables() == before, needed
        assert not any(bare.script_callbacks.callbacks.values())
        assert bare.scripts.scripts_data == scripts


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_a_module_that_is_not_there_or_fails_when_it_is_loaded_counts_as_missing(
    bare: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    class Fails:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "modules.call_queue":
                raise error("CUDA is not here")

    monkeypatch.delitem(sys.modules, "modules.call_queue")
    monkeypatch.setattr(sys, "meta_path", [Fails(), *sys.meta_path])
    bare.load_extension()
    assert "no modules.call_queue.queue_lock" in caplog.text


def test_after_the_script_is_unloaded_every_function_is_the_hosts_own_again(bare: Host) -> None:
    before = bare.callables()
    bare.load_extension()
    during = bare.callables()
    bare.script_callbacks.fire("script_unloaded")
    assert bare.callables() == before
    assert during != before
    bare.adapter.uninstall()
    assert bare.callables() == before


# --- never inert in silence ----------------------------------------------------------------------------------------------


def test_at_the_start_one_line_says_what_is_hooked_whether_it_is_on_and_where_it_asks(
    bare: Host, caplog: pytest.LogCaptureFixture
) -> None:
    bare.turn_on("http://studio:7870")
    bare.load_extension()
    [line] = caplog.messages
    assert f"in {bare.adapter.name}" in line
    assert all(seam in line for seam in bare.adapter.seams)
    assert line.endswith("; on, endpoint http://studio:7870")


def test_pictures_that_were_made_without_asking_us_are_spoken_of_once_until_we_are_asked_again(
    host: Host, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if "without asking Remote VAE" in record.getMessage()]

    host.turn_on(endpoint.url)
    host.txt2img()
    assert (host.adapter.seam_state().problem, warnings()) == ("", [])
    # As where the UI decodes with something that is not hooked.
    with host.adapter.own_calls.passing_on():
        host.txt2img()
        host.txt2img(batch=3)
    assert "3 pictures were made without asking Remote VAE" in host.adapter.seam_state().problem
    assert len(warnings()) == 1
    host.txt2img()
    assert host.adapter.seam_state().problem == ""
    host.turn_on(endpoint.url, enabled=False)
    with host.adapter.own_calls.passing_on():
        host.txt2img()
    assert host.adapter.seam_state().problem == ""


def test_pictures_of_an_approximation_that_interrupt_asked_for_are_nothing_to_speak_of(host: Host, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url)
    host.while_sampling = host.state.interrupt
    with host.adapter.own_calls.passing_on():
        host.txt2img()
    assert host.adapter.seam_state().problem == ""


# --- off ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by", ["the settings", "the request"])
def test_switched_off_everything_is_as_without_the_extension(
    host: Host, alone: dict[str, Made], endpoint: Endpoint, way: str, by: str
) -> None:
    host.turn_on(endpoint.url, enabled=by == "the request")
    host.alwayson = {TITLE: ["off"]} if by == "the request" else {}
    made, expected = make(host, way), alone[way]
    assert same(made.pictures, expected.pictures)
    assert torch.equal(made.rng, expected.rng)
    said = f", {TITLE} mode: off" if by == "the request" else ""
    assert made.infotexts == [text + said for text in expected.infotexts]
    assert endpoint.requests == endpoint.infos == host.records() == []


@pytest.mark.parametrize("value", ["false", "banana", None, "off", "0"])
def test_text_in_the_switch_does_not_switch_on(host: Host, endpoint: Endpoint, value: object) -> None:
    host.turn_on(endpoint.url, enabled=value)
    host.decode(sampled(1, 1))
    assert endpoint.requests == host.records() == []


def test_before_the_options_exist_the_extension_is_off_and_then_each_has_its_default(host: Host) -> None:
    host.txt2img()
    assert host.records() == []
    host.set_options(enabled=True)
    host.txt2img()
    assert host.routes() == ["decode local"]


def test_nonsense_in_an_option_is_its_default_with_one_warning_and_a_picture(
    host: Host, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    host.turn_on(endpoint.url, transfer="banana")
    assert len(host.txt2img() + host.txt2img()) == 2
    assert host.details() == ["u8", "u8"]
    [warning] = [message for message in caplog.messages if "banana" in message]
    assert "Transfer" in warning


# --- remote ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transfer", ["raw", "u8"])
def test_remote_pictures_are_the_local_ones_for_as_many_requests_as_it_takes(
    host: Host, alone: dict[str, Made], endpoint: Endpoint, way: str, transfer: str
) -> None:
    host.turn_on(endpoint.url, transfer=transfer)
    made = make(host, way)
    # A batch is added up in another order than pictures one by one.
    assert levels_apart(made.pictures, alone[way].pictures) <= (0 if way == "txt2img" else 1)
    assert endpoint.requests == REQUESTS[way]
    assert all(route.endswith(" remote") for route in host.routes())
    assert host.calls == []
    text = remote(transfer) + (f", encode remote ({transfer})" if way == "img2img" else "")
    assert made.infotexts == [f"{expected}, {text}" for expected in alone[way].infotexts]
    # As much was drawn as by the local VAE.
    assert torch.equal(made.rng, alone[way].rng)


def test_two_pictures_are_two_encodes_and_the_next_generation_asks_anew(host: Host, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url)
    for _ in range(2):
        assert len(host.img2img(torch.cat([source(), source().flip(3)]))) == 2
    assert endpoint.requests == ["/encode", "/encode", "/decode"] * 2


def both(host: Host) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return host.decode(sampled(1, 1)), host.encode(source() * 2 - 1)


def test_calls_that_another_extension_makes_go_remote_too(host: Host, endpoint: Endpoint) -> None:
    local = both(host)
    host.turn_on(endpoint.url)
    for one, other in zip(both(host), local, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert endpoint.requests == ["/decode", "/encode"]


def test_what_an_endpoint_decodes_is_switched_apart_from_what_it_encodes(host: Host, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url, decode=False)
    host.img2img(source(2))
    assert endpoint.requests == ["/encode"]
    assert host.infotexts == [f"Seed: {seed}, {TITLE}: decode local, encode remote (raw)" for seed in (1, 2)]


def test_the_endpoint_is_named_in_the_infotext_where_the_user_wants_that(host: Host, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url, name_endpoint=True)
    host.txt2img()
    assert host.infotexts == [f"Seed: 1, {TITLE}: decode remote 127.0.0.1 (raw)"]


# --- the endpoint fails ------------------------------------------------------------------------------------------------


FAILURES = {"refused": "connection refused", "503": "503", "nan": "bad answer", "shape": "bad answer", "200 html": "bad answer"}


@pytest.mark.parametrize("mode", FAILURES)
def test_when_the_endpoint_fails_the_pictures_are_the_local_ones_and_say_so(
    host: Host, alone: dict[str, Made], endpoint: Endpoint, mode: str
) -> None:
    weights = copy.deepcopy(host.module.state_dict())
    endpoint.reset(mode)
    host.turn_on(refusing() if mode == "refused" else endpoint.url)
    made, expected = make(host, "img2img"), alone["img2img"]
    assert same(made.pictures, expected.pictures)
    assert torch.equal(made.rng, expected.rng)
    local_only(host, FAILURES[mode])
    assert all(torch.equal(value, weights[key]) for key, value in host.module.state_dict().items())


@pytest.mark.parametrize("way", ["txt2img", "batch"])
def test_nan_answers_leave_a_vae_in_half_precision_as_it_is(host: Host, endpoint: Endpoint, way: str) -> None:
    host.devices.dtype_vae = torch.bfloat16
    host.module.to(torch.bfloat16)
    if hasattr(host, "forge_vae"):
        host.forge_vae.vae_dtype = torch.bfloat16
    local = make(host, way).pictures
    endpoint.reset("nan")
    host.turn_on(endpoint.url)
    assert same(make(host, way).pictures, local)
    assert endpoint.requests == ["/decode"]
    assert host.devices.dtype_vae == torch.bfloat16
    assert {weight.dtype for weight in host.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("way", WAYS)
def test_an_endpoint_that_hangs_is_waited_for_once(host: Host, alone: dict[str, Made], endpoint: Endpoint, way: str) -> None:
    endpoint.reset("hang")
    host.turn_on(endpoint.url, first_byte_timeout=DEADLINE, cooldown=600.0)
    # Nor in the next generation.
    for _ in range(2):
        made = make(host, way)
        assert same(made.pictures, alone[way].pictures)
        assert endpoint.requests == REQUESTS[way][:1]
        local_only(host, f"no answer in {DEADLINE} s")
        # Else every picture had a text of its own.
        assert "asked again" not in "".join(made.infotexts)


def test_a_batch_of_png_is_one_request(host: Host, alone: dict[str, Made], endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url, transfer="png")
    assert levels_apart(make(host, "batch").pictures, alone["batch"].pictures) <= 1
    assert endpoint.requests == ["/decode"]
    assert [(record.route, record.images) for record in host.records()] == [("remote", 3)]


def test_an_endpoint_that_dies_between_two_iterations_is_in_the_infotexts_of_the_second(host: Host, endpoint: Endpoint) -> None:
    host.n_iter = 2
    endpoint.reset("503", fail_at=1)
    host.turn_on(endpoint.url)
    assert len(host.txt2img()) == 2
    first, second = host.infotexts
    assert first.endswith(remote())
    assert f"{TITLE}: decode local (" in second
    assert " remote " not in second


class Broken(torch.nn.Module):
    def forward(self, _: torch.Tensor) -> torch.Tensor:
        raise ValueError("the weights are of the wrong size")


def test_latents_that_nothing_can_decode_are_saved_and_the_next_generation_is_well(
    host: Host, name: str, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    endpoint.reset("503")
    host.turn_on(endpoint.url)
    decoder = getattr(host.module, "inner", host.module).decoder
    whole, decoder.conv_in = decoder.conv_in, Broken()
    if name == "sdnext":
        # It logs the error, and goes without the pictures.
        assert host.txt2img(batch=3) == []
    else:
        with pytest.raises(VaeCallFailed, match="wrong size"):
            host.txt2img(batch=3)
    decoder.conv_in = whole
    [file] = (Path(host.paths.data_path) / "remote-vae-rescue").iterdir()
    rescued = load_latents(file)
    torch.testing.assert_close(rescued.latents, sampled(3, 1) / 0.18215)
    assert rescued.family.key == "sd1"
    assert host.routes() == ["decode failed"]
    assert same(make(host, "batch").pictures, alone["batch"].pictures)


# --- previews ----------------------------------------------------------------------------------------------------------


def test_a_preview_never_leaves_the_machine(host: Host, endpoint: Endpoint) -> None:
    shown = host.preview(sampled(1, 9))
    host.turn_on(endpoint.url)
    assert same([host.preview(sampled(1, 9))], [shown])
    assert endpoint.requests == host.records() == []


def test_a_preview_on_another_thread_stays_here_while_a_generation_waits(
    host: Host, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    shown = host.preview(sampled(1, 9))

    def watch() -> None:
        assert same([host.preview(sampled(1, 9))], [shown])
        assert endpoint.requests == ["/decode"]
        endpoint.released.set()

    made = pressed_while_it_hangs(host, endpoint, watch, lambda: make(host, "txt2img"))
    assert same(made.pictures, alone["txt2img"].pictures)


# --- the user's presses, and the progress line -------------------------------------------------------------------------


@pytest.mark.parametrize("press", ["interrupt", "skip", "stop_generating"])
@pytest.mark.parametrize("way", ["txt2img", "batch"])
def test_a_press_ends_the_wait_and_the_picture_is_made_here(
    host: Host, alone: dict[str, Made], endpoint: Endpoint, press: str, way: str
) -> None:
    if press == "stop_generating" and not hasattr(host.state, press):
        press = "skip"
    made = pressed_while_it_hangs(host, endpoint, lambda: getattr(host.state, press)(), lambda: make(host, way))
    assert same(made.pictures, alone[way].pictures)
    assert {record.fallback_reason for record in host.records()} == {"interrupted"}
    assert endpoint.requests == ["/decode"]
    if press == "interrupt":
        # A plot or a loop around it is to end as well.
        assert host.state.interrupted or host.state.stopping_generation


def test_after_interrupt_in_a_wait_no_further_batch_is_begun(host: Host, alone: dict[str, Made], endpoint: Endpoint) -> None:
    host.n_iter = 3
    made = pressed_while_it_hangs(host, endpoint, host.state.interrupt, lambda: make(host, "txt2img"))
    assert same(made.pictures, alone["txt2img"].pictures)
    assert endpoint.requests == ["/decode"]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> str:
    """After a press an endpoint is waited for no longer than this; what a record says of it."""
    monkeypatch.setattr("remote_vae.hosts.base._HURRY_SECONDS", DEADLINE)
    return f"no answer in {DEADLINE} s"


def test_after_skip_in_a_wait_the_next_batch_is_made(host: Host, endpoint: Endpoint, hurried: str) -> None:
    host.n_iter = 2
    assert len(pressed_while_it_hangs(host, endpoint, host.state.skip, host.txt2img)) == 2
    assert [record.fallback_reason for record in host.records()] == ["interrupted", hurried]


@pytest.mark.parametrize(("press", "asked"), [("skip", []), ("interrupt", ["/decode"])])
def test_after_skip_the_endpoint_is_left_in_peace_for_a_while_and_after_interrupt_it_is_not(
    host: Host, endpoint: Endpoint, press: str, asked: list[str]
) -> None:
    pressed_while_it_hangs(host, endpoint, getattr(host.state, press), host.txt2img, cooldown=600.0)
    endpoint.reset("pass")
    host.txt2img()
    assert endpoint.requests == asked


def test_a_flag_that_the_host_itself_raises_ends_the_wait(host: Host, endpoint: Endpoint) -> None:
    pressed_while_it_hangs(host, endpoint, lambda: setattr(host.state, "interrupted", True), host.txt2img)
    assert [record.fallback_reason for record in host.records()] == ["interrupted"]


def test_interrupt_ends_the_wait_for_an_encode(host: Host, endpoint: Endpoint, hurried: str) -> None:
    host.n_iter = 2
    pictures = pressed_while_it_hangs(host, endpoint, host.state.interrupt, lambda: host.img2img(source()))
    # Its own picture is made, and no further one.
    assert len(pictures) == 1
    assert endpoint.requests == ["/encode", "/decode"]
    # Nobody has to press again for the decode.
    assert [record.fallback_reason for record in host.records()] == ["interrupted", hurried]


def test_interrupt_in_a_call_of_another_extension_is_still_there_for_that(host: Host, endpoint: Endpoint) -> None:
    pressed_while_it_hangs(host, endpoint, host.state.interrupt, lambda: host.encode(source() * 2 - 1))
    assert host.state.interrupted


def test_a_press_while_sampling_asks_for_the_picture_so_far_and_soon(
    host: Host, name: str, endpoint: Endpoint, hurried: str
) -> None:
    host.while_sampling = host.state.skip
    for mode in ("pass", "hang"):
        endpoint.reset(mode)
        host.turn_on(endpoint.url, first_byte_timeout=60.0)
        assert len(host.txt2img()) == (0 if name == "sdnext" else 1)
    assert [record.fallback_reason for record in host.records()] == ([] if name == "sdnext" else ["", hurried])


@pytest.mark.parametrize("name", ["a1111", "neo"], indirect=True)
def test_a_second_press_ends_the_wait_as_well(host: Host, endpoint: Endpoint) -> None:
    """The first press ended the sampling: the flag is up, and the picture so far is to be decoded."""
    host.n_iter = 2
    host.while_sampling = host.state.interrupt
    assert len(pressed_while_it_hangs(host, endpoint, host.state.skip, host.txt2img)) == 1
    assert [record.fallback_reason for record in host.records()] == ["interrupted"]
    # What the first press asked for still counts.
    assert host.state.interrupted


@pytest.mark.parametrize(("way", "doing"), [("decode", "decoding 3 pictures"), ("encode", "encoding")])
def test_the_progress_line_says_what_is_waited_for_and_is_given_back(
    host: Host, endpoint: Endpoint, way: str, doing: str
) -> None:
    lines = []

    def watch() -> None:
        lines.append(host.state.textinfo)
        endpoint.released.set()

    host.state.textinfo = "of the host"
    call = (lambda: host.decode(sampled(3, 1))) if way == "decode" else (lambda: host.encode(source() * 2 - 1))
    pressed_while_it_hangs(host, endpoint, watch, torch.no_grad()(call))
    assert lines == [f"Remote VAE: {doing} on {endpoint.url.removeprefix('http://')}"]
    assert host.state.textinfo == "of the host"


# --- accordion, API and plot -------------------------------------------------------------------------------------------


MODES = {"follow settings": None, "off": False, "auto": True, "remote": True}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_a_request_wins_over_the_settings(host: Host, endpoint: Endpoint, mode: str, enabled: bool) -> None:
    host.turn_on(endpoint.url, enabled=enabled)
    host.alwayson = {TITLE: [mode]}
    asked = enabled if MODES[mode] is None else MODES[mode]
    assert len(host.txt2img()) == 1
    assert endpoint.requests == ["/decode"] * bool(asked)
    [text] = host.infotexts
    assert (f"{TITLE} mode: {mode}" in text) is (mode != "follow settings")
    assert (remote() in text) is asked


@pytest.mark.parametrize(("mode", "requests"), [("auto", ["/encode"]), ("remote", ["/encode", "/decode"])])
def test_auto_leaves_here_what_the_settings_leave_here_and_remote_does_not(
    host: Host, endpoint: Endpoint, mode: str, requests: list[str]
) -> None:
    host.turn_on(endpoint.url, enabled=False, decode=False)
    host.alwayson = {TITLE: [mode]}
    host.img2img(source(2))
    assert endpoint.requests == requests


@pytest.mark.parametrize("transfer", ["raw", "u8"])
def test_a_transfer_of_a_request_wins_over_the_settings(host: Host, endpoint: Endpoint, transfer: str) -> None:
    host.turn_on(endpoint.url, transfer="png")
    host.alwayson = {TITLE: ["remote", transfer]}
    host.txt2img()
    assert host.details() == [transfer]
    assert host.infotexts[0].endswith(f"{TITLE} transfer: {transfer}, {remote(transfer)}")


@pytest.mark.parametrize("args", [[], ["banana", 7], ["", "", "too", "many"]])
def test_nonsense_and_too_few_or_too_many_arguments_follow_the_settings(
    host: Host, endpoint: Endpoint, args: list[Any]
) -> None:
    host.turn_on(endpoint.url)
    host.alwayson = {TITLE: args}
    host.txt2img()
    assert host.infotexts == [f"Seed: 1, {remote()}"]


def test_where_our_script_is_left_out_the_settings_count(host: Host, endpoint: Endpoint) -> None:
    """As a face detailer does, and SD.Next's Control tab."""
    host.turn_on(endpoint.url)
    host.process(Request())
    assert host.infotexts == [f"Seed: 1, {remote()}"]
    host.set_options(enabled=False)
    host.process(Request())
    assert host.infotexts == ["Seed: 1"]


def test_an_axis_makes_each_cell_its_own_way(host: Host, alone: dict[str, Made], endpoint: Endpoint) -> None:
    host.create_ui()
    host.turn_on(endpoint.url, enabled=False)
    cells = host.xyz(TITLE, ["off", "remote", "off", "auto", "follow settings"])
    assert endpoint.requests == ["/decode", "/decode"]
    assert host.infotexts == ["Seed: 1", f"Seed: 1, {remote()}", "Seed: 1", f"Seed: 1, {remote()}", "Seed: 1"]
    assert all(levels_apart(cell, alone["txt2img"].pictures) <= 1 for cell in cells)
    host.turn_on(endpoint.url)
    host.xyz(f"{TITLE} transfer", ["png", "u8"])
    assert host.infotexts == [f"Seed: 1, {remote('png')}", f"Seed: 1, {remote('u8')}"]


def test_two_axes_of_a_plot_are_both_in_its_cell(host: Host, endpoint: Endpoint) -> None:
    host.create_ui()
    host.turn_on(endpoint.url, enabled=False)
    p = Request()
    for axis, value in zip(host.axes[-2:], ("remote", "png"), strict=True):
        axis.apply(p, value, [value])
    host.process(p)
    assert host.details() == ["png"]


def test_a_plot_over_a_request_with_a_mode_goes_by_the_cell(host: Host, endpoint: Endpoint) -> None:
    host.create_ui()
    host.turn_on(endpoint.url)
    host.alwayson = {TITLE: ["remote", "png"]}
    host.xyz(TITLE, ["off", "auto"])
    assert host.details() == ["png"]


@pytest.mark.parametrize(("label", "value"), [(TITLE, "remote"), (f"{TITLE} transfer", "raw")])
def test_a_cell_that_no_one_knows_is_refused_before_the_plot_begins(
    host: Host, endpoint: Endpoint, label: str, value: str
) -> None:
    host.create_ui()
    host.turn_on(endpoint.url)
    with pytest.raises(RuntimeError, match="banana"):
        host.xyz(label, [value, "banana"])
    assert endpoint.requests == []


# --- a generation within a generation ----------------------------------------------------------------------------------


def with_a_detailer(host: Host) -> list[str]:
    """Each generation from now on has another one within it, before its own decode; their infotexts."""
    infotexts: list[str] = []

    def detail(p: Request) -> None:
        if p.seed != 9:
            infotexts.extend(host.processing.process_images_inner(Request(seed=9))[1])

    host.within = detail
    return infotexts


@pytest.mark.parametrize(("mode", "enabled", "requests"), [("off", True, 0), ("auto", False, 2)])
def test_a_generation_within_a_generation_does_as_that_one(
    host: Host, endpoint: Endpoint, mode: str, enabled: bool, requests: int
) -> None:
    inner = with_a_detailer(host)
    host.turn_on(endpoint.url, enabled=enabled)
    host.alwayson = {TITLE: [mode, "u8"]}
    host.txt2img()
    assert endpoint.requests == ["/decode"] * requests
    assert set(host.details()) == ({"u8"} if requests else set())
    assert inner == ([f"Seed: 9, {remote('u8')}"] if requests else ["Seed: 9"])


@pytest.mark.parametrize(("fails", "ways"), [(0, ("local (503)", "remote")), (1, ("remote", "local (503)"))])
def test_each_of_two_nested_generations_has_its_own_infotext(
    host: Host, endpoint: Endpoint, fails: int, ways: tuple[str, str]
) -> None:
    inner = with_a_detailer(host)
    endpoint.reset("503", fail_at=fails)
    host.turn_on(endpoint.url)
    host.txt2img()
    for text, way in zip([inner[0], host.infotexts[0]], ways, strict=True):
        assert f"{TITLE}: decode {way}" in text
        assert (" remote " in text) is (way == "remote")


def test_interrupt_within_a_generation_ends_that_one_too(host: Host, endpoint: Endpoint) -> None:
    with_a_detailer(host)
    host.n_iter = 3
    pictures = pressed_while_it_hangs(host, endpoint, host.state.interrupt, host.txt2img)
    assert len(pictures) == 0
    assert endpoint.requests == ["/decode"]


def test_a_generation_that_fails_leaves_nothing_for_the_next(host: Host, endpoint: Endpoint) -> None:
    def fail(_: Request) -> None:
        raise KeyError("a script")

    host.turn_on(endpoint.url, enabled=False)
    host.alwayson, host.within = {TITLE: ["remote", "png"]}, fail
    with pytest.raises(KeyError):
        host.txt2img()
    host.decode(sampled(1, 1))
    assert endpoint.requests == []


# --- life cycle --------------------------------------------------------------------------------------------------------


def reload_ui_twice(host: Host) -> None:
    host.reload_ui()
    host.reload_ui()


def announce_again(host: Host) -> None:
    host.script_callbacks.fire("model_loaded", host.model)


def switch_the_model(host: Host) -> None:
    host.load(host.made("sd1"))


def swap_there_and_back(host: Host) -> None:
    first = host.model
    host.load(host.made("sd1"))
    host.txt2img()
    host.swap_to(first)


def switch_the_vae(host: Host) -> None:
    host.change_vae(copy.deepcopy(host.vae.state_dict()))


def take_out_and_put_in(host: Host) -> None:
    host.adapter.uninstall()
    host.adapter.uninstall()
    host.adapter.install()
    host.adapter.install()


EVENTS = [reload_ui_twice, announce_again, switch_the_model, swap_there_and_back, switch_the_vae, take_out_and_put_in]


@pytest.mark.parametrize("event", EVENTS)
def test_whatever_happens_a_call_is_one_request_through_one_hook(
    host: Host, alone: dict[str, Made], endpoint: Endpoint, event: Callable[[Host], None]
) -> None:
    host.txt2img()
    event(host)
    host.adapter.router.history.clear()
    host.turn_on(endpoint.url)
    made = make(host, "img2img")
    assert endpoint.requests == ["/encode", "/decode"]
    assert {record.route for record in host.records()} == {"remote"}
    assert levels_apart(made.pictures, alone["img2img"].pictures) <= 1
    functions = [host.seam(), host.processing.process_images_inner, host.sd_samplers_common.single_sample_to_image]
    assert [hooks_in(function) for function in [*functions, host.state.interrupt]] == [1] * 4


def test_after_a_vae_switch_what_falls_back_is_made_with_the_new_weights(host: Host, alone: dict[str, Made]) -> None:
    host.change_vae({key: value * 0.9 for key, value in host.vae.state_dict().items()})
    local = make(host, "img2img").pictures
    assert not same(local, alone["img2img"].pictures)
    host.turn_on(refusing())
    assert same(make(host, "img2img").pictures, local)


def test_with_another_vae_than_the_endpoints_the_call_stays_here_unless_the_request_says_remote(
    host: Host, endpoint: Endpoint
) -> None:
    host.change_vae({key: value * 0.9 for key, value in host.vae.state_dict().items()})
    local = make(host, "img2img").pictures
    host.turn_on(endpoint.url)
    assert same(make(host, "img2img").pictures, local)
    assert endpoint.requests == []
    local_only(host, "another VAE there")
    host.alwayson = {TITLE: ["remote"]}
    host.img2img(source(2))
    assert endpoint.requests == ["/encode", "/decode"]
    assert host.details()[-1] == "raw, another VAE"


def test_a_model_that_is_loaded_while_the_extension_is_out_is_left_alone(host: Host, endpoint: Endpoint) -> None:
    host.adapter.uninstall()
    host.turn_on(endpoint.url)
    host.load(host.made("sd1"))
    assert len(host.txt2img()) == 1
    assert endpoint.requests == []
    assert hooks_in(host.seam()) == 0


def test_two_models_of_two_families_are_each_asked_for_by_their_own(host: Host, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url)
    first, second = host.model, host.load(host.made("sdxl"))
    for model in (second, first, second):
        host.swap_to(model)
        host.img2img(source())
    assert endpoint.requests == ["/encode", "/decode"] * 3
    families = [query.partition("family=")[2].partition("&")[0] for query in endpoint.queries]
    assert families == ["sdxl", "sdxl", "sd1", "sd1", "sdxl", "sdxl"]


PICKS: dict[str, Callable[[Any], Any]] = {
    "a1111": lambda host: setattr(host.sd_vae, "loaded_vae_file", "/models/VAE/mine.safetensors"),
    "neo": lambda host: host.model_data.forge_loading_parameters.update(
        additional_modules=["/models/text_encoder/clip.safetensors", "/models/VAE/mine.safetensors"]
    ),
    "sdnext": lambda host: host.opts.data.update(sd_vae="mine.safetensors"),
}


def test_the_vae_file_that_the_user_has_picked_is_known(host: Host, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picked: list[str] = []
    monkeypatch.setattr(host.adapter.router, "run", lambda call, *_, **__: picked.append(call.vae.picked) or call.whole())
    host.turn_on("")
    host.txt2img()
    PICKS[name](host)
    host.txt2img()
    assert picked == ["", "mine.safetensors"]


# --- beside other extensions -------------------------------------------------------------------------------------------


def test_a_hook_that_was_there_before_ours_is_asked_for_what_is_made_here_and_comes_back(
    bare: Host, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    notes: list[str] = []
    theirs = bare.put_over(notes)
    bare.load_extension()
    bare.turn_on(endpoint.url)
    make(bare, "txt2img")
    assert (notes, endpoint.requests) == ([], ["/decode"])
    endpoint.reset("503")
    assert same(make(bare, "txt2img").pictures, alone["txt2img"].pictures)
    assert notes == ["theirs"]
    bare.adapter.uninstall()
    assert bare.seam() is theirs
    bare.clear_seam()


@pytest.mark.parametrize("chaining", [True, False])
def test_a_hook_that_somebody_puts_over_ours_keeps_working_and_stays(
    host: Host, name: str, alone: dict[str, Made], endpoint: Endpoint, chaining: bool
) -> None:
    notes: list[str] = []
    theirs = host.put_over(notes, chaining=chaining)
    host.turn_on(endpoint.url)
    make(host, "txt2img")
    # Who puts a method of its own into a class of diffusers is not covered again before Reload UI.
    assert endpoint.requests == ["/decode"] * (chaining or name != "sdnext")
    host.reload_ui()
    for mode in ("pass", "503"):
        endpoint.reset(mode)
        notes.clear()
        assert levels_apart(make(host, "txt2img").pictures, alone["txt2img"].pictures) <= 1
        assert endpoint.requests == ["/decode"]
        assert len(host.infotexts) == 1
    assert notes == ["theirs"]
    host.adapter.uninstall()
    assert host.seam() is theirs
    endpoint.reset("pass")
    assert same(make(host, "txt2img").pictures, alone["txt2img"].pictures)
    assert endpoint.requests == []
    host.clear_seam()


@pytest.mark.parametrize("function", ["processing.process_images_inner", "sd_samplers_common.single_sample_to_image"])
def test_a_function_that_somebody_put_around_ours_stays_and_ours_below_it_does_nothing_more(
    host: Host, endpoint: Endpoint, function: str
) -> None:
    module, _, attribute = function.partition(".")
    owner, notes = getattr(host, module), []
    ours = getattr(owner, attribute)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        notes.append("theirs")
        return ours(*args, **kwargs)

    setattr(owner, attribute, theirs)
    host.turn_on(endpoint.url)
    for act, requests in ((host.adapter.uninstall, []), (host.reload_ui, ["/decode"])):
        act()
        notes.clear()
        host.preview(sampled(1, 9))
        host.txt2img()
        assert (notes, endpoint.requests) == (["theirs"], requests)
    assert host.infotexts == [f"Seed: 1, {remote()}"]
    host.adapter.uninstall()
    assert getattr(owner, attribute) is theirs
    setattr(owner, attribute, ours)


# --- our own faults ----------------------------------------------------------------------------------------------------


def fail(*_: Any, **__: Any) -> Any:
    raise AttributeError("nobody has thought of this")


@pytest.mark.parametrize("broken", ["_call", "_settings", "_switched_on"])
def test_where_ours_goes_wrong_the_uis_own_vae_answers(
    host: Host, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    local = both(host)
    monkeypatch.setattr(host.adapter, broken, fail)
    host.turn_on(endpoint.url)
    assert all(torch.equal(one, other) for one, other in zip(both(host), local, strict=True))
    assert endpoint.requests == []


def test_a_model_that_cannot_be_hooked_is_generated_with_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(host.adapter, "_models", fail)
        host.txt2img()


# --- the VAE for other UIs ---------------------------------------------------------------------------------------------


def shared(vae: VaeAtWork, op: Op, tensor: torch.Tensor) -> torch.Tensor:
    return vae.whole(vae.module, op, vae.bring(tensor))


def test_what_is_shared_is_the_vae_in_use_and_it_gives_what_the_model_gives(host: Host, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url)
    served = host.adapter.current()
    assert served is not None
    assert served.module is host.module
    assert (served.family.key, served.dtype, served.device) == ("sd1", torch.float32, torch.device("cpu"))
    latents, pixels = sampled(2, 3), torch.rand(1, 3, 32, 48) * 2 - 1
    with host.adapter.serving():
        decoded, moments = shared(served, "decode", latents), shared(served, "encode", pixels)
        whole = host.vae.decode(latents).sample, host.vae.encode(pixels).latent_dist.parameters
    assert psnr(decoded, whole[0]) > 100
    assert psnr_of_moments(moments, whole[1]) > 100
    # A call for another UI is nobody's generation, and does not go out again.
    assert host.records() == endpoint.requests == []


def test_after_a_switch_the_other_model_is_shared_and_while_nothing_is_loaded_nothing_is(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.load(host.made("sdxl"))
    served = host.adapter.current()
    assert served is not None
    assert served.family.key == "sdxl"
    with monkeypatch.context() as patch:
        patch.setattr(host.model_data, "sd_model", None)
        assert host.adapter.current() is None


def test_only_who_ticked_the_box_shares(host: Host) -> None:
    assert not host.adapter.shares()
    host.set_options(share=True)
    assert host.adapter.shares()
    host.adapter.uninstall()
    assert not host.adapter.shares()
