from __future__ import annotations

import json

import numpy as np
import pytest

from remote_vae.errors import MalformedAnswer
from remote_vae.vae.families import Family
from remote_vae.vae.fingerprint import ROUNDINGS
from remote_vae.wire import FINGERPRINT_KEYS, Info, expect_info


def read(body: bytes) -> Info:
    return expect_info({}).finish(np.frombuffer(body, dtype=np.uint8))


def test_every_rounding_has_its_key() -> None:
    assert FINGERPRINT_KEYS.keys() == ROUNDINGS.keys()
    assert len(set(FINGERPRINT_KEYS.values())) == len(ROUNDINGS)


def test_what_is_said_is_read_and_the_rest_is_empty() -> None:
    body = {"family": "sd1", "model": "some vae", "fingerprint": "0123456789abcdef", "limits": {"max_pixels": 1}}
    assert read(json.dumps(body).encode()) == Info("sd1", "some vae", {"float16": "0123456789abcdef"})
    assert read(b"{}") == Info()


@pytest.mark.parametrize("wrong", [None, "8", [8], 0, -1, 8.5, 10**400, True])
def test_limits_are_read_and_nonsense_is_none(wrong: object) -> None:
    body = {"limits": {"max_batch": 8, "max_total_pixels": wrong}, "models": [{"name": "a"}, {"name": "b"}]}
    info = read(json.dumps(body).encode())
    assert [each.limits for each in (info, *info.models)] == [{"max_batch": 8}] * 3
    assert read(json.dumps({"limits": wrong}).encode()).limits == {}


FACTORS = {"latent_channels": 16, "downscale": 8, "scaling_factor": 0.3611, "shift_factor": 0}


VIDEO = {
    **FACTORS, "pixel_channels": 4, "video": True, "frame_scale": 4, "latents_mean": [0.5] * 16, "latents_std": [2] * 16,
}  # fmt: skip


def test_the_factors_of_a_vae_that_has_no_name_are_read() -> None:
    """A server of an earlier version says no more than four of them."""
    assert read(json.dumps(FACTORS).encode()).vae == Family("custom", "custom VAE", 16, 8, 0.3611)


def test_the_shape_of_a_video_vae_that_has_no_name_is_read() -> None:
    numbers = {"latents_mean": (0.5,) * 16, "latents_std": (2.0,) * 16}
    expected = Family("custom", "custom VAE", 16, 8, 0.3611, pixel_channels=4, video=True, frame_scale=4, **numbers)
    assert read(json.dumps(VIDEO).encode()).vae == expected


@pytest.mark.parametrize("wrong", [None, True, "16", [], 0, -8, 1e30, 10**400, float("nan"), 8.5])
@pytest.mark.parametrize("key", ["latent_channels", "downscale", "pixel_channels", "frame_scale"])
def test_factors_that_cannot_be_are_none(key: str, wrong: object) -> None:
    assert read(json.dumps({**VIDEO, key: wrong}).encode()).vae is None


@pytest.mark.parametrize("wrong", [None, 1, "0.5", [0.5], [0.5] * 17, [None] * 16, [[]] * 16, [float("nan")] * 16, {}])
@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_means_that_cannot_be_are_none(key: str, wrong: object) -> None:
    assert read(json.dumps({**VIDEO, key: wrong}).encode()).vae is None


@pytest.mark.parametrize("key", FACTORS)
def test_three_factors_are_none(key: str) -> None:
    assert read(json.dumps({each: value for each, value in FACTORS.items() if each != key}).encode()).vae is None


def test_a_name_is_one_short_line() -> None:
    assert read(json.dumps({"model": "a\nb\x1b[31m" + "x" * 500}).encode()).model == "a b [31m" + "x" * 69 + "..."


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b"\xff\xfe", b"[]", b"null", b'"text"', b"[" * 60_000, b'{"a":' * 10_000,
        b'{"family": 1}', b'{"model": null}', b'{"fingerprint": 12}', b'{"fingerprint": "xyz"}', b'{"fingerprint": ""}',
        b'{"fingerprint": "0123456789ABCDEF"}', b'{"fingerprint_bfloat16": []}',
        b'{"models": {}}', b'{"models": [1]}', b'{"models": null}', b'{"models": [{"name": 1}]}', b'{"extras": "late"}',
        b'{"models": [{"fingerprint": "x"}]}', json.dumps({"models": [{}] * 65}).encode(),
    ],
)  # fmt: skip
def test_what_is_no_information_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedAnswer):
        read(body)


def test_of_several_vaes_each_is_read() -> None:
    models = [
        {"name": "sdxl", "loaded": True, "family": "sdxl", "fingerprint": "0123456789abcdef", "model": "some vae"},
        {"name": "own", "loaded": False},
        {"name": "odd", **VIDEO},
    ]
    info = read(json.dumps({**models[0], "models": models, "extras": ["late", 1, None, "x" * 200, "delta-gzip"]}).encode())
    assert info.extras == ("late", "x" * 77 + "...", "delta-gzip")
    assert [each.name for each in info.models] == ["sdxl", "own", "odd"]
    assert [each.is_loaded for each in info.models] == [True, False, True]
    assert info.models[0] == Info(
        "sdxl", "some vae", {"float16": "0123456789abcdef"}, name="sdxl", is_loaded=True, extras=info.extras
    )
    assert info.models[1].family == ""
    assert info.models[2].vae is not None
    assert info.fingerprints == info.models[0].fingerprints


def test_no_more_words_are_read_than_there_can_be() -> None:
    assert len(read(json.dumps({"extras": ["late"] * 10_000}).encode()).extras) == 32
