"""The HTTP face of the server: reads bounded bodies, speaks JSON on every error."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from remote_vae.errors import InvalidRequest, OutOfMemory, RemoteVaeError, SettingsError
from remote_vae.server.access import Access, by_token
from remote_vae.server.engine import Busy, ClientGone, IsGone, NoModel, VaeEngine
from remote_vae.version import __version__
from remote_vae.wire import DecodeRequest, EncodeRequest, HttpResponse, error_response, tensor_head

log = logging.getLogger("remote_vae")

# JSON and base64 around the values of a legacy body.
_BASE64_OVERHEAD = 4 / 3
_SLACK = 4096
# A PNG of noise is a little larger than its values.
_IMAGE_BYTES_PER_PIXEL = 4

_STATUS: dict[type[Exception], int] = {Busy: 503, OutOfMemory: 507, ClientGone: 499, NoModel: 503}


def create_app(engine: VaeEngine, token: str = "", access: Access | None = None) -> FastAPI:
    """The server's app. With ``token``, every path but /health wants ``Authorization: Bearer <token>``.

    Args:
        engine: the VAE.
        token: "" lets everyone in.
        access: another rule than that of the token, which then has no meaning.
    """
    app = FastAPI(title="Remote VAE", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    endpoints = _Endpoints(engine, access or by_token(token))
    app.add_api_route("/health", endpoints.health, methods=["GET"])
    app.add_api_route("/info", endpoints.info, methods=["GET"])
    # A Hugging Face endpoint has no path; its clients are pointed at one URL and decode there.
    for path in ("/", "/decode"):
        app.add_api_route(path, endpoints.decode, methods=["POST"])
    app.add_api_route("/encode", endpoints.encode, methods=["POST"])
    app.add_exception_handler(HTTPException, _http_error)
    return app


class _Endpoints:
    def __init__(self, engine: VaeEngine, access: Access) -> None:
        self._engine = engine
        self._refusal = access

    async def health(self) -> dict[str, Any]:
        return self._engine.health()

    async def info(self, request: Request) -> Response:
        return await self._answer(request, self._info)

    async def decode(self, request: Request) -> Response:
        return await self._answer(request, self._decode)

    async def encode(self, request: Request) -> Response:
        return await self._answer(request, self._encode)

    async def _answer(self, request: Request, do: Callable[[Request], Awaitable[HttpResponse]]) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return _response(refusal)
        try:
            return _response(await do(request))
        except (InvalidRequest, SettingsError) as error:
            return _response(error_response(400, str(error)))
        except RemoteVaeError as error:
            return _response(error_response(_STATUS.get(type(error), 500), str(error)))
        except Exception as error:
            log.exception("the call failed")
            return _response(error_response(500, f"{type(error).__name__}: {error}"))

    async def _info(self, _: Request) -> HttpResponse:
        document = {"server": "remote-vae", "version": __version__, **await self._engine.ask_info()}
        return HttpResponse(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    async def _decode(self, request: Request) -> HttpResponse:
        query = request.query_params.multi_items()
        head = tensor_head(query)
        if head is None:
            raise InvalidRequest("the query lacks shape and dtype; a picture is encoded at /encode")
        values = dict(query)
        self._engine.check_decode(head, _whole(values.get("height")), _whole(values.get("width")), values.get("family"))
        body = await _read_body(request, int(head.nbytes * _BASE64_OVERHEAD) + _SLACK)
        decode = DecodeRequest.from_http(query, _headers(request), body)
        return await self._engine.run(lambda is_gone: self._engine.decode(decode, is_gone), _leaving(request))

    async def _encode(self, request: Request) -> HttpResponse:
        query = request.query_params.multi_items()
        head = tensor_head(query)
        limits = self._engine.limits
        self._engine.check_encode(head, dict(query).get("family"))
        limit = head.nbytes if head is not None else limits.max_pixels * _IMAGE_BYTES_PER_PIXEL
        body = await _read_body(request, limit + _SLACK)

        def work(is_gone: IsGone) -> HttpResponse:
            # A PNG is decoded in the engine's thread, as a large one would hold up every other request.
            encode = EncodeRequest.from_http(query, body, max_pixels=limits.max_pixels)
            return self._engine.encode(encode, is_gone)

        return await self._engine.run(work, _leaving(request))


async def _read_body(request: Request, limit: int) -> bytearray:
    """The body, as long as it stays under ``limit`` bytes. Raises InvalidRequest beyond."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise InvalidRequest(f"the body is longer than the {limit} bytes that belong to this request")
    return body


async def _leaving(request: Request) -> None:
    """Ends when the client hangs up; to be awaited after the body is read.

    Not ``request.is_disconnected``, which never tells behind the middleware of the web UIs (Starlette's BaseHTTPMiddleware).
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(request: Request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 6 else None


def _response(answer: HttpResponse) -> Response:
    return Response(bytes(answer.body), status_code=answer.status, headers=dict(answer.headers))


async def _http_error(request: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", str(error))
    return _response(error_response(status, f"{detail}: {request.method} {request.url.path}"))
