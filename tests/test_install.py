"""install.py, as the host's extension manager runs it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

INSTALL = Path(__file__).parent.parent / "install.py"


class Launch(ModuleType):
    """The host's module, which runs pip; ``failure`` is what running it raises."""

    def __init__(self) -> None:
        super().__init__("launch")
        self.commands: list[str] = []
        self.failure: Exception | None = None

    def run_pip(self, command: str, desc: str | None = None) -> None:
        self.commands.append(command)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    module = Launch()
    monkeypatch.setitem(sys.modules, "launch", module)
    return module


def script(monkeypatch: pytest.MonkeyPatch, python: tuple[int, int] = (3, 11), installed: tuple[str, ...] = ()) -> ModuleType:
    """install.py, not yet run, on a ``python`` that has these packages."""
    spec = importlib.util.spec_from_file_location("remote_vae_install", INSTALL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (*python, 0))
        spec.loader.exec_module(module)
    found = SimpleNamespace(find_spec=lambda name: object() if name in installed else None)
    monkeypatch.setattr(module, "importlib", SimpleNamespace(util=found))
    return module


def test_run_by_the_extension_manager_where_nothing_is_missing_it_is_silent(tmp_path: Path) -> None:
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    result = subprocess.run([sys.executable, str(INSTALL)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(("python", "installed"), [((3, 10), ("tomli",)), ((3, 11), ()), ((3, 12), ()), ((3, 13), ())])
def test_where_nothing_is_missing_pip_is_not_run(
    monkeypatch: pytest.MonkeyPatch,
    launch: Launch,
    capsys: pytest.CaptureFixture[str],
    python: tuple[int, int],
    installed: tuple[str, ...],
) -> None:
    script(monkeypatch, python, installed).main()
    assert launch.commands == []
    assert capsys.readouterr() == ("", "")


def test_on_python_3_10_without_tomli_pip_installs_tomli(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    script(monkeypatch, (3, 10)).main()
    assert launch.commands == ['install "tomli>=2,<3"']


def test_exactly_what_is_missing_is_installed(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    module = script(monkeypatch, installed=("there",))
    monkeypatch.setattr(module, "NEEDED", {"there": "there>=1", "first": "first>=2", "second": "second>=3"})
    module.main()
    assert launch.commands == ['install "first>=2"', 'install "second>=3"']


def test_without_a_network_the_host_starts_all_the_same(
    monkeypatch: pytest.MonkeyPatch, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.failure = RuntimeError("Couldn't install tomli")
    script(monkeypatch, (3, 10)).main()
    assert "could not install tomli" in capsys.readouterr().out


def test_run_outside_the_host_it_says_so_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "launch", None)
    script(monkeypatch, (3, 10)).main()
    assert "could not install tomli" in capsys.readouterr().out


@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 12), (3, 13)])
def test_torch_and_gradio_are_never_touched(monkeypatch: pytest.MonkeyPatch, python: tuple[int, int]) -> None:
    needed = script(monkeypatch, python).NEEDED
    assert not any(name in text.lower() for text in (*needed, *needed.values()) for name in ("torch", "gradio"))
