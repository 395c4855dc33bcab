"""POST /v1/chat/completions: from messages to a generation, and from its events to a response.

What chats and completions share is in `sampling_fields` and `answers`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lamina.client.input_processor import InputProcessor
from lamina.completions import Completion, Sample, TokenEvent
from lamina.errors import ContextTooLong
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.server.chat.tool_parser import Delta, ToolParser
from lamina.server.chat.tools import ToolUse, call_text, tags_are_special
from lamina.server.frontend import Served
from lamina.server.http.errors import ApiError, refused
from lamina.server.http.sse import EventStream, while_connected
from lamina.server.openai import answers
from lamina.server.openai.answers import Chunks, chat_logprob, dumps
from lamina.server.openai.sampling_fields import (
    blaming,
    check_characters,
    check_echo,
    check_length,
    check_prompt_logprobs,
    check_stream_options,
    encoded,
    response_format,
    sampling,
    structured,
    truncated,
)
from lamina.server.openai.schemas import ChatRequest, TokenizeRequest
from lamina.server.openai.service import GRACE, RequestContext, Service
from lamina.text.messages import check_messages
from lamina.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat that can be submitted. Every answer begins with `prefix`. `hidden` are the texts to leave out where there
    are tools, None where there are none."""

    fields: ChatRequest
    request: EngineRequest
    eos_ids: tuple[int, ...]
    prefix: str
    hidden: tuple[str, ...] | None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def as_ids(self) -> bool:
        """Whether log probabilities name tokens by their ids."""
        return bool(self.fields.return_tokens_as_token_ids)

    def parser(self) -> ToolParser | None:
        """A parser for one sample; None without tools."""
        return None if self.hidden is None else ToolParser(new_call_id, self.hidden)


async def chat(service: Service, request: Request) -> Response:
    """Answer one request."""
    context = service.context(request)
    fields = await service.read(request, ChatRequest, context)
    service.check_priority(context, fields.priority)
    served = service.served(context, 1, fields.n or 1)
    work = _prepared(service, fields, served, context)
    prepared = await while_connected(request.receive, work, context.timeout + GRACE)
    named = answers.named("chatcmpl", fields.request_id or context.id, service.settings.model)
    if fields.stream:
        frames = service.frames([prepared.request], context, _Writer(prepared, named))
        return EventStream(frames, context.timeout + GRACE, service.translate)
    return await while_connected(request.receive, _whole(service, prepared, context, named), context.timeout + GRACE)


def prompt_text(
    fields: ChatRequest | TokenizeRequest,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    use: ToolUse | None,
) -> str:
    """Checked messages and tools as the template renders them. A template without support for tools gets them as
    text."""
    continued = bool(fields.continue_final_message)
    begun = fields.add_generation_prompt
    if not tokenizer.template_knows_tools:
        messages = _in_words(messages, None if use is None else use.system_note)
    return tokenizer.render(
        messages,
        add_generation_prompt=True if begun is None else begun,
        continue_final_message=continued,
        tools=list(use.tools) if use is not None and tokenizer.template_knows_tools else None,
    )


def checked_messages(messages: Any, inputs: InputProcessor) -> list[dict[str, Any]]:
    """Messages in the form that templates expect. Raises InvalidRequest, ApiError where they are too long."""
    checked = check_messages(messages)
    check_length("messages", sum(len(message["content"]) for message in checked), inputs)
    return checked


def new_call_id() -> str:
    """A new id of a tool call."""
    return f"call_{secrets.token_hex(12)}"


async def _prepared(service: Service, fields: ChatRequest, served: Served, context: RequestContext) -> Chat:
    """The request with all checks done, before anything is submitted."""
    way, chat = await service.prepare(context, _chat, fields, served, service.salt(context, fields.cache_salt))
    with blaming(way):
        await service.compile(context, served, chat.params)
    return chat


def _chat(fields: ChatRequest, served: Served, salt: tuple[str, str]) -> tuple[str, Chat]:
    """The field that structures the output, "" without one, and the chat."""
    _check(fields)
    tokenizer, inputs = served.tokenizer, served.inputs
    special = tags_are_special(tokenizer.special_tokens)
    use = ToolUse.from_request(
        fields.tools, fields.tool_choice, fields.parallel_tool_calls, tokenizer.template_knows_tools, special
    )
    messages = checked_messages(fields.messages, inputs)
    text = prompt_text(fields, messages, tokenizer, use)
    check_characters({"messages": text}, inputs)
    limit = _limit(fields)
    whole = fields.truncate_prompt_tokens is None
    ids = truncated(fields, encoded(text, bool(fields.add_special_tokens), inputs, "messages", whole), inputs, limit)
    way, structure = _structure(fields, use, special)
    try:
        with blaming(way):
            params = sampling(
                fields,
                inputs,
                max_tokens=max(1, inputs.max_model_len - len(ids)) if limit is None else limit,
                logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
                structure=structure,
            )
            (request,) = inputs.requests([ids], params, fields.priority or 0, salt)
    except ContextTooLong as error:
        raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
    hidden = None if use is None else tuple(end for eos in tokenizer.eos_ids if (end := tokenizer.token(eos)))
    prefix = messages[-1]["content"] if fields.echo and messages[-1]["role"] == "assistant" else ""
    check_echo([prefix], params.n)
    fields.messages = fields.tools = None  # not kept as long as the answer takes: they may have megabytes
    return way, Chat(fields, request, tokenizer.eos_ids, prefix, hidden)


def _check(fields: ChatRequest) -> None:
    check_prompt_logprobs(fields)
    check_stream_options(fields)
    if fields.chat_template is not None:
        raise refused("chat_template", fields.chat_template, "null: only the model's own template is rendered")
    if fields.chat_template_kwargs:
        raise refused(
            "chat_template_kwargs", fields.chat_template_kwargs, "an empty object: templates get no variables"
        )
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ApiError(400, "top_logprobs is given, which is allowed only where logprobs is true", "top_logprobs")
    if fields.tool_choice not in (None, "none") and not fields.tools:
        raise ApiError(400, "tool_choice is given, which is allowed only beside tools", "tool_choice")


def _limit(fields: ChatRequest) -> int | None:
    older, newer = fields.max_tokens, fields.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise refused("max_tokens", older, f"max_completion_tokens, which is {newer}, or only one of them")
    return newer if newer is not None else older


def _structure(fields: ChatRequest, use: ToolUse | None, special: bool) -> tuple[str, dict[str, Any]]:
    """The field that structures the output, "" without one, and its keywords for `SamplingParams`."""
    ways = {
        "response_format": response_format(fields.response_format),
        "structured_outputs": structured(fields.structured_outputs),
        "tools": {} if use is None else {"grammar": use.grammar} | ({"skip_special_tokens": False} if special else {}),
    }
    given = [name for name, keywords in ways.items() if keywords]
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)} are given; allowed is one of them", given[0])
    return (given[0], ways[given[0]]) if given else ("", {})


def _in_words(messages: Sequence[Mapping[str, Any]], note: str | None) -> list[dict[str, Any]]:
    """Messages for a template without support for tools: calls, results and the note on tools as text."""
    written: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            written.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
            continue
        calls = [
            call_text(call["function"]["name"], dumps(call["function"]["arguments"]))
            for call in message.get("tool_calls", ())
        ]
        kept = {name: value for name, value in message.items() if name != "tool_calls"}
        written.append(kept | {"content": "\n".join([content, *calls] if content else calls or [content])})
    if note is not None:
        if written[0]["role"] in ("system", "developer"):
            written[0]["content"] += f"\n\n{note}"
        else:
            written.insert(0, {"role": "system", "content": note})
    return written


async def _whole(service: Service, chat: Chat, context: RequestContext, named: Mapping[str, Any]) -> Response:
    (completion,) = await service.whole([chat.request], context)
    choices = [_choice(chat, sample) for sample in completion.samples]
    used = answers.usage([chat.request], completion.usage.completion_tokens)
    content = {**named, "object": "chat.completion", "choices": choices, "usage": used}
    return Response(dumps(content).encode(), media_type="application/json")


def _choice(chat: Chat, sample: Sample) -> dict[str, Any]:
    content = sample.text
    calls: list[dict[str, Any]] = []
    reason: str = sample.finish_reason
    if (parser := chat.parser()) is not None:
        content, calls = _collected([*parser.push(sample.text), *parser.finish()])
        if calls and reason == "stop":
            reason = "tool_calls"
    content = chat.prefix + content
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
    message["refusal"] = None
    if calls:
        message["tool_calls"] = calls
    logprobs = None
    if sample.logprobs is not None:
        logprobs = {"content": [chat_logprob(entry, chat.as_ids) for entry in sample.logprobs], "refusal": None}
    last = sample.token_ids[-1] if sample.token_ids else None
    return {
        "index": sample.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reason,
        "stop_reason": answers.stop_reason(chat.params, chat.eos_ids, last, sample.finish_reason),
    }


def _collected(deltas: Sequence[Delta]) -> tuple[str, list[dict[str, Any]]]:
    """The content and the calls of all deltas together."""
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.index is None:
            content.append(delta.content or "")
        elif delta.name is not None:
            calls.append(
                {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": delta.arguments}}
            )
        else:
            calls[delta.index]["function"]["arguments"] += delta.arguments
    return "".join(content), calls


class _Writer:
    """Writes a chat's chunks. It runs for each token, so the common case is kept short."""

    def __init__(self, chat: Chat, named: Mapping[str, Any]) -> None:
        fields = chat.fields
        self._chat = chat
        self._chunks = Chunks(
            {**named, "object": "chat.completion.chunk"}, [chat.request], fields.include_usage, fields.continuous_usage
        )
        n = chat.params.n
        self._parsers = [chat.parser() for _ in range(n)]
        self._begun = [False] * n
        self._ended = [False] * n
        self._sent = [0] * n  # characters of a sample's text

    def events(self, events: Sequence[TokenEvent]) -> bytes:
        frames: list[str] = []
        for event in events:
            index = event.sample_index
            if not self._begun[index]:
                self._begin(index, frames)  # before its token is counted
            self._chunks.tokens += 1
            self._sent[index] += len(event.text)
            if event.finish_reason is not None:
                self._finish(index, event.text, event, event.finish_reason, frames)
            elif event.logprob is None and self._parsers[index] is None:
                if event.text:
                    delta = f'{{"content":{quoted(event.text)}}}'
                    frames.append(
                        self._chunks.chunk(f'{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":null}}')
                    )
            else:
                self._deltas(index, self._parsed(index, event.text, False), event, frames)
        return "".join(frames).encode()

    def end(self, completions: Sequence[Completion]) -> bytes:
        (completion,) = completions
        frames: list[str] = []
        for index, sample in enumerate(completion.samples):
            if not self._begun[index]:
                self._begin(index, frames)
            if not self._ended[index]:
                self._finish(index, sample.text[self._sent[index] :], None, sample.finish_reason, frames)
        frames.append(self._chunks.last())
        return "".join(frames).encode()

    def _begin(self, index: int, frames: list[str]) -> None:
        """With tools there may be no content: it is null here, and `_finish` makes it text where no tool is called."""
        self._begun[index] = True
        content = self._chat.prefix or (None if self._parsers[index] is not None else "")
        self._add(index, {"role": "assistant", "content": content}, None, frames)

    def _finish(self, index: int, text: str, event: TokenEvent | None, reason: Any, frames: list[str]) -> None:
        self._ended[index] = True
        deltas = self._parsed(index, text, True)
        self._deltas(index, deltas, event, frames)
        parser = self._parsers[index]
        token = None if event is None else event.token_id
        calls = 0 if parser is None else parser.calls
        ended = {"finish_reason": "tool_calls" if reason == "stop" and calls else reason}
        ended["stop_reason"] = answers.stop_reason(self._chat.params, self._chat.eos_ids, token, reason)
        delta = {} if parser is None or calls else {"content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None} | ended
        frames.append(self._chunks.chunk(dumps(choice)))

    def _parsed(self, index: int, text: str, last: bool) -> list[dict[str, Any]]:
        """The deltas of further text."""
        parser = self._parsers[index]
        if parser is None:
            return [{"content": text}] if text else []
        found = parser.push(text)
        if last:
            found += parser.finish()
        return [_delta(delta) for delta in found]

    def _deltas(
        self, index: int, deltas: Sequence[Mapping[str, Any]], event: TokenEvent | None, frames: list[str]
    ) -> None:
        """Chunks of deltas, the first of them with the token's log probability."""
        logprobs = None
        if event is not None and event.logprob is not None:
            logprobs = {"content": [chat_logprob(event.logprob, self._chat.as_ids)], "refusal": None}
            deltas = deltas or [{"content": ""} if self._parsers[index] is None else {}]
        for number, delta in enumerate(deltas):
            self._add(index, delta, logprobs if number == 0 else None, frames)

    def _add(self, index: int, delta: Mapping[str, Any], logprobs: Any, frames: list[str]) -> None:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        frames.append(self._chunks.chunk(dumps(choice)))


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.index is None:
        return {"content": delta.content}
    function: dict[str, Any] = {"arguments": delta.arguments}
    call: dict[str, Any] = {"index": delta.index, "function": function}
    if delta.name is not None:
        function["name"] = delta.name
        call |= {"id": delta.id, "type": "function"}
    return {"tool_calls": [call]}
