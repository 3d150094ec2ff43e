"""The HTTP face of the server: its paths, and what they say of themselves. The calls themselves are in ``calls``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from remote_vae.errors import RemoteVaeError
from remote_vae.server.access import Access, by_token
from remote_vae.server.calls import Call, error_answer
from remote_vae.server.catalogue import NoModel, named
from remote_vae.server.docs import docs_page
from remote_vae.server.engine import Engine
from remote_vae.server.metrics import Metrics
from remote_vae.server.openapi import DESCRIPTION, completed, error_responses, of_call
from remote_vae.server.page import HEADERS, closed_page, status_page
from remote_vae.vae.at_work import Op
from remote_vae.version import __version__
from remote_vae.wire import HttpResponse, error_detail, error_response
from remote_vae.wire.extras import own_extras

Answer = Callable[[Request], Awaitable[Response]]

# Seconds after which to ask a server again that is not ready yet.
_RETRY_AFTER = {"Retry-After": "5"}
_NO_METRICS = "nothing is counted here: install the package prometheus-client where the server runs"


def create_app(engine: Engine, token: str = "", access: Access | None = None, endpoints: Sequence[str] = ()) -> FastAPI:
    """The server's app. With ``token``, every path but / and /health wants ``Authorization: Bearer <token>``.

    Args:
        engine: the VAEs.
        token: "" lets everyone in.
        access: another rule than that of the token, which then has no meaning.
        endpoints: under which it is reached, for the page at /, where that is known.
    """
    app = FastAPI(
        title="Remote VAE",
        version=__version__,
        description=DESCRIPTION,
        # FastAPI's own pages load scripts of other machines, and know of no token.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        exception_handlers={HTTPException: _http_error, Exception: _bug},
    )
    paths = _Paths(engine, access or by_token(token), endpoints)
    _add_pages(app, paths)
    _add_calls(app, paths)
    return app


class _Paths:
    """What the server answers at its paths."""

    def __init__(self, engine: Engine, refusal: Access, endpoints: Sequence[str]) -> None:
        self._engine = engine
        self._refusal = refusal
        self._endpoints = endpoints

    async def page(self, request: Request) -> Response:
        refused = self._refusal(request)
        if refused is not None:
            return HTMLResponse(closed_page(error_detail(refused.body)), headers=HEADERS)
        return await self.open_page(request)

    async def open_page(self, request: Request) -> Response:
        name = _name(request)
        if name in ("decode", "encode"):
            raise HTTPException(405)
        named(self._engine.catalogue.entries(), name)
        said = None
        with suppress(NoModel):
            said = await self._engine.ask_info()
        return HTMLResponse(status_page(said, self._engine.status(), self._endpoints), headers=HEADERS)

    async def health(self, request: Request) -> Response:
        said = self._engine.health()
        closed = self._engine.admission.closed
        why = closed.why if closed else self._engine.problem()
        # A client whose call is being worked on asks here whether to wait for it.
        is_ready = not why or said["running"] or said["waiting"]
        if self._refusal(request) is not None:
            # How busy it is, is for those who may use it.
            said = {"status": said["status"]}
        if closed:
            said["status"] = closed.status
        elif why:
            said["status"] = "no model"
        if is_ready:
            return JSONResponse(said)
        return JSONResponse({**said, "error": why}, 503, _RETRY_AFTER)

    async def info(self, request: Request) -> Response:
        about = {"server": "remote-vae", "version": __version__, "extras": own_extras()}
        return JSONResponse({**about, **await self._engine.ask_info(_name(request))})

    async def metrics(self, _: Request) -> Response:
        watcher = self._engine.watcher
        if not isinstance(watcher, Metrics):
            return _starlette(error_response(404, _NO_METRICS))
        text, media_type = watcher.text(self._engine.health())
        return Response(text, media_type=media_type)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(_document(request))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(docs_page(_document(request)), headers=HEADERS)

    def call(self, op: Op) -> Answer:
        async def call(request: Request) -> Response:
            return Call(self._engine, op, self._refusal(request), _name(request))

        return call

    def guarded(self, answer: Answer) -> Answer:
        """``answer`` for those who may ask for it."""

        async def guarded(request: Request) -> Response:
            refused = self._refusal(request)
            return _starlette(refused) if refused is not None else await answered(request)

        answered = _with_errors(answer)
        return guarded


def _add_pages(app: FastAPI, paths: _Paths) -> None:
    """What is asked for with GET."""
    guarded = paths.guarded
    for path, answer, summary, statuses in (
        ("/health", paths.health, _HEALTH, (503,)),
        ("/info", guarded(paths.info), _INFO, (401, 403, 503)),
        ("/metrics", guarded(paths.metrics), _METRICS, (401, 403, 404)),
        ("/openapi.json", guarded(paths.openapi), "This document.", (401, 403)),
        ("/docs", guarded(paths.docs), "This document as a page.", (401, 403)),
    ):
        app.add_api_route(
            path,
            answer,
            methods=["GET"],
            summary=summary.partition(":")[0].rstrip("."),
            description=summary,
            response_model=None,
            response_class=_KINDS.get(path, JSONResponse),
            responses=error_responses(*statuses),
        )
        for other, method in ((path, "HEAD"), (f"{path}/", "GET")):
            app.add_api_route(other, answer, methods=[method], include_in_schema=False, response_model=None)
    hidden: dict[str, Any] = {"include_in_schema": False, "response_model": None}
    # A client that was given http://HOST:PORT/NAME asks beside it.
    for name, answer in (("health", paths.health), ("info", guarded(paths.info))):
        app.add_api_route(f"/{{name}}/{name}", answer, methods=["GET", "HEAD"], **hidden)
    app.add_api_route("/", _with_errors(paths.page), methods=["GET", "HEAD"], **hidden)
    for path in ("/{name}", "/{name}/"):
        app.add_api_route(path, guarded(paths.open_page), methods=["GET", "HEAD"], **hidden)


def _add_calls(app: FastAPI, paths: _Paths) -> None:
    """What is asked for with POST."""
    statuses = (400, 401, 403, 404, 408, 409, 413, 422, 500, 503, 507)
    for op in ("decode", "encode"):
        answer = paths.call(op)
        for path in (f"/{op}", f"/{{name}}/{op}"):
            by_name = path.startswith("/{")
            app.add_api_route(
                path,
                answer,
                methods=["POST"],
                summary=f"{op.capitalize()}{' by the VAE of that name' if by_name else ''}",
                description=_CALLS[op],
                response_model=None,
                response_class=Response,
                responses=error_responses(*statuses),
                openapi_extra=of_call(op, by_name=by_name),
            )
            app.add_api_route(f"{path}/", answer, methods=["POST"], include_in_schema=False, response_model=None)
    # A Hugging Face endpoint has no path; its clients are pointed at one URL and decode there.
    for path in ("/", "/{name}", "/{name}/"):
        app.add_api_route(path, paths.call("decode"), methods=["POST"], include_in_schema=False, response_model=None)


_KINDS: dict[str, type[Response]] = {"/docs": HTMLResponse, "/metrics": Response}
_HEALTH = """Whether it can answer: 200, or 503 while it loads its VAE, has none, or stops. To those who may use it also whether
a call is running, and how many wait; a server that works says 200."""
_INFO = "Which VAEs it has: family, dtype, fingerprints of the weights, and what may be asked of them."
_METRICS = "What it did, for Prometheus."
_CALLS: dict[Op, str] = {
    "decode": "Latents to pixels. POST / is the same.",
    "encode": "Pixels, or a picture's file, to latents.",
}


def _document(request: Request) -> dict[str, Any]:
    return completed(request.app.openapi(), request.scope.get("root_path", ""))


def _name(request: Request) -> str | None:
    """Of the VAE in the path."""
    name: str | None = request.path_params.get("name")
    return name


def _with_errors(answer: Answer) -> Answer:
    """``answer``, with the protocol's errors."""

    async def with_errors(request: Request) -> Response:
        try:
            return await answer(request)
        except RemoteVaeError as error:
            return _starlette(error_answer(error))

    return with_errors


def _starlette(answer: HttpResponse) -> Response:
    return Response(bytes(answer.body), status_code=answer.status, headers=dict(answer.headers))


async def _http_error(request: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", str(error))
    return _starlette(error_response(status, f"{detail}: {request.method} {request.scope['path']}"))


async def _bug(_: Request, error: Exception) -> Response:
    return _starlette(error_answer(error))
