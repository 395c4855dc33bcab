"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's chats, from JSON and to JSON."""

from __future__ import annotations

import secrets
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from lamina.server.anthropic.blocks import PING, MessageWriter
from lamina.server.anthropic.conversation import chat_input, omits_thinking
from lamina.server.anthropic.schemas import CountTokensRequest, MessagesRequest
from lamina.server.chat.preparing import PreparedChat, prompt
from lamina.server.http.errors import json_response
from lamina.server.http.sse import EventStream, while_connected
from lamina.server.service import GRACE, RequestContext, Service


async def messages(service: Service, request: Request) -> Response:
    """POST /v1/messages."""
    context = service.context(request)
    fields = await service.read(request, MessagesRequest, context)
    served = service.served(context, 1, 1)
    stream, omitted = bool(fields.stream), omits_thinking(fields)
    work = service.prepare_chat(context, served, partial(chat_input, fields))
    del fields  # not kept as long as the answer takes: it may have megabytes
    prepared = await while_connected(request.receive, work, context.timeout + GRACE)
    writer = MessageWriter(prepared, f"msg_{secrets.token_hex(12)}", context.model.name, omitted)
    if stream:
        frames = service.frames([prepared.request], context, writer, writer.begin(), PING)
        return EventStream(frames, context.timeout + GRACE, service.translate, writer.failed, b"")
    return await while_connected(request.receive, _whole(service, context, prepared, writer), context.timeout + GRACE)


async def count_tokens(service: Service, request: Request) -> Response:
    """POST /v1/messages/count_tokens: how many tokens a message's prompt has."""
    context = service.context(request)
    fields = await service.read(request, CountTokensRequest, context)
    served = context.served
    count = await service.prepare(context, lambda: len(prompt(chat_input(fields), served)[0]))
    return json_response({"input_tokens": count})


async def _whole(service: Service, context: RequestContext, chat: PreparedChat, writer: MessageWriter) -> Response:
    return await service.whole([chat.request], context, lambda ended: json_response(writer.whole(ended[0].samples[0])))
