"""Takes a reply apart as its text comes: reasoning, content and tool calls. `formats` has a parser for each family.

A client can make a model write anything. So a reply costs time in proportion to its length: a whole one is read as a
stream is, in pieces; what is held back is bounded; and patterns have no neighbours that match the same characters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

LONGEST_SPACE = 256
"""Characters of white space that are held back, because what comes next may make them disappear."""
_PIECE = 512  # characters that are read at a time: a state searches all that it gets, and may use little of it


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply. Exactly one of `reasoning`, `content` and `index` is set.

    `index` is that of a tool call: its first delta has `id` and `name`, and perhaps the start of `arguments`; later
    ones have only `arguments`. The pieces joined are the JSON text of an object.
    """

    reasoning: str | None = None
    content: str | None = None
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Tags:
    """The texts around the reasoning in a reply."""

    open: str
    close: str


class ReplyParser:
    """One sample's reply. This class finds reasoning; a family's subclass finds calls, which begin at `openers`.

    `tags` are those of the model's reasoning, None where it has none; `thinking` says that the prompt has opened it
    already. `functions` are the functions that may be called, by name, with the JSON Schemas of their parameters:
    without them there are no calls. `new_id` gives the id of each call. `hidden` are texts of special tokens (end of
    text) that are left out. `count` counts the tokens of a text.

    Text that only looks like reasoning or a call comes out as content: nothing is lost but whitespace around them.
    """

    openers: ClassVar[tuple[str, ...]] = ()
    bare: ClassVar[bool] = False
    """Whether a call may also begin without an opener, as an object where nothing was said yet."""

    def __init__(
        self,
        tags: Tags | None = None,
        thinking: bool = False,
        functions: Mapping[str, Any] | None = None,
        new_id: Callable[[], str] = str,
        hidden: Sequence[str] = (),
        count: Callable[[str], int] = len,
    ) -> None:
        self.calls = 0
        """How many calls have begun."""
        self.reasoning_tokens = 0
        """How many tokens were pushed that belong to the reasoning."""
        self._tags = tags
        self._functions = functions or {}
        self._new_id = new_id
        self._count = count
        self._hidden = tuple(hidden)
        self._marks = (*(self.openers if functions else ()), *hidden)
        self._state = "content" if tags is None else "reasoning" if thinking else "start"
        self._waiting = ""  # text held back
        self._fresh = True  # nothing but whitespace since the start, the reasoning or a call
        self._skipped = ""  # whitespace before the opener of a call that may turn out to be none

    def push(self, text: str, tokens: int = 1) -> list[Delta]:
        """The deltas of further text, which has so many tokens. Text that may be the start of a tag is held back."""
        thinking = self._state == "reasoning"
        if not text:
            self.reasoning_tokens += tokens if thinking else 0
            return []
        plain = self._state == "content" and not (self._waiting or self._fresh or text[-1].isspace())
        if plain and not any(mark[0] in text for mark in self._marks):
            return [Delta(content=text)]  # the common case
        deltas: list[Delta] = []
        for start in range(0, len(text), _PIECE):
            deltas += self._take(self._waiting + text[start : start + _PIECE], ended=False)
        if tokens == 1:
            self.reasoning_tokens += thinking
        elif thought := "".join(delta.reasoning or "" for delta in deltas):
            self.reasoning_tokens += min(tokens, self._count(thought))
        return deltas

    def finish(self) -> list[Delta]:
        """The deltas of the text held back, once the sample has ended."""
        return self._take(self._waiting, ended=True)

    def _take(self, text: str, ended: bool) -> list[Delta]:
        deltas: list[Delta] = []
        remainder: str | None = text
        while remainder is not None:
            self._waiting = ""
            remainder = getattr(self, f"_{self._state}")(remainder, ended, deltas)
        return deltas

    # Each of these takes text in one state, and returns the rest for the next state, None where there is no rest.

    def _start(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        opening = "" if self._tags is None else self._tags.open
        text = text.lstrip()
        if text.startswith(opening):
            self._state = "reasoning"
            return text[len(opening) :]
        if not ended and opening.startswith(text):
            self._waiting = text
            return None
        self._state = "content"
        return text

    def _reasoning(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        closing = "" if self._tags is None else self._tags.close
        if self._fresh:
            text = text.lstrip()
        marks = (closing, *self._hidden)
        end, mark = first_of(text, marks)
        if not mark and not ended:
            end -= begun(text, marks)
        is_hidden = mark in self._hidden
        sure = text[:end] if is_hidden else unspaced(text[:end])
        if sure:
            deltas.append(Delta(reasoning=sure))
            self._fresh = False
        if not mark:
            self._waiting = "" if ended else text[len(sure) :]
            return None
        if not is_hidden:
            self._state, self._fresh = "content", True
        return text[end + len(mark) :]

    def _content(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        begins = text.lstrip()
        if self._fresh and (self.calls or self._tags is not None):
            text = begins
        may_be_bare = self._fresh and self.bare and bool(self._functions) and len(text) - len(begins) <= LONGEST_SPACE
        if may_be_bare and begins[:1] in ("{", ";"):
            return self._call("", text)
        end, mark = first_of(text, self._marks)
        if not mark and not ended:
            end -= begun(text, self._marks)
        call_may_follow = mark not in self._hidden if mark else not ended or self.calls > 0
        sure = unspaced(text[:end]) if call_may_follow else text[:end]
        self._say(sure, deltas)
        if not mark:
            self._waiting = "" if ended else text[len(sure) :]
            return None
        remainder = text[end + len(mark) :]
        if mark in self._hidden:
            return remainder
        self._skipped = text[len(sure) : end]
        return self._call(mark, remainder)

    def _call(self, mark: str, remainder: str) -> str | None:
        """Go to the state that reads a call after its opening `mark`; "" is a call without one."""
        raise NotImplementedError(f"{type(self).__name__} has openers, but does not read what follows")

    def _no_call(self, mark: str, text: str, deltas: list[Delta]) -> str:
        """What seemed to be a call after `mark` is content."""
        self._say(f"{self._skipped}{mark}" or text[:1], deltas)
        self._skipped, self._state = "", "content"
        return text if mark else text[1:]

    def _begin_call(self, name: str, deltas: list[Delta]) -> None:
        deltas.append(Delta(index=self.calls, id=self._new_id(), name=name))
        self.calls += 1
        self._skipped = ""

    def _end_call(self) -> None:
        self._state, self._fresh = "content", True

    def _say(self, content: str, deltas: list[Delta]) -> None:
        if content:
            deltas.append(Delta(content=content))
            self._fresh = False


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Where the first of `marks` stands in the text, and that mark; the end of the text and "" where none does."""
    places = {place: mark for mark in reversed(marks) if (place := text.find(mark)) >= 0}
    first = min(places, default=len(text))
    return first, places.get(first, "")


def unspaced(text: str) -> str:
    """The text without the white space at its end that is held back."""
    return text[: max(len(text.rstrip()), len(text) - LONGEST_SPACE)]


def begun(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the start of one of `marks`."""
    longest = max(map(len, marks), default=1) - 1
    begins = {mark[0] for mark in marks}
    for start in range(max(0, len(text) - longest), len(text)):
        if text[start] in begins and any(mark.startswith(text[start:]) for mark in marks):
            return len(text) - start
    return 0
