"""The contract of the A1111 adapter, against a stand-in for the host and a real server with the same VAE."""

from __future__ import annotations

import copy
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from remote_vae.errors import VaeCallFailed
from remote_vae.history import Record
from remote_vae.hosts.a1111 import adapter
from remote_vae.rescue import load_latents
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.hosts import a1111_standin as standin
from tests.hosts.a1111_standin import Host, LdmModel, Sd3Model, SgmModel, sampled
from tests.hosts.contract import hooks_in, levels_apart, same

KINDS = [LdmModel, SgmModel, Sd3Model]


@pytest.fixture
def model(host: Host, vae: AutoencoderKL) -> LdmModel:
    """An SD 1 model, loaded."""
    return host.load(LdmModel(vae))


class PlainEndpoint(Chaos):
    """An endpoint that has never heard of posteriors, as Hugging Face's."""

    def _forward(self, handler: BaseHTTPRequestHandler, mode: str, body: bytes) -> None:
        assert "posterior=True" in handler.path
        handler.path = re.sub(r"posterior=True&?", "", handler.path)
        super()._forward(handler, mode, body)


# Proxies that live for the whole file: to stop one takes half a second.
@pytest.fixture(scope="module")
def proxies(server: ServerThread) -> Iterator[tuple[Chaos, PlainEndpoint]]:
    both = Chaos(server.url), PlainEndpoint(server.url)
    yield both
    for proxy in both:
        proxy.close()


@pytest.fixture
def chaos(proxies: tuple[Chaos, PlainEndpoint]) -> Iterator[Chaos]:
    proxy = proxies[0]
    proxy.released = threading.Event()
    proxy.reset("pass")
    # What the endpoint says of itself is not what these tests are about.
    proxy.info = "pass"
    yield proxy
    proxy.released.set()


@pytest.fixture
def plain(proxies: tuple[Chaos, PlainEndpoint]) -> PlainEndpoint:
    proxies[1].reset("pass")
    proxies[1].info = "404 html"
    return proxies[1]


def turn_on(host: Host, endpoint: str, **options: Any) -> None:
    """No pause after a failure, so that every request an adapter would make is made."""
    values = {"enabled": True, "endpoint": endpoint, "transfer": "raw", "cooldown": 0.0, "first_byte_timeout": 20.0}
    host.set_options(**{**values, **options})


def records() -> list[Record]:
    return adapter.router.history.records()


def routes() -> list[str]:
    return [f"{record.op} {record.route}" for record in records()]


def seeded(work: Callable[[], Any], seed: int = 5) -> Any:
    """``work`` with the global generator in a known state."""
    torch.manual_seed(seed)
    return work()


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- off, and options --------------------------------------------------------------------------------------------------


def test_switched_off_everything_is_bit_equal_and_nothing_is_asked_or_recorded(
    host: Host, model: LdmModel, chaos: Chaos, image: torch.Tensor
) -> None:
    def everything() -> list[np.ndarray]:
        torch.manual_seed(5)
        pictures = host.txt2img(batch=2) + host.img2img(image) + host.inpaint(image) + host.instruct_pix2pix(image)
        return pictures + host.hires_latent()[0] + host.hires_pixel()

    adapter.uninstall()
    before = everything()
    adapter.install()
    turn_on(host, chaos.url, enabled=False)
    assert hooks_in(model.decode_first_stage) == 1
    assert same(everything(), before)
    assert chaos.requests == []
    assert records() == []


def test_before_the_options_exist_the_extension_is_off(host: Host, model: LdmModel) -> None:
    assert len(host.txt2img(batch=2)) == 2
    assert records() == []


def test_options_that_do_not_exist_yet_have_their_defaults(host: Host, model: LdmModel) -> None:
    local = host.txt2img()
    host.set_options(enabled=True)
    assert same(host.txt2img(), local)
    assert routes() == ["decode local"]


def test_nonsense_in_an_option_is_its_default_with_one_warning_and_a_picture(
    host: Host, model: LdmModel, chaos: Chaos, caplog: pytest.LogCaptureFixture
) -> None:
    local = host.txt2img()
    turn_on(host, chaos.url, transfer="banana")
    pictures = host.txt2img() + host.txt2img()
    assert same(pictures, local + local)
    assert [record.detail for record in records()] == ["u8", "u8"]
    warnings = [message for message in caplog.messages if "banana" in message]
    assert len(warnings) == 1
    assert "Transfer" in warnings[0]


def test_decode_and_encode_are_switched_apart(host: Host, model: LdmModel, chaos: Chaos, image: torch.Tensor) -> None:
    turn_on(host, chaos.url, decode=False)
    host.img2img(torch.cat([image, image.flip(3)]))
    assert chaos.requests == ["/encode", "/encode"]
    assert routes() == ["encode remote", "encode remote", "decode local", "decode local"]


# --- decode ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transfer", ["raw", "u8", "png"])
def test_a_remote_picture_equals_the_local_one_to_the_last_level(
    host: Host, vae: AutoencoderKL, chaos: Chaos, kind: type, transfer: str
) -> None:
    model = host.load(kind(vae))
    local = host.txt2img()
    model.first_stage_model.calls.clear()
    turn_on(host, chaos.url, transfer=transfer)
    assert same(host.txt2img(), local)
    assert model.first_stage_model.calls == []
    assert chaos.requests == ["/decode"]
    [record] = records()
    assert (record.route, record.detail, record.endpoint) == ("remote", transfer, f"{chaos.url}/decode")
    assert (record.images, record.height, record.width, record.fallback_reason) == (1, 32, 48, "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_raw_answer_equals_the_local_tensor_bit_for_bit(host: Host, vae: AutoencoderKL, chaos: Chaos, kind: type) -> None:
    model = host.load(kind(vae))
    local = model.decode_first_stage(sampled(1, 1))
    turn_on(host, chaos.url)
    remote = model.decode_first_stage(sampled(1, 1))
    assert torch.equal(remote, local)
    assert (remote.dtype, remote.device) == (local.dtype, local.device)
    assert routes() == ["decode remote"]


def test_the_answer_comes_in_the_dtype_of_the_hosts_vae(host: Host, model: LdmModel, chaos: Chaos) -> None:
    host.devices.dtype_vae = torch.bfloat16
    model.first_stage_model.to(torch.bfloat16)
    turn_on(host, chaos.url)
    decoded = host.processing.decode_latent_batch(model, sampled(2, 1))
    assert [picture.dtype for picture in decoded] == [torch.bfloat16, torch.bfloat16]
    assert routes() == ["decode remote"]


@pytest.mark.parametrize(("transfer", "requests"), [("raw", 1), ("u8", 1), ("png", 3)])
def test_a_batch_of_three_is_one_request_or_one_a_picture_in_png(
    host: Host, model: LdmModel, chaos: Chaos, transfer: str, requests: int
) -> None:
    local = host.txt2img(batch=3)
    model.first_stage_model.calls.clear()
    turn_on(host, chaos.url, transfer=transfer)
    # The VAE adds up a batch in another order than single pictures.
    assert levels_apart(host.txt2img(batch=3), local) <= 1
    assert chaos.requests == ["/decode"] * requests
    assert model.first_stage_model.calls == []
    assert [(record.route, record.images) for record in records()] == [("remote", 3)]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("503", "503"), ("hang", "no answer in 0.3 s"), ("nan", "bad answer")],
)
def test_a_batch_whose_endpoint_fails_is_made_locally_after_asking_once(
    host: Host, model: LdmModel, chaos: Chaos, mode: str, reason: str
) -> None:
    local = host.txt2img(batch=3)
    chaos.reset(mode)
    turn_on(host, chaos.url, first_byte_timeout=0.3 if mode == "hang" else 20.0)
    assert same(host.txt2img(batch=3), local)
    assert chaos.requests == ["/decode"]
    assert [record.images for record in records()] == [1, 1, 1]
    assert all(record.route != "remote" and reason in record.fallback_reason for record in records())


def test_a_batch_whose_endpoint_is_not_there_is_made_locally(host: Host, model: LdmModel) -> None:
    local = host.txt2img(batch=3)
    turn_on(host, f"http://127.0.0.1:{closed_port()}")
    assert same(host.txt2img(batch=3), local)
    assert [record.fallback_reason for record in records()] == ["connection refused"] * 3


def test_the_one_picture_of_a_batch_of_png_that_fails_is_asked_for_again(host: Host, model: LdmModel, chaos: Chaos) -> None:
    local = host.txt2img(batch=3)
    chaos.reset("503", fail_at=1)
    turn_on(host, chaos.url, transfer="png")
    assert levels_apart(host.txt2img(batch=3), local) <= 1
    assert len(chaos.requests) == 4
    assert [(record.route, record.images) for record in records()] == [("remote", 3)]


def test_a_single_picture_whose_endpoint_fails_is_made_locally(host: Host, model: LdmModel, chaos: Chaos) -> None:
    local = host.txt2img()
    chaos.reset("503")
    turn_on(host, chaos.url)
    assert same(host.txt2img(), local)
    assert chaos.requests == ["/decode"]
    assert [record.fallback_reason for record in records()] == ["503"]


def test_extra_arguments_go_to_the_hosts_own_call(host: Host, model: LdmModel, chaos: Chaos) -> None:
    turn_on(host, chaos.url)
    latents = sampled(1, 1)
    assert torch.equal(model.decode_first_stage(latents, predict_cids=True), torch.full_like(latents, 7.0))
    assert model.decode_first_stage(latents, False, True).shape == (1, 3, 32, 48)
    assert chaos.requests == []
    assert records() == []


def test_an_approximate_decode_method_is_none_of_our_business(host: Host, model: LdmModel, chaos: Chaos) -> None:
    host.opts.data["sd_vae_decode_method"] = "TAESD"
    turn_on(host, chaos.url)
    assert len(host.txt2img(batch=2)) == 2
    assert chaos.requests == []


def test_nan_from_the_unet_is_the_hosts_own_error_and_never_sent(host: Host, model: LdmModel, chaos: Chaos) -> None:
    turn_on(host, chaos.url)
    with pytest.raises(standin.NansException, match="unet"):
        host.processing.decode_final(model, sampled(2, 1) * torch.nan)
    assert chaos.requests == []


# --- hires fix ---------------------------------------------------------------------------------------------------------


def test_hires_with_a_latent_upscaler_decodes_remotely(host: Host, model: LdmModel, chaos: Chaos) -> None:
    local, _ = host.hires_latent()
    turn_on(host, chaos.url)
    remote, _ = host.hires_latent()
    assert same(remote, local)
    assert chaos.requests == ["/decode"]


def test_hires_with_a_pixel_upscaler_decodes_encodes_and_decodes_remotely(host: Host, model: LdmModel, chaos: Chaos) -> None:
    local = seeded(host.hires_pixel)
    turn_on(host, chaos.url)
    remote = seeded(host.hires_pixel)
    assert same(remote, local)
    assert chaos.requests == ["/decode", "/encode", "/decode"]


def test_the_picture_saved_before_hires_is_no_preview_and_goes_remote(host: Host, model: LdmModel, chaos: Chaos) -> None:
    local, saved_locally = host.hires_latent(batch=2, save_before=True)
    turn_on(host, chaos.url)
    remote, saved = host.hires_latent(batch=2, save_before=True)
    assert levels_apart(remote, local) <= 1
    assert same([np.asarray(one) for one in saved], [np.asarray(one) for one in saved_locally])
    # One for each saved picture, and the whole batch at the end.
    assert chaos.requests == ["/decode"] * 3


def test_the_conditioning_of_hires_decodes_a_whole_batch_remotely(host: Host, model: LdmModel, chaos: Chaos) -> None:
    turn_on(host, chaos.url)
    host.hires_latent(batch=2, mask_weight=0.5)
    assert [(record.op, record.route, record.images) for record in records()] == [
        ("decode", "remote", 2),
        ("encode", "remote", 2),
        ("decode", "remote", 2),
    ]


# --- previews ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["sample_to_image", "samples_to_image_grid", "store_latent"])
def test_a_preview_never_leaves_the_machine(host: Host, model: LdmModel, chaos: Chaos, door: str) -> None:
    turn_on(host, chaos.url)
    model.first_stage_model.calls.clear()
    getattr(host.sd_samplers_common, door)(sampled(2, 1))
    assert "decode" in model.first_stage_model.calls
    assert chaos.requests == []
    assert records() == []


def test_a_preview_on_another_thread_stays_local_while_a_remote_decode_is_waited_for(
    host: Host, model: LdmModel, chaos: Chaos
) -> None:
    local = host.txt2img()
    shown = np.asarray(host.preview(sampled(1, 9)))
    chaos.reset("hang")
    turn_on(host, chaos.url)
    pictures: list[np.ndarray] = []
    generation = threading.Thread(target=lambda: pictures.extend(host.txt2img()))
    generation.start()
    wait_for(lambda: bool(chaos.requests))
    assert np.array_equal(np.asarray(host.preview(sampled(1, 9))), shown)
    assert generation.is_alive()
    assert chaos.requests == ["/decode"]
    assert records() == []
    chaos.released.set()
    generation.join(10)
    assert same(pictures, local)
    assert len(records()) == 1


def test_a_preview_that_is_being_made_does_not_keep_the_final_decode_here(host: Host, model: LdmModel, chaos: Chaos) -> None:
    local = host.txt2img()
    turn_on(host, chaos.url)
    inside, go_on = threading.Event(), threading.Event()

    def slow(z: torch.Tensor) -> torch.Tensor:
        inside.set()
        go_on.wait(10)
        return standin.FirstStage.decode(model.first_stage_model, z)

    vars(model.first_stage_model)["decode"] = slow
    preview = threading.Thread(target=lambda: host.preview(sampled(1, 9)))
    preview.start()
    inside.wait(10)
    pictures = host.txt2img()
    go_on.set()
    preview.join(10)
    assert same(pictures, local)
    assert routes() == ["decode remote"]


# --- encode ------------------------------------------------------------------------------------------------------------


def test_an_ldm_encode_is_the_posterior_with_sample_mode_and_mean(
    host: Host, model: LdmModel, chaos: Chaos, image: torch.Tensor
) -> None:
    pixels = image * 2 - 1
    local = model.encode_first_stage(pixels)
    turn_on(host, chaos.url)
    remote = model.encode_first_stage(pixels)
    assert isinstance(remote, standin.DiagonalGaussianDistribution)
    assert torch.equal(remote.mode(), local.mode())
    assert torch.equal(remote.mean, local.mean)
    assert torch.equal(seeded(remote.sample), seeded(local.sample))
    assert not torch.equal(seeded(remote.sample), remote.mode())
    assert chaos.requests == ["/encode"]


def test_an_ldm_encode_at_a_plain_endpoint_is_a_distribution_of_one_sample(
    host: Host, model: LdmModel, plain: PlainEndpoint, image: torch.Tensor
) -> None:
    pixels = image * 2 - 1
    local = model.encode_first_stage(pixels)
    turn_on(host, plain.url)
    remote = model.encode_first_stage(pixels)
    assert isinstance(remote, standin.DiagonalGaussianDistribution)
    # The server without a posterior asked for answers with the mode.
    assert torch.equal(remote.mode(), local.mode())
    assert torch.equal(remote.sample(), remote.mode())
    assert torch.equal(remote.mean, remote.mode())
    assert routes() == ["encode remote"]


@pytest.mark.parametrize("kind", [SgmModel, Sd3Model])
def test_an_sdxl_or_sd3_encode_is_the_scaled_sample_with_the_noise_of_the_seed(
    host: Host, vae: AutoencoderKL, chaos: Chaos, image: torch.Tensor, kind: type
) -> None:
    model = host.load(kind(vae))
    pixels = image * 2 - 1
    local = seeded(lambda: model.encode_first_stage(pixels))
    state = torch.get_rng_state()
    turn_on(host, chaos.url)
    remote = seeded(lambda: model.encode_first_stage(pixels))
    assert torch.equal(remote, local)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(seeded(lambda: model.encode_first_stage(pixels), seed=6), local)
    assert chaos.requests == ["/encode", "/encode"]


@pytest.mark.parametrize(
    ("kind", "scaled"),
    [(SgmModel, lambda z: 0.13025 * z), (Sd3Model, lambda z: (z - 0.0609) * 1.5305)],
)
def test_an_sdxl_or_sd3_encode_at_a_plain_endpoint_is_its_sample_scaled(
    host: Host,
    vae: AutoencoderKL,
    plain: PlainEndpoint,
    image: torch.Tensor,
    kind: type,
    scaled: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = host.load(kind(vae))
    pixels = image * 2 - 1
    turn_on(host, plain.url)
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(model.encode_first_stage(pixels), scaled(mode))
    assert routes() == ["encode remote"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("way", "requests"),
    [
        ("img2img", ["/encode", "/decode"]),
        ("inpaint", ["/encode", "/encode", "/decode"]),
    ],
)
def test_img2img_and_inpaint_of_a_seed_equal_local(
    host: Host, vae: AutoencoderKL, chaos: Chaos, image: torch.Tensor, kind: type, way: str, requests: list[str]
) -> None:
    host.load(kind(vae))
    local = seeded(lambda: getattr(host, way)(image))
    turn_on(host, chaos.url)
    assert same(seeded(lambda: getattr(host, way)(image)), local)
    assert chaos.requests == requests


def test_instruct_pix2pix_takes_the_mode_of_a_remote_encode(
    host: Host, model: LdmModel, chaos: Chaos, image: torch.Tensor
) -> None:
    local = seeded(lambda: host.instruct_pix2pix(image))
    turn_on(host, chaos.url)
    assert same(seeded(lambda: host.instruct_pix2pix(image)), local)
    # Both encodes are of one picture, which is sent once in a generation.
    assert chaos.requests == ["/encode", "/decode"]


def test_img2img_in_eight_bit_transfer_is_at_most_one_level_off(
    host: Host, model: LdmModel, chaos: Chaos, image: torch.Tensor
) -> None:
    local = seeded(lambda: host.img2img(image))
    turn_on(host, chaos.url, transfer="u8")
    assert levels_apart(seeded(lambda: host.img2img(image)), local) <= 1


def test_an_encode_whose_endpoint_fails_draws_the_noise_of_the_seed(
    host: Host, model: LdmModel, chaos: Chaos, image: torch.Tensor
) -> None:
    local = seeded(lambda: host.img2img(image))
    chaos.reset("503")
    turn_on(host, chaos.url)
    assert same(seeded(lambda: host.img2img(image)), local)
    assert [record.fallback_reason for record in records()] == ["503", "503"]


# --- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_nan_answers_leave_the_precision_of_the_host_alone(host: Host, model: LdmModel, chaos: Chaos, batch: int) -> None:
    host.devices.dtype_vae = torch.bfloat16
    model.first_stage_model.to(torch.bfloat16)
    local = host.txt2img(batch)
    chaos.reset("nan")
    turn_on(host, chaos.url)
    assert same(host.txt2img(batch), local)
    assert host.devices.dtype_vae == torch.bfloat16
    assert model.first_stage_model.dtype == torch.bfloat16


def test_the_hosts_own_retry_after_nan_still_works(host: Host, model: LdmModel, chaos: Chaos) -> None:
    local = host.txt2img(batch=2)
    decode = standin.FirstStage.decode
    vae = model.first_stage_model

    def broken_in_half(z: torch.Tensor) -> torch.Tensor:
        pixels = decode(vae, z)
        return pixels if vae.dtype == torch.float32 else pixels * torch.nan

    vars(vae)["decode"] = broken_in_half
    host.devices.dtype_vae = torch.bfloat16
    vae.to(torch.bfloat16)
    chaos.reset("503")
    turn_on(host, chaos.url, cooldown=60.0)
    pictures = host.txt2img(batch=2)
    assert host.devices.dtype_vae == torch.float32
    # Latents and weights went through bfloat16.
    assert levels_apart(pictures, local) < 30
    assert chaos.requests == ["/decode"]


# --- interrupt ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("button", ["interrupt", "skip"])
def test_interrupt_and_skip_end_the_wait_and_the_pictures_are_made_locally(
    host: Host, model: LdmModel, chaos: Chaos, button: str, batch: int
) -> None:
    local = host.txt2img(batch)
    chaos.reset("hang")
    turn_on(host, chaos.url, first_byte_timeout=60.0)
    pictures: list[np.ndarray] = []
    generation = threading.Thread(target=lambda: pictures.extend(host.txt2img(batch)))
    generation.start()
    wait_for(lambda: bool(chaos.requests))
    pressed = time.monotonic()
    getattr(host.state, button)()
    generation.join(40)
    # Local decodes on a busy machine included; the deadline is a minute away.
    assert time.monotonic() - pressed < 20.0
    assert same(pictures, local)
    assert [record.fallback_reason for record in records()] == ["interrupted"] * batch
    assert chaos.requests == ["/decode"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("button", ["interrupt", "skip"])
def test_an_interrupt_during_sampling_does_not_cancel_the_decode_of_the_picture_so_far(
    host: Host, model: LdmModel, chaos: Chaos, button: str, batch: int
) -> None:
    turn_on(host, chaos.url)
    getattr(host.state, button)()
    host.txt2img(batch)
    # An answer that takes its time is waited for as well.
    chaos.reset("hang")
    host.set_options(first_byte_timeout=0.3)
    host.txt2img(batch)
    assert [record.fallback_reason for record in records()] == ["", *["no answer in 0.3 s"] * batch]
    assert chaos.requests == ["/decode"]


# --- hooked once -------------------------------------------------------------------------------------------------------


def install_again(host: Host, model: LdmModel) -> None:
    adapter.install()


def announce_again(host: Host, model: LdmModel) -> None:
    host.script_callbacks.model_loaded_callback(model)


def switch_vae(host: Host, model: LdmModel) -> None:
    host.sd_vae.reload_vae_weights(model, copy.deepcopy(model.first_stage_model.state_dict()))


def reload_ui_twice(host: Host, model: LdmModel) -> None:
    host.reload_ui()
    host.reload_ui()


def uninstall_and_install(host: Host, model: LdmModel) -> None:
    adapter.uninstall()
    adapter.uninstall()
    adapter.install()


@pytest.mark.parametrize("event", [install_again, announce_again, switch_vae, reload_ui_twice, uninstall_and_install])
def test_whatever_happens_a_model_is_hooked_once(
    host: Host, model: LdmModel, chaos: Chaos, event: Callable[[Host, LdmModel], None]
) -> None:
    event(host, model)
    for function in (
        model.decode_first_stage,
        model.encode_first_stage,
        host.processing.decode_latent_batch,
        host.sd_samplers_common.single_sample_to_image,
    ):
        assert hooks_in(function) == 1
    turn_on(host, chaos.url)
    host.txt2img(batch=2)
    assert chaos.requests == ["/decode"]
    assert routes() == ["decode remote"]


def test_every_model_in_memory_is_hooked_whichever_is_in_use(host: Host, model: LdmModel, chaos: Chaos) -> None:
    other = host.load(SgmModel(copy.deepcopy(model.first_stage_model.inner)))
    adapter.uninstall()
    adapter.install()
    turn_on(host, chaos.url)
    host.txt2img()
    host.swap_to(model)
    host.txt2img()
    assert routes() == ["decode remote", "decode remote"]
    assert [hooks_in(one.decode_first_stage) for one in (model, other)] == [1, 1]
    adapter.uninstall()
    assert [hooks_in(one.decode_first_stage) for one in (model, other)] == [0, 0]


def test_after_a_vae_switch_the_fallback_uses_the_new_weights(host: Host, model: LdmModel, chaos: Chaos) -> None:
    before = host.txt2img()
    weights = {name: value * 0.9 for name, value in model.first_stage_model.state_dict().items()}
    host.sd_vae.reload_vae_weights(model, weights)
    local = host.txt2img()
    chaos.reset("503")
    turn_on(host, chaos.url)
    assert same(host.txt2img(), local)
    assert not same(local, before)


def test_installing_does_not_load_a_model(host: Host) -> None:
    adapter.uninstall()
    adapter.install()
    assert host.loads == 0


def test_a_model_of_an_unknown_kind_is_left_alone_with_a_warning(
    host: Host, vae: AutoencoderKL, chaos: Chaos, caplog: pytest.LogCaptureFixture
) -> None:
    model = host.load(standin.UnknownModel(vae))
    assert "UnknownModel" in caplog.text
    assert not {"decode_first_stage", "encode_first_stage"} & set(vars(model))
    turn_on(host, chaos.url)
    assert len(host.txt2img(batch=2)) == 2
    assert chaos.requests == []


# --- taken out, and beside other extensions ----------------------------------------------------------------------------


def test_after_uninstalling_nothing_of_ours_is_left(host: Host, model: LdmModel) -> None:
    processing, common = host.processing, host.sd_samplers_common
    adapter.uninstall()
    assert set(vars(model)) == set(vars(LdmModel(model.first_stage_model.inner)))
    assert processing.decode_latent_batch == MethodType(standin.Processing.decode_latent_batch, processing)
    assert common.single_sample_to_image == MethodType(standin.SdSamplersCommon.single_sample_to_image, common)


def test_a_hook_that_was_there_before_ours_comes_back(host: Host, vae: AutoencoderKL) -> None:
    model = LdmModel(vae)
    earlier = vars(model)["decode_first_stage"] = lambda z: LdmModel.decode_first_stage(model, z)
    host.load(model)
    assert model.decode_first_stage is not earlier
    adapter.uninstall()
    assert model.decode_first_stage is earlier


def test_another_extensions_hook_over_ours_survives_and_ours_then_passes_on(host: Host, model: LdmModel, chaos: Chaos) -> None:
    local = host.txt2img()
    ours = model.decode_first_stage
    theirs = model.decode_first_stage = lambda z: ours(z)
    turn_on(host, chaos.url)
    adapter.uninstall()
    assert model.decode_first_stage is theirs
    assert same(host.txt2img(), local)
    assert chaos.requests == []
    assert records() == []


@pytest.mark.parametrize("mode", ["pass", "503"])
def test_another_extensions_hook_between_two_of_ours_causes_no_second_request(
    host: Host, model: LdmModel, chaos: Chaos, mode: str
) -> None:
    local = host.txt2img()
    ours = model.decode_first_stage
    model.decode_first_stage = lambda z: ours(z)
    host.reload_ui()
    assert hasattr(model.decode_first_stage, "remote_vae_adapter")
    chaos.reset(mode)
    turn_on(host, chaos.url)
    assert same(host.txt2img(), local)
    assert chaos.requests == ["/decode"]
    assert len(records()) == 1


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_that_does_not_fit_is_done_by_a_copy_on_the_cpu(host: Host, vae: AutoencoderKL, kind: type) -> None:
    model = host.load(kind(vae))
    local = host.txt2img()
    host.devices.dtype_vae = torch.bfloat16
    model.first_stage_model.to(torch.bfloat16)
    weights = copy.deepcopy(model.first_stage_model.state_dict())
    host.set_options(enabled=True)
    with standin.no_memory(model.first_stage_model):
        pictures = host.txt2img()
    # Latents and weights went through bfloat16, and the picture comes back in it.
    assert levels_apart(pictures, local) < 30
    assert [(record.route, record.detail) for record in records()] == [("local", "on the CPU")]
    assert records()[0].fallback_reason == "no endpoint is set, then out of memory"
    after = model.first_stage_model.state_dict()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("endpoint", ["", "503"])
def test_the_copy_on_the_cpu_gives_the_picture_of_the_hosts_vae(
    host: Host, model: LdmModel, chaos: Chaos, endpoint: str
) -> None:
    local = host.txt2img(batch=2)
    chaos.reset("503")
    turn_on(host, chaos.url if endpoint else "")
    with standin.no_memory(model.first_stage_model):
        assert levels_apart(host.txt2img(batch=2), local) <= 1
    assert [record.detail for record in records()] == ["on the CPU"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_encode_that_does_not_fit_draws_the_noise_of_the_seed(
    host: Host, vae: AutoencoderKL, image: torch.Tensor, kind: type
) -> None:
    model = host.load(kind(vae))

    def latents() -> torch.Tensor:
        return model.get_first_stage_encoding(model.encode_first_stage(image * 2 - 1))

    local = seeded(latents)
    state = torch.get_rng_state()
    host.set_options(enabled=True)
    with standin.no_memory(model.first_stage_model):
        torch.testing.assert_close(seeded(latents), local, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert routes() == ["encode local"]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_that_nothing_can_decode_are_saved_raw_in_the_hosts_data_folder(
    monkeypatch: pytest.MonkeyPatch, host: Host, vae: AutoencoderKL, chaos: Chaos, kind: type
) -> None:
    model = host.load(kind(vae))

    def run_out(self: Any, z: torch.Tensor) -> torch.Tensor:
        raise standin.out_of_memory()

    given: list[torch.Tensor] = []
    monkeypatch.setattr(type(model.first_stage_model), "decode", lambda self, z: given.append(z) or run_out(self, z))
    chaos.reset("503")
    turn_on(host, chaos.url)
    with pytest.raises(VaeCallFailed, match="They are saved in") as failure:
        host.txt2img()
    path = Path(failure.value.rescued or "")
    assert str(path) in str(failure.value)
    assert path.parent == Path(host.paths.data_path) / "remote-vae-rescue"
    rescued = load_latents(path)
    assert torch.equal(rescued.latents, given[0])
    assert rescued.family.key == {LdmModel: "sd1", SgmModel: "sdxl", Sd3Model: "custom"}[kind]
    assert [record.route for record in records()] == ["failed"]


def test_an_error_of_the_hosts_vae_that_is_not_about_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, host: Host, model: LdmModel
) -> None:
    def broken(self: Any, z: torch.Tensor) -> torch.Tensor:
        raise ValueError("the weights are of the wrong size")

    monkeypatch.setattr(standin.LdmVae, "decode", broken)
    host.set_options(enabled=True)
    with pytest.raises(VaeCallFailed, match="wrong size"):
        host.txt2img()


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_another_extensions_hook_between_two_of_ours_around_a_batch_makes_one_request(
    host: Host, model: Any, chaos: Chaos
) -> None:
    ours = host.processing.decode_latent_batch
    host.processing.decode_latent_batch = lambda *args, **kwargs: ours(*args, **kwargs)
    host.reload_ui()
    turn_on(host, chaos.url)
    host.txt2img(batch=2)
    assert chaos.requests == ["/decode"]


@pytest.mark.parametrize("value", ["false", "banana", None, "off", "0"])
def test_text_in_the_switch_does_not_switch_on(host: Host, model: Any, chaos: Chaos, value: object) -> None:
    turn_on(host, chaos.url, enabled=value)
    host.txt2img()
    assert chaos.requests == []
    assert records() == []


def test_when_nothing_can_decode_every_picture_of_the_batch_is_rescued(
    host: Host, model: Any, chaos: Chaos, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(self: object, z: object) -> None:
        raise standin.out_of_memory()

    monkeypatch.setattr(standin.LdmVae, "decode", run_out)
    chaos.reset("503")
    turn_on(host, chaos.url)
    with pytest.raises(VaeCallFailed):
        host.txt2img(batch=3)
    files = list((Path(host.paths.data_path) / "remote-vae-rescue").iterdir())
    assert sum(load_latents(file).latents.shape[0] for file in files) == 3


def test_a_batch_that_the_ui_will_only_approximate_is_not_sent(host: Host, model: Any, chaos: Chaos) -> None:
    host.opts.data.update(live_preview_fast_interrupt=True, show_progress_type="Approx NN")
    turn_on(host, chaos.url)
    host.state.interrupt()
    host.txt2img(batch=2)
    assert chaos.requests == []
    assert records() == []


def test_the_uis_own_retry_after_nan_does_not_ask_the_endpoint_again(host: Host, model: Any, chaos: Chaos) -> None:
    decode = standin.FirstStage.decode
    vae = model.first_stage_model
    vars(vae)["decode"] = lambda z: decode(vae, z) if vae.dtype == torch.float32 else decode(vae, z) * torch.nan
    host.devices.dtype_vae = torch.bfloat16
    vae.to(torch.bfloat16)
    chaos.reset("503")
    turn_on(host, chaos.url)
    host.txt2img(batch=2)
    assert chaos.requests == ["/decode"]


def test_an_sdxl_sample_of_a_half_precision_vae_has_the_dtype_of_a_local_one(
    host: Host, vae: AutoencoderKL, chaos: Chaos, image: torch.Tensor
) -> None:
    model = host.load(SgmModel(vae))
    host.devices.dtype_vae = torch.bfloat16
    model.first_stage_model.to(torch.bfloat16)
    pixels = (image * 2 - 1).bfloat16()
    local = seeded(lambda: model.encode_first_stage(pixels))
    turn_on(host, chaos.url)
    remote = seeded(lambda: model.encode_first_stage(pixels))
    assert remote.dtype == local.dtype == torch.float32


def test_a_second_press_of_interrupt_ends_the_wait_as_well(host: Host, model: Any, chaos: Chaos) -> None:
    """The first press ended the sampling: the flag is up, and the picture so far is to be decoded."""
    chaos.reset("hang")
    turn_on(host, chaos.url, first_byte_timeout=60.0)
    host.state.interrupt()
    thread = threading.Thread(target=host.txt2img)
    thread.start()
    wait_for(lambda: bool(chaos.requests))
    host.state.interrupt()
    thread.join(20)
    assert not thread.is_alive()
    assert [record.fallback_reason for record in records()] == ["interrupted"]
