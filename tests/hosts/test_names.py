"""The script that reads from a host's files whether the adapters still find their names there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import names

SD = """
import torch
if torch.cuda.is_available():
    device = 0
else:
    device = 1

class Base:
    def __init__(self):
        self.patcher = self.output_device = None

class VAE(Base):
    downscale_ratio: int = 8

    def __init__(self, model):
        self.first_stage_model, self.latent_channels = model, 4
        self.device = self.vae_dtype = None
        self.memory_used_decode = lambda shape, dtype: 1
        self.memory_used_encode = self.memory_used_decode

    def decode(self, samples): pass
    def encode(self, pixels): pass
    def decode_tiled(self, samples): pass
    def encode_tiled(self, pixels): pass
"""
MANAGEMENT = """
class InterruptProcessingException(BaseException): pass
def load_models_gpu(models): pass
def processing_interrupted(): pass
def throw_exception_if_processing_interrupted(): pass
"""


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "sd.py").write_text(SD)
    (tmp_path / "comfy" / "model_management.py").write_text("from comfy.management import *")
    (tmp_path / "comfy" / "management.py").write_text(MANAGEMENT)
    (tmp_path / "execution.py").write_text("class PromptExecutor:\n    def execute(self): pass")
    (tmp_path / "folder_paths.py").write_text("get_output_directory = get_user_directory = None")
    (tmp_path / "server.py").write_text("class PromptServer:\n    def __init__(self):\n        PromptServer.instance = self")
    (tmp_path / "comfy_execution").mkdir()
    (tmp_path / "comfy_execution" / "utils.py").write_text("def get_executing_context(): pass")
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.33.0"')
    return tmp_path


def lacking(folder: Path) -> list[str]:
    names._tree.cache_clear()
    host = names.host_of(folder)
    assert host is not None
    assert host.name == "ComfyUI"
    return names.missing(folder, host)


def test_a_checkout_with_all_names_lacks_none(comfyui: Path) -> None:
    assert lacking(comfyui) == []
    assert names.main([str(comfyui)]) == 0


@pytest.mark.parametrize(
    ("file", "before", "after", "missing"),
    [
        ("sd.py", "def decode_tiled(", "def tiled_decode(", "comfy.sd:VAE.decode_tiled"),
        ("sd.py", "self.patcher = self.output", "self.output", "comfy.sd:VAE.patcher"),
        ("sd.py", "downscale_ratio: int", "ratio: int", "comfy.sd:VAE.downscale_ratio"),
        ("management.py", "def load_models_gpu", "def load_models", "comfy.model_management:load_models_gpu"),
    ],
)
def test_a_name_that_is_gone_is_named(comfyui: Path, file: str, before: str, after: str, missing: str) -> None:
    path = comfyui / "comfy" / file
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert lacking(comfyui) == [missing]
    assert names.main([str(comfyui)]) == 1


def test_what_is_no_checkout_of_a_host_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names.main([str(tmp_path)]) == 1
    assert "none of ComfyUI" in capsys.readouterr().out
