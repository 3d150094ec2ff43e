"""The wheel that ``pip install`` makes on the second machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from remote_vae.settings import load_options, read_toml
from remote_vae.version import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_is_named_as_the_project_and_brings_the_data_files(wheel: Path) -> None:
    assert wheel.name == f"sd_webui_remote_vae-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "remote_vae/_settings/options.toml" in names
    assert "remote_vae/_settings/families.toml" in names
    assert not [name for name in names if name.startswith(("tests", "assets", "bench", "scripts"))]


def test_the_installed_package_reads_its_options_and_has_the_command(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "remote-vae = remote_vae.cli:main" in archive.read(entry_points).decode()
    code = "import remote_vae, remote_vae.settings as s; print(remote_vae.__file__, len(s.load_options()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(str(tmp_path))
    assert int(result.stdout.split()[-1]) == len(load_options())


def test_the_demo_of_an_installed_package_says_where_it_can_be_run(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "remote_vae", "demo"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "checkout" in result.stderr


def test_the_lowest_version_that_is_allowed_of_a_package_is_the_one_that_test_oldest_installs() -> None:
    project = read_toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    allowed = [*project["dependencies"], *(each for name in ("server", "video", "demo", "test") for each in extras[name])]
    lines = (ROOT / "requirements-oldest.txt").read_text(encoding="utf-8").splitlines()
    installed = dict(line.split("==") for line in lines if not line.startswith("#"))
    (installed["torch"],) = re.findall(r"\$\(OLDEST_PIP\).*torch==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for each in map(Requirement, allowed):
        if each.name == project["name"] or (each.marker and not each.marker.evaluate({"python_version": "3.10"})):
            continue
        (lowest,) = [Version(one.version).release for one in each.specifier if one.operator == ">="]
        assert Version(installed[each.name]).release[: len(lowest)] == lowest, each.name
