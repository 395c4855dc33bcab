"""gpt-oss's form: messages in channels, of which `analysis` is the reasoning and `final` the answer.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>

The prompt ends with `<|start|>assistant`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lamina.server.chat.formats.family import Family, Message, Thought, lark, one_call_a_message, one_of, schema_rule
from lamina.server.chat.formats.reply_parser import Delta, ReplyParser, Tags, begun, first_of
from lamina.server.chat.formats.tools import ToolUse

CHANNEL, MESSAGE, START, CONSTRAIN = "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"\bto=functions\.([a-zA-Z0-9_-]{1,128})")
_LONGEST_HEADER = 320  # characters up to the end of `<|message|>`


class HarmonyParser(ReplyParser):
    """Replies in this form. Where the prompt ends within a message, its channel has begun: `tags` is None then."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._state = "content" if self._tags is None else "header"
        self._marks = (*ENDS, START, CHANNEL, *self._hidden)

    def _header(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        header, _, remainder = text.partition(MESSAGE)
        is_whole = MESSAGE in text[:_LONGEST_HEADER]
        if not is_whole or not _is_header(text):
            if not (is_whole or ended) and len(text) <= _LONGEST_HEADER and _is_header(text):
                self._waiting = text
                return None
            self._state = "content"  # no header at all; the marks of one that was cut short are left out
            begins = text.lstrip()
            mark = next((mark for mark in (CHANNEL, START) if begins.startswith(mark)), "")
            return None if ended and not is_whole and _is_header(text) else begins[len(mark) :] if mark else text
        channel = _CHANNEL.search(header)
        function = _FUNCTION.search(header)
        if function is not None:
            self._begin_call(function[1], deltas)
            self._state = "arguments"
        else:
            self._state = "reasoning" if channel is not None and channel[1] == "analysis" else "content"
        self._fresh = self._state == "reasoning"
        return remainder

    def _reasoning(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        return self._body(text, ended, lambda piece: deltas.append(Delta(reasoning=piece)))

    def _content(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        return self._body(text, ended, lambda piece: deltas.append(Delta(content=piece)))

    def _arguments(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        return self._body(text, ended, lambda piece: deltas.append(Delta(index=self.calls - 1, arguments=piece)))

    def _body(self, text: str, ended: bool, put: Any) -> str | None:
        end, mark = first_of(text, self._marks)
        if not mark and not ended:
            end -= begun(text, self._marks)
        if text[:end]:
            put(text[:end])
            self._fresh = False
        if not mark:
            self._waiting = text[end:]
            return None
        self._state = "header"
        return text[end:] if mark in (START, CHANNEL) else text[end + len(mark) :]


def _is_header(text: str) -> bool:
    """Whether the text can be what stands before a message."""
    begins = text.lstrip()
    starts = (CHANNEL, START, MESSAGE, "assistant", "to=", *ENDS)
    return any(begins.startswith(start) or start.startswith(begins) for start in starts)


class Harmony(Family):
    """This form."""

    parser = HarmonyParser
    marks = (CHANNEL, MESSAGE)

    @property
    def tags(self) -> Tags | None:
        return Tags(f"{CHANNEL}analysis{MESSAGE}", ENDS[0])

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        written = []
        for message in one_call_a_message(messages):
            thought = message.get("reasoning_content")
            if thought and message["content"] and message.get("tool_calls"):  # the template takes one of both
                reasoning = f"{thought}\n\n{message['content']}"
                message = message | {"reasoning_content": reasoning, "content": ""}
            written.append(message)
        return written

    def grammar(self, tools: ToolUse | None, structure: str | None, thought: Thought | None) -> str:
        mark = self.vocabulary.mark
        if thought is None:
            return lark(f"start: {structure or 'TEXT'}")  # within a message that has begun
        channel, message, again = mark(CHANNEL), mark(MESSAGE), f'{mark(ENDS[0])} {mark(START)} "assistant"'
        rules = []
        ends = []
        if tools is not None:
            calls = [
                f'({channel} "commentary to=functions.{name} " {mark(CONSTRAIN)} "json" | '
                f'" to=functions.{name}" {channel} "commentary json") {message} {schema_rule(schema)}'
                for name, schema in tools.functions.items()
            ]
            rules = one_of(tools.functions, "call", calls)
            ends.append("call")
        if tools is None or not tools.required:
            ends.append(f'{channel} "final" {message} {structure or "TEXT"}')
        before = ["analysis"]
        if tools is not None and structure is None:
            before.append("preamble")
            rules.append(f'preamble: {channel} "commentary" {message} TEXT {again}')
        thoughts, limit = "TEXT", thought.budget
        if limit is not None:
            thoughts = "thoughts" if limit else '""'
            rules += [f"thoughts[max_tokens={limit}]: TEXT"] if limit else []
        rules.append(f'analysis: {channel} "analysis" {message} {thoughts} {again}')
        few = "?" if limit is not None else "*"
        expression = f"analysis{few}" if len(before) == 1 else f"analysis{few} preamble*"
        return lark(f"start: {expression} ({' | '.join(ends)})", *rules)
