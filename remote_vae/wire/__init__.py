"""The wire: the only place that knows the bytes of the protocol. Client and server both stand on it.

``requests`` has the two requests in both directions, ``answers`` their answers, ``tensors`` and ``pixels`` what they carry,
``info`` what a server says of itself.
"""

from __future__ import annotations

from remote_vae.wire.answers import (
    DecodeAnswer,
    EncodeAnswer,
    Expected,
    HttpAnswer,
    decode_answer,
    encode_answer,
    error_answer,
    error_detail,
    expect_decode,
    expect_encode,
)
from remote_vae.wire.info import FINGERPRINT_KEYS, THIS_PROCESS, Info, expect_info
from remote_vae.wire.requests import (
    DecodeRequest,
    EncodeRequest,
    HttpRequest,
    Output,
    Scaling,
    decode_size,
    tensor_head,
)
from remote_vae.wire.tensors import TensorHead, pack_latents, unpack_latents

__all__ = [
    "FINGERPRINT_KEYS",
    "THIS_PROCESS",
    "DecodeAnswer",
    "DecodeRequest",
    "EncodeAnswer",
    "EncodeRequest",
    "Expected",
    "HttpAnswer",
    "HttpRequest",
    "Info",
    "Output",
    "Scaling",
    "TensorHead",
    "decode_answer",
    "decode_size",
    "encode_answer",
    "error_answer",
    "error_detail",
    "expect_decode",
    "expect_encode",
    "expect_info",
    "pack_latents",
    "tensor_head",
    "unpack_latents",
]
