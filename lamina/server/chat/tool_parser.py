"""Finds tool calls in a model's text as it comes: pieces of content and of calls. `tools` shows the Hermes form of
calls, which is parsed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
_LONGEST_HEAD = 256  # characters of a call before its arguments, with the whitespace of a model without a grammar


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a sample: content, or of one tool call. Exactly one of `content` and `index` is set.

    A call's first delta has `id` and `name`, and perhaps the start of `arguments`; later ones have only `arguments`.
    The pieces joined are the JSON text that the model wrote.
    """

    content: str | None = None
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolParser:
    """Finds the calls in one sample's text, as it comes. `new_id` gives each call's id ("call_..."); `hidden` are
    texts of special tokens (end of text) that are left out.

    Without a grammar, text may only look like a call: it then comes out as content, and nothing is lost. Whitespace
    around calls is dropped.
    """

    def __init__(self, new_id: Callable[[], str], hidden: Sequence[str] = ()) -> None:
        self.calls = 0
        """How many calls have begun."""
        self._new_id = new_id
        self._marks = (OPEN, *hidden)
        self._mark = re.compile("|".join(re.escape(mark) for mark in self._marks))
        self._begins = {mark[0] for mark in self._marks}
        self._state: Literal["content", "head", "arguments", "tail"] = "content"
        self._after_call = False  # with nothing but whitespace since
        self._waiting = ""  # text held back
        self._depth = 0  # braces and brackets of the arguments that are open
        self._quoted = False  # within a string of the arguments
        self._escaped = False  # after a backslash in one

    def push(self, text: str) -> list[Delta]:
        """The deltas of further text. Text that may be the start of a tag is held back."""
        if not text:
            return []
        held = self._state != "content" or self._waiting or self._after_call or text[-1].isspace()
        if not held and self._begins.isdisjoint(text):
            return [Delta(content=text)]  # the common case
        return self._take(self._waiting + text, ended=False)

    def finish(self) -> list[Delta]:
        """The deltas of the text held back, once the sample has ended."""
        return self._take(self._waiting, ended=True)

    def _take(self, text: str, ended: bool) -> list[Delta]:
        deltas: list[Delta] = []
        left: str | None = text
        while left is not None:
            self._waiting = ""
            left = getattr(self, f"_{self._state}")(left, ended, deltas)
        return deltas

    # Each method takes text in one state, and returns the rest for the next state, None where there is no rest.

    def _content(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        if self._after_call:
            text = text.lstrip()
            if not text:
                return None
        mark = self._mark.search(text)
        if mark is not None:
            is_call = mark[0] == OPEN
            self._say(text[: mark.start()].rstrip() if is_call else text[: mark.start()], deltas)
            self._state = "head" if is_call else "content"
            return text[mark.end() :]
        begun = 0 if ended else self._begun(text)
        sure = text[: len(text) - begun]
        if not ended or self.calls:
            sure = sure.rstrip()  # a call may follow
        self._say(sure, deltas)
        self._waiting = "" if ended else text[len(sure) :]
        return None

    def _head(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        head = _HEAD.match(text)
        if head is not None:
            deltas.append(Delta(index=self.calls, id=self._new_id(), name=head[1]))
            self.calls += 1
            self._state = "arguments"
            return text[head.end() :]
        if not ended and len(text) <= _LONGEST_HEAD and CLOSE not in text:
            self._waiting = text
            return None
        self._say(OPEN, deltas)  # it is no call
        self._state = "content"
        return text

    def _arguments(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        end = self._end_of_arguments(text)
        if text[:end]:
            deltas.append(Delta(index=self.calls - 1, arguments=text[:end]))
        if self._depth:
            return None
        self._state = "tail"
        return text[end:]

    def _tail(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        before, closed, after = text.partition(CLOSE)
        if not closed and not ended and len(text) <= _LONGEST_HEAD:
            self._waiting = text
            return None
        stray = self._mark.sub("", before).strip().removeprefix("}").strip()
        if stray and not CLOSE.startswith(stray):
            self._say(stray, deltas)
        self._state, self._after_call = "content", True
        return after

    def _say(self, content: str, deltas: list[Delta]) -> None:
        if content:
            deltas.append(Delta(content=content))
            self._after_call = False

    def _begun(self, text: str) -> int:
        """How many characters at the end may be the start of a mark."""
        longest = max(map(len, self._marks)) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if text[start] in self._begins and any(mark.startswith(text[start:]) for mark in self._marks):
                return len(text) - start
        return 0

    def _end_of_arguments(self, text: str) -> int:
        """How many characters belong to the arguments' JSON; `_depth` is 0 where they end within `text`."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._quoted = character != '"'
                self._escaped = character == "\\"
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._depth = 0
                    return at + 1
        return len(text)
