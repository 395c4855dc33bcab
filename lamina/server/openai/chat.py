"""POST /v1/chat/completions: OpenAI's chats, from JSON and to JSON. `lamina.server.chat` does the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lamina.completions import Completion, Sample, TokenEvent
from lamina.server.chat.chat_input import ChatInput
from lamina.server.chat.formats.reply_parser import Delta
from lamina.server.chat.preparing import PreparedChat
from lamina.server.chat.reply import Reply, replies, text_of
from lamina.server.chat.thinking import Thinking
from lamina.server.http.errors import ApiError, json_pieces, refused
from lamina.server.http.sse import EventStream, while_connected
from lamina.server.openai import answers
from lamina.server.openai.answers import Chunks, chat_logprob, dumps
from lamina.server.openai.schemas import ChatRequest, check_stream, response_format, structured
from lamina.server.service import GRACE, RequestContext, Service


async def chat(service: Service, request: Request) -> Response:
    """Answer one request."""
    context = service.context(request)
    fields = await service.read(request, ChatRequest, context)
    service.check_priority(context, fields.priority)
    served = service.served(context, 1, fields.n or 1)
    work = service.prepare_chat(context, served, partial(chat_input, fields))
    prepared = await while_connected(request.receive, work, context.timeout + GRACE)
    fields.messages = fields.tools = None  # not kept as long as the answer takes: they may have megabytes
    named = answers.named("chatcmpl", fields.request_id or context.id, context.model.name)
    named["system_fingerprint"] = served.fingerprint
    if fields.stream:
        frames = service.frames([prepared.request], context, _Writer(fields, prepared, named))
        return EventStream(frames, context.timeout + GRACE, service.translate)
    work_whole = _whole(service, fields, prepared, context, named)
    return await while_connected(request.receive, work_whole, context.timeout + GRACE)


def chat_input(fields: ChatRequest) -> ChatInput:
    """What a request asks for. Raises ApiError where fields contradict each other or are refused."""
    _check(fields)
    structure_field, structure = _structure(fields)
    turn_begins = fields.add_generation_prompt
    return ChatInput(
        messages=fields.messages,
        tools=fields.tools,
        tool_choice=fields.tool_choice,
        parallel_tool_calls=fields.parallel_tool_calls,
        structure=structure,
        structure_field=structure_field or ("tools" if fields.tools else ""),
        thinking=Thinking(effort=fields.reasoning_effort, budget=fields.thinking_token_budget),
        template_kwargs=fields.chat_template_kwargs,
        add_generation_prompt=True if turn_begins is None else turn_begins,
        continue_final_message=bool(fields.continue_final_message),
        add_special_tokens=bool(fields.add_special_tokens),
        truncate=fields.truncate_prompt_tokens,
        echo=bool(fields.echo),
        sampling=fields.sampling,
        max_tokens=_limit(fields),
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        priority=fields.priority or 0,
        cache_salt=fields.cache_salt,
    )


def _check(fields: ChatRequest) -> None:
    check_stream(fields)
    if fields.chat_template is not None:
        raise refused("chat_template", fields.chat_template, "null: only the model's own template is rendered")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ApiError(400, "top_logprobs is given, which is allowed only where logprobs is true", "top_logprobs")
    if fields.tool_choice not in (None, "none") and not fields.tools:
        raise ApiError(400, "tool_choice is given, which is allowed only beside tools", "tool_choice")


def _limit(fields: ChatRequest) -> int | None:
    older, newer = fields.max_tokens, fields.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise refused("max_tokens", older, f"max_completion_tokens, which is {newer}, or only one of them")
    return newer if newer is not None else older


def _structure(fields: ChatRequest) -> tuple[str, dict[str, Any]]:
    """The field that structures the output, "" without one, and its keywords for `SamplingParams`."""
    ways = {
        "response_format": response_format(fields.response_format),
        "structured_outputs": structured(fields.structured_outputs),
    }
    names = [name for name, keywords in ways.items() if keywords]
    if len(names) > 1:
        raise ApiError(400, f"{' and '.join(names)} are given; allowed is one of them", names[0])
    return (names[0], ways[names[0]]) if names else ("", {})


async def _whole(
    service: Service, fields: ChatRequest, chat: PreparedChat, context: RequestContext, named: Mapping[str, Any]
) -> Response:
    scores = answers.LOGPROB * (1 + (chat.params.prompt_logprobs or 0)) * len(chat.request.request.prompt)
    size = 0 if chat.params.prompt_logprobs is None else scores

    def work(ended: Sequence[Completion]) -> Response:
        (completion,) = ended
        return json_pieces(_written(fields, chat, completion, named))

    return await service.whole([chat.request], context, work, size, answers.token_size(chat.params))


def _written(
    fields: ChatRequest, chat: PreparedChat, completion: Completion, named: Mapping[str, Any]
) -> Iterator[str]:
    """The response as JSON, in pieces."""
    read = replies(chat, completion)
    yield f'{dumps({**named, "object": "chat.completion"})[:-1]},"choices":'
    for separator, sample, reply in zip(answers.separators(), completion.samples, read, strict=False):
        yield separator
        yield from _choice(fields, chat, sample, reply)
    used = answers.usage([chat.request], completion.usage.completion_tokens, sum(r.reasoning_tokens for r in read))
    yield f'],"usage":{dumps(used)}'
    if (scored := completion.prompt_logprobs) is not None:
        yield ',"prompt_logprobs":'
        yield from answers.prompt_logprobs(scored)
    yield "}"


def _choice(fields: ChatRequest, chat: PreparedChat, sample: Sample, reply: Reply) -> Iterator[str]:
    calls = [
        {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.text}}
        for part in reply.parts
        if part.kind == "call"
    ]
    content = chat.prefix + text_of(reply.parts, "content")
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
    message["refusal"] = None
    if reasoning := text_of(reply.parts, "reasoning"):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": sample.index,
        "message": message,
        "finish_reason": reply.reason(sample.finish_reason),
        "stop_reason": answers.stop_reason(chat.params, sample),
    }
    logprobs: Iterable[str] = ["null"]
    if sample.logprobs is not None:
        write = partial(chat_logprob, as_ids=bool(fields.return_tokens_as_token_ids))
        logprobs = answers.with_json({"refusal": None}, "content", answers.per_token(sample.logprobs, write))
    yield from answers.with_json(choice, "logprobs", logprobs)


class _Writer:
    """Writes a chat's chunks. It runs for each token, so the common case is kept short."""

    def __init__(self, fields: ChatRequest, chat: PreparedChat, named: Mapping[str, Any]) -> None:
        self._chat = chat
        self._as_ids = bool(fields.return_tokens_as_token_ids)
        self._replies = [Reply(chat) for _ in range(chat.params.n)]
        self._plain = self._replies[0].plain
        self._started = [False] * chat.params.n
        head = {**named, "object": "chat.completion.chunk"}
        self._chunks = Chunks(head, self._usage, fields.include_usage, fields.continuous_usage)

    def events(self, events: Sequence[TokenEvent]) -> bytes:
        frames: list[str] = []
        for event in events:
            index = event.sample_index
            if not self._started[index]:
                self._begin(index, frames)  # before its token is counted
            reply = self._replies[index]
            if event.finish_reason is not None:
                self._finish(index, reply.take(event), event, event.finish_reason, frames)
            elif self._plain and event.logprob is None:
                reply.take(event)
                if event.text:
                    delta = f'{{"content":{quoted(event.text)}}}'
                    frames.append(
                        self._chunks.chunk(f'{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":null}}')
                    )
            else:
                self._deltas(index, reply.take(event), event, frames)
        return "".join(frames).encode()

    def end(self, completions: Sequence[Completion]) -> bytes:
        (completion,) = completions
        frames: list[str] = []
        for index, sample in enumerate(completion.samples):
            if not self._started[index]:
                self._begin(index, frames)
            if not self._replies[index].ended:
                self._finish(index, self._replies[index].finish(sample), None, sample.finish_reason, frames)
        frames.append(self._chunks.last())
        return "".join(frames).encode()

    def _usage(self) -> dict[str, Any]:
        tokens = sum(reply.tokens for reply in self._replies)
        return answers.usage([self._chat.request], tokens, sum(reply.reasoning_tokens for reply in self._replies))

    def _begin(self, index: int, frames: list[str]) -> None:
        """With tools there may be no content: it is null here, and `_finish` makes it text where no tool is called."""
        self._started[index] = True
        content = self._chat.prefix or ("" if self._plain else None)
        self._add(index, {"role": "assistant", "content": content}, None, frames)

    def _finish(
        self, index: int, deltas: Sequence[Delta], event: TokenEvent | None, reason: Any, frames: list[str]
    ) -> None:
        self._deltas(index, deltas, event, frames)
        reply = self._replies[index]
        stopped = answers.stop_reason(self._chat.params, event)
        delta = {} if self._plain or reply.calls else {"content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reply.reason(reason)}
        choice["stop_reason"] = stopped
        frames.append(self._chunks.chunk(dumps(choice)))

    def _deltas(self, index: int, deltas: Sequence[Delta], event: TokenEvent | None, frames: list[str]) -> None:
        """Chunks of deltas, the first of them with the token's log probability."""
        written = [_delta(delta) for delta in deltas]
        logprobs = None
        if event is not None and event.logprob is not None:
            logprobs = {"content": [chat_logprob(event.logprob, self._as_ids)], "refusal": None}
            written = written or [{"content": ""} if self._plain else {}]
        for number, delta in enumerate(written):
            self._add(index, delta, logprobs if number == 0 else None, frames)

    def _add(self, index: int, delta: Mapping[str, Any], logprobs: Any, frames: list[str]) -> None:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        frames.append(self._chunks.chunk(dumps(choice)))


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.reasoning is not None:
        return {"reasoning_content": delta.reasoning}
    if delta.index is None:
        return {"content": delta.content}
    function: dict[str, Any] = {"arguments": delta.arguments}
    call: dict[str, Any] = {"index": delta.index, "function": function}
    if delta.name is not None:
        function["name"] = delta.name
        call |= {"id": delta.id, "type": "function"}
    return {"tool_calls": [call]}
