"""Takes a reply apart as its text comes: reasoning, content and tool calls. `formats` has a parser for each family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


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
        deltas = self._take(self._waiting + text, ended=False)
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
        left: str | None = text
        while left is not None:
            self._waiting = ""
            left = getattr(self, f"_{self._state}")(left, ended, deltas)
        return deltas

    # Each of these takes text in one state, and returns the rest for the next state, None where there is no rest.

    def _start(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        opening = "" if self._tags is None else self._tags.open
        begins = text.lstrip()
        if begins.startswith(opening):
            self._state = "reasoning"
            return begins[len(opening) :]
        if not ended and opening.startswith(begins):
            self._waiting = text
            return None
        self._state = "content"
        return text

    def _reasoning(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        closing = "" if self._tags is None else self._tags.close
        if self._fresh:
            text = text.lstrip()
        thought, closed, rest = text.partition(closing)
        held = 0 if closed or ended else begun(text, (closing, *self._hidden))
        sure = thought[: len(thought) - held].rstrip()
        self._waiting = "" if ended else text[len(sure) :]
        for mark in self._hidden:
            sure = sure.replace(mark, "")
        if sure:
            deltas.append(Delta(reasoning=sure))
            self._fresh = False
        if not closed:
            return None
        self._state, self._fresh = "content", True
        return rest

    def _content(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        if self._fresh and (self.calls or self._tags is not None):
            text = text.lstrip()
        if self._fresh and self.bare and self._functions and text.lstrip()[:1] in ("{", ";"):
            return self._call("", text)
        at = {found: mark for mark in reversed(self._marks) if (found := text.find(mark)) >= 0}
        if at:
            first = min(at)
            before, mark = text[:first], at[first]
            rest = text[first + len(mark) :]
            if mark in self._hidden:
                self._say(before, deltas)
                return rest
            said = before.rstrip()
            self._skipped = before[len(said) :]
            self._say(said, deltas)
            return self._call(mark, rest)
        held = 0 if ended else begun(text, self._marks)
        sure = text[: len(text) - held]
        if not ended or self.calls:
            sure = sure.rstrip()  # a call may follow
        self._say(sure, deltas)
        self._waiting = "" if ended else text[len(sure) :]
        return None

    def _call(self, mark: str, rest: str) -> str | None:
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


def begun(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the start of one of `marks`."""
    longest = max(map(len, marks), default=1) - 1
    begins = {mark[0] for mark in marks}
    for start in range(max(0, len(text) - longest), len(text)):
        if text[start] in begins and any(mark.startswith(text[start:]) for mark in marks):
            return len(text) - start
    return 0
