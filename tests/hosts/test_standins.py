"""That the stand-ins do what was seen of the hosts: the VAE calls of each path, their tensors, and what an extension meets."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from fastapi import HTTPException
from PIL import Image

from tests.hosts import a1111_standin, forge_standin, script_standin, sdnext_standin
from tests.hosts.webui_standin import sampled
from tests.layouts import forge_vae
from tests.vaes import small_kl

STANDINS = {"a1111": a1111_standin, "forge": forge_standin, "sdnext": sdnext_standin}
MAKERS = {
    "a1111": a1111_standin.LdmModel,
    "forge": forge_standin.Sd15,
    "sdnext": sdnext_standin.StableDiffusionPipeline,
}


@pytest.fixture(params=STANDINS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Each host with an SD 1 model, whose ``calls`` are what its VAE was asked."""
    return installed(name, monkeypatch, tmp_path)


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return installed("forge", monkeypatch, tmp_path)


@pytest.fixture
def sdnext(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return installed("sdnext", monkeypatch, tmp_path)


def installed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    host = STANDINS[name].install(monkeypatch, tmp_path)
    model = host.load(MAKERS[name](small_kl("sd1")))
    host.calls = {
        "a1111": lambda: model.first_stage_model.calls,
        "forge": lambda: model.calls,
        "sdnext": lambda: sdnext_standin.calls_of(model.vae),
    }[name]()
    host.model = model
    return host


def image(count: int = 1, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


# --- the paths ---------------------------------------------------------------------------------------------------------

# Calls of the VAE by (A1111, Forge, SD.Next): d for a decode, e for an encode.
PATHS: dict[str, tuple[Any, tuple[str, str, str]]] = {
    "txt2img": (lambda host: host.txt2img(batch=3), ("ddd", "d", "d")),
    "img2img": (lambda host: host.img2img(image(3)), ("eeeddd", "eeed", "eeed")),
    "inpaint": (lambda host: host.inpaint(image(3)), ("eeeeddd", "eeed", "eeeeeed")),
    "hires, latent": (lambda host: host.hires_latent(batch=3)[0], ("ddd", "d", "d")),
    "hires, saved": (lambda host: host.hires_latent(batch=3, save_before=True)[0], ("dddddd", "dddd", "dd")),
    "hires, pixel": (lambda host: host.hires_pixel(batch=3), ("dddeeeddd", "deeed", "deeed")),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_gives_a_picture_for_each_of_the_batch_by_the_calls_of_its_host(host: Any, name: str, path: str) -> None:
    run, calls = PATHS[path]
    pictures = run(host)
    assert "".join(call[0] for call in host.calls) == calls[list(STANDINS).index(name)]
    size = (64, 96, 3) if path.startswith("hires") else (32, 48, 3)
    assert [(picture.shape, picture.dtype) for picture in pictures] == [(size, np.uint8)] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert len(host.infotexts) == 3
    assert host.offences == []


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(host: Any) -> None:
    first, again, other = (host.txt2img(seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_preview_asks_the_vae_in_all_but_forge(host: Any, name: str) -> None:
    shown = host.preview(torch.randn(1, 4, 4, 6))
    assert isinstance(shown, Image.Image)
    assert host.calls == ([] if name == "forge" else ["decode"])


def test_eight_bits_are_cut_off_in_all(host: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 200.75 of 255
    value = 200.75 / 255 * 2 - 1
    if name == "sdnext":
        monkeypatch.setattr(AutoencoderKL, "decode", lambda _, z, return_dict: (torch.full((1, 3, 32, 48), value),))
    else:
        vae = host.model.first_stage_model if name == "a1111" else host.model.forge_objects.vae.first_stage_model
        vars(vae)["decode"] = lambda z: torch.full((1, 3, 32, 48), value)
    assert np.unique(host.txt2img()[0]) == [200]


# --- requests and scripts ----------------------------------------------------------------------------------------------


def test_the_infotext_is_made_after_the_decode_and_for_each_picture(host: Any) -> None:
    host.n_iter = 2
    inner = host.processing.process_images_inner
    seen: list[int] = []

    class Late:
        def __str__(self) -> str:
            seen.append(len(host.calls))
            return "late"

    def with_late(p: Any) -> Any:
        p.extra_generation_params["Remote VAE"] = Late()
        return inner(p)

    host.processing.process_images_inner = with_late
    assert len(host.txt2img(batch=2)) == 4
    assert host.infotexts == [f"Seed: {seed}, Remote VAE: late" for seed in (1, 2, 3, 4)]
    assert min(seen) >= 1
    assert seen[-1] > seen[0]
    assert host.last.iteration == 1


def test_overridden_settings_hold_for_one_generation(host: Any) -> None:
    host.set_options(enabled=False)
    host.override_settings = {"remotevae_enabled": True}
    inner = host.processing.process_images_inner
    during: list[bool] = []
    host.processing.process_images_inner = lambda p: during.append(host.opts.remotevae_enabled) or inner(p)
    host.txt2img()
    assert during == [True]
    assert host.opts.remotevae_enabled is False


def test_an_error_ends_the_job_and_restores_the_settings(host: Any) -> None:
    def fail(p: Any) -> None:
        raise KeyError("inner")

    host.set_options(enabled=False)
    host.override_settings = {"remotevae_enabled": True}
    host.processing.process_images_inner = fail
    with pytest.raises(KeyError):
        host.txt2img()
    assert host.opts.remotevae_enabled is False
    assert host.state.job == ""


def extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "an_extension.py"
    path.write_text(
        "import gradio as gr\n"
        "from modules import scripts\n"
        "print('loading')\n"
        "seen = []\n"
        "class Mine(scripts.Script):\n"
        "    def title(self): return 'Remote VAE'\n"
        "    def show(self, is_img2img): return scripts.AlwaysVisible\n"
        "    def ui(self, is_img2img):\n"
        "        with gr.Accordion('Remote VAE', open=False):\n"
        "            return [gr.Checkbox(value=True, label='a'), gr.Dropdown(choices=['x', 'y'], value='x', label='b')]\n"
        "    def before_process(self, p, *args): seen.append(('before', *args))\n"
        "    def process(self, p, *args): seen.append(('process', *args)); p.extra_generation_params['Mine'] = args[0]\n"
    )
    monkeypatch.setattr(script_standin, "SCRIPT", path)
    return path


def test_a_script_gets_its_arguments_and_the_defaults_for_the_rest_but_for_sdnext(
    host: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    extension(monkeypatch, tmp_path)
    host.load_extension()
    host.txt2img()
    host.alwayson = {"remote vae": [False]}
    host.img2img(image())
    seen = host.scripts.scripts_data[-1].module.seen
    named = (False,) if name == "sdnext" else (False, "x")
    assert seen == [("before", True, "x"), ("process", True, "x"), ("before", *named), ("process", *named)]
    assert host.infotexts == ["Seed: 1, Mine: False"]


def test_an_unknown_script_in_a_request_is_refused(host: Any) -> None:
    host.alwayson = {"Nobody": []}
    with pytest.raises(HTTPException) as refusal:
        host.txt2img()
    assert refusal.value.status_code == 422


def test_after_reload_ui_there_is_one_script_and_a_new_plot(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extension(monkeypatch, tmp_path)
    host.load_extension()
    plot = host.scripts.scripts_data[0].module
    host.reload_ui()
    titles = [data.script_class().title() for data in host.scripts.scripts_data]
    assert titles.count("Remote VAE") == 1
    assert host.scripts.scripts_data[0].module is not plot


def test_an_axis_that_is_added_to_the_plot_sets_up_each_cell(host: Any) -> None:
    [plot] = [data.module for data in host.scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py"]
    values: list[Any] = []
    plot.axis_options.append(plot.AxisOption("[Remote VAE] Mode", str, lambda p, x, xs: values.append((x, xs))))
    cells = host.xyz("[Remote VAE] Mode", ["off", "remote"])
    assert values == [("off", ["off", "remote"]), ("remote", ["off", "remote"])]
    assert np.array_equal(*(cell[0] for cell in cells))
    host.xyz("Seed", ["1", "2"])
    assert host.infotexts == ["Seed: 1", "Seed: 2"]


def test_a_widget_takes_only_what_it_knows() -> None:
    gr = script_standin.gradio()
    with gr.Accordion("A", open=False), gr.Row():
        assert gr.Dropdown(choices=["a"], value="a").value == "a"
    with pytest.raises(TypeError, match="colour"):
        gr.Accordion("A", colour="red")
    with pytest.raises(TypeError, match="minimum"):
        gr.Dropdown(choices=["a"], minimum=1)


# --- Forge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "channels", "quant"),
    [(forge_standin.Sd15, 4, True), (forge_standin.Sdxl, 4, True), (forge_standin.Flux, 16, False)],
)
def test_each_engine_of_forge_gives_and_takes_pictures(forge: Any, maker: Any, channels: int, quant: bool) -> None:
    vae = forge_vae(use_quant=quant, latent=channels)
    model = forge.load(maker(vae))
    assert forge.txt2img()[0].shape == (32, 48, 3)
    assert forge.img2img(image())[0].shape == (32, 48, 3)
    assert forge.shared.sd_model is model
    assert model.first_stage_model is None
    raw = model.forge_objects.vae.encode(image().movedim(1, -1))
    assert raw.shape == (1, channels, 4, 6)


def test_the_tensors_at_forges_wrappers_are_those_that_were_seen(forge: Any) -> None:
    crossed: list[tuple[str, Any, bool, torch.dtype, bool]] = []

    def wrapper(op: str) -> Any:
        def wrapped(inner: Any, tensor: torch.Tensor) -> Any:
            assert inner.__self__ is forge.model.forge_objects.vae
            crossed.append((op, tuple(tensor.shape), tensor.is_contiguous(), tensor.dtype, tensor.is_inference()))
            return inner(tensor)

        return wrapped

    patcher = forge.model.forge_objects.vae.patcher
    patcher.set_model_vae_decode_wrapper(wrapper("decode"))
    patcher.set_model_vae_encode_wrapper(wrapper("encode"))
    pictures = forge.img2img(image(1, 333, 250))
    assert crossed == [
        ("encode", (1, 333, 250, 3), False, torch.float32, True),
        ("decode", (1, 4, 41, 31), True, torch.float32, True),
    ]
    assert pictures[0].shape == (328, 248, 3)


def test_forge_that_runs_out_of_memory_goes_to_its_own_tiling(forge: Any) -> None:
    whole = forge.txt2img(batch=2)
    forge.calls.clear()
    with forge_standin.no_memory(forge.model):
        tiled = forge.txt2img(batch=2)
    # Three passes, each of both pictures, and one tile a picture at this size: the same picture.
    assert forge.calls == ["decode"] * 6
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(whole, tiled, strict=True)) <= 1


def test_forges_tiles_are_blended_where_there_are_several(forge: Any) -> None:
    vae, latents = forge.model.forge_objects.vae, torch.randn(1, 4, 12, 12)
    with torch.inference_mode():
        tiled = vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2)
        assert tiled.shape == vae.decode(latents).shape == (1, 96, 96, 3)
        pixels = vae.encode_tiled(torch.rand(1, 48, 32, 3), tile_x=32, tile_y=32, overlap=8)
    assert pixels.shape == (1, 4, 6, 4)
    assert bool(tiled.isfinite().all())


def test_forge_brings_its_vae_to_the_device_only_where_the_inner_call_is_made(forge: Any) -> None:
    forge.activate()
    vae = forge.model.forge_objects.vae
    vae.patcher.set_model_vae_decode_wrapper(lambda inner, z: torch.rand(z.shape[0], z.shape[2] * 8, z.shape[3] * 8, 3))
    forge.txt2img(batch=2)
    assert forge.memory_management.loaded == []
    del vae.patcher.model_options["model_vae_decode_wrapper"]
    forge.txt2img()
    assert forge.memory_management.loaded == [vae.patcher]


def test_forge_announces_a_new_engine_at_the_generation_and_not_before(forge: Any) -> None:
    announced: list[Any] = []
    forge.script_callbacks.on_model_loaded(announced.append)
    assert type(forge.shared.sd_model).__name__ == "FakeInitialModel"
    forge.txt2img()
    forge.txt2img()
    assert announced == [forge.model]
    other = forge.change_vae(small_kl("sd1"))
    assert announced == [forge.model]
    forge.txt2img()
    back = forge.swap_to(forge.model)
    forge.txt2img()
    assert announced == [forge.model, other, back]
    assert back is not forge.model


def test_the_three_objects_of_an_engine_share_one_vae_and_a_clone_copies_the_wrappers(forge: Any) -> None:
    model = forge.model
    vae = model.forge_objects.vae
    assert vae is model.forge_objects_original.vae is model.forge_objects_after_applying_lora.vae
    marker = [object()]
    vae.patcher.model_options["mine"] = marker
    twin = vae.clone()
    assert twin.patcher.model_options["mine"] is not marker
    assert twin.first_stage_model is vae.first_stage_model


def test_regulation_decides_what_forge_makes_of_the_posterior(forge: Any) -> None:
    vae = forge.model.forge_objects.vae
    vae.patcher.set_model_vae_regulation(lambda posterior: posterior.mode())
    pixels = image().movedim(1, -1)
    assert torch.equal(vae.encode(pixels), vae.encode(pixels))


# --- SD.Next -----------------------------------------------------------------------------------------------------------


def test_an_error_in_the_decode_costs_sdnext_the_pictures(
    sdnext: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(AutoencoderKL, "decode", fail)
    assert sdnext.txt2img(batch=2) == []
    assert sdnext.infotexts == []
    assert "VAE decode: out of memory" in caplog.text


def test_an_error_in_the_encode_costs_sdnext_the_pictures(sdnext: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(AutoencoderKL, "encode", fail)
    assert sdnext.img2img(image()) == []
    assert sdnext.calls == []


@pytest.mark.parametrize("press", ["interrupt", "skip"])
def test_a_press_while_sampling_costs_sdnext_the_picture_and_no_decode(sdnext: Any, press: str) -> None:
    getattr(sdnext.state, press)()
    assert sdnext.txt2img() == []
    assert sdnext.calls == []
    assert sdnext.processing_vae.vae_decode(torch.randn(1, 4, 4, 6), sdnext.model) == []


def test_sdnexts_shift_factor_is_taken_out_before_the_vae(sdnext: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small_kl("flux", use_quant_conv=False, use_post_quant_conv=False)
    sdnext.load(sdnext_standin.FluxPipeline(vae))
    given: list[torch.Tensor] = []
    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z, **kwargs: given.append(z) or decode(self, z, **kwargs))
    sdnext.txt2img()
    latents = sampled(1, 1, channels=16)
    torch.testing.assert_close(given[0], latents / vae.config.scaling_factor + vae.config.shift_factor)
    assert sdnext.shared.sd_model_type == "f1"
    assert len(sdnext.img2img(image())) == 1


def test_sdnexts_refiner_decodes_with_its_own_vae_and_a_holder_with_that_of_its_pipe(sdnext: Any) -> None:
    refiner = sdnext.load_refiner(sdnext_standin.StableDiffusionXLPipeline(small_kl("sd1")))
    calls = sdnext_standin.calls_of(refiner.vae)
    assert len(sdnext.refine(batch=2)) == 2
    assert (sdnext.calls, calls) == ([], ["decode"])
    sdnext.load(sdnext_standin.PipelineHolder(sdnext.model))
    assert len(sdnext.img2img(image())) == 1
    assert sdnext.calls == ["encode", "decode"]


def test_sdnext_replaces_a_vae_without_a_word_and_has_vaes_that_are_not_its_models(sdnext: Any) -> None:
    announced: list[Any] = []
    sdnext.script_callbacks.on_model_loaded(announced.append)
    other = small_kl("sd1")
    calls = sdnext_standin.calls_of(other)
    assert sdnext.preprocess(other, image()).shape == (1, 3, 32, 48)
    assert calls == ["encode", "decode"]
    sdnext.change_vae(other)
    assert len(sdnext.txt2img()) == 1
    assert sdnext.encode(image()).shape == (1, 4, 4, 6)
    assert calls == ["encode", "decode", "decode", "encode"]
    assert (sdnext.calls, announced) == ([], [])


def test_a_decode_to_pil_is_rounded_in_sdnext(sdnext: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.full((1, 3, 32, 48), 200.75 / 255 * 2 - 1)
    monkeypatch.setattr(AutoencoderKL, "decode", lambda _, z, return_dict: (value,))
    _, [saved] = sdnext.hires_latent(save_before=True)
    assert np.unique(np.asarray(saved)) == [201]


def test_the_modules_that_sdnext_lacks_are_missing(sdnext: Any) -> None:
    for missing in ("modules.shared_options", "modules.sd_vae_approx", "ldm", "backend", "modules_forge"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(missing)


def test_an_option_that_sdnext_does_not_know_raises_and_a_default_is_not_stored(sdnext: Any) -> None:
    with pytest.raises(AttributeError):
        _ = sdnext.opts.remotevae_enabled
    sdnext.opts.add_option("remotevae_enabled", sdnext.shared.OptionInfo(False, "Enabled"))
    assert sdnext.opts.remotevae_enabled is False
    assert "remotevae_enabled" not in sdnext.opts.data


def test_the_callbacks_of_sdnext_take_no_name_and_that_before_a_generation_fires_in_the_control_tab_too(
    sdnext: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(TypeError):
        sdnext.script_callbacks.on_model_loaded(print, name="mine")
    extension(monkeypatch, tmp_path)
    sdnext.load_extension()
    fired: list[Any] = []
    sdnext.script_callbacks.on_before_process(fired.append)
    sdnext.control_tab = True
    sdnext.txt2img()
    assert fired == [sdnext.last]
    assert sdnext.scripts.scripts_data[-1].module.seen == []
    sdnext.installer.control_extensions.append("Remote VAE")
    sdnext.create_ui()
    sdnext.txt2img()
    assert len(sdnext.scripts.scripts_data[-1].module.seen) == 2


def test_sdnext_keeps_what_a_script_prints_while_it_is_loaded(
    sdnext: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extension(monkeypatch, tmp_path).write_text("import sys\nprint('loading')\nout = sys.stdout\n")
    kept: list[Any] = []
    exec_module = importlib.machinery.SourceFileLoader.exec_module
    monkeypatch.setattr(
        importlib.machinery.SourceFileLoader,
        "exec_module",
        lambda loader, module: (exec_module(loader, module), kept.append(module.out)),
    )
    sdnext.load_extension()
    assert isinstance(kept[0], io.StringIO)
    assert capsys.readouterr().out == ""


def test_scripts_is_a_copy_of_scripts_manager_in_sdnext(sdnext: Any) -> None:
    alias: ModuleType = sys.modules["modules.scripts"]
    manager: Any = sys.modules["modules.scripts_manager"]
    assert alias.Script is manager.Script
    assert alias.AlwaysVisible is manager.AlwaysVisible
    assert alias.scripts_data is manager.scripts_data
