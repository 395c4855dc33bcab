"""Llama 3's form: the reply is the JSON object of a call, perhaps after `<|python_tag|>`, and nothing else.

{"name": "f", "parameters": {"x": 1}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from lamina.errors import InvalidRequest
from lamina.server.chat.formats.family import Message, TaggedFamily, one_call_a_message, one_of, schema_rule
from lamina.server.chat.formats.json_calls import JsonCallParser
from lamina.server.chat.formats.tools import ToolUse

PYTHON_TAG = "<|python_tag|>"
_ONE = "single tool-calls at once"  # of the template's refusal of messages with several


class Llama3Parser(JsonCallParser):
    """Replies in this form."""

    openers = (PYTHON_TAG, "```")
    closers = ("", "```")
    loose = ("```",)
    bare = True


class Llama3(TaggedFamily):
    """This form. Text that begins like a call is one."""

    parser = Llama3Parser
    marks = (PYTHON_TAG,)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        return one_call_a_message(messages) if _ONE in self.template else list(messages)

    def body(self, tools: ToolUse | None, structure: str | None) -> tuple[str, list[str]]:
        if tools is None:
            return structure or "TEXT", []
        calls = [
            rf'HEAD {json.dumps(f"{name}")} "\", \"parameters\": " {schema_rule(schema)} "}}"'
            for name, schema in tools.functions.items()
        ]
        rules = [r'HEAD: "{\"" ("type\": \"function\", \"")? "name\": \""', *one_of(tools.functions, "call", calls)]
        has_tag = PYTHON_TAG in self.vocabulary.added
        several = " (/; ?/ call)*" if tools.many and _ONE not in self.template else ""
        only = f"call{several}"
        if has_tag and structure is not None and not tools.required:  # both may begin with a brace
            only = f"{self.vocabulary.mark(PYTHON_TAG)} {only}"
        elif has_tag:
            only = f"{self.vocabulary.mark(PYTHON_TAG)}? {only}"
        elif structure is not None and not tools.required:
            raise InvalidRequest(
                "response_format is given beside tools; this model marks no calls, so allowed is one of them"
            )
        if tools.required:
            return only, rules
        if structure is None:
            rules.append(r'PLAIN: /(?s:.*)/ & ~/\s*\{\s*"(name|type": "function)"(?s:.*)/')
        return f"{only} | {structure or 'PLAIN'}", rules
