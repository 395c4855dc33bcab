"""What families of models have in common in the way they write replies: the base of each family's form.

A grammar is in llguidance's Lark. A mark that is one token is named by its id, and text before it costs 5 us a token of
a vocabulary of 150,000. Any other mark is text: what is before it is matched as short as possible ("lazy"), so that it
always begins what it opens, which costs 350 us a token.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lamina.server.chat.formats.reply_parser import ReplyParser, Tags
from lamina.server.chat.formats.tools import ToolUse, as_json

THINK = Tags("<think>", "</think>")
Message = dict[str, Any]

_TEXT = r"TEXT: /(.|\n)*/"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that spell marks: all `added` ones by their text, and which of them are `special`."""

    added: Mapping[str, int]
    special: Collection[str]

    def mark(self, text: str) -> str:
        """A grammar's expression for a mark. A token of its own has to be named by its id: llguidance takes each added
        token in angle brackets for a special one, which no text matches."""
        return f"<[{self.added[text]}]>" if text in self.added else json.dumps(text)


@dataclass(frozen=True, slots=True)
class Thought:
    """How a reply's reasoning is held. `opened`: the prompt has begun it. `budget`: its tokens, None for any number."""

    tags: Tags
    opened: bool
    budget: int | None = None


class Family(ABC):
    """How one model writes replies: a subclass for each family. `template` is its chat template."""

    parser: ClassVar[type[ReplyParser]] = ReplyParser
    marks: ClassVar[tuple[str, ...]] = ()
    """Texts that the parser looks for; where one is a special token, the text must include special tokens."""

    def __init__(self, vocabulary: Vocabulary, template: str) -> None:
        self.vocabulary = vocabulary
        self.template = template

    @property
    def tags(self) -> Tags | None:
        """Those of the model's reasoning, None where it has none."""
        return THINK if THINK.open in self.template or THINK.close in self.template else None

    @property
    def shows_special(self) -> bool:
        """Whether the text must include special tokens."""
        tags = self.tags
        marks = (*self.marks, *(() if tags is None else (tags.open, tags.close)))
        return any(mark in self.vocabulary.special for mark in marks)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Checked messages as the template needs them."""
        return list(messages)

    def tools(self, tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """Checked tools as the template needs them: with a description, where it takes one for granted."""
        if ".description" not in self.template:
            return tuple(tools)
        return tuple({**tool, "function": {"description": "", **tool["function"]}} for tool in tools)

    def new_call_id(self) -> str:
        return new_id("call_", 24)

    @abstractmethod
    def grammar(self, tools: ToolUse | None, structure: str | None, thought: Thought | None) -> str:
        """The grammar of a reply. `structure` is an expression for content that is not free."""


class TaggedFamily(Family):
    """A family whose reasoning stands between two tags, before all else."""

    def grammar(self, tools: ToolUse | None, structure: str | None, thought: Thought | None) -> str:
        body, rules = self.body(tools, structure)
        if thought is None:
            return lark(f"start: {body}", *rules)
        if structure is not None or (tools is not None and tools.required):
            body = rf"/\n{{0,2}}/ ({body})"
        begin, thinking = self._thinking(thought)
        expression = "thinking body" if thought.opened else "begin thinking body | body"
        return lark(f"start: {expression}", f"body: {body}", *begin, *thinking, *rules)

    @abstractmethod
    def body(self, tools: ToolUse | None, structure: str | None) -> tuple[str, list[str]]:
        """The expression for what follows the reasoning, and the rules that it needs."""

    def _thinking(self, thought: Thought) -> tuple[list[str], list[str]]:
        """The rules `begin` and `thinking`: the opening, and all up to the end of the closing."""
        opening, closing = (self.vocabulary.mark(tag) for tag in (thought.tags.open, thought.tags.close))
        begin = (
            []
            if thought.opened
            else [f"begin{'' if thought.tags.open in self.vocabulary.added else '[lazy]'}: {opening}"]
        )
        if thought.budget == 0:
            return begin, [rf"thinking: /\n{{0,2}}/ {closing}"]
        if thought.tags.close not in self.vocabulary.added:  # no count of tokens can end it
            return begin, [f"thinking[lazy]: TEXT {closing}"]
        limit = "" if thought.budget is None else f"[max_tokens={thought.budget}]"
        return begin, [f"thinking: thoughts {closing}", f"thoughts{limit}: TEXT"]


class MarkedFamily(TaggedFamily):
    """A family whose calls come after a mark, `opening`. `again`: what stands between two of them, None where several
    calls share one mark."""

    opening: ClassVar[str]
    again: ClassVar[str | None] = None

    def body(self, tools: ToolUse | None, structure: str | None) -> tuple[str, list[str]]:
        if tools is None:
            return structure or "TEXT", []
        opening = self.vocabulary.mark(self.opening)
        call, rules = self.calls(tools)
        several = tools.many and self.again is not None
        only = f"{opening} {call}" + (f" ({json.dumps(self.again)} {opening} {call})*" if several else "")
        if tools.required:
            return only, rules
        if structure is not None:
            return f"{only} | {structure}", rules
        opened = f"TEXT {opening}"
        if self.opening not in self.vocabulary.added:
            rules, opened = [*rules, f"opened[lazy]: TEXT {opening}"], "opened"
        return (f"({opened} {call})* TEXT" if several else f"TEXT | {opened} {call}"), rules

    @abstractmethod
    def calls(self, tools: ToolUse) -> tuple[str, list[str]]:
        """The expression for what follows the mark, and its rules."""


def lark(*rules: str) -> str:
    """A grammar of rules, with the rule TEXT."""
    return "\n".join([*rules, _TEXT, ""])


def one_of(functions: Mapping[str, Any], rule: str, calls: Sequence[str]) -> list[str]:
    """The rule `rule`: a call of one of the functions, whose rules have the bodies `calls`."""
    names = [f"{rule}_{index}" for index in range(len(functions))]
    return [f"{rule}: {' | '.join(names)}", *(f"{name}: {body}" for name, body in zip(names, calls, strict=True))]


def schema_rule(schema: Mapping[str, Any]) -> str:
    """A grammar's expression for JSON by a schema."""
    return f"%json {as_json(schema)}"


def new_id(prefix: str, length: int) -> str:
    """A random id of so many letters and digits after the prefix."""
    return prefix + secrets.token_hex(length)[:length]


def short_id(given: str, length: int) -> str:
    """An id of so many letters and digits, always the same for one given id: that id itself if it is one already."""
    if len(given) == length and given.isascii() and given.isalnum():
        return given
    return hashlib.sha256(given.encode()).hexdigest()[:length]


def one_call_a_message(messages: Sequence[Message]) -> list[Message]:
    """For templates that show one call a message: further calls in messages of their own, each before its result."""
    split: list[Message] = []
    waiting: list[Message] = []  # messages of calls whose results have not come
    unanswered = False  # whether that is so for the call shown last
    for message in messages:
        if message["role"] == "tool" and waiting:
            owner = next((m for m in waiting if m["tool_calls"][0]["id"] == message.get("tool_call_id")), None)
            if owner is None and not unanswered:
                owner = waiting[0]
            unanswered = False
            if owner is not None:
                waiting.remove(owner)
                split.append(owner)
        elif message["role"] != "tool":
            split += waiting
            waiting = []
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            split.append(message)
            continue
        bare = {key: value for key, value in message.items() if key not in ("reasoning_content", "content")}
        split.append(message | {"tool_calls": calls[:1]})
        unanswered = True
        waiting = [bare | {"content": "", "tool_calls": [call]} for call in calls[1:]]
    return split + waiting
