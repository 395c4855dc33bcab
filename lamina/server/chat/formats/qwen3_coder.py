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
from typing import Any, NamedTuple

from lamina.sampling_params import MAX_GRAMMAR, MAX_SCHEMA
from lamina.server.chat.formats.family import MarkedFamily, one_of, schema_rule
from lamina.server.chat.formats.reply_parser import Delta, ReplyParser, begun, first_of
from lamina.server.chat.formats.tools import ToolUse, as_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_NAMED_FUNCTION = re.compile(rf"(?:{_FUNCTION}\s*)?([a-zA-Z0-9_-]{{1,128}})\s*>")
_NAMED_PARAMETER = re.compile(rf"{_PARAMETER}([^>\n]{{1,256}})>\n?")
_VALUE_ENDS = (_END_PARAMETER, f"\n{_PARAMETER}", f"\n{_END_FUNCTION}")  # models forget the first
_SHARED = ("$defs", "definitions")  # what of a schema has those that others refer to
_LONGEST_HEAD = 320  # characters of a call's or an argument's opening
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
_FEW: Mapping[str, list[Any]] = {"null": [None], "boolean": [False, True]}  # all values of a type
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}  # Python's words too


class Argument(NamedTuple):
    """What the schema of an argument says. `types` are the names of its JSON types, none where they are not plain to
    see, as for `true`. `values` are all that it may be, where the schema lists them, else none."""

    schema: Mapping[str, Any] = {}
    types: frozenset[str] = frozenset()
    values: tuple[Any, ...] = ()


class Arguments:
    """The arguments of one function, by the schema of its parameters. All together read no more choices and values than
    a schema has characters: where many share a long definition, those beyond that are of no type."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters
        self._by_name: dict[str, Argument] = {}
        self._room = MAX_SCHEMA

    def named(self, name: str) -> Argument:
        """An argument; read once, as it may come again and again."""
        properties = self._parameters.get("properties")
        schema = properties.get(name) if isinstance(properties, Mapping) else None
        if not isinstance(schema, Mapping):
            return Argument()
        if name not in self._by_name:
            outside = ("x-guidance", *(_SHARED if '"$ref"' in as_json(schema) else ()))
            shared = {key: self._parameters[key] for key in outside if key in self._parameters}
            choices = self._choices(schema)
            types = frozenset(kind for choice in choices for kind in _types(choice))
            listed = [_values(choice) for choice in choices]
            values = tuple(value for values in listed for value in values if _fits(value, types))
            # The schema stands by itself: with the options of the whole, and the definitions that it may refer to.
            self._by_name[name] = Argument({**shared, **schema}, types, values if all(listed) else ())
        return self._by_name[name]

    def _choices(self, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The schemas without choices and references, one of which a value fits; none where that is not plain to
        see. A reference is followed once."""
        choices: list[Mapping[str, Any]] = []
        parts: list[Any] = [schema]
        followed: set[str] = set()
        for part in parts:  # which grow
            self._room -= 1
            match part:
                case {"type": _} | {"enum": _} | {"const": _}:
                    self._room -= len(as_json(_values(part)))
                    choices.append(part)
                case {"anyOf": list(several)} | {"oneOf": list(several)}:
                    parts += several
                case {"allOf": [first, *_]}:  # a value fits all of them
                    parts.append(first)
                case {"$ref": str(reference)}:
                    if reference not in followed:
                        followed.add(reference)
                        parts.append(self._definition(reference))
                case _:
                    return []
            if self._room < 0:
                return []
        return choices

    def _definition(self, reference: str) -> Any:
        key, _, name = reference.removeprefix("#/").partition("/")
        shared = self._parameters.get(key) if key in _SHARED else None
        return shared.get(name) if isinstance(shared, Mapping) else None


class Qwen3CoderParser(ReplyParser):
    """Replies in this form. The values of arguments become JSON by the functions' schemas."""

    openers = (OPEN, _FUNCTION)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._opener = ""
        self._by_function = {name: Arguments(parameters) for name, parameters in self._functions.items()}
        self._arguments = Arguments({})
        self._argument = Argument()
        self._first = True  # whether the call has no argument yet
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
            self._arguments = self._by_function.get(head[1], Arguments({}))
            self._first, self._state = True, "parameter"
            return remainder
        if not ended and len(text) <= _LONGEST_HEAD and CLOSE not in text:
            self._waiting = text
            return None
        return self._no_call(self._opener, text, deltas)

    def _parameter(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        text = text.lstrip()
        head = _NAMED_PARAMETER.match(text)
        if head is not None and (ended or head.end() < len(text) or text.endswith("\n")):
            self._argument, self._written = self._arguments.named(head[1]), []
            opening = f"{'{' if self._first else ', '}{json.dumps(head[1], ensure_ascii=False)}: "
            self._argue(f'{opening}"' if self._is_text else opening, deltas)
            self._first, self._state = False, "value"
            return text[head.end() :]
        ends = next((mark for mark in (_END_FUNCTION, CLOSE) if text.startswith(mark)), "")
        marks = (_PARAMETER, _END_FUNCTION, CLOSE)
        may_come = any(mark.startswith(text[: len(mark)]) for mark in marks) and len(text) <= _LONGEST_HEAD
        if not ends and may_come:
            self._waiting = text
            return None
        self._argue("{}" if self._first else "}", deltas)
        self._state = "tail"
        return text[len(ends) :] if ends != CLOSE else text

    def _value(self, text: str, ended: bool, deltas: list[Delta]) -> str | None:
        end, mark = first_of(text, _VALUE_ENDS)
        if mark:
            self._write(text[:end].removesuffix("\n"), deltas)
            self._argue('"' if self._is_text else as_value("".join(self._written), self._argument), deltas)
            self._state = "parameter"
            return text[end:].removeprefix(_END_PARAMETER)
        end -= 0 if ended else begun(text, (*_VALUE_ENDS, f"\n{_END_PARAMETER}"))
        self._write(text[:end], deltas)
        self._waiting = text[end:]
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
        return self._argument.types == {"string"}

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
        required, arguments, size = schema.get("required", ()), Arguments(schema), 0
        parts: list[str] = []
        for key in schema.get("properties") or {}:
            parts.append(f"({_parameter(key, arguments.named(key))}){'' if key in required else '?'}")
            size += len(parts[-1])
            if size > MAX_GRAMMAR:
                break  # it is refused, whatever follows
        if schema.get("additionalProperties") is not False:
            parts.append(rf'("{_PARAMETER}" /[^>\n]{{1,64}}/ ">\n" text)*')
        opening, closing = (json.dumps(text) for text in (f"\n{_FUNCTION}{name}>\n", f"{_END_FUNCTION}\n"))
        return " ".join([opening, *parts, closing, self.vocabulary.mark(CLOSE)])


def _parameter(name: str, argument: Argument) -> str:
    """A grammar's expression for an argument."""
    opening, closing = json.dumps(f"{_PARAMETER}{name}>\n"), f"\n{_END_PARAMETER}\n"
    if argument.types and "string" not in argument.types:
        return f"{opening} {schema_rule(argument.schema)} {json.dumps(closing)}"
    if not argument.values:
        return f"{opening} text"
    texts = (value if isinstance(value, str) else as_json(value) for value in argument.values)
    return f"{opening} ({' | '.join(json.dumps(text + closing) for text in texts)})"


def _types(choice: Mapping[str, Any]) -> set[str]:
    """The names of the JSON types of a schema without choices."""
    listed = choice.get("type", [_kind(value) for value in _values(choice)])
    return {listed} if isinstance(listed, str) else set(listed)


def _values(choice: Mapping[str, Any]) -> list[Any]:
    """All values of a schema without choices, where there are a few."""
    few = _FEW.get(str(choice.get("type")), [])
    listed: list[Any] = choice.get("enum", [choice["const"]] if "const" in choice else few)
    return listed


def _kind(value: Any) -> str:
    return _TYPES.get(type(value), "null")


def _fits(value: Any, types: Collection[str]) -> bool:
    kind = _kind(value)
    return kind in types or (kind == "integer" and "number" in types)


def as_value(text: str, argument: Argument) -> str:
    """The JSON text of a value that a model wrote: one of the argument's texts, JSON of one of its types, if there are
    any, else text."""
    try:
        value = json.loads(_WORDS.get(text.lower(), text), parse_constant=_no_json)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if (argument.types and not _fits(value, argument.types)) or text in argument.values:
        return json.dumps(text, ensure_ascii=False)
    return _WORDS.get(text.strip().lower(), text.strip())


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
