"""The fields of requests, as OpenAI and vLLM name them, for validation and for the OpenAPI document.

Fields marked "Ignored" are accepted and change nothing. Unknown fields are refused by name. What `SamplingParams` or
`Tokenizer` check is only described here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lamina.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_POLICY,
    MAX_SAMPLES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
)
from lamina.server.chat.sampling import SAMPLING
from lamina.server.http.fields import Ignored, Null, Strict, described
from lamina.text.messages import ROLES

MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 1000
MAX_TOKENS = 1 << 20  # of a request to detokenize

_TEXT = {"type": "string"}
_TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TOKENS = {"type": "array", "items": _TOKEN, "minItems": 1}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_PART = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"const": kind}, kind: _TEXT, "cache_control": {}},
            "required": ["type", kind],
        }
        for kind in ("text", "refusal")  # a refusal only from the assistant
    ]
}
_CALL = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": _TEXT, "arguments": _TEXT, "parsed_arguments": {}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        },
    },
    "required": ["function"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}, {"type": "null"}]},
        "name": {"type": ["string", "null"]},
        "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
        "tool_call_id": {"type": ["string", "null"]},
        "refusal": {"type": ["string", "null"]},
    },
    "required": ["role"],
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": _TEXT,
                "description": _TEXT,
                "parameters": {"type": "object"},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}

Messages = Annotated[Any, described({"type": "array", "items": _MESSAGE, "minItems": 1})]
Tools = Annotated[Any, described({"type": "array", "items": _TOOL}, {"type": "null"})]
Prompts = Annotated[
    Any,
    described(
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ),
]
Stop = Annotated[Any, described(_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOP_STRINGS})]
LogitBias = Annotated[
    Any,
    described(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "maxProperties": MAX_LOGIT_BIAS,
        },
        {"type": "null"},
    ),
]
AnyObject = Annotated[Any, described({"type": "object"}, {"type": "null"})]


class StreamOptions(Strict):
    """What a stream sends beside text."""

    include_usage: bool | None = Field(None, description="A last chunk with `usage` and no choices.")
    continuous_usage_stats: bool | None = Field(None, description="With include_usage: `usage` so far in each chunk.")
    include_obfuscation: bool | None = Field(None, description="Ignored: chunks are not padded.")


class SamplingRequest(Strict):
    """What all requests for text in OpenAI's form have in common."""

    model: str | None = Field(None, description="The name of the served model; none means that one.")
    stream: bool | None = Field(None, description="Send server-sent events as text comes.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 always takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1, description="Keep the likeliest tokens that together reach this.")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="Keep the k likeliest tokens; 0 or -1 keeps all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Drop tokens less likely than this share of the top.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="1 is neutral.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = Field(None, description="Token id to what is added to its logit, -100 to 100.")
    seed: int | None = Field(
        None, ge=-(2**63), le=2**64 - 1, description="The same seed gives the same text, up to rounding."
    )
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="Do not stop before this many tokens.")
    stop: Stop = Field(None, description="Strings that end the text where they appear.")
    stop_token_ids: list[int] | None = Field(
        None, max_length=MAX_STOP_TOKENS, fail_fast=True, description="Token ids that end it, beside the model's own."
    )
    include_stop_str_in_output: bool | None = Field(None, description="End after the stop string, not before it.")
    ignore_eos: bool | None = Field(None, description="Go on past the model's end-of-text tokens.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text (default).")
    allowed_token_ids: list[int] | None = Field(
        None,
        max_length=MAX_LOGIT_BIAS,
        fail_fast=True,
        description="Only these tokens: each is lifted by a logit bias of 100. Not beside `logit_bias`.",
    )
    bad_words: list[str] | None = Field(
        None,
        max_length=MAX_BAD_WORDS,
        fail_fast=True,
        description="Words of a single token that do not appear, by a logit bias of -100. Others are refused.",
    )
    policy: str | None = Field(
        None, min_length=1, max_length=MAX_POLICY, description="Read and keep KV so: full, auto, or another policy."
    )
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1, description="A lower one is served first.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=512, description="Share prefixes only with requests of the same salt."
    )

    user: Ignored = Field(None, description="Ignored: tenants differ by their API keys.")
    service_tier: Ignored = Field(None, description="Ignored: there is one; see `priority`.")
    safety_identifier: Ignored = Field(None, description="Ignored.")
    prompt_cache_key: Ignored = Field(None, description="Ignored: prefixes are found by their text.")

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of sampling that are given, as `chat.sampling` takes them."""
        return {name: value for name in SAMPLING if (value := getattr(self, name, None)) is not None}


class GenerationRequest(SamplingRequest):
    """What chats and completions have in common."""

    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="Choices for each prompt.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="The most tokens to generate. Default: what the context has room for.",
    )
    structured_outputs: AnyObject = Field(
        None, description="vLLM's: exactly one of `json`, `json_object`, `regex`, `choice`, `grammar`."
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="Keep only so many tokens of the prompt's end; -1 what fits."
    )
    add_special_tokens: bool | None = Field(
        None, description="Add the tokenizer's special tokens. Default: to prompts, but not to chats."
    )
    return_tokens_as_token_ids: bool | None = Field(None, description="Log probabilities name tokens as token_id:ID.")
    echo: bool | None = Field(None, description="Begin with the prompt; in a chat, with the message that is continued.")
    request_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._:\-]{1,128}$", description="The end of the answer's id. Default: X-Request-Id."
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Give each prompt token's log probability, and so many of the likeliest. Not with `stream`.",
    )

    metadata: Ignored = Field(None, description="Ignored: nothing is stored.")
    store: Ignored = Field(None, description="Ignored: nothing is stored.")
    session_id: Ignored = Field(None, description="Ignored: prefixes are found by their text.")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk has the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Messages = Field(description="The conversation: text, calls of tools and their results.")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="`max_tokens` by its newer name.")
    logprobs: bool | None = Field(None, description="Give each token's log probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="With `logprobs`: so many of the likeliest tokens too."
    )
    response_format: AnyObject = Field(None, description='{"type": "text" | "json_object" | "json_schema", ...}')
    tools: Tools = Field(None, description="Functions that the model may call.")
    tool_choice: Annotated[
        Any,
        described(
            {"enum": ["none", "auto", "required"]},
            {"type": "object", "required": ["type", "function"]},
            {"type": "object", "required": ["type", "allowed_tools"]},
        ),
    ] = Field(None, description="Whether, and which.")
    parallel_tool_calls: bool | None = Field(None, description="Whether one answer may have several calls.")
    add_generation_prompt: bool | None = Field(None, description="Begin the assistant's turn (default).")
    continue_final_message: bool | None = Field(
        None, description="Leave the last message open, to be continued; needs add_generation_prompt false."
    )
    chat_template: Null = Field(None, description="Refused: only the model's own template is rendered.")
    chat_template_kwargs: AnyObject = Field(
        None, description="Variables of the model's template, such as enable_thinking: plain values."
    )
    modalities: list[Literal["text"]] | None = Field(
        None, max_length=16, fail_fast=True, description="Ignored: answers are text."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="How much the model reasons, where it does: none switches it off where that is possible."
    )
    thinking_token_budget: int | None = Field(
        None, ge=0, le=2**31 - 1, description="The most tokens of reasoning; then the answer begins."
    )
    verbosity: Ignored = Field(None, description="Ignored.")


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts = Field(description="Text, texts, token ids, or lists of token ids.")
    max_tokens: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="The most tokens to generate. Default: 16. With 0 nothing follows the prompt.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Give each token's log probability, and so many of the likeliest; with `echo` the prompt's too, "
        "then not with `stream`.",
    )
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="Refused unless it is `n`.")
    suffix: Annotated[Any, described({"const": ""}, {"type": "null"})] = Field(
        None, description="Refused: nothing is inserted before a text."
    )


class TokenizeRequest(Strict):
    """POST /tokenize: of `prompt` or of `messages`."""

    model: str | None = None
    prompt: str | None = Field(None, description="Text.")
    messages: Annotated[Any, described({"type": "array", "items": _MESSAGE, "minItems": 1}, {"type": "null"})] = None
    tools: Tools = None
    add_special_tokens: bool | None = Field(None, description="Default: to a prompt, but not to messages.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = Field(None, description="Give the tokens as the vocabulary spells them.")


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_TOKENS, fail_fast=True)
