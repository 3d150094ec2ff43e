"""The checkpoints that contributors make for real hosts: ``python -m tests.e2e.checkpoints``."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open

from remote_vae.server.models import LoadedVae, load_vae
from tests.e2e.checkpoints import files, folders, parts, tokenizers
from tests.e2e.checkpoints.__main__ import main, settings
from tests.e2e.checkpoints.kinds import Made
from tests.e2e.checkpoints.parts import TINY, VOCABULARY
from tests.versions import of_diffusers

SEED = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1 as one file and as a folder."""
    out = tmp_path_factory.mktemp("checkpoints")
    files.save(out / "sd1.safetensors", files.sd1(TINY, SEED))
    folders.sd1(out / "sd1", SEED)
    return out


def pictures(pipe: diffusers.DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    made = pipe("a cat", height=64, width=64, num_inference_steps=2, output_type="pt", generator=generator).images
    assert isinstance(made, torch.Tensor)
    return made


def round_trip(loaded: LoadedVae) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a picture of coarse colours, and what is made of them."""
    torch.manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.randn(1, 3, 8, 8), size=64, mode="bicubic").clamp(-1, 1)
    if loaded.family.video:
        picture = picture[:, :, None]
    with torch.inference_mode():
        latents = loaded.vae.encode(picture).latent_dist.mean
        return latents, loaded.vae.decode(latents).sample


def test_a_file_of_sd_1_and_the_folder_of_the_same_seed_have_one_vae(made: Path) -> None:
    file, folder = load_vae(str(made / "sd1.safetensors"), family="sd1"), load_vae(str(made / "sd1"))
    assert (file.family.key, folder.family.key) == ("sd1", "sd1")
    assert file.fingerprints == folder.fingerprints


def test_what_reads_published_files_of_sd_1_makes_the_pictures_of_the_folder(made: Path) -> None:
    folder, file = str(made / "sd1"), str(made / "sd1.safetensors")
    expected = pictures(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    assert torch.equal(pictures(diffusers.StableDiffusionPipeline.from_single_file(file, config=folder)), expected)
    assert expected.std() > 0.05


def test_what_reads_published_files_of_sdxl_makes_the_pictures_of_the_folder(tmp_path: Path) -> None:
    second = {**TINY.text, "hidden_act": "gelu", "hidden_size": 96, "projection_dim": 96}
    file = files.save(tmp_path / "xl.safetensors", files.sdxl(SEED, second))
    folder = folders.sdxl(tmp_path / "xl", SEED, second)
    expected = pictures(diffusers.StableDiffusionXLPipeline.from_pretrained(folder))
    assert torch.equal(pictures(diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder))), expected)
    assert load_vae(str(file), family="sdxl").fingerprints == load_vae(str(folder)).fingerprints


@pytest.mark.parametrize("family", ["sd1", "flux", "flux2", "qwen-image"])
def test_latents_and_pictures_of_the_vaes_have_the_spread_of_real_ones(family: str, tmp_path: Path) -> None:
    if family == "flux2":
        of_diffusers("AutoencoderKLFlux2")
        vae = parts.flux2_vae(TINY.vae, TINY.vae, 1, SEED)
    elif family == "qwen-image":
        of_diffusers("AutoencoderKLQwenImage")
        vae = parts.other_vae("AutoencoderKLQwenImage", SEED, base_dim=8)
    else:
        vae = parts.kl_vae(TINY, family, SEED)
    vae.save_pretrained(tmp_path)
    loaded = load_vae(str(tmp_path))
    latents, pixels = round_trip(loaded)
    assert loaded.family.key == family
    assert latents.isfinite().all()
    assert 0.3 < latents.std() * loaded.family.scaling_factor < 6.0
    assert 0.1 < pixels.std() < 0.8
    # No more than half of it is cut off at black and white.
    assert (pixels.abs() < 1).float().mean() > 0.5


def test_the_tokenizer_tells_all_texts_apart_and_has_no_number_that_the_text_encoder_does_not_know(tmp_path: Path) -> None:
    tokenizer = tokenizers.clip(tmp_path)
    numbers = tokenizer("a cat é 猫").input_ids
    assert tokenizer.decode(numbers, skip_special_tokens=True).strip() == "a cat é 猫"
    assert (numbers[0], numbers[-1]) == (TINY.text["bos_token_id"], TINY.text["eos_token_id"])
    assert len(tokenizer) == VOCABULARY == TINY.text["vocab_size"]


def test_a_text_has_a_mean_that_hosts_can_divide_by() -> None:
    encoded = parts.text_encoder(TINY.text, SEED)(torch.tensor([[*range(76), TINY.text["eos_token_id"]]])).last_hidden_state
    assert encoded.mean().abs() > 0.01


def test_a_seed_makes_the_same_weights_again_and_another_seed_others() -> None:
    first, again, other = (parts.kl_vae(TINY, "sd1", seed).decoder.conv_out.weight for seed in (SEED, SEED, SEED + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_host_gets_its_files_where_it_looks_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a1111", str(tmp_path)]) == 0
    checkpoint = tmp_path / "models" / "Stable-diffusion" / "tiny-a.safetensors"
    assert f"remote-vae serve --vae {checkpoint} --family sd1" in capsys.readouterr().out
    with safe_open(checkpoint, "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"model", "first_stage_model", "cond_stage_model"}  # noqa: SIM118
    config = json.loads((tmp_path / "configs" / "v1-inference.yaml").read_text())["model"]["params"]
    text = Path(config["cond_stage_config"]["params"]["version"])
    assert json.loads((text / "config.json").read_text())["vocab_size"] == len(json.loads((text / "vocab.json").read_text()))
    assert json.loads((tmp_path / "config.json").read_text())["sd_model_checkpoint"] == checkpoint.name


def test_settings_that_a_host_has_are_left_alone_and_it_is_said_what_they_need(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    said = settings(config, Made((), tmp_path, "", "", {"sd_model_checkpoint": "tiny-a.safetensors"}))
    assert config.read_text() == "{}"
    assert '"sd_model_checkpoint": "tiny-a.safetensors"' in said
