"""Texts and token ids as completions and embeddings take them: one, or a list."""

from __future__ import annotations

from typing import Any

from lamina.client.input_processor import InputProcessor, is_one
from lamina.server.chat.prompts import check_characters, encoded, truncated
from lamina.server.http.errors import refused


def listed(given: Any) -> list[Any]:
    """One input or several, as a list."""
    return [given] if is_one(given) or not isinstance(given, list) else given


def token_ids(
    param: str, given: Any, special: bool | None, keep: int | None, inputs: InputProcessor, max_tokens: int | None
) -> list[list[int]]:
    """The token ids of each input of the field `param`. `special`: whether special tokens are added, which None means
    too; `keep` as in `truncated`. For a `PreparationPool`. Raises InvalidRequest, ApiError."""
    several = listed(given)
    names = [param] if several is not given else [f"{param}[{index}]" for index in range(len(several))]
    check_characters(dict(zip(names, several, strict=True)), inputs)
    return [
        truncated(keep, _tokens(name, each, special is not False, keep is None, inputs), inputs, max_tokens)
        for name, each in zip(names, several, strict=True)
    ]


def _tokens(name: str, given: Any, special: bool, whole: bool, inputs: InputProcessor) -> list[int]:
    if isinstance(given, str):
        if not given:
            raise refused(name, given, "text of at least one character")
        return encoded(given, special, inputs, name, whole)
    if not isinstance(given, list) or not given or not all(type(token) is int for token in given):
        raise refused(name, given, "text or token ids, at least one, or a list of these")
    return given
