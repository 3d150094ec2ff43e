"""What ``/openapi.json`` says of the VAE calls: every query key, header and status of the protocol and of our own."""

from __future__ import annotations

from typing import Any

from remote_vae.vae.at_work import Op
from remote_vae.wire.compression import codings
from remote_vae.wire.extras import ACCEPT, ENCODING
from remote_vae.wire.http import BASE64_TYPE, TENSOR_TYPE
from remote_vae.wire.late import LATE_TYPE
from remote_vae.wire.query import MAX_FACTOR, MAX_SHIFT, MIN_FACTOR
from remote_vae.wire.several import PICTURES_TYPE
from remote_vae.wire.tensors import DTYPES, MAX_DIMENSIONS, MAX_SIZE

DESCRIPTION = """VAE decode and encode for image generators: the protocol of Hugging Face's hybrid inference, which diffusers'
remote_decode and remote_encode, SD.Next and ComfyUI's nodes speak, and keys of our own, which plain clients need not know.

A server of several VAEs has each at /NAME/decode and /NAME/encode. At /decode and /encode it takes the VAE that the client
names (family, fingerprint), else the first whose latents have the shape that was sent, else the first."""

_ERROR_TEXT = {
    400: "The request makes no sense, or is for another VAE; the text says which part, and what is expected.",
    401: "The server asks for a token: send Authorization: Bearer TOKEN.",
    403: "This UI shares its VAE with programs on its own machine alone, unless a token is set.",
    404: "There is no VAE of that name.",
    408: "The body stopped coming.",
    409: "The VAE with the fingerprint of the request is not here.",
    413: "The body is longer than what belongs to this request.",
    422: "The VAE gives NaN or infinite values for it, in float32 as well.",
    500: "Something that should not happen; the server's log says where.",
    503: "Too many wait here, there is no VAE at the moment, or the server is stopping: ask again after Retry-After seconds.",
    507: "It does not fit in the memory of the device, in tiles neither.",
}
_ERROR_BODY = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "What failed, and what to do: one line."}},
}
_SCHEME = {"type": "http", "scheme": "bearer", "description": "Where the server was given a token (REMOTE_VAE_TOKEN)."}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_TENSOR_HEADERS = {
    "shape": {"description": "Of the values in the body, as a JSON list.", "schema": {"type": "string"}},
    "dtype": {"description": "Of the values in the body, in row-major order, little endian.", "schema": {"type": "string"}},
}
_OWN_HEADERS = {
    "Server-Timing": {"description": "Milliseconds by stage.", "schema": {"type": "string"}},
    ENCODING: {"description": "How the body is compressed, where the client takes that.", "schema": {"type": "string"}},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BASE64_BODY = {
    "schema": {
        "type": "object",
        "required": ["inputs"],
        "properties": {"inputs": {"type": "string", "format": "byte", "description": "The values, in base64."}},
    }
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What errors look like, by status."""
    made: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        headers = {"headers": _RETRY_AFTER} if status == 503 else {}
        made[status] = {"description": _ERROR_TEXT[status], "content": _ERROR_BODY, **headers}
    return made


def of_call(op: Op, *, by_name: bool) -> dict[str, Any]:
    """The operation of ``op``, but for its summary. ``by_name``: the VAE's name is in the path."""
    name = [_parameter("name", {"type": "string"}, "Of the VAE, as --vae NAME=SOURCE and /info call it.", where="path")]
    own = _decode_parameters() if op == "decode" else _encode_parameters()
    return {
        "parameters": [*(name if by_name else []), *own],
        "requestBody": {"required": True, "description": _BODY[op], "content": _CONTENT[op]},
        "responses": {"200": _ANSWER[op]},
        "security": [{"token": []}, {}],
    }


def completed(document: dict[str, Any], root: str) -> dict[str, Any]:
    """The document of FastAPI with what all operations refer to, and where the app is mounted (``root``; "": nowhere)."""
    components = document.setdefault("components", {})
    components.setdefault("schemas", {})["Error"] = _ERROR_SCHEMA
    components["securitySchemes"] = {"token": _SCHEME}
    return {**document, **({"servers": [{"url": root}]} if root else {})}


_BODY: dict[Op, str] = {
    "decode": "The values of the latents, in row-major order, little endian.",
    "encode": "A picture's file (PNG, JPEG or WebP), or with shape and dtype in the query the values of pixels.",
}
_CONTENT: dict[Op, dict[str, Any]] = {
    "decode": {TENSOR_TYPE: _BINARY, "application/octet-stream": _BINARY, BASE64_TYPE: _BASE64_BODY},
    "encode": {"image/png": _BINARY, TENSOR_TYPE: _BINARY, "application/octet-stream": _BINARY},
}
_ANSWER: dict[Op, dict[str, Any]] = {
    "decode": {
        "description": (
            "What was asked for: values (tensor/binary, with shape and dtype as headers; float [B, 3, H, W] in [-1, 1], of "
            "videos [B, 3, F, H, W], or uint8 [B, H, W, 3]), a picture's file, or an mp4."
        ),
        "headers": {**_TENSOR_HEADERS, **_OWN_HEADERS},
        "content": {
            TENSOR_TYPE: _BINARY,
            "image/png": _BINARY,
            "image/jpeg": _BINARY,
            "video/mp4": _BINARY,
            "application/json": _BASE64_BODY,
            PICTURES_TYPE: _BINARY,
            LATE_TYPE: _BINARY,
        },
    },
    "encode": {
        "description": "Latents [B, C, h, w], of videos [B, C, F, h, w]; a posterior's mean and logvar have 2 C channels.",
        "headers": {
            **_TENSOR_HEADERS,
            **_OWN_HEADERS,
            "posterior": {"description": "True: mean and logvar.", "schema": {"type": "string"}},
        },
        "content": {TENSOR_TYPE: _BINARY, LATE_TYPE: _BINARY},
    },
}


def _parameter(
    name: str, schema: dict[str, Any], description: str, *, where: str = "query", required: bool = False
) -> dict[str, Any]:
    needed = {"required": True} if required or where == "path" else {}
    return {"name": name, "in": where, "description": description, "schema": schema, **needed}


def _head(*, required: bool, what: str) -> list[dict[str, Any]]:
    """Shape and dtype of a body of values."""
    sizes = {"type": "array", "minItems": 1, "maxItems": MAX_DIMENSIONS}
    shape = {**sizes, "items": {"type": "integer", "minimum": 1, "maximum": MAX_SIZE}}
    repeated = {"style": "form", "explode": True}
    return [
        {**_parameter("shape", shape, f"Of {what}: one key a dimension.", required=required), **repeated},
        _parameter("dtype", {"enum": list(DTYPES)}, "Of the body's values.", required=required),
    ]


def _flag(name: str, description: str) -> dict[str, Any]:
    return _parameter(name, {"type": "string", "enum": ["True", "False", "true", "false", "1", "0"]}, description)


def _scaling(formula: str) -> list[dict[str, Any]]:
    return [
        _parameter(
            "scaling_factor",
            {"type": "number", "minimum": MIN_FACTOR, "maximum": MAX_FACTOR},
            f"Of the model. {formula} Left out: latents are raw, as the VAE itself has them.",
        ),
        _parameter(
            "shift_factor",
            {"type": "number", "minimum": -MAX_SHIFT, "maximum": MAX_SHIFT},
            "Of the model; 0 where it is left out.",
        ),
        _flag("do_scaling", "Older clients: scale by the server's own numbers. Not together with scaling_factor."),
    ]


def _which() -> list[dict[str, Any]]:
    return [
        _parameter("family", {"type": "string"}, "Ours: the family of the client's VAE (sdxl, flux ...)."),
        _parameter(
            "fingerprint", {"type": "string"}, "Ours: of the weights of the client's VAE, to pick one of several of a family."
        ),
    ]


def _takes() -> dict[str, Any]:
    """What the client takes beyond the protocol."""
    what = (
        "Ours: what the client takes beyond the protocol, as /info lists it under extras, with commas between. late: an answer "
        "that begins after ten seconds, with a sign of life every five; pictures: several files in one answer; "
        f"{', '.join(codings())}: values that are compressed without loss."
    )
    return _parameter(ACCEPT, {"type": "string"}, what, where="header")


def _decode_parameters() -> list[dict[str, Any]]:
    side = {"type": "integer", "minimum": 1, "maximum": MAX_SIZE}
    return [
        *_head(required=True, what="the latents: [B, C, h, w], of videos [B, C, F, h, w], of packed ones [B, S, 4 C]"),
        _parameter(
            "output_type",
            {"type": "string", "enum": ["pt", "pil", "mp4"], "default": "pt"},
            "pt: values. pil: one picture's file. mp4: a film. Left out: by the Accept header.",
        ),
        _flag("partial_postprocess", "With pt: uint8 levels [B, H, W, 3] in the place of values in [-1, 1]."),
        _parameter("image_format", {"type": "string", "enum": ["png", "jpg", "jpeg"], "default": "jpg"}, "With pil."),
        *_scaling("Latents are divided by it, then the shift is added."),
        _parameter("height", side, "In pixels; needed for packed latents, else ignored."),
        _parameter("width", side, "In pixels; needed for packed latents, else ignored."),
        _flag("truncate", "Ours: uint8 levels rounded down, as some UIs round; else to the nearest."),
        *_which(),
        _takes(),
        _parameter(
            "Accept",
            {"type": "string"},
            f"image/png, image/jpeg, {TENSOR_TYPE}; of older clients {BASE64_TYPE}.",
            where="header",
        ),
    ]


def _encode_parameters() -> list[dict[str, Any]]:
    return [
        *_head(required=False, what="pixels [B, 3, H, W] in [-1, 1], of videos [B, 3, F, H, W]; uint8: levels of 0 to 255"),
        *_scaling("The shift is subtracted, then latents are multiplied by it."),
        _flag("posterior", "Ours: answer with mean and logvar, unscaled, so that the client draws with its own seed."),
        _parameter(
            "sample",
            {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1},
            "Ours: a seed. The answer is then a sample of the posterior; left out, it is its mode.",
        ),
        _parameter("form", {"type": "string", "enum": ["packed"]}, "Ours: latents as transformers take them."),
        *_which(),
        _takes(),
        _parameter(
            ENCODING,
            {"type": "string", "enum": list(codings())},
            "Ours: how the values of the body are compressed.",
            where="header",
        ),
    ]
