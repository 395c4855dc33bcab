"""A chat as any dialect asks for it (`ChatInput`). Dialects are translated into OpenAI's form of a chat, which the
server uses inside.

Clients of some dialects send messages that many chat templates refuse: several system messages, also later ones, and
several messages of one role in a row. `joined` makes of these what templates take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamina.server.chat.thinking import Thinking

_SYSTEM = ("system", "developer")


def joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with one system message at its beginning and without neighbours of one role, but results of
    tools. A later system message becomes the user's: text that is added at the end leaves all before it in the prefix
    cache. Contents are text, or None beside calls."""
    turns: list[tuple[str, list[dict[str, Any]]]] = []
    for message in messages:
        role = message["role"]
        if role in _SYSTEM:
            role = "system" if not turns or (len(turns) == 1 and turns[0][0] == "system") else "user"
        if turns and turns[-1][0] == role != "tool":
            turns[-1][1].append(message)
        else:
            turns.append((role, [message]))
    return [_turn(role, together) for role, together in turns]


def _turn(role: str, together: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One message of several. Each text is copied once, however many there are."""
    turn = {**together[0], "role": role}
    if len(together) == 1:
        return turn
    turn["content"] = _texts(together, "content")
    if calls := [call for message in together for call in message.get("tool_calls") or ()]:
        turn["tool_calls"] = calls
    if thought := _texts(together, "reasoning_content"):
        turn["reasoning_content"] = thought
    return turn


def _texts(messages: Sequence[dict[str, Any]], field: str) -> str | None:
    return "\n\n".join(text for message in messages if (text := message.get(field))) or None


@dataclass(kw_only=True, slots=True)
class ChatInput:
    """What a dialect has understood of a request. Values of type Any are unchecked: `prepared` checks them, and its
    errors name them as here, but for `messages_field`, `structure_field` and the parts of names in `spelled`, which
    the dialect spells in its own way.

    `messages`: OpenAI's, where an assistant's may have `reasoning_content` and `tool_calls`. `structure`: keywords of
    `SamplingParams` for structured output. `sampling`: fields as `chat.sampling` names them. `max_tokens`: None is what
    the context has room for; where it is a `bound`, it is lowered to that instead of refused. `drop_oldest`: where the
    context is too short, the oldest messages are left out. `truncate`: only so many tokens of the prompt's end are
    kept, -1 is what fits. `echo`: the answer begins with the message that is continued. `top_logprobs`: None is none.
    """

    messages: Any
    messages_field: str = "messages"
    spelled: Mapping[str, str] = field(default_factory=dict)
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    structure: Mapping[str, Any] = field(default_factory=dict)
    structure_field: str = ""
    thinking: Thinking | None = None
    template_kwargs: Any = None

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    truncate: int | None = None
    drop_oldest: bool = False
    echo: bool = False

    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    bound: bool = False
    top_logprobs: int | None = None
    priority: int = 0
    cache_salt: str | None = None
