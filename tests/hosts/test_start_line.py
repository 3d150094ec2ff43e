"""The line at the start: which UI it is, and whether it is on."""

from __future__ import annotations

import sys

import pytest

from remote_vae.hosts import comfy_shaped
from remote_vae.hosts.base import WebUi
from remote_vae.hosts.detect import NoSeam
from remote_vae.hosts.forge_kin import ForgeKin
from remote_vae.hosts.sdnext import SdNext
from remote_vae.settings import Settings
from tests.hosts.standin import make_module
from tests.hosts.test_comfyui import ComfyHost, host  # noqa: F401  # a fixture

COMMIT = "dfdcbab685e57677014f05a3309b48cc87383167"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the modules of a UI have for its version."""
    found: dict[str, object] = {"version": "", "release": "", "commit_hash": lambda: "<none>", "get_version": lambda: 1 / 0}
    for name in ("modules", "modules_forge", "modules_forge.forge_version", "modules.launch_utils", "installer"):
        module = make_module(name, __path__=[])
        module.__getattr__ = found.__getitem__  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize(
    ("ui", "version", "commit", "said"),
    [
        (ForgeKin(comfy_shaped.FORGE), "2.0.1v1.10.1", COMMIT, "Forge 2.0.1 (dfdcbab)"),
        (ForgeKin(comfy_shaped.FORGE), "2.0.1v1.10.1", "<none>", "Forge 2.0.1"),
        (ForgeKin(comfy_shaped.NEO), "2.26", "<none>", "Forge Neo 2.26"),
        (ForgeKin(comfy_shaped.REFORGE), "1.0.0v2-v1.10.1RC", COMMIT, "reForge 1.0.0v2 (dfdcbab)"),
        (ForgeKin(comfy_shaped.ERSATZ), "f2.ersatz", COMMIT, "ersatzForge f2.ersatz (dfdcbab)"),
    ],
)
def test_forge_and_its_kin_are_named_by_their_own_number_and_their_commit(
    versions: dict[str, object], ui: WebUi, version: str, commit: str, said: str
) -> None:
    versions.update(version=version, release=version, commit_hash=lambda: commit)
    assert ui.seam_state().host == said


def test_sdnext_is_named_by_its_commit_and_its_day_also_where_its_own_start_has_not_asked_for_them(
    versions: dict[str, object],
) -> None:
    versions["get_version"] = lambda: {"commit": "058a7f0cf", "updated": "2026-07-23"}
    assert SdNext().seam_state().host == "SD.Next 058a7f0cf of 2026-07-23"
    assert NoSeam(SdNext(), ["x"]).seam_state().host == "a UI like SD.Next 058a7f0cf of 2026-07-23"


@pytest.mark.parametrize("get_version", [lambda: {"commit": "unknown", "updated": "unknown"}, lambda: 1 / 0])
def test_a_version_that_cannot_be_told_is_left_out(versions: dict[str, object], get_version: object) -> None:
    versions["get_version"] = get_version
    assert SdNext().seam_state().host == "SD.Next"


def test_comfyui_is_on_for_every_vae_or_for_the_node_alone(host: ComfyHost) -> None:  # noqa: F811
    adapter = sys.modules["remote_vae.hosts.comfyui"].adapter
    said = adapter.seam_state().opening
    assert said(Settings()).endswith("in ComfyUI 0.33.0: hooked comfy.sd.VAE; off but for the node Remote VAE, no endpoint set")
    assert said(Settings(enabled=True, endpoint="http://studio:7870")).endswith(
        "; on for every VAE, endpoint http://studio:7870"
    )
