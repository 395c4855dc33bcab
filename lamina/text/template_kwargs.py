"""Variables that a request gives to a model's chat template: `chat_template_kwargs`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lamina.errors import InvalidRequest, cut

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
