"""The server's ASGI application around a `Frontend`: its routes, its middleware, and /openapi.json."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lamina.errors import LaminaError
from lamina.server.frontend import Frontend
from lamina.server.http.errors import ApiError
from lamina.server.http.gate import Gate, Metrics, NoMetrics, count_rejection
from lamina.server.http.limits import ClientGone
from lamina.server.openai import model_routes, response_schemas, schemas
from lamina.server.openai.chat import chat
from lamina.server.openai.completions import completions
from lamina.server.openai.service import Service
from lamina.server.page.page import PUBLIC_PATHS, add_page
from lamina.server.settings import ServerSettings
from lamina.version import __version__

Handler = Callable[[Service, Request], Awaitable[Response]]

_PROBES = frozenset({"/health", "/version"})
_PUBLIC = PUBLIC_PATHS | _PROBES
_REFERENCE = "#/components/schemas/{model}"
_REQUESTS = (schemas.ChatRequest, schemas.CompletionRequest, schemas.TokenizeRequest, schemas.DetokenizeRequest)
_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "It comes from a web page of another origin, or is for a host that is not allowed.",
    404: "There is no such model.",
    405: "Not with that method.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "Too many requests are under way; come back after Retry-After seconds.",
    500: "The server failed.",
    503: "The engine is loading, or dead.",
    504: "The request took longer than it may.",
}
_READING = (400, 401, 403, 405, 500)
_WORKING = (*_ERRORS,)


def create_app(frontend: Frontend, settings: ServerSettings, metrics: Metrics | None = None) -> FastAPI:
    """The application. The frontend's observer must be set before; its engine may come later."""
    counted = metrics or NoMetrics()
    service = Service(frontend, settings, counted)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="Lamina",
        version=__version__,
        openapi_url=None,  # see `_add_document`; pages of documentation would load scripts from another host
        redirect_slashes=False,
        lifespan=lifespan,
    )
    _add_routes(app, service)
    add_page(app, frontend, settings, service.samples)
    app.add_middleware(Gate, settings=settings, metrics=counted, public=_PUBLIC, probes=_PROBES)
    _add_handlers(app, service)
    _add_document(app, settings.protected)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    def add(
        path: str, handler: Handler, answer: Any, errors: tuple[int, ...], method: str = "GET", body: Any = None
    ) -> None:
        responses: dict[int | str, dict[str, Any]] = {
            status: {"model": response_schemas.ErrorResponse, "description": _ERRORS[status]} for status in errors
        }
        if answer is None:
            responses[200] = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Text."}
        else:
            responses[200] = {"model": answer, "description": "The answer."}
        if body in (schemas.ChatRequest, schemas.CompletionRequest):
            responses[200]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
        extra: dict[str, Any] = {}
        if body is not None:
            schema = {"$ref": _REFERENCE.format(model=body.__name__)}
            extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}

        async def handle(request: Request) -> Response:
            return await handler(service, request)

        async def handle_model(request: Request, model_id: str) -> Response:
            return await handler(service, request)

        app.add_api_route(
            path,
            handle_model if "{model_id" in path else handle,
            methods=[method],
            name=handler.__name__,
            description=handler.__doc__,
            responses=responses,
            response_class=Response,
            response_model=None,
            openapi_extra=extra or None,
            include_in_schema=method != "HEAD",
        )

    add("/v1/chat/completions", chat, response_schemas.ChatCompletion, _WORKING, "POST", schemas.ChatRequest)
    add("/v1/completions", completions, response_schemas.TextCompletion, _WORKING, "POST", schemas.CompletionRequest)
    add("/v1/models", model_routes.models, response_schemas.ModelList, _READING)
    add("/v1/models/{model_id:path}", model_routes.model, response_schemas.ModelCard, (*_READING, 404))
    add("/tokenize", model_routes.tokenize, response_schemas.Tokens, _WORKING, "POST", schemas.TokenizeRequest)
    add(
        "/detokenize",
        model_routes.detokenize,
        response_schemas.Detokenized,
        _WORKING,
        "POST",
        schemas.DetokenizeRequest,
    )
    add("/health", model_routes.health, response_schemas.Health, (400, 405, 500, 503))
    add("/health", model_routes.health, response_schemas.Health, (400, 405, 500, 503), "HEAD")
    add("/version", model_routes.version, response_schemas.Version, (400, 405, 500))
    add("/metrics", model_routes.metrics, None, _READING)


def _add_handlers(app: FastAPI, service: Service) -> None:
    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, LaminaError):
            return response(service.translate(error))
        return response(ApiError(500, "the server failed"))

    async def unrouted(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = error.headers if isinstance(error, HTTPException) else None
        what = {404: "there is no such path", 405: "that method is not allowed"}.get(status, "the request is refused")
        return response(ApiError(status, f"{what}: {request.method} {request.url.path[:200]}", headers=headers))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    def response(error: ApiError) -> Response:
        count_rejection(service.metrics, error)
        return Response(error.body, error.status, error.headers, "application/json")

    app.add_exception_handler(LaminaError, failed)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(ClientGone, gone)


def _add_document(app: FastAPI, keys: bool) -> None:
    """Add /openapi.json. FastAPI describes the responses; request bodies, which handlers read themselves, are added.

    It is written once: FastAPI's own route writes its 60 kB for each request, on the thread that serves everybody."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # of FastAPI's own validation, which is not used
    _, bodies = models_json_schema([(model, "validation") for model in _REQUESTS], ref_template=_REFERENCE)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(bodies["$defs"])
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's own way
    written = JSONResponse(document).body

    async def handle() -> Response:
        return Response(written, media_type="application/json")

    app.add_api_route("/openapi.json", handle, include_in_schema=False)
