"""Calls that are JSON objects with a name and arguments, as most families write them. The outer braces may be double,
as Qwen2.5-Coder's template has them."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from lamina.server.chat.formats.reply_parser import Delta, ReplyParser

NAME = r"[a-zA-Z0-9_-]{1,128}"
_HEAD = re.compile(
    rf'(?:json\b\s*)?(?P<braces>\{{{{1,2}})\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>{NAME})"\s*,\s*'
    r'"?(?:arguments|parameters)"?\s*:\s*(?=\{)'
)
LONGEST_HEAD = 256
"""Characters of a call before its arguments, with the whitespace of a model without a grammar."""


class JsonCallParser(ReplyParser):
    """Replies with such calls. `closers` has the closing text of each of `openers`. `loose` are openers that stand in
    other texts too: a call after one, or without any, is one only if it names one of the functions."""

    closers: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._opener = self._closer = ""
        self._closing = "}"  # of the object around the arguments
        self._open: list[str] = []  # what closes the braces and brackets of the arguments that are open
        self._quote, self._escaped = "", False  # what ends the string that is open; after a backslash in it

    @cached_property
    def _heads(self) -> list[str]:
        keys = ('"arguments"', '"parameters"', "arguments", "parameters")
        starts = [(kind, key) for kind in ("", '"type":"function",') for key in keys]
        return [f'{{{kind}"name":"{name}",{key}:{{' for name in self._functions for kind, key in starts]

    def _call(self, mark: str, remainder: str) -> str | None:
        self._opener = mark
        self._closer = self.closers[self.openers.index(mark)] if mark else ""
        self._state = "head"
        return remainder

    def _head(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        is_loose = not self._opener or self._opener in self.loose
        begins = text.lstrip()
        if self.calls and not self._opener:
            begins = begins.removeprefix(";").lstrip()
        remainder = self._after_head(_HEAD.match(begins), text, is_loose, deltas)
        if remainder is not None:
            return remainder
        may_come = len(text) <= LONGEST_HEAD and (not self._closer or self._closer not in text)
        if not ended and may_come and (not is_loose or self._may_begin(begins)):
            self._waiting = text
            return None
        return self._no_call(self._opener, text, deltas)

    def _after_head(self, head: re.Match[str] | None, text: str, is_loose: bool, deltas: list[Delta]) -> str | None:
        """Begin the call whose head was found at the start of `text`, after white space; the arguments and all that
        follows. None where it is no call."""
        remainder = "" if head is None else head.string[head.end() :]
        if head is None or len(text) - len(remainder) > LONGEST_HEAD:
            return None
        parts = head.groupdict()
        if is_loose and parts["name"] not in self._functions:
            return None
        self._closing = "}" * len(parts.get("braces", "{"))
        self._begin_arguments(parts["name"], deltas)
        return remainder

    def _begin_arguments(self, name: str, deltas: list[Delta]) -> None:
        self._begin_call(name, deltas)
        self._open, self._quote, self._escaped = [], "", False
        self._state = "arguments"

    def _may_begin(self, text: str) -> bool:
        """Whether the text can become the start of a call of one of the functions."""
        written = "".join(text.split())
        tagged = "json".startswith(written)
        written = written.removeprefix("json").replace("{{", "{", 1)
        return tagged or any(head.startswith(written) or written.startswith(head) for head in self._heads)

    def _arguments(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        """Read as JSON what is nearly JSON: strings in single quotes, and what closes by the wrong bracket."""
        written: list[str] = []
        for character in text:
            if self._escaped:
                self._escaped, character = False, "'" if character == "'" else f"\\{character}"
            elif self._quote and character == "\\":
                self._escaped, character = True, ""  # it is written with what follows: JSON knows no \'
            elif self._quote:
                if character == self._quote:
                    self._quote, character = "", '"'
                elif character == '"':
                    character = '\\"'
            elif character in "\"'":
                self._quote, character = character, '"'
            elif character in "{[":
                self._open.append("}" if character == "{" else "]")
            elif character in "}]":
                character = self._open.pop()
            written.append(character)
            if not self._open:
                self._state = "tail"
                break
        if arguments := "".join(written):
            deltas.append(Delta(index=self.calls - 1, arguments=arguments))
        return None if self._open or not written else text[len(written) :]

    def _tail(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        remainder = text.lstrip()
        while self._closing and remainder.startswith("}"):
            self._closing = self._closing[1:]
            remainder = remainder[1:].lstrip()
        closes = remainder.startswith(self._closer) and (self._closer != "" or not self._closing or remainder != "")
        if not closes and not ended and self._closer.startswith(remainder):
            self._waiting = remainder
            return None
        self._end_call()
        return remainder.removeprefix(self._closer) if closes or not self._closer.startswith(remainder) else None
