"""How a model writes its replies, and what a request makes of that: `ReplyFormat.of(tokenizer).plan(...)`.

plan = ReplyFormat.of(tokenizer).plan(tools, tool_choice, parallel_tool_calls, structure, thinking, template_kwargs)
parts = tokenizer.render_parts(
    plan.messages(messages), tools=plan.tools or None, template_kwargs=plan.template_kwargs
)
params = SamplingParams(..., **plan.params)
parsers = [plan.parser() for _ in range(n)]  # one a sample; None where text is only content
parser.push(event.text)  # deltas; parser.finish() has the last ones, once the sample has ended
parser.calls  # more than 0: the finish reason "stop" becomes "tool_calls"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lamina.errors import InvalidRequest, LaminaError
from lamina.sampling_params import MAX_GRAMMAR
from lamina.server.chat.formats.family import Family, Message, Thought, Vocabulary
from lamina.server.chat.formats.harmony import CHANNEL, Harmony
from lamina.server.chat.formats.hermes import OPEN, Hermes, in_words, system_note
from lamina.server.chat.formats.llama3 import PYTHON_TAG, Llama3
from lamina.server.chat.formats.mistral import CALLS, Mistral
from lamina.server.chat.formats.qwen3_coder import Qwen3Coder
from lamina.server.chat.formats.reply_parser import ReplyParser, Tags
from lamina.server.chat.formats.tools import ToolUse
from lamina.server.chat.thinking import Thinking
from lamina.text.messages import check_template_kwargs
from lamina.text.structured_output import as_rule
from lamina.text.tokenizer import Tokenizer

_KEPT = 64  # formats; and of each, answers to whether the prompt opens the reasoning
_PROBE = ({"role": "user", "content": "."},)


@dataclass(frozen=True, slots=True)
class ReplyPlan:
    """What a request's tools, structure and thinking mean for its prompt, its sampling and its replies.

    `tools` and `template_kwargs` are for `Tokenizer.render_parts`, beside `messages(...)`. `system_note` is what it
    tells the model of tools whose template shows none, else None. `params` are keywords for `SamplingParams`.
    """

    tools: tuple[Mapping[str, Any], ...]
    system_note: str | None
    template_kwargs: Mapping[str, Any]
    params: Mapping[str, Any]
    _family: Family
    _in_words: bool
    _new_parser: Callable[[], ReplyParser] | None

    def parser(self) -> ReplyParser | None:
        """A parser for one sample; None where text is only content."""
        return None if self._new_parser is None else self._new_parser()

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Checked messages (`lamina.text.messages`) as this model's template needs them."""
        written = self._family.messages(_one_system_message([dict(message) for message in messages]))
        return in_words(written, self.system_note) if self._in_words else written


@dataclass(slots=True)
class ReplyFormat:
    """How one model writes replies: its family, by its chat template and special tokens."""

    tokenizer: Tokenizer
    family: Family
    _opened: dict[bytes, bool] = field(default_factory=dict)  # by a hash: variables may have 800 kB

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ReplyFormat:
        """The format of a model; found once."""
        return _format(tokenizer)

    def plan(
        self,
        tools: object = None,
        tool_choice: object = None,
        parallel_tool_calls: object = None,
        structure: Mapping[str, Any] | None = None,
        thinking: Thinking | None = None,
        template_kwargs: object = None,
        continued: bool = False,
    ) -> ReplyPlan:
        """From a request's unchecked fields in OpenAI's chat form, None where one is missing. `structure` has the
        keyword of `SamplingParams` for structured output; beside tools, the model may call or answer in that form, and
        it counts for the content after the reasoning. `continued`: the prompt does not begin the assistant's message,
        or ends within it (`continue_final_message`). Raises InvalidRequest, which names the field. Takes up to a
        millisecond per tool."""
        family, uses = self.family, self.tokenizer.template_uses
        thinking = thinking or Thinking()
        variables = thinking.variables(uses) | check_template_kwargs(template_kwargs, uses)
        use = ToolUse.from_request(tools, tool_choice, parallel_tool_calls)
        tags = None if continued else family.tags
        opened = tags is not None and self._opens(tags, variables)
        thought = None if tags is None else Thought(tags, opened, thinking.tokens(uses))
        params = self._params(use, dict(structure or {}), thought)
        shows_tools = self.tokenizer.template_knows_tools
        hidden = tuple(end for eos in self.tokenizer.eos_ids if (end := self.tokenizer.token(eos)))
        functions = {} if use is None else use.functions

        def parser() -> ReplyParser:
            return family.parser(tags, opened, functions, family.new_call_id, hidden, self._count)

        return ReplyPlan(
            family.tools(use.tools) if use is not None and shows_tools else (),
            None if use is None or shows_tools else system_note(use.tools),
            variables,
            params,
            family,
            not shows_tools,
            None if tags is None and use is None and params.get("skip_special_tokens") is not False else parser,
        )

    def _params(self, use: ToolUse | None, structure: dict[str, Any], thought: Thought | None) -> dict[str, Any]:
        family = self.family
        limited = thought is not None and thought.budget is not None
        if use is not None or limited or (structure and thought is not None):
            rule = as_rule(*next(iter(structure.items()))) if structure else None
            grammar = family.grammar(use, rule, thought)
            if len(grammar) > MAX_GRAMMAR:
                field = "tools make" if use is not None else "response_format makes"
                raise InvalidRequest(f"{field} a grammar of {len(grammar)} characters; allowed are {MAX_GRAMMAR}")
            structure = {"grammar": grammar}
        if family.shows_special and (use is not None or thought is not None):
            structure["skip_special_tokens"] = False
        return structure

    def _opens(self, tags: Tags, variables: Mapping[str, Any]) -> bool:
        """Whether the prompt ends with the opening of the reasoning."""
        key = hashlib.sha256(json.dumps(variables, sort_keys=True).encode()).digest()
        opened = self._opened.get(key)
        if opened is None:
            try:
                text = "".join(self.tokenizer.render_parts(_PROBE, template_kwargs=variables))
            except LaminaError:  # the request's own messages show whether it is theirs
                text = ""
            opened = text.rstrip().endswith(tags.open)
            if len(self._opened) >= _KEPT:
                self._opened.clear()  # another thread may have just written: nobody reads twice
            self._opened[key] = opened
        return opened

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))


@lru_cache(_KEPT)
def _format(tokenizer: Tokenizer) -> ReplyFormat:
    return ReplyFormat(tokenizer, _family(tokenizer))


def _family(tokenizer: Tokenizer) -> Family:
    template, special = tokenizer.chat_template, tokenizer.special_tokens
    family: Callable[[Vocabulary, str], Family] = Hermes
    if CHANNEL in special and CHANNEL in template:
        family = Harmony
    elif "<function=" in template and "<parameter=" in template:
        family = Qwen3Coder
    elif OPEN in template:
        family = Hermes
    elif CALLS in special or CALLS in template:
        family = Mistral
    elif tokenizer.template_knows_tools and (PYTHON_TAG in special or '"parameters": ' in template):
        family = Llama3
    return family(Vocabulary(tokenizer.added_tokens, special), template)


def _one_system_message(messages: Sequence[Message]) -> list[Message]:
    """Several messages of the system or developer at the start as one: templates look only at the first."""
    first = [m for m in messages[: _leading(messages)] if m["content"]]
    if len(first) < 2:
        return list(messages)
    joined = first[0] | {"content": "\n\n".join(m["content"] for m in first)}
    return [joined, *messages[_leading(messages) :]]


def _leading(messages: Sequence[Message]) -> int:
    roles = [message["role"] in ("system", "developer") for message in messages]
    return roles.index(False) if False in roles else len(roles)
