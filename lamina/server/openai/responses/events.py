"""The response object (`ResponseObject`), with what a request asked for and what has come of it, and the events of its
stream. The object is JSON from the beginning: what the client gave may be long, and is written once.

`ResponseEvents` writes the events in OpenAI's order: each item is added, grows and is done before the next.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lamina.completions import Completion, TokenEvent
from lamina.server.chat.formats.reply_parser import Delta
from lamina.server.chat.preparing import PreparedChat
from lamina.server.chat.reply import FinishReason, Reply, ReplyPart, ReplyUsage, replies
from lamina.server.http.errors import ApiError
from lamina.server.http.sse import json_event
from lamina.server.openai.answers import chat_logprob, dumps
from lamina.server.openai.responses.schemas import ResponsesRequest
from lamina.server.openai.responses.store import with_output

_PREFIXES = {"content": "msg", "reasoning": "rs", "call": "fc"}
STATUSES: Mapping[FinishReason, str] = {
    "stop": "completed",
    "tool_calls": "completed",
    "length": "incomplete",
    "abort": "cancelled",
}
"""The status of a response by why its reply ended."""


class ResponseObject:
    """Writes the object of one response, and its items. `namespaces` has that of each function which has one."""

    def __init__(
        self, fields: ResponsesRequest, given: str, model: str, chat: PreparedChat, namespaces: Mapping[str, str]
    ) -> None:
        """`given`: what `given_fields` made of the fields."""
        self.id = f"resp_{secrets.token_hex(16)}"
        reasoning = fields.reasoning or {}
        self.summarised = any(reasoning.get(name) is not None for name in ("summary", "generate_summary"))
        """Whether reasoning is shown as its summary: nothing sums it up here."""
        self.with_logprobs = chat.params.logprobs is not None
        self.status = "in_progress"
        self._namespaces = namespaces
        self._request = given
        params = chat.params
        self._fields: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": None,
            "model": model,
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": fields.previous_response_id,
            "prompt_cache_key": None,
            "safety_identifier": None,
            "service_tier": "default",
            "store": fields.store is not False,
            "temperature": params.temperature,
            "top_logprobs": params.logprobs or 0,
            "top_p": params.top_p,
            "truncation": fields.truncation or "disabled",
            "usage": None,
            "user": None,
        }

    @property
    def head(self) -> str:
        """The object as it stands, as JSON, without its output."""
        return f"{dumps(self._fields | {'status': self.status})[:-1]},{self._request[1:]}"

    @property
    def size(self) -> int:
        """About how many bytes of memory the object takes until its output comes."""
        return len(self._request)

    def end(self, reason: FinishReason, usage: ReplyUsage) -> None:
        """The response has ended."""
        self.status = STATUSES[reason]
        self._fields["usage"] = _usage(usage)
        if self.status == "completed":
            self._fields["completed_at"] = int(time.time())
        elif self.status == "incomplete":
            self._fields["incomplete_details"] = {"reason": "max_output_tokens"}

    def fail(self, error: ApiError) -> None:
        """The response has ended with an error."""
        self.status = "failed"
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._fields["error"] = {"code": code, "message": str(error)}

    def of(self, chat: PreparedChat, completion: Completion) -> list[str]:
        """The response ends with a completion: its items, as JSON. For a `PreparationPool`."""
        (reply,) = replies(chat, completion)
        reason, parts = reply.reason(completion.finish_reason), reply.parts
        self.end(reason, reply.usage())
        last = "completed" if self.status == "completed" else "incomplete"
        statuses = ["completed"] * (len(parts) - 1) + [last]
        items = zip(parts, statuses, strict=False)
        return [dumps(self.item(part, index, status)) for index, (part, status) in enumerate(items)]

    def item_id(self, part: ReplyPart, index: int) -> str:
        return f"{_PREFIXES[part.kind]}_{self.id.removeprefix('resp_')}_{index}"

    def item(self, part: ReplyPart, index: int, status: str) -> dict[str, Any]:
        """The item of a part of the reply, the `index`th of the output. One "in_progress" is empty."""
        in_progress = status == "in_progress"
        item: dict[str, Any] = {"id": self.item_id(part, index)}
        if part.kind == "call":
            item |= {"type": "function_call", "status": status, "call_id": part.id, "name": part.name}
            item["arguments"] = "" if in_progress else part.text
            if (namespace := self._namespaces.get(part.name)) is not None:
                item["namespace"] = namespace
            return item
        content = [] if in_progress else [self.piece(part, part.text)]
        if part.kind == "content":
            return item | {"type": "message", "status": status, "role": "assistant", "content": content}
        texts = {"summary": content} if self.summarised else {"summary": [], "content": content}
        return item | {"type": "reasoning", "status": status, "encrypted_content": None} | texts

    def piece(self, part: ReplyPart, text: str) -> dict[str, Any]:
        """A part of an item's content, or of its summary, without its log probabilities."""
        if part.kind == "reasoning":
            return {"type": "summary_text" if self.summarised else "reasoning_text", "text": text}
        extra: dict[str, Any] = {"logprobs": []} if self.with_logprobs else {}
        return {"type": "output_text", "text": text, "annotations": []} | extra


def given_fields(fields: ResponsesRequest) -> str:
    """The fields of a response object that show the request's own, which may be long. For a `PreparationPool`."""
    return dumps(
        {
            "instructions": fields.instructions,
            "reasoning": {"effort": None, "summary": None} | (fields.reasoning or {}),
            "text": {"format": {"type": "text"}} | (fields.text or {}),
            "tool_choice": fields.tool_choice or "auto",
            "tools": list(fields.tools or ()),
            "metadata": fields.metadata or {},
        }
    )


def _with_logprobs(written: str, logprobs: Sequence[str]) -> str:
    """JSON with the log probabilities of tokens in its one empty list of them: no text in it can look like that."""
    return written.replace('"logprobs":[]', f'"logprobs":[{",".join(logprobs)}]', 1) if logprobs else written


def _usage(usage: ReplyUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


class ResponseEvents:
    """Writes the stream of one response. `done` gets the items of its output, as JSON, once it has ended."""

    def __init__(self, chat: PreparedChat, response: ResponseObject, done: Callable[[Sequence[str]], None]) -> None:
        self._response = response
        self._done = done
        self._reply = Reply(chat)
        self._open: ReplyPart | None = None
        self._output: list[str] = []  # the items that are done, as JSON
        self._logprobs: list[str] = []  # of the open item, as JSON: objects would take ten times that
        self._waiting: list[str] = []  # of tokens whose text is held back
        self._number = 0

    def begin(self) -> bytes:
        return self._state("response.created") + self._state("response.in_progress")

    def events(self, events: Sequence[TokenEvent]) -> bytes:
        frames: list[bytes] = []
        for token in events:
            reasoned = self._reply.reasoning_tokens
            deltas = self._reply.take(token)
            if token.logprob is not None and self._reply.reasoning_tokens == reasoned:
                self._waiting.append(dumps(chat_logprob(token.logprob, False)))
            for delta in deltas:
                self._add(delta, frames)
        return b"".join(frames)

    def end(self, completions: Sequence[Completion]) -> bytes:
        ((sample,),) = (completion.samples for completion in completions)
        frames: list[bytes] = []
        if not self._reply.ended:
            for delta in self._reply.finish(sample):
                self._add(delta, frames)
        reason = self._reply.reason(sample.finish_reason)
        self._close(frames, "completed" if reason in ("stop", "tool_calls") else "incomplete")
        self._response.end(reason, self._reply.usage())
        self._done(self._output)
        completed = self._response.status == "completed"
        frames.append(self._state("response.completed" if completed else "response.incomplete"))
        return b"".join(frames)

    def failed(self, error: ApiError) -> bytes:
        self._response.fail(error)
        self._done(self._output)
        return self._state("response.failed")

    def _add(self, delta: Delta, frames: list[bytes]) -> None:
        part, text = self._reply.collect(delta)
        if part is not self._open:
            self._close(frames, "completed")
            self._begin(part, frames)
        logprobs, self._waiting = self._waiting, []
        if not text:
            return
        name, place = self._names(part)
        more: dict[str, Any] = {"logprobs": []} if part.kind == "content" else {}
        self._logprobs += logprobs
        frames.append(self._event(f"{name}.delta", logprobs, **place, delta=text, **more))

    def _begin(self, part: ReplyPart, frames: list[bytes]) -> None:
        self._open = part
        self._logprobs = []
        item = self._response.item(part, len(self._output), "in_progress")
        frames.append(self._event("response.output_item.added", output_index=len(self._output), item=item))
        if part.kind != "call":
            name, place = self._piece(part)
            frames.append(self._event(f"{name}.added", **place, part=self._response.piece(part, "")))

    def _close(self, frames: list[bytes], status: str) -> None:
        part = self._open
        if part is None:
            return
        self._open = None
        name, place = self._names(part)
        if part.kind == "call":
            frames.append(self._event(f"{name}.done", **place, name=part.name, arguments=part.text))
        else:
            more: dict[str, Any] = {"logprobs": []} if part.kind == "content" else {}
            frames.append(self._event(f"{name}.done", self._logprobs, **place, text=part.text, **more))
            outer, outer_place = self._piece(part)
            piece = self._response.piece(part, part.text)
            frames.append(self._event(f"{outer}.done", self._logprobs, **outer_place, part=piece))
        item = self._response.item(part, len(self._output), status)
        frames.append(
            self._event("response.output_item.done", self._logprobs, output_index=len(self._output), item=item)
        )
        self._output.append(_with_logprobs(dumps(item), self._logprobs))

    def _names(self, part: ReplyPart) -> tuple[str, dict[str, Any]]:
        """What the events of a part's text are called, and the fields that say where it is."""
        index = len(self._output)
        place: dict[str, Any] = {"item_id": self._response.item_id(part, index), "output_index": index}
        if part.kind == "call":
            return "response.function_call_arguments", place
        if part.kind == "content":
            return "response.output_text", place | {"content_index": 0}
        if self._response.summarised:
            return "response.reasoning_summary_text", place | {"summary_index": 0}
        return "response.reasoning_text", place | {"content_index": 0}

    def _piece(self, part: ReplyPart) -> tuple[str, dict[str, Any]]:
        """The same of the piece around a text."""
        _, place = self._names(part)
        return "response.reasoning_summary_part" if "summary_index" in place else "response.content_part", place

    def _event(self, kind: str, written: Sequence[str] = (), /, **fields: Any) -> bytes:
        return json_event(_with_logprobs(dumps(self._numbered(kind) | fields), written), kind)

    def _state(self, kind: str) -> bytes:
        """An event with the response as it stands."""
        response = with_output(self._response.head, self._output)
        return json_event(f'{dumps(self._numbered(kind))[:-1]},"response":{response}}}', kind)

    def _numbered(self, kind: str) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number}
