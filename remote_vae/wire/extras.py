"""What a client may ask beyond the protocol, and what comes of it. Who does not know it sees none of it.

A server lists what it knows at ``GET /info`` as ``extras``. A client that finds it there says in ``X-Remote-VAE-Accept`` which
of it it takes; where an answer or a request's body is compressed, ``X-Remote-VAE-Encoding`` beside it says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from remote_vae.errors import InvalidRequest, MalformedAnswer
from remote_vae.wire import compression
from remote_vae.wire.checks import read_head
from remote_vae.wire.errors import one_line
from remote_vae.wire.http import TENSOR_TYPE, Buffer, Expected, HttpRequest, HttpResponse
from remote_vae.wire.query import tensor_head
from remote_vae.wire.tensors import TensorHead

A = TypeVar("A")

ACCEPT = "X-Remote-VAE-Accept"
ENCODING = "X-Remote-VAE-Encoding"

LATE = "late"
PICTURES = "pictures"
# Keys of a query that a server of ours understands.
FINGERPRINT = "fingerprint"
KEYS = (FINGERPRINT, "sample")

# Characters of the header that are read.
_LIMIT = 1000
_LAST, _FIRST = -1, 1


@dataclass(frozen=True)
class Extras:
    """What a client takes.

    Attributes:
        late: an answer that begins before it is made; see ``late``.
        pictures: several picture files in one answer; see ``pictures``.
        codings: names of ``compression``.
    """

    late: bool = False
    pictures: bool = False
    codings: tuple[str, ...] = ()

    @classmethod
    def of(cls, words: Iterable[str]) -> Extras:
        """What there is of it among ``words``; others are left out. Codings: those that this machine can do."""
        known = set(words)
        return cls(LATE in known, PICTURES in known, tuple(name for name in compression.codings() if name in known))

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Extras:
        """What a request says; ``headers`` with lower-case names."""
        return cls.of(word.strip().lower() for word in headers.get(ACCEPT.lower(), "")[:_LIMIT].split(","))

    @property
    def words(self) -> tuple[str, ...]:
        """As they stand in the header, and at ``GET /info``."""
        return (*([LATE] if self.late else []), *([PICTURES] if self.pictures else []), *self.codings)

    def to_headers(self) -> dict[str, str]:
        """What a request says; nothing for nothing."""
        return {ACCEPT: ", ".join(self.words)} if self.words else {}


NO_EXTRAS = Extras()


def own_extras() -> tuple[str, ...]:
    """What ``GET /info`` of a server on this machine lists."""
    return (*Extras(late=True, pictures=True, codings=tuple(compression.codings())).words, *KEYS)


# --- compressed bodies -----------------------------------------------------------------------------------------------------


def compressed_response(response: HttpResponse, extras: Extras) -> HttpResponse:
    """``response`` to a decode for a client that takes ``extras``: itself, where that would not make it smaller."""
    coding = compression.best(extras.codings)
    headers = {name.lower(): value for name, value in response.headers.items()}
    if coding is None or response.status != 200 or "dtype" not in headers or len(response.body) < compression.SMALLEST:
        return response
    if headers.get("content-type") != TENSOR_TYPE:
        return response
    head = TensorHead.parse(headers["shape"], headers["dtype"])
    body = compression.compressed(response.body, head, _channel(head), coding)
    if len(body) >= len(response.body):
        return response
    return replace(response, headers={**response.headers, ENCODING: coding.name}, body=body)


def expect_compressed(
    expect: Callable[[Mapping[str, str]], Expected[A]], extras: Extras
) -> Callable[[Mapping[str, str]], Expected[A]]:
    """What a client that takes ``extras`` expects of the answer to a decode, where it ``expect``s that without them."""

    def expected(headers: Mapping[str, str]) -> Expected[A]:
        plain = expect(headers)
        name = headers.get(ENCODING.lower())
        if name is None:
            return plain
        coding = compression.best((name,)) if name in extras.codings else None
        if coding is None:
            raise MalformedAnswer(f"got encoding {one_line(name, 40)}, which was not asked for")
        head = read_head(headers.get("shape"), headers.get("dtype"))

        def finish(body: np.ndarray) -> A:
            try:
                values = compression.decompressed(body.data, head, _channel(head), coding)
            except ValueError as error:
                raise MalformedAnswer(str(error)) from None
            return plain.finish(values)

        return Expected(finish, head.nbytes)

    return expected


def compressed_request(request: HttpRequest, extras: Extras) -> HttpRequest:
    """``request`` of an encode, for a server that takes ``extras``: itself, where that would not make it smaller."""
    coding, head = compression.best(extras.codings), tensor_head(request.query)
    if coding is None or head is None or len(request.body) < compression.SMALLEST:
        return request
    body = compression.compressed(request.body, head, _FIRST, coding)
    if len(body) >= len(request.body):
        return request
    return replace(request, headers={**request.headers, ENCODING: coding.name}, body=body)


def request_body(body: Buffer, head: TensorHead | None, headers: Mapping[str, str]) -> Buffer:
    """The body of an encode's request as it was before it was compressed; ``headers`` with lower-case names.

    Raises:
        InvalidRequest: it is not what head and headers say.
    """
    name = headers.get(ENCODING.lower())
    if name is None:
        return body
    coding = compression.best((name,))
    if coding is None or head is None:
        known = ", ".join(compression.codings())
        raise InvalidRequest(f"{ENCODING}: got {one_line(name, 40)!r}, expected {known}, for a tensor with shape and dtype")
    try:
        return compression.decompressed(body, head, _FIRST, coding).data
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def _channel(head: TensorHead) -> int:
    """The axis of a decode's answer that has the channels: levels have them last."""
    return _LAST if head.dtype == torch.uint8 else _FIRST
