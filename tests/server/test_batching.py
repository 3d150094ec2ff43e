"""Calls that are made at once: which they are, and that nobody gets, waits for or suffers from another's."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from remote_vae.errors import InvalidRequest, NotFinite, OutOfMemory
from remote_vae.local import route
from remote_vae.server import pictures
from remote_vae.server.admission import ClientGone, Place
from remote_vae.server.batching import Batcher, Job
from remote_vae.server.catalogue import OneVae
from remote_vae.server.engine import Engine
from remote_vae.server.models import LoadedVae
from remote_vae.server.moving import Mover
from remote_vae.server.pictures import Facts
from remote_vae.server.worker import Nobody
from remote_vae.vae.at_work import Op
from remote_vae.vae.families import family_of, load_families
from remote_vae.wire import DecodeRequest, EncodeRequest, HttpResponse, Output
from remote_vae.wire.pixels import to_uint8
from remote_vae.wire.query import Scaling
from tests.nearness import out_of_memory, psnr
from tests.pretend_gpu import DEVICE, Card
from tests.server.asking import wait_until
from tests.server.at_once import answers, job_of, worker_of
from tests.vaes import small_vae
from tests.versions import NO_HALF

FOREVER = 1000.0


class Batches:
    """The sizes of the batches that a VAE was called with."""

    def __init__(self, vae: Any) -> None:
        self.sizes: list[int] = []
        whole = vae.decode

        def decode(z: torch.Tensor, **given: Any) -> Any:
            self.sizes.append(len(z))
            return whole(z, **given)

        vae.decode = decode


@pytest.fixture
def own(loaded: LoadedVae) -> LoadedVae:
    """A VAE that may be broken."""
    return replace(loaded, vae=copy.deepcopy(loaded.vae))


@pytest.fixture
def entry(own: LoadedVae) -> OneVae:
    return OneVae(own)


def latents(seed: int, shape: tuple[int, ...] = (1, 4, 4, 6)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 5


def of(seed: int, **given: Any) -> DecodeRequest:
    return DecodeRequest(latents(seed), **{"output": Output.TENSOR, **given})


def decoded(vae: Any, values: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = vae.decode(values, return_dict=False)[0]
    return made


def values_of(answer: HttpResponse | Exception, like: torch.Tensor) -> torch.Tensor:
    assert isinstance(answer, HttpResponse), answer
    return torch.frombuffer(bytearray(answer.body), dtype=like.dtype).reshape(like.shape)


# --- which go together -----------------------------------------------------------------------------------------------------


def job(entry: OneVae, request: Any, pixels: int = 1, queued: float | None = None) -> Job:
    made = job_of(entry, request)
    made.place.pixels = pixels
    return made if queued is None else replace(made, queued=queued)


def taken(batcher: Batcher, jobs: list[Job]) -> list[list[Job]]:
    for each in jobs:
        batcher.put(each)
    batcher.close()
    return list(iter(lambda: batcher.take(lambda _: True) or [], []))


def test_who_is_alone_waits_for_nobody(entry: OneVae) -> None:
    only = job(entry, of(1))
    batcher = Batcher(100, FOREVER, lambda: False)
    batcher.put(only)
    assert batcher.take(lambda _: True) == [only]


def test_calls_of_one_shape_go_together_up_to_so_many_pixels_the_first_come_first(entry: OneVae) -> None:
    jobs = [job(entry, of(seed), pixels=4) for seed in range(5)]
    assert taken(Batcher(9, 0, lambda: False), jobs) == [jobs[:2], jobs[2:4], jobs[4:]]
    jobs = [job(entry, of(seed), pixels=4) for seed in range(2)]
    assert taken(Batcher(0, 0, lambda: False), jobs) == [jobs[:1], jobs[1:]]


def test_another_shape_another_vae_and_the_other_way_go_for_themselves(entry: OneVae, own: LoadedVae) -> None:
    wide, other = DecodeRequest(latents(2, (1, 4, 6, 4))), OneVae(own)
    encode = EncodeRequest(torch.zeros(1, 3, 32, 48))
    jobs = [job(entry, of(1)), job(entry, wide), job(other, of(1)), job(entry, encode), job(entry, of(3, scaling=Scaling(0.5)))]
    # What is sent in another dtype, or is scaled otherwise, comes to the VAE as the same.
    jobs.append(job(entry, DecodeRequest(latents(4).half(), Output.UINT8)))
    assert taken(Batcher(100, 0, lambda: False), jobs) == [[jobs[0], *jobs[4:]], *([each] for each in jobs[1:4])]


def test_videos_go_for_themselves_and_pictures_of_their_vae_together() -> None:
    vae = small_vae("wan")
    entry = OneVae(LoadedVae(vae, family_of(vae), "wan", {}))
    videos = [job(entry, DecodeRequest(torch.zeros(1, 16, 2, 2, 2))) for _ in range(2)]
    pictures = [job(entry, DecodeRequest(torch.zeros(1, 16, 2, 2))) for _ in range(2)]
    assert taken(Batcher(100, 0, lambda: False), [*videos, *pictures]) == [videos[:1], videos[1:], pictures]


def test_while_others_are_on_their_way_a_call_waits_a_moment_for_them(entry: OneVae) -> None:
    jobs = [job(entry, of(seed)) for seed in range(3)]
    coming = [True]
    batcher = Batcher(100, FOREVER, lambda: coming[0])
    batches: list[list[Job]] = []
    batcher.put(jobs[0])
    taker = threading.Thread(target=lambda: batches.append(batcher.take(lambda _: True)))
    taker.start()
    batcher.put(jobs[1])
    assert not batches
    coming[0] = False
    batcher.put(jobs[2])
    taker.join(10)
    assert batches == [jobs]


@pytest.mark.parametrize("why", ["it has waited", "the batch is full"])
def test_a_call_waits_no_longer_than_that(entry: OneVae, why: str) -> None:
    first, second = job(entry, of(1), pixels=5, queued=0.0 if why == "it has waited" else None), job(entry, of(2), pixels=5)
    batcher = Batcher(10 if why == "the batch is full" else 100, 0.01 if why == "it has waited" else FOREVER, lambda: True)
    batcher.put(first)
    batcher.put(second)
    assert batcher.take(lambda _: True) == [first, second]


# --- each its own ----------------------------------------------------------------------------------------------------------


def test_each_gets_its_own_picture_to_the_last_bit_of_the_same_batch_in_the_form_it_wants(
    entry: OneVae, own: LoadedVae
) -> None:
    sent = [latents(0), latents(1, (2, 4, 4, 6)), latents(2)]
    # The halves of the second request belong together.
    expected = decoded(own.vae, torch.cat([sent[0], sent[1], sent[2] / 0.5 + 1.0])).split([1, 2, 1])
    raw, unit, levels = answers(
        entry,
        [
            DecodeRequest(sent[0], Output.TENSOR),
            DecodeRequest(sent[1], Output.UNIT),
            DecodeRequest(sent[2], Output.UINT8, Scaling(0.5, 1.0)),
        ],
    )
    assert torch.equal(values_of(raw, expected[0]), expected[0])
    assert torch.equal(values_of(unit, expected[1]), (expected[1] * 0.5 + 0.5).clamp(0, 1))
    exact = ((expected[2] * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().movedim(1, -1)
    assert torch.equal(values_of(levels, exact), exact)


def test_each_gets_its_own_latents(entry: OneVae, own: LoadedVae) -> None:
    pixels = [torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(2)]
    with torch.inference_mode():
        moments = own.vae.encode(torch.cat(pixels)).latent_dist.parameters.split(1)
    posterior, mode = answers(entry, [EncodeRequest(pixels[0], posterior=True), EncodeRequest(pixels[1], Scaling(2.0))])
    assert torch.equal(values_of(posterior, moments[0]), moments[0])
    mean = moments[1].chunk(2, dim=1)[0] * 2.0
    assert torch.equal(values_of(mode, mean), mean)


@pytest.fixture
def half(loaded: LoadedVae) -> Iterator[Callable[[set[int]], OneVae]]:
    """A VAE in half precision that gives NaN for the pictures of a batch with these numbers."""
    if NO_HALF:
        pytest.skip(NO_HALF)

    def make(broken: set[int]) -> OneVae:
        vae = copy.deepcopy(loaded.vae).half()

        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            for number in broken & set(range(len(output))):
                output[number] = float("nan")
            return output

        vae.decoder.register_forward_hook(spoil)
        return OneVae(replace(loaded, vae=vae))

    return make


def test_only_what_is_nan_in_half_precision_is_made_in_float32(half: Callable[..., OneVae], loaded: LoadedVae) -> None:
    entry = half({1, 2})
    made = Batches(entry.vae(None).module)
    requests = [DecodeRequest(latents(0)), DecodeRequest(latents(1, (2, 4, 4, 6))), DecodeRequest(latents(3))]
    exact = copy.deepcopy(loaded.vae).half().float()
    for answer, request in zip(answers(entry, requests), requests, strict=True):
        expected = decoded(exact, request.latents)
        assert psnr(values_of(answer, expected), expected) >= 50
    assert made.sizes == [4]


def test_latents_that_are_too_large_for_half_precision_are_an_error_of_their_own_request(half: Callable[..., OneVae]) -> None:
    first, large, last = answers(half(set()), [of(0), DecodeRequest(latents(1) * 1e30), of(2)])
    assert isinstance(first, HttpResponse)
    assert isinstance(large, InvalidRequest)
    assert isinstance(last, HttpResponse)


def test_nan_in_every_precision_is_an_error_of_its_own_request(entry: OneVae, own: LoadedVae) -> None:
    spoiled = 1

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output[spoiled] = float("nan")
        return output

    own.vae.decoder.register_forward_hook(spoil)
    first, nan, last = answers(entry, [of(seed) for seed in range(3)])
    assert isinstance(first, HttpResponse)
    assert isinstance(nan, NotFinite)
    assert isinstance(last, HttpResponse)


def test_what_one_client_sends_for_another_vae_is_an_error_of_its_own(entry: OneVae, own: LoadedVae) -> None:
    family = replace(own.family, key="flux", label="Flux")
    jobs = [job_of(OneVae(replace(own, family=family)), of(seed, family=name)) for seed, name in enumerate(("flux", "sd3"))]
    jobs[1].entry = jobs[0].entry
    worker_of().work(jobs)
    assert jobs[0].answer.result().status == 200
    assert isinstance(jobs[1].answer.exception(), InvalidRequest)


# --- memory ----------------------------------------------------------------------------------------------------------------


class Counting(Nobody):
    def __init__(self) -> None:
        self.ran_out: list[tuple[str, Op]] = []
        self.batches: list[int] = []

    def out_of_memory(self, model: str, op: Op) -> None:
        self.ran_out.append((model, op))

    def batch_done(self, model: str, op: Op, pictures: int, seconds: float) -> None:
        self.batches.append(pictures)


def short_of_memory(vae: Any, most: int) -> Batches:
    """The VAE runs out of memory for more than so many pictures."""
    whole = vae.decode

    def decode(z: torch.Tensor, **given: Any) -> Any:
        return whole(z, **given) if len(z) <= most else out_of_memory()

    vae.decode = decode
    return Batches(vae)


@pytest.mark.parametrize(("most", "sizes"), [(2, [4, 2, 2]), (1, [4, 2, 1, 1, 2, 1, 1])])
def test_what_does_not_fit_at_once_is_made_in_smaller_batches(
    entry: OneVae, own: LoadedVae, loaded: LoadedVae, most: int, sizes: list[int]
) -> None:
    made, watcher = short_of_memory(own.vae, most), Counting()
    requests = [DecodeRequest(latents(0, (3, 4, 4, 6))), of(3)]
    if most == 2:
        requests = [of(seed) for seed in range(4)]
    results = answers(entry, requests, watcher=watcher)
    for answer, request in zip(results, requests, strict=True):
        expected = decoded(loaded.vae, request.latents)
        assert psnr(values_of(answer, expected), expected) >= 100
    assert watcher.batches == [4]
    assert watcher.ran_out[0] == ("custom", "decode")
    if most == 2:
        assert made.sizes == sizes


def test_a_picture_that_fits_in_no_batch_is_made_exactly_in_less(entry: OneVae, own: LoadedVae, loaded: LoadedVae) -> None:
    made = short_of_memory(own.vae, 0)
    for answer, seed in zip(answers(entry, [of(1), of(2)]), (1, 2), strict=True):
        expected = decoded(loaded.vae, latents(seed))
        assert psnr(values_of(answer, expected), expected) >= 100
    assert made.sizes == [2, 1, 1]


def test_a_batch_that_is_sure_not_to_fit_is_not_tried(entry: OneVae, own: LoadedVae, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Batches(own.vae)
    monkeypatch.setattr("remote_vae.server.calling.local.whole_fits", lambda call: len(call.tensor) < 3)
    assert all(isinstance(answer, HttpResponse) for answer in answers(entry, [of(seed) for seed in range(4)]))
    assert made.sizes == [2, 2]


def test_where_nothing_fits_each_is_told_and_the_next_call_is_made(
    entry: OneVae, own: LoadedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(own.vae, "decode", out_of_memory)
        broken.setattr(route, "on_cpu", out_of_memory)
        broken.setattr(route, "_known", lambda call: None)
        assert all(isinstance(answer, OutOfMemory) for answer in answers(entry, [of(1), of(2)]))
    assert isinstance(answers(entry, [of(1)])[0], HttpResponse)


# --- who leaves ------------------------------------------------------------------------------------------------------------


def test_who_leaves_a_batch_costs_the_others_nothing(entry: OneVae, own: LoadedVae) -> None:
    jobs = [job_of(entry, of(seed)) for seed in range(3)]
    own.vae.decoder.register_forward_pre_hook(lambda *_: jobs[1].place.leave())
    worker_of().work(jobs)
    expected = decoded(own.vae, torch.cat([latents(seed) for seed in range(3)])).split(1)
    for number in (0, 2):
        assert torch.equal(values_of(jobs[number].answer.result(), expected[number]), expected[number])
    assert isinstance(jobs[1].answer.exception(), ClientGone)


def test_when_all_have_left_the_work_ends(entry: OneVae, own: LoadedVae) -> None:
    jobs = [job_of(entry, of(seed)) for seed in range(2)]
    own.vae.decoder.mid_block.register_forward_pre_hook(lambda *_: [each.place.leave() for each in jobs])
    reached: list[int] = []
    own.vae.decoder.conv_out.register_forward_pre_hook(lambda *_: reached.append(1))
    worker_of().work(jobs)
    assert all(isinstance(each.answer.exception(), ClientGone) for each in jobs)
    assert not reached


def test_a_film_is_not_made_to_its_end_for_who_has_left() -> None:
    class Leaving(Mover):
        frames = 0

        def down(self, tensor: torch.Tensor) -> torch.Tensor:
            self.frames += 1
            place.leave()
            return super().down(tensor)

    place, mover = Place("decode", 1, 1), Leaving(torch.device("cpu"))
    request = DecodeRequest(torch.zeros(1, 16, 3, 2, 2), Output.MP4)
    facts = Facts(family_of(small_vae("wan")), None, has_posterior=True)
    with pytest.raises(ClientGone):
        pictures.answer(request, torch.zeros(1, 3, 9, 16, 16), facts, mover, place)
    assert mover.frames == 1


def test_where_a_card_has_no_room_for_levels_they_are_made_outside(card: Card) -> None:
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    there, mover = card.put(pixels), Mover(DEVICE)
    made = there + 0
    mover.leaves(made)
    card.size = card.live + 100
    request, facts = (
        DecodeRequest(torch.zeros(1, 4, 2, 2), Output.UINT8),
        Facts(load_families()["sd1"], None, has_posterior=True),
    )
    levels = pictures.answer(request, made, facts, mover, Place("decode", 1, 1))
    assert bytes(levels.body) == to_uint8(pixels).numpy().tobytes()


def test_the_engine_makes_what_waits_behind_a_call_at_once(entry: OneVae, own: LoadedVae) -> None:
    gate, made = threading.Event(), Batches(own.vae)
    # Whatever a hook returns would be the decoder's input.
    own.vae.decoder.register_forward_pre_hook(lambda *_: (gate.wait(20), None)[1])
    engine = Engine(entry)
    places = [Place("decode", 24 * 64, 1) for _ in range(4)]
    first = engine.submit(places[0], entry, of(0))
    wait_until(lambda: made.sizes == [1])
    others = [engine.submit(place, entry, of(seed)) for seed, place in enumerate(places[1:], start=1)]
    gate.set()
    together = decoded(own.vae, torch.cat([latents(seed) for seed in (1, 2, 3)])).split(1)
    assert first.result(20).status == 200
    for answer, expected in zip(others, together, strict=True):
        assert torch.equal(values_of(answer.result(20), expected), expected)
    assert made.sizes[:2] == [1, 3]
    assert [place.batch for place in places] == [1, 3, 3, 3]
    assert set(places[3].stages) == {"queue", "predict", "answer"}
    engine.close()


def test_who_asks_for_work_hears_when_there_is_none_for_a_while(entry: OneVae) -> None:
    batcher, first = Batcher(100, 0, lambda: False), job(entry, of(1))
    assert batcher.take(lambda _: True, 0.01) is None
    batcher.put(first)
    assert batcher.take(lambda _: True, 0.01) == [first]
    batcher.close()
    assert batcher.take(lambda _: True, 0.01) == []


def test_of_a_call_that_is_answered_nothing_is_kept(entry: OneVae) -> None:
    engine = Engine(entry)
    places = [Place("decode", 24 * 64, 1) for _ in range(6)]
    answers = [engine.submit(place, entry, of(seed)) for seed, place in enumerate(places)]
    assert all(answer.result(20).status == 200 for answer in answers)
    kept = [weakref.ref(each) for each in (*places, *answers)]
    del places, answers
    wait_until(lambda: gc.collect() >= 0 and not any(each() for each in kept))
    engine.close()
