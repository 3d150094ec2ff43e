"""A1111 with VAEs laid out as ldm's, so that the exact tiled VAE can take them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from remote_vae.hosts.a1111 import adapter
from remote_vae.local import route
from tests.hosts import a1111_standin as standin
from tests.hosts.a1111_standin import FirstStage, Host, LdmModel, Sd3Model, SgmModel, sampled
from tests.layouts import ldm_vae
from tests.nearness import no_room_for_the_whole, psnr

KINDS = [LdmModel, SgmModel, Sd3Model]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, host: Host) -> Any:
    """A model of each kind, loaded, whose VAE has the modules of ldm's."""
    vae = ldm_vae()
    model = request.param(vae)
    model.first_stage_model = laid_out(type(model.first_stage_model), vae)
    host.load(model)
    host.set_options(enabled=True)
    return model


def laid_out(kind: type[FirstStage], vae: Any) -> nn.Module:
    """``vae`` with the encode and the decode of the host's ``kind``."""

    class LaidOut(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.encoder, self.decoder = vae.encoder, vae.decoder
            self.quant_conv, self.post_quant_conv = vae.quant_conv, vae.post_quant_conv

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.post_quant_conv(z))

        def encode(self, x: torch.Tensor) -> Any:
            return self.drawn(self.quant_conv(self.encoder(x)))

    return LaidOut()


def in_memory(work: Callable[[], Any]) -> Any:
    """``work`` by the host alone."""
    adapter.uninstall()
    try:
        torch.manual_seed(5)
        return work()
    finally:
        adapter.install()
        adapter.router.history.clear()


def details() -> list[tuple[str, str, str]]:
    return [(record.op, record.route, record.detail) for record in adapter.router.history.records()]


def test_a_decode_that_does_not_fit_is_the_hosts_picture_in_tiles(
    host: Host, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = sampled(2, 1)
    whole = in_memory(lambda: model.decode_first_stage(latents))
    seen = no_room_for_the_whole(monkeypatch, model.first_stage_model)
    exact = model.decode_first_stage(latents)
    assert exact.dtype == whole.dtype
    assert psnr(exact, whole) >= 100
    assert seen == ["decoder"]
    assert details() == [("decode", "tiled", "exact")]


def test_an_encode_that_does_not_fit_is_the_hosts_own_result_with_the_noise_of_the_seed(
    host: Host, model: Any, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded() -> Any:
        return model.encode_first_stage(image * 2 - 1)

    whole = in_memory(encoded)
    latents = in_memory(lambda: model.get_first_stage_encoding(encoded()))
    state = torch.get_rng_state()
    seen = no_room_for_the_whole(monkeypatch, model.first_stage_model)
    torch.manual_seed(5)
    exact = encoded()
    assert type(exact) is type(whole)
    torch.manual_seed(5)
    assert psnr(model.get_first_stage_encoding(encoded()), latents) >= 100
    # As many numbers were drawn as the host itself draws.
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(whole, standin.DiagonalGaussianDistribution):
        assert psnr(exact.parameters, whole.parameters) >= 100
    else:
        assert psnr(exact, whole) >= 100
    assert seen == ["encoder"] * 2
    assert details() == [("encode", "tiled", "exact")] * 2


def test_a_half_precision_vae_in_tiles_gives_the_dtype_of_the_hosts_own(
    host: Host, model: Any, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.first_stage_model.to(torch.bfloat16)
    latents, pixels = sampled(1, 1).bfloat16(), (image * 2 - 1).bfloat16()
    calls = [
        lambda: model.decode_first_stage(latents),
        lambda: model.get_first_stage_encoding(model.encode_first_stage(pixels)),
    ]
    whole = [in_memory(call) for call in calls]
    no_room_for_the_whole(monkeypatch, model.first_stage_model)
    torch.manual_seed(5)
    exact = [calls[0]()]
    torch.manual_seed(5)
    exact.append(calls[1]())
    assert [result.dtype for result in exact] == [result.dtype for result in whole]
    # Both err by bfloat16's steps, and not alike.
    assert min(psnr(ours, theirs) for ours, theirs in zip(exact, whole, strict=True)) >= 30


def test_a_picture_for_which_memory_is_too_short_is_made_by_the_copy_on_the_cpu(
    host: Host, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = sampled(1, 1)
    whole = in_memory(lambda: model.decode_first_stage(latents))
    no_room_for_the_whole(monkeypatch, model.first_stage_model)
    monkeypatch.setattr(route, "available_memory", lambda device: 1000)
    assert torch.allclose(model.decode_first_stage(latents), whole, atol=1e-5)
    assert details() == [("decode", "local", "on the CPU")]


def test_with_bfloat16_on_a_fast_cpu_the_host_gets_its_picture_in_its_own_dtype(
    host: Host, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = sampled(1, 1)
    whole = in_memory(lambda: model.decode_first_stage(latents))
    monkeypatch.setattr(route, "is_fast_at_bfloat16", lambda: True)
    host.set_options(cpu_bfloat16=True)
    fast = model.decode_first_stage(latents)
    assert fast.dtype == torch.float32
    assert 30 < psnr(fast, whole) < 90
    assert details() == [("decode", "tiled", "exact, bfloat16")]
