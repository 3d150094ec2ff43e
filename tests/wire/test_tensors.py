from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import TensorHead, tensors
from remote_vae.wire.tensors import DTYPES, dtype_name, is_within, tensor_from_bytes, tensor_to_bytes
from tests.pretend_gpu import pretended

SIZES = st.integers(1, 6)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where there is no GPU, one is pretended."""
    pretending = request.param == "cuda" and not torch.cuda.is_available()
    with pretended(monkeypatch) if pretending else nullcontext():
        yield request.param


@given(shape=st.lists(SIZES, min_size=1, max_size=5), name=st.sampled_from(sorted(DTYPES)))
def test_every_dtype_and_shape_comes_back_bit_equal(shape: list[int], name: str) -> None:
    tensor = (torch.randn(shape) * 50).abs().to(DTYPES[name])
    head = TensorHead.parse([str(size) for size in shape], name)
    back = tensor_from_bytes(bytes(tensor_to_bytes(tensor)), head)
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_a_transposed_tensor_is_sent_in_its_logical_order(name: str, device: str) -> None:
    tensor = torch.arange(24).reshape(1, 2, 3, 4).to(device, DTYPES[name])
    for view in (
        tensor.transpose(2, 3),
        tensor[..., ::2],
        tensor.expand(3, 2, 3, 4),
        tensor.to(memory_format=torch.channels_last),
    ):
        head = TensorHead(tuple(view.shape), view.dtype)
        assert torch.equal(tensor_from_bytes(bytes(tensor_to_bytes(view)), head), view.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_with_gradient_and_an_inference_tensor_can_be_sent(dtype: torch.dtype, device: str) -> None:
    ones = torch.ones(3, dtype=dtype)
    sent = tensor_to_bytes(torch.ones(3, dtype=dtype, device=device, requires_grad=True) * 2)
    assert torch.equal(tensor_from_bytes(bytes(sent), TensorHead((3,), dtype)), 2 * ones)
    with torch.inference_mode():
        inside = torch.ones(3, dtype=dtype, device=device)
    assert torch.equal(tensor_from_bytes(bytes(tensor_to_bytes(inside)), TensorHead((3,), dtype)), ones)


def test_bytes_are_little_endian() -> None:
    assert bytes(tensor_to_bytes(torch.tensor([1.0]))) == b"\x00\x00\x80\x3f"


def test_a_dtype_outside_the_protocol_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="int64"):
        dtype_name(torch.int64)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("[1, 2", "float32"),
        ('"1"', "float32"),
        ("{}", "float32"),
        ("[1, -2]", "float32"),
        ("[0]", "float32"),
        ("[1.5]", "float32"),
        ("[true]", "float32"),
        ("[]", "float32"),
        ("[1,1,1,1,1,1]", "float32"),
        ("[99999999999]", "float32"),
        (["1", "x"], "float32"),
        ("[1]", "float64"),
        ("[1]", None),
        (None, "float32"),
    ],
)
def test_a_shape_or_dtype_that_makes_no_sense_is_refused(shape: object, dtype: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        TensorHead.parse(shape, dtype)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_length_that_does_not_fit_cannot_become_a_tensor(extra: int) -> None:
    head = TensorHead((2, 3), torch.float16)
    with pytest.raises(MalformedAnswer, match="expected 12"):
        tensor_from_bytes(bytes(12 + extra), head)


def test_a_result_can_be_written_to_even_from_immutable_bytes() -> None:
    tensor = tensor_from_bytes(bytes(12), TensorHead((3,), torch.float32))
    tensor += 1
    assert tensor.sum() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("limit", [None, 1.01, 100.0])
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=4), tail=st.integers(0, 2**16 - 1))
def test_values_are_within_a_limit_when_each_of_them_is(
    dtype: torch.dtype, limit: float | None, bits: list[int], tail: int
) -> None:
    if dtype == torch.float32:
        values = torch.tensor([value << 16 | tail for value in bits], dtype=torch.int64).to(torch.int32).view(dtype)
    else:
        values = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype)
    largest = torch.finfo(dtype).max if limit is None else limit
    expected = bool((values.double().abs() <= largest).all())
    assert is_within(values, limit) is expected
    with patch.object(tensors, "_looks_at_half", False), patch.object(tensors, "_PART", 2):
        # torch 2.1, which AUTOMATIC1111 brings, cannot look at float16 on the CPU.
        assert is_within(values, limit) is expected
