"""Prompts of requests: their lengths are checked before they cost anything, and they become token ids.

Long prompts take a while, so this runs on a thread, not on the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.client.input_processor import InputProcessor
from lamina.server.http.errors import ApiError, refused
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
    check_text(param, text)
    limit = inputs.max_model_len
    if whole and len(text) > _UNUSUAL * limit:  # few characters a token would make it too long
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


def truncated(keep: int | None, ids: list[int], inputs: InputProcessor, max_tokens: int | None) -> list[int]:
    """The last `keep` tokens of a prompt (`truncate_prompt_tokens`); -1 is what fits, None is all."""
    if keep is None:
        return ids
    if keep == 0:
        raise refused("truncate_prompt_tokens", keep, "-1, or 1 and more")
    if keep == -1:
        keep = max(1, inputs.max_model_len - (max_tokens or 1))
    return ids[-keep:]
