"""What every message of the protocol is made of: bytes for HTTP, and the head by which an answer is judged.

``HttpRequest`` and ``HttpResponse`` are bytes; ``DecodeRequest``, ``DecodeAnswer`` and their like are what the bytes say. A
client first checks status and headers (``expect_decode``, ``expect_encode``, ``expect_info``), which gives an ``Expected``:
how many bytes may come, and how to turn them into the answer. So no memory is taken for a size that the request does not
call for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar, Union
from urllib.parse import urlencode

import numpy as np
import torch

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire.tensors import MAX_SIZE, Buffer, TensorHead, dtype_name, is_within, tensor_from_bytes, tensor_to_bytes

T = TypeVar("T")

TENSOR_TYPE = "tensor/binary"
BASE64_TYPE = "tensor/base64"

# Pixels per latent cell of any VAE the protocol is used with (TAESD 8, Flux 8, DC-AE 32).
KNOWN_DOWNSCALES = (4, 8, 16, 32)

# What a body of that sort may be labelled as; no label at all is let through, as shape and length are checked anyway.
TENSOR_LABELS = frozenset({"", TENSOR_TYPE, "application/octet-stream"})


@dataclass(frozen=True)
class HttpRequest:
    """What goes into one POST. ``body`` may be a view that keeps a tensor alive."""

    query: tuple[tuple[str, str], ...]
    headers: Mapping[str, str]
    body: Union[bytes, memoryview]

    def url(self, endpoint: str) -> str:
        """``endpoint`` with the query; the shape is one repeated key a dimension."""
        return _with_query(endpoint, self.query)


# A user's calls differ in their values and hardly in anything else.
@lru_cache(maxsize=256)
def _with_query(endpoint: str, query: tuple[tuple[str, str], ...]) -> str:
    return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}" if query else endpoint


@dataclass(frozen=True)
class HttpResponse:
    """What a server sends back."""

    status: int
    headers: Mapping[str, str]
    body: Union[bytes, memoryview]


@dataclass(frozen=True)
class Expected(Generic[T]):
    """What may follow the head of an answer: exactly ``exact`` bytes, or up to ``limit``."""

    finish: Callable[[np.ndarray], T]
    limit: int
    exact: int | None = None


def checked_bytes(tensor: Any, name: str, dimensions: tuple[int, ...]) -> memoryview:
    """The bytes of ``tensor``, if it can be sent. Raises InvalidRequest."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    dtype_name(tensor.dtype)
    if tensor.ndim not in dimensions:
        allowed = " or ".join(f"{count}-D" for count in dimensions)
        raise InvalidRequest(f"{name} must be {allowed}, not {list(tensor.shape)}")
    if not 1 <= min(tensor.shape) <= max(tensor.shape) <= MAX_SIZE:
        raise InvalidRequest(f"{name}: shape {list(tensor.shape)} must have sizes from 1 to {MAX_SIZE}")
    values = tensor_to_bytes(tensor)
    if not is_within(values, tensor.dtype):
        raise InvalidRequest(f"{name}: NaN or infinite values; the generation itself went wrong")
    return values


def read_tensor(body: Buffer, head: TensorHead) -> torch.Tensor:
    """The tensor of a request. Raises InvalidRequest."""
    try:
        return tensor_from_bytes(body, head)
    except MalformedAnswer as error:
        raise InvalidRequest(f"the body does not fit the query: {error}") from None


def head_headers(tensor: torch.Tensor) -> dict[str, str]:
    """Shape and dtype beside a tensor answer."""
    return {"shape": json.dumps(list(tensor.shape)), "dtype": dtype_name(tensor.dtype)}


def read_head(shape: object, dtype: object) -> TensorHead:
    """Shape and dtype of a tensor answer. Raises MalformedAnswer."""
    if shape is None or dtype is None:
        raise MalformedAnswer("no shape and dtype beside the tensor")
    try:
        return TensorHead.parse(shape, dtype)
    except ValueError as error:
        raise MalformedAnswer(str(error)) from None


def check_label(label: str | None, encoding: str | None, allowed: frozenset[str]) -> None:
    """Raises MalformedAnswer: the answer is labelled as something else."""
    label = (label or "").partition(";")[0].strip().lower()
    if label not in allowed:
        raise MalformedAnswer(f"content type {label[:60]}")
    if (encoding or "identity").lower() != "identity":
        raise MalformedAnswer(f"content encoding {(encoding or '')[:20]}, which was not asked for")


def check_float(head: TensorHead) -> None:
    """Raises MalformedAnswer: whole numbers."""
    if head.dtype == torch.uint8:
        raise MalformedAnswer(f"{head}, and floating point values were asked for")


def check_values(tensor: torch.Tensor, limit: float) -> None:
    """Raises MalformedAnswer: values that are not finite, or of a larger magnitude than ``limit``."""
    if not is_within(tensor_to_bytes(tensor), tensor.dtype, limit):
        low, high = (float(value) for value in torch.aminmax(tensor.float()))
        raise MalformedAnswer(f"values from {low:g} to {high:g}, which no VAE gives")
