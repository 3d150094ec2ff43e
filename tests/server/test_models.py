from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from remote_vae.errors import SettingsError
from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.vae.fingerprint import fingerprint
from tests.conftest import DEMO_VAE
from tests.original_names import to_ldm
from tests.vaes import small_kl
from tests.versions import before_torch, skip_if


def decodes_alike(loaded: LoadedVae, vae: diffusers.AutoencoderKL) -> bool:
    latents = torch.randn(1, vae.config.latent_channels, 4, 4)
    with torch.inference_mode():
        return torch.equal(loaded.vae.decode(latents).sample, vae.decode(latents).sample)


def test_a_diffusers_folder_is_loaded_with_its_own_factor(loaded: LoadedVae) -> None:
    assert loaded.family.scaling_factor == 0.08489
    assert (loaded.dtype, loaded.device.type) == (torch.float32, "cpu")
    assert not loaded.vae.training


def test_the_vae_folder_of_a_pipeline_is_found(tmp_path: Path) -> None:
    vae = small_kl("sdxl")
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    loaded = load_vae(str(tmp_path), device="cpu")
    assert loaded.family.key == "sdxl"
    assert decodes_alike(loaded, vae)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("names", ["diffusers", "ldm"])
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_a_single_file_is_loaded_whatever_its_names(tmp_path: Path, family: str, names: str, prefix: str) -> None:
    changes = {"use_quant_conv": False, "use_post_quant_conv": False} if family == "flux" else {}
    vae = small_kl(family, block_out_channels=(32, 64, 64, 96), layers_per_block=2, **changes)
    state = to_ldm(vae.state_dict(), 4) if names == "ldm" else vae.state_dict()
    other = {"model.diffusion_model.out.weight": torch.zeros(3)} if prefix else {}
    file = tmp_path / "some.safetensors"
    save_file({**{prefix + key: value.contiguous() for key, value in state.items()}, **other}, str(file))
    loaded = load_vae(str(file), family=family, device="cpu")
    assert decodes_alike(loaded, vae)
    assert loaded.family.key == family
    assert loaded.fingerprint == fingerprint(vae.state_dict())
    assert loaded.vae.config.scaling_factor == loaded.family.scaling_factor


def test_a_single_file_with_its_config_beside_it_needs_no_family(tmp_path: Path, loaded: LoadedVae) -> None:
    for file in DEMO_VAE.iterdir():
        shutil.copy(file, tmp_path)
    again = load_vae(str(tmp_path / "diffusion_pytorch_model.safetensors"), device="cpu")
    assert again.fingerprint == loaded.fingerprint


@pytest.mark.parametrize(("place", "size"), [("", "1GB"), ("vae", "1MB")], ids=["whole", "in shards"])
def test_a_hub_id_is_loaded_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, size: str) -> None:
    """The real loading code, offline: the cache is laid out as huggingface_hub lays it out."""
    import huggingface_hub.constants

    snapshot = tmp_path / "models--someone--some-vae" / "snapshots" / ("0" * 40)
    vae = small_kl("sd1")
    vae.save_pretrained(snapshot / place, max_shard_size=size)
    (tmp_path / "models--someone--some-vae" / "refs").mkdir()
    (tmp_path / "models--someone--some-vae" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    loaded = load_vae("someone/some-vae", device="cpu")
    assert decodes_alike(loaded, vae)
    assert loaded.current().model == "someone/some-vae"


def test_the_family_on_the_command_line_wins(tmp_path: Path) -> None:
    small_kl("sd1", scaling_factor=0.5).save_pretrained(tmp_path)
    assert load_vae(str(tmp_path), device="cpu").family.key == "custom"
    assert load_vae(str(tmp_path), family="sd1", device="cpu").family.key == "sd1"


@pytest.mark.parametrize(("family", "said"), [("sd3", True), ("flux", False)])
def test_a_family_that_is_not_the_configs_is_served_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, said: bool
) -> None:
    small_kl("flux").save_pretrained(tmp_path)
    assert load_vae(str(tmp_path), family=family, device="cpu").family.key == family
    assert [record.getMessage() for record in caplog.records if record.name == "remote_vae"] == (
        [f"--vae {tmp_path}: by its config it is of Flux, and it is served as that of SD 3"] if said else []
    )


def test_the_dtype_is_what_was_asked_for_and_the_fingerprint_the_same(loaded: LoadedVae) -> None:
    half = load_vae(str(DEMO_VAE), dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16
    assert half.fingerprints == loaded.fingerprints


def no_vae(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))


def pickle_only(folder: Path) -> None:
    small_kl("sd1").save_pretrained(folder, safe_serialization=False)


def other_class(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "os.system"}))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no VAE found"),
        (no_vae, "not a VAE's"),
        (other_class, "not a VAE's"),
        (pickle_only, "safetensors"),
    ],
)
def test_a_folder_without_a_safe_vae_is_refused(tmp_path: Path, prepare: object, message: str) -> None:
    prepare(tmp_path)  # type: ignore[operator]
    with pytest.raises(SettingsError, match=message):
        load_vae(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("no/such/folder/here", {}, "no such folder"),
        ("/no/such", {}, "no such folder"),
        (str(DEMO_VAE), {"dtype": "float8"}, "--dtype"),
        (str(DEMO_VAE), {"dtype": "uint8"}, "--dtype"),
        (str(DEMO_VAE), {"family": "sd77"}, "sd77"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(source: str, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_vae(source, **{"device": "cpu", **arguments})


def test_single_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in small_kl("sd1").state_dict().items()}
    file = tmp_path / "vae.safetensors"
    save_file(state, str(file))
    with pytest.raises(SettingsError, match="--family"):
        load_vae(str(file), device="cpu")
    with pytest.raises(SettingsError, match="16"):
        load_vae(str(file), family="flux", device="cpu")
    save_file({key: value for key, value in state.items() if "conv_out" not in key}, str(file))
    with pytest.raises(SettingsError, match="conv_out"):
        load_vae(str(file), family="sd1", device="cpu")
    save_file({"encoder.x": torch.zeros(1)}, str(file))
    with pytest.raises(SettingsError, match="no VAE"):
        load_vae(str(file), family="sd1", device="cpu")
    narrow = small_kl("sd1", block_out_channels=(8, 8, 8, 8), norm_num_groups=8)
    save_file({key: value.contiguous() for key, value in narrow.state_dict().items()}, str(file))
    with pytest.raises(SettingsError, match=r"config\.json beside"):
        load_vae(str(file), family="sd1", device="cpu")
    file.write_bytes(b"not safetensors")
    with pytest.raises(SettingsError):
        load_vae(str(file), family="sd1", device="cpu")
    (tmp_path / "vae.ckpt").write_bytes(b"")
    with pytest.raises(SettingsError, match="can run code"):
        load_vae(str(tmp_path / "vae.ckpt"), family="sd1", device="cpu")


# --- files as people have them -------------------------------------------------------------------------------------------


def contiguous(vae: diffusers.AutoencoderKL) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in vae.state_dict().items()}


def old_attention(state: dict[str, torch.Tensor], *, convolutions: bool) -> dict[str, torch.Tensor]:
    """As diffusers named it before 0.15."""
    renamed = {}
    for key, value in state.items():
        name = key
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
        renamed[name] = value[:, :, None, None] if convolutions and name != key and value.ndim == 2 else value
    return renamed


@pytest.mark.parametrize("name", ["vae.safetensors", "ae.sft", "VAE.SAFETENSORS"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_old_attention_names_and_endings_are_read(tmp_path: Path, name: str, convolutions: bool) -> None:
    vae = small_kl("sd1")
    save_file(old_attention(contiguous(vae), convolutions=convolutions), str(tmp_path / name))
    assert decodes_alike(load_vae(str(tmp_path / name), family="sd1", device="cpu"), vae)
    # And with its config beside it, which needs no family.
    (tmp_path / "config.json").write_text(vae.to_json_string())
    assert decodes_alike(load_vae(str(tmp_path / name), device="cpu"), vae)


def test_the_file_that_was_named_is_loaded_and_not_another_of_its_folder(tmp_path: Path) -> None:
    small_kl("sd1").save_pretrained(tmp_path)
    other = small_kl("sd1")
    with torch.no_grad():
        other.decoder.conv_out.bias += 0.25
    save_file(contiguous(other), str(tmp_path / "b.safetensors"))
    loaded = load_vae(str(tmp_path / "b.safetensors"), device="cpu")
    assert decodes_alike(loaded, other)
    assert loaded.current().model == "b.safetensors"
    assert loaded.fingerprint == fingerprint(other.state_dict())


@pytest.mark.parametrize("config", ['{"_class_name": "UNet2DModel"}', "{}", "[]", "no json", None])
def test_a_stray_config_beside_a_file_does_not_matter(tmp_path: Path, config: str | None) -> None:
    vae = small_kl("sd1")
    save_file(contiguous(vae), str(tmp_path / "vae.safetensors"))
    text = small_kl("sd1", block_out_channels=(32, 64, 32, 32)).to_json_string() if config is None else config
    (tmp_path / "config.json").write_text(text)
    assert decodes_alike(load_vae(str(tmp_path / "vae.safetensors"), family="sd1", device="cpu"), vae)
    with pytest.raises(SettingsError, match="--family" if config is not None else "config"):
        load_vae(str(tmp_path / "vae.safetensors"), device="cpu")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "some_vae.safetensors"])
def test_a_folder_whose_weights_have_another_name_is_loaded(tmp_path: Path, name: str) -> None:
    vae = small_kl("sd1")
    vae.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / name)
    assert decodes_alike(load_vae(str(tmp_path), device="cpu"), vae)


def test_a_file_that_is_no_weights_is_called_what_it_is(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(contiguous(small_kl("sd1")), str(whole))
    data = whole.read_bytes()
    file = tmp_path / "vae.safetensors"
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Sign in", "web page"),
        (data[:-10], "only a part"),
        (data[: len(data) // 2], "only a part"),
        (data[:200], "only a part"),
        (b"", "not a safetensors"),
        (b"PK\x03\x04" * 9, "not a safetensors"),
    ):
        file.write_bytes(content)
        with pytest.raises(SettingsError, match=message):
            load_vae(str(file), family="sd1", device="cpu")


# --- what is not served --------------------------------------------------------------------------------------------------


def test_a_folder_of_another_family_than_named_is_refused() -> None:
    with pytest.raises(SettingsError, match="4 latent channels at 8x, and the VAE of Flux"):
        load_vae(str(DEMO_VAE), family="flux", device="cpu")


def test_a_vae_that_scales_otherwise_than_the_family_named_is_refused(tmp_path: Path) -> None:
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    small_kl("sd1", block_out_channels=(32, 32), down_block_types=down, up_block_types=up).save_pretrained(tmp_path)
    assert load_vae(str(tmp_path), device="cpu").family.downscale == 2
    with pytest.raises(SettingsError, match="at 2x, and the VAE of SD 1"):
        load_vae(str(tmp_path), family="sd1", device="cpu")


# --- devices and the hub -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
def test_a_device_that_cannot_be_used_is_one_line(device: str) -> None:
    with pytest.raises(SettingsError, match=f"--device {device}") as caught:
        load_vae(str(DEMO_VAE), device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("there", "chosen"), [((), "cpu"), (("mps",), "mps"), (("xpu",), "xpu"), (("xpu", "cuda"), "cuda")])
def test_the_first_gpu_that_is_there_is_taken(there: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "xpu" in there:
        skip_if(before_torch(2, 3, "torch.xpu"))
    for kind in ("cuda", *(["xpu"] if hasattr(torch, "xpu") else [])):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda kind=kind: kind in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    # There is none here, so that the choice is known by what it fails with.
    if chosen == "cpu":
        assert load_vae(str(DEMO_VAE)).device.type == "cpu"
    else:
        with pytest.raises(SettingsError, match=f"--device {chosen} cannot be used"):
            load_vae(str(DEMO_VAE))


def test_a_hub_id_without_a_network_is_one_line(tmp_path: Path) -> None:
    """The hub's own client tries again for half a minute."""
    code = "from remote_vae.cli import main; raise SystemExit(main(['serve', '--vae', 'someone/some-vae', '--port', '0']))"
    # A port where nobody listens.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "someone/some-vae: not on this machine" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Retrying" not in result.stderr
