"""Mistral's forms: a list of calls after the token `[TOOL_CALLS]`, and since Mistral Small 3.2 a name and arguments.

[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]
[TOOL_CALLS]f[ARGS]{"x": 1}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from lamina.server.chat.formats.family import MarkedFamily, Message, new_id, one_of, schema_rule, short_id
from lamina.server.chat.formats.json_calls import LONGEST_HEAD, NAME, JsonCallParser
from lamina.server.chat.formats.reply_parser import Delta, Tags
from lamina.server.chat.formats.tools import ToolUse

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
THINK = Tags("[THINK]", "[/THINK]")

_NAMED = re.compile(rf"(?P<name>{NAME})\s*(?:\[CALL_ID\]\s*(?:\w+\s*)?)?(?:\[ARGS\]\s*)?(?=\{{)")
_LISTED = re.compile(rf'(?:[\[,]\s*)?\{{\s*"name"\s*:\s*"(?P<name>{NAME})"\s*,\s*"arguments"\s*:\s*(?=\{{)')
_ID = re.compile(r',\s*"id"\s*:\s*"\w*"')


class MistralParser(JsonCallParser):
    """Replies in these forms."""

    openers = (CALLS,)
    closers = ("",)

    def _head(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        begins = text.lstrip()
        head = _NAMED.match(begins) or _LISTED.match(begins)
        remainder = self._after_head(head, text, False, deltas)
        if head is not None and remainder is not None:
            self._listed = head.re is _LISTED
            return remainder
        if not ended and len(text) <= LONGEST_HEAD:
            self._waiting = text
            return None
        return self._no_call(self._opener, text, deltas)

    def _tail(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        if not self._listed:
            self._end_call()
            return text
        text = text.lstrip()
        number = _ID.match(text)
        end = number.end() if number is not None and number.end() <= LONGEST_HEAD else 0
        remainder = text[end:].lstrip().removeprefix("}").lstrip()
        if not ended and (
            not remainder or (remainder[0] == "," and "{" not in remainder and len(remainder) <= LONGEST_HEAD)
        ):
            self._waiting = text if remainder else text.rstrip()
            return None
        if remainder[:1] == ",":
            self._opener, self._state = "", "head"
            return remainder
        self._end_call()
        return remainder.removeprefix("]")


class Mistral(MarkedFamily):
    """These forms."""

    parser = MistralParser
    marks = (CALLS, ARGS, CALL_ID)
    opening = CALLS

    @property
    def tags(self) -> Tags | None:
        return THINK if THINK.close in self.template else super().tags

    def new_call_id(self) -> str:
        return new_id("", 9)  # the length that templates insist on

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Ids have nine letters and digits; after the system's message, users and assistants take turns."""
        written: list[Message] = []
        for message in messages:
            message = dict(message)
            if message["role"] in ("system", "developer") and written:
                message["role"] = "user"
            if "tool_call_id" in message:
                message["tool_call_id"] = short_id(message["tool_call_id"], 9)
            if "tool_calls" in message:
                message["tool_calls"] = [call | {"id": short_id(call["id"], 9)} for call in message["tool_calls"]]
            last = written[-1] if written else {}
            if message["role"] == last.get("role") != "tool" and not last.get("tool_calls"):
                message["content"] = "\n\n".join(filter(None, (last["content"], message["content"])))
                written.pop()
            written.append(message)
        return written

    def calls(self, tools: ToolUse) -> tuple[str, list[str]]:
        if ARGS in self.template:
            args = self.vocabulary.mark(ARGS)
            call_id = self.vocabulary.mark(CALL_ID)
            number = f"({call_id} /[a-zA-Z0-9]{{9}}/)? " if CALL_ID in self.template else ""
            calls = [f"{json.dumps(name)} {number}{args} {schema_rule(s)}" for name, s in tools.functions.items()]
            again = f" ({self.vocabulary.mark(CALLS)} call)*" if tools.many else ""
            return f"call{again}", one_of(tools.functions, "call", calls)
        heads = [json.dumps(f'{{"name": "{name}", "arguments": ') for name in tools.functions]
        schemas = map(schema_rule, tools.functions.values())
        calls = [f'{head} {schema} "}}"' for head, schema in zip(heads, schemas, strict=True)]
        again = ' (", " call)*' if tools.many else ""
        return f'/ ?\\[/ call{again} "]"', one_of(tools.functions, "call", calls)
