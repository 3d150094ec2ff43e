from __future__ import annotations

from pathlib import Path

import pytest
import torch

from remote_vae.errors import InvalidRequest
from remote_vae.rescue import load_latents, save_latents
from remote_vae.vae.families import find_family, recognise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rescued_latents_come_back_bit_equal_with_their_family(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = torch.randn(2, 4, 6, 8).to(dtype).transpose(2, 3)
    path = save_latents(latents, find_family("sdxl"), tmp_path / "new" / "folder", "out of memory")
    back = load_latents(path)
    assert torch.equal(back.latents, latents)
    assert back.family == find_family("sdxl")


def test_the_factors_of_a_custom_vae_are_kept(tmp_path: Path) -> None:
    family = recognise(latent_channels=4, scaling_factor=0.08489, shift_factor=0.5)
    assert load_latents(save_latents(torch.zeros(1, 4, 2, 2), family, tmp_path, "")).family == family


def test_nothing_rescued_before_is_overwritten(tmp_path: Path) -> None:
    paths = {save_latents(torch.full((1, 4, 2, 2), float(n)), find_family("sd1"), tmp_path, "") for n in range(5)}
    assert len(paths) == 5
    assert sorted(float(load_latents(path).latents.mean()) for path in paths) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("data", [b"", b"not safetensors", b"\xff" * 64])
def test_a_file_that_is_not_ours_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_latents(tmp_path / "x.safetensors")
    with pytest.raises(InvalidRequest):
        load_latents(tmp_path / "missing.safetensors")


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(InvalidRequest, match="does not hold latents"):
        load_latents(tmp_path / "x.safetensors")
