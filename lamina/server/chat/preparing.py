"""From a `ChatInput` to a request that can be submitted, with all checks done (`prepared`).

The lengths of prompts are checked before the prompts cost anything. Then they become token ids (`encoded`). Completions
and embeddings use these functions too. Long prompts take a while, so all of this runs on a thread, not on the event
loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.client.input_processor import InputProcessor
from lamina.errors import ContextTooLong, InvalidRequest
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.server.chat.chat_input import ChatInput
from lamina.server.chat.reply_format import ReplyFormat, ReplyPlan
from lamina.server.chat.sampling import blaming, sampling
from lamina.server.frontend import Served
from lamina.server.http.errors import ApiError, refused
from lamina.server.preparation import go_on
from lamina.text.messages import check_messages, check_text

CHARACTERS = 64
"""The most characters per token of the context: a text with more cannot fit, and is refused before it is tokenised."""

MAX_CHARACTERS = 1 << 20
"""Of all prompts of a request together, or what the context can have at most, if that is more. So it is for what an
answer repeats (`echo`), and for the text of /detokenize."""
_UNUSUAL = 6  # characters a token: a text with more for each of the context is long, unless it is an unusual one
_PIECE = 1 << 14  # characters that are tokenised at a time: 0.15 s at worst

_BEGINNING = ("system", "developer")  # messages that stay where the oldest are dropped
TOO_LONG = "context_length_exceeded"
"""The code of errors about prompts that do not fit into the context."""


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A chat that can be submitted. `plan` takes its replies apart; each begins with `prefix`. `structure_field` is
    blamed where its grammar cannot be compiled. `filled`: the answer's bound was lowered to the end of the context."""

    request: EngineRequest
    plan: ReplyPlan
    prefix: str = ""
    structure_field: str = ""
    filled: bool = False

    @property
    def params(self) -> SamplingParams:
        return self.request.params


def prepared(chat: ChatInput, served: Served, salt: tuple[str, str]) -> PreparedChat:
    """The chat with all checks done but the compilation of its grammar. Its messages and tools, which may have
    megabytes, are taken out of `chat`. Raises InvalidRequest, ApiError."""
    inputs = served.inputs
    ids, plan, last = prompt(chat, served)
    room = max(1, inputs.max_model_len - len(ids))
    filled = chat.bound and chat.max_tokens is not None and chat.max_tokens > room
    limit = room if filled or chat.max_tokens is None else chat.max_tokens
    try:
        with blaming(chat.structure_field):
            params = sampling(chat.sampling, inputs, limit, chat.top_logprobs, plan.params)
            (request,) = inputs.requests([ids], params, chat.priority, salt)
    except ContextTooLong as error:
        raise ApiError(400, str(error), chat.messages_field, TOO_LONG) from None
    prefix = last["content"] if chat.echo and last["role"] == "assistant" else ""
    check_echo([prefix], params.n, inputs)
    chat.messages = chat.tools = None
    return PreparedChat(request, plan, prefix, chat.structure_field, filled)


def prompt(chat: ChatInput, served: Served) -> tuple[list[int], ReplyPlan, Mapping[str, Any]]:
    """The prompt's token ids, the plan of its replies, and the last message. Raises InvalidRequest, ApiError."""
    try:
        return _prompt(chat, served)
    except InvalidRequest as error:
        message = str(error)
        for inside, outside in chat.spelled.items():
            message = message.replace(inside, outside)
        if message == str(error):
            raise
        raise type(error)(message) from error


def _prompt(chat: ChatInput, served: Served) -> tuple[list[int], ReplyPlan, Mapping[str, Any]]:
    inputs = served.inputs
    plan = ReplyFormat.of(served.tokenizer).plan(
        chat.tools,
        chat.tool_choice,
        chat.parallel_tool_calls,
        chat.structure,
        chat.thinking,
        chat.template_kwargs,
        continued=chat.continue_final_message or not chat.add_generation_prompt,
    )
    messages = check_messages(chat.messages)
    if not chat.drop_oldest:
        check_length(chat.messages_field, sum(len(message["content"]) for message in messages), inputs)
        return _ids(chat, plan, messages, served), plan, messages[-1]
    limit = inputs.max_model_len - 1 - min(chat.max_tokens or 0, inputs.max_model_len // 2)
    return _fitting(chat, plan, messages, served, limit), plan, messages[-1]


def _ids(chat: ChatInput, plan: ReplyPlan, messages: Sequence[Mapping[str, Any]], served: Served) -> list[int]:
    parts = served.tokenizer.render_parts(
        plan.messages(messages),
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        tools=list(plan.tools) or None,
        template_kwargs=plan.template_kwargs,
    )
    check_characters({chat.messages_field: "".join(parts)}, served.inputs)
    is_whole = chat.truncate is None
    ids = encoded(parts, chat.add_special_tokens, served.inputs, chat.messages_field, is_whole)
    return truncated(chat.truncate, ids, served.inputs, chat.max_tokens)


def _fitting(chat: ChatInput, plan: ReplyPlan, messages: list[dict[str, Any]], served: Served, most: int) -> list[int]:
    """The prompt of at most `most` tokens that leaves out the fewest of the oldest messages. The system's stay, and so
    do the user's last and what follows. Where that is too much, it is the shortest one."""
    begin = next((index for index, message in enumerate(messages) if message["role"] not in _BEGINNING), len(messages))
    turns = [index for index in range(begin, len(messages)) if messages[index]["role"] == "user"]
    starts = sorted({begin, *turns})  # an answer, a call or a result never stands without what it answers
    all_ids = _ids_or_none(chat, plan, messages, served)  # mostly it fits
    if all_ids is not None and len(all_ids) <= most:
        return all_ids
    best = None
    low, high = 1, len(starts) - 1
    while low < high:  # each test renders and tokenises the rest of the conversation
        middle = (low + high) // 2
        ids = _ids_or_none(chat, plan, [*messages[:begin], *messages[starts[middle] :]], served)
        if ids is not None and len(ids) <= most:
            high, best = middle, ids
        else:
            low = middle + 1
    return _ids(chat, plan, [*messages[:begin], *messages[starts[-1] :]], served) if best is None else best


def _ids_or_none(
    chat: ChatInput, plan: ReplyPlan, messages: Sequence[Mapping[str, Any]], served: Served
) -> list[int] | None:
    try:
        return _ids(chat, plan, messages, served)
    except ApiError as error:
        if error.code != TOO_LONG:
            raise
        return None


def check_characters(prompts: Mapping[str, Any], inputs: InputProcessor) -> None:
    """Raises ApiError where one of the texts among `prompts`, by the names of their fields, cannot fit into the
    context, or all together are too much to tokenise for one request."""
    lengths = {name: len(prompt) for name, prompt in prompts.items() if isinstance(prompt, str)}
    for name, length in lengths.items():
        check_length(name, length, inputs)
    total, limit = sum(lengths.values()), most_characters(inputs)
    if total > limit:
        raise ApiError(400, f"prompt has {total} characters in all its texts; allowed are {limit}", "prompt")


def check_length(param: str, length: int, inputs: InputProcessor) -> None:
    """Raises ApiError where a text of `length` characters cannot fit into the context, however it is tokenised."""
    if length > CHARACTERS * inputs.max_model_len:
        raise _too_long(inputs, param, f"{length} characters, more than {CHARACTERS} for each of them")


def most_characters(inputs: InputProcessor) -> int:
    """How many characters all prompts of a request may have together, and what an answer repeats of them."""
    return max(MAX_CHARACTERS, CHARACTERS * inputs.max_model_len)


def check_echo(prefixes: Sequence[str], n: int, inputs: InputProcessor) -> None:
    """Raises ApiError where `n` choices for each of these prefixes repeat too much text."""
    if (size := n * sum(map(len, prefixes))) > (limit := most_characters(inputs)):
        raise ApiError(400, f"echo repeats {size} characters in {n} choices; allowed are {limit}", "echo")


def encoded(
    prompt: str | Sequence[str], special: bool, inputs: InputProcessor, param: str, whole: bool = True
) -> list[int]:
    """The token ids of a text, perhaps in parts, that is needed as a `whole`, or only its end. Raises ApiError where it
    has far more tokens than the context, before all of it is tokenised. For a `PreparationPool`: it ends where the
    client has left."""
    go_on()
    text = prompt if isinstance(prompt, str) else "".join(prompt)
    check_text(param, text)
    limit = inputs.max_model_len
    if whole and len(text) > _UNUSUAL * limit:  # few characters a token would make it too long
        tokens = 0
        for start in range(0, len(text), _PIECE):
            tokens += len(inputs.tokenizer.encode(text[start : start + _PIECE], add_special_tokens=False))
            if tokens > 2 * limit:  # at the edges of pieces there are a few more than in the whole
                raise _too_long(inputs, param, f"more than {2 * limit} tokens")
            go_on()
    return inputs.tokenizer.encode(prompt, special)


def _too_long(inputs: InputProcessor, param: str, has: str) -> ApiError:
    limit = inputs.max_model_len
    message = f"This model's maximum context length is {limit} tokens. However, {param} has {has}. Ask for less"
    return ApiError(400, message, param, "context_length_exceeded")


def truncated(keep: int | None, ids: list[int], inputs: InputProcessor, max_tokens: int | None) -> list[int]:
    """The last `keep` tokens of a prompt (`truncate_prompt_tokens`); -1 is what fits, None is all."""
    if keep is None:
        return ids
    if keep == 0:
        raise refused("truncate_prompt_tokens", keep, "-1, or 1 and more")
    if keep == -1:
        keep = max(1, inputs.max_model_len - (max_tokens or 1))
    return ids[-keep:]
