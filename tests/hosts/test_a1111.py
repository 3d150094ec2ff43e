"""What the adapter for A1111 has of its own: kinds of model, and batches that the UI decodes picture by picture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from remote_vae.errors import VaeCallFailed
from remote_vae.hosts import a1111
from remote_vae.local import route
from remote_vae.rescue import load_latents
from tests.hosts.a1111_standin import (
    A1111Host,
    FirstStage,
    LdmModel,
    NansException,
    Sd3Model,
    SgmModel,
    UnknownModel,
    nan_in_half,
    no_memory,
)
from tests.hosts.conftest import Endpoint, Made, make
from tests.hosts.standin import DiagonalGaussianDistribution, hooks_in, levels_apart, same, sampled, source
from tests.layouts import ldm_vae
from tests.nearness import no_room_for_the_whole, out_of_memory, psnr

KINDS = [LdmModel, SgmModel, Sd3Model]
every_kind = pytest.mark.parametrize("kind", KINDS)
PIXELS = source() * 2 - 1


@pytest.fixture(scope="module")
def name() -> str:
    return "a1111"


def seeded(work: Callable[[], Any], seed: int = 5) -> Any:
    """``work`` with the global generator in a known state."""
    torch.manual_seed(seed)
    return work()


def plain(endpoint: Endpoint) -> str:
    """An endpoint that has never heard of posteriors, nor says who it is, as Hugging Face's."""
    endpoint.drops, endpoint.info = ("posterior",), "404 html"
    return endpoint.url


# --- kinds of model ----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("transfer", ["raw", "u8", "png"])
def test_a_remote_picture_equals_the_local_one_to_the_last_level(
    host: A1111Host, vae: AutoencoderKL, endpoint: Endpoint, kind: type, transfer: str
) -> None:
    host.load(kind(vae))
    local, tensor = host.txt2img(), host.decode(sampled(1, 1))
    host.turn_on(endpoint.url, transfer=transfer)
    assert same(host.txt2img(), local)
    [record] = host.records()
    assert (record.route, record.detail, record.endpoint) == ("remote", transfer, f"{endpoint.url}/decode")
    assert (record.images, record.height, record.width, record.fallback_reason) == (1, 32, 48, "")
    if transfer == "raw":
        assert torch.equal(host.decode(sampled(1, 1)), tensor)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_remote_encode_is_what_the_models_own_is_with_the_noise_of_the_seed(
    host: A1111Host, vae: AutoencoderKL, endpoint: Endpoint, kind: type, dtype: torch.dtype
) -> None:
    model = host.load(kind(vae))
    model.first_stage_model.to(dtype)
    local = seeded(lambda: model.encode_first_stage(PIXELS.to(dtype)))
    state = torch.get_rng_state()
    host.turn_on(endpoint.url)
    remote = seeded(lambda: model.encode_first_stage(PIXELS.to(dtype)))
    assert type(remote) is type(local)
    assert torch.equal(torch.get_rng_state(), state)
    assert host.routes() == ["encode remote"]
    if kind is LdmModel:
        drawn = [seeded(each.sample) for each in (remote, local)]
        assert not torch.equal(drawn[0], remote.mode())
    else:
        drawn = [remote, local]
    assert drawn[0].dtype == drawn[1].dtype
    # The server's own VAE is float32.
    torch.testing.assert_close(*drawn, rtol=0, atol=0 if dtype == torch.float32 else 0.3)


SCALED: dict[type, Callable[[torch.Tensor], torch.Tensor]] = {
    SgmModel: lambda z: 0.13025 * z,
    Sd3Model: lambda z: (z - 0.0609) * 1.5305,
}


@every_kind
def test_an_encode_at_a_plain_endpoint_is_the_sample_that_it_gave(
    host: A1111Host, vae: AutoencoderKL, endpoint: Endpoint, kind: type
) -> None:
    """The server without a posterior asked for answers with the mode."""
    model = host.load(kind(vae))
    with torch.no_grad():
        mode = vae.encode(PIXELS).latent_dist.mode()
    host.turn_on(plain(endpoint))
    encoded = model.encode_first_stage(PIXELS)
    if kind is LdmModel:
        assert isinstance(encoded, DiagonalGaussianDistribution)
        assert all(torch.equal(each, mode) for each in (encoded.sample(), encoded.mode(), encoded.mean))
    else:
        torch.testing.assert_close(encoded, SCALED[kind](mode))
    assert host.routes() == ["encode remote"]


def test_the_methods_of_a_model_can_be_called_by_keyword_and_other_arguments_are_its_own(
    host: A1111Host, endpoint: Endpoint
) -> None:
    latents = sampled(1, 1)
    decoded, encoded = host.decode(latents), host.model.encode_first_stage(PIXELS).mode()
    for enabled in (True, False):
        host.turn_on(endpoint.url, enabled=enabled)
        torch.testing.assert_close(host.model.decode_first_stage(z=latents), decoded, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(host.model.encode_first_stage(x=PIXELS).mode(), encoded, rtol=1e-4, atol=1e-4)
    before = len(endpoint.requests)
    host.turn_on(endpoint.url)
    assert torch.equal(host.model.decode_first_stage(latents, predict_cids=True), torch.full_like(latents, 7.0))
    assert host.model.decode_first_stage(latents, False, True).shape == (1, 3, 32, 48)
    # What wants a gradient.
    assert host.model.decode_first_stage(latents.requires_grad_()).shape == (1, 3, 32, 48)
    assert len(endpoint.requests) == before


def test_a_model_of_an_unknown_kind_is_left_alone_with_a_warning(
    host: A1111Host, vae: AutoencoderKL, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    model = host.load(UnknownModel(vae))
    assert "UnknownModel" in caplog.text
    assert not {"decode_first_stage", "encode_first_stage"} & set(vars(model))
    host.turn_on(endpoint.url)
    assert len(host.txt2img(batch=2)) == 2
    assert endpoint.requests == []
    assert host.adapter.current() is None


def test_every_model_in_memory_is_hooked_whichever_is_in_use(bare: A1111Host) -> None:
    first = bare.model
    models = [first, bare.load(bare.made("sdxl"))]
    bare.load_extension()
    assert [hooks_in(model.decode_first_stage) for model in models] == [1, 1]
    bare.adapter.uninstall()
    assert [hooks_in(model.decode_first_stage) for model in models] == [0, 0]


def test_a_picture_that_is_saved_on_the_way_is_no_preview(host: A1111Host, endpoint: Endpoint) -> None:
    """An approximation is named for it: before the second pass of the hires fix."""
    local = host.sd_samplers_common.single_sample_to_image(sampled(1, 1)[0], 0)
    host.turn_on(endpoint.url)
    assert same([host.sd_samplers_common.single_sample_to_image(sampled(1, 1)[0], 0)], [local])
    assert endpoint.requests == ["/decode"]


# --- a batch -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_one_request_in_the_dtype_of_the_hosts_vae(host: A1111Host, endpoint: Endpoint) -> None:
    host.devices.dtype_vae = torch.bfloat16
    host.module.to(torch.bfloat16)
    host.turn_on(endpoint.url)
    decoded = host.processing.decode_latent_batch(host.model, sampled(2, 1))
    assert [picture.dtype for picture in decoded] == [torch.bfloat16, torch.bfloat16]
    assert host.routes() == ["decode remote"]
    assert host.calls == []


@pytest.mark.parametrize("mode", ["refused", "503", "hang"])
def test_a_batch_whose_endpoint_fails_is_made_here_after_asking_once(
    host: A1111Host, alone: dict[str, Made], endpoint: Endpoint, mode: str
) -> None:
    endpoint.reset(mode)
    host.turn_on("http://127.0.0.1:9" if mode == "refused" else endpoint.url, first_byte_timeout=0.3)
    assert same(make(host, "batch").pictures, alone["batch"].pictures)
    assert endpoint.requests == ([] if mode == "refused" else ["/decode"])
    assert [(record.route, record.images) for record in host.records()] == [("local", 1)] * 3
    reason = {"refused": "connection refused", "hang": "no answer in 0.3 s"}.get(mode, mode)
    assert {record.fallback_reason for record in host.records()} == {reason}


@pytest.mark.parametrize(
    "options",
    [{"sd_vae_decode_method": "TAESD"}, {"live_preview_fast_interrupt": True, "show_progress_type": "Approx NN"}],
)
def test_a_batch_that_the_ui_will_only_approximate_is_not_sent(
    host: A1111Host, endpoint: Endpoint, options: dict[str, Any]
) -> None:
    host.opts.data.update(options)
    host.turn_on(endpoint.url)
    host.while_sampling = host.state.interrupt
    host.txt2img(batch=2)
    assert endpoint.requests == host.records() == []


def test_nan_from_the_unet_is_the_hosts_own_error_and_never_sent(host: A1111Host, endpoint: Endpoint) -> None:
    host.turn_on(endpoint.url)
    with pytest.raises(NansException, match="unet"):
        host.processing.decode_latent_batch(host.model, sampled(2, 1) * torch.nan, check_for_nans=True)
    assert endpoint.requests == []


def test_the_uis_own_retry_after_nan_works_and_does_not_ask_the_endpoint_again(
    host: A1111Host, alone: dict[str, Made], endpoint: Endpoint
) -> None:
    vars(host.module)["decode"] = nan_in_half(host.module)
    host.devices.dtype_vae = torch.bfloat16
    host.module.to(torch.bfloat16)
    endpoint.reset("503")
    host.turn_on(endpoint.url)
    made = make(host, "batch")
    assert host.devices.dtype_vae == torch.float32
    # Latents and weights went through bfloat16.
    assert levels_apart(made.pictures, alone["batch"].pictures) < 30
    assert endpoint.requests == ["/decode"]


def test_another_extensions_hook_between_two_of_ours_around_a_batch_makes_one_request(
    host: A1111Host, endpoint: Endpoint
) -> None:
    own = vars(host.processing)
    ours = own["decode_latent_batch"]
    own["decode_latent_batch"] = lambda *args, **kwargs: ours(*args, **kwargs)
    host.reload_ui()
    host.turn_on(endpoint.url)
    host.txt2img(batch=2)
    assert endpoint.requests == ["/decode"]
    host.adapter.uninstall()
    own["decode_latent_batch"] = ours


# --- memory ------------------------------------------------------------------------------------------------------------


@every_kind
def test_a_decode_that_does_not_fit_is_done_by_a_copy_on_the_cpu(host: A1111Host, vae: AutoencoderKL, kind: type) -> None:
    host.load(kind(vae))
    local = host.txt2img()
    host.devices.dtype_vae = torch.bfloat16
    host.module.to(torch.bfloat16)
    weights = copy.deepcopy(host.module.state_dict())
    host.set_options(enabled=True)
    with no_memory(host.module):
        pictures = host.txt2img()
    # Latents and weights went through bfloat16, and the picture comes back in it.
    assert levels_apart(pictures, local) < 30
    [record] = host.records()
    assert (record.route, record.detail) == ("local", "on the CPU")
    assert "out of memory" in record.fallback_reason
    after = host.module.state_dict()
    assert all(after[key].dtype == torch.bfloat16 and torch.equal(after[key], weights[key]) for key in weights)


@every_kind
def test_latents_that_nothing_can_decode_are_saved_raw_and_whole_in_the_hosts_data_folder(
    host: A1111Host, vae: AutoencoderKL, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """The UI gives up the whole batch with the first picture that fails."""
    model = host.load(kind(vae))
    monkeypatch.setattr(type(model.first_stage_model), "decode", out_of_memory)
    endpoint.reset("503")
    host.turn_on(endpoint.url)
    with pytest.raises(VaeCallFailed) as failure:
        host.txt2img(batch=3)
    path = Path(failure.value.rescued or "")
    assert str(path) in str(failure.value)
    assert path.parent == Path(host.paths.data_path) / "remote-vae-rescue"
    rescued = load_latents(path)
    scaled = sampled(3, 1) / 1.5305 + 0.0609 if kind is Sd3Model else sampled(3, 1) / kind.scale_factor
    torch.testing.assert_close(rescued.latents, scaled)
    assert rescued.family.key == {LdmModel: "sd1", SgmModel: "sdxl", Sd3Model: "custom"}[kind]


# --- with VAEs laid out as ldm's, so that the exact tiled VAE can take them apart ---------------------------------------


@pytest.fixture(params=KINDS)
def laid_out(request: pytest.FixtureRequest, host: A1111Host) -> Any:
    """A model of each kind, loaded, whose VAE has the modules of ldm's."""
    vae = ldm_vae()
    model = request.param(vae)
    kind: type[FirstStage] = type(model.first_stage_model)

    class LaidOut(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.encoder, self.decoder = vae.encoder, vae.decoder
            self.quant_conv, self.post_quant_conv = vae.quant_conv, vae.post_quant_conv

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.post_quant_conv(z))

        def encode(self, x: torch.Tensor) -> Any:
            return self.drawn(self.quant_conv(self.encoder(x)))

    model.first_stage_model = LaidOut()
    return host.load(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_is_the_hosts_own_result_in_tiles(
    host: A1111Host, laid_out: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    laid_out.first_stage_model.to(dtype)
    calls = [
        lambda: laid_out.decode_first_stage(sampled(2, 1).to(dtype)),
        lambda: laid_out.encode_first_stage(PIXELS.to(dtype)),
        lambda: laid_out.get_first_stage_encoding(laid_out.encode_first_stage(PIXELS.to(dtype))),
    ]
    whole = [seeded(call) for call in calls]
    state = torch.get_rng_state()
    host.set_options(enabled=True)
    seen = no_room_for_the_whole(monkeypatch, laid_out.first_stage_model)
    exact = [seeded(call) for call in calls]
    # As many numbers were drawn as the host itself draws.
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(result) for result in exact] == [type(result) for result in whole]
    for ours, theirs in zip(exact[::2], whole[::2], strict=True):
        assert ours.dtype == theirs.dtype
        # In bfloat16 both err by its steps, and not alike.
        assert psnr(ours, theirs) >= (100 if dtype == torch.float32 else 30)
    assert seen == ["decoder", "encoder", "encoder"]
    assert host.details() == ["exact"] * 3


def test_with_bfloat16_on_a_fast_cpu_the_host_gets_its_picture_in_its_own_dtype(
    host: A1111Host, laid_out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = host.decode(sampled(1, 1))
    monkeypatch.setattr(route, "is_fast_at_bfloat16", lambda: True)
    host.set_options(enabled=True, cpu_bfloat16=True)
    fast = host.decode(sampled(1, 1))
    assert fast.dtype == torch.float32
    assert 30 < psnr(fast, whole) < 90
    assert host.details() == ["exact, bfloat16"]


# --- room on the card --------------------------------------------------------------------------------------------------------


class Moved(a1111.Room):
    """Says what it did, and moves nothing; ``is_made`` while there is room."""

    done: ClassVar[list[str]] = []
    is_made = False

    def make(self, wanted: int, least: int) -> int:
        Moved.done.append("away")
        Moved.is_made = True
        return 1 << 40

    def restore(self) -> None:
        Moved.done.append("back")
        Moved.is_made = False


def test_what_makes_room_for_a_batch_comes_back_after_its_last_picture(
    host: A1111Host, laid_out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = ("batch", "img2img")
    alone = {way: make(host, way) for way in ways}
    monkeypatch.setattr(a1111, "Room", Moved)
    monkeypatch.setattr(Moved, "done", [])
    monkeypatch.setattr(route, "available_memory", lambda device: (1 << 40) * Moved.is_made)
    host.turn_on("")
    assert same(make(host, "batch").pictures, alone["batch"].pictures)
    assert Moved.done == ["away", "back"]
    assert host.routes() == ["decode local"] * 3
    Moved.done.clear()
    assert same(make(host, "img2img").pictures, alone["img2img"].pictures)
    # Three sources are three calls, and the three decodes one batch.
    assert Moved.done == ["away", "back"] * 4
    host.set_options(make_room="off")
    Moved.done.clear()
    make(host, "txt2img")
    assert Moved.done == ["back"]


def test_other_models_leave_first_and_then_all_of_the_own_one_but_its_vae(host: A1111Host, vae: AutoencoderKL) -> None:
    other = host.load(SgmModel(vae))
    model = host.load(LdmModel(vae))
    model.model, model.cond_stage_model = nn.Linear(2, 2), nn.Linear(2, 2)
    leaving = list(a1111._room(model)._modules())
    assert leaving[0] is other
    assert set(leaving[1:]) >= {model.model, model.cond_stage_model}
    assert model.first_stage_model not in leaving
    assert model not in leaving
    # The UI itself has only one of its parts on the card at a time.
    other.lowvram = True
    assert other not in a1111._room(model)._modules()
    model.lowvram = True
    assert list(a1111._room(model)._modules()) == []
