"""attach() on the VAE of every family, of pictures and of videos, each with the real server of the same VAE."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module

import remote_vae
from remote_vae.errors import UnsupportedLayout
from remote_vae.vae.at_work import has_posterior
from tests.chaos import Chaos
from tests.hosts.of_families import arguments, latents_in, latents_of, pixels_of, the_vae
from tests.nearness import no_room_for_the_whole, out_of_memory, psnr
from tests.vaes import SMALL, SMALL_HERE
from tests.versions import before_diffusers, of_diffusers


@pytest.fixture(autouse=True)
def detached() -> Iterator[None]:
    yield
    for name in SMALL_HERE:
        for op in ("decode", "encode"):
            vars(the_vae(name)).pop(op, None)


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_every_vae_gives_remotely_what_it_gives_alone_bit_for_bit_in_its_own_output(family: str, served: Chaos) -> None:
    vae = the_vae(family)
    latents, pixels, given = latents_of(vae), pixels_of(vae), arguments(vae)

    def everything() -> list[Any]:
        decoded = [vae.decode(latents, **given), vae.decode(latents, return_dict=False, **given)]
        return [*decoded, vae.encode(pixels), vae.encode(pixels, return_dict=False)]

    alone = everything()
    remote_vae.attach(vae, {"endpoint": served.url, "transfer": "raw"})
    for ours, own in zip(everything(), alone, strict=True):
        assert (type(ours), len(ours), type(ours[0])) == (type(own), len(own), type(own[0]))
        assert torch.equal(latents_in(ours), latents_in(own))
    assert served.requests == ["/decode"] * 2 + ["/encode"] * 2


@pytest.mark.parametrize("family", ["flux2", "qwen-image", "qwen-image-2.1", "svd", "cogvideox", "sana"])
@torch.no_grad()
def test_in_eight_bits_every_vae_is_at_most_a_level_off(family: str, served: Chaos) -> None:
    vae = the_vae(family)
    latents, given = latents_of(vae), arguments(vae)
    alone = vae.decode(latents, **given).sample.clamp(-1, 1)
    remote_vae.attach(vae, {"endpoint": served.url})
    remote = vae.decode(latents, **given).sample
    assert remote.shape == alone.shape
    assert (remote - alone).abs().max() <= 2.01 / 255
    assert served.requests == ["/decode"]


@pytest.mark.parametrize("family", ["qwen-image", "svd", "sana", "cosmos", "ltx2"])
@torch.no_grad()
def test_whatever_the_network_does_it_is_what_the_vae_gives_alone(family: str, served: Chaos) -> None:
    vae = the_vae(family)
    latents, pixels, given = latents_of(vae), pixels_of(vae), arguments(vae)
    alone = vae.decode(latents, **given).sample, latents_in(vae.encode(pixels))
    served.reset("cut")
    handle = remote_vae.attach(vae, {"endpoint": served.url, "cooldown": 0.0})
    assert torch.equal(vae.decode(latents, **given).sample, alone[0])
    assert torch.equal(latents_in(vae.encode(pixels)), alone[1])
    assert [record.route for record in handle.history.records()] == ["local", "local"]
    assert all(record.fallback_reason for record in handle.history.records())


@pytest.mark.parametrize("family", ["qwen-image"])
@torch.no_grad()
def test_several_videos_of_one_batch_come_back_as_they_went(family: str, served: Chaos) -> None:
    vae = the_vae(family)
    latents = latents_of(vae, batch=2)
    alone = vae.decode(latents).sample
    for transfer in ("raw", "u8"):
        handle = remote_vae.attach(vae, {"endpoint": served.url, "transfer": transfer})
        assert (vae.decode(latents).sample - alone.clamp(-1, 1)).abs().max() <= 2.01 / 255
        assert handle.history.last.route == "remote"


@pytest.mark.parametrize("family", ["sd1"])
@pytest.mark.parametrize(("transfer", "worst"), [("raw", 1e-5), ("u8", 2.01 / 255)])
@torch.no_grad()
def test_more_pictures_than_a_request_may_have_go_in_parts(family: str, served: Chaos, transfer: str, worst: float) -> None:
    """AnimateDiff decodes all frames of a video as one batch."""
    vae = the_vae(family)
    latents = latents_of(vae, batch=40)
    alone = vae.decode(latents).sample.clamp(-1, 1)
    handle = remote_vae.attach(vae, {"endpoint": served.url, "transfer": transfer})
    assert (vae.decode(latents).sample.clamp(-1, 1) - alone).abs().max() <= worst
    assert [query.count("shape=20") for query in served.queries] == [1, 1]
    assert [(record.route, record.images) for record in handle.history.records()] == [("remote", 40)]
    # A part that fails is asked for once more, and the others are kept.
    served.reset("503", fail_at=0)
    assert (vae.decode(latents).sample.clamp(-1, 1) - alone).abs().max() <= worst
    assert len(served.requests) == 3
    served.reset("503")
    assert torch.equal(vae.decode(latents).sample.clamp(-1, 1), alone)


@pytest.mark.parametrize("family", ["svd"])
@pytest.mark.parametrize("frames", [1, 2, 4])
@torch.no_grad()
def test_a_temporal_decoders_frames_go_as_videos_of_so_many(family: str, served: Chaos, frames: int) -> None:
    vae = the_vae(family)
    latents = torch.randn(4, 4, 2, 3)
    alone = vae.decode(latents, frames).sample
    handle = remote_vae.attach(vae, {"endpoint": served.url, "transfer": "raw"})
    assert torch.equal(vae.decode(latents, frames).sample, alone)
    assert torch.equal(vae.decode(latents, num_frames=frames, return_dict=False)[0], alone)
    assert [(record.route, record.images) for record in handle.history.records()] == [("remote", 4)] * 2


@pytest.mark.parametrize("family", ["svd"])
@torch.no_grad()
def test_a_number_of_frames_that_does_not_divide_the_batch_is_the_vaes_own_error(family: str, served: Chaos) -> None:
    vae = the_vae(family)
    handle = remote_vae.attach(vae, {"endpoint": served.url})
    for frames in (3, 0, None, "2"):
        with pytest.raises((RuntimeError, TypeError, ZeroDivisionError)):
            vae.decode(torch.randn(4, 4, 2, 3), frames)
    with pytest.raises(TypeError, match="num_frames"):
        vae.decode(torch.randn(4, 4, 2, 3))
    assert not served.requests
    assert not handle.history.records()


@pytest.mark.parametrize("family", ["ltx2"])
@pytest.mark.parametrize("given", [{"temb": torch.tensor([0.05])}, {"causal": True}, {"causal": False}])
@torch.no_grad()
def test_a_timestep_and_a_causality_that_are_given_are_the_vaes_own_business(
    family: str, served: Chaos, given: dict[str, Any]
) -> None:
    vae = the_vae(family)
    latents = latents_of(vae)
    alone = vae.decode(latents, **given).sample
    handle = remote_vae.attach(vae, {"endpoint": served.url})
    assert torch.equal(vae.decode(latents, **given).sample, alone)
    assert not served.requests
    assert not handle.history.records()


@pytest.mark.parametrize("family", ["ltx", "ltx2"])
@torch.no_grad()
def test_a_timestep_of_none_is_a_call_as_any_other(family: str, served: Chaos) -> None:
    """So LTX's pipelines call a VAE that is not conditioned by one."""
    vae = the_vae(family)
    latents = latents_of(vae)
    alone = vae.decode(latents, None, return_dict=False)[0]
    remote_vae.attach(vae, {"endpoint": served.url, "transfer": "raw"})
    assert torch.equal(vae.decode(latents, None, return_dict=False)[0], alone)
    assert served.requests == ["/decode"]


@pytest.mark.parametrize("family", ["qwen-image", "cogvideox"])
def test_gradients_flow_through_a_video_vae_itself(family: str, served: Chaos) -> None:
    vae = the_vae(family)
    remote_vae.attach(vae, {"endpoint": served.url})
    latents = latents_of(vae).requires_grad_()
    vae.decode(latents).sample.mean().backward()
    assert latents.grad is not None
    assert not served.requests


@pytest.mark.parametrize("family", ["wan", "svd"])
@torch.no_grad()
def test_a_deep_copy_of_a_video_vae_has_its_own_weights_and_is_not_attached(family: str, served: Chaos) -> None:
    vae = the_vae(family)
    remote_vae.attach(vae, {"endpoint": served.url})
    copied = copy.deepcopy(vae)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied.decode(latents_of(vae), **arguments(vae)).sample.any()
    assert not served.requests


@pytest.mark.parametrize("family", ["wan"])
@torch.no_grad()
def test_a_compiled_video_vae_is_attached_to(family: str, served: Chaos) -> None:
    vae = the_vae(family)
    latents = latents_of(vae)
    alone = vae.decode(latents).sample
    compiled = torch.compile(vae, backend="eager")
    handle = remote_vae.attach(compiled, {"endpoint": served.url, "transfer": "raw"})
    assert torch.equal(compiled.decode(latents).sample, alone)
    handle.detach()
    # And one whose decode alone is.
    vae.decode = torch.compile(vae.decode, backend="eager")
    remote_vae.attach(vae, {"endpoint": served.url, "transfer": "raw"})
    assert torch.equal(vae.decode(latents).sample, alone)
    assert served.requests == ["/decode"] * 2


@pytest.mark.parametrize("family", ["hunyuan-video"])
@torch.no_grad()
def test_with_the_vaes_own_tiling_on_remote_gives_the_untiled_picture_and_local_what_the_vae_does(
    family: str, served: Chaos
) -> None:
    vae = copy.deepcopy(the_vae(family))
    latents = torch.randn(1, 16, 1, 6, 6)
    untiled = vae.decode(latents).sample
    vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24,
                      tile_sample_stride_width=24)  # fmt: skip
    vae.enable_slicing()
    tiled = vae.decode(latents).sample
    assert not torch.equal(tiled, untiled)
    remote_vae.attach(vae, {"endpoint": served.url, "transfer": "raw"})
    assert torch.equal(vae.decode(latents).sample, untiled)
    served.reset("503")
    assert torch.equal(vae.decode(latents).sample, tiled)
    assert vae.use_tiling


@pytest.mark.parametrize("family", ["qwen-image"])
@torch.no_grad()
def test_a_remote_call_leaves_an_offloaded_video_vae_where_it_is(family: str, served: Chaos) -> None:
    vae = copy.deepcopy(the_vae(family))
    alone = vae.decode(latents_of(vae)).sample
    moved = []

    class Noted(CpuOffload):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            moved.append(module)
            return super().pre_forward(module, *args, **kwargs)

    add_hook_to_module(vae, Noted("cpu"))
    remote_vae.attach(vae, {"endpoint": served.url, "transfer": "raw"})
    assert torch.equal(vae.decode(latents_of(vae)).sample, alone)
    assert not moved
    served.reset("503")
    assert torch.equal(vae.decode(latents_of(vae)).sample, alone)
    assert moved


@pytest.mark.parametrize("family", ["qwen-image"])
@torch.no_grad()
def test_layerwise_casting_and_group_offloading_of_a_video_vae_do_not_show(family: str, served: Chaos) -> None:
    vae = copy.deepcopy(the_vae(family))
    vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    latents = latents_of(vae)
    alone = vae.decode(latents).sample
    remote_vae.attach(vae, {"endpoint": served.url, "transfer": "raw"})
    assert torch.equal(vae.decode(latents).sample, alone)
    served.reset("503")
    assert torch.equal(vae.decode(latents).sample, alone)
    cast = copy.deepcopy(the_vae(family))
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    alone = cast.decode(latents).sample
    remote_vae.attach(cast, {"endpoint": served.url, "transfer": "raw", "cooldown": 0.0})
    # Its weights are others by now than the server's.
    assert torch.equal(cast.decode(latents).sample, alone)


@pytest.mark.parametrize("family", ["qwen-image", "sana", "svd"])
@torch.no_grad()
def test_without_memory_a_picture_comes_out_all_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = copy.deepcopy(the_vae(family))
    latents, pixels, given = latents_of(vae, frames=1), pixels_of(vae, frames=1), arguments(vae, frames=1)
    alone = vae.decode(latents, **given).sample, latents_in(vae.encode(pixels))
    no_room_for_the_whole(monkeypatch, vae)
    remote_vae.attach(vae, {})
    # The smallest picture is one of the VAE's own tiles: what is left is exact.
    assert psnr(vae.decode(latents, **given).sample, alone[0]) >= 100
    assert psnr(latents_in(vae.encode(pixels)), alone[1]) >= 100


@pytest.mark.parametrize("family", ["hunyuan-image-refiner"])
@torch.no_grad()
def test_a_picture_of_another_size_that_the_vaes_own_tiling_gives_is_not_taken(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' tiles of HunyuanImage's refiner give a corner of the picture."""
    vae = copy.deepcopy(the_vae(family))
    latents = torch.randn(1, 32, 1, 6, 6)
    alone = vae.decode(latents).sample
    vae.tile_sample_min_height = vae.tile_sample_min_width = 64
    own = vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda z, *more: own(z, *more) if z.shape[-1] <= 4 else out_of_memory())
    handle = remote_vae.attach(vae, {})
    assert psnr(vae.decode(latents).sample, alone) >= 100
    assert handle.history.last.detail == "on the CPU"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("AutoencoderKLMagvit", {}),
        ("VQModel", {}),
        ("AutoencoderOobleck", {"encoder_hidden_size": 8, "decoder_channels": 8, "downsampling_ratios": [2]}),
    ],
)
def test_a_vae_that_is_not_known_is_refused_with_the_reason_or_the_list_of_what_is_known(
    kind: str, config: dict[str, Any]
) -> None:
    vae = of_diffusers(kind)(**config)
    with pytest.raises(UnsupportedLayout, match=f"{kind}.*(cannot be done remotely: it|AutoencoderKLWan)"):
        remote_vae.attach(vae)
    assert "decode" not in vars(vae)


def test_what_an_encode_gives_is_known_of_every_class() -> None:
    for name in SMALL_HERE:
        if name == "mochi" and before_diffusers(0, 33, "an encoder of Mochi that works"):
            continue
        vae = the_vae(name)
        encoded = vae.encode(pixels_of(vae))[0]
        is_posterior = isinstance(encoded, diffusers.models.autoencoders.vae.DiagonalGaussianDistribution)
        assert has_posterior(vae) == is_posterior, name
