"""The bytes of a request and of a response, and how many of them may come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar, Union
from urllib.parse import urlencode

import numpy as np

T = TypeVar("T")

Buffer = Union[bytes, bytearray, memoryview]

TENSOR_TYPE = "tensor/binary"
BASE64_TYPE = "tensor/base64"


@dataclass(frozen=True)
class HttpRequest:
    """What goes into one POST. ``body`` may be a view that keeps a tensor alive."""

    query: tuple[tuple[str, str], ...]
    headers: Mapping[str, str]
    body: Union[bytes, memoryview]

    def url(self, endpoint: str) -> str:
        """``endpoint`` with the query; the shape is one repeated key a dimension."""
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(self.query)}" if self.query else endpoint


@dataclass(frozen=True)
class HttpResponse:
    """What a server sends back."""

    status: int
    headers: Mapping[str, str]
    body: Union[bytes, memoryview]


@dataclass(frozen=True)
class Expected(Generic[T]):
    """What may follow the head of a 200 response: exactly ``exact`` bytes, or up to ``limit``.

    ``finish`` makes the checked answer of them, and raises MalformedAnswer.
    """

    finish: Callable[[np.ndarray], T]
    limit: int
    exact: int | None = None
