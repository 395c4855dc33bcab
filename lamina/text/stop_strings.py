"""Finds stop strings in text that arrives in pieces.

The text ends at the stop string that is complete first; of several complete at the same character, the longest
counts. So the result does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache


class StopMatcher:
    """Watches one sample's text. `stops`: none of them empty; `include` shows the stop string itself too.

    Holds back no more than the longest end of the text that may still become a stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._include = include
        self._pending = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; what may be shown now, and whether a stop string ended it. Once it has, push no more."""
        old_length = len(self._pending)
        text = self._pending + text
        for end in range(old_length + 1, len(text) + 1):
            complete = [len(p.text) for p in self._patterns if p.advance(text[end - 1])]
            if complete:
                self._pending = ""
                return text[: end if self._include else end - max(complete)], True
        split = len(text) - max((p.matched for p in self._patterns), default=0)
        self._pending = text[split:]
        return text[:split], False

    def finish(self) -> str:
        """The text ends here: what was held back."""
        pending, self._pending = self._pending, ""
        return pending


class _Pattern:
    """One stop string, and how many of its first characters the text ends with (Knuth, Morris and Pratt)."""

    __slots__ = ("_shorter", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = _shorter(text)

    def advance(self, character: str) -> bool:
        """Add one character of the text; whether that completes the stop string."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched]
        self.matched += self.text[self.matched] == character
        return self.matched == len(self.text)


@lru_cache(maxsize=256)  # the samples of a request, of which there may be hundreds, share it
def _shorter(text: str) -> array[int]:
    """Where character i does not match, the text still ends with the first `shorter[i]` characters."""
    shorter = array("I", bytes(4 * len(text)))
    length = 0
    for i in range(2, len(text)):
        while length and text[length] != text[i - 1]:
            length = shorter[length]
        length += text[length] == text[i - 1]
        shorter[i] = length
    return shorter
