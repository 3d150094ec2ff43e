"""ComfyUI: a VAE behind a node, every VAE by a setting, Interrupt, and what is known of a picture afterwards."""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_vae.errors import RemoteVaeError, VaeCallFailed
from remote_vae.history import History
from remote_vae.hosts.comfyui import ComfyUi, adapter
from remote_vae.server.models import LoadedVae
from remote_vae.vae.families import load_families
from remote_vae.vae.packed import batch_norm_of
from tests.chaos import Chaos
from tests.conftest import ServerThread
from tests.hosts.comfyui_standin import VAE, ComfyHost, PromptExecutor
from tests.hosts.standin import put_in_place
from tests.vaes import loaded, small_vae


@pytest.fixture(params=[BaseException, Exception], ids=["0.33", "0.3.64"])
def host(
    request: pytest.FixtureRequest, loaded: LoadedVae, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[ComfyHost]:
    """A ComfyUI with the pack in it, switched off as it comes."""
    log = logging.getLogger("remote_vae")
    before = list(log.handlers), list(log.filters), log.level, log.propagate
    log.handlers, log.propagate = [logging.NullHandler()], True
    log.setLevel(logging.INFO)
    made = ComfyHost(loaded.vae, tmp_path, interrupt=request.param)
    put_in_place(monkeypatch, made)
    fresh = ComfyUi()
    monkeypatch.setattr(adapter, "__dict__", fresh.__dict__)
    adapter.router.history = History()
    made.load_pack()
    yield made
    adapter.uninstall()
    assert not [name for name in ("decode", "encode") if hasattr(getattr(VAE, name), "remote_vae_adapter")]
    assert not hasattr(PromptExecutor.execute, "remote_vae_adapter")
    assert not adapter.own_calls.are_passed_on
    log.handlers, log.filters, log.level, log.propagate = before


@pytest.fixture
def endpoint(server: ServerThread) -> Iterator[Chaos]:
    proxy = Chaos(server.url)
    proxy.info = "pass"
    yield proxy
    proxy.released.set()
    proxy.close()


def graph(seed: int = 1, *, mode: str = "auto", batch: int = 1, **more: Any) -> dict[str, Any]:
    """Latents, decoded by a VAE behind the node Remote VAE; without a ``mode`` by the VAE itself."""
    vae: list[Any] = ["2", 0] if mode else ["1", 0]
    made = {
        "1": ("VAELoader", {"name": "a"}),
        "2": ("RemoteVAE", {"vae": ["1", 0], "mode": mode or "auto", "transfer": "raw", "family": "auto"}),
        "3": ("EmptyLatentImage", {"seed": seed, "batch": batch}),
        "4": ("VAEDecode", {"samples": ["3", 0], "vae": vae}),
        "5": ("SaveImage", {"images": ["4", 0], "name": "x"}),
    }
    return {**made, **more}


def own(host: ComfyHost, seed: int = 1, batch: int = 1) -> torch.Tensor:
    """What ComfyUI alone decodes."""
    with adapter.own_calls.passing_on():
        latents = torch.randn(batch, 4, 4, 6, generator=torch.Generator().manual_seed(seed)) * 5
        pixels = host.vae.decode(latents)
    host.vae.first_stage_model.calls.clear()
    host.brought.clear()
    return pixels


def levels(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max()) * 255.0


# --- who answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_a_vae_behind_the_node_is_asked_remotely_and_never_loaded_here(host: ComfyHost, endpoint: Chaos, batch: int) -> None:
    expected = own(host, batch=batch)
    host.settings(endpoint=endpoint.url)
    (pixels,) = host.run(graph(batch=batch), "4")
    assert levels(pixels, expected) < 0.01
    assert endpoint.requests == ["/decode"]
    assert host.vae.first_stage_model.calls == host.brought == []


@pytest.mark.parametrize("mode", ["503", "nan", "cut"])
def test_whatever_fails_remotely_the_picture_is_the_vaes_own_to_the_bit(host: ComfyHost, endpoint: Chaos, mode: str) -> None:
    expected = own(host)
    host.settings(endpoint=endpoint.url)
    endpoint.mode = mode
    (pixels,) = host.run(graph(), "4")
    assert torch.equal(pixels, expected)
    assert endpoint.requests


def test_without_the_node_it_is_remote_only_where_the_user_wants_it_for_every_vae(host: ComfyHost, endpoint: Chaos) -> None:
    expected = own(host)
    host.settings(endpoint=endpoint.url)
    (off,) = host.run(graph(mode=""), "4")
    assert torch.equal(off, expected)
    assert endpoint.requests == []
    host.settings(enabled=True, transfer="raw")
    host.executor.cache.clear()
    (on,) = host.run(graph(mode=""), "4")
    assert levels(on, expected) < 0.01
    assert endpoint.requests == ["/decode"]


def test_off_on_the_node_wins_over_every_vae(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url, enabled=True)
    host.run(graph(mode="off"), "4")
    assert endpoint.requests == []


def test_the_remote_vae_is_a_vae_of_the_same_class_that_can_be_copied_and_wrapped_again(
    host: ComfyHost, endpoint: Chaos
) -> None:
    expected = own(host)
    host.settings(endpoint=endpoint.url)
    twice = {"6": ("RemoteVAE", {"vae": ["2", 0], "mode": "remote", "transfer": "raw", "family": "auto"})}
    remote = host.run(graph(mode="off", **twice), "6")[0]
    assert isinstance(remote, VAE)
    assert remote.first_stage_model is host.vae.first_stage_model
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1)) * 5
    for each in (remote, copy.copy(remote), copy.deepcopy(remote)):
        assert levels(each.decode(latents), expected) < 0.01
    assert endpoint.requests == ["/decode"] * 3
    # The one that it was made of is as it was.
    assert torch.equal(host.vae.decode(latents), expected)


def test_tiled_methods_give_the_untiled_picture_remotely_and_their_own_tiles_here(host: ComfyHost, endpoint: Chaos) -> None:
    expected = own(host)
    host.settings(endpoint=endpoint.url)
    remote = host.run(graph(), "2")[0]
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1)) * 5
    assert levels(remote.decode_tiled(latents, tile_x=3, tile_y=4, overlap=0), expected) < 0.01
    endpoint.mode = "503"
    tiles = host.vae.decode_tiled(latents)
    assert levels(tiles, expected) > 1.0
    assert torch.equal(remote.decode_tiled(latents, tile_x=3, tile_y=4, overlap=0), tiles)


def test_an_encode_gives_the_mean_of_the_picture_that_comfyui_crops(host: ComfyHost, endpoint: Chaos) -> None:
    pixels = torch.rand(1, 35, 52, 3, generator=torch.Generator().manual_seed(3))
    expected = host.vae.encode(pixels)
    host.settings(endpoint=endpoint.url)
    remote = host.run(graph(), "2")[0]
    for method in (remote.encode, remote.encode_tiled):
        assert torch.allclose(method(pixels), expected, atol=1e-4)
    assert endpoint.requests == ["/encode"] * 2


def test_a_vae_with_patches_is_left_alone_and_the_node_says_so(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    host.vae.patcher.patches["decoder.conv_in.weight"] = [1]
    host.run(graph(), "4")
    assert endpoint.requests == []
    assert ("this VAE is left alone: patches change the weights of this VAE", "2", "me") in host.texts


def test_a_family_of_another_shape_is_said_and_the_picture_is_made_here(
    host: ComfyHost, endpoint: Chaos, caplog: pytest.LogCaptureFixture
) -> None:
    expected = own(host)
    host.settings(endpoint=endpoint.url)
    wrong = {"2": ("RemoteVAE", {"vae": ["1", 0], "mode": "auto", "transfer": "raw", "family": family_named(host, "flux")})}
    (pixels,) = host.run(graph(**wrong), "4")
    assert torch.equal(pixels, expected)
    assert endpoint.requests == []
    assert "this VAE is not of" in caplog.text


def test_the_node_says_what_is_to_be_expected_of_its_vae(host: ComfyHost, endpoint: Chaos) -> None:
    def said(**node: Any) -> str:
        host.executor.cache.clear()
        host.run(
            graph(**{"2": ("RemoteVAE", {"vae": ["1", 0], "mode": "auto", "transfer": "raw", "family": "auto", **node})}), "2"
        )
        return str(next(text for text, name, _ in reversed(host.texts) if name == "2"))

    host.settings(endpoint="")
    assert said() == "no endpoint is set: Settings, Remote VAE, Endpoint"
    host.settings(endpoint=endpoint.url)
    name = endpoint.url.removeprefix("http://")
    assert said() == f"asks {name}"
    assert said(mode="off") == "off: this VAE does everything itself"
    assert said(family=family_named(host, "flux")).startswith("this VAE is left alone: this VAE is not of Flux")
    host.settings(decode=False, encode=False)
    assert said() == "the settings keep decode and encode here"
    assert said(mode="remote") == f"asks {name}"
    # As of a VAE object that a pack of nodes has made on its own.
    del host.vae.patcher
    assert said().startswith("this VAE is left alone: it is of no kind that is known (AttributeError")


def family_named(host: ComfyHost, key: str) -> str:
    choices: list[str] = host.nodes["RemoteVAE"].INPUT_TYPES()["required"]["family"][0]
    return next(choice for choice in choices if choice.endswith(f"({key})"))


# --- Interrupt ---------------------------------------------------------------------------------------------------------------


def test_interrupt_ends_the_job_at_once_and_is_no_failure_of_the_endpoint(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url, cooldown=600)
    # The endpoint is known, so that it is the picture that is waited for.
    host.run(graph(9), "4")
    endpoint.reset("hang")
    loaded_before = list(host.vae.first_stage_model.calls)

    def press() -> None:
        while not endpoint.requests:
            threading.Event().wait(0.01)
        host.is_interrupted = True

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(host.interrupt_class):
        host.run(graph(), "4")
    presser.join()
    assert host.vae.first_stage_model.calls == loaded_before
    assert not host.is_interrupted
    endpoint.reset("pass")
    host.run(graph(), "4")
    assert endpoint.requests == ["/decode"]
    assert not list((host.folder / "output").rglob("*.safetensors"))


def test_what_comfyui_raises_at_interrupt_within_its_own_tiles_is_no_error_to_help_out_with(host: ComfyHost) -> None:
    """Its progress bar raises it, after taking the press away."""
    host.settings(endpoint="http://127.0.0.1:9")
    remote = host.run(graph(), "2")[0]

    def interrupted(*_: Any) -> Any:
        host.is_interrupted = True
        host.throw_if_interrupted()

    remote.decode_tiled_ = interrupted
    with pytest.raises(host.interrupt_class):
        remote.decode_tiled(torch.zeros(1, 4, 4, 6), tile_x=3, tile_y=3, overlap=0)
    assert host.vae.first_stage_model.calls == []


# --- what is known of a picture ----------------------------------------------------------------------------------------------


def test_what_happened_is_in_the_metadata_also_of_a_picture_that_is_saved_again(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    _, metadata = host.run(graph(), "5", {"workflow": {}})
    assert json.loads(metadata["remote_vae"]) == {"4": "decode remote (raw)"}
    again = {"5": ("SaveImage", {"images": ["4", 0], "name": "another"})}
    _, metadata = host.run(graph(**again), "5", {"workflow": {}})
    assert endpoint.requests == ["/decode"]
    assert json.loads(metadata["remote_vae"]) == {"4": "decode remote (raw)"}


def test_a_fallback_is_in_the_metadata_with_its_cause(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    endpoint.mode = "503"
    _, metadata = host.run(graph(), "5", {})
    assert json.loads(metadata["remote_vae"]) == {"4": "decode local (503)"}


def test_a_node_that_runs_again_without_us_is_no_longer_said_to_be_remote(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url, enabled=True)
    host.run(graph(mode=""), "5", {})
    host.settings(enabled=False)
    host.executor.cache.clear()
    _, metadata = host.run(graph(mode=""), "5", {})
    assert "remote_vae" not in metadata


def test_a_client_that_gives_no_metadata_gets_none(host: ComfyHost, endpoint: Chaos) -> None:
    """Nodes of others look into them for the workflow as soon as there are any."""
    host.settings(endpoint=endpoint.url)
    assert host.run(graph(), "5")[1] is None


def test_the_report_tells_of_the_calls_that_its_picture_went_through(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    more = {
        "6": ("EmptyLatentImage", {"seed": 2, "batch": 1}),
        "7": ("VAEDecode", {"samples": ["6", 0], "vae": ["2", 0]}),
        "8": ("RemoteVAEReport", {"images": ["4", 0]}),
        "9": ("SaveImage", {"images": ["7", 0], "name": "first"}),
        "10": ("SaveImage", {"images": ["8", 0], "name": "second"}),
    }
    job = graph(**more)
    host.run(job, "9")
    images, text = host.run(job, "8")
    assert text == "VAEDecode (node 4): decode remote (raw)"
    assert images is host.run(job, "4")[0]
    assert (text, "8", "me") in host.texts


def test_the_node_that_waits_shows_what_goes_on_and_what_came_of_it(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    host.run(graph(), "4")
    shown = [text for text, node, client in host.texts if (node, client) == ("4", "me")]
    name = endpoint.url.removeprefix("http://")
    assert shown[0] == f"Remote VAE: decoding on {name}"
    assert shown[-1].startswith("Remote VAE: decoded remote, raw, ")


# --- settings ----------------------------------------------------------------------------------------------------------------


def test_settings_are_read_when_they_change_and_half_a_file_changes_nothing(host: ComfyHost) -> None:
    assert not adapter.settings.now().enabled
    host.settings(enabled=True, endpoint="studio:7870", first_byte_timeout=1e9, transfer=None)
    settings = adapter.settings.now()
    assert (settings.enabled, settings.endpoint, settings.first_byte_timeout, settings.transfer) == (
        True,
        "http://studio:7870",
        600.0,
        "u8",
    )
    (host.folder / "user" / "default" / "comfy.settings.json").write_text('{"RemoteVAE.enabled": fal')
    assert adapter.settings.now() == settings


# --- without weights ---------------------------------------------------------------------------------------------------------


def weightless(family: str = "auto") -> dict[str, Any]:
    return graph(
        **{
            "2": ("LoadRemoteVAE", {"family": family, "transfer": "raw"}),
            "6": ("VAEEncode", {}),
        }
    )


def test_a_vae_without_weights_decodes_and_encodes_by_the_endpoint_alone(host: ComfyHost, endpoint: Chaos) -> None:
    expected = own(host)
    pixels = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(3))
    host.settings(endpoint=endpoint.url)
    job = weightless()
    assert levels(host.run(job, "4")[0], expected) < 0.01
    vae = host.run(job, "2")[0]
    assert isinstance(vae, VAE)
    assert torch.allclose(vae.encode(pixels), host.vae.encode(pixels), atol=1e-4)
    assert levels(vae.decode_tiled(torch.zeros(1, 4, 4, 6) + 0.5, tile_x=3), vae.decode(torch.zeros(1, 4, 4, 6) + 0.5)) == 0
    assert vae.spacial_compression_decode() == 8


def test_without_weights_and_endpoint_the_latents_are_in_the_output_folder(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    vae = host.run(weightless(), "2")[0]
    endpoint.mode = "503"
    with pytest.raises(VaeCallFailed, match=r"503.*They are saved in") as failed:
        vae.decode(torch.ones(1, 4, 4, 6))
    assert Path(str(failed.value.rescued)).parent == host.folder / "output" / "remote-vae-rescue"


def test_what_cannot_be_done_without_weights_says_so(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    vae = host.run(weightless(), "2")[0]
    with pytest.raises(RemoteVaeError, match="has no weights here, so it cannot be saved"):
        vae.get_sd()
    with pytest.raises(RemoteVaeError, match=r"got latents of shape \[1, 16, 4, 6\], expected \[B, 4, h, w\]"):
        vae.decode(torch.zeros(1, 16, 4, 6))


def test_when_the_endpoints_vae_was_the_wrong_one_the_next_job_asks_anew_which_it_has(host: ComfyHost, endpoint: Chaos) -> None:
    right, wrong = endpoint.target, ServerThread(loaded(small_vae("qwen-image"), "qwen-image"))
    try:
        host.settings(endpoint=endpoint.url)
        # As where the user stops one server and starts another at its address.
        endpoint.target = wrong.url
        with pytest.raises(RemoteVaeError, match="the endpoint's VAE is for another model"):
            host.run(weightless(), "4")
        endpoint.target = right
        assert host.run(weightless(), "4")[0].shape[-1] == 3
    finally:
        wrong.close()


def test_without_an_endpoint_there_is_nothing_to_load(host: ComfyHost) -> None:
    with pytest.raises(RemoteVaeError, match="no endpoint is set"):
        host.run(weightless(), "2")


def test_interrupt_ends_a_job_without_weights_as_well(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    vae = host.run(weightless(), "2")[0]
    host.is_interrupted = True
    with pytest.raises(host.interrupt_class):
        vae.decode(torch.ones(1, 4, 4, 6))
    assert not (host.folder / "output").exists()


def test_without_weights_an_endpoint_that_does_not_pack_flux2s_latents_is_named(host: ComfyHost) -> None:
    running = ServerThread(loaded(small_vae("flux2"), "flux2"))
    proxy = Chaos(running.url)
    proxy.drops = ("form",)
    try:
        host.settings(endpoint=proxy.url)
        vae = host.run(weightless(), "2")[0]
        with pytest.raises(VaeCallFailed, match=r"got \[1, 32, 4, 6\], expected \[1, 128, 2, 3\]"):
            vae.encode(torch.rand(1, 32, 48, 3))
    finally:
        proxy.close()
        running.close()


def test_without_weights_flux2s_latents_cross_normed_and_packed_in_both_directions(host: ComfyHost) -> None:
    served = loaded(small_vae("flux2"), "flux2")
    running = ServerThread(served)
    try:
        host.settings(endpoint=running.url)
        vae = host.run(weightless(), "2")[0]
        packed = torch.randn(1, 128, 2, 3, generator=torch.Generator().manual_seed(4))
        norm = batch_norm_of(served.vae)
        assert norm is not None
        with torch.no_grad():
            expected = served.vae.decode(norm.raw(packed)).sample
        assert levels(vae.decode(packed), ((expected + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1)) < 0.01
        assert vae.spacial_compression_decode() == 16
        # As in ComfyUI, to multiples of 16 in the middle, and the mean of the posterior.
        pixels = torch.rand(2, 40, 48, 3, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            mean = served.vae.encode(pixels[:, 4:36].movedim(-1, 1) * 2.0 - 1.0).latent_dist.mode()
        latents = vae.encode(pixels)
        assert latents.shape == (2, 128, 2, 3)
        torch.testing.assert_close(latents, norm.normed(mean), atol=1e-4, rtol=1e-4)
    finally:
        running.close()


@pytest.mark.parametrize("key", ["taesd", "ltx", "cosmos", "svd"])
def test_without_weights_nothing_is_decoded_whose_latents_comfyuis_own_vae_turns_by_its_weights(
    host: ComfyHost, key: str
) -> None:
    named = family_named(host, key)
    assert named not in host.nodes["LoadRemoteVAE"].INPUT_TYPES()["required"]["family"][0]
    with pytest.raises(RemoteVaeError, match=f"cannot decode or encode for {load_families()[key].label}"):
        host.run(weightless(named), "2")


def test_without_weights_pictures_with_too_few_colours_are_refused_in_words(host: ComfyHost, endpoint: Chaos) -> None:
    host.settings(endpoint=endpoint.url)
    vae = host.run(weightless(), "2")[0]
    with pytest.raises(RemoteVaeError, match=r"got a picture of shape \[1, 32, 48, 1\], expected \[B, H, W, 3\]"):
        vae.encode(torch.zeros(1, 32, 48, 1))


def test_without_weights_a_video_vae_takes_pictures_as_frames_and_gives_frames(host: ComfyHost) -> None:
    served = loaded(small_vae("qwen-image"), "qwen-image")
    running = ServerThread(served)
    try:
        host.settings(endpoint=running.url)
        vae = host.run(weightless(), "2")[0]
        pixels = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(3))
        latents = vae.encode(pixels)
        assert latents.shape == (1, 16, 2, 4, 6)
        assert vae.decode(latents).shape == (1, 5, 32, 48, 3)
        assert vae.upscale_ratio[0](2) == 5
    finally:
        running.close()
