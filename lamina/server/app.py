"""The server's ASGI application around a `Frontend`: its routes, its middleware, and /openapi.json."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lamina.errors import LaminaError
from lamina.server.anthropic.routes import count_tokens, messages
from lamina.server.anthropic.schemas import CountTokensRequest, MessagesRequest
from lamina.server.frontend import Frontend
from lamina.server.http.errors import MESSAGES, ApiError
from lamina.server.http.gate import Gate, Metrics, count_rejection
from lamina.server.http.limits import ClientGone
from lamina.server.machines import MachineDecision, Machines
from lamina.server.models import Models
from lamina.server.openai import model_routes, schemas
from lamina.server.openai.chat import chat
from lamina.server.openai.completions import completions
from lamina.server.openai.embeddings import embeddings, rerank
from lamina.server.openai.infill import infill
from lamina.server.openai.responses.routes import ResponseRoutes
from lamina.server.openai.responses.schemas import InputTokensRequest, ResponsesRequest
from lamina.server.page.page import PUBLIC_PATHS, add_page
from lamina.server.service import Service
from lamina.server.settings import ServerSettings
from lamina.version import __version__

Handler = Callable[[Service, Request], Awaitable[Response]]

_PROBES = frozenset({"/health", "/version"})
_PUBLIC = PUBLIC_PATHS | _PROBES
_REFERENCE = "#/components/schemas/{model}"
_REQUESTS = (
    ResponsesRequest,
    InputTokensRequest,
    schemas.ChatRequest,
    schemas.CompletionRequest,
    schemas.InfillRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
    MessagesRequest,
    CountTokensRequest,
    schemas.EmbeddingRequest,
    schemas.RerankRequest,
)
_STREAMED = (schemas.ChatRequest, schemas.CompletionRequest, ResponsesRequest, MessagesRequest)
_BODIES = (*_REQUESTS, MachineDecision)
_TEXT = {"schema": {"type": "string"}}
_SHARED = {"message": _TEXT["schema"], "type": _TEXT["schema"]}  # by OpenAI's and Anthropic's errors
_ERROR_FIELDS = {"type": "object", "required": [*_SHARED], "properties": _SHARED}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": _ERROR_FIELDS}}
_FAILED = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
_FIELDS = frozenset(name for model in _REQUESTS for name in model.model_fields)
_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "It comes from a web page of another origin, or is for a host that is not allowed.",
    404: "There is no such model or machine.",
    405: "Not with that method.",
    409: "The model is in use.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "Too many requests are under way; come back after Retry-After seconds.",
    500: "The server failed.",
    503: "The engine is loading, or dead.",
    504: "The request took longer than it may.",
}
_READING = (400, 401, 403, 405, 500)
_WORKING = tuple(status for status in _ERRORS if status != 409)


def create_app(
    served: Frontend | Models, settings: ServerSettings, metrics: Metrics, machines: Machines | None = None
) -> FastAPI:
    """The application of one model, or of several. The frontends' observers must be set before; engines may come
    later."""
    models = served if isinstance(served, Models) else Models({settings.model: served})
    service = Service(models, settings, metrics, _FIELDS)

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
    _add_routes(app, service, machines or Machines(settings))
    add_page(app, models, settings, service.samples)
    app.add_middleware(Gate, settings=settings, metrics=metrics, public=_PUBLIC, probes=_PROBES)
    if settings.allow_origins:  # outermost: preflights show no key, and refusals need its headers too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    _add_handlers(app, service)
    _add_document(app, settings.protected)
    return app


def _add_routes(app: FastAPI, service: Service, machines: Machines) -> None:
    def add(path: str, handler: Handler, errors: tuple[int, ...], method: str = "GET", body: Any = None) -> None:
        responses: dict[int | str, dict[str, Any]] = {
            status: {"content": _FAILED, "description": _ERRORS[status]} for status in errors
        }
        kinds = {"text/plain": _TEXT} if path == "/metrics" else {"application/json": {}}
        if body in _STREAMED:
            kinds["text/event-stream"] = _TEXT
        responses[200] = {"content": kinds, "description": "The answer."}
        part = {"in": "path", "required": True, "schema": {"type": "string"}}
        extra: dict[str, Any] = {"parameters": [part | {"name": name} for name in re.findall(r"{(\w+)", path)]}
        if body is not None:
            schema = {"$ref": _REFERENCE.format(model=body.__name__)}
            extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}

        async def handle(request: Request) -> Response:
            return await handler(service, request)

        app.add_api_route(
            path,
            handle,
            methods=[method],
            name=handler.__name__,
            description=handler.__doc__,
            responses=responses,
            response_class=Response,
            response_model=None,
            openapi_extra=extra,
            include_in_schema=method != "HEAD",
        )

    add("/v1/chat/completions", chat, _WORKING, "POST", schemas.ChatRequest)
    responses = ResponseRoutes(service.settings.tenants)
    response_path = "/v1/responses/{response_id}"
    add("/v1/responses", responses.create, _WORKING, "POST", ResponsesRequest)
    add("/v1/responses/input_tokens", responses.input_tokens, _WORKING, "POST", InputTokensRequest)
    add(response_path, responses.retrieve, (*_READING, 404))
    add(response_path, responses.delete, (*_READING, 404), "DELETE")
    add(f"{response_path}/cancel", responses.cancel, (*_READING, 404), "POST")
    add(f"{response_path}/input_items", responses.input_items, (*_READING, 404))
    add(MESSAGES, messages, _WORKING, "POST", MessagesRequest)
    add(f"{MESSAGES}/count_tokens", count_tokens, _WORKING, "POST", CountTokensRequest)
    add("/v1/completions", completions, _WORKING, "POST", schemas.CompletionRequest)
    add("/infill", infill, _WORKING, "POST", schemas.InfillRequest)
    add("/v1/embeddings", embeddings, _WORKING, "POST", schemas.EmbeddingRequest)
    for path in ("/v1/rerank", "/rerank"):
        add(path, rerank, _WORKING, "POST", schemas.RerankRequest)
    add("/v1/models", model_routes.models, _READING)
    add("/v1/models/{model_id:path}", model_routes.model, (*_READING, 404))
    for what in (model_routes.load, model_routes.unload):
        add(f"/v1/models/{{model_id:path}}/{what.__name__}", what, (*_READING, 404, 409, 429, 503, 504), "POST")
    add("/tokenize", model_routes.tokenize, _WORKING, "POST", schemas.TokenizeRequest)
    add("/detokenize", model_routes.detokenize, _WORKING, "POST", schemas.DetokenizeRequest)
    add("/joining", machines.machines, _READING)
    add("/joining/{machine_id}", machines.decide, (*_READING, 404, 408, 413, 415, 429), "POST", MachineDecision)
    add("/health", model_routes.health, (400, 405, 500, 503))
    add("/health", model_routes.health, (400, 405, 500, 503), "HEAD")
    add("/version", model_routes.version, (400, 405, 500))
    add("/metrics", model_routes.metrics, _READING)


def _add_handlers(app: FastAPI, service: Service) -> None:
    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, LaminaError):
            return response(request, service.translate(error))
        return response(request, ApiError(500, "the server failed"))

    async def unrouted(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = error.headers if isinstance(error, HTTPException) else None
        what = {404: "there is no such path", 405: "that method is not allowed"}.get(status, "the request is refused")
        return response(
            request, ApiError(status, f"{what}: {request.method} {request.url.path[:200]}", headers=headers)
        )

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    def response(request: Request, error: ApiError) -> Response:
        count_rejection(service.metrics, error)
        return Response(error.body(request.url.path), error.status, error.headers, "application/json")

    app.add_exception_handler(LaminaError, failed)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(ClientGone, gone)


def _add_document(app: FastAPI, keys: bool) -> None:
    """Add /openapi.json. FastAPI describes the responses; request bodies, which handlers read themselves, are added.

    It is written once: FastAPI's own route writes its 98 kB for each request, on the thread that serves everybody."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, bodies = models_json_schema([(model, "validation") for model in _BODIES], ref_template=_REFERENCE)
    components = document["components"] = {"schemas": bodies["$defs"] | {"Error": _ERROR}}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's own way
    written = JSONResponse(document).body

    async def handle() -> Response:
        return Response(written, media_type="application/json")

    app.add_api_route("/openapi.json", handle, include_in_schema=False)
