from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from remote_vae.errors import SettingsError
from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.vae.fingerprint import fingerprint
from tests.conftest import DEMO_VAE
from tests.vaes import small_kl


def to_ldm(state: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """diffusers' names as the original checkpoints have them, attention as 1 x 1 convolutions."""
    renamed = {}
    for key, value in state.items():
        name = key
        for index in range(levels):
            for part in ("block", "downsample", "upsample"):
                plural = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}[part]
                name = name.replace(f"encoder.down_blocks.{index}.{plural}", f"encoder.down.{index}.{part}")
                name = name.replace(f"decoder.up_blocks.{index}.{plural}", f"decoder.up.{levels - 1 - index}.{part}")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace(
            "mid_block.attentions.0", "mid.attn_1"
        )
        for new, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(f"attn_1.{new}", f"attn_1.{old}")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        convolution = ".attn_1." in name and value.ndim == 2
        renamed[name] = value[:, :, None, None] if convolution else value
    return renamed


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


def test_a_hub_id_is_loaded_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loading code, offline: the cache is laid out as huggingface_hub lays it out."""
    import huggingface_hub.constants

    snapshot = tmp_path / "models--someone--some-vae" / "snapshots" / ("0" * 40)
    vae = small_kl("sd1")
    vae.save_pretrained(snapshot)
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
    with pytest.raises(SettingsError, match=r"config\.json"):
        load_vae(str(file), family="sd1", device="cpu")
    file.write_bytes(b"not safetensors")
    with pytest.raises(SettingsError):
        load_vae(str(file), family="sd1", device="cpu")
    (tmp_path / "vae.ckpt").write_bytes(b"")
    with pytest.raises(SettingsError, match="can run code"):
        load_vae(str(tmp_path / "vae.ckpt"), family="sd1", device="cpu")
