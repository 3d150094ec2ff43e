from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from remote_vae import rescue
from remote_vae.errors import InvalidRequest
from remote_vae.rescue import load_latents, save
from remote_vae.vae.families import family_of, find_family, recognise
from tests.vaes import small_vae

POSIX = pytest.mark.skipif(os.name != "posix", reason="about what POSIX systems do")
# Where no folder can be made.
NOWHERE = "/proc/none" if os.name == "posix" else "C:/no<such>folder"
SD1 = find_family("sd1")
ZEROS = torch.zeros(1, 4, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rescued_latents_come_back_bit_equal_with_their_family(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = torch.randn(2, 4, 6, 8).to(dtype).transpose(2, 3)
    path = save(latents, find_family("sdxl"), [tmp_path / "new" / "folder"], "out of memory")
    assert path.parent == tmp_path / "new" / "folder"
    back = load_latents(path)
    assert torch.equal(back.latents, latents)
    assert back.family == find_family("sdxl")


def test_the_factors_of_a_custom_vae_are_kept(tmp_path: Path) -> None:
    family = recognise(latent_channels=4, scaling_factor=0.08489, shift_factor=0.5)
    assert load_latents(save(ZEROS, family, [tmp_path], "")).family == family


@pytest.mark.parametrize("name", ["wan22-5b", "qwen-image-2.1", "ltx", "cogvideox", "flux2"])
def test_all_numbers_of_a_vae_are_kept(tmp_path: Path, name: str) -> None:
    """Mean and deviation are those of the VAE that made the latents, which are not always the family's."""
    family = family_of(small_vae(name))
    frames = (2,) if family.video else ()
    latents = torch.randn(1, family.latent_channels, *frames, 3, 4)
    rescued = load_latents(save(latents, family, [tmp_path], "because"))
    assert torch.equal(rescued.latents, latents)
    assert rescued.family == family
    custom = replace(family, key="custom", label="custom VAE", latents_mean=(0.5,) * family.latent_channels)
    again = load_latents(save(latents, custom, [tmp_path], "because")).family
    assert (again.shape, again.latents_mean, again.is_known) == (custom.shape, custom.latents_mean, False)


def test_nothing_rescued_before_is_overwritten_by_however_many_at_once(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=save, args=(torch.full((1, 4, 2, 2), float(number)), SD1, [tmp_path], ""))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = list(tmp_path.iterdir())
    assert sorted(float(load_latents(path).latents.mean()) for path in files) == list(range(8))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """The home, the working folder and the temporary folder, each by its name."""
    made = {name: tmp_path / name for name in ("home", "working", "temporary")}
    for folder in made.values():
        folder.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(made["home"]))
    monkeypatch.chdir(made["working"])
    monkeypatch.setattr(tempfile, "tempdir", str(made["temporary"]))
    return made


def unusable(folder: Path) -> Path:
    """A file where the folder should be: that stops root as well."""
    if folder.is_dir():
        folder.rmdir()
    folder.write_bytes(b"")
    return folder


def test_the_places_are_tried_in_turn(places: dict[str, Path], tmp_path: Path) -> None:
    wanted, data = tmp_path / "set", tmp_path / "data"
    assert save(ZEROS, SD1, [wanted, data], "").parent == wanted
    shutil.rmtree(wanted)
    unusable(wanted)
    assert save(ZEROS, SD1, [wanted, data], "").parent == data
    shutil.rmtree(data)
    unusable(data)
    for name, folder in places.items():
        path = save(ZEROS, SD1, [wanted, data], "")
        assert path.parent == folder / rescue.FOLDER, name
        assert torch.equal(load_latents(path).latents, ZEROS)
        shutil.rmtree(path.parent)
        unusable(path.parent)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "set"))) as caught:
        save(ZEROS, SD1, [wanted, data], "")
    for folder in (wanted, data, *places.values()):
        assert str(folder) in str(caught.value)


def test_the_home_may_be_written_as_a_tilde(places: dict[str, Path]) -> None:
    assert save(ZEROS, SD1, ["~/kept"], "").parent == places["home"] / "kept"


@pytest.mark.parametrize("folder", ["\0", "~nobody-of-this-name/x", NOWHERE, "x" * 5000])
def test_a_folder_that_cannot_be_is_the_next_one(places: dict[str, Path], folder: str) -> None:
    assert save(ZEROS, SD1, [folder], "").parent == places["home"] / rescue.FOLDER


@POSIX
def test_without_a_home_and_with_no_working_folder_the_temporary_one_is_left(places: dict[str, Path]) -> None:
    """As in a container that runs under a uid without an entry in passwd; in a process of its own."""
    code = (
        "import os, pwd, sys, torch; from remote_vae.rescue import save; from remote_vae.vae.families import find_family\n"
        "pwd.getpwuid = lambda uid: {}[uid]\n"
        "gone = sys.argv[1] + '/gone'; os.mkdir(gone); os.chdir(gone); os.rmdir(gone)\n"
        "print(save(torch.zeros(1, 4, 2, 2), find_family('sd1'), ['~/kept', 'kept'], ''))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HOME"}
    environment |= {"TMPDIR": str(places["temporary"]), "PYTHONPATH": str(Path(rescue.__file__).parent.parent)}
    command = [sys.executable, "-c", code, str(places["temporary"])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    path = Path(result.stdout.strip())
    assert path.parent == places["temporary"] / rescue.FOLDER
    assert load_latents(path).family == SD1


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """A file takes ``room`` bytes and no more."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@POSIX
def test_a_disk_that_gets_full_keeps_no_piece_of_a_file(places: dict[str, Path], tmp_path: Path) -> None:
    latents = torch.randn(1, 4, 64, 64)
    with full_disk(1000), pytest.raises(OSError, match="too large"):
        save(latents, SD1, [tmp_path / "set"], "")
    for folder in (tmp_path / "set", *(folder / rescue.FOLDER for folder in places.values())):
        assert list(folder.iterdir()) == []


@POSIX
def test_writing_over_a_file_that_fails_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rescue.write(ZEROS, SD1, path, "")
    with full_disk(1000), pytest.raises(OSError, match="too large"):
        rescue.write(torch.randn(1, 4, 64, 64), SD1, path, "")
    assert torch.equal(load_latents(path).latents, ZEROS)
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_for_a_file_runs_in_a_shell_wherever_that_stands(tmp_path: Path) -> None:
    folder = tmp_path / ("it's a $folder; with all &c" if os.name == "nt" else 'it\'s a $folder; with "all" &c')
    path = save(ZEROS, SD1, [folder], "")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        rescue.command(path), shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    # It has read the file, and lacks but somebody who decodes.
    assert result.returncode == 1
    assert result.stderr.startswith("remote-vae: nothing to decode with")


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


@pytest.mark.parametrize("factors", ["5", "null", "[4]", '[4, 8, "x", 0]', "[4, 8, [], 0]", "[" * 9000])
def test_factors_that_are_none_are_said_to_be_unreadable(tmp_path: Path, factors: str) -> None:
    from safetensors.torch import save_file

    metadata = {"format": rescue.FORMAT, "family": "custom", "factors": factors}
    save_file({"latents": ZEROS}, str(tmp_path / "x.safetensors"), metadata=metadata)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_latents(tmp_path / "x.safetensors")
