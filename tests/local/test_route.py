"""Which way is tried when, with how much memory, and what is left of it for the next one."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from remote_vae.call import Outcome, User, VaeCall
from remote_vae.errors import OutOfMemory, UnsupportedLayout
from remote_vae.local import answer, route
from remote_vae.local.estimate import Need, whole_bytes, whole_need
from remote_vae.local.pace import Pace
from remote_vae.settings import Settings
from remote_vae.tiled.exact import Limits
from remote_vae.tiled.layouts import decoder_plan, encoder_plan
from remote_vae.vae.at_work import Op, VaeAtWork, whole_diffusers
from remote_vae.vae.families import find_family
from remote_vae.wire import DecodeAnswer
from tests.layouts import kl_with_extra_parameter, plain_kl
from tests.nearness import psnr, psnr_of_moments
from tests.vaes import small_vae

OPS: tuple[Op, ...] = ("decode", "encode")
# A device that is not the CPU, on every machine.
ELSEWHERE = torch.device("meta")
KL = plain_kl()
# Its layout is not known to the exact tiled VAE.
UNKNOWN = kl_with_extra_parameter()


def oom() -> Exception:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def given_to(op: Op) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((1, 4, 8, 12) if op == "decode" else (1, 3, 64, 96), generator=generator)


def whole(vae: Any, op: Op) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = (
            vae.decode(given_to(op)).sample if op == "decode" else vae.encode(given_to(op)).latent_dist.parameters
        )
    return result


def values(made: Any) -> torch.Tensor:
    tensor: torch.Tensor = made.tensor if isinstance(made, DecodeAnswer) else made.latents
    return tensor


class Host:
    """A host that does with a VAE what the test says, and notes that it did.

    Attributes:
        whole, tiles: what its own call gives, whole and in the VAE's own tiles; an exception is raised.
    """

    def __init__(self, vae: Any = KL, op: Op = "decode", **call: Any) -> None:
        self.made: list[str] = []
        self.whole: Any = "whole"
        self.tiles: Any = "tiles"
        self.texts: list[str] = []
        tensor = call.pop("tensor", given_to(op))
        at_work = VaeAtWork(vae, find_family("sd1"), tensor.device, tensor.dtype, bring=call.pop("bring", lambda z: z))
        self.call: VaeCall[Any] = VaeCall(
            op,
            tensor,
            at_work,
            adopt=values,
            whole=lambda: self._do("whole", self.whole),
            own_tiling=lambda: self._do("tiles", self.tiles),
            user=User(tell=self.texts.append),
            **call,
        )

    def _do(self, name: str, what: Any) -> Any:
        self.made.append(name)
        if isinstance(what, BaseException):
            raise what
        return what() if callable(what) else what

    def answered(self, **changes: Any) -> Outcome[Any]:
        with torch.no_grad():
            return answer(self.call, Settings(), **changes)

    @property
    def fits(self) -> bool:
        """Whether the whole VAE is asked."""
        self.answered()
        return self.made[:1] == ["whole"]


def memory(monkeypatch: pytest.MonkeyPatch, *sizes: int | None) -> list[torch.device]:
    """There are ``sizes`` bytes one asking after the other, the last one for ever; notes of which device was asked."""
    asked: list[torch.device] = []

    def available(device: torch.device) -> int | None:
        asked.append(device)
        return sizes[min(len(asked), len(sizes)) - 1]

    monkeypatch.setattr(route, "available_memory", available)
    return asked


def failing_tiles(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Limits]:
    """The exact tiled VAE fails each time; what it was told."""
    told: list[Limits] = []

    def run(plan: Any, vae: Any, tensor: torch.Tensor, limits: Limits, **_: Any) -> torch.Tensor:
        told.append(limits)
        raise error

    monkeypatch.setattr(route, "run", run)
    return told


# --- the order -----------------------------------------------------------------------------------------------------------


def test_the_whole_vae_is_the_hosts_own_call_and_its_result_untouched() -> None:
    host = Host()
    outcome = host.answered()
    assert (outcome.value, outcome.route, outcome.detail, outcome.because) == ("whole", "local", "", "")
    assert host.made == ["whole"]


@pytest.mark.parametrize("op", OPS)
def test_without_memory_for_the_whole_vae_the_exact_tiled_one_makes_the_same(op: Op) -> None:
    host = Host(op=op)
    host.whole = oom()
    outcome = host.answered()
    assert psnr(outcome.value, whole(KL, op)) >= 100
    assert (outcome.route, outcome.detail, outcome.because) == ("tiled", "exact", "out of memory")
    assert host.made == ["whole"]
    assert host.texts[-1].endswith("100 %")


def test_then_come_the_vaes_own_tiles_and_then_a_copy_on_the_cpu() -> None:
    host = Host(UNKNOWN)
    host.whole, host.tiles = oom(), MemoryError()
    outcome = host.answered()
    assert host.made == ["whole", "tiles"]
    assert (outcome.route, outcome.detail) == ("local", "on the CPU")
    assert torch.allclose(outcome.value, whole(UNKNOWN, "decode"))


def test_a_host_without_tiles_of_its_own_goes_to_the_cpu() -> None:
    host = Host(UNKNOWN, in_parts=True)
    host.whole = oom()
    host.call = VaeCall("decode", host.call.tensor, host.call.vae, values, whole=host.call.whole)
    assert host.answered().detail == "on the CPU"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Invalid buffer size: 18.00 GB"),
        RuntimeError("integer out of range"),
        RuntimeError("a defect that nobody has thought of"),
        ValueError("another one"),
    ],
)
def test_whatever_goes_wrong_with_the_whole_vae_the_tiled_one_is_tried(error: Exception) -> None:
    host = Host()
    host.whole = error
    outcome = host.answered()
    assert psnr(outcome.value, whole(KL, "decode")) >= 100
    assert outcome.because


def test_if_nothing_helps_the_host_gets_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_tiles(monkeypatch, RuntimeError("another one"))
    host = Host()
    host.whole = host.tiles = ValueError("a defect of the host")
    monkeypatch.setattr(route, "on_cpu", offloaded)
    with pytest.raises(ValueError, match="a defect of the host"):
        host.answered()


def offloaded(_: Any) -> Any:
    raise UnsupportedLayout("the weights are offloaded")


def test_what_is_not_an_error_goes_through_at_once() -> None:
    host = Host()
    host.whole = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        host.answered()
    assert host.made == ["whole"]


def test_when_no_way_has_memory_the_error_says_what_failed_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_tiles(monkeypatch, MemoryError())
    monkeypatch.setattr(route, "on_cpu", offloaded)
    host = Host()
    host.whole, host.tiles = oom(), UnsupportedLayout("no tiling of its own")
    with pytest.raises(OutOfMemory, match=r"the decode of 96 x 64 px.*Tried to allocate 2\.00 GiB") as caught:
        host.answered()
    assert caught.value.reason == "out of memory"


def test_in_another_dtype_only_ways_that_compute_in_it_are_asked() -> None:
    host = Host(vae=plain_kl().half(), tensor=given_to("decode").half())
    outcome = host.answered(dtype=torch.float32)
    assert host.made == []
    assert outcome.route == "tiled"
    unknown = Host(kl_with_extra_parameter().half(), tensor=given_to("decode").half())
    assert unknown.answered(dtype=torch.float32).detail == "on the CPU"


# --- getting ready is ours, and costs nothing ------------------------------------------------------------------------------


def test_a_host_that_cannot_bring_its_vae_is_asked_all_the_same() -> None:
    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such device")

    assert Host(bring=broken).answered().value == "whole"


def test_a_layout_or_an_estimate_that_goes_wrong_leaves_the_hosts_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "whole_need", lambda *_: 1 // 0)
    assert Host().answered().value == "whole"


def test_a_hook_that_somebody_has_put_on_the_vae_is_not_run_without_a_call() -> None:
    vae = plain_kl()
    vae.register_forward_pre_hook(lambda module, args: args[0])
    assert Host(vae).answered().value == "whole"


def test_the_vae_is_brought_before_the_free_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = memory(monkeypatch, 1 << 40)
    brought: list[int] = []

    def bring(tensor: torch.Tensor) -> torch.Tensor:
        brought.append(len(asked))
        return tensor

    Host(bring=bring).answered()
    assert brought == [0]


# --- memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_the_whole_vae_is_only_tried_where_there_is_memory_to_spare(monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    picture = given_to(op)
    needed = whole_bytes((decoder_plan if op == "decode" else encoder_plan)(KL), picture.shape, torch.float32)
    assert needed > picture.numel() * 4
    batch = picture.repeat(2, 1, 1, 1)
    memory(monkeypatch, needed)
    assert not Host(op=op).fits
    memory(monkeypatch, 2 * needed)
    assert Host(op=op).fits
    # A batch needs as much for each picture, unless the host makes it in parts; half precision half.
    assert not Host(op=op, tensor=batch).fits
    assert Host(op=op, tensor=batch, in_parts=True).fits
    assert Host(plain_kl().half(), op=op, tensor=batch.half()).fits


@pytest.mark.parametrize(("vae", "size"), [(KL, None), (UNKNOWN, 0)])
def test_where_it_cannot_be_told_whether_it_fits_the_whole_vae_is_tried(
    monkeypatch: pytest.MonkeyPatch, vae: Any, size: int | None
) -> None:
    memory(monkeypatch, size)
    assert Host(vae).fits


def test_each_attempt_gets_less_of_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 1_000_000)
    told = failing_tiles(monkeypatch, oom())
    Host().answered()
    limits = [each.max_bytes or 0 for each in told]
    assert len(limits) >= 3
    assert all(later < earlier for earlier, later in itertools.pairwise(limits))
    assert 0 < limits[-1] <= 200_000
    assert 500_000 <= limits[0] < 1_000_000


def test_where_the_memory_cannot_be_told_the_limits_are_shares_of_what_the_whole_vae_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory(monkeypatch, None)
    told = failing_tiles(monkeypatch, oom())
    host = Host()
    host.whole = oom()
    host.answered()
    needed = whole_bytes(decoder_plan(KL), given_to("decode").shape, torch.float32)
    limits = [each.max_bytes or 0 for each in told]
    assert limits == sorted(set(limits), reverse=True)
    assert 0 < limits[-1] < limits[0] < needed


def test_off_the_cpu_the_last_attempt_of_tiles_is_the_cpus_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = memory(monkeypatch, 0, 1_000, 1_000, 1_000, 64_000)
    told = failing_tiles(monkeypatch, oom())
    Host(tensor=given_to("decode").half().to(ELSEWHERE)).answered()
    assert asked == [ELSEWHERE] * 4 + [torch.device("cpu")]
    *there, last = told
    assert not any(each.device or each.dtype for each in there)
    assert (last.device, last.dtype) == (torch.device("cpu"), torch.float32)
    assert 32_000 <= (last.max_bytes or 0) < 64_000


@pytest.mark.parametrize("op", OPS)
def test_with_little_memory_a_later_attempt_still_makes_the_whole_vaes_result(monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    # The first attempt has too little, and then other programs have ended.
    memory(monkeypatch, 0, 1_000, 8_000_000)
    outcome = Host(op=op).answered()
    assert outcome.detail == "exact"
    assert psnr(outcome.value, whole(KL, op)) >= 100


class Filled:
    """Attempts that fill the memory before it is full, and what the next one finds of them."""

    def __init__(self) -> None:
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def run_out(self) -> torch.Tensor:
        activations = torch.zeros(1000)
        self.tensors.append(weakref.ref(activations))
        raise oom()

    def again(self) -> torch.Tensor:
        try:
            return self.run_out()
        except Exception:
            # As in the tiled VAE after NaN, and wherever a library tries twice.
            raise oom() from None

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.tensors)


@pytest.mark.parametrize("attempt", [Filled.run_out, Filled.again])
def test_what_an_attempt_has_filled_is_free_again_for_the_next_one(attempt: Callable[[Filled], torch.Tensor]) -> None:
    filled = Filled()
    host = Host(UNKNOWN)
    host.whole, host.tiles = lambda: attempt(filled), filled.alive
    assert host.answered().value == 0
    assert len(filled.tensors) == 1


def test_cached_memory_is_given_back_after_every_attempt_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    monkeypatch.setattr(route, "free_memory", lambda: freed.append(1))
    host = Host(UNKNOWN)
    host.whole = host.tiles = oom()
    host.answered()
    assert len(freed) == 2


# --- bfloat16 on the CPU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_on_a_fast_cpu_comes_first_and_gives_the_vaes_own_dtype(monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    monkeypatch.setattr(route, "is_fast_at_bfloat16", lambda: True)
    host = Host(op=op)
    with torch.no_grad():
        outcome = answer(host.call, Settings(cpu_bfloat16=True))
    assert host.made == []
    assert outcome.value.dtype == torch.float32
    assert 30 < psnr(outcome.value, whole(KL, op)) < 90
    assert (outcome.route, outcome.detail) == ("tiled", "exact, bfloat16")


@pytest.mark.parametrize(
    ("on", "is_fast", "vae", "device"),
    [(False, True, KL, "cpu"), (True, False, KL, "cpu"), (True, True, UNKNOWN, "cpu"), (True, True, KL, "meta")],
)
def test_bfloat16_is_for_a_cpu_that_is_fast_at_it_and_a_layout_that_is_known(
    monkeypatch: pytest.MonkeyPatch, on: bool, is_fast: bool, vae: nn.Module, device: str
) -> None:
    monkeypatch.setattr(route, "is_fast_at_bfloat16", lambda: is_fast)
    host = Host(vae, tensor=given_to("decode").to(device))
    assert answer(host.call, Settings(cpu_bfloat16=on)).value == "whole"


# --- videos ----------------------------------------------------------------------------------------------------------------


def video_of(op: Op, frames: int = 2) -> torch.Tensor:
    shape = (1, 16, frames, 4, 6) if op == "decode" else (1, 3, 4 * frames - 3, 32, 48)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_of_a_video_the_whole_vae_is_tried_where_it_fits_and_else_the_exact_one(
    monkeypatch: pytest.MonkeyPatch, op: Op, frames: int
) -> None:
    vae, video = small_vae("qwen-image"), video_of(op, frames)
    needed = whole_bytes((decoder_plan if op == "decode" else encoder_plan)(vae), video.shape, torch.float32)
    memory(monkeypatch, 2 * needed)
    assert Host(vae, op, tensor=video).fits
    memory(monkeypatch, needed)
    host = Host(vae, op, tensor=video)
    outcome = host.answered()
    assert (outcome.route, outcome.detail, host.made) == ("tiled", "exact", [])
    with torch.no_grad():
        true = whole_diffusers(vae, op, video)
    assert psnr_of_moments(outcome.value, true) >= 100


def test_a_video_whose_vae_has_no_exact_strips_is_made_in_its_own_tiles_and_then_on_the_cpu() -> None:
    vae = small_vae("hunyuan-video")
    latents = video_of("decode", 1)
    host = Host(vae, tensor=latents)
    host.whole = oom()
    assert host.answered().detail == "the VAE's own tiling"
    host.whole = host.tiles = oom()
    outcome = host.answered()
    assert outcome.detail == "on the CPU"
    assert outcome.value.shape == (1, 3, 1, 32, 48)


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5"])
def test_where_attention_to_every_frame_does_not_fit_the_whole_vae_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a CPU the system would end the process: 33 latent frames of 720p make a mask of tens of gigabytes."""
    latents = torch.empty(1, 16 if name == "hunyuan-video" else 32, 33, 45, 80)
    memory(monkeypatch, 64 << 30)
    host = Host(small_vae(name), tensor=latents)
    assert not host.fits
    host.tiles = oom()
    with pytest.raises(OutOfMemory):
        host.answered()
    assert "whole" not in host.made
    assert Host(small_vae(name), tensor=latents[:, :, :1, :8, :8]).fits


def test_what_a_vae_keeps_of_frames_is_given_back_before_the_next_way_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small_vae("wan")
    latents = torch.zeros(1, 16, 2, 2, 2)
    asked: list[bool] = []
    forward = vae.decoder.forward

    def no_room_for_the_second_frame(*args: Any, **kwargs: Any) -> Any:
        asked.append(True)
        if len(asked) == 2:
            raise oom()
        return forward(*args, **kwargs)

    monkeypatch.setattr(vae.decoder, "forward", no_room_for_the_second_frame)
    kept: list[bool] = []
    monkeypatch.setattr(route, "_exact_ways", lambda *_: iter(()))

    def in_tiles() -> torch.Tensor:
        kept.append(any(isinstance(each, torch.Tensor) for each in vae._feat_map))
        return latents

    with torch.no_grad():
        at_work = VaeAtWork(vae, find_family("wan"))
        call = VaeCall(
            "decode", latents, at_work, values, whole=lambda: whole_diffusers(vae, "decode", latents), own_tiling=in_tiles
        )
        assert answer(call, Settings()).value is latents
    assert kept == [False]


# --- where the driver goes on in the host's memory, and what was too slow ----------------------------------------------------


def need_of(op: Op, device: torch.device = ELSEWHERE) -> Need:
    plan = (decoder_plan if op == "decode" else encoder_plan)(KL)
    return whole_need(op, plan, given_to(op).shape, torch.float32, device)


@pytest.mark.parametrize("op", OPS)
def test_where_nothing_says_that_it_does_not_fit_the_whole_vae_is_only_tried_where_it_is_sure_to(
    monkeypatch: pytest.MonkeyPatch, op: Op
) -> None:
    """Windows: the estimate decides before the call. Elsewhere what may fit is tried, as torch says when it does not."""
    tensor, need = given_to(op).to(ELSEWHERE), need_of(op)
    memory(monkeypatch, need.least)
    assert need.least < need.likely
    assert Host(op=op, tensor=tensor).fits
    monkeypatch.setattr(route, "spills", lambda device: True)
    assert not Host(op=op, tensor=tensor).fits
    memory(monkeypatch, need.likely - 1)
    assert not Host(op=op, tensor=tensor).fits
    memory(monkeypatch, need.likely)
    assert Host(op=op, tensor=tensor).fits


def test_there_a_vae_whose_layers_are_not_counted_is_tried_where_what_is_published_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae, latents = small_vae("hunyuan-video"), torch.empty(1, 16, 2, 8, 8, device=ELSEWHERE)
    monkeypatch.setattr(route, "spills", lambda device: True)
    memory(monkeypatch, 2800 * 5 * 64 * 64 * 4 - 1)
    at_work = replace(Host(vae, tensor=latents).call.vae, family=find_family("hunyuan-video"))

    def tried() -> list[str]:
        host = Host(vae, tensor=latents)
        host.call = replace(host.call, vae=at_work)
        host.answered()
        return host.made

    assert tried() == ["tiles"]
    memory(monkeypatch, 2800 * 5 * 64 * 64 * 4)
    assert tried() == ["whole"]


def test_a_size_at_which_the_whole_vae_turned_out_slow_is_made_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(route, "pace", Pace(clock=lambda: now[0], card=lambda _: ""))

    def taking(seconds: float, latents: torch.Tensor) -> Outcome[Any]:
        def whole_vae() -> str:
            now[0] += seconds
            return "whole"

        host = Host(tensor=latents)
        # A processor that was slow was busy.
        host.call = replace(host.call, vae=replace(host.call.vae, device=torch.device("meta")))
        host.whole = whole_vae
        return host.answered()

    latents = given_to("decode")
    taking(0.1, latents)
    assert taking(120.0, latents).value == "whole"
    outcome = taking(0.1, latents)
    assert (outcome.route, outcome.detail, outcome.because) == ("tiled", "exact", "the whole VAE was too slow before")
    assert taking(0.1, latents[..., :8]).value == "whole"


# --- room ------------------------------------------------------------------------------------------------------------------


class Card:
    """A device with ``free`` bytes, on which other models have ``others``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, others: int) -> None:
        self.free = free
        self.others = others
        self.asked: list[tuple[int, int]] = []
        monkeypatch.setattr(route, "available_memory", lambda device: self.free if device == ELSEWHERE else 1 << 40)

    def make_room(self, wanted: int, least: int) -> int:
        self.asked.append((wanted, least))
        if self.others < least:
            return 0
        freed, self.others = self.others, 0
        self.free += freed
        return freed

    def host(self, **call: Any) -> Host:
        return Host(tensor=given_to("decode").to(ELSEWHERE), make_room=self.make_room, **call)


def test_what_fits_makes_nobody_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, need_of("decode").likely, 1 << 40)
    assert card.host().answered().value == "whole"
    assert card.asked == []


def test_before_the_whole_vae_is_given_up_other_models_leave_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    need = need_of("decode")
    card = Card(monkeypatch, need.least // 2, need.likely)
    outcome = card.host().answered()
    assert (outcome.value, outcome.route, outcome.because) == ("whole", "local", "")
    # As much as is sure to do, and nothing where it would not even be tried.
    assert card.asked == [(need.likely - need.least // 2, need.least - need.least // 2)]


def test_where_it_was_tried_and_memory_ran_out_they_leave_and_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    need = need_of("decode")
    card = Card(monkeypatch, need.least, need.likely)
    host = card.host()
    host.whole = lambda: "whole" if card.asked else _raise(oom())
    outcome = host.answered()
    assert (outcome.value, outcome.because, host.made) == ("whole", "", ["whole", "whole"])
    assert card.asked == [(need.likely - need.least, (need.likely - need.least) // 2)]


def _raise(error: Exception) -> Any:
    raise error


def test_an_error_that_is_not_of_memory_makes_nobody_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, need_of("decode").least, 1 << 40)
    failing_tiles(monkeypatch, ValueError())
    host = card.host()
    host.whole = ValueError("a defect of the host")
    assert host.answered().value == "tiles"
    assert card.asked == []


def test_where_all_of_them_are_not_enough_for_the_whole_vae_they_leave_for_the_tiles_if_those_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need = need_of("decode")
    told = failing_tiles(monkeypatch, oom())
    little, more = need.counted // 10, need.counted // 4
    tight = Card(monkeypatch, little, more)
    assert tight.host().answered().value == "tiles"
    assert len(tight.asked) == 2
    assert told[0].max_bytes == int(0.8 * (little + more))
    # With half of what the whole VAE keeps alive tiles are as quick as they get.
    enough = Card(monkeypatch, need.counted // 2, need.counted // 4)
    enough.host().answered()
    assert len(enough.asked) == 1
    assert enough.others


def test_switched_off_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, 0, 1 << 40)
    failing_tiles(monkeypatch, oom())
    with torch.no_grad():
        assert answer(card.host().call, Settings(make_room="off")).value == "tiles"
    assert card.asked == []
