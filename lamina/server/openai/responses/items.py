"""From the items of a response's input to messages of a chat, and from its tools to a chat's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.server.http.errors import ApiError, refused
from lamina.server.http.fields import read_text
from lamina.text.messages import MAX_MESSAGES

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_IGNORED = ("id", "status", "phase", "internal_chat_message_metadata_passthrough")
_PLAIN = (*_IGNORED, "namespace", "caller", "async")  # fields of items that are small, whatever they are
_MOST_PLAIN = 16  # values of one
_LONGEST_PLAIN = 512  # characters
_KEYS: Mapping[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments", "namespace", "caller", "async"),
    "function_call_output": ("call_id", "output", "name", "namespace", "caller"),
    "reasoning": ("summary", "content", "encrypted_content"),
}
_INSTEAD = {
    "custom": "a function with one parameter of type string",
    "custom_tool_call": "function_call",
    "custom_tool_call_output": "function_call_output",
    "local_shell": "a function that your program runs",
    "input_image": "input_text: the model reads text",
    "input_file": "input_text with the file's text",
    "input_audio": "input_text: the model reads text",
}
_SAID = ("content", "reasoning_content")
_BUILT_IN = "a function that your program runs: the server runs no tools"


def listed(given: Any) -> list[dict[str, Any]]:
    """The items of an input. Raises ApiError where it is no text and no list of objects."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > MAX_MESSAGES:
        raise refused("input", given, f"text, or a list of at most {MAX_MESSAGES} items")
    for index, item in enumerate(given):
        if not isinstance(item, dict):
            raise refused(f"input[{index}]", item, "an item, which is an object")
    return given


def messages(items: Sequence[Mapping[str, Any]], field: str = "input") -> list[dict[str, Any]]:
    """The messages of items: reasoning and calls belong to one message of the assistant with the text between them.
    Raises ApiError, which names the item's place."""
    turns: list[dict[str, Any]] = []
    texts_by_field: dict[str, list[str]] = {}  # the texts of the assistant's message that is last, by field

    def assistant() -> dict[str, Any]:
        if not turns or turns[-1]["role"] != "assistant":
            turns.append({"role": "assistant", "content": None})
            texts_by_field.clear()
        return turns[-1]

    def say(field: str, text: str) -> None:
        message = assistant()
        texts_by_field.setdefault(field, []).append(text)
        message[field] = texts_by_field[field]  # joined at the end: each text is copied once, however many there are

    for index, item in enumerate(items):
        name = f"{field}[{index}]"
        kind = item.get("type", "message" if "role" in item else None)
        if not isinstance(kind, str) or kind not in _KEYS:
            instead = _INSTEAD.get(str(kind))
            raise refused(f"{name}.type", kind, instead or f"one of {', '.join(_KEYS)} and item_reference")
        for key, value in item.items():
            if key not in (*_KEYS[kind], *_IGNORED, "type") and value is not None:
                raise ApiError(400, f"unknown field {name}.{key[:80]}; allowed are {', '.join(_KEYS[kind])}", field)
            if key in _PLAIN:
                check_plain(f"{name}.{key}", value)
        if kind == "message":
            role = item.get("role")
            if role not in _ROLES:
                raise refused(f"{name}.role", role, f"one of {', '.join(_ROLES)}")
            text = _text(f"{name}.content", item.get("content"))
            if role == "assistant":
                say("content", text)
            else:
                turns.append({"role": role, "content": text})
        elif kind == "function_call":
            function = {key: read_text(f"{name}.{key}", item.get(key)) for key in ("name", "arguments")}
            call = {"id": read_text(f"{name}.call_id", item.get("call_id")), "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            result = {"role": "tool", "tool_call_id": read_text(f"{name}.call_id", item.get("call_id"))}
            turns.append(result | {"content": _text(f"{name}.output", item.get("output"))})
        else:
            read_text(f"{name}.encrypted_content", item.get("encrypted_content") or "")
            if thought := _text(f"{name}.content", item.get("content") or item.get("summary") or ""):
                say("reasoning_content", thought)
    for message in turns:
        message |= {key: "\n".join(filter(None, message[key])) for key in _SAID if isinstance(message.get(key), list)}
    return [message for message in turns if message["content"] is not None or "tool_calls" in message]


def check_plain(name: str, value: Any) -> None:
    """Raises ApiError unless the value of a field that changes nothing is small: a number, a boolean, null, a short
    text, or a few of these in a list or an object."""
    values = value if isinstance(value, dict | list) else [value]
    small = len(values) <= _MOST_PLAIN
    if small and isinstance(value, dict):
        values = [*value, *value.values()]
    if not small or not all(isinstance(item, bool | int | float | None) or _is_short(item) for item in values):
        short = f"text of at most {_LONGEST_PLAIN} characters"
        raise refused(name, value, f"null, a boolean, a number, {short}, or at most {_MOST_PLAIN} of these")


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_PLAIN


def usable(given: Any) -> Any:
    """The tools without a search of the web that has no access to the web, which there is nothing to do for."""
    if not isinstance(given, list):
        return given
    without_web = {"type": "web_search", "external_web_access": False}
    return [tool for tool in given if not (isinstance(tool, dict) and without_web.items() <= tool.items())]


def tools(given: Any) -> tuple[list[dict[str, Any]] | None, dict[str, str]]:
    """The tools in the form of a chat, and the namespace of each that has one, by its name. Raises ApiError for tools
    that are no functions."""
    if given is None:
        return None, {}
    if not isinstance(given, list):
        raise refused("tools", given, "a list of tools")
    functions: list[dict[str, Any]] = []
    namespaces: dict[str, str] = {}
    for place, tool in enumerate(given):
        name = f"tools[{place}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind == "namespace":
            inner = tool.get("tools")
            if not isinstance(inner, list) or not isinstance(tool.get("name"), str):
                raise refused(name, tool, 'an object with "name" and a list "tools"')
            for index, inner_tool in enumerate(inner):
                function = _function(f"{name}.tools[{index}]", inner_tool)
                namespaces[str(function["function"].get("name"))] = tool["name"]
                functions.append(function)
        else:
            functions.append(_function(name, tool))
    return functions or None, namespaces


def tool_choice(given: Any) -> Any:
    """A choice in the form of a chat."""
    if not isinstance(given, dict):
        return given
    kind = given.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": given.get("name")}}
    if kind == "allowed_tools":
        allowed = given.get("tools")
        listed = allowed if isinstance(allowed, list) else [allowed]
        return {"type": kind, kind: {"mode": given.get("mode"), "tools": [tool_choice(tool) for tool in listed]}}
    raise refused("tool_choice.type", kind, "function or allowed_tools")


def _function(name: str, tool: Any) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise refused(f"{name}.type", kind if isinstance(tool, dict) else tool, _INSTEAD.get(str(kind), _BUILT_IN))
    allowed = ("name", "description", "parameters", "strict")
    plain = ("type", "defer_loading", "allowed_callers", "async")  # fields that change nothing, like `output_schema`
    for key, value in tool.items():
        if key not in (*allowed, *plain, "output_schema"):
            raise ApiError(400, f"unknown field {name}.{key[:80]}; allowed are {', '.join(allowed)}", "tools")
        if key in plain:
            check_plain(f"{name}.{key}", value)
    if not isinstance(tool.get("output_schema"), dict | None):
        raise refused(f"{name}.output_schema", tool["output_schema"], "an object")
    return {"type": "function", "function": {key: tool[key] for key in allowed if tool.get(key) is not None}}


def _text(name: str, content: Any) -> str:
    """The text of a content: itself, or its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused(name, content, "text, or a list of parts with text")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            texts.append(read_text(f"{name}[{index}].refusal", part.get("refusal")))
        elif kind in _TEXTS:
            texts.append(read_text(f"{name}[{index}].text", part.get("text")))
        else:
            instead = _INSTEAD.get(str(kind), '{"type": "input_text", "text": ...}')
            raise refused(f"{name}[{index}].type", kind if isinstance(part, dict) else part, instead)
    return "\n".join(texts)
