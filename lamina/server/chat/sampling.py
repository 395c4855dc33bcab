"""From sampling fields, as OpenAI and vLLM name them, to `SamplingParams`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lamina.client.input_processor import InputProcessor
from lamina.errors import InvalidRequest
from lamina.sampling_params import MAX_LOGIT_BIAS, SamplingParams
from lamina.server.http.errors import ApiError, refused, shown

_PLAIN = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n",
    "min_tokens", "prompt_logprobs", "policy", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens",
)  # fmt: skip
SAMPLING = (*_PLAIN, "seed", "logit_bias", "allowed_token_ids", "bad_words")
"""The fields that `sampling` reads."""
STRUCTURES = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""The kinds of structured output, as requests name them, and their keywords of `SamplingParams`."""
_LIFT = 100.0  # added to logits; more than their own differences


def sampling(
    fields: Mapping[str, Any],
    inputs: InputProcessor,
    max_tokens: int,
    logprobs: int | None,
    structure: Mapping[str, Any],
) -> SamplingParams:
    """The sampling parameters from those of the fields in SAMPLING that are given. `structure` has keywords of
    `SamplingParams` for structured output, if any."""
    keywords = {name: fields[name] for name in _PLAIN if fields.get(name) is not None} | dict(structure)
    if (seed := fields.get("seed")) is not None:
        keywords["seed"] = seed % 2**64  # a negative seed is read as unsigned 64 bits
    if bias := _bias(fields, inputs):
        keywords["logit_bias"] = bias
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **keywords)


@contextmanager
def blaming(way: str) -> Iterator[None]:
    """Makes errors about structured output name the request's field `way`."""
    try:
        yield
    except InvalidRequest as error:
        if not str(error).startswith(tuple(STRUCTURES.values())):
            raise
        raise ApiError(400, str(error), way) from None


def _bias(fields: Mapping[str, Any], inputs: InputProcessor) -> dict[int, float]:
    bias = _logit_bias(fields.get("logit_bias"))
    if (allowed := fields.get("allowed_token_ids")) is not None:
        if bias:
            raise ApiError(400, "allowed_token_ids is given beside logit_bias; allowed is one of them", "logit_bias")
        bias = _allowed(allowed, inputs.vocab_size)
    for token in _bad_tokens(fields.get("bad_words") or (), inputs):
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
