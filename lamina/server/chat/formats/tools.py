"""Tools (functions that a model may call): the checks of a request's fields. `formats` has the grammars by which calls
are valid, and the parsers that find them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lamina.errors import InvalidRequest, cut
from lamina.sampling_params import MAX_SCHEMA, MAX_SCHEMA_DEPTH, json_depth
from lamina.server.preparation import go_on
from lamina.text.structured_output import check_json_schema, json_options

MAX_TOOLS = 128
MAX_DESCRIPTION = 1 << 16  # characters; one of Claude Code has more than 16,384
MAX_SECONDS = 1.0  # of a processor, to compile the schemas of a request's tools: a usual one takes a millisecond

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")  # OpenAI allows 64 characters, Anthropic 128
_NOTES = ("description", "title", "examples", "$comment", "default", "deprecated", "readOnly", "writeOnly")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A request's tools. `tools` are the checked definitions, as templates expect them in their variable `tools`;
    `functions` are those that may be called: the schemas of their parameters (`schema_rule`) by name. `required`:
    whether the reply is only calls. `many`: whether there may be several; where some call is required, only if the
    request asks for it, since small models would call again and again."""

    tools: tuple[Mapping[str, Any], ...]
    functions: Mapping[str, Mapping[str, Any]]
    required: bool
    many: bool

    @classmethod
    def from_request(cls, tools: object, tool_choice: object, parallel_tool_calls: object) -> ToolUse | None:
        """From a request's unchecked fields, None where one is missing. Returns None where no tool may be called: no
        `tools`, or `tool_choice` "none". Raises InvalidRequest, which names the field, such as
        `tools[3].function.name`. Compiles the schemas, mostly within a millisecond each. For a `PreparationPool`: it
        ends where the client has left."""
        if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
            raise _refused("parallel_tool_calls", parallel_tool_calls, "true or false")
        checked = _check_tools(tools)
        choice = _check_choice(tool_choice, [tool["function"]["name"] for tool in checked])
        if choice.mode == "none" or not checked:
            return None
        functions = {
            tool["function"]["name"]: _schema(tool["function"])
            for tool in checked
            if tool["function"]["name"] in choice.names
        }
        parallel = choice.mode == "auto" if parallel_tool_calls is None else parallel_tool_calls
        many = parallel and not choice.once
        return cls(tuple(checked), functions, choice.mode == "required", many)


# The checks of a request.


def _check_tools(tools: object) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes) or len(tools) > MAX_TOOLS:
        what = f"{len(tools)} tools" if isinstance(tools, list) else tools
        raise _refused("tools", what, f"a list of at most {MAX_TOOLS} tools")
    checked = [_check_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
    names: set[str] = set()
    for index, tool in enumerate(checked):
        name = tool["function"]["name"]
        if name in names:
            raise _refused(f"tools[{index}].function.name", name, "another name for each function")
        names.add(name)
    seconds = 0.0
    for index, tool in enumerate(checked):
        go_on()
        field, function = f"tools[{index}].function.parameters", tool["function"]
        seconds += _check_parameters(field, function["parameters"], function.get("strict") is True)
        if seconds > MAX_SECONDS:
            took = f"{field}: the schemas of the tools up to this one took {seconds:.1f} s of a processor to compile"
            raise InvalidRequest(f"{took}; allowed are {MAX_SECONDS:g} s. Ask for simpler ones")
    return checked


def _check_tool(name: str, tool: object) -> dict[str, Any]:
    _check_keys(name, tool, ("type", "function"))
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise _refused(f"{name}.type", tool.get("type") if isinstance(tool, Mapping) else tool, '"function"')
    function = tool.get("function")
    _check_keys(f"{name}.function", function, ("name", "description", "parameters", "strict"))
    if not isinstance(function, Mapping):
        raise _refused(f"{name}.function", function, "an object")
    called, description = function.get("name"), function.get("description")
    if not isinstance(called, str) or not _NAME.fullmatch(called):
        raise _refused(f"{name}.function.name", called, "1 to 128 letters, digits, underscores and hyphens")
    if description is not None and (not isinstance(description, str) or len(description) > MAX_DESCRIPTION):
        raise _refused(f"{name}.function.description", description, f"text of at most {MAX_DESCRIPTION} characters")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _refused(f"{name}.function.strict", strict, "true or false")
    checked: dict[str, Any] = {"name": called}
    if description is not None:
        checked["description"] = description
    parameters = function.get("parameters")
    checked["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters
    if strict is not None:
        checked["strict"] = strict
    return {"type": "function", "function": checked}


def _check_parameters(name: str, parameters: object, strict: bool) -> float:
    """Returns the seconds of a processor that compiling took."""
    if not isinstance(parameters, dict):
        raise _refused(name, parameters, "a JSON Schema, an object")
    if json_depth(parameters, MAX_SCHEMA_DEPTH) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"{name} is nested too deeply; allowed are {MAX_SCHEMA_DEPTH} levels")
    if parameters.get("type", "object") != "object":
        raise _refused(f"{name}.type", parameters["type"], '"object"')
    text = as_json(_plain(parameters))
    if len(text) > MAX_SCHEMA:
        raise InvalidRequest(f"{name} has {len(text)} characters; allowed are {MAX_SCHEMA}")
    return check_json_schema(name, text, lenient=not strict)


@dataclass(frozen=True, slots=True)
class _ToolChoice:
    """Whether tools are called, the names of those allowed, and whether exactly one call is made."""

    mode: Literal["none", "auto", "required"]
    names: Sequence[str] = ()
    once: bool = False


def _check_choice(choice: object, names: Sequence[str]) -> _ToolChoice:
    if choice is None:
        return _ToolChoice("auto" if names else "none", names)
    if choice == "none":
        return _ToolChoice("none")
    if choice in ("auto", "required"):
        if not names:
            raise InvalidRequest(f'tool_choice is "{choice}", but there are no tools')
        return _ToolChoice("auto" if choice == "auto" else "required", names)
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or kind not in ("function", "allowed_tools") or choice.keys() != {"type", kind}:
        allowed = '"none", "auto", "required", {"type": "function", "function": {"name": ...}}'
        raise _refused("tool_choice", choice, f'{allowed} or {{"type": "allowed_tools", "allowed_tools": ...}}')
    if kind == "function":
        return _ToolChoice("required", [_chosen("tool_choice.function", choice["function"], names)], once=True)
    subset = choice["allowed_tools"]
    listed, mode = (subset.get("tools"), subset.get("mode")) if isinstance(subset, Mapping) else (None, None)
    if (
        not isinstance(subset, Mapping)
        or subset.keys() != {"mode", "tools"}
        or mode not in ("auto", "required")
        or not isinstance(listed, list)
        or not 0 < len(listed) <= MAX_TOOLS
    ):
        allowed = f'{{"mode": "auto" or "required", "tools": 1 to {MAX_TOOLS} of {{"type": "function", ...}}}}'
        raise _refused("tool_choice.allowed_tools", subset, allowed)
    chosen = []
    for index, tool in enumerate(listed):
        name = f"tool_choice.allowed_tools.tools[{index}]"
        if not isinstance(tool, Mapping) or tool.keys() != {"type", "function"} or tool["type"] != "function":
            raise _refused(name, tool, '{"type": "function", "function": {"name": ...}}')
        chosen.append(_chosen(f"{name}.function", tool["function"], names))
    return _ToolChoice("auto" if mode == "auto" else "required", chosen)


def _chosen(name: str, function: object, names: Sequence[str]) -> str:
    """The tool that a choice names."""
    if not isinstance(function, Mapping) or function.keys() != {"name"}:
        raise _refused(name, function, '{"name": ...}')
    if function["name"] not in names:
        raise _refused(f"{name}.name", function["name"], f"the name of one of the tools: {list(names)}")
    return str(function["name"])


def _check_keys(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, Mapping):
        raise _refused(name, value, f"an object with {', '.join(allowed)}")
    for key in value:
        if key not in allowed:
            raise InvalidRequest(f"{name} has {cut(key)}; allowed are {', '.join(allowed)}")


def _refused(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {cut(value)}; allowed is {allowed:.400}")


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function's parameters as a JSON Schema without annotations, for a grammar."""
    plain = _plain(function["parameters"])
    return plain | json_options(lenient=function.get("strict") is not True)


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"type": "object"} | {key: value for key, value in parameters.items() if key not in (*_NOTES, "$schema")}
    if schema.get("properties") is not None:
        schema.setdefault("additionalProperties", False)
    return schema


def as_json(value: object) -> str:
    """JSON text. Raises InvalidRequest for values that JSON or UTF-8 cannot hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"tools hold something that is no JSON: {str(error)[:200]}") from error
    return text
