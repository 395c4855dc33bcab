"""The routes that generate nothing: models, tokens, health, version, metrics."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lamina.server.chat.tools import ToolUse
from lamina.server.frontend import STATES, Served
from lamina.server.http.errors import ApiError, refused
from lamina.server.openai.chat import checked_messages, prompt_text
from lamina.server.openai.sampling_fields import check_length, encoded
from lamina.server.openai.schemas import DetokenizeRequest, TokenizeRequest
from lamina.server.openai.service import Service
from lamina.server.settings import TENANT
from lamina.version import __version__

_STARTED = int(time.time())
_SNAPSHOT_TIMEOUT = 1.0  # seconds for which /metrics waits for the engine


async def models(service: Service, request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_card(service)]})


async def model(service: Service, request: Request) -> Response:
    """GET /v1/models/{model_id}."""
    name = request.path_params["model_id"]
    if name != service.settings.model:
        raise service.unknown_model(name)
    return JSONResponse(_card(service))


async def tokenize(service: Service, request: Request) -> Response:
    """POST /tokenize."""
    context = service.context(request)
    fields = await service.read(request, TokenizeRequest, context)
    return JSONResponse(await service.prepare(context, _tokenized, fields, service.frontend.served))


async def detokenize(service: Service, request: Request) -> Response:
    """POST /detokenize."""
    context = service.context(request)
    fields = await service.read(request, DetokenizeRequest, context)
    return JSONResponse(await service.prepare(context, _detokenized, fields, service.frontend.served))


async def health(service: Service, request: Request) -> Response:
    """GET or HEAD /health: 200 where the engine serves, else 503. Everybody may ask, so it does not say why."""
    state = service.frontend.state
    if state != "ready":
        raise ApiError(503, f"{STATES[state]}; try again later", code=f"engine_{state}")
    return JSONResponse({"status": "ok"})


async def version(service: Service, request: Request) -> Response:
    """GET /version."""
    return JSONResponse({"version": __version__})


async def metrics(service: Service, request: Request) -> Response:
    """GET /metrics: Prometheus's text, of all keys together, so only for the operator where there are several."""
    if not service.settings.is_operator(request.scope[TENANT]):
        raise ApiError(403, "/metrics shows what all keys do; it wants a key of the operator", code="operator_only")
    snapshot = await service.frontend.snapshot(_SNAPSHOT_TIMEOUT)
    body, content_type = service.metrics.render(snapshot, service.frontend.state, service.frontend.restarts)
    return Response(body, headers={"Content-Type": content_type})


def _card(service: Service) -> dict[str, Any]:
    name = service.settings.model
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "lamina",
        "root": name,
        "parent": None,
        "max_model_len": service.frontend.max_model_len,
    }


def _tokenized(fields: TokenizeRequest, served: Served) -> dict[str, Any]:
    tokenizer, inputs = served.tokenizer, served.inputs
    special = fields.add_special_tokens
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(400, "prompt and messages: exactly one of them is needed", "prompt")
    if fields.prompt is not None:
        for name in ("tools", "add_generation_prompt", "continue_final_message"):
            if getattr(fields, name) is not None:
                raise ApiError(400, f"{name} is given, which is allowed only beside messages", name)
        text, special = fields.prompt, True if special is None else special
    else:
        use = ToolUse.from_request(fields.tools, None, None, tokenizer.template_knows_tools)
        text = prompt_text(fields, checked_messages(fields.messages, inputs), tokenizer, use)
    param = "messages" if fields.prompt is None else "prompt"
    check_length(param, len(text), inputs)
    ids = encoded(text, bool(special), inputs, param)
    spelled = {"token_strs": [tokenizer.token(token) for token in ids]} if fields.return_token_strs else {}
    return {"count": len(ids), "max_model_len": inputs.max_model_len, "tokens": ids, **spelled}


def _detokenized(fields: DetokenizeRequest, served: Served) -> dict[str, Any]:
    most = served.inputs.vocab_size
    for index, token in enumerate(fields.tokens):
        if not 0 <= token < most:
            raise refused(f"tokens[{index}]", token, f"token ids from 0 to {most - 1}")
    return {"prompt": served.tokenizer.decode(fields.tokens, skip_special_tokens=False)}
