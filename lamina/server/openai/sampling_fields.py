"""From a request's fields to `SamplingParams`, and checks of prompts.

Long prompts take a while, so this runs on a thread, not on the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lamina.client.input_processor import InputProcessor
from lamina.errors import InvalidRequest
from lamina.sampling_params import JSON_OBJECT, MAX_LOGIT_BIAS, SamplingParams
from lamina.server.http.errors import ApiError, refused, shown
from lamina.server.openai.schemas import GenerationRequest
from lamina.server.preparation import go_on
from lamina.text.messages import check_text

CHARACTERS = 64
"""The most characters per token of the context: a text with more cannot fit, and is refused before it is tokenised."""

MAX_CHARACTERS = 1 << 20
"""Of all prompts of a request together, or what the context can have at most, if that is more."""
MAX_ECHO = 16 << 20
"""Characters that `echo` may repeat in one answer: each choice begins with its prompt."""
_UNUSUAL = 6  # characters a token: a text with more for each of the context is long, unless it is an unusual one
_PIECE = 1 << 14  # characters that are tokenised at a time: 0.15 s at worst

_PLAIN = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "n", "min_tokens", "policy", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens",
)  # fmt: skip
_STRUCTURES = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
_LIFT = 100.0  # added to logits; more than their own differences


def sampling(
    fields: GenerationRequest,
    inputs: InputProcessor,
    max_tokens: int,
    logprobs: int | None,
    structure: Mapping[str, Any],
) -> SamplingParams:
    """The sampling parameters. `structure` has the keywords of `SamplingParams` for structured output, if any."""
    keywords: dict[str, Any] = {name: value for name in _PLAIN if (value := getattr(fields, name)) is not None} | dict(
        structure
    )
    if fields.seed is not None:
        keywords["seed"] = fields.seed % 2**64  # a negative seed is read as unsigned 64 bits
    if bias := _bias(fields, inputs):
        keywords["logit_bias"] = bias
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **keywords)


@contextmanager
def blaming(way: str) -> Iterator[None]:
    """Makes errors about structured output name the request's field `way`."""
    try:
        yield
    except InvalidRequest as error:
        if not str(error).startswith(tuple(_STRUCTURES.values())):
            raise
        raise ApiError(400, str(error), way) from None


def check_prompt_logprobs(fields: GenerationRequest) -> None:
    """Raises ApiError where log probabilities of prompts are wanted."""
    if fields.prompt_logprobs is not None:
        raise refused("prompt_logprobs", fields.prompt_logprobs, "null: no log probabilities of prompts are computed")


def check_stream_options(fields: GenerationRequest) -> None:
    """Raises ApiError where there are stream options without a stream."""
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options is given, which is allowed only where stream is true", "stream_options")


def check_characters(prompts: Mapping[str, Any], inputs: InputProcessor) -> None:
    """Raises ApiError where one of the texts among `prompts`, by the names of their fields, cannot fit into the
    context, or all together are too much to tokenise for one request."""
    lengths = {name: len(prompt) for name, prompt in prompts.items() if isinstance(prompt, str)}
    for name, length in lengths.items():
        check_length(name, length, inputs)
    total, most = sum(lengths.values()), max(MAX_CHARACTERS, CHARACTERS * inputs.max_model_len)
    if total > most:
        raise ApiError(400, f"prompt has {total} characters in all its texts; allowed are {most}", "prompt")


def check_length(param: str, length: int, inputs: InputProcessor) -> None:
    """Raises ApiError where a text of `length` characters cannot fit into the context, however it is tokenised."""
    if length > CHARACTERS * inputs.max_model_len:
        raise _too_long(inputs, param, f"{length} characters, more than {CHARACTERS} for each of them")


def check_echo(prefixes: Sequence[str], n: int) -> None:
    """Raises ApiError where `n` choices for each of these prefixes repeat too much text."""
    if (size := n * sum(map(len, prefixes))) > MAX_ECHO:
        raise ApiError(400, f"echo repeats {size} characters in {n} choices; allowed are {MAX_ECHO}", "echo")


def encoded(text: str, special: bool, inputs: InputProcessor, param: str, whole: bool = True) -> list[int]:
    """The token ids of a text that is needed as a `whole`, or only its end. Raises ApiError where it has far more
    tokens than the context, before all of it is tokenised. For a `PreparationPool`: it ends where the client has
    left."""
    go_on()
    limit = inputs.max_model_len
    if whole and len(text) > _UNUSUAL * limit:  # few characters a token would make it too long
        check_text("the prompt", text)
        tokens = 0
        for start in range(0, len(text), _PIECE):
            tokens += len(inputs.tokenizer.encode(text[start : start + _PIECE], add_special_tokens=False))
            if tokens > 2 * limit:  # at the edges of pieces there are a few more than in the whole
                raise _too_long(inputs, param, f"more than {2 * limit} tokens")
            go_on()
    return inputs.tokenizer.encode(text, special)


def _too_long(inputs: InputProcessor, param: str, has: str) -> ApiError:
    limit = inputs.max_model_len
    message = f"This model's maximum context length is {limit} tokens. However, {param} has {has}. Ask for less"
    return ApiError(400, message, param, "context_length_exceeded")


def truncated(fields: GenerationRequest, ids: list[int], inputs: InputProcessor, max_tokens: int | None) -> list[int]:
    """The last tokens of a prompt, where `truncate_prompt_tokens` is given; else all."""
    keep = fields.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == 0:
        raise refused("truncate_prompt_tokens", keep, "-1, or 1 and more")
    if keep == -1:
        keep = max(1, inputs.max_model_len - (max_tokens or 1))
    return ids[-keep:]


def structured(outputs: Any) -> dict[str, Any]:
    """vLLM's `structured_outputs` as keywords of `SamplingParams`."""
    if outputs is None:
        return {}
    allowed = f"an object with exactly one of {', '.join(_STRUCTURES)} and json_object"
    if not isinstance(outputs, dict):
        raise refused("structured_outputs", outputs, allowed)
    given = {name: value for name, value in outputs.items() if value is not None}
    for name in given:
        if name not in _STRUCTURES and name != "json_object":
            raise ApiError(
                400, f"unknown field structured_outputs.{name[:80]}; allowed is {allowed}", "structured_outputs"
            )
    if len(given) != 1:
        raise ApiError(
            400, f"structured_outputs has {len(given)} of its fields; allowed is {allowed}", "structured_outputs"
        )
    ((name, value),) = given.items()
    if name == "json_object":
        if value is not True:
            raise refused("structured_outputs.json_object", value, "true")
        return {"json_schema": JSON_OBJECT}
    return {_STRUCTURES[name]: value}


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


def _bias(fields: GenerationRequest, inputs: InputProcessor) -> dict[int, float]:
    bias = _logit_bias(fields.logit_bias)
    if fields.allowed_token_ids is not None:
        if bias:
            raise ApiError(400, "allowed_token_ids is given beside logit_bias; allowed is one of them", "logit_bias")
        bias = _allowed(fields.allowed_token_ids, inputs.vocab_size)
    for token in _bad_tokens(fields.bad_words or (), inputs):
        bias[token] = -_LIFT
    return bias


def _logit_bias(given: Any) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise refused("logit_bias", given, "an object of token ids and numbers from -100 to 100")
    if len(given) > MAX_LOGIT_BIAS:
        raise refused("logit_bias", given, f"at most {MAX_LOGIT_BIAS} tokens")
    bias: dict[int, float] = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) <= 10):
            raise ApiError(400, f"logit_bias has the token id {shown(name)}; allowed are integers from 0", "logit_bias")
        bias[int(name)] = value
    return bias


def _allowed(tokens: Sequence[int], vocab_size: int) -> dict[int, float]:
    if not tokens:
        raise refused("allowed_token_ids", list(tokens), "at least one token id")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise refused("allowed_token_ids", token, f"token ids from 0 to {vocab_size - 1}")
    return dict.fromkeys(tokens, _LIFT)


def _bad_tokens(words: Sequence[str], inputs: InputProcessor) -> set[int]:
    tokens: set[int] = set()
    for index, word in enumerate(words):
        if not 0 < len(word) <= 256:
            raise refused(f"bad_words[{index}]", word, "a word of 1 to 256 characters")
        spellings = [inputs.tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
        single = {ids[0] for ids in spellings if len(ids) == 1}
        if not single:
            raise refused(f"bad_words[{index}]", word, "a word that is one token: longer ones cannot be held back")
        tokens |= single
    return tokens
