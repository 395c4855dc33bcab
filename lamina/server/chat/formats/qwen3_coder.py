"""Qwen3-Coder's form: a call with each argument between tags of its own, text as it is and other values as JSON.

<tool_call>
<function=f>
<parameter=x>
1
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from lamina.server.chat.formats.family import MarkedFamily, one_of, schema_rule
from lamina.server.chat.formats.reply_parser import Delta, ReplyParser, begun, first_of
from lamina.server.chat.formats.tools import ToolUse

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_NAMED_FUNCTION = re.compile(rf"(?:{_FUNCTION}\s*)?([a-zA-Z0-9_-]{{1,128}})\s*>")
_NAMED_PARAMETER = re.compile(rf"{_PARAMETER}([^>\n]{{1,256}})>\n?")
_VALUE_ENDS = (_END_PARAMETER, f"\n{_PARAMETER}", f"\n{_END_FUNCTION}")  # models forget the first
_LONGEST_HEAD = 320  # characters of a call's or an argument's opening
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


class Qwen3CoderParser(ReplyParser):
    """Replies in this form. The values of arguments become JSON by the functions' schemas."""

    openers = (OPEN, _FUNCTION)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._opener = ""
        self._function_name = ""
        self._known: dict[tuple[str, str], set[str]] = {}  # types of arguments by the function's and their own names
        self._types: set[str] = set()  # of the argument
        self._begun = False  # whether the call has an argument
        self._written: list[str] = []  # what has come of a value that is not text

    def _call(self, mark: str, remainder: str) -> str | None:
        self._opener, self._state = mark, "function"
        return remainder

    def _function(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        head = _NAMED_FUNCTION.match(text.lstrip())
        remainder = "" if head is None else head.string[head.end() :]
        is_near = len(text) - len(remainder) <= _LONGEST_HEAD
        if head is not None and is_near and (self._opener == _FUNCTION or _FUNCTION in head[0]):
            self._begin_call(head[1], deltas)
            self._function_name, self._begun = head[1], False
            self._state = "parameter"
            return remainder
        if not ended and len(text) <= _LONGEST_HEAD and CLOSE not in text:
            self._waiting = text
            return None
        return self._no_call(self._opener, text, deltas)

    def _parameter(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        text = text.lstrip()
        head = _NAMED_PARAMETER.match(text)
        if head is not None and (ended or head.end() < len(text) or text.endswith("\n")):
            self._types, self._written = self._types_of(head[1]), []
            opening = f"{', ' if self._begun else '{'}{json.dumps(head[1], ensure_ascii=False)}: "
            self._argue(f'{opening}"' if self._is_text else opening, deltas)
            self._begun, self._state = True, "value"
            return text[head.end() :]
        ends = next((mark for mark in (_END_FUNCTION, CLOSE) if text.startswith(mark)), "")
        marks = (_PARAMETER, _END_FUNCTION, CLOSE)
        may_come = any(mark.startswith(text[: len(mark)]) for mark in marks) and len(text) <= _LONGEST_HEAD
        if not ends and may_come:
            self._waiting = text
            return None
        self._argue("}" if self._begun else "{}", deltas)
        self._state = "tail"
        return text[len(ends) :] if ends != CLOSE else text

    def _value(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        end, mark = first_of(text, _VALUE_ENDS)
        if mark:
            self._write(text[:end].removesuffix("\n"), deltas)
            self._argue('"' if self._is_text else as_value("".join(self._written), self._types), deltas)
            self._state = "parameter"
            return text[end:].removeprefix(_END_PARAMETER)
        held = 0 if ended else begun(text, (*_VALUE_ENDS, f"\n{_END_PARAMETER}"))
        self._write(text[: len(text) - held], deltas)
        self._waiting = text[len(text) - held :]
        return None

    def _tail(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        remainder = text.lstrip()
        if not ended and remainder != CLOSE and CLOSE.startswith(remainder):
            self._waiting = remainder
            return None
        self._end_call()
        return remainder.removeprefix(CLOSE)

    @property
    def _is_text(self) -> bool:
        return self._types == {"string"}

    def _types_of(self, argument: str) -> set[str]:
        """The types of an argument, found once: a schema may be long, and an argument come again and again."""
        schema = property_of(self._functions.get(self._function_name, {}), argument)
        key = (self._function_name, argument)
        if schema and key not in self._known:
            self._known[key] = types_of(schema)
        return self._known.get(key, set())

    def _write(self, text: str, deltas: list[Delta]) -> None:
        if self._is_text:
            self._argue(json.dumps(text, ensure_ascii=False)[1:-1], deltas)
        else:
            self._written.append(text)

    def _argue(self, text: str, deltas: list[Delta]) -> None:
        if text:
            deltas.append(Delta(index=self.calls - 1, arguments=text))


class Qwen3Coder(MarkedFamily):
    """This form. Arguments come in the order of the schema; text is held to an `enum`, but to no pattern or length."""

    parser = Qwen3CoderParser
    marks = (OPEN, CLOSE)
    opening = OPEN
    again = "\n"

    def calls(self, tools: ToolUse) -> tuple[str, list[str]]:
        rules = [rf"text[lazy]: TEXT {json.dumps(chr(10) + _END_PARAMETER + chr(10))}"]
        calls = [self._call(name, schema) for name, schema in tools.functions.items()]
        return "call", [*rules, *one_of(tools.functions, "call", calls)]

    def _call(self, name: str, schema: Mapping[str, Any]) -> str:
        required = schema.get("required", ())
        given = [
            f"({_parameter(key, property_of(schema, key))}){'' if key in required else '?'}"
            for key in schema.get("properties") or {}
        ]
        if schema.get("additionalProperties") is not False:
            given.append(rf'("{_PARAMETER}" /[^>\n]{{1,64}}/ ">\n" text)*')
        opening, closing = (json.dumps(text) for text in (f"\n{_FUNCTION}{name}>\n", f"{_END_FUNCTION}\n"))
        return " ".join([opening, *given, closing, self.vocabulary.mark(CLOSE)])


def _parameter(name: str, schema: Mapping[str, Any]) -> str:
    """A grammar's expression for an argument."""
    opening, closing = f"{_PARAMETER}{name}>\n", f"\n{_END_PARAMETER}\n"
    types = types_of(schema)
    texts = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if types == {"string"} and texts:
        return " | ".join(json.dumps(opening + text + closing) for text in texts if isinstance(text, str))
    if not types or "string" in types:
        return f"{json.dumps(opening)} text"
    return f"{json.dumps(opening)} {schema_rule(schema)} {json.dumps(closing)}"


def property_of(parameters: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The schema of an argument, by itself: with the definitions and the options of the whole."""
    properties = parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    if not isinstance(schema, Mapping):
        return {}
    shared = {key: parameters[key] for key in ("$defs", "definitions", "x-guidance") if key in parameters}
    return {**shared, **schema}


def types_of(schema: Any, depth: int = 8) -> set[str]:
    """The names of JSON types that fit a schema; empty where that is not plain to see, as for `true`."""
    if not isinstance(schema, Mapping):
        return set()
    if "type" in schema:
        listed = schema["type"]
        return {listed} if isinstance(listed, str) else set(listed)
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {_TYPES.get(type(value), "null") for value in values}
    for key in ("anyOf", "oneOf"):
        if key in schema and depth:
            found = [types_of(choice, depth - 1) for choice in schema[key]]
            return set().union(*found) if all(found) else set()
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    for key in ("$defs", "definitions"):
        if name and depth and isinstance(schema.get(key), Mapping) and name in schema[key]:
            found_there = schema[key][name]
            return types_of({key: schema[key], **found_there} if isinstance(found_there, Mapping) else None, depth - 1)
    return set()


def as_value(text: str, types: Collection[str]) -> str:
    """The JSON text of a value that a model wrote: JSON of one of the types, if there are any, else text."""
    try:
        value = json.loads(_WORDS.get(text.lower(), text), parse_constant=_no_json)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    kind = _TYPES.get(type(value), "null")
    if not types or kind in types or (kind == "integer" and "number" in types):
        return text.strip() if text.strip().lower() not in _WORDS else _WORDS[text.strip().lower()]
    return json.dumps(text, ensure_ascii=False)


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}  # Python's words too
