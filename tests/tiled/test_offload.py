"""Strips of a processor that find no room, in files."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from remote_vae import tiled
from remote_vae.errors import CallCancelled, OutOfMemory
from remote_vae.tiled import offload
from remote_vae.tiled.offload import TemporaryFiles
from tests.layouts import plain_kl
from tests.tiled.strips import cut_strips

LINUX = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is open without a name can be read on Linux only")
# So little that most strips go into files.
LITTLE = 3_000_000


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(offload, "_is_memory", lambda folder: False)
    return tmp_path


@pytest.fixture
def files() -> Iterator[TemporaryFiles]:
    made = TemporaryFiles()
    yield made
    made.close()


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    cut_strips(monkeypatch, 32 << 10)
    return torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(1))


def open_files() -> list[str]:
    """What this process has open without a name."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [link for link in links if "(deleted)" in link]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_strip_comes_back_as_it_was(files: TemporaryFiles, dtype: torch.dtype, order: torch.memory_format) -> None:
    picture = torch.randn(1, 6, 9, 7).to(dtype).to(memory_format=order)
    # Whole, rows cut out of it, and one row.
    strips = [picture, picture[:, :, 2:5], picture[:, :, :1]]
    stored = [files.put(strip) for strip in strips]
    # In any order, and more than once.
    for index in (2, 0, 1, 1):
        fetched = files.fetch(stored[index])
        assert fetched.dtype == dtype
        assert fetched.is_contiguous(memory_format=order)
        assert torch.equal(fetched, strips[index])


@LINUX
def test_what_nobody_waits_for_any_more_goes_from_the_disk(files: TemporaryFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    strip = torch.ones(1, 4, 8, 8)
    monkeypatch.setattr(offload, "_FILE_BYTES", 4 * strip.nbytes)
    stored = [files.put(strip * index) for index in range(20)]
    before = len(open_files())
    for each in stored[:10]:
        files.drop(each)
    assert len(open_files()) == before - 2
    assert torch.equal(files.fetch(stored[10]), strip * 10)


@LINUX
def test_files_have_no_name_while_they_are_used_and_are_gone_after_it(folder: Path, latents: torch.Tensor) -> None:
    seen: set[tuple[bool, tuple[str, ...]]] = set()
    before = open_files()

    def note(done: float) -> None:
        seen.add((len(open_files()) > len(before), tuple(os.listdir(folder))))

    tiled.decode(plain_kl(), latents, max_bytes=LITTLE, progress=note)
    assert (True, ()) in seen
    assert all(not names for _, names in seen)
    assert open_files() == before


@LINUX
def test_a_call_that_is_cancelled_leaves_no_file_open(latents: torch.Tensor) -> None:
    before = open_files()
    with pytest.raises(CallCancelled) as error:
        tiled.decode(plain_kl(), latents, max_bytes=LITTLE, cancelled=lambda: len(open_files()) > len(before))
    # Also while the error's frames are alive.
    assert error.value.__traceback__ is not None
    assert open_files() == before


def test_where_nothing_can_be_written_the_message_says_what_would_help(
    latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(offload, "_folders", lambda: [str(folder / "missing")])
    with pytest.raises(OutOfMemory, match="TMPDIR"):
        tiled.decode(plain_kl(), latents, max_bytes=LITTLE)


@LINUX
def test_a_disk_that_is_full_is_no_error_of_its_own_and_leaves_nothing(latents: torch.Tensor, folder: Path) -> None:
    import resource

    before = open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_001, hard))
    try:
        with pytest.raises(OutOfMemory, match=re.escape(str(folder))) as error:
            tiled.decode(plain_kl(), latents, max_bytes=LITTLE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.__traceback__ is not None
    assert open_files() == before


def test_others_keep_some_room_on_the_disk(files: TemporaryFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_DISK_RESERVE", 1 << 60)
    with pytest.raises(OutOfMemory, match="left free"):
        files.put(torch.ones(1, 1, 1, 1))


@pytest.mark.skipif(sys.platform != "linux" or not os.path.ismount("/dev/shm"), reason="no file system in memory at hand")
def test_a_folder_that_lies_in_memory_is_not_one_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert "/dev/shm" not in offload._folders()
    monkeypatch.setenv("TMPDIR", str(Path(__file__).parent))
    assert offload._folders()[0] == str(Path(__file__).parent)
