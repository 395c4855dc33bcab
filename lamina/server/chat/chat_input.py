"""A chat as any dialect asks for it: OpenAI's chat form is the one that is spoken inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lamina.server.chat.thinking import Thinking


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
