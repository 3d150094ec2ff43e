from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_vae import rescue
from remote_vae.call import User, VaeCall
from remote_vae.errors import VaeCallFailed
from remote_vae.history import History
from remote_vae.rescue import load_latents
from remote_vae.router import Router
from remote_vae.server.models import LoadedVae
from remote_vae.settings import Settings
from remote_vae.tiled.memory import is_out_of_memory
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import Family, find_family
from remote_vae.wire import DecodeAnswer
from tests.chaos import Chaos
from tests.nearness import psnr


class Host:
    """A host whose own calls do what the test says, and note that they were made."""

    def __init__(self, family: Family, latents: torch.Tensor) -> None:
        self.made: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.family = family
        self.latents = latents

    def _do(self, name: str) -> str:
        self.made.append(name)
        if name in self.fails:
            raise self.fails[name]
        return name

    def call(self, **changes: Any) -> VaeCall[Any]:
        arguments: dict[str, Any] = {
            "op": "decode",
            "tensor": self.latents,
            "vae": VaeAtWork(None, self.family),
            "whole": lambda: self._do("whole"),
            "adopt": self._adopt,
            "own_tiling": lambda: self._do("tiles"),
        }
        return VaeCall(**{**arguments, **changes})

    def _adopt(self, answer: object) -> str:
        assert isinstance(answer, DecodeAnswer)
        return self._do("remote")


@pytest.fixture
def host(loaded: LoadedVae, latents: torch.Tensor) -> Host:
    return Host(loaded.family, latents)


def oom() -> Exception:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_endpoint_is_asked_first_and_the_record_says_what_it_cost(host: Host, chaos: Chaos) -> None:
    router = Router()
    assert router.run(host.call(), Settings(endpoint=chaos.url)) == "remote"
    assert host.made == ["remote"]
    record = router.history.last
    assert record is not None
    assert (record.op, record.route, record.detail, record.endpoint) == ("decode", "remote", "u8", f"{chaos.url}/decode")
    assert (record.images, record.height, record.width) == (1, 64, 96)
    assert (record.bytes_up, record.bytes_down, record.fallback_reason) == (4 * 8 * 12 * 4, 64 * 96 * 3, "")
    assert record.ms > 0
    assert "64" in str(record)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("503", "503"),
        ("drop", "connection lost"),
        ("hang", "no answer in 0.3 s"),
        ("200 html", "bad answer: got a web page"),
        ("short", "bad answer"),
    ],
)
def test_whatever_goes_wrong_remotely_is_done_here_and_the_record_says_why(
    host: Host, chaos: Chaos, mode: str, reason: str
) -> None:
    router = Router()
    chaos.reset(mode)
    settings = Settings(endpoint=chaos.url, first_byte_timeout=0.3 if mode == "hang" else 20.0)
    assert router.run(host.call(), settings) == "whole"
    record = router.history.last
    assert record is not None
    assert (record.route, record.detail, record.endpoint) == ("local", "", f"{chaos.url}/decode")
    assert reason in record.fallback_reason
    assert record.bytes_down == 0
    assert len(router.history.records()) == 1


def test_without_an_endpoint_the_call_is_the_hosts_own(host: Host) -> None:
    router = Router()
    for enabled, reason in ((True, "no endpoint is set"), (False, "")):
        assert router.run(host.call(), Settings(enabled=enabled)) == "whole"
        assert router.history.last is not None
        assert (router.history.last.route, router.history.last.fallback_reason) == ("local", reason)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"endpoint": "ftp://host"}, "the endpoint cannot be used"),
        ({"encode_endpoint": "host"}, ""),
        ({"decode": False}, ""),
        ({"public_endpoints": True}, "no public endpoint for this VAE"),
    ],
)
def test_why_there_is_no_endpoint_for_a_call_is_in_the_record(host: Host, stored: dict[str, object], reason: str) -> None:
    router = Router()
    assert router.run(host.call(), Settings.forgiving({"enabled": True, **stored})[0]) == "whole"
    assert router.history.last is not None
    assert router.history.last.fallback_reason == reason


@pytest.mark.parametrize("op", ["decode", "encode"])
def test_a_kind_of_call_that_is_switched_off_stays_here(host: Host, chaos: Chaos, op: str) -> None:
    router = Router()
    settings = Settings.from_mapping({"endpoint": chaos.url, op: False})
    assert (
        router.run(host.call(op=op, tensor=torch.zeros(1, 3, 64, 64) if op == "encode" else host.latents), settings) == "whole"
    )
    assert not chaos.requests


def test_a_local_call_without_memory_goes_on_to_the_next_way(host: Host) -> None:
    router = Router()
    host.fails = {"whole": oom()}
    assert router.run(host.call(), Settings()) == "tiles"
    assert host.made == ["whole", "tiles"]
    record = router.history.last
    assert record is not None
    assert (record.route, record.detail, record.fallback_reason) == ("tiled", "the VAE's own tiling", "out of memory")


def test_an_answer_that_does_not_fit_on_the_device_is_not_lost_to_it(host: Host, chaos: Chaos) -> None:
    router = Router()
    host.fails = {"remote": oom()}
    assert router.run(host.call(), Settings(endpoint=chaos.url)) == "whole"
    # Tried twice, as emptying the cache may have helped.
    assert host.made == ["remote", "remote", "whole"]


def here(host: Host, loaded: LoadedVae, **changes: Any) -> VaeCall[Any]:
    """A call with the VAE at hand, whose result is the pixels or the moments themselves."""
    arguments = {"vae": VaeAtWork(loaded.vae, loaded.family), "adopt": lambda made: made.tensor, **changes}
    return host.call(**arguments)


def test_a_fallback_without_memory_is_done_by_the_exact_tiled_vae(host: Host, loaded: LoadedVae, chaos: Chaos) -> None:
    router = Router()
    chaos.reset("503")
    host.fails = {"whole": oom()}
    result = router.run(here(host, loaded), Settings(endpoint=chaos.url))
    assert psnr(result, decoded(loaded, host.latents)) >= 100
    assert host.made == ["whole"]
    record = router.history.last
    assert record is not None
    assert (record.route, record.detail, record.fallback_reason) == ("tiled", "exact", "503, then out of memory")


def decoded(loaded: LoadedVae, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        pixels: torch.Tensor = loaded.vae.decode(latents).sample
    return pixels


# --- when nothing works --------------------------------------------------------------------------------------------------


def test_when_nothing_can_decode_the_latents_are_saved_and_the_error_says_where(host: Host, tmp_path: Path) -> None:
    router = Router(rescue_folder=tmp_path / "default")
    host.fails = dict.fromkeys(("whole", "tiles"), oom())
    with pytest.raises(VaeCallFailed, match="They are saved in") as caught:
        router.run(host.call(), Settings())
    assert caught.value.rescued is not None
    assert Path(caught.value.rescued).parent == tmp_path / "default"
    assert rescue.command(Path(caught.value.rescued)) in str(caught.value)
    rescued = load_latents(Path(caught.value.rescued))
    assert torch.equal(rescued.latents, host.latents)
    assert rescued.family == host.family
    assert router.history.last is not None
    assert router.history.last.route == "failed"


def test_the_users_folder_for_rescued_latents_counts(host: Host, tmp_path: Path) -> None:
    host.fails = dict.fromkeys(("whole", "tiles"), ValueError("a defect of the host"))
    with pytest.raises(VaeCallFailed, match="a defect of the host") as caught:
        Router(rescue_folder=tmp_path / "default").run(host.call(), Settings(rescue_folder=str(tmp_path / "mine")))
    assert Path(caught.value.rescued or "").parent == tmp_path / "mine"


def test_where_the_users_folder_cannot_be_written_the_next_place_counts(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    host.fails = dict.fromkeys(("whole", "tiles"), ValueError("a defect of the host"))
    with pytest.raises(VaeCallFailed, match="a defect of the host") as caught:
        Router(rescue_folder=tmp_path / "default").run(host.call(), Settings(rescue_folder=str(tmp_path / "file" / "below")))
    assert Path(caught.value.rescued or "").parent == tmp_path / "default"


def test_latents_that_cannot_be_saved_anywhere_do_not_hide_the_error(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
        (tmp_path / name / rescue.FOLDER).write_text("")
    (tmp_path / rescue.FOLDER).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    host.fails = dict.fromkeys(("whole", "tiles"), ValueError("a defect of the host"))
    with pytest.raises(VaeCallFailed, match=r"a defect of the host.*Nor could they be saved") as caught:
        Router().run(host.call(), Settings(rescue_folder=str(tmp_path / "file" / "below")))
    assert caught.value.rescued is None


def test_an_encode_that_fails_loses_nothing_and_saves_nothing(host: Host, tmp_path: Path) -> None:
    host.fails = dict.fromkeys(("whole", "tiles"), ValueError("a defect of the host"))
    with pytest.raises(VaeCallFailed, match="could not be encoded"):
        Router(rescue_folder=tmp_path).run(host.call(op="encode", tensor=torch.zeros(1, 3, 64, 64)), Settings())
    assert not list(tmp_path.iterdir())


def test_latents_with_nan_are_not_sent_and_the_host_deals_with_them(host: Host, chaos: Chaos) -> None:
    router = Router()
    call = host.call(tensor=torch.full((1, 4, 8, 12), float("nan")))
    assert router.run(call, Settings(endpoint=chaos.url)) == "whole"
    assert not chaos.requests
    assert router.history.last is not None
    assert "NaN" in router.history.last.fallback_reason


def test_an_endpoint_that_failed_costs_nothing_until_its_pause_is_over(host: Host, chaos: Chaos) -> None:
    router = Router()
    chaos.reset("503")
    for _ in range(3):
        assert router.run(host.call(), Settings(endpoint=chaos.url)) == "whole"
    assert len(chaos.requests) == 1
    assert router.history.last is not None
    # It was not asked, and the record does not say so.
    assert router.history.last.fallback_reason == "503, 0 s ago"


def test_a_refused_request_is_no_reason_to_pause(host: Host, chaos: Chaos) -> None:
    router = Router()
    wrong = host.call(tensor=torch.zeros(1, 7, 8, 8))
    assert router.run(wrong, Settings(endpoint=chaos.url)) == "whole"
    assert router.history.last is not None
    assert router.history.last.fallback_reason == "400"
    assert router.run(host.call(), Settings(endpoint=chaos.url)) == "remote"


def test_an_interrupted_wait_is_done_here_and_is_no_reason_to_pause(host: Host, chaos: Chaos) -> None:
    router = Router()
    chaos.reset("hang")
    assert router.run(host.call(user=User(cancelled=lambda: True)), Settings(endpoint=chaos.url)) == "whole"
    assert router.history.last is not None
    assert router.history.last.fallback_reason == "interrupted"
    chaos.reset("pass")
    assert router.run(host.call(), Settings(endpoint=chaos.url)) == "remote"


def test_a_batch_of_pictures_files_is_one_request_and_falls_back_as_one(host: Host, chaos: Chaos) -> None:
    router = Router()
    call = host.call(tensor=host.latents.repeat(3, 1, 1, 1))
    assert router.run(call, Settings(endpoint=chaos.url, transfer="png")) == "remote"
    assert len(chaos.requests) == 1
    assert router.history.last is not None
    assert router.history.last.images == 3
    chaos.reset("503")
    assert router.run(call, Settings(endpoint=chaos.url, transfer="png")) == "whole"
    assert router.history.last.fallback_reason == "503"


def test_exact_urls_win_over_the_endpoint(host: Host, chaos: Chaos) -> None:
    settings = Settings(endpoint="http://127.0.0.1:9", decode_endpoint=f"{chaos.url}/decode")
    assert Router().run(host.call(), settings) == "remote"


def test_public_endpoints_are_asked_for_known_families_only_when_turned_on() -> None:
    from remote_vae.remote.endpoints import endpoint_for

    sdxl = find_family("sdxl")
    assert endpoint_for("decode", sdxl, Settings()) == ("", False)
    assert endpoint_for("decode", sdxl, Settings(public_endpoints=True)) == (sdxl.decode_endpoint, True)
    assert endpoint_for("decode", sdxl, Settings(public_endpoints=True, endpoint="http://mine")) == (
        "http://mine/decode",
        False,
    )
    custom = Family("custom", "custom VAE", 4, 8, 0.5)
    assert endpoint_for("decode", custom, Settings(public_endpoints=True))[0] == ""


def test_a_picture_too_large_for_the_public_endpoints_is_not_sent(host: Host) -> None:
    router = Router()
    call = host.call(tensor=torch.zeros(1, 4, 257, 256), vae=VaeAtWork(None, find_family("sd1")))
    assert router.run(call, Settings(public_endpoints=True)) == "whole"
    assert router.history.last is not None
    assert router.history.last.fallback_reason == "too large for the public endpoint"


def test_a_key_in_an_address_does_not_reach_the_record(host: Host, chaos: Chaos) -> None:
    router = Router()
    router.run(host.call(), Settings(decode_endpoint=f"{chaos.url}/decode?key=secret"))
    assert router.history.last is not None
    assert router.history.last.endpoint == f"{chaos.url}/decode"


def test_one_line_a_call_is_logged(host: Host, chaos: Chaos, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="remote_vae"):
        Router().run(host.call(), Settings(endpoint=chaos.url))
    # The server has its own.
    [record] = [record for record in caplog.records if record.module == "router"]
    assert record.levelname == "INFO"
    assert record.getMessage().startswith("decode 96x64: remote (u8)")


def test_the_history_is_bounded_and_keeps_the_newest(host: Host) -> None:
    history = History()
    router = Router(history)
    for _ in range(300):
        router.run(host.call(), Settings())
    assert len(history.records()) == 200
    assert history.records()[-1] is history.last


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (oom(), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (RuntimeError("Could not allocate tensor with 9 bytes. There is not enough GPU video memory available!"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised_on_every_device(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) is memory


# --- nothing that is not the host's VAE costs the picture ----------------------------------------------------------------


def test_certificates_that_are_not_there_are_a_fallback(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    assert Router().run(host.call(), Settings(endpoint="https://certificates.invalid")) == "whole"


def test_a_host_that_cannot_take_the_answer_gets_its_own_picture(host: Host, chaos: Chaos) -> None:
    host.fails["remote"] = TypeError("a picture of another kind")
    router = Router()
    assert router.run(host.call(), Settings(endpoint=chaos.url)) == "whole"
    assert router.history.last is not None
    assert router.history.last.fallback_reason == "TypeError"
    # The endpoint is well.
    host.fails.clear()
    assert router.run(host.call(), Settings(endpoint=chaos.url)) == "remote"


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_of_another_family_are_not_adopted(host: Host, chaos: Chaos, pixels: torch.Tensor, family: str) -> None:
    """A plain endpoint does not know what it was asked for, and may have another kind of VAE."""
    chaos.drops = ("family",)
    call = host.call(op="encode", tensor=pixels, vae=VaeAtWork(None, find_family(family)))
    router = Router()
    assert router.run(call, Settings(encode_endpoint=f"{chaos.url}/encode")) == "whole"
    assert chaos.requests == ["/encode"]
    assert router.history.last is not None
    assert "expected [1, 32" in router.history.last.fallback_reason


def test_pixels_of_another_scale_are_not_adopted(host: Host, chaos: Chaos, caplog: pytest.LogCaptureFixture) -> None:
    family = replace(host.family, downscale=16)
    router = Router()
    assert router.run(host.call(vae=VaeAtWork(None, family)), Settings(decode_endpoint=f"{chaos.url}/decode")) == "whole"
    assert router.history.last is not None
    assert "expected [1, 3, 128, 192]" in router.history.last.fallback_reason
    assert f"{chaos.url}/decode: bad answer: got [1, 3, 64, 96]" in caplog.text


def test_a_record_that_nobody_can_take_does_not_cost_the_picture(host: Host, chaos: Chaos) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("the infotext is gone")

    assert Router().run(host.call(user=User(recorded=refuse)), Settings(endpoint=chaos.url)) == "remote"
