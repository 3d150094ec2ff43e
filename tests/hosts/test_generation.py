"""What is known of one generation: the user's request, the infotext, the encodings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from remote_vae.call import VaeCall
from remote_vae.history import Record
from remote_vae.hosts.generation import FOLLOW, INFOTEXT, MODE_TEXT, REQUEST, TRANSFER_TEXT, Generation, Request
from remote_vae.vae.at_work import VaeAtWork
from remote_vae.vae.families import find_family
from remote_vae.wire import EncodeAnswer

REMOTE = Record("decode", "remote", "u8", "http://studio:7870/decode", 1, 64, 64, 1, 1, 1.0, "", 0.0)
LOCAL = replace(REMOTE, route="local", detail="", endpoint="")
FELL_BACK = replace(REMOTE, route="local", detail="", fallback_reason="503")


def processing(**attributes: Any) -> Any:
    return SimpleNamespace(extra_generation_params={}, **attributes)


def as_encode(record: Record) -> Record:
    return replace(record, op="encode")


# --- what the user wants -------------------------------------------------------------------------------------------------


def test_a_pass_within_a_generation_does_as_the_generation_around_it() -> None:
    outer = Generation(processing(**{REQUEST: Request("remote", "raw")}))
    assert Generation(processing(), outer).request == Request("remote", "raw")
    assert Generation(processing(**{REQUEST: Request("off")}), outer).request == Request("off")
    assert Generation(processing()).request == Request(FOLLOW, FOLLOW)


# --- infotext ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([REMOTE], "decode remote (u8)"),
        ([as_encode(FELL_BACK), REMOTE], "decode remote (u8), encode local (503)"),
        ([FELL_BACK, FELL_BACK], "decode local (503)"),
        ([REMOTE, FELL_BACK], "decode remote (u8) and local (503)"),
        ([replace(FELL_BACK, fallback_reason="503; asked again in 29 s")], "decode local (503)"),
        ([replace(FELL_BACK, fallback_reason="bad answer: values from nan to nan")], "decode local (bad answer)"),
        ([replace(FELL_BACK, fallback_reason="latents: got shape [1, 4, 8]")], "decode local (latents: got shape [1, 4, 8])"),
        ([replace(FELL_BACK, fallback_reason="x" * 99)], f"decode local ({'x' * 60} ...)"),
        ([replace(FELL_BACK, fallback_reason="word " * 20)], f"decode local ({'word ' * 12}...)"),
        ([replace(FELL_BACK, fallback_reason="studio: no answer")], "decode local (the endpoint: no answer)"),
        ([replace(LOCAL, fallback_reason="no endpoint is set")], "decode local (no endpoint is set)"),
        ([replace(REMOTE, detail="u8, another VAE")], "decode remote (u8, another VAE)"),
        ([LOCAL, as_encode(REMOTE)], "decode local, encode remote (u8)"),
        # By a device that the user has picked, or that was left.
        ([replace(LOCAL, detail="on cuda:1")], "decode local on cuda:1"),
        ([replace(LOCAL, route="tiled", detail="exact, on xpu:0")], "decode local on xpu:0"),
        ([replace(FELL_BACK, detail="on the CPU")], "decode local on the CPU (503)"),
        ([replace(LOCAL, route="tiled", detail="exact")], None),
        ([LOCAL], None),
        ([], None),
    ],
)
def test_the_infotext_says_what_happened(records: list[Record], text: str | None) -> None:
    p = processing()
    generation = Generation(p)
    for record in records:
        generation.record(record)
    assert p.extra_generation_params.get(INFOTEXT) == text


def test_the_endpoint_is_named_where_the_user_wants_that() -> None:
    p = processing()
    generation = Generation(p, names_endpoint=True)
    generation.record(REMOTE)
    assert p.extra_generation_params[INFOTEXT] == "decode remote studio (u8)"
    generation.record(replace(FELL_BACK, op="encode", fallback_reason="studio: no answer"))
    assert p.extra_generation_params[INFOTEXT] == "decode remote studio (u8), encode local (studio: no answer)"


def test_what_was_asked_for_stands_in_a_picture_that_was_made_so_and_in_no_other() -> None:
    p = processing(iteration=0, **{REQUEST: Request("remote", "png")})
    generation = Generation(p)
    generation.record(REMOTE)
    assert list(p.extra_generation_params.items()) == [
        (MODE_TEXT, "remote"),
        (TRANSFER_TEXT, "png"),
        (INFOTEXT, "decode remote (u8)"),
    ]
    p.iteration = 1
    generation.record(FELL_BACK)
    assert p.extra_generation_params == {INFOTEXT: "decode local (503)"}


def test_switched_off_for_one_generation_is_said_without_any_call() -> None:
    p = processing(**{REQUEST: Request("off")})
    Generation(p)
    assert p.extra_generation_params == {MODE_TEXT: "off"}


def test_what_decoded_an_earlier_iteration_says_nothing_of_the_next() -> None:
    p = processing(iteration=0)
    generation = Generation(p)
    generation.record(as_encode(REMOTE))
    generation.record(REMOTE)
    p.iteration = 1
    generation.record(FELL_BACK)
    assert p.extra_generation_params[INFOTEXT] == "decode local (503), encode remote (u8)"


def test_a_later_iteration_that_was_all_local_takes_the_text_away() -> None:
    p = processing(iteration=0)
    generation = Generation(p)
    generation.record(REMOTE)
    p.iteration = 1
    generation.record(LOCAL)
    assert INFOTEXT not in p.extra_generation_params


def test_a_pass_within_a_generation_keeps_its_text() -> None:
    p = processing()
    outer = Generation(p)
    outer.record(REMOTE)
    Generation(p, outer)
    assert INFOTEXT in p.extra_generation_params
    Generation(processing(), outer)
    assert INFOTEXT in p.extra_generation_params


@pytest.mark.parametrize("p", [None, SimpleNamespace(), SimpleNamespace(extra_generation_params=None)])
def test_a_processing_object_without_an_infotext_is_no_trouble(p: Any) -> None:
    Generation(p).record(REMOTE)
    Generation(p, Generation(processing())).record(FELL_BACK)
    assert Generation(p).request == Request()


# --- encodings -----------------------------------------------------------------------------------------------------------


class Encoder:
    """Answers encodes and counts them: the moments of a picture are its mean colour."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, call: VaeCall[torch.Tensor]) -> torch.Tensor:
        self.sizes.append(call.tensor.shape[0])
        moments = call.tensor.mean(dim=(2, 3), keepdim=True).repeat(1, 3, 1, 1)[:, :8]
        return call.adopt(EncodeAnswer(moments, is_posterior=True))


def encode_call(pictures: torch.Tensor, vae: object = None) -> VaeCall[torch.Tensor]:
    def whole() -> torch.Tensor:
        raise AssertionError("nobody asked for it")

    def adopt(answer: Any) -> torch.Tensor:
        return answer.latents

    return VaeCall("encode", pictures, VaeAtWork(vae, find_family("sd1")), adopt, whole)


def test_one_picture_is_encoded_once() -> None:
    generation, encoder = Generation(processing()), Encoder()
    picture = torch.rand(1, 3, 8, 8)
    results = [generation.encode_once(encode_call(picture.clone()), encoder) for _ in range(3)]
    assert encoder.sizes == [1]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_batch_of_one_picture_is_sent_as_one_and_comes_back_as_a_batch() -> None:
    generation, encoder = Generation(processing()), Encoder()
    picture = torch.rand(1, 3, 8, 8)
    result = generation.encode_once(encode_call(picture.repeat(3, 1, 1, 1)), encoder)
    again = generation.encode_once(encode_call(picture), encoder)
    assert encoder.sizes == [1]
    assert torch.equal(result, again.repeat(3, 1, 1, 1))


def test_other_pictures_are_encoded_each() -> None:
    generation, encoder = Generation(processing()), Encoder()
    for picture in (torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)):
        generation.encode_once(encode_call(picture), encoder)
    assert encoder.sizes == [1, 2, 1, 1]


def test_the_same_picture_for_another_vae_or_in_another_precision_is_encoded_again() -> None:
    generation, encoder = Generation(processing()), Encoder()
    picture = torch.zeros(1, 3, 8, 8)
    vaes = object(), object()
    for call in (encode_call(picture, vaes[0]), encode_call(picture, vaes[1]), encode_call(picture.half(), vaes[1])):
        generation.encode_once(call, encoder)
    assert encoder.sizes == [1, 1, 1]


def test_only_so_many_encodings_are_kept() -> None:
    generation, encoder = Generation(processing()), Encoder()
    for value in [*range(9), 0]:
        generation.encode_once(encode_call(torch.full((1, 3, 8, 8), float(value))), encoder)
    assert len(encoder.sizes) == 10
