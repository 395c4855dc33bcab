"""The messages of a conversation: checked, and brought into the form that chat templates expect.

A request may also give variables to the model's chat template, `chat_template_kwargs`: `check_template_kwargs`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lamina.errors import InvalidRequest, cut
from lamina.sampling_params import json_depth

SWITCHES = ("enable_thinking", "thinking")
"""Names by which templates switch reasoning: Qwen3, SmolLM3 and GLM; DeepSeek-V3.1 and Granite."""
EFFORT = "reasoning_effort"
"""How much gpt-oss reasons."""
MAX_VARIABLES = 32
MAX_TEXT = 4096  # characters of a variable

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_OWN = {
    "messages": "messages", "tools": "tools", "documents": "messages", "custom_tools": "tools",
    "add_generation_prompt": "add_generation_prompt", "continue_final_message": "continue_final_message",
    "chat_template": "the model's own template", "bos_token": "the model's own", "eos_token": "the model's own",
    "unk_token": "the model's own", "pad_token": "the model's own",
}  # fmt: skip

ROLES = ("system", "developer", "user", "assistant", "tool")

MAX_MESSAGES = 4096  # a template takes time for each, and one is rendered at a time
_MAX_DEPTH = 64  # of the arguments of a call
_MAX_ARGUMENTS = 1 << 20  # characters of the arguments of all calls in a conversation, as JSON text
_IGNORED = ("annotations", "audio", "parsed")
"""Keys that OpenAI's clients send back with an assistant's message or its parts; templates do not show them."""
_REASONING = ("reasoning_content", "reasoning")
"""The names of an assistant's reasoning, the first one given counts; some templates show it."""
_EMPTY = (*_IGNORED, *_REASONING, "function_call", "refusal", "tool_calls")
"""Keys that these clients send with any message, empty."""


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Messages as `Tokenizer.render_parts` describes them, text parts joined, in the form that templates expect:
    `content` is always text, and the arguments of calls are objects. Raises InvalidRequest, which names the position.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidRequest(
            f"messages is {cut(messages)}; allowed is a list of at least one message, such as "
            "[{'role': 'user', 'content': 'Hi'}]"
        )
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(messages)} messages; allowed are {MAX_MESSAGES}")
    if (size := sum(map(_arguments_size, messages))) > _MAX_ARGUMENTS:  # before any of their values is made
        raise InvalidRequest(f"messages has {size} characters of arguments of calls; allowed are {_MAX_ARGUMENTS}")
    return [_check_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _arguments_size(message: object) -> int:
    """The characters of arguments that are JSON text, in a message of any form."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(calls, list | tuple):
        return 0
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)]
    texts = [function.get("arguments") for function in functions if isinstance(function, Mapping)]
    return sum(len(text) for text in texts if isinstance(text, str))


def _check_message(name: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise InvalidRequest(f"{name} is {cut(message)}; allowed is a mapping with role and content")
    role = message["role"]
    if role not in ROLES:
        raise InvalidRequest(f"{name}.role is {cut(role)}; allowed are {', '.join(ROLES)}")
    of_assistant = role == "assistant"
    more = {"assistant": ("tool_calls", "refusal", *_REASONING), "tool": ("tool_call_id",)}.get(role, ())
    keys = ("role", "content", "name", *more)
    for key, value in message.items():
        is_ignored = value is None or (key in _EMPTY and not value) or (key in _IGNORED and of_assistant)
        if key not in keys and not is_ignored:
            raise InvalidRequest(f"{name} has {cut(key)}; allowed for {role} are {', '.join(keys)}")
    calls = message.get("tool_calls") or []
    content = message.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, Iterable) and not isinstance(content, (str, Mapping)):
        parts = [_check_part(f"{name}.content[{index}]", part, of_assistant) for index, part in enumerate(content)]
        content = "\n".join(parts)
    if refusal := message.get("refusal"):
        check_text(f"{name}.refusal", refusal)
        content = f"{content}\n{refusal}" if isinstance(content, str) and content else content or refusal
    check_text(f"{name}.content", content)
    checked: dict[str, Any] = {"role": role, "content": content}
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            check_text(f"{name}.{key}", message[key])
            checked[key] = message[key]
    for key in _REASONING:
        if of_assistant and message.get(key) and "reasoning_content" not in checked:
            check_text(f"{name}.{key}", message[key])
            checked["reasoning_content"] = message[key]
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InvalidRequest(f"{name}.tool_calls is {cut(calls)}; allowed is a list of calls")
        checked["tool_calls"] = [_check_call(f"{name}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return checked


def _check_call(name: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if (
        not isinstance(call, Mapping)
        or not call.keys() <= {"id", "type", "function", "index"}
        or call.get("type", "function") != "function"
        or not isinstance(function, Mapping)
        or function.keys() - {"parsed_arguments"} != {"name", "arguments"}
    ):
        raise InvalidRequest(
            f'{name} is {cut(call)}; allowed is {{"id": ..., "type": "function", '
            '"function": {"name": ..., "arguments": ...}}'
        )
    check_text(f"{name}.id", call.get("id", ""))
    check_text(f"{name}.function.name", function["name"])
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict) or json_depth(arguments, _MAX_DEPTH) > _MAX_DEPTH:
        raise InvalidRequest(
            f"{name}.function.arguments is {cut(function['arguments'])}; allowed is the JSON text of an object, "
            f"at most {_MAX_DEPTH} deep"
        )
    return {
        "id": call.get("id", ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _check_part(name: str, part: object, of_assistant: bool) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    ignored = {"cache_control", *((*_IGNORED, *_REASONING) if of_assistant else ())}
    if (
        not isinstance(part, Mapping)
        or kind not in (("text", "refusal") if of_assistant else ("text",))
        or part.keys() - ignored != {"type", kind}
    ):
        raise InvalidRequest(f'{name} is {cut(part)}; allowed is {{"type": "text", "text": ...}}')
    check_text(f"{name}.{kind}", part[kind])
    return str(part[kind])


def check_text(name: str, text: object) -> None:
    """Raises InvalidRequest unless it is text that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} is {cut(text)}; allowed is text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} has {text[error.start]!r} at character {error.start}, half of a surrogate pair; "
            "allowed is text that UTF-8 can hold"
        ) from error


def check_template_kwargs(given: object, uses: Callable[[str], bool]) -> dict[str, Any]:
    """Checks `chat_template_kwargs`: at most 32 plain values (text, numbers, true, false, null) by names that the
    template reads (`uses`), or that switch reasoning in other templates. Raises InvalidRequest, which names the
    variable."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or len(given) > MAX_VARIABLES:
        raise InvalidRequest(
            f"chat_template_kwargs is {cut(given)}; allowed is an object of at most {MAX_VARIABLES} plain values"
        )
    for name, value in given.items():
        if name in _OWN:
            raise InvalidRequest(f"chat_template_kwargs has {cut(name)}; use {_OWN[name]} instead")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest(f"chat_template_kwargs has {cut(name)}; allowed are names of variables")
        if name not in (*SWITCHES, EFFORT) and not uses(name):
            raise InvalidRequest(
                f"chat_template_kwargs has {cut(name)}; allowed are variables that the model's chat template reads"
            )
        _check_value(name, value)
    return dict(given)


def _check_value(name: str, value: object) -> None:
    is_plain = value is None or isinstance(value, bool) or (type(value) is int and abs(value) < 2**63)
    is_number = isinstance(value, float) and math.isfinite(value)
    is_text = isinstance(value, str) and len(value) <= MAX_TEXT and value.encode(errors="replace").decode() == value
    if not (is_plain or is_number or is_text):
        raise InvalidRequest(
            f"chat_template_kwargs.{name} is {cut(value)}; allowed are text of at most {MAX_TEXT} characters, numbers, "
            "true, false and null"
        )
