from __future__ import annotations

import diffusers
import pytest

from remote_vae.errors import SettingsError, UnsupportedLayout
from remote_vae.vae.families import family_of, find_family, load_families, public_max_pixels, recognise
from tests.vaes import small_kl, tiny_video
from tests.versions import of_diffusers

# facts of the protocol: channels, scaling, shift, model, endpoint names
TABLE = {
    "sd1": (4, 0.18215, 0.0, "stabilityai/sd-vae-ft-mse", "q1bj3bpq6kzilnsu", "qc6479g0aac6qwy9"),
    "sdxl": (4, 0.13025, 0.0, "madebyollin/sdxl-vae-fp16-fix", "x2dmsqunjd6k9prw", "xjqqhmyn62rog84g"),
    "flux": (16, 0.3611, 0.1159, "black-forest-labs/FLUX.1-schnell", "whhx50ex1aryqvw6", "ptccx55jz97f9zgo"),
    "hunyuan-video": (16, 0.476986, 0.0, "hunyuanvideo-community/HunyuanVideo", "o7ywnmrahorts457", ""),
}


@pytest.mark.parametrize("key", sorted(TABLE))
def test_the_families_of_the_public_endpoints_are_the_protocols(key: str) -> None:
    channels, scaling, shift, vae, decode, encode = TABLE[key]
    family = load_families()[key]
    assert (family.latent_channels, family.scaling_factor, family.shift_factor, family.vae) == (channels, scaling, shift, vae)
    for op, name in (("decode", decode), ("encode", encode)):
        url = f"https://{name}.us-east-1.aws.endpoints.huggingface.cloud/" if name else ""
        assert family.public_endpoint(op) == url
    assert public_max_pixels() == 2048 * 2048


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("sd2", "sd1"), ("pixart-alpha", "sd1"), ("pixart-sigma", "sdxl"), ("hunyuandit", "sdxl"), ("auraflow", "sdxl"),
        ("omnigen", "sdxl"), ("hidream", "flux"), ("chroma", "flux"), ("z-image", "flux"), ("lumina2", "flux"),
        ("Flux", "flux"),
    ],
)  # fmt: skip
def test_a_model_that_shares_a_vae_finds_its_family(model: str, family: str) -> None:
    assert find_family(model).key == family


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"sd9.*sd1.*sdxl"):
        find_family("sd9")


@pytest.mark.parametrize("key", ["sd1", "sdxl", "sd3", "flux"])
def test_a_vae_is_recognised_by_its_config(key: str) -> None:
    assert family_of(small_kl(key)) == find_family(key)


def test_a_video_vae_is_recognised_as_such() -> None:
    assert family_of(tiny_video().vae) == find_family("hunyuan-video")


def test_a_class_that_was_made_of_a_known_one_is_recognised() -> None:
    class Own(diffusers.AutoencoderKL):
        pass

    vae = small_kl("flux")
    vae.__class__ = Own
    assert family_of(vae).key == "flux"


def test_factors_are_the_vaes_own_and_not_the_tables() -> None:
    mean, std = [0.5] * 16, [2.0] * 16
    vae = of_diffusers("AutoencoderKLWan")(base_dim=8, num_res_blocks=1, latents_mean=mean, latents_std=std)
    family = family_of(vae)
    assert family.key == "qwen-image"
    assert (family.latents_mean, family.latents_std) == (tuple(mean), tuple(std))


def test_a_vae_whose_latents_are_scaled_by_mean_and_deviation_is_not_taken_for_one_with_a_factor() -> None:
    """Playground 2.5's, in the class and shape of SDXL's."""
    family = family_of(small_kl("sdxl", latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 3.0, 4.0)))
    assert not family.is_known
    assert family.latents_std == (1.0, 2.0, 3.0, 4.0)


def test_mean_and_deviation_among_the_weights_count() -> None:
    widths = (8, 8, 8, 8)
    vae = diffusers.AutoencoderKLLTXVideo(
        block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    vae.latents_std.fill_(3.0)
    assert family_of(vae).latents_std == (3.0,) * 128


@pytest.mark.parametrize(("name", "why"), [("AutoencoderKLAllegro", "tiles"), ("VQModel", "codebook")])
def test_what_cannot_be_done_remotely_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(UnsupportedLayout, match=why):
        family_of(type(name, (), {"config": {}})())


def test_what_is_not_known_is_refused_with_the_list_of_what_is() -> None:
    with pytest.raises(UnsupportedLayout, match=r"AutoencoderOobleck.*AutoencoderDC.*AutoencoderKLWan"):
        family_of(type("AutoencoderOobleck", (), {"config": {"latent_channels": 4, "scaling_factor": 1.0}})())


def test_a_vae_with_factors_of_its_own_is_custom_and_keeps_them() -> None:
    family = recognise(latent_channels=4, scaling_factor=0.08489, shift_factor=None)
    assert not family.is_known
    assert family.scaling_factor == 0.08489
    assert family.public_endpoint("decode") == ""


def test_the_files_of_a_family_are_names_in_lower_case_without_ending() -> None:
    for family in load_families().values():
        for file in family.files:
            assert file == file.lower()
            assert family.is_standard_file(file)
            assert family.is_standard_file(f"VAE/{file}.safetensors")
            assert not family.is_standard_file(f"my-{file}.safetensors")
