"""The fields of POST /v1/responses, for validation and for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lamina.sampling_params import MAX_LOGPROBS
from lamina.server.http.fields import Ignored, Null, Strict, described
from lamina.server.openai.schemas import AnyObject, SamplingRequest

_TEXT = {"type": "string"}
_ITEM = {
    "type": "object",
    "properties": {
        "type": {"enum": ["message", "function_call", "function_call_output", "reasoning", "item_reference"]},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object", "required": ["type", "text"]}}]},
        "call_id": _TEXT,
        "name": _TEXT,
        "arguments": _TEXT,
        "output": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
    },
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "name": _TEXT,
        "description": _TEXT,
        "parameters": {"type": "object"},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["type", "name"],
}
_INCLUDE = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


_False = Annotated[Any, described({"enum": [False, None]})]


class ResponseStreamOptions(Strict):
    """What a stream sends beside events."""

    include_obfuscation: bool | None = Field(None, description="Ignored: events are not padded.")


class InputTokensRequest(Strict):
    """POST /v1/responses/input_tokens, and what it has in common with POST /v1/responses."""

    model: str | None = Field(None, description="The name of the served model; none means that one.")
    input: Annotated[Any, described(_TEXT, {"type": "array", "items": _ITEM})] = Field(
        None, description="Text of the user, or items: messages, calls of functions and their results, reasoning."
    )
    instructions: str | None = Field(None, description="A system message before the input; not kept for later turns.")
    previous_response_id: str | None = Field(
        None, min_length=1, max_length=128, description="Go on after this response, which was stored."
    )
    tools: Annotated[Any, described({"type": "array", "items": _TOOL}, {"type": "null"})] = Field(
        None, description="Functions that the model may call. Tools that a server runs are refused."
    )
    tool_choice: Annotated[
        Any, described({"enum": ["none", "auto", "required"]}, {"type": "object", "required": ["type"]})
    ] = Field(None, description="Whether, and which.")
    parallel_tool_calls: bool | None = Field(None, description="Whether one answer may have several calls.")
    text: AnyObject = Field(
        None, description='{"format": {"type": "text" | "json_object" | "json_schema", ...}}; verbosity is ignored.'
    )
    reasoning: AnyObject = Field(
        None, description='{"effort": ..., "summary": ...}: with summary, the reasoning comes as its own summary.'
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: leave out the oldest messages where the context is too short."
    )
    conversation: Null = Field(None, description="Refused: see previous_response_id.")


class ResponsesRequest(InputTokensRequest, SamplingRequest):
    """POST /v1/responses."""

    max_output_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="The most tokens to generate; never more than the context has room for."
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="So many of the likeliest tokens at each token of the text."
    )
    include: list[_INCLUDE] | None = Field(
        None,
        max_length=64,
        fail_fast=True,
        description="message.output_text.logprobs gives log probabilities; the others add nothing.",
    )
    stream_options: ResponseStreamOptions | None = Field(None, description="Only with `stream`.")
    store: bool | None = Field(None, description="Keep the response in memory for a while, for later turns (default).")
    metadata: AnyObject = Field(None, description="At most 16 texts by name, which the response shows.")
    chat_template_kwargs: AnyObject = Field(
        None, description="Variables of the model's template, such as enable_thinking: plain values."
    )
    thinking_token_budget: int | None = Field(
        None, ge=0, le=2**31 - 1, description="The most tokens of reasoning; then the answer begins."
    )

    background: _False = Field(None, description="Refused: a response comes on its connection.")
    prompt: Null = Field(None, description="Refused: there are no stored prompts; give instructions and input.")
    max_tool_calls: Ignored = Field(None, description="Ignored: it limits tools that a server runs.")
    context_management: Ignored = Field(None, description="Ignored; see truncation.")
    client_metadata: Ignored = Field(None, description="Ignored.")
    prompt_cache_retention: Ignored = Field(None, description="Ignored: prefixes stay as long as there is memory.")
    prompt_cache_options: Ignored = Field(None, description="Ignored: prefixes are found by their text.")
    moderation: Ignored = Field(None, description="Ignored: nothing is moderated.")
