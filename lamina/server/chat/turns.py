"""Messages of dialects whose clients say more than chat templates take: several system messages, also later ones, and
several messages of one role in a row. Many templates refuse these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
