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
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role in _SYSTEM:
            role = "system" if not turns or (len(turns) == 1 and turns[0]["role"] == "system") else "user"
        last = turns[-1] if turns else None
        if last is None or last["role"] != role or role == "tool":
            turns.append({**message, "role": role})
            continue
        last["content"] = "\n\n".join(filter(None, (last.get("content"), message.get("content")))) or None
        if calls := message.get("tool_calls"):
            last["tool_calls"] = [*last.get("tool_calls", ()), *calls]
        if thought := message.get("reasoning_content"):
            last["reasoning_content"] = "\n\n".join(filter(None, (last.get("reasoning_content"), thought)))
    return turns
