from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch

from remote_vae.vae import fingerprint as module
from remote_vae.vae.fingerprint import ROUNDINGS, fingerprint, fingerprint_of, matches
from tests.layouts import forge_vae, ldm_vae, sgm_vae
from tests.original_names import ORIGINAL, to_ldm
from tests.vaes import small_kl, small_vae

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

    monkeypatch.setattr(module, "fingerprint", noting)
    return seen


def test_the_fingerprint_does_not_depend_on_dtype_names_or_order() -> None:
    state = small_kl("sd1").half().state_dict()
    name = fingerprint(state)
    assert fingerprint({key: value.float() for key, value in state.items()}) == name
    assert fingerprint({f"first_stage_model.{key}": value for key, value in reversed(state.items())}) == name
    # ldm stores the attention's linear layers as 1 x 1 convolutions
    convolutions = {
        key: value[:, :, None, None] if ".to_" in key and value.ndim == 2 else value for key, value in state.items()
    }
    assert convolutions.keys() == state.keys()
    assert fingerprint(convolutions) == name


# Sana's authors join query, key and value, and LTX's files hold statistics that no module has.
@pytest.mark.parametrize("names", [names for names in ORIGINAL if names[0] not in ("sana", "ltx", "ltx2")], ids=" ".join)
def test_the_fingerprint_is_that_of_the_original_names(names: tuple[str, str]) -> None:
    state = small_vae(names[0]).state_dict()
    assert fingerprint(ORIGINAL[names](state)) == fingerprint(state)


def test_what_is_not_computed_with_does_not_count() -> None:
    state = small_vae("flux2").state_dict()
    name = fingerprint(state)
    for key, value in (
        ("bn.num_batches_tracked", torch.tensor(77)),
        ("decoder.mid_block.resnets.0.temb_proj.weight", torch.randn(3, 4)),
        ("vae_scale", torch.tensor(0.18215)),
    ):
        assert fingerprint({**state, key: value}) == name
    assert fingerprint({**state, "bn.running_mean": state["bn.running_mean"] + 1}) != name


@pytest.mark.parametrize("rounding", ["float16", "bfloat16", "float16_bfloat16"])
def test_a_fingerprint_is_that_of_the_rounded_weights(rounding: str) -> None:
    state = small_kl("sd1").state_dict()
    rounded = dict(state)
    for name in rounding.split("_"):
        rounded = {key: value.to(getattr(torch, name)) for key, value in rounded.items()}
    assert fingerprint(rounded, rounding) == fingerprint(state, rounding)
    assert len({fingerprint(state, other) for other in ROUNDINGS}) == len(ROUNDINGS)


def test_the_fingerprint_tells_two_vaes_apart() -> None:
    state = small_kl("sd1").state_dict()
    other = {key: value.clone() for key, value in state.items()}
    weight = other["decoder.conv_out.weight"]
    weight.view(-1)[0] += 0.5
    assert fingerprint(other) != fingerprint(state)
    assert fingerprint({"a": torch.ones(2, 3)}) != fingerprint({"a": torch.ones(3, 2)})


@pytest.mark.parametrize("file", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(
    "host",
    [(F32,), (F16,), (BF16,), (F16, BF16), (BF16, F32), (F16, F32)],
    ids=lambda dtypes: " then ".join(str(dtype)[6:] for dtype in dtypes),
)
def test_the_same_vae_is_recognised_whatever_the_dtypes_of_both_sides(host: tuple[torch.dtype, ...], file: torch.dtype) -> None:
    # Where one side has passed through float16 and the other through bfloat16 alone, each has dropped what the other has kept.
    is_known = (host[0], file) not in ((F16, BF16), (BF16, F16))
    assert matches(small(*host), said_by_a_server(small(file))) is is_known


@pytest.mark.parametrize("file", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("host", [F32, F16, BF16], ids=str)
def test_another_vae_is_told_apart_whatever_the_dtypes(host: torch.dtype, file: torch.dtype) -> None:
    other = small()
    other.load_state_dict(changed(other))
    assert matches(small(host), said_by_a_server(other.to(file))) is False


@pytest.mark.parametrize("make", [ldm_vae, sgm_vae, forge_vae])
def test_the_vae_of_every_host_is_recognised_by_its_weights_alone(make: Callable[..., Any]) -> None:
    diffusers_vae = small()
    host = make(channels=WIDTHS)
    host.load_state_dict(to_ldm(diffusers_vae.state_dict(), 4))
    assert matches(host.half(), said_by_a_server(diffusers_vae)) is True


def test_the_rounding_is_that_of_the_weights(loaded: Any) -> None:
    assert fingerprint_of(small()) == ("float16", fingerprint(small().state_dict()))
    assert fingerprint_of(small(BF16)) == ("bfloat16", fingerprint(small().state_dict(), "bfloat16"))
    half = small(BF16)
    half.decoder.to(F32)
    assert fingerprint_of(half) == ("float16", fingerprint(half.state_dict()))


def test_with_a_server_that_names_another_rounding_only_a_difference_cannot_be_told() -> None:
    older = {"float16": said_by_a_server(small())["float16"]}
    assert matches(small(F16), older) is True
    assert matches(small(BF16), older) is None
    assert matches(small(), {}) is None


def test_the_weights_are_hashed_once(hashed: list[str]) -> None:
    vae = small()
    assert fingerprint_of(vae) == fingerprint_of(vae)
    assert hashed == ["float16"]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_other_weights_in_the_same_module_are_noticed(dtype: torch.dtype, hashed: list[str]) -> None:
    vae = small(dtype)
    before = said_by_a_server(vae)
    assert matches(vae, before) is True
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.load_state_dict(changed(vae))
    assert matches(vae, before) is False
    hashed.clear()
    vae.load_state_dict(state)
    assert matches(vae, before) is True
    assert not hashed


def test_a_conversion_is_noticed_and_going_back_and_forth_is_not_paid_again(hashed: list[str]) -> None:
    vae = small(F16)
    half = fingerprint_of(vae)
    assert fingerprint_of(vae.to(BF16)) != half
    for dtype in (F32, BF16) * 20:
        fingerprint_of(vae.to(dtype))
    # Once more for the way from bfloat16 back to float32, whose values are others than those of float16.
    assert len(hashed) == 3


def test_a_move_to_another_device_is_not_paid(hashed: list[str]) -> None:
    vae = small()
    fingerprint_of(vae)
    for parameter in vae.parameters():
        parameter.data = parameter.data.clone()
    vae.to(memory_format=torch.channels_last)
    fingerprint_of(vae)
    assert hashed == ["float16"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_vae_on_a_gpu_is_that_on_the_cpu(dtype: torch.dtype, hashed: list[str]) -> None:
    vae = small(dtype)
    name = fingerprint_of(vae)
    assert fingerprint_of(vae.cuda()) == name
    assert len(hashed) == 1
    assert fingerprint_of(small().cuda().to(dtype)) == name


def test_no_vae_is_kept_alive() -> None:
    vae = small()
    fingerprint_of(vae)
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
    assert fingerprint_of(vae) is None
    assert matches(vae, said_by_a_server(small())) is None


def test_weights_that_accelerate_brings_in_layer_by_layer_are_read_where_it_keeps_them() -> None:
    vae = small(F16)
    name = fingerprint_of(vae)
    accelerate.cpu_offload(vae, torch.device("cpu"))
    assert all(weight.is_meta for weight in vae.parameters())
    assert fingerprint_of(vae) == name


def test_one_weight_on_the_meta_device_is_enough_to_know_nothing() -> None:
    vae = small()
    vae.decoder.conv_out.to("meta")
    assert fingerprint_of(vae) is None


def test_many_threads_pay_once(hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small()
    noting = module.fingerprint

    def slowly(state: Any, rounding: str = "float16") -> str:
        # Long enough for the other threads to come by.
        time.sleep(0.1)
        return noting(state, rounding)

    monkeypatch.setattr(module, "fingerprint", slowly)
    names: list[object] = []
    threads = [threading.Thread(target=lambda: names.append(fingerprint_of(vae))) for _ in range(8)]
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
        patch.setattr(module, "fingerprint", while_loading)
        assert fingerprint_of(vae) is None
    vae.load_state_dict(small().state_dict())
    assert fingerprint_of(vae) == ("float16", before)
