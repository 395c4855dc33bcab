"""Fill in the middle: the text before and behind a gap as one prompt, by the tokens of the model's family."""

from __future__ import annotations

from collections.abc import Iterable

from lamina.errors import InvalidRequest
from lamina.text.tokenizer import Tokenizer

_MARKS = (  # before what is ahead of the gap, before what is behind it, before what fills it
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
)
_REPOSITORY, _FILE = "<|repo_name|>", "<|file_sep|>"  # Qwen's, for other files


def infill_prompt(tokenizer: Tokenizer, ahead: str, behind: str, files: Iterable[tuple[str, str]] = ()) -> str:
    """The prompt after which the model writes what stands between two texts. `files`: names and texts of others that
    help. Raises InvalidRequest for a model without such tokens."""
    vocabulary = tokenizer.added_tokens
    marks = next((marks for marks in _MARKS if vocabulary.keys() >= {*marks}), None)
    if marks is None:
        raise InvalidRequest("this model has no tokens for filling in; allowed is no suffix, or another model")
    others = ""
    for name, text in files:
        others += f"{_FILE}{name}\n{text}\n" if _FILE in vocabulary else f"{text}\n\n"
    if others and _FILE in vocabulary:
        others = f"{_REPOSITORY}repository\n{others}{_FILE}here\n"
    return f"{others}{marks[0]}{ahead}{marks[1]}{behind}{marks[2]}"
