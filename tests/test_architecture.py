"""The import arrows of the design, and what the package may need."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "remote_vae"

# What each part may import of the package, beside itself. Arrows go one way:
# scripts -> extension -> hosts -> router -> remote -> local -> tiled -> wire -> vae -> settings, errors
BASE = {"errors", "settings", "version", "tokens", "history", "vae"}
CALL = BASE | {"wire", "call"}
LOCAL = CALL | {"tiled", "local"}
REMOTE = LOCAL | {"remote"}
ROUTER = REMOTE | {"rescue", "router"}
ALLOWED = {
    "errors": set(),
    "version": set(),
    "tokens": {"settings"},
    "history": set(),
    "settings": {"errors"},
    "diagnosis": {"history", "settings", "version"},
    "vae": {"errors", "settings"},
    "wire": {"errors", "vae"},
    "tiled": {"errors", "vae"},
    "call": BASE | {"wire"},
    "rescue": {"errors", "vae"},
    "local": LOCAL,
    "remote": REMOTE,
    "router": ROUTER - {"router"},
    "hosts": ROUTER,
    "extension": BASE | {"diagnosis", "hosts", "server"},
    "server": LOCAL - {"history"},
    "tools": ROUTER | {"server"},
    "demo": ROUTER | {"hosts"},
    "cli": ROUTER | {"diagnosis", "server", "demo", "tools"},
    "__main__": {"cli"},
    "__init__": ROUTER | {"hosts"},
}
HOST_MODULES = {
    "modules",
    "ldm",
    "sgm",
    "launch",
    "gradio",
    "modules_forge",
    "backend",
    "comfy",
    "comfy_execution",
    "execution",
    "folder_paths",
    "server",
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """The part of the package that ``remote_vae.x.y`` belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """Every imported module, and whether the import stands at the top level of the file."""
    top = {id(node) for node in ast.iter_child_nodes(tree)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # "from remote_vae import rescue" imports the module remote_vae.rescue
            names = [f"remote_vae.{alias.name}" for alias in node.names] if node.module == "remote_vae" else [node.module or ""]
            found += [(name, id(node) in top) for name in names]
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows_of_the_design(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    for module, top_level in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if module.split(".")[0] == "remote_vae":
            assert part_of(module) in ALLOWED[part] | {part}, f"{relative} imports {module}"
        if module.split(".")[0] in HOST_MODULES:
            assert part in ("hosts", "extension"), f"{relative} imports the host's {module}"
            assert not top_level, f"{relative} imports {module} outside a function"


def test_every_part_is_in_the_plan() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files()}
    assert parts == set(ALLOWED)


def test_the_hosts_entry_point_has_no_logic() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 10


BLOCKED = ["gradio", "diffusers", "transformers", "fastapi", "starlette", "uvicorn", "accelerate", "av", "skimage", "modules"]


def run_without(packages: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in an interpreter where ``packages`` cannot be imported."""
    blocker = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
    return subprocess.run(
        [sys.executable, "-c", blocker + code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_package_imports_and_decodes_without_gradio_diffusers_and_fastapi() -> None:
    """As in a host that ships none of them, or not yet."""
    modules = [
        "remote_vae",
        "remote_vae.cli",
        *(f"remote_vae.{name}" for name in ("router", "cli", "rescue", "hosts.a1111", "hosts.diffusers", "tiled")),
        *(f"remote_vae.{name}" for name in ("extension.start", "extension.settings_panel", "extension.share", "vae.at_work")),
        *(f"remote_vae.{name}" for name in ("remote.route", "wire")),
    ]
    code = f"""
import importlib, torch
for name in {modules!r}:
    importlib.import_module(name)
import remote_vae
try:
    remote_vae.remote_decode("http://127.0.0.1:9/", torch.zeros(1, 4, 8, 8), scaling_factor=1.0)
except RuntimeError as error:
    assert "connection refused" in str(error), error
else:
    raise AssertionError("nobody listens there")
assert not set({BLOCKED!r}) & set(sys.modules)
"""
    result = run_without(BLOCKED, code)
    assert result.returncode == 0, result.stderr


def test_without_what_the_server_needs_the_command_says_what_to_install() -> None:
    code = """
from remote_vae.cli import main
sys.exit(main(["serve", "--vae", "assets/demo_vae", "--port", "0"]))
"""
    result = run_without(BLOCKED, code)
    assert result.returncode == 1
    assert "-m pip install accelerate diffusers fastapi uvicorn" in result.stderr
    assert "Traceback" not in result.stderr


def pythons(version: str) -> list[str]:
    """Interpreters of ``version`` on this machine: on the path, or under pyenv."""
    found = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path("~").expanduser() / ".pyenv")
    found += [str(path) for path in sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    return [path for path in found if path and subprocess.run([path, "-V"], capture_output=True, check=False).returncode == 0]


REAL_HOME = os.environ.get("HOME", "")


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_every_file_compiles_on_every_python_of_the_hosts(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", REAL_HOME)
    found = pythons(version)
    if not found:
        pytest.skip(f"Python {version} is not installed here")
    sources = [str(path) for folder in ("remote_vae", "scripts", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    code = "import sys\nfor name in sys.argv[1:]:\n    compile(open(name, encoding='utf-8').read(), name, 'exec')\n"
    result = subprocess.run(
        [found[0], "-W", "error", "-c", code, str(ROOT / "install.py"), *sources], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_data_files_are_read_on_python_3_10_whoever_provides_tomli() -> None:
    """install.py may not have been run: pip's own copy serves."""
    code = """
from remote_vae.settings import load_options
assert "endpoint" in load_options()
assert "pip._vendor.tomli" in sys.modules
"""
    result = run_without(["tomllib", "tomli"], code)
    assert result.returncode == 0, result.stderr
