"""What a tensor or the head of an answer has to be like, whichever message it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire.errors import one_line
from remote_vae.wire.http import TENSOR_TYPE, Buffer
from remote_vae.wire.tensors import (
    MAX_SIZE,
    TensorHead,
    dtype_name,
    is_within,
    on_cpu,
    tensor_from_bytes,
    tensor_to_bytes,
)

# Pixels per latent cell of any VAE the protocol is used with (TAESD 8, Flux 8, Wan 2.2's 5B 16, DC-AE 32).
KNOWN_DOWNSCALES = (4, 8, 16, 32)
# Channels of pixels: with an alpha channel or without.
PIXEL_CHANNELS = (3, 4)

# What a tensor's body may be labelled as; no label at all is let through, as shape and length are checked anyway.
TENSOR_LABELS = frozenset({"", TENSOR_TYPE, "application/octet-stream"})


def checked_bytes(tensor: Any, name: str, dimensions: tuple[int, ...]) -> memoryview:
    """The bytes of ``tensor``, if it can be sent. Raises InvalidRequest."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    dtype_name(tensor.dtype)
    if tensor.ndim not in dimensions:
        allowed = " or ".join(map(str, dimensions))
        raise InvalidRequest(f"{name}: got shape {list(tensor.shape)}, expected {allowed} dimensions")
    if not 1 <= min(tensor.shape) <= max(tensor.shape) <= MAX_SIZE:
        raise InvalidRequest(f"{name}: got shape {list(tensor.shape)}, expected sizes from 1 to {MAX_SIZE}")
    tensor = on_cpu(tensor)
    if not is_within(tensor):
        raise InvalidRequest(f"{name}: NaN or infinite values; what made them went wrong before the VAE was called")
    return tensor_to_bytes(tensor)


def read_tensor(body: Buffer, head: TensorHead) -> torch.Tensor:
    """The tensor of a request. Raises InvalidRequest."""
    try:
        return tensor_from_bytes(body, head)
    except MalformedAnswer as error:
        raise InvalidRequest(f"the body does not fit shape and dtype in the query: {error}") from None


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


def check_label(headers: Mapping[str, str], allowed: frozenset[str]) -> None:
    """Raises MalformedAnswer: the body is labelled as something else than the answer."""
    label = media_type(headers)
    if label == "text/html":
        raise MalformedAnswer("got a web page (content type text/html): another program answers at this address")
    if label not in allowed:
        raise MalformedAnswer(f"got content type {one_line(label, 60)}, expected {' or '.join(sorted(allowed - {''}))}")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise MalformedAnswer(f"got content encoding {one_line(encoding, 20)}, which was not asked for")


def media_type(headers: Mapping[str, str]) -> str:
    """The content type without its parameters, in lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def check_float(head: TensorHead) -> None:
    """Raises MalformedAnswer: whole numbers."""
    if head.dtype == torch.uint8:
        raise MalformedAnswer(f"got {head}, expected floating point values")


def check_values(tensor: torch.Tensor, limit: float) -> None:
    """Raises MalformedAnswer: values that are not finite, or of a larger magnitude than ``limit``."""
    if not is_within(tensor, limit):
        # torch 2.1 has it of no float16 on processors.
        low, high = torch.aminmax(tensor.float())
        raise MalformedAnswer(
            f"got values from {low.item():g} to {high.item():g}, expected at most {limit:g}: no VAE gives that"
        )
