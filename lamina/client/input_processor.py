"""From what callers pass in to requests (`InputProcessor`): token ids, limits and sampling are checked, and nothing is
submitted.

Requests for embeddings are made here too. `embedding` is the way back: from the sum of a prompt's hidden states to its
embedding.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

from lamina.errors import InvalidRequest, cut
from lamina.kv.request import Request, check_length
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.text.messages import check_template_kwargs

if TYPE_CHECKING:
    from lamina.text.structured_output import Grammars
    from lamina.text.tokenizer import Tokenizer

Pooling = Literal["last", "mean", "eos"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""Of which hidden states, behind the last norm, an embedding is made: that of the last token, the mean of all, or that
of the model's end-of-text token, which is appended where the input does not end with it."""


def check_pooling(value: object) -> Pooling:
    """Raises InvalidRequest unless it is one of `POOLINGS`."""
    for pooling in POOLINGS:
        if value == pooling:
            return pooling
    raise InvalidRequest(f"pooling is {cut(value)}; allowed are {', '.join(POOLINGS)}")


def check_dimensions(value: object) -> int | None:
    """Raises InvalidRequest unless it is None or an integer of 1 or more."""
    if value is None or (type(value) is int and value >= 1):
        return value
    raise InvalidRequest(f"dimensions is {cut(value)}; allowed is an integer of 1 or more, or None")


def embedding(
    request: EngineRequest, pooled: Sequence[float], dimensions: int | None = None, normalize: bool = True
) -> tuple[float, ...]:
    """The embedding of a request that has ended, from the sum of its hidden states: their mean, of that the first
    `dimensions`, and with `normalize` divided by its length. Raises InvalidRequest where it has fewer dimensions."""
    count = request.request.scored_to - (request.request.scored_from or 0)
    if dimensions is not None and dimensions > len(pooled):
        raise InvalidRequest(f"dimensions is {dimensions}; allowed with this model are 1 to {len(pooled)}")
    values = [value / count for value in pooled[:dimensions]]
    length = math.hypot(*values) if normalize else 1.0
    return tuple(value / length for value in values) if length else tuple(values)


Prompt: TypeAlias = str | Sequence[int]
Prompts: TypeAlias = Prompt | Sequence[Prompt]
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
Conversations: TypeAlias = Conversation | Sequence[Conversation]


class Prepared(NamedTuple):
    """The token ids of each prompt of a call, and whether the call gave one prompt instead of a list."""

    prompts: list[list[int]]
    one: bool


class InputProcessor:
    """Makes the requests for one model.

    `context` is the most tokens of one sequence, `possible` the most that can have KV, `vocab_size` the rows of the
    model's embedding. Ids of requests begin with `prefix`. `grammars` are those of the same model, if there are any.
    Every method raises InvalidRequest.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int,
        possible: int,
        vocab_size: int,
        generation_config: Mapping[str, Any],
        prefix: str = "",
        grammars: Grammars | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._context = context
        self.possible = possible
        self._generation_config = generation_config
        self._prefix = prefix
        self._ids = itertools.count()
        self._grammars = grammars

    @property
    def max_model_len(self) -> int:
        """The most tokens that one prompt and its output can have."""
        return min(self._context, self.possible + 1)

    def has_room(self, possible: int) -> None:
        """So many tokens of one sequence can have KV from now on. For any thread."""
        self.possible = possible

    @property
    def grammars(self) -> Grammars:
        """The compiler of schemas and grammars. It is made at its first use, because few requests need it."""
        if self._grammars is None:
            from lamina.text.structured_output import Grammars

            eos_ids = [token for token in self.tokenizer.eos_ids if self.tokenizer.knows(token)]
            self._grammars = Grammars(self.tokenizer.to_json, eos_ids, self.vocab_size)
        return self._grammars

    def requests(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        priority: int = 0,
        salt: Hashable = None,
        pooling: Pooling | None = None,
    ) -> list[EngineRequest]:
        """One request for each prompt (token ids), checked but not submitted. A lower `priority` is more urgent.
        Requests share prefixes only with requests of the same `salt`. A schema or grammar is not looked at: see
        `compile`. With `pooling` the sum of the prompt's hidden states is wanted, or that of its last token."""
        if type(priority) is not int or not -(2**31) <= priority < 2**31:
            raise InvalidRequest(f"priority is {cut(priority)}; allowed is an integer from -2^31 to 2^31 - 1")
        filled = params.with_defaults(self._generation_config)
        self._check_token_ids("stop_token_ids", filled.stop_token_ids)
        self._check_token_ids("logit_bias", list(filled.logit_bias))
        limits = [self._most(prompt, filled.max_tokens) for prompt in prompts]
        stops = frozenset(filled.stop_token_ids)
        if not filled.ignore_eos:
            stops |= {token for token in self.tokenizer.eos_ids if token < self.vocab_size}
        return [
            EngineRequest(
                request=Request(
                    id=f"{self._prefix}{next(self._ids)}",
                    prompt=tuple(prompt),
                    max_tokens=max_tokens,
                    min_tokens=filled.min_tokens,
                    stop_token_ids=stops,
                    n=filled.n,
                    priority=priority,
                    salt=salt,
                    policy=filled.policy or "",
                    scored_from=_scored_from(len(prompt), filled, pooling),
                    pooled=pooling is not None,
                ),
                params=filled,
                seed=secrets.randbits(64) if filled.seed is None else filled.seed,
            )
            for prompt, max_tokens in zip(prompts, limits, strict=True)
        ]

    def embeddings(
        self, prompts: Sequence[Sequence[int]], pooling: object, priority: int = 0, salt: Hashable = None
    ) -> list[EngineRequest]:
        """The requests for embeddings of these token ids, pooled in that way: see `POOLINGS`."""
        how = check_pooling(pooling)
        if how == "eos":
            ends = self.tokenizer.eos_ids
            if not ends:
                raise InvalidRequest("pooling is 'eos', but the model has no end-of-text token; allowed are last, mean")
            prompts = [prompt if prompt and prompt[-1] in ends else [*prompt, ends[0]] for prompt in prompts]
        return self.requests(prompts, SamplingParams(max_tokens=0), priority, salt, how)

    def compile(self, params: SamplingParams) -> None:
        """Compile the schema or grammar of `params`, if there is one, so that its errors come before a request is
        submitted. It takes a second at worst."""
        if params.constrained:
            self.grammars.constraints(params, 1)

    def prompts(self, prompts: Prompts) -> Prepared:
        return listed_prompts(prompts, self.tokenizer.encode)

    def conversations(self, messages: Conversations, chat_template_kwargs: object = None) -> Prepared:
        """One conversation, or several, as the model's chat template writes them, with these variables."""
        variables = check_template_kwargs(chat_template_kwargs, self.tokenizer.template_uses)
        return listed_conversations(messages, partial(self.tokenizer.chat, template_kwargs=variables))

    def _most(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """How many tokens may follow a prompt, once both are checked."""
        self._check_token_ids("the prompt", prompt)
        limit = max(1, self.max_model_len - len(prompt)) if max_tokens is None else max_tokens
        check_length(len(prompt), limit, self._context, self.possible)
        return limit

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(f"{name} has token id {token}; allowed are 0 to {self.vocab_size - 1}")


def _scored_from(length: int, params: SamplingParams, pooling: Pooling | None) -> int | None:
    """From which position on a prompt of that length is scored; None: it is not."""
    if pooling is not None:
        return 0 if pooling == "mean" else length - 1
    return None if params.prompt_logprobs is None else 0


def listed_prompts(prompts: Prompts, encode: Callable[[str], list[int]]) -> Prepared:
    """The token ids of one prompt, or of several. Raises InvalidRequest."""
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, str | Sequence):
        raise InvalidRequest(f"prompts is {cut(prompts)}; allowed is text, a list of token ids, or a list of those")
    if is_one(prompts):
        return Prepared([_token_ids("the prompt", prompts, encode)], one=True)
    listed = [_token_ids(f"prompts[{index}]", prompt, encode) for index, prompt in enumerate(prompts)]
    return Prepared(listed, one=False)


def listed_conversations(messages: Any, encode: Callable[[Any], list[int]]) -> Prepared:
    """The token ids of one conversation, or of several."""
    one = not isinstance(messages, Sequence) or not messages or not isinstance(messages[0], list | tuple)
    return Prepared(list(map(encode, [messages] if one else messages)), one)


def _token_ids(name: str, prompt: object, encode: Callable[[str], list[int]]) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest(f"{name} is empty; at least one character is needed")
        return encode(prompt)
    if not isinstance(prompt, Sequence) or not all(type(token) is int for token in prompt):
        raise InvalidRequest(f"{name} is {cut(prompt)}; allowed is text or a list of token ids")
    return list(prompt)


def is_one(prompts: object) -> bool:
    """Whether `prompts` is a single prompt: text, or a list that begins with a token id (or is empty)."""
    return isinstance(prompts, str) or (isinstance(prompts, Sequence) and (not prompts or isinstance(prompts[0], int)))
