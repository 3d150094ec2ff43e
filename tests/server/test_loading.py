"""Every family of families.toml is loaded from whatever people have it in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from remote_vae.errors import SettingsError
from remote_vae.server.models import LoadedVae, load_vae
from remote_vae.server.weights import reading
from remote_vae.vae.at_work import whole_diffusers
from remote_vae.vae.families import family_of, load_families
from remote_vae.vae.fingerprint import fingerprint
from tests.original_names import ORIGINAL
from tests.vaes import SMALL, small_vae
from tests.versions import of_diffusers

# Which one of several with the same names and shapes it is, a file does not say.
ALIKE = {name: name for name in ("sd1", "sdxl", "sd3", "flux", "hunyuan-video-1.5", "hunyuan-image-refiner")}
FILES = [(name, "diffusers") for name in SMALL] + list(ORIGINAL)
# Of one VAE diffusers has two classes.
SAME_CLASS = {"AutoencoderKLQwenImage": "AutoencoderKLWan"}


def in_file(folder: Path, vae: Any, name: str, naming: str, file: str = "some.safetensors") -> Path:
    state = vae.state_dict() if naming == "diffusers" else ORIGINAL[name, naming](vae.state_dict())
    path = folder / file
    save_file({key: value.contiguous().clone() for key, value in state.items()}, str(path))
    return path


def plain(config: Any) -> dict[str, Any]:
    """Without what diffusers notes beside it, and lists as they come out of a file."""
    entries = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return dict(json.loads(json.dumps(entries)))


def assert_same(loaded: LoadedVae, vae: Any) -> None:
    """Weights, fingerprint, family and picture are those of ``vae``, to the bit."""
    # As from_pretrained has it: matrix products are folded otherwise without, and differ in the last bit.
    vae.requires_grad_(True)
    state, theirs = vae.state_dict(), loaded.vae.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in state.items())
    assert loaded.fingerprint == fingerprint(state)
    assert loaded.family == family_of(vae)
    family = loaded.family
    frames = (2,) if family.video and family.frame_scale > 1 else (1,) if family.video else ()
    latents = torch.randn(1, family.latent_channels, *frames, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(whole_diffusers(loaded.vae, "decode", latents), whole_diffusers(vae, "decode", latents))


@pytest.mark.parametrize(("name", "naming"), FILES)
def test_a_single_file_is_enough_whatever_its_names(tmp_path: Path, name: str, naming: str) -> None:
    vae = small_vae(name)
    if name == "wan22-5b":
        # Mean and deviation are no weights: those of a file are the published ones.
        known = load_families()[name]
        vae = small_vae(name, latents_mean=list(known.latents_mean), latents_std=list(known.latents_std))
    loaded = load_vae(str(in_file(tmp_path, vae, name, naming)), family=ALIKE.get(name), device="cpu")
    kind = type(vae).__name__
    assert type(loaded.vae).__name__ == SAME_CLASS.get(kind, kind)
    if kind not in SAME_CLASS:
        assert plain(loaded.vae.config) == plain(vae.config)
    assert_same(loaded, vae)


@pytest.mark.parametrize("name", SMALL)
def test_a_folder_of_shards_is_what_from_pretrained_makes_of_it(tmp_path: Path, name: str) -> None:
    small_vae(name).save_pretrained(tmp_path / "vae", max_shard_size="400KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1 or name == "sana"
    loaded = load_vae(str(tmp_path), device="cpu")
    vae = getattr(diffusers, type(loaded.vae).__name__).from_pretrained(tmp_path / "vae")
    assert plain(loaded.vae.config) == plain(vae.config)
    assert_same(loaded, vae.eval())


@pytest.mark.parametrize(("name", "others"), [("sd1", "sd1 or sdxl"), ("flux", "sd3 or flux")])
def test_what_a_file_does_not_say_is_asked_for(tmp_path: Path, name: str, others: str) -> None:
    with pytest.raises(SettingsError, match=f"{others}; add --family"):
        load_vae(str(in_file(tmp_path, small_vae(name), name, "diffusers")), device="cpu")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("flux", "ae.safetensors"),
        ("flux", "ae.sft"),
        ("sdxl", "sdxl_vae.safetensors"),
        ("sd1", "vae-ft-mse-840000-ema-pruned.safetensors"),
        ("hunyuan-video-1.5", "hunyuanvideo15_vae_fp16.safetensors"),
    ],
)
def test_the_usual_name_of_a_file_says_it(tmp_path: Path, name: str, file: str) -> None:
    loaded = load_vae(str(in_file(tmp_path, small_vae(name), name, "diffusers", file)), device="cpu")
    assert loaded.family.key == name


@pytest.mark.parametrize(
    ("family", "beside"),
    [
        ("sd1", "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"),
        ("sd3", "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"),
        ("flux", "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"),
    ],
)
def test_the_model_beside_it_in_a_checkpoint_says_it(tmp_path: Path, family: str, beside: str) -> None:
    vae = small_vae(family)
    state = {f"first_stage_model.{key}": value.contiguous() for key, value in vae.state_dict().items()}
    # A name that speaks for another family is not asked.
    file = tmp_path / ("sdxl_vae.safetensors" if family == "sd1" else "ae.safetensors")
    save_file({**state, beside: torch.zeros(3)}, str(file))
    assert_same(load_vae(str(file), device="cpu"), vae)
    # Playground 2.5 has SDXL's shape, and factors of its own.
    save_file({**state, beside: torch.zeros(3), "edm_mean": torch.zeros(4)}, str(file))
    with pytest.raises(SettingsError, match="--family"):
        load_vae(str(file), device="cpu")


def test_a_file_that_does_not_say_how_its_latents_are_scaled_is_served_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CogVideoX 2B and 5B scale the latents of one VAE."""
    file = in_file(tmp_path, small_vae("cogvideox"), "cogvideox", "diffusers")
    assert load_vae(str(file), device="cpu").family.scaling_factor == 1.15258426
    assert "some.safetensors does not say which model it is of: latents are scaled by 1.15258426" in caplog.text
    caplog.clear()
    (tmp_path / "config.json").write_text(small_vae("cogvideox", scaling_factor=0.7).to_json_string())
    assert load_vae(str(file), device="cpu").family.scaling_factor == 0.7
    assert not caplog.records


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_taesd_in_two_files_is_loaded_from_either(tmp_path: Path, half: str) -> None:
    vae = small_vae("taesd")
    parts: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}}
    for key, value in ORIGINAL["taesd", "ComfyUI"](vae.state_dict()).items():
        side, _, rest = key.removeprefix("taesd_").partition(".")
        parts.get(side, {})[rest] = value.contiguous()
    file = tmp_path / f"taesd_{half}.safetensors"
    save_file(parts[half], str(file))
    other = "encoder" if half == "decoder" else "decoder"
    with pytest.raises(SettingsError, match=f"put its {other} beside it as taesd_{other}.safetensors"):
        load_vae(str(file), device="cpu")
    save_file(parts[other], str(tmp_path / f"taesd_{other}.safetensors"))
    assert_same(load_vae(str(file), device="cpu"), vae)


@pytest.mark.parametrize(("name", "family"), [("flux2", "flux"), ("wan", "wan22-5b"), ("sana", "sdxl"), ("taesd", "sd1")])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_another_family_than_it_can_be_is_refused(tmp_path: Path, name: str, family: str, where: str) -> None:
    vae = small_vae(name)
    source = in_file(tmp_path, vae, name, "diffusers")
    if where == "folder":
        source.unlink()
        vae.save_pretrained(tmp_path)
        source = tmp_path
    with pytest.raises(SettingsError, match=r"and the VAE of .* is an"):
        load_vae(str(source), family=family, device="cpu")


def test_a_decoder_that_wants_more_than_latents_is_refused_with_the_reason(tmp_path: Path) -> None:
    """LTX-Video since 0.9.1, whose decoder takes a time step as well."""
    vae = small_vae("ltx", timestep_conditioning=True)
    with pytest.raises(SettingsError, match=r"0\.9\.1 or later, whose decoder wants a time step"):
        load_vae(str(in_file(tmp_path, vae, "ltx", "diffusers")), device="cpu")
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(SettingsError, match="does not make pictures of latents"):
        load_vae(str(tmp_path / "vae"), device="cpu")


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("VQModel", {}, "not a VAE's"),
        ("AutoencoderKLMagvit", {"block_out_channels": (32,) * 2, "layers_per_block": 1}, "overlap in time"),
        ("AutoencoderOobleck", {"encoder_hidden_size": 4, "decoder_channels": 4}, "Those are .*AutoencoderKLWan"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_can_be(
    tmp_path: Path, kind: str, arguments: dict[str, Any], message: str
) -> None:
    if kind == "AutoencoderKLMagvit":
        arguments |= {
            "down_block_types": ("SpatialTemporalDownBlock3D",) * 2,
            "up_block_types": ("SpatialUpBlock3D",) * 2,
        }
    of_diffusers(kind)(**arguments).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=message):
        load_vae(str(tmp_path), device="cpu")


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize(("name", "naming"), list(ORIGINAL))
def test_a_half_of_a_vae_is_refused(tmp_path: Path, name: str, naming: str, half: str) -> None:
    state = ORIGINAL[name, naming](small_vae(name).state_dict())
    left = {key: value.contiguous().clone() for key, value in state.items() if half not in key}
    save_file(left, str(tmp_path / "some.safetensors"))
    with pytest.raises(SettingsError, match="--vae"):
        load_vae(str(tmp_path / "some.safetensors"), family=ALIKE.get(name))


def test_shards_that_are_not_whole_or_elsewhere_are_refused(tmp_path: Path) -> None:
    small_vae("flux2").save_pretrained(tmp_path, max_shard_size="1MB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(SettingsError, match=first.name):
        load_vae(str(tmp_path), device="cpu")
    first.write_bytes(content)
    whole = index.read_text()
    for broken, message in (
        (whole.replace(first.name, f"../{tmp_path.name}/{first.name}"), "outside its own folder"),
        (whole[:100], "not the index"),
        ("[]", "not the index"),
        ('{"weight_map": {}}', "lacks|no VAE"),
    ):
        index.write_text(broken)
        with pytest.raises(SettingsError, match=message):
            load_vae(str(tmp_path), device="cpu")


def test_of_a_checkpoint_only_the_vae_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = reading._load

    def noting(path: Path, keys: list[str]) -> dict[str, torch.Tensor]:
        read.extend(keys)
        return load(path, keys)

    monkeypatch.setattr(reading, "_load", noting)
    state = {f"first_stage_model.{key}": value.contiguous() for key, value in small_vae("sdxl").state_dict().items()}
    save_file({**state, "conditioner.embedders.0.weight": torch.zeros(9)}, str(tmp_path / "model.safetensors"))
    load_vae(str(tmp_path / "model.safetensors"), device="cpu")
    assert sorted(read) == sorted(state)
