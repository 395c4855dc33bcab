"""The routes of responses: made, shown, gone on with and deleted."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lamina.server.chat.chat_input import ChatInput, joined
from lamina.server.chat.preparing import PreparedChat, prompt
from lamina.server.chat.thinking import Thinking, read_effort
from lamina.server.http.errors import ApiError, json_response, json_text, refused, shown
from lamina.server.http.sse import EventStream, while_connected
from lamina.server.openai.answers import dumps, token_size
from lamina.server.openai.responses import items
from lamina.server.openai.responses.events import ResponseEvents, ResponseObject, given_fields
from lamina.server.openai.responses.schemas import InputTokensRequest, ResponsesRequest
from lamina.server.openai.responses.store import MAX_HISTORY, MAX_TURNS, ResponseStore, StoredResponse, with_output
from lamina.server.openai.responses.store import item as stored_item
from lamina.server.openai.schemas import response_format
from lamina.server.preparation import go_on
from lamina.server.service import GRACE, RequestContext, Service
from lamina.server.settings import TENANT
from lamina.text.messages import MAX_MESSAGES

_PAGE = 20  # items of a list, unless the client says
_MOST = 100
_COUNT = re.compile(r"[0-9]{1,3}")


class ResponseRoutes:
    """The routes, with the responses that they keep."""

    def __init__(self, keys: int) -> None:
        self._store = ResponseStore(keys)

    async def create(self, service: Service, request: Request) -> Response:
        """POST /v1/responses."""
        context = service.context(request)
        fields = await service.read(request, ResponsesRequest, context)
        service.check_priority(context, fields.priority)
        served = service.served(context, 1, 1)
        reading = self._reading(fields, context.tenant)
        work = service.prepare_chat(context, served, reading.chat)
        prepared = await while_connected(request.receive, work, context.timeout + GRACE)
        response = ResponseObject(fields, reading.shown, context.model.name, prepared, reading.namespaces)
        making = _Making(self._store, context.tenant, prepared, response)
        if fields.store is not False:
            making.keep(reading.input, fields.previous_response_id, lambda: served.engine.abort(prepared.request))
        stream = fields.stream
        del fields, reading  # not kept as long as the answer takes: they may have megabytes
        if stream:
            events = ResponseEvents(prepared, response, making.done)
            frames = making.frames(service, context, events)
            return EventStream(frames, context.timeout + GRACE, service.translate, events.failed, b"")
        return await while_connected(request.receive, making.whole(service, context), context.timeout + GRACE)

    async def input_tokens(self, service: Service, request: Request) -> Response:
        """POST /v1/responses/input_tokens: how many tokens a response's prompt has."""
        context = service.context(request)
        fields = await service.read(request, InputTokensRequest, context)
        served, reading = context.served, self._reading(fields, context.tenant)
        count = await service.prepare(context, lambda: len(prompt(reading.chat(), served)[0]))
        return json_response({"object": "response.input_tokens", "input_tokens": count})

    async def retrieve(self, service: Service, request: Request) -> Response:
        """GET /v1/responses/{response_id}: a response that is kept, or is under way."""
        if request.query_params.get("stream", "false") not in ("false", ""):
            raise refused("stream", request.query_params["stream"], "false: a stream is on its own connection")
        return json_text(self._stored(request).response)

    async def delete(self, service: Service, request: Request) -> Response:
        """DELETE /v1/responses/{response_id}."""
        stored = self._stored(request)
        self._store.drop(request.scope[TENANT], stored.id)
        return json_response({"id": stored.id, "object": "response", "deleted": True})

    async def cancel(self, service: Service, request: Request) -> Response:
        """POST /v1/responses/{response_id}/cancel: end a response that is under way."""
        stored = self._stored(request)
        if stored.end is None:
            raise ApiError(400, f"the response is {stored.status}; allowed is one in_progress", "response_id")
        stored.end()
        return json_text(stored.response.replace('"status":"in_progress"', '"status":"cancelled"', 1))

    async def input_items(self, service: Service, request: Request) -> Response:
        """GET /v1/responses/{response_id}/input_items: the items of a response's own input."""
        stored = self._stored(request)
        query = request.query_params
        limit, order, after = query.get("limit", str(_PAGE)), query.get("order", "desc"), query.get("after")
        if not _COUNT.fullmatch(limit) or not 1 <= int(limit) <= _MOST:
            raise refused("limit", limit, f"an integer from 1 to {_MOST}")
        if order not in ("asc", "desc"):
            raise refused("order", order, "asc or desc")
        page = partial(_page, stored, int(limit), order == "asc", after)
        return await service.prepare(service.context(request), page)

    def _stored(self, request: Request) -> StoredResponse:
        response_id = request.path_params["response_id"]
        stored = self._store.get(request.scope[TENANT], response_id)
        if stored is None:
            raise ApiError(404, f"there is no response {shown(response_id)}; they are kept for a while", "response_id")
        return stored

    def _reading(self, fields: InputTokensRequest, tenant: str) -> _Reading:
        """A request that is to be read on a thread, with what is kept of its conversation. Raises ApiError."""
        turns: list[StoredResponse] = []
        if (previous := fields.previous_response_id) is not None:
            if (conversation := self._store.conversation(tenant, previous)) is None:
                what = f"there is no response {shown(previous)}, or one before it is gone: they are kept for a while"
                raise ApiError(
                    404, f"{what}; send the whole input", "previous_response_id", "previous_response_not_found"
                )
            turns = conversation
            if len(turns) >= MAX_TURNS:
                raise ApiError(400, f"the conversation has {MAX_TURNS} turns, the most allowed", "previous_response_id")
            if turns[-1].status == "in_progress":
                raise ApiError(400, f"{previous} is in_progress; allowed is one that has ended", "previous_response_id")
        return _Reading(fields, turns, self._store.of(tenant))


class _Reading:
    """From the fields of a request to a chat, on a thread: both may be long. `turns` are the conversation before it,
    `stored` the responses that its items may refer to.

    `chat` also sets the items of its `input` and the fields that a response object shows of it, as JSON, and the
    namespaces of its functions."""

    def __init__(
        self, fields: InputTokensRequest, turns: Sequence[StoredResponse], stored: Mapping[str, StoredResponse]
    ) -> None:
        self.input = self.shown = ""
        self.namespaces: Mapping[str, str] = {}
        self._size = 0
        self._fields = fields
        self._turns = turns
        self._stored = stored

    def chat(self) -> ChatInput:
        """The chat that the request asks for. Raises ApiError."""
        fields = self._fields
        fields.tools = items.usable(fields.tools)
        _check(fields)
        entries = [self._referred(index, item) for index, item in enumerate(items.listed(fields.input))]
        if not entries and not self._turns:
            raise ApiError(400, "input is empty; at least one item is needed", "input", "missing_field")
        conversation = self._conversation(entries)
        tools, self.namespaces = items.tools(fields.tools)
        chat = _chat_input(fields, conversation, tools)
        if isinstance(fields, ResponsesRequest):
            _add_sampling(fields, chat)
            self.input, self.shown = dumps(entries), given_fields(fields)
        fields.input = fields.tools = None
        return chat

    def _conversation(self, given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages of the whole conversation. Raises ApiError."""
        history: list[dict[str, Any]] = []
        for written in (written for turn in self._turns for written in turn.items):
            history += self._kept(written, "previous_response_id")
            if len(history) + len(given) > MAX_MESSAGES:
                raise ApiError(400, f"the conversation has more than {MAX_MESSAGES} items, which are allowed", "input")
        messages = [*items.messages(history, "previous_response_id"), *items.messages(given)]
        if self._fields.instructions is not None:
            messages.insert(0, {"role": "system", "content": self._fields.instructions})
        return joined(messages)

    def _referred(self, at: int, item: dict[str, Any]) -> dict[str, Any]:
        """The item itself, or the one of a stored response that it refers to."""
        if item.get("type") != "item_reference" and not (item.keys() == {"id"} and isinstance(item["id"], str)):
            return item
        name, item_id = f"input[{at}].id", item.get("id")
        written = stored_item(self._stored, str(item_id))
        referred: dict[str, Any] = {} if written is None else self._kept(written, name)
        if referred.get("id") != item_id:
            raise ApiError(404, f"{name} is {shown(item_id)}; no kept response has it", name)
        return referred

    def _kept(self, written: str, param: str) -> Any:
        """What is kept as JSON. Raises ApiError where the conversation has too much of it: as objects it has more."""
        go_on()
        self._size += len(written)
        if self._size > MAX_HISTORY:
            raise ApiError(400, f"the earlier turns have more than {MAX_HISTORY} bytes, which are allowed", param)
        return json.loads(written)


def _page(stored: StoredResponse, limit: int, ascending: bool, after: str | None) -> Response:
    """Some of the items of a response's input."""
    name = stored.id.removeprefix("resp_")
    listed = [{"id": f"item_{name}_{index}"} | item for index, item in enumerate(json.loads(stored.input))]
    listed = listed if ascending else listed[::-1]
    if after is not None:
        places = [place for place, item in enumerate(listed) if item["id"] == after]
        if not places:
            raise refused("after", after, "the id of one of the items")
        listed = listed[places[0] + 1 :]
    page = listed[:limit]
    ids = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return json_response({"object": "list", "data": page, **ids, "has_more": len(page) < len(listed)})


class _Making:
    """A response that is being made. The store has what is kept of it, within its bounds."""

    def __init__(self, store: ResponseStore, tenant: str, chat: PreparedChat, response: ResponseObject) -> None:
        self._store = store
        self._tenant = tenant
        self._chat = chat
        self._response = response
        self._output: Sequence[str] | None = None  # once it has ended

    def keep(self, given: str, previous: str | None, end: Callable[[], None]) -> None:
        """Keep the response as it stands, with the items that were given, as JSON; `end` ends it."""
        response = self._response
        self._store.put(self._tenant, StoredResponse(response.id, given, previous, response.head, end=end))

    def done(self, output: Sequence[str]) -> None:
        """The response has ended with this output. It is kept, unless it was deleted or others took its room."""
        self._output = output
        stored = self._store.get(self._tenant, self._response.id)
        if stored is not None:
            stored.head, stored.output, stored.status = self._response.head, output, self._response.status
            stored.end = None
            self._store.put(self._tenant, stored)

    async def frames(
        self, service: Service, context: RequestContext, events: ResponseEvents
    ) -> AsyncGenerator[bytes, None]:
        """The frames of its stream. Where they are left before the end, as where a client goes, it is not kept."""
        frames = self._frames(service, context, events, events.begin())
        try:
            async with aclosing(frames):
                async for piece in frames:
                    yield piece
        finally:
            self._left()

    async def whole(self, service: Service, context: RequestContext) -> Response:
        """The response, once it has ended."""
        chat, response = self._chat, self._response
        try:
            if response.with_logprobs:  # which belong to parts of the reply, so it is read token by token
                events = ResponseEvents(chat, response, self.done)
                async for _ in self._frames(service, context, events):
                    pass
            else:
                self.done(
                    await service.whole(
                        [chat.request], context, lambda ended: response.of(chat, ended[0]), response.size
                    )
                )
        finally:
            self._left()
        return json_text(with_output(response.head, self._output or ()))

    def _frames(
        self, service: Service, context: RequestContext, events: ResponseEvents, begin: bytes = b""
    ) -> AsyncGenerator[bytes, None]:
        chat = self._chat
        return service.frames(
            [chat.request], context, events, begin, kept=self._response.size, token=token_size(chat.params)
        )

    def _left(self) -> None:
        if self._output is None:
            self._store.drop(self._tenant, self._response.id)


def _check(fields: InputTokensRequest) -> None:
    """Raises ApiError for what no server of one model can do, and for values that contradict each other."""
    if fields.conversation is not None:
        raise refused("conversation", fields.conversation, "null: use previous_response_id")
    if isinstance(fields, ResponsesRequest):
        if fields.background not in (None, False):
            raise refused("background", fields.background, "false: a response comes on its connection")
        if fields.prompt is not None:
            raise refused("prompt", fields.prompt, "null: there are no stored prompts; give instructions and input")
        if fields.stream_options is not None and not fields.stream:
            raise ApiError(400, "stream_options is given, which is allowed only where stream is true", "stream_options")
        _check_metadata(fields.metadata)
    if fields.tool_choice not in (None, "none", "auto") and not fields.tools:
        raise ApiError(400, "tool_choice is given, which is allowed only beside tools", "tool_choice")


def _check_metadata(metadata: Any) -> None:
    allowed = "an object of at most 16 texts of at most 512 characters, with names of at most 64"
    if metadata is None:
        return
    if not isinstance(metadata, dict) or len(metadata) > 16:
        raise refused("metadata", metadata, allowed)
    for name, value in metadata.items():
        if len(name) > 64 or not isinstance(value, str) or len(value) > 512:
            raise refused(f"metadata.{name[:64]}", value, allowed)


def _chat_input(
    fields: InputTokensRequest, conversation: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> ChatInput:
    if not conversation:
        raise ApiError(400, "input has no message; at least one is needed", "input")
    structure = _format(fields.text)
    return ChatInput(
        messages=conversation,
        messages_field="input",
        spelled={"messages[": "input, as messages[", ".function.": "."},
        tools=tools,
        tool_choice=items.tool_choice(fields.tool_choice) if tools else None,
        parallel_tool_calls=fields.parallel_tool_calls,
        structure=structure,
        structure_field="text.format" if structure else "tools" if tools else "",
        thinking=_thinking(fields),
        drop_oldest=fields.truncation == "auto",
    )


def _add_sampling(fields: ResponsesRequest, chat: ChatInput) -> None:
    """Complete the chat of a request that generates."""
    chat.template_kwargs = fields.chat_template_kwargs
    chat.sampling = fields.sampling
    chat.max_tokens, chat.bound = fields.max_output_tokens, True
    if "message.output_text.logprobs" in (fields.include or ()) or fields.top_logprobs:
        chat.top_logprobs = fields.top_logprobs or 0
    chat.priority, chat.cache_salt = fields.priority or 0, fields.cache_salt


def _format(text: Any) -> dict[str, Any]:
    """`text.format` as keywords of `SamplingParams`."""
    if text is None:
        return {}
    if not isinstance(text, dict) or not text.keys() <= {"format", "verbosity"}:
        raise refused("text", text, 'an object with "format" and "verbosity"')
    items.check_plain("text.verbosity", text.get("verbosity"))
    form = text.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        described = {key: value for key, value in form.items() if key != "type" and value is not None}
        form = {"type": "json_schema", "json_schema": described}
    try:
        return response_format(form)
    except ApiError as error:
        raise ApiError(400, str(error).replace("response_format", "text.format", 1), "text.format") from None


def _thinking(fields: InputTokensRequest) -> Thinking:
    budget = getattr(fields, "thinking_token_budget", None)
    reasoning = fields.reasoning
    if reasoning is None:
        return Thinking(budget=budget)
    names = ("effort", "summary", "generate_summary", "context", "mode")
    if not isinstance(reasoning, dict) or not reasoning.keys() <= set(names):
        raise refused("reasoning", reasoning, f"an object with {', '.join(names[:2])}")
    for name in ("summary", "generate_summary"):
        if reasoning.get(name) not in (None, "auto", "concise", "detailed"):
            raise refused(f"reasoning.{name}", reasoning[name], "auto, concise or detailed")
    for name in ("context", "mode"):
        items.check_plain(f"reasoning.{name}", reasoning.get(name))
    return Thinking(effort=read_effort("reasoning.effort", reasoning.get("effort")), budget=budget)
