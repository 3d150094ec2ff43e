from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from remote_vae.vae import fingerprint as identity
from remote_vae.vae.fingerprint import ROUNDINGS, Identity, fingerprint
from tests.layouts import forge_vae, ldm_vae, sgm_vae
from tests.server.test_models import to_ldm
from tests.vaes import small_kl

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDTHS = (32, 32, 64, 64)


def small(*dtypes: torch.dtype) -> diffusers.AutoencoderKL:
    """Always the same VAE, brought to ``dtypes`` one after the other."""
    vae = small_kl("sd1", block_out_channels=WIDTHS)
    for dtype in dtypes:
        vae = vae.to(dtype)
    return vae


def said_by_a_server(vae: Any) -> dict[str, str]:
    """Its fingerprints in ``GET /info``, of the weights as they are in its file."""
    return {rounding: fingerprint(vae.state_dict(), rounding) for rounding in ROUNDINGS}


def changed(vae: Any) -> dict[str, torch.Tensor]:
    """The weights of ``vae`` with a decoder that was trained on."""
    return {
        name: value * 1.01 if name.startswith("decoder.") and value.is_floating_point() else value.clone()
        for name, value in vae.state_dict().items()
    }


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roundings of every fingerprint that was computed, not remembered."""
    seen: list[str] = []

    def noting(state: Any, rounding: str = "float16") -> str:
        seen.append(rounding)
        return fingerprint(state, rounding)

    monkeypatch.setattr(identity, "fingerprint", noting)
    return seen


@pytest.mark.parametrize("file", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(
    "host",
    [(F32,), (F16,), (BF16,), (F16, BF16), (BF16, F32), (F16, F32)],
    ids=lambda dtypes: " then ".join(str(dtype)[6:] for dtype in dtypes),
)
def test_the_same_vae_is_recognised_whatever_the_dtypes_of_both_sides(host: tuple[torch.dtype, ...], file: torch.dtype) -> None:
    matches = Identity(small(*host)).matches(said_by_a_server(small(file)))
    # Where one side has passed through float16 and the other through bfloat16 alone, each has lost what the other has kept.
    lost = (host[0] == F16 and file == BF16) or (host[0] == BF16 and file == F16)
    assert matches is not lost


@pytest.mark.parametrize("file", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("host", [F32, F16, BF16], ids=str)
def test_another_vae_is_told_apart_whatever_the_dtypes(host: torch.dtype, file: torch.dtype) -> None:
    other = small()
    other.load_state_dict(changed(other))
    assert Identity(small(host)).matches(said_by_a_server(other.to(file))) is False


@pytest.mark.parametrize("make", [ldm_vae, sgm_vae, forge_vae])
def test_the_vae_of_every_host_is_recognised_by_its_weights_alone(make: Callable[..., Any]) -> None:
    diffusers_vae = small()
    host = make(channels=WIDTHS)
    host.load_state_dict(to_ldm(diffusers_vae.state_dict(), 4))
    assert Identity(host.half()).matches(said_by_a_server(diffusers_vae)) is True


def test_the_rounding_is_that_of_the_weights(loaded: Any) -> None:
    assert Identity(small()).fingerprint() == ("float16", fingerprint(small().state_dict()))
    assert Identity(small(BF16)).fingerprint() == ("bfloat16", fingerprint(small().state_dict(), "bfloat16"))
    half = small(BF16)
    half.decoder.to(F32)
    assert Identity(half).fingerprint() == ("float16", fingerprint(half.state_dict()))


def test_with_a_server_that_names_another_rounding_only_a_difference_cannot_be_told() -> None:
    older = {"float16": said_by_a_server(small())["float16"]}
    assert Identity(small(F16)).matches(older) is True
    assert Identity(small(BF16)).matches(older) is None
    assert Identity(small()).matches({}) is None


def test_the_weights_are_hashed_once_for_every_identity_of_a_vae(hashed: list[str]) -> None:
    vae = small()
    names = {Identity(vae, picked).fingerprint() for picked in ("", "", "a.safetensors")}
    assert len(names) == 1
    assert hashed == ["float16"]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_other_weights_in_the_same_module_are_noticed(dtype: torch.dtype, hashed: list[str]) -> None:
    vae = small(dtype)
    before = said_by_a_server(vae)
    assert Identity(vae).matches(before) is True
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.load_state_dict(changed(vae))
    assert Identity(vae).matches(before) is False
    hashed.clear()
    vae.load_state_dict(state)
    assert Identity(vae).matches(before) is True
    assert not hashed


def test_a_conversion_is_noticed_and_going_back_and_forth_is_not_paid_again(hashed: list[str]) -> None:
    vae = small(F16)
    half = Identity(vae).fingerprint()
    assert Identity(vae.to(BF16)).fingerprint() != half
    for dtype in (F32, BF16) * 20:
        Identity(vae.to(dtype)).fingerprint()
    # Once more for the way from bfloat16 back to float32, whose values are others than those of float16.
    assert len(hashed) == 3


def test_a_move_to_another_device_is_not_paid(hashed: list[str]) -> None:
    vae = small()
    Identity(vae).fingerprint()
    for parameter in vae.parameters():
        parameter.data = parameter.data.clone()
    vae.to(memory_format=torch.channels_last)
    Identity(vae).fingerprint()
    assert hashed == ["float16"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_vae_on_a_gpu_is_that_on_the_cpu(dtype: torch.dtype, hashed: list[str]) -> None:
    vae = small(dtype)
    name = Identity(vae).fingerprint()
    assert Identity(vae.cuda()).fingerprint() == name
    assert len(hashed) == 1
    assert Identity(small().cuda().to(dtype)).fingerprint() == name


def test_no_vae_is_kept_alive() -> None:
    vae = small()
    Identity(vae).fingerprint()
    ref = weakref.ref(vae)
    del vae
    gc.collect()
    assert ref() is None


class Unreadable(torch.nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("offloaded")


@pytest.mark.parametrize("make", [lambda: small().to("meta"), lambda: Unreadable(2, 2), lambda: torch.nn.Identity(), object])
def test_weights_that_cannot_be_read_have_no_fingerprint(make: Callable[[], Any]) -> None:
    vae = make()
    assert Identity(vae).fingerprint() is None
    assert Identity(vae).matches(said_by_a_server(small())) is None


def test_one_weight_on_the_meta_device_is_enough_to_know_nothing() -> None:
    vae = small()
    vae.decoder.conv_out.to("meta")
    assert Identity(vae).fingerprint() is None


def test_many_threads_pay_once(hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small()
    noting = identity.fingerprint

    def slowly(state: Any, rounding: str = "float16") -> str:
        # Long enough for the other threads to come by.
        time.sleep(0.1)
        return noting(state, rounding)

    monkeypatch.setattr(identity, "fingerprint", slowly)
    names: list[object] = []
    threads = [threading.Thread(target=lambda: names.append(Identity(vae).fingerprint())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == [("float16", fingerprint(vae.state_dict()))] * 8
    assert hashed == ["float16"]


def test_weights_that_change_while_they_are_hashed_have_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small()
    before, other = fingerprint(vae.state_dict()), changed(vae)

    def while_loading(state: Any, rounding: str = "float16") -> str:
        name = fingerprint(state, rounding)
        vae.load_state_dict(other)
        return name

    with monkeypatch.context() as patch:
        patch.setattr(identity, "fingerprint", while_loading)
        assert Identity(vae).fingerprint() is None
    vae.load_state_dict(small().state_dict())
    assert Identity(vae).fingerprint() == ("float16", before)
