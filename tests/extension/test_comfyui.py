"""The node pack: what ComfyUI finds in this folder, and its settings page."""

from __future__ import annotations

import asyncio
import json
import re
from copy import deepcopy
from pathlib import Path

import pytest

from remote_vae.extension.comfyui_nodes import NODES
from remote_vae.extension.comfyui_routes import page
from remote_vae.history import Record
from remote_vae.hosts.comfyui_jobs import Job
from remote_vae.remote.trial import state, try_out
from remote_vae.server.models import LoadedVae
from remote_vae.settings import Settings, _toml_reader, load_options
from remote_vae.vae.at_work import VaeAtWork
from tests.chaos import Chaos
from tests.hosts.comfyui_standin import ComfyHost
from tests.hosts.test_comfyui import endpoint, graph, host  # noqa: F401  # fixtures
from tests.test_architecture import ROOT, run_without

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def test_the_pack_imports_outside_of_comfyui_and_without_what_comfyui_does_not_bring() -> None:
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("/somewhere/pack", "__init__.py")
pack = importlib.util.module_from_spec(spec)
before = list(sys.path)
spec.loader.exec_module(pack)
assert sys.path[:len(before)] == before
assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
assert "aiohttp" not in sys.modules
"""
    blocked = ["gradio", "fastapi", "starlette", "uvicorn", "diffusers", "transformers", "accelerate", "av", "zstandard"]
    result = run_without(blocked, code)
    assert result.returncode == 0, result.stderr


def test_comfyui_finds_the_folder_of_the_page_and_the_version(host: ComfyHost) -> None:  # noqa: F811
    assert host.pack is not None
    assert (ROOT / host.pack.WEB_DIRECTORY / "remote_vae.js").is_file()
    project = _toml_reader().loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy = project["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon"} <= set(comfy)
    assert comfy["version"]["path"] == project["tool"]["hatch"]["version"]["path"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_workflow_wires_our_nodes_as_they_are(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    ours = [node for node in nodes.values() if node["type"] in NODES]
    assert len(ours) == 2
    for node in ours:
        kind, inputs = NODES[node["type"]], NODES[node["type"]].INPUT_TYPES()["required"]
        links = [name for name, (what, *_) in inputs.items() if isinstance(what, str)]
        assert [each["name"] for each in node["inputs"]] == links
        for value, choices in zip(
            node["widgets_values"], [what for what, *_ in inputs.values() if isinstance(what, list)], strict=True
        ):
            assert value in choices
        assert [each["type"] for each in node["outputs"]] == list(kind.RETURN_TYPES)
    for _, source, output, target, entry, what in workflow["links"]:
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][entry]["type"] == what


def test_the_page_has_every_option_with_its_words_but_for_sharing() -> None:
    entries = {entry["id"].removeprefix("RemoteVAE."): entry for entry in page()}
    assert set(entries) == set(load_options()) - {"share"}
    option = load_options()["transfer"]
    assert entries["transfer"]["tooltip"] == option.help
    assert entries["transfer"]["options"] == list(option.choices)
    assert entries["connect_timeout"]["name"].endswith("(s)")
    json.dumps(page())


def test_the_script_of_the_page_asks_for_the_routes_that_there_are(host: ComfyHost) -> None:  # noqa: F811
    script = (ROOT / "web" / "remote_vae.js").read_text(encoding="utf-8")
    asked = set(re.findall(r'ask\("(\w+)"', script))
    assert {f"/remote_vae/{name}" for name in asked} == {route.split()[1] for route in host.routes}


def test_the_test_button_says_that_it_is_the_same_vae_and_the_line_what_came_of_the_last_call(
    host: ComfyHost,  # noqa: F811
    endpoint: Chaos,  # noqa: F811
) -> None:
    name = endpoint.url.removeprefix("http://")
    answer = asyncio.run(host.routes["POST /remote_vae/test"](None))
    assert answer == {
        "good": False,
        "verdict": "no endpoint is set: enter the address of your server as Endpoint.",
        "state": "by the node Remote VAE only, but no endpoint is set: pictures are made here",
    }
    host.settings(endpoint=endpoint.url, enabled=True)
    assert "compared with your first picture" in asyncio.run(host.routes["POST /remote_vae/test"](None))["verdict"]
    host.run(graph(mode=""), "4")
    answer = asyncio.run(host.routes["POST /remote_vae/test"](None))
    assert answer["good"]
    assert re.fullmatch(
        rf"{name} answers: .*, \d+ ms there and back for 128 px, \d+ of them in the VAE\. It is the VAE .*: all is well\.",
        answer["verdict"],
    )
    assert re.fullmatch(
        rf"on: {name}, same VAE, last call \d+\.\d s", asyncio.run(host.routes["GET /remote_vae/state"](None))["state"]
    )


def test_the_commands_for_the_other_machine_name_the_file_that_was_used_here_last(host: ComfyHost) -> None:  # noqa: F811
    def serve() -> str:
        return str(asyncio.run(host.routes["GET /remote_vae/state"](None))["commands"]).splitlines()[1]

    assert serve() == "remote-vae/bin/remote-vae serve --vae YOUR-CHECKPOINT.safetensors --host 0.0.0.0"
    # Also where nothing is remote yet: it is the first that a newcomer types.
    loader = {"1": ("VAELoader", {"name": "sd15/my vae.safetensors"})}
    host.run(graph(**loader), "4")
    assert serve() == "remote-vae/bin/remote-vae serve --vae 'my vae.safetensors' --host 0.0.0.0"
    host.run(graph(seed=2, mode="", **loader), "4")
    assert serve() == "remote-vae/bin/remote-vae serve --vae 'my vae.safetensors' --host 0.0.0.0"
    host.run(graph(seed=3, mode=""), "4")
    assert "YOUR-CHECKPOINT" in serve()


@pytest.mark.parametrize(
    ("loader", "file"),
    [
        ({"ckpt_name": "a.safetensors"}, "a.safetensors"),
        ({"config_name": "v1.yaml", "ckpt_name": "a.ckpt"}, "a.ckpt"),
        ({"ckpt_name": "a.safetensors", "vae_name": "b.SAFETENSORS", "lora_name": "c.safetensors"}, "b.SAFETENSORS"),
        ({"ckpt_name": "a.safetensors", "vae_name": "Baked VAE", "lora_name": "c.safetensors"}, "a.safetensors"),
        ({"file": "a.sft", "device": "cpu"}, "a.sft"),
        ({"one": "a.sft", "other": "b.sft"}, ""),
        ({"vae_name": "pixel_space"}, ""),
        ({"vae": ["2", 0]}, ""),
        ({"vae": ["gone", 0]}, ""),
        ({"vae": ["1"], "x": None}, ""),
    ],
)
def test_the_file_of_a_vae_is_what_its_loader_names(loader: dict[str, object], file: str) -> None:
    nodes = {"1": loader, "2": {"vae": ["1", 0]}, "3": {"vae": ["2", 0], "pixels": ["9", 0]}}
    job = Job({name: {"class_type": "x", "inputs": inputs} for name, inputs in nodes.items()})
    assert job.vae_file("3") == file


# --- the verdict, for any host -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("503", "does not work: 503. Look at what the server prints"),
        ("404 html", "does not work: 404"),
        ("nan", "does not work: bad answer"),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_said_with_what_to_do(chaos: Chaos, mode: str, said: str) -> None:
    chaos.mode = mode
    trial = try_out(Settings(endpoint=chaos.url), None)
    assert not trial.is_good
    assert said in trial.verdict


def test_nobody_there_is_said_with_what_to_look_at() -> None:
    trial = try_out(Settings(endpoint="http://127.0.0.1:9"), None)
    assert trial.verdict.startswith("127.0.0.1:9 does not work: connection refused. Is the server running there")


def test_another_vae_there_is_no_success_unless_the_user_wants_it(chaos: Chaos, loaded: LoadedVae) -> None:
    other = deepcopy(loaded.vae)
    next(other.parameters()).data.add_(1.0)
    here = VaeAtWork(other, loaded.family)
    assert not try_out(Settings(endpoint=chaos.url), here).is_good
    trial = try_out(Settings(endpoint=chaos.url, when_vae_differs="remote"), here)
    assert trial.is_good
    assert "another VAE" in trial.verdict


def test_the_line_of_state_says_off() -> None:
    assert state(Settings(), None) == "off"


def test_the_line_of_state_does_not_hold_what_another_endpoint_did_against_the_one_that_is_set() -> None:
    failed = Record("decode", "local", "", "http://127.0.0.1:9/decode", 1, 64, 64, 0, 0, 1.0, "connection refused", 0.0)
    assert "connection refused" in state(Settings(enabled=True, endpoint="http://127.0.0.1:9"), failed)
    assert state(Settings(enabled=True, endpoint="http://studio:7870"), failed) == "on: studio:7870, not asked yet"
