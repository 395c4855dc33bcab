"""A tokenizer in ten lines: a token is an ASCII character, token 0 ends a text. Tests expect what `chr` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

END = 0


class LetterTokenizer:
    """What input and output processors use of `lamina.text.tokenizer.Tokenizer`."""

    eos_ids = (END,)
    special_ids = frozenset({END})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join("<end>" if token == END else chr(token) for token in ids if token or not skip_special_tokens)

    def knows(self, token_id: int) -> bool:
        return 0 <= token_id < 128

    def template_uses(self, variable: str) -> bool:
        return False

    def chat(self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]) -> list[int]:
        return self.encode("".join(f"{message['role']}: {message['content']}\n" for message in messages))
