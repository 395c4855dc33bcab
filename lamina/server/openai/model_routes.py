"""The routes that generate nothing: models, tokens, health, version, metrics."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lamina.server.chat.chat_input import ChatInput
from lamina.server.chat.preparing import check_length, encoded, most_characters, prompt
from lamina.server.frontend import STATES, Served
from lamina.server.http.errors import ApiError, refused, shown
from lamina.server.models import ServedModel
from lamina.server.openai.schemas import DetokenizeRequest, TokenizeRequest
from lamina.server.preparation import go_on
from lamina.server.service import Service
from lamina.server.settings import TENANT
from lamina.version import __version__

_STARTED = int(time.time())
_SNAPSHOT_TIMEOUT = 1.0  # seconds for which /metrics waits for the engine
_PIECE = 4096  # tokens whose text is measured at a time


async def models(service: Service, request: Request) -> Response:
    """GET /v1/models."""
    cards = [_card(service, model) for model in service.models]
    of_anthropic = {"has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
    return JSONResponse({"object": "list", "data": cards} | of_anthropic)


async def model(service: Service, request: Request) -> Response:
    """GET /v1/models/{model_id}."""
    return JSONResponse(_card(service, _named(service, request)))


async def load(service: Service, request: Request) -> Response:
    """POST /v1/models/{model_id}/load: load the model, in the place of another where there is no room."""
    context, model = service.context(request), _operated(service, request)
    await service.load(request, model.name, context)
    return JSONResponse(_card(service, model))


async def unload(service: Service, request: Request) -> Response:
    """POST /v1/models/{model_id}/unload: unload the model, unless requests use it."""
    model = _operated(service, request)
    if not service.models.unload(model.name):
        raise ApiError(409, f"the model {shown(model.name)} is in use, or is being loaded", code="model_in_use")
    return JSONResponse(_card(service, model))


async def tokenize(service: Service, request: Request) -> Response:
    """POST /tokenize."""
    context = service.context(request)
    fields = await service.read(request, TokenizeRequest, context)
    return await service.prepare(context, _tokenized, fields, context.served)


async def detokenize(service: Service, request: Request) -> Response:
    """POST /detokenize."""
    context = service.context(request)
    fields = await service.read(request, DetokenizeRequest, context)
    return await service.prepare(context, _detokenized, fields, context.served)


async def health(service: Service, request: Request) -> Response:
    """GET or HEAD /health: 200 where the engine serves, else 503. Everybody may ask, so it does not say why."""
    state = service.models.health
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
    body, content_type = service.metrics.render(await service.models.now(_SNAPSHOT_TIMEOUT))
    return Response(body, headers={"Content-Type": content_type})


def _named(service: Service, request: Request) -> ServedModel:
    name = request.path_params["model_id"]
    model_name = service.settings.named(name)
    if model_name is None:
        raise service.unknown_model(name)
    return service.models[model_name]


def _operated(service: Service, request: Request) -> ServedModel:
    """The model that an operator wants to load or unload."""
    model = _named(service, request)
    if not service.settings.is_operator(request.scope[TENANT]):
        raise ApiError(403, "models are loaded and unloaded with a key of the operator", code="operator_only")
    if not service.models.on_demand:
        raise ApiError(409, "the server's one model stays loaded; --idle-unload lets it go", code="model_stays")
    return model


def _card(service: Service, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "type": "model",
        "display_name": model.name,
        "created": _STARTED,
        "created_at": datetime.fromtimestamp(_STARTED, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "owned_by": "lamina",
        "root": model.name,
        "parent": None,
        "max_model_len": model.frontend.max_model_len,
        "state": model.residence,
        "aliases": list(service.settings.aliases) if model is service.models.first else [],
    }


def _tokenized(fields: TokenizeRequest, served: Served) -> Response:
    tokenizer, inputs = served.tokenizer, served.inputs
    special = fields.add_special_tokens
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(400, "prompt and messages: exactly one of them is needed", "prompt")
    if fields.prompt is not None:
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(fields, name) is not None:
                raise ApiError(400, f"{name} is given, which is allowed only beside messages", name)
        check_length("prompt", len(fields.prompt), inputs)
        ids = encoded(fields.prompt, True if special is None else special, inputs, "prompt")
    else:
        ids, _, _ = prompt(
            ChatInput(
                messages=fields.messages,
                tools=fields.tools,
                add_generation_prompt=fields.add_generation_prompt is not False,
                continue_final_message=bool(fields.continue_final_message),
                template_kwargs=fields.chat_template_kwargs,
                add_special_tokens=bool(special),
            ),
            served,
        )
    spelled = {"token_strs": [tokenizer.token(token) for token in ids]} if fields.return_token_strs else {}
    return JSONResponse({"count": len(ids), "max_model_len": inputs.max_model_len, "tokens": ids, **spelled})


def _detokenized(fields: DetokenizeRequest, served: Served) -> Response:
    tokens, decode = fields.tokens, partial(served.tokenizer.decode, skip_special_tokens=False)
    vocabulary, limit, length = served.inputs.vocab_size, most_characters(served.inputs), 0
    for index, token in enumerate(tokens):
        if not 0 <= token < vocabulary:
            raise refused(f"tokens[{index}]", token, f"token ids from 0 to {vocabulary - 1}")
    for begin in range(0, len(tokens), _PIECE):
        go_on()
        length += len(decode(tokens[begin : begin + _PIECE]))
        if length > limit:
            what = f"tokens has {len(tokens)} tokens with more than {limit} characters, which are allowed"
            raise ApiError(400, what, "tokens")
    return JSONResponse({"prompt": decode(tokens)})
