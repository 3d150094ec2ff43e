"""The wire: the only place that knows the bytes of the protocol. Client and server both stand on it.

One file a message, with both sides in it: ``decode`` has the request and ``decoded`` its answer, ``encode`` has both, ``info``
what a server says of itself, ``errors`` what it says when it cannot answer. ``http``, ``query`` and ``checks`` have what those
share, ``tensors``, ``latents`` and ``pixels`` what they carry.

What is sent is an ``HttpRequest`` or an ``HttpResponse``, which are bytes; what it says is a ``DecodeRequest``, a
``DecodeAnswer`` and so on, which are valid or cannot be made.
"""

from __future__ import annotations

from remote_vae.wire.decode import DecodeRequest
from remote_vae.wire.decoded import DecodeAnswer, decode_response, expect_decode
from remote_vae.wire.encode import EncodeAnswer, EncodeRequest, encode_response, encode_size, expect_encode
from remote_vae.wire.errors import ERROR_LIMIT, error_detail, error_response, one_line
from remote_vae.wire.http import Expected, HttpRequest, HttpResponse
from remote_vae.wire.info import FINGERPRINT_KEYS, THIS_PROCESS, Info, expect_info
from remote_vae.wire.latents import decode_size, pack_latents, unpack_latents
from remote_vae.wire.query import Output, Scaling, tensor_head
from remote_vae.wire.tensors import TensorHead

__all__ = [
    "ERROR_LIMIT",
    "FINGERPRINT_KEYS",
    "THIS_PROCESS",
    "DecodeAnswer",
    "DecodeRequest",
    "EncodeAnswer",
    "EncodeRequest",
    "Expected",
    "HttpRequest",
    "HttpResponse",
    "Info",
    "Output",
    "Scaling",
    "TensorHead",
    "decode_response",
    "decode_size",
    "encode_response",
    "encode_size",
    "error_detail",
    "error_response",
    "expect_decode",
    "expect_encode",
    "expect_info",
    "one_line",
    "pack_latents",
    "tensor_head",
    "unpack_latents",
]
