"""Which VAE an endpoint has: how it is found out, what it decides, and what the user reads."""

from __future__ import annotations

import copy
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae import tiled
from remote_vae.call import Answer, User, never
from remote_vae.errors import (
    AnotherVae,
    CallCancelled,
    DeadlineExceeded,
    EndpointError,
    EndpointUnreachable,
    NotOffered,
    RouteFailed,
    VaeNotConfirmed,
)
from remote_vae.remote.client import Deadlines, beside
from remote_vae.remote.comparison import picture
from remote_vae.remote.same_vae import INFO_SECONDS, KEPT_SECONDS, LONGEST_PAUSE, SameVae
from remote_vae.server.models import LoadedVae
from remote_vae.settings import Settings
from remote_vae.vae.families import find_family
from remote_vae.vae.fingerprint import fingerprint_of
from remote_vae.wire import DecodeAnswer, EncodeAnswer, Info, Output
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.layouts import kl_with_extra_parameter
from tests.remote.conftest import Caller, Clock
from tests.vaes import loaded as as_loaded

QUICK = Deadlines(connect=2.0, first_byte=5.0, total=20.0)


@pytest.fixture
def plain(caller: Caller, chaos: Chaos) -> Caller:
    """Asks an endpoint of the protocol that has no /info and gives no posteriors."""
    chaos.info = "404 html"
    chaos.drops = ("posterior", "family")
    return caller


@pytest.fixture(params=["decode", "encode"])
def op(request: pytest.FixtureRequest, pixels: torch.Tensor) -> dict[str, Any]:
    """The changes that make a call of it."""
    return {} if request.param == "decode" else {"op": "encode", "tensor": pixels}


def change(vae: Any, part: str = "") -> None:
    """Weights as another training would leave them, in the same module."""
    generator = torch.Generator().manual_seed(0)
    for name, value in vae.state_dict().items():
        if name.startswith(part) and value.ndim == 4:
            value.mul_(1 + 0.4 * torch.randn(value.shape, generator=generator))


def weights(vae: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in vae.state_dict().items()}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def unasked(tensor: torch.Tensor) -> Any:
    raise AssertionError(f"a test picture of {list(tensor.shape)} was sent")


# --- an endpoint that says which VAE it has --------------------------------------------------------------------------------


def test_with_the_same_vae_the_call_goes_remote(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    assert caller.run(settings) == caller.run(settings) == "remote"
    assert caller.last.detail == "u8"
    assert chaos.infos == ["/info"]
    assert chaos.requests == ["/decode"] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_with_the_same_vae_in_another_dtype_too(caller: Caller, settings: Settings, dtype: torch.dtype) -> None:
    caller.vae.to(dtype)
    assert caller.run(settings) == "remote"


def test_a_caller_who_has_no_vae_at_hand_asks_nothing(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    caller.vae = None
    assert caller.run(settings) == "remote"
    assert not chaos.infos


def test_with_another_vae_nothing_is_sent_and_both_are_named(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    change(caller.vae)
    for _ in range(2):
        with pytest.raises(AnotherVae) as caught:
            caller.ask(settings, "mine.safetensors")
    names = ("demo_vae", "mine.safetensors", chaos.url, *(fingerprint_of(caller.vae) or ())[1:])
    for name in (*names, "serve", "When the VAE differs"):
        assert name in str(caught.value)
    assert caught.value.reason == "another VAE there"
    assert chaos.infos == ["/info"]
    assert not chaos.requests


def test_another_vae_is_no_reason_to_pause(caller: Caller, settings: Settings) -> None:
    before = weights(caller.vae)
    change(caller.vae)
    assert caller.run(settings) == "local"
    assert caller.reason == "another VAE there"
    caller.vae.load_state_dict(before)
    assert caller.run(settings) == "remote"


def test_another_vaes_picture_that_the_user_wants_is_called_so(
    caller: Caller, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    change(caller.vae)
    for _ in range(3):
        assert caller.run(replace(settings, when_vae_differs="remote")) == "remote"
    assert (caller.last.detail, caller.reason) == ("u8, another VAE", "")
    assert [message.count("has another VAE") for message in warnings(caplog)] == [1]


def test_after_other_weights_were_loaded_into_the_same_vae_it_is_another(
    caller: Caller, chaos: Chaos, settings: Settings
) -> None:
    assert caller.run(settings) == "remote"
    change(caller.vae)
    assert caller.run(settings) == "local"
    assert chaos.requests == ["/decode"]


@pytest.fixture
def other(loaded: LoadedVae) -> Iterator[ServerThread]:
    """A server of another VAE of the family."""
    trained = AutoencoderKL.from_config(loaded.vae.config).requires_grad_(False)
    trained.load_state_dict(loaded.vae.state_dict())
    change(trained)
    running = ServerThread(replace(as_loaded(trained, "sd1"), family=loaded.family))
    yield running
    running.close()


def test_a_server_that_has_another_vae_meanwhile_refuses_what_is_for_the_one_before(
    caller: Caller, chaos: Chaos, settings: Settings, other: ServerThread, op: dict[str, Any]
) -> None:
    assert caller.run(settings, **op) == "remote"
    chaos.target = other.url
    assert caller.run(settings, **op) == "local"
    assert caller.reason == "another VAE there"
    assert chaos.infos == ["/info"] * 2
    # Nor is it asked again.
    assert caller.run(settings, **op) == "local"
    assert len(chaos.requests) == 2


def test_who_wants_its_pictures_all_the_same_gets_them_at_once(
    caller: Caller, chaos: Chaos, settings: Settings, other: ServerThread
) -> None:
    settings = replace(settings, when_vae_differs="remote")
    assert caller.run(settings) == "remote"
    chaos.target = other.url
    assert caller.run(settings) == "remote"
    assert caller.last.detail == "u8, another VAE"


def test_one_that_does_not_read_fingerprints_is_noticed_after_a_minute(
    caller: Caller, chaos: Chaos, settings: Settings, other: ServerThread
) -> None:
    chaos.drops = ("fingerprint",)
    assert caller.run(settings) == "remote"
    chaos.target = other.url
    caller.clock.now += INFO_SECONDS + 1
    assert caller.run(settings) == "local"
    assert caller.reason == "another VAE there"


def test_a_server_that_failed_is_asked_who_it_is_before_the_minute_is_over(
    caller: Caller, chaos: Chaos, settings: Settings
) -> None:
    settings = replace(settings, cooldown=0.0)
    assert caller.run(settings) == "remote"
    chaos.reset("503", fail_at=0)
    assert caller.run(settings) == "local"
    assert caller.run(settings) == "remote"
    assert chaos.infos == ["/info"]


def test_a_vae_of_another_family_is_another_vae(caller: Caller, chaos: Chaos, server: ServerThread) -> None:
    # A server of the same weights, which takes them for those of SD 1.
    sd1 = ServerThread(replace(server.loaded, family=find_family("sd1")))
    try:
        chaos.target = sd1.url
        with pytest.raises(AnotherVae, match=r"has a VAE for SD 1 / SD 2, .* is for SDXL"):
            caller.ask(Settings(endpoint=chaos.url), family=find_family("sdxl"))
        assert caller.ask(Settings(endpoint=chaos.url), family=find_family("sd2")) == "remote"
        # A family that nobody knows cannot be compared; the weights are the same.
        assert caller.ask(Settings(endpoint=chaos.url)) == "remote"
        assert chaos.requests == ["/decode"] * 2
    finally:
        sd1.close()


def test_seamless_pictures_are_made_here(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    """As by the option "Tiling" of the UIs, of which the weights say nothing."""
    for layer in caller.vae.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.padding_mode = "circular"
    assert caller.run(settings) == "local"
    assert caller.reason == "Tiling is on"
    assert not chaos.requests


# --- /info -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:7870/decode", "http://h:7870/info"),
        ("http://h/encode", "http://h/info"),
        ("http://h/some/where/decode/", "http://h/some/where/info"),
        ("http://h/decode?key=a", "http://h/info?key=a"),
        ("http://h", "http://h/info"),
        ("http://h/", "http://h/info"),
        ("https://h/vae/", "https://h/vae/info"),
        ("https://h/my-decode", "https://h/my-decode/info"),
    ],
)
def test_info_is_beside_the_call_or_below_the_endpoint(url: str, expected: str) -> None:
    assert beside(url, "info") == expected


def test_it_is_asked_once_a_minute_for_both_kinds_of_calls(chaos: Chaos, loaded: LoadedVae) -> None:
    clock = Clock()
    same_vae = SameVae(clock)
    info = same_vae.info(f"{chaos.url}/decode", QUICK, never)
    assert info is not None
    assert (info.family, info.model, info.fingerprints) == ("custom", "demo_vae", loaded.fingerprints)
    clock.now += INFO_SECONDS - 1
    assert same_vae.info(f"{chaos.url}/encode", QUICK, never) is info
    assert chaos.infos == ["/info"]
    clock.now += 2
    same_vae.info(f"{chaos.url}/decode", QUICK, never)
    assert chaos.infos == ["/info"] * 2
    same_vae.forget(f"{chaos.url}/encode")
    same_vae.info(f"{chaos.url}/decode", QUICK, never)
    assert chaos.infos == ["/info"] * 3
    assert not chaos.requests


def test_the_token_goes_along(loaded: LoadedVae, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ServerThread(loaded, token="secret")
    try:
        same_vae = SameVae()
        assert same_vae.info(f"{server.url}/decode", QUICK, never) is None
        monkeypatch.setenv("REMOTE_VAE_TOKEN", "secret")
        info = same_vae.info(f"{server.url}/decode", QUICK, never)
        assert info is not None
        assert info.fingerprints == loaded.fingerprints
    finally:
        server.close()


@pytest.mark.parametrize(
    ("mode", "asked"), [("404 html", 1), ("200 html", 1), ("nan", 1), ("redirect", 1), ("short", 1), ("503", 2)]
)
def test_an_answer_that_says_nothing_is_remembered_unless_it_may_say_more_next_time(
    chaos: Chaos, mode: str, asked: int
) -> None:
    chaos.info = mode
    same_vae = SameVae()
    for _ in range(2):
        assert same_vae.info(f"{chaos.url}/decode", QUICK, never) == (Info() if asked == 1 else None)
    assert len(chaos.infos) == asked


@pytest.mark.parametrize(
    ("mode", "deadlines", "error"),
    [
        ("drop", QUICK, EndpointUnreachable),
        ("cut", QUICK, EndpointUnreachable),
        ("hang", Deadlines(2.0, 0.3, 20.0), DeadlineExceeded),
        ("slow", Deadlines(2.0, 5.0, 0.3), DeadlineExceeded),
    ],
)
def test_an_endpoint_that_does_not_answer_is_a_failed_route(
    chaos: Chaos, mode: str, deadlines: Deadlines, error: type[RouteFailed]
) -> None:
    chaos.info = mode
    same_vae = SameVae()
    with pytest.raises(error):
        same_vae.info(f"{chaos.url}/decode", deadlines, never)
    chaos.info = "pass"
    info = same_vae.info(f"{chaos.url}/decode", QUICK, never)
    assert info is not None
    assert info.model == "demo_vae"


@pytest.mark.parametrize(("mode", "error"), [("hang", DeadlineExceeded), ("drop", EndpointUnreachable)])
def test_an_endpoint_that_does_not_answer_is_asked_one_thing_and_then_left_alone(
    caller: Caller, chaos: Chaos, mode: str, error: type[RouteFailed]
) -> None:
    settings = Settings(endpoint=chaos.url, first_byte_timeout=0.3)
    chaos.reset(mode)
    with pytest.raises(error):
        caller.ask(settings)
    with pytest.raises(NotOffered, match="asked again in"):
        caller.ask(settings)
    assert (chaos.infos.count("/info"), chaos.requests) == (1, [])


def test_a_hanging_call_costs_one_deadline_however_it_goes_on(caller: Caller, chaos: Chaos) -> None:
    """The first byte of /info was there in time, and the call's never comes: one wait, and the next call makes none."""
    settings = Settings(endpoint=chaos.url, first_byte_timeout=0.3)
    chaos.reset("hang")
    chaos.info = "pass"
    assert caller.run(settings) == caller.run(settings) == "local"
    assert (chaos.infos, chaos.requests) == (["/info", "/health"], ["/decode"])


def test_an_interrupt_while_asking_is_no_reason_to_pause(caller: Caller, chaos: Chaos, settings: Settings) -> None:
    chaos.reset("hang")
    pressed = threading.Event()
    threading.Timer(0.2, pressed.set).start()
    with pytest.raises(CallCancelled):
        caller.ask(settings, user=User(cancelled=pressed.is_set))
    chaos.reset("pass")
    assert caller.ask(settings) == "remote"


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"Content-Length: 1073741824\r\n\r\n", b"x" * 65536),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
        (b"Connection: close\r\n\r\n", b'{"a": ' * 10000),
    ],
)
def test_a_gigabyte_is_not_taken_in_and_says_nothing(head: bytes, piece: bytes) -> None:
    sent = 0

    def serve() -> None:
        nonlocal sent
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + head)
            while sent < 1 << 30:
                connection.sendall(piece)
                sent += len(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        assert SameVae().info(f"http://127.0.0.1:{listener.getsockname()[1]}/decode", QUICK, never) == Info()
        serving.join(10)
    # What was under way in the buffers of the two sockets; a gigabyte is a hundred times that.
    assert not serving.is_alive()
    assert sent < 16 << 20


# --- an endpoint that says nothing: the test picture -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_with_the_same_vae_the_call_goes_remote_and_the_test_picture_is_sent_once(
    plain: Caller, chaos: Chaos, settings: Settings, op: dict[str, Any], dtype: torch.dtype
) -> None:
    plain.vae.to(dtype)
    if op:
        op = {**op, "tensor": op["tensor"].to(dtype)}
    plain.latents = plain.latents.to(dtype)
    assert plain.run(settings, **op) == plain.run(settings, **op) == "remote"
    assert plain.last.detail == "u8"
    assert len(chaos.requests) == 3


def test_with_another_vae_the_call_stays_here_and_only_the_test_picture_was_sent(
    plain: Caller, chaos: Chaos, settings: Settings, op: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    change(plain.vae, "encoder" if op else "decoder")
    # Whatever name the user picked it by.
    for picked in ("", "vae-ft-mse-840000-ema-pruned.safetensors"):
        assert plain.run(settings, picked, **op) == plain.run(settings, picked, **op) == "local"
        assert plain.reason == "another VAE there"
    assert len(chaos.requests) == 1
    assert len([message for message in warnings(caplog) if "makes other " in message]) == 1


def test_another_decoder_alone_is_noticed_where_it_counts(
    plain: Caller, settings: Settings, pixels: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """As the one of vae-ft-mse, whose encoder is that of SD 1."""
    change(plain.vae, "decoder")
    for _ in range(2):
        assert plain.run(settings, op="encode", tensor=pixels) == "remote"
        assert plain.run(settings) == "local"
    assert len([message for message in warnings(caplog) if "makes other pictures" in message]) == 1


def test_the_user_may_have_the_other_vaes_pictures(
    plain: Caller, chaos: Chaos, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    change(plain.vae, "decoder")
    assert plain.run(replace(settings, when_vae_differs="remote")) == "remote"
    assert plain.last.detail == "u8, another VAE"
    assert "makes other pictures" in caplog.text
    assert len(chaos.requests) == 2


@pytest.mark.parametrize("transfer", ["raw", "u8", "png", "jpg"])
def test_it_is_sent_as_the_user_has_pictures_sent_but_never_lossy(
    plain: Caller, chaos: Chaos, settings: Settings, op: dict[str, Any], transfer: str
) -> None:
    settings = replace(settings, transfer=transfer)
    assert plain.run(settings, **op) == "remote"
    assert "jpg" not in chaos.queries[0]
    if not op:
        assert ("image_format=png" in chaos.queries[0]) is (transfer in ("png", "jpg"))
    change(plain.vae, "encoder" if op else "decoder")
    assert plain.run(settings, **op) == "local"


def test_a_vae_that_goes_to_another_dtype_and_back_is_remembered(plain: Caller, chaos: Chaos, settings: Settings) -> None:
    """As in diffusers' SDXL pipelines, which turn the VAE to float32 and back."""
    plain.vae.to(torch.bfloat16)
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            plain.vae.to(dtype)
            assert plain.run(settings, tensor=plain.latents.to(dtype)) == "remote"
    assert len(chaos.requests) == 2 + 4


def test_no_host_is_asked_to_bring_its_vae_for_it(plain: Caller, settings: Settings) -> None:
    calls = []
    plain.vae.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    assert plain.run(settings) == "remote"
    assert not calls


def made_by(vae: Any) -> Callable[[torch.Tensor], Answer]:
    """An endpoint that has ``vae``."""

    def ask(tensor: torch.Tensor) -> Answer:
        if tensor.shape[1] == 3:
            encoded = vae.encode(tensor)
            return EncodeAnswer(encoded.latent_dist.parameters, is_posterior=True)
        return DecodeAnswer(Output.TENSOR, vae.decode(tensor).sample)

    return ask


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_layout_that_the_tiled_vae_does_not_know_is_run_whole_on_a_copy(
    caller: Caller, op: dict[str, Any], is_changed: bool
) -> None:
    caller.vae = kl_with_extra_parameter()
    there = copy.deepcopy(caller.vae)
    if is_changed:
        change(caller.vae)
    # An address where nobody is: /info is not asked of a public endpoint.
    found = caller.same_vae.verdict(caller.call(**op), "http://127.0.0.1:9/", QUICK, made_by(there), public=True)
    assert found.is_same is (not is_changed)


def test_an_endpoint_that_hangs_costs_one_deadline(plain: Caller, chaos: Chaos) -> None:
    chaos.reset("hang")
    with pytest.raises(DeadlineExceeded):
        plain.ask(Settings(endpoint=chaos.url, first_byte_timeout=0.3))
    assert plain.run(Settings(endpoint=chaos.url, first_byte_timeout=0.3)) == "local"
    assert len(chaos.requests) == 1


def test_an_interrupt_ends_it_before_anything_is_sent(plain: Caller, chaos: Chaos, settings: Settings) -> None:
    plain.same_vae.info(f"{chaos.url}/decode", QUICK, never)
    with pytest.raises(CallCancelled):
        plain.ask(settings, user=User(cancelled=lambda: True))
    assert not chaos.requests
    assert plain.run(settings) == "remote"
    assert len(chaos.requests) == 2


def test_it_is_asked_anew_after_a_while_and_after_a_failure(plain: Caller, chaos: Chaos, settings: Settings) -> None:
    settings = replace(settings, cooldown=0.0)
    assert plain.run(settings) == "remote"
    plain.clock.now += KEPT_SECONDS + 1
    assert plain.run(settings) == "remote"
    assert len(chaos.requests) == 4
    chaos.reset("503", fail_at=0)
    assert plain.run(settings) == "local"
    assert plain.run(settings) == "remote"
    assert len(chaos.requests) == 3


def test_other_weights_in_the_same_vae_are_compared_anew(plain: Caller, settings: Settings) -> None:
    assert plain.run(settings) == "remote"
    change(plain.vae, "decoder")
    assert plain.run(settings) == "local"


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("sd1", (1, 3, 64, 64)),
        ("sana", (1, 3, 128, 128)),
        ("qwen-image", (1, 3, 1, 64, 64)),
        ("qwen-image-2.1", (1, 4, 1, 64, 64)),
        ("ltx", (1, 3, 1, 128, 128)),
    ],
)
def test_the_picture_is_made_of_levels_and_has_light_and_shade(family: str, shape: tuple[int, ...]) -> None:
    pixels = picture(find_family(family))
    assert pixels.shape == shape
    levels = (pixels + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert pixels.amin() < -0.7
    assert pixels.amax() > 0.7


# --- unknown is not yet yes ------------------------------------------------------------------------------------------------

NOT_YET = "the endpoint does not say which VAE it has yet"


@pytest.mark.parametrize("mode", ["400", "404 html", "503", "200 html", "nan"])
@pytest.mark.parametrize("is_changed", [False, True])
def test_an_endpoint_that_cannot_make_the_test_picture_yet_gets_nothing_of_the_users(
    plain: Caller, chaos: Chaos, settings: Settings, mode: str, is_changed: bool
) -> None:
    if is_changed:
        change(plain.vae, "decoder")
    chaos.reset(mode, fail_at=0)
    assert plain.run(replace(settings, transfer="raw")) == "local"
    assert plain.reason.startswith(NOT_YET)
    # Another second and it has started.
    plain.clock.now += 2.1
    assert plain.run(replace(settings, transfer="raw")) == ("local" if is_changed else "remote")
    assert plain.reason == ("another VAE there" if is_changed else "")
    assert len(chaos.requests) == (2 if is_changed else 3)


def test_it_is_asked_again_after_seconds_and_ever_more_of_them(
    plain: Caller, chaos: Chaos, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    chaos.reset("503")
    assert plain.run(settings) == "local"
    for number, pause in enumerate((2, 4, 8, 16, 32, 64, 128, 256, LONGEST_PAUSE, LONGEST_PAUSE), 1):
        plain.clock.now += pause - 0.5
        assert plain.run(settings) == "local"
        assert len(chaos.requests) == number
        plain.clock.now += 1
        assert plain.run(settings) == "local"
        assert len(chaos.requests) == number + 1
    assert len(warnings(caplog)) == 1
    for text in (chaos.url, "503", "asked again", "When the VAE differs"):
        assert text in warnings(caplog)[0]
    chaos.reset("pass")
    plain.clock.now += LONGEST_PAUSE
    assert plain.run(settings) == "remote"


def test_the_user_may_have_its_pictures_all_the_same_and_the_record_says_that_nothing_is_confirmed(
    plain: Caller, chaos: Chaos, settings: Settings
) -> None:
    chaos.reset("400", fail_at=0)
    for _ in range(2):
        assert plain.run(replace(settings, when_vae_differs="remote")) == "remote"
        assert (plain.last.detail, plain.reason) == ("u8, VAE not confirmed", "")
    assert len(chaos.requests) == 3


def test_an_endpoint_that_answers_nothing_but_errors_has_failed_and_is_left_alone(
    caller: Caller, chaos: Chaos, settings: Settings
) -> None:
    chaos.reset("503")
    assert caller.run(settings) == "local"
    assert caller.reason == "503"
    assert caller.run(settings) == "local"
    assert caller.reason == "503, 0 s ago"
    assert len(chaos.requests) == 1
    chaos.reset("503", fail_at=0)
    chaos.info = "503"
    assert Caller(caller.vae, caller.family, caller.latents).run(replace(settings, when_vae_differs="remote")) == "remote"


def test_a_token_that_is_missing_is_called_so(plain: Caller, loaded: LoadedVae, settings: Settings) -> None:
    server = ServerThread(loaded, token="secret")
    try:
        with pytest.raises(EndpointError, match="401"):
            plain.ask(replace(settings, endpoint=server.url))
    finally:
        server.close()


class Unreadable(torch.nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("offloaded")


def nan_vae() -> Any:
    vae = kl_with_extra_parameter()
    vae.colour = None
    vae.decoder.conv_out.weight.data.fill_(torch.nan)
    return vae


@pytest.mark.parametrize("make", [torch.nn.Identity, lambda: torch.nn.Linear(1, 1), lambda: Unreadable(1, 1), nan_vae])
def test_a_vae_that_cannot_make_the_test_picture_here_is_not_confirmed(
    plain: Caller, chaos: Chaos, settings: Settings, make: Callable[[], Any]
) -> None:
    plain.vae = make()
    with pytest.raises(VaeNotConfirmed, match="your VAE"):
        plain.ask(settings)
    assert not chaos.requests
    assert plain.run(replace(settings, when_vae_differs="remote")) == "remote"
    assert plain.last.detail == "u8, VAE not confirmed"


def test_weights_that_are_loaded_while_the_test_picture_is_made_are_not_compared(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tiled.encode

    def while_loading(vae: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        moments = encode(vae, *args, **kwargs)
        change(vae, "decoder")
        return moments

    monkeypatch.setattr(tiled, "encode", while_loading)
    found = caller.same_vae.verdict(caller.call(), "http://127.0.0.1:9/", QUICK, unasked, public=True)
    assert found.is_same is None
    assert "changed" in found.why


# --- public endpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_public_endpoint_is_sent_the_test_picture_too(caller: Caller, chaos: Chaos, is_changed: bool) -> None:
    """Most checkpoints have the standard VAE that is there; some have one of their own and no name for it."""
    there = copy.deepcopy(caller.vae)
    if is_changed:
        change(caller.vae, "decoder")
    call = caller.call(family=find_family("sd1"))
    found = caller.same_vae.verdict(call, f"{chaos.url}/", QUICK, made_by(there), public=True)
    assert found.is_same is (not is_changed)
    assert not chaos.infos


@pytest.mark.parametrize(
    ("picked", "family", "is_same"),
    [
        ("kl-f8-anime2.safetensors", "sd1", None),
        ("vae-ft-mse-840000-ema-pruned.safetensors", "sd1", True),
        ("VAE-ft-MSE-840000-ema-pruned.vae.pt", "sd1", True),
        ("vae-ft-mse-840000-ema-pruned.ckpt", "sdxl", None),
        ("C:\\models\\VAE\\sdxl_vae.safetensors", "sdxl", True),
        ("sub/sdxl.vae.safetensors", "sdxl", True),
        ("ae.sft", "flux", True),
        ("anything.pt", "sd3", None),
        ("", "sd1", None),
    ],
)
def test_where_no_test_picture_can_be_made_the_name_of_the_file_has_to_tell(
    caller: Caller, picked: str, family: str, is_same: bool | None
) -> None:
    caller.vae = torch.nn.Linear(1, 1)
    call = caller.call(picked, find_family(family))
    assert caller.same_vae.verdict(call, "http://127.0.0.1:9/", QUICK, unasked, public=True).is_same is is_same


# --- what the user reads -----------------------------------------------------------------------------------------------------


def test_the_user_reads_it_once_and_again_when_something_has_changed(
    caller: Caller, settings: Settings, caplog: pytest.LogCaptureFixture, pixels: torch.Tensor
) -> None:
    same = weights(caller.vae)
    change(caller.vae)
    for _ in range(3):
        caller.run(settings)
        caller.run(settings, op="encode", tensor=pixels)
    assert len(warnings(caplog)) == 1
    change(caller.vae)
    caller.run(settings)
    assert len(warnings(caplog)) == 2
    changed = weights(caller.vae)
    caller.vae.load_state_dict(same)
    assert caller.run(settings) == "remote"
    caller.vae.load_state_dict(changed)
    caller.run(settings)
    caller.run(settings)
    assert len(warnings(caplog)) == 3


def test_a_key_in_the_address_is_not_shown(caller: Caller, chaos: Chaos) -> None:
    change(caller.vae)
    with pytest.raises(AnotherVae) as caught:
        caller.ask(Settings(decode_endpoint=f"{chaos.url}/decode?key=secret"))
    assert "secret" not in str(caught.value)
