"""The fields of POST /v1/messages, for validation and for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from lamina.sampling_params import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from lamina.server.http.fields import Ignored, Null, Strict, described

_TEXT = {"type": "string"}
_BLOCK = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "thinking", "redacted_thinking", "tool_use", "tool_result", "document"]},
        "text": _TEXT,
        "thinking": _TEXT,
        "id": _TEXT,
        "name": _TEXT,
        "input": {"type": "object"},
        "tool_use_id": _TEXT,
        "content": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
        "is_error": {"type": "boolean"},
    },
    "required": ["type"],
}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _BLOCK}]}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _CONTENT},
    "required": ["role", "content"],
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"enum": ["custom", None]},
        "name": _TEXT,
        "description": _TEXT,
        "input_schema": {"type": "object"},
        "strict": {"type": "boolean"},
    },
    "required": ["name", "input_schema"],
}
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class CountTokensRequest(Strict):
    """POST /v1/messages/count_tokens, and what it has in common with POST /v1/messages."""

    model: str | None = Field(None, description="The name of the served model; none means that one.")
    messages: Annotated[Any, described({"type": "array", "items": _MESSAGE, "minItems": 1})] = Field(
        description="The conversation. A last message of the assistant is continued."
    )
    system: Annotated[Any, described(_TEXT, {"type": "array", "items": _BLOCK})] = Field(
        None, description="What the model is told before the conversation: text, or blocks of text."
    )
    tools: Annotated[Any, described({"type": "array", "items": _TOOL}, {"type": "null"})] = Field(
        None, description="Tools that the client runs. Tools that a server runs are refused."
    )
    tool_choice: Annotated[Any, described({"type": "object", "required": ["type"]}, {"type": "null"})] = Field(
        None, description='{"type": "auto" | "any" | "none" | "tool", "name": ..., "disable_parallel_tool_use"}'
    )
    thinking: Annotated[Any, described({"type": "object", "required": ["type"]}, {"type": "null"})] = Field(
        None, description='{"type": "enabled", "budget_tokens": ...}, {"type": "adaptive"}, or disabled (default).'
    )
    output_config: Annotated[Any, described({"type": "object"}, {"type": "null"})] = Field(
        None, description='{"effort": ..., "format": {"type": "json_schema", "schema": ...}}'
    )
    mcp_servers: Null = Field(None, description="Refused: the client connects to MCP servers, and gives their tools.")

    cache_control: Ignored = Field(None, description="Ignored: prefixes are found by their text.")
    context_management: Ignored = Field(None, description="Ignored: nothing is cleared.")
    speed: Ignored = Field(None, description="Ignored: there is one.")
    user_profile_id: Ignored = Field(None, description="Ignored.")
    workspace_id: Ignored = Field(None, description="Ignored.")


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(
        ge=1, le=2**31 - 1, description="The most tokens to generate; never more than the context has room for."
    )
    stream: bool | None = Field(None, description="Send server-sent events as text comes.")
    stop_sequences: list[_Stop] | None = Field(
        None, max_length=MAX_STOP_STRINGS, fail_fast=True, description="Strings that end the text where they appear."
    )
    temperature: float | None = Field(None, ge=0, le=100, description="0 always takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1, description="Keep the likeliest tokens that together reach this.")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="Keep the k likeliest tokens; 0 or -1 keeps all.")

    metadata: Ignored = Field(None, description="Ignored: tenants differ by their API keys.")
    service_tier: Ignored = Field(None, description="Ignored: there is one.")
    container: Ignored = Field(None, description="Ignored: nothing runs here.")
    inference_geo: Ignored = Field(None, description="Ignored.")
    diagnostics: Ignored = Field(None, description="Ignored.")
