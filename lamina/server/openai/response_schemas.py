"""The models of responses, only for the OpenAPI document: `answers` writes the JSON itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """The fields of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error response."""

    error: ErrorBody


class CompletionUsage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class ToolCallFunction(BaseModel):
    """The function of a call."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class AssistantMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class Choice(BaseModel):
    """One choice of a response."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None


class ChatChoice(Choice):
    """One choice of a chat."""

    message: AssistantMessage


class TextChoice(Choice):
    """One choice of a completion."""

    text: str


class ChatCompletion(BaseModel):
    """The response of /v1/chat/completions. A stream has its parts as chat.completion.chunk objects."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: CompletionUsage


class TextCompletion(BaseModel):
    """The response of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: CompletionUsage


class ModelCard(BaseModel):
    """A model that is served. `max_model_len` is null while it is loading."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int | None


class ModelList(BaseModel):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """The response of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class Detokenized(BaseModel):
    """The response of /detokenize."""

    prompt: str


class Health(BaseModel):
    """The response of /health."""

    status: Literal["ok"]


class Version(BaseModel):
    """The response of /version."""

    version: str
