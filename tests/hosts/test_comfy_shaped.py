"""The comfy-shaped VAE by itself: what crosses it in each host, and which calls are left alone. Against real servers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from remote_vae.errors import OutOfMemory, UnsupportedLayout
from remote_vae.hosts import comfy_shaped
from remote_vae.hosts.comfy_kinds import raw_module
from remote_vae.hosts.comfy_shaped import COMFYUI, ERSATZ, NEO, Known, Seam, vae_call
from remote_vae.router import Router
from remote_vae.settings import Settings
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import find_family
from remote_vae.vae.fingerprint import fingerprint
from tests.chaos import Chaos
from tests.hosts.of_families import proxies, the_vae
from tests.hosts.standin import DiagonalGaussianDistribution, make_module
from tests.nearness import out_of_memory

# --- VAEs as the hosts have them ---------------------------------------------------------------------------------------


class Flux2(nn.Module):
    """Norms and packs between its encoder and its decoder, as in ComfyUI and Forge Neo; ``spreads``: as in ersatzForge."""

    def __init__(self, vae: Any, spreads: bool) -> None:
        super().__init__()
        self.encoder, self.decoder, self.bn = vae.encoder, vae.decoder, vae.bn
        self.quant_conv, self.post_quant_conv = vae.quant_conv, vae.post_quant_conv
        self._spreads = spreads

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        packed = nn.functional.pixel_unshuffle(z, 2) if self._spreads else z
        deviation = torch.sqrt(self.bn.running_var + self.bn.eps).view(1, -1, 1, 1)
        normal = packed * deviation + self.bn.running_mean.view(1, -1, 1, 1)
        return self.decoder(self.post_quant_conv(nn.functional.pixel_shuffle(normal, 2)))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        mean = DiagonalGaussianDistribution(self.quant_conv(self.encoder(x))).mode()
        packed = nn.functional.pixel_unshuffle(mean, 2)
        normed = nn.functional.batch_norm(packed, self.bn.running_mean, self.bn.running_var, eps=self.bn.eps)
        return nn.functional.pixel_shuffle(normed, 2) if self._spreads else normed


class WanVAE(nn.Module):
    """Gives the mean alone; ``by_picture``: knows no frames, as in ersatzForge."""

    def __init__(self, vae: Any, by_picture: bool) -> None:
        super().__init__()
        self.inner = vae
        self._by_picture = by_picture

    @property
    def conv1(self) -> nn.Module:
        return self.inner.quant_conv

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.inner.encode(x.unsqueeze(2) if self._by_picture else x).latent_dist.mean
        return mean.squeeze(2) if self._by_picture else mean

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        pixels = self.inner.decode(z.unsqueeze(2) if self._by_picture else z).sample
        return pixels.squeeze(2) if self._by_picture else pixels


class Patcher:
    def __init__(self) -> None:
        self.patches: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {}


class VAE:
    """As ComfyUI and Forge Neo have it."""

    def __init__(self, module: nn.Module, latent_channels: int, downscale: Any) -> None:
        self.first_stage_model, self.latent_channels, self.downscale_ratio = module.eval(), latent_channels, downscale
        self.patcher = Patcher()
        self.device = self.output_device = torch.device("cpu")
        self.vae_dtype = torch.float32
        self.not_video = False
        # The shapes that memory was estimated for, and the tilings that were begun.
        self.estimated: list[tuple[int, ...]] = []
        self.tilings: list[str] = []

    def memory_used_decode(self, shape: Any, dtype: torch.dtype) -> int:
        self.estimated.append(tuple(shape))
        return dtype.itemsize

    memory_used_encode = memory_used_decode

    def decode(self, samples_in: torch.Tensor, vae_options: Any = {}) -> torch.Tensor:  # noqa: B006
        try:
            return self._decoded(samples_in, **vae_options)
        except torch.cuda.OutOfMemoryError:
            pass
        return self.decode_tiled_(samples_in)

    def encode(self, pixel_samples: torch.Tensor, not_video: Any = None) -> torch.Tensor:
        try:
            return self._encoded(pixel_samples, self.not_video if not_video is None else not_video)
        except torch.cuda.OutOfMemoryError:
            pass
        return self.encode_tiled(pixel_samples)

    def decode_tiled(self, samples: torch.Tensor, tile_x: int = 64, tile_y: int = 64) -> torch.Tensor:
        return self.decode_tiled_(samples)

    def decode_tiled_(self, samples: torch.Tensor) -> torch.Tensor:
        """Darker, so that it is told apart."""
        self.tilings.append("decode")
        return self._decoded(samples) * 0.5

    def encode_tiled(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        self.tilings.append("encode")
        return self._encoded(pixel_samples, self.not_video) * 0.5

    def _decoded(self, samples: torch.Tensor) -> torch.Tensor:
        return ((self.first_stage_model.decode(samples) + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1)

    def _encoded(self, pixel_samples: torch.Tensor, not_video: bool) -> torch.Tensor:
        pixels = pixel_samples.movedim(-1, 1)
        if isinstance(self.first_stage_model, WanVAE) and pixels.ndim == 4 and not self.first_stage_model._by_picture:
            pixels = pixels.unsqueeze(2) if not_video else pixels.movedim(1, 0).unsqueeze(0)
        return self.first_stage_model.encode(pixels * 2.0 - 1.0)


def flux2(*, spreads: bool = False) -> VAE:
    return VAE(Flux2(copy.deepcopy(the_vae("flux2")), spreads), 32 if spreads else 128, 8 if spreads else 16)


def wan(*, by_picture: bool = False) -> VAE:
    return VAE(WanVAE(copy.deepcopy(the_vae("wan")), by_picture), 16, (lambda frames: frames, 8, 8))


def kl() -> VAE:
    vae = copy.deepcopy(the_vae("sd1"))
    module = nn.Module()
    module.encoder, module.decoder = vae.encoder, vae.decoder
    module.quant_conv, module.post_quant_conv = vae.quant_conv, vae.post_quant_conv
    module.decode = lambda z: vae.decode(z).sample
    module.encode = lambda x: vae.encode(x).latent_dist.mean
    return VAE(module, 4, 8)


# --- calls of them -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy() -> Iterator[Callable[[str], Chaos]]:
    with proxies() as of:
        yield of


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the VAE is brought."""
    for name in (COMFYUI.memory, NEO.memory):
        package = name.partition(".")[0]
        monkeypatch.setitem(__import__("sys").modules, package, make_module(package, __path__=[]))
        module = make_module(name, load_models_gpu=lambda models, memory_required: None)
        monkeypatch.setitem(__import__("sys").modules, name, module)


def answered(seam: Seam, vae: VAE, method: str, settings: Settings, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, str]:
    """What the call gives through the router, and by whom."""
    call = vae_call(seam, method, getattr(VAE, method), vae, args, kwargs)
    assert call is not None
    router = Router()
    with torch.inference_mode():
        made: torch.Tensor = router.run(call, settings)
    [record] = router.history.records()
    return made, f"{record.route} {record.detail}".strip()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def levels(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(4)) / 255.0


ERSATZ_MEAN = replace(ERSATZ, distribution="")
# Host, VAE, who has it, method and what is given.
CALLS = {
    "flux2 decode": (COMFYUI, flux2, "flux2", "decode", normal(2, 128, 2, 3)),
    "flux2 encode": (COMFYUI, flux2, "flux2", "encode", levels(1, 32, 48, 3)),
    "flux2 spread decode": (ERSATZ_MEAN, lambda: flux2(spreads=True), "flux2", "decode", normal(2, 32, 4, 6)),
    "flux2 spread encode": (ERSATZ_MEAN, lambda: flux2(spreads=True), "flux2", "encode", levels(1, 32, 48, 3)),
    "wan decode of a picture": (COMFYUI, wan, "wan", "decode", normal(1, 16, 1, 4, 6)),
    "wan decode of frames": (COMFYUI, wan, "wan", "decode", normal(1, 16, 2, 4, 6)),
    "wan encode of a picture": (COMFYUI, wan, "wan", "encode", levels(1, 32, 48, 3)),
    "wan encode of frames": (COMFYUI, wan, "wan", "encode", levels(5, 32, 48, 3)),
    "wan encode of a video": (COMFYUI, wan, "wan", "encode", levels(1, 5, 32, 48, 3)),
    "wan by picture decode": (ERSATZ, lambda: wan(by_picture=True), "wan", "decode", normal(1, 16, 4, 6)),
    "wan by picture encode": (ERSATZ, lambda: wan(by_picture=True), "wan", "encode", levels(1, 32, 48, 3)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["raw", "u8", "503"])
def test_what_crosses_is_what_the_hosts_own_call_gives(proxy: Callable[[str], Chaos], name: str, mode: str) -> None:
    seam, make, served, method, given = CALLS[name]
    vae = make()
    chaos = proxy(served)
    chaos.reset("503" if mode == "503" else "pass")
    with torch.inference_mode():
        own = getattr(vae, method)(given)
    settings = Settings(enabled=True, endpoint=chaos.url, transfer=mode if mode != "503" else "raw")
    made, by = answered(seam, vae, method, settings, given)
    assert by == ("local" if mode == "503" else f"remote {mode}")
    assert (made.shape, made.dtype) == (own.shape, own.dtype)
    if mode == "503":
        assert torch.equal(made, own)
    elif method == "decode":
        cut = [(255.0 * each).to(torch.uint8).int() for each in (made, own)]
        assert (cut[0] - cut[1]).abs().max() <= 1
    else:
        torch.testing.assert_close(made, own, rtol=1e-3, atol=2e-3 if mode == "u8" else 1e-4)


def test_pictures_that_are_no_frames_stay_a_batch() -> None:
    vae, given = wan(), levels(2, 32, 48, 3)
    for how, expected in (({}, (1, 3, 2, 32, 48)), ({"not_video": True}, (2, 3, 1, 32, 48))):
        call = vae_call(COMFYUI, "encode", VAE.encode, vae, (given,), how)
        assert call is not None
        assert tuple(call.tensor.shape) == expected
    vae.not_video = True
    call = vae_call(COMFYUI, "encode", VAE.encode, vae, (given,), {"not_video": None})
    assert call is not None
    assert tuple(call.tensor.shape) == (2, 3, 1, 32, 48)


def test_memory_is_made_for_what_crosses_and_not_for_what_is_raw() -> None:
    vae = flux2()
    at_work = comfy_shaped.at_work(COMFYUI, vae)
    at_work.bring(normal(1, 32, 4, 6))
    at_work.bring(normal(1, 3, 32, 48))
    assert vae.estimated == [(1, 128, 2, 3), (1, 3, 32, 48)]


def test_the_layers_of_a_module_that_norms_and_packs_are_shared_raw_with_the_fingerprint_of_the_module() -> None:
    vae, reference = flux2(), the_vae("flux2")
    at_work = comfy_shaped.at_work(COMFYUI, vae)
    assert at_work.module is comfy_shaped.at_work(COMFYUI, vae).module
    assert fingerprint(at_work.module.state_dict()) == fingerprint(vae.first_stage_model.state_dict())
    latents, pixels = normal(1, 32, 4, 6), normal(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(at_work.whole(at_work.module, "decode", latents), reference.decode(latents).sample)
        moments = at_work.whole(at_work.module, "encode", pixels)
        torch.testing.assert_close(moments, reference.encode(pixels).latent_dist.parameters)
    vae.first_stage_model.encoder = copy.deepcopy(vae.first_stage_model.encoder)
    assert raw_module(vae.first_stage_model).encoder is vae.first_stage_model.encoder


@pytest.mark.parametrize("by_picture", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
def test_wans_moments_are_those_that_its_mean_is_of(by_picture: bool, frames: int) -> None:
    vae, reference = wan(by_picture=by_picture), the_vae("wan")
    at_work = comfy_shaped.at_work(ERSATZ if by_picture else COMFYUI, vae)
    pixels = normal(1, 3, frames, 32, 48)
    with torch.no_grad():
        moments = at_work.whole(at_work.module, "encode", pixels)
        if by_picture:
            pictures = [reference.encode(pixels[:, :, [index]]).latent_dist.parameters for index in range(frames)]
            expected = torch.cat(pictures, dim=2)
        else:
            expected = reference.encode(pixels).latent_dist.parameters
    torch.testing.assert_close(moments, expected)


# --- what is the host's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "method", "args", "kwargs"),
    [
        (kl, "decode", (normal(1, 4, 4, 6), {"tile": 3}), {}),
        (kl, "decode", (normal(1, 4, 4, 6),), {"vae_options": {"seed": 1}}),
        (kl, "decode", (normal(1, 4, 4, 6),), {"something": 1}),
        (kl, "decode_tiled", (normal(1, 4, 4, 6),), {"something": 1}),
        (kl, "decode", (normal(1, 16, 4, 6),), {}),
        (kl, "decode", (normal(4, 4, 6),), {}),
        (kl, "decode", (normal(1, 4, 2, 4, 6),), {}),
        (kl, "decode", (torch.zeros(1, 4, 4, 6, dtype=torch.int64),), {}),
        (kl, "decode", (normal(0, 4, 4, 6),), {}),
        (kl, "decode", ("latents",), {}),
        (kl, "encode", (levels(1, 32, 48, 4),), {}),
        (flux2, "decode", (normal(1, 64, 4, 6),), {}),
        (flux2, "encode", (levels(1, 40, 48, 3),), {}),
        (wan, "decode", (normal(1, 16, 4, 6),), {}),
    ],
)
def test_calls_with_arguments_or_of_shapes_that_are_not_known_are_the_hosts_own(
    make: Callable[[], VAE], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert vae_call(COMFYUI, method, getattr(VAE, method), make(), args, kwargs) is None


def test_whatever_is_given_beside_the_tensor_goes_to_the_hosts_own_call() -> None:
    seen: list[Any] = []

    def original(vae: VAE, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((args[1:], kwargs))
        return VAE.decode_tiled(vae, *args, **kwargs)

    call = vae_call(COMFYUI, "decode_tiled", original, kl(), (normal(1, 4, 4, 6), 32), {"tile_y": 16})
    assert call is not None
    assert call.whole is not None
    call.whole()
    # Where not even that has the memory for the exact one.
    assert call.own_tiling is not None
    call.own_tiling()
    assert seen == [((32,), {"tile_y": 16})] * 2


def audio(vae: VAE) -> None:
    vae.latent_dim = 1  # type: ignore[attr-defined]


def twice_the_size(vae: VAE) -> None:
    vae.decode_upscale = 2  # type: ignore[attr-defined]


def patched(vae: VAE) -> None:
    vae.patcher.patches["decoder.conv_in.weight"] = object()


def of_frames(vae: VAE) -> None:
    vae.first_stage_model.decoder.conv_in = nn.Conv3d(4, 64, 3)


def empty(vae: VAE) -> None:
    vae.first_stage_model = None  # type: ignore[assignment]


def something_else(vae: VAE) -> None:
    vae.first_stage_model = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (audio, "no VAE for pictures"),
        (twice_the_size, "no VAE for pictures"),
        (patched, "patches"),
        (of_frames, "not known; known are the VAEs of SD 1"),
        (empty, "no weights"),
        (something_else, "Linear with 4 latent channels of 8 px is not known"),
    ],
)
def test_a_vae_that_is_not_known_is_refused_with_the_reason(change: Callable[[VAE], None], why: str) -> None:
    vae = kl()
    change(vae)
    with pytest.raises(UnsupportedLayout, match=why):
        vae_call(COMFYUI, "decode", VAE.decode, vae, (normal(1, 4, 4, 6),), {})


def test_the_users_word_is_the_last_if_the_shapes_allow_it() -> None:
    seen = comfy_shaped.at_work(COMFYUI, kl()).family
    assert (seen.is_known, seen.latent_channels, seen.downscale) == (False, 4, 8)
    assert comfy_shaped.at_work(COMFYUI, kl(), Known(find_family("sdxl"))).family.key == "sdxl"
    with pytest.raises(UnsupportedLayout, match="not of Flux: 4 latent channels of 8 px, expected 16"):
        comfy_shaped.at_work(COMFYUI, kl(), Known(find_family("flux")))


# --- without memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["decode", "encode"])
@pytest.mark.parametrize("make", [kl, flux2])
def test_the_hosts_own_tiling_is_not_used_where_the_exact_one_can(make: Callable[[], VAE], method: Op) -> None:
    vae = make()
    given = normal(1, vae.latent_channels, 2, 4) if method == "decode" else levels(1, 32, 48, 3)
    own = getattr(vae, method)(given)
    vars(vae.first_stage_model)[method] = lambda *_: out_of_memory()
    made, by = answered(COMFYUI, vae, method, Settings(enabled=True), given)
    assert by == "tiled exact"
    torch.testing.assert_close(made, own, rtol=1e-3, atol=1e-4)
    assert vae.tilings == []
    assert not [name for name in vars(vae) if "_tiled" in name]


def test_while_its_own_call_runs_every_way_to_its_own_tiling_raises_and_then_is_there_again() -> None:
    vae = kl()
    theirs = vae.decode_tiled_ = lambda samples: samples  # type: ignore[assignment,method-assign]
    with comfy_shaped.no_own_tiling(vae, "decode"):
        for name in ("decode_tiled", "decode_tiled_"):
            with pytest.raises(OutOfMemory):
                getattr(vae, name)(normal(1, 4, 4, 6))
        assert vae.encode_tiled.__func__ is VAE.encode_tiled
    assert vae.decode_tiled_ is theirs
    assert vae.decode_tiled.__func__ is VAE.decode_tiled


def test_a_tiled_call_is_answered_untiled_remotely_and_in_its_own_tiles_here(proxy: Callable[[str], Chaos]) -> None:
    vae, given, chaos = kl(), normal(1, 4, 4, 6), proxy("sd1")
    settings = Settings(enabled=True, endpoint=chaos.url, transfer="raw")
    whole, tiled = vae.decode(given), vae.decode_tiled(given)
    chaos.reset("pass")
    made, by = answered(COMFYUI, vae, "decode_tiled", settings, given, tile_x=32)
    assert by == "remote raw"
    torch.testing.assert_close(made, whole, rtol=1e-3, atol=1e-4)
    chaos.reset("503")
    made, by = answered(COMFYUI, vae, "decode_tiled", settings, given, tile_x=32)
    assert torch.equal(made, tiled)


# --- one object --------------------------------------------------------------------------------------------------------


def test_a_vae_is_overridden_without_touching_it_and_never_twice() -> None:
    vae, calls = kl(), []

    def around(method: str, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((method, self))
        with nullcontext():
            return original(self, *args, **kwargs)

    twin = comfy_shaped.overriding(COMFYUI, vae, around)
    again = comfy_shaped.overriding(COMFYUI, twin, around)
    assert isinstance(twin, VAE)
    assert type(twin) is not VAE
    assert twin.first_stage_model is vae.first_stage_model
    given = normal(1, 4, 4, 6)
    for one in (again, copy.copy(again)):
        calls.clear()
        assert torch.equal(one.decode(given), vae.decode(given))
        assert calls == [("decode", one)]
    for method, tensor in (("encode", levels(1, 32, 48, 3)), ("decode_tiled", given), ("encode_tiled", levels(1, 32, 48, 3))):
        calls.clear()
        getattr(twin, method)(tensor)
        assert calls[0] == (method, twin)
    # What is set on it is its own.
    twin.latent_channels = 16
    assert vae.latent_channels == 4
