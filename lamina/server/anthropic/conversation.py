"""From the fields of Anthropic's requests to a chat."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from lamina.server.anthropic.schemas import CountTokensRequest, MessagesRequest
from lamina.server.chat.chat_input import ChatInput, joined
from lamina.server.chat.thinking import Thinking, read_effort
from lamina.server.http.errors import ApiError, refused
from lamina.server.http.fields import read_text
from lamina.text.messages import MAX_MESSAGES

_SIGNATURE = "lamina-"
_INSTEAD = {
    "image": "text: the model reads no images",
    "document": 'a document whose source is {"type": "text", ...}, or text',
    "search_result": "text",
    "server_tool_use": "tool_use: the server runs no tools",
}
_BLOCKS = {
    "user": ("text", "tool_result", "document"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
_SPELLED = {".function.parameters": ".input_schema", ".function.": ".", "tool_choice.name": "tool_choice.name"}


def chat_input(fields: CountTokensRequest) -> ChatInput:
    """What a request asks for. Raises ApiError, which names the place."""
    if fields.mcp_servers:
        raise refused("mcp_servers", fields.mcp_servers, "null: the client connects to them, and gives their tools")
    choice, parallel = _tool_choice(fields.tool_choice)
    tools = _tools(fields.tools)
    if choice not in (None, "auto", "none") and not tools:
        raise ApiError(400, "tool_choice is given, which is allowed only beside tools", "tool_choice")
    structure, effort = _output_config(fields.output_config)
    messages = _messages(fields)
    chat = ChatInput(
        messages=messages,
        tools=tools or None,
        tool_choice=choice if tools else None,
        parallel_tool_calls=parallel,
        spelled=_SPELLED,
        structure=structure,
        structure_field="output_config.format" if structure else "tools" if tools else "",
        thinking=_thinking(fields.thinking, effort),
    )
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        chat.add_generation_prompt, chat.continue_final_message = False, True
    if isinstance(fields, MessagesRequest):
        sampling = {"temperature": fields.temperature, "top_p": fields.top_p, "top_k": fields.top_k}
        chat.sampling = sampling | {"stop": fields.stop_sequences}
        chat.max_tokens, chat.bound = fields.max_tokens, True
    return chat


def signature(thought: str, omitted: bool) -> str:
    """The signature of a block of thinking. Where its text is omitted, the signature brings it back with the history:
    it is encoded, not encrypted, as it is the client's own."""
    return _SIGNATURE + (base64.urlsafe_b64encode(thought.encode("utf-8", "replace")).decode() if omitted else "")


def omits_thinking(fields: CountTokensRequest) -> bool:
    """Whether blocks of thinking have no text."""
    return isinstance(fields.thinking, dict) and fields.thinking.get("display") == "omitted"


def _messages(fields: CountTokensRequest) -> list[dict[str, Any]]:
    entries = fields.messages
    if not isinstance(entries, list) or not entries or len(entries) > MAX_MESSAGES:
        raise refused("messages", entries, f"a list of 1 to {MAX_MESSAGES} messages")
    messages: list[dict[str, Any]] = []
    if fields.system is not None:
        messages.append({"role": "system", "content": _text("system", fields.system, "\n\n")})
    for index, message in enumerate(entries):
        name = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(message, dict) or not isinstance(role, str) or role not in _BLOCKS:
            raise refused(f"{name}.role", role, f"one of {', '.join(_BLOCKS)}")
        content = message.get("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif isinstance(content, list):
            messages += _blocks(f"{name}.content", role, content)
        else:
            raise refused(f"{name}.content", content, "text, or a list of blocks")
    if all(message["role"] == "system" for message in messages):
        raise refused("messages", entries, "at least one block with content of the user")
    return joined(messages)


def _blocks(name: str, role: str, blocks: list[Any]) -> list[dict[str, Any]]:
    """The messages of one message's blocks: results of tools come by themselves."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    turn: dict[str, Any] = {"role": role}
    for index, block in enumerate(blocks):
        place = f"{name}[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(block, dict) or kind not in _BLOCKS[role]:
            raise refused(f"{place}.type", kind, _INSTEAD.get(str(kind), f"one of {', '.join(_BLOCKS[role])}"))
        if kind == "text":
            texts.append(read_text(f"{place}.text", block.get("text")))
        elif kind == "document":
            texts.append(_document(place, block))
        elif kind == "thinking":
            if thought := _thought(place, block):
                turn["reasoning_content"] = thought
        elif kind == "tool_use":
            turn.setdefault("tool_calls", []).append(_call(place, block))
        elif kind == "tool_result":
            if texts:
                messages.append(turn | {"content": "\n".join(texts)})
                texts = []
            content = _text(f"{place}.content", block.get("content") or "")
            if block.get("is_error") and not content:
                content = "error"
            result = {"role": "tool", "tool_call_id": read_text(f"{place}.tool_use_id", block.get("tool_use_id"))}
            messages.append(result | {"content": content})
    if texts or len(turn) > 1 or not messages:
        messages.append(turn | {"content": "\n".join(texts) if texts or "tool_calls" not in turn else None})
    return messages


def _call(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise refused(f"{name}.input", arguments, "an object")
    function = {"name": read_text(f"{name}.name", block.get("name")), "arguments": json.dumps(arguments)}
    return {"id": read_text(f"{name}.id", block.get("id")), "type": "function", "function": function}


def _thought(name: str, block: Mapping[str, Any]) -> str:
    """The text of a block of thinking, which may be in its signature."""
    if thought := read_text(f"{name}.thinking", block.get("thinking")):
        return thought
    signed = str(block.get("signature") or "")
    if not signed.startswith(_SIGNATURE):
        return ""  # another server's: it says nothing here
    try:
        return base64.urlsafe_b64decode(signed.removeprefix(_SIGNATURE)).decode()
    except (binascii.Error, ValueError):
        return ""


def _document(name: str, block: Mapping[str, Any]) -> str:
    source = block.get("source")
    if not isinstance(source, dict) or source.get("type") != "text":
        raise refused(f"{name}.source", source, '{"type": "text", "media_type": "text/plain", "data": ...}')
    title = block.get("title")
    text = read_text(f"{name}.source.data", source.get("data"))
    return text if title is None else f"{read_text(f'{name}.title', title)}\n\n{text}"


def _text(name: str, content: Any, between: str = "\n") -> str:
    """Text, or the texts of blocks. A reference to a tool is the tool's name."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused(name, content, "text, or a list of blocks of text")
    texts = []
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_reference":
            texts.append(f"The tool {read_text(f'{name}[{index}].tool_name', block.get('tool_name'))} can be called.")
        elif kind == "document":
            texts.append(_document(f"{name}[{index}]", block))
        elif kind == "text":
            texts.append(read_text(f"{name}[{index}].text", block.get("text")))
        else:
            raise refused(f"{name}[{index}].type", kind, _INSTEAD.get(str(kind), "text"))
    return between.join(texts)


def _tools(given: Any) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise refused("tools", given, "a list of tools")
    tools = []
    for index, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise refused(f"tools[{index}]", tool, "a tool, which is an object")
        if tool.get("type") not in (None, "custom"):
            instead = "custom, with an input_schema, for a tool that your program runs: the server runs no tools"
            raise refused(f"tools[{index}].type", tool["type"], instead)
        named = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
        tools.append({"type": "function", "function": {name: tool[key] for key, name in named.items() if key in tool}})
    return tools


def _tool_choice(given: Any) -> tuple[Any, bool | None]:
    """The choice in the form of a chat, and whether there may be several calls."""
    if given is None:
        return None, None
    kind = given.get("type") if isinstance(given, dict) else None
    choices: dict[Any, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": "tool"}
    if not isinstance(given, dict) or not isinstance(kind, str) or kind not in choices:
        raise refused("tool_choice", given, f'an object whose "type" is one of {", ".join(choices)}')
    single = given.get("disable_parallel_tool_use")
    if single not in (None, False, True):
        raise refused("tool_choice.disable_parallel_tool_use", single, "true or false")
    choice = choices[kind]
    if kind == "tool":
        choice = {"type": "function", "function": {"name": read_text("tool_choice.name", given.get("name"))}}
    return choice, None if single is None else not single


def _thinking(given: Any, effort: str | None) -> Thinking:
    """Without the field there is no thinking: clients that do not ask for it take the first block for the answer."""
    kind = "disabled" if given is None else given.get("type") if isinstance(given, dict) else None
    enabled = {"enabled": True, "disabled": False, "adaptive": None, "between_tools": None}
    if not isinstance(kind, str) or kind not in enabled:
        raise refused("thinking", given, f'an object whose "type" is one of {", ".join(enabled)}')
    budget = given.get("budget_tokens") if kind == "enabled" else None
    if budget is not None and (type(budget) is not int or not 0 < budget < 2**31):
        raise refused("thinking.budget_tokens", budget, "an integer from 1")
    return Thinking(enabled[kind], None if kind == "disabled" else effort, budget)


def _output_config(given: Any) -> tuple[dict[str, Any], str | None]:
    """Keywords of `SamplingParams` for structured output, and the effort of thinking."""
    if given is None:
        return {}, None
    if not isinstance(given, dict):
        raise refused("output_config", given, 'an object with "effort" and "format"')
    effort = read_effort("output_config.effort", given.get("effort"))
    form = given.get("format")
    if form is None:
        return {}, effort
    schema = form.get("schema") if isinstance(form, dict) and form.get("type") == "json_schema" else None
    if not isinstance(schema, dict):
        raise refused("output_config.format", form, '{"type": "json_schema", "schema": {...}}')
    return {"json_schema": schema}, effort
