"""The Hermes form, on which Qwen, Hermes, SmolLM and others were trained, and that models without a form of their own
are told to use:

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

Some, such as Qwen2.5-Coder, write the object alone or in a fence; that is a call too if it names a known function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.server.chat.formats.family import MarkedFamily, Message, one_of, schema_rule
from lamina.server.chat.formats.json_calls import JsonCallParser
from lamina.server.chat.formats.tools import ToolUse, as_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_NOTE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # the words of Qwen2.5's own template


class HermesParser(JsonCallParser):
    """Replies in this form."""

    openers = (OPEN, "```", "<tools>", "<json>")
    closers = (CLOSE, "```", "</tools>", "</json>")
    loose = openers[1:]
    bare = True


class Hermes(MarkedFamily):
    """This form."""

    parser = HermesParser
    marks = (OPEN, CLOSE)
    opening = OPEN
    again = "\n"

    def calls(self, tools: ToolUse) -> tuple[str, list[str]]:
        closing = self.vocabulary.mark(CLOSE)
        calls = [
            f"{json.dumps(_head(name))} {schema_rule(schema)} {json.dumps('}' + chr(10))} {closing}"
            for name, schema in tools.functions.items()
        ]
        return "call", one_of(tools.functions, "call", calls)


def _head(name: str) -> str:
    return f'\n{{"name": "{name}", "arguments": '


def call_text(name: str, arguments: str) -> str:
    """A call in this form, for the history of a conversation. `arguments` is JSON text."""
    return f"{OPEN}{_head(name)}{arguments}}}\n{CLOSE}"


def system_note(tools: Sequence[Mapping[str, Any]]) -> str:
    """What tells a model of tools whose template does not."""
    return _NOTE.format(tools="\n".join(map(as_json, tools)))


def in_words(messages: Sequence[Message], note: str | None) -> list[Message]:
    """Messages for a template without support for tools: calls, results and the note on tools as text."""
    written: list[Message] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            written.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
            continue
        calls = [
            call_text(call["function"]["name"], as_json(call["function"]["arguments"]))
            for call in message.get("tool_calls", ())
        ]
        fields = {name: value for name, value in message.items() if name != "tool_calls"}
        written.append(fields | {"content": "\n".join([content, *calls] if content else calls or [content])})
    if note is not None:
        if written[0]["role"] in ("system", "developer"):
            written[0]["content"] += f"\n\n{note}"
        else:
            written.insert(0, {"role": "system", "content": note})
    return written
