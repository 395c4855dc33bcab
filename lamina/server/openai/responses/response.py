"""The response object: what a request said, and what has come of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.server.chat.preparing import PreparedChat
from lamina.server.chat.reply import FinishReason, Part, ReplyUsage
from lamina.server.http.errors import ApiError
from lamina.server.openai.responses.schemas import ResponsesRequest

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

    def __init__(self, fields: ResponsesRequest, model: str, chat: PreparedChat, namespaces: Mapping[str, str]) -> None:
        self.id = f"resp_{secrets.token_hex(16)}"
        reasoning = fields.reasoning or {}
        self.summarised = any(reasoning.get(name) is not None for name in ("summary", "generate_summary"))
        """Whether reasoning is shown as its summary: nothing sums it up here."""
        self.with_logprobs = chat.params.logprobs is not None
        self._namespaces = namespaces
        params = chat.params
        self._fields: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": None,
            "model": model,
            "output": [],
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": fields.previous_response_id,
            "prompt_cache_key": None,
            "reasoning": {"effort": None, "summary": None} | reasoning,
            "safety_identifier": None,
            "service_tier": "default",
            "store": fields.store is not False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} | (fields.text or {}),
            "tool_choice": fields.tool_choice or "auto",
            "tools": list(fields.tools or ()),
            "top_logprobs": params.logprobs or 0,
            "top_p": params.top_p,
            "truncation": fields.truncation or "disabled",
            "usage": None,
            "user": None,
            "metadata": fields.metadata or {},
        }

    def begun(self) -> dict[str, Any]:
        """The object of a response that is under way."""
        return self._fields

    def ended(self, reason: FinishReason, output: Sequence[dict[str, Any]], usage: ReplyUsage) -> dict[str, Any]:
        """The object of a response that has ended."""
        status = STATUSES[reason]
        more: dict[str, Any] = {"status": status, "output": list(output), "usage": _usage(usage)}
        if status == "completed":
            more["completed_at"] = int(time.time())
        elif status == "incomplete":
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        return self._fields | more

    def failed(self, error: ApiError, output: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The object of a response that an error ended."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        return self._fields | {
            "status": "failed",
            "output": list(output),
            "error": {"code": code, "message": str(error)},
        }

    def items(self, parts: Sequence[Part], reason: FinishReason) -> list[dict[str, Any]]:
        """The output of a reply that has ended."""
        last = "completed" if STATUSES[reason] == "completed" else "incomplete"
        statuses = ["completed"] * (len(parts) - 1) + [last]
        return [self.item(part, at, status) for at, (part, status) in enumerate(zip(parts, statuses, strict=False))]

    def item(self, part: Part, index: int, status: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        """The item of a part of the reply, the `index`th of the output. One "in_progress" is empty."""
        begun = status == "in_progress"
        item: dict[str, Any] = {"id": f"{_PREFIXES[part.kind]}_{self.id.removeprefix('resp_')}_{index}"}
        if part.kind == "call":
            item |= {"type": "function_call", "status": status, "call_id": part.id, "name": part.name}
            item["arguments"] = "" if begun else part.text
            if (namespace := self._namespaces.get(part.name)) is not None:
                item["namespace"] = namespace
            return item
        content = [] if begun else [self.piece(part, part.text, logprobs)]
        if part.kind == "content":
            return item | {"type": "message", "status": status, "role": "assistant", "content": content}
        shown = {"summary": content} if self.summarised else {"summary": [], "content": content}
        return item | {"type": "reasoning", "status": status, "encrypted_content": None} | shown

    def piece(self, part: Part, text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        """A part of an item's content, or of its summary."""
        if part.kind == "reasoning":
            return {"type": "summary_text" if self.summarised else "reasoning_text", "text": text}
        shown = {"logprobs": list(logprobs)} if self.with_logprobs else {}
        return {"type": "output_text", "text": text, "annotations": []} | shown


def _usage(usage: ReplyUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
