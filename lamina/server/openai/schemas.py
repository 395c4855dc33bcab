"""The fields of requests for chats, completions and embeddings, as OpenAI, vLLM and Jina name them.

They serve for validation and for the OpenAPI document. Fields marked "Ignored" are accepted and change nothing. Unknown
fields are refused by name. What `SamplingParams` or `Tokenizer` check is only described here.

Functions cover what a field's type does not: `check_stream` refuses combinations of fields, `structured` and
`response_format` read the kinds of structured output.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lamina.client.input_processor import Pooling
from lamina.sampling_params import (
    JSON_OBJECT,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_POLICY,
    MAX_SAMPLES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
)
from lamina.server.chat.sampling import SAMPLING, STRUCTURES
from lamina.server.http.errors import ApiError, refused
from lamina.server.http.fields import Ignored, Null, Strict, described
from lamina.server.http.limits import MAX_VALUES
from lamina.text.messages import ROLES

MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 1000
MAX_TOKENS = MAX_VALUES - 64  # of a request to detokenize, which has other values too

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
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
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
        None, ge=1, le=2**31 - 1, description="The most tokens to generate. Default: what the context has room for."
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
    suffix: str | None = Field(
        None, description="Fill in what stands between `prompt` and this text, with models that have tokens for it."
    )


class InfillFile(Strict):
    """Another file than the one that is filled in."""

    text: str
    filename: str | None = None


class InfillRequest(SamplingRequest):
    """POST /infill, in llama-server's form."""

    input_prefix: str | None = Field(None, description="The text before the gap.")
    input_suffix: str | None = Field(None, description="The text behind it.")
    input_extra: list[InfillFile] | None = Field(None, max_length=1024, fail_fast=True, description="Other files.")
    prompt: str | None = Field(None, description="How the text in the gap begins.")
    n_predict: int | None = Field(None, ge=0, le=2**31 - 1, description="The most tokens to generate. Default: 128.")

    id_slot: Ignored = Field(None, description="Ignored: prefixes are found by their text.")
    cache_prompt: Ignored = Field(None, description="Ignored: prefixes are cached.")
    samplers: Ignored = Field(None, description="Ignored.")
    n_indent: Ignored = Field(None, description="Ignored.")
    t_max_prompt_ms: Ignored = Field(None, description="Ignored: see X-Request-Timeout.")
    t_max_predict_ms: Ignored = Field(None, description="Ignored: see X-Request-Timeout.")
    response_fields: Ignored = Field(None, description="Ignored: all fields are sent.")


class TokenizeRequest(Strict):
    """POST /tokenize: of `prompt` or of `messages`."""

    model: str | None = None
    prompt: str | None = Field(None, description="Text.")
    messages: Annotated[Any, described({"type": "array", "items": _MESSAGE, "minItems": 1}, {"type": "null"})] = None
    tools: Tools = None
    add_special_tokens: bool | None = Field(None, description="Default: to a prompt, but not to messages.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: AnyObject = Field(None, description="Variables of the model's template: plain values.")
    return_token_strs: bool | None = Field(None, description="Give the tokens as the vocabulary spells them.")


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_TOKENS, fail_fast=True)


MAX_INPUTS = 2048  # OpenAI's
MAX_DIMENSIONS = 1 << 16


class PoolingRequest(Strict):
    """What requests for embeddings have in common."""

    model: str | None = Field(None, description="The name of the served model; none means that one.")
    pooling: Pooling | None = Field(
        None,
        description="Of which hidden states: of the last token (default), the mean of all, or of the end-of-text token,"
        " which is appended where it is missing.",
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="Keep only so many tokens of each input's end; -1 what fits."
    )
    add_special_tokens: bool | None = Field(None, description="Add the tokenizer's special tokens to texts (default).")
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1, description="A lower one is served first.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=512, description="Share prefixes only with requests of the same salt."
    )
    request_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._:\-]{1,128}$", description="The end of the answer's id. Default: X-Request-Id."
    )
    user: Ignored = Field(None, description="Ignored: tenants differ by their API keys.")


class EmbeddingRequest(PoolingRequest):
    """POST /v1/embeddings."""

    input: Prompts = Field(description="Text, texts, token ids, or lists of token ids. Instructions are part of it.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers (default), or base64 of float32, little-endian."
    )
    dimensions: int | None = Field(None, ge=1, le=MAX_DIMENSIONS, description="Keep only the first ones.")
    normalize: bool | None = Field(None, description="Make the length 1 (default).")


class RerankRequest(PoolingRequest):
    """POST /v1/rerank."""

    query: str = Field(min_length=1, description="What the documents are compared with.")
    documents: Annotated[
        Any,
        described(
            {
                "type": "array",
                "items": {
                    "anyOf": [
                        {"type": "string", "minLength": 1},
                        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
                    ]
                },
                "minItems": 1,
                "maxItems": MAX_INPUTS - 1,
            }
        ),
    ] = Field(description="Texts, or objects with `text`.")
    top_n: int | None = Field(None, ge=1, le=2**31 - 1, description="Give only the best. Default: all.")
    return_documents: bool | None = Field(None, description="Repeat the documents' texts in the answer (default).")


def check_stream(fields: GenerationRequest) -> None:
    """Raises ApiError where log probabilities of prompts are wanted in a stream, or there are stream options without
    one."""
    if fields.prompt_logprobs is not None and fields.stream:
        raise ApiError(400, "prompt_logprobs is given, which is allowed only where stream is false", "prompt_logprobs")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options is given, which is allowed only where stream is true", "stream_options")


def structured(outputs: Any) -> dict[str, Any]:
    """vLLM's `structured_outputs` as keywords of `SamplingParams`."""
    if outputs is None:
        return {}
    allowed = f"an object with exactly one of {', '.join(STRUCTURES)} and json_object"
    if not isinstance(outputs, dict):
        raise refused("structured_outputs", outputs, allowed)
    fields = {name: value for name, value in outputs.items() if value is not None}
    for name in fields:
        if name not in STRUCTURES and name != "json_object":
            raise ApiError(
                400, f"unknown field structured_outputs.{name[:80]}; allowed is {allowed}", "structured_outputs"
            )
    if len(fields) != 1:
        raise ApiError(
            400, f"structured_outputs has {len(fields)} of its fields; allowed is {allowed}", "structured_outputs"
        )
    ((name, value),) = fields.items()
    if name == "json_object":
        if value is not True:
            raise refused("structured_outputs.json_object", value, "true")
        return {"json_schema": JSON_OBJECT}
    return {STRUCTURES[name]: value}


def response_format(wanted: Any) -> dict[str, Any]:
    """OpenAI's `response_format` as keywords of `SamplingParams`."""
    if wanted is None:
        return {}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise refused("response_format", wanted, 'an object whose "type" is "text", "json_object" or "json_schema"')
    unknown = wanted.keys() - {"type", *(["json_schema"] if kind == "json_schema" else [])}
    if unknown:
        raise ApiError(400, f"unknown field response_format.{min(unknown)[:80]}", "response_format")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": JSON_OBJECT}
    described = wanted.get("json_schema")
    if not isinstance(described, dict) or not described.keys() <= {"name", "description", "schema", "strict"}:
        allowed = 'an object with "name" and "schema", perhaps "description" and "strict"'
        raise refused("response_format.json_schema", described, allowed)
    schema = described.get("schema", {})
    if not isinstance(schema, dict):
        raise refused("response_format.json_schema.schema", schema, "an object")
    return {"json_schema": schema}
