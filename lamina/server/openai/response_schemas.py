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
    completion_tokens_details: dict[str, int] | None = None


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
    reasoning_content: str | None = None
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


class Infilled(BaseModel):
    """The response of /infill. `tokens_evaluated` is the prompt's, of which `tokens_cached` were cached."""

    content: str
    stop: Literal[True]
    stop_type: Literal["limit", "eos", "word", "none"]
    stopping_word: str
    model: str
    truncated: Literal[False]
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int


class ModelCard(BaseModel):
    """A model that is served. `max_model_len` is null unless it is loaded; `aliases` are its further names. `type`,
    `display_name` and `created_at` are Anthropic's names."""

    id: str
    object: Literal["model"]
    type: Literal["model"]
    display_name: str
    created: int
    created_at: str
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int | None
    state: Literal["loaded", "loading", "unloaded"]
    aliases: list[str]


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]
    has_more: Literal[False]
    first_id: str
    last_id: str


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


class ResponseObject(BaseModel):
    """The response of /v1/responses. A stream has it in its first and its last events."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    previous_response_id: str | None
    instructions: str | None
    metadata: dict[str, str]


class InputTokens(BaseModel):
    """The response of /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(BaseModel):
    """The response of DELETE /v1/responses/{response_id}."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(BaseModel):
    """The response of /v1/responses/{response_id}/input_items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Message(BaseModel):
    """The response of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"] | None
    stop_sequence: str | None
    usage: dict[str, Any]


class CountedTokens(BaseModel):
    """The response of /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicErrorBody(BaseModel):
    """The fields of an error in Anthropic's shape."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """The body of every error response to Anthropic's clients."""

    type: Literal["error"]
    error: AnthropicErrorBody
