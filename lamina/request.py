"""The nouns of scheduling: what was asked, one sample of it, what one batch does, and what memory there is.

Knows nothing of tensors, holders, clocks or the text behind the tokens: ints, tuples and lists only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lamina.errors import InvalidRequest

if TYPE_CHECKING:
    from lamina.prefix_tree import Node
    from lamina.types import FinishReason


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and when its samples end. Set once by whoever submits it.

    `stop_token_ids` holds the model's end-of-text tokens too, unless they are to be ignored. A lower `priority`
    is more urgent. Requests share prefixes only with requests of the same `salt`.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    n: int = 1
    priority: int = 0
    salt: Hashable = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request. Only the scheduler (and its prefix tree) writes to it.

    `tokens` are prompt, then output; the first `computed` of them have their KV in the holders, under `handle`
    (None while it has none: it waits, or it has ended). The last token's KV is computed when it is fed.
    """

    request: Request
    sample: int
    arrival: int
    tokens: list[int]
    computed: int = 0
    handle: int | None = None
    planned: int = 0  # `computed`, and the tokens of its row in flight
    finish_reason: FinishReason | None = None
    reused: int = 0  # tokens of its prompt that it has from a fork instead of a prefill
    preemptions: int = 0
    sound: bool = True  # whether the prefix tree may keep what it computes

    # What its pages are shared with, as far as the scheduler must know to count them.
    floor: int = 0  # the lowest length to which its KV can be cut or forked, as the holders reported it
    shared: int = 0  # its first tokens, whose pages may belong to others too
    copies: bool = False  # its next write may fall into a shared page, which the holder copies first
    node: Node | None = None  # the deepest node of the prefix tree whose pages it shares
    pending: Node | None = None  # the deepest node that it is about to write
    siblings: list[Sequence] = field(default_factory=list)  # samples that wait for this one's prompt

    order: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = (self.request.priority, self.arrival, self.sample)

    @property
    def in_flight(self) -> bool:
        """Whether a row of it is in a plan that has neither been recorded nor undone."""
        return self.planned > self.computed


@dataclass(frozen=True, slots=True)
class OpenSequence:
    """Create `handle`, empty, in the holders."""

    handle: int


@dataclass(frozen=True, slots=True)
class ForkSequence:
    """Create `handle` as the first `length` tokens of `parent`."""

    handle: int
    parent: int
    length: int


@dataclass(frozen=True, slots=True)
class CloseSequence:
    """Forget `handle`."""

    handle: int


SequenceOperation = OpenSequence | ForkSequence | CloseSequence


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """Compute the `count` tokens of `sequence` from position `start` on, and sample after them if `sample`."""

    sequence: Sequence
    handle: int
    start: int
    count: int
    sample: bool


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One batch: every operation that no holder has accepted yet, numbered from `first`, then the rows.

    Without rows it only carries operations.
    """

    first: int
    operations: tuple[SequenceOperation, ...]
    rows: tuple[PlannedRow, ...]


class Outcome(NamedTuple):
    """One sampled token, and why the sequence ended with it, if it did."""

    sequence: Sequence
    token: int
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a batch, and the memory to fill. Raises `InvalidRequest` where no request could ever run.

    `page_groups` describes the holders' layers as (layers x KV heads, sliding window or None for full attention):
    a page is `page_size` tokens of one layer and one KV head.
    """

    max_batch_tokens: int
    max_sequences: int
    max_model_len: int
    page_size: int
    page_groups: tuple[tuple[int, int | None], ...]
    total_pages: int
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences", "max_model_len", "page_size"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; allowed is 1 or more")
        if self.total_pages < self.pages_for(1):
            raise InvalidRequest(
                f"the KV memory has {self.total_pages} pages; one token needs {self.pages_for(1)}, one in each of "
                "the model's layers and KV heads"
            )

    @property
    def page_set(self) -> int:
        """Pages that `page_size` tokens take: one in every layer and KV head."""
        return sum(units for units, _ in self.page_groups)

    def held(self, lo: int, hi: int, start: int) -> int:
        """Pages between positions lo and hi that a sequence keeps when its last row began at `start`.

        The page that `lo` falls into is not counted, the one that `hi` falls into is. A page behind the window of
        the query at `start` has been let go.
        """
        size = self.page_size
        first, end = -(-lo // size), -(-hi // size)
        pages = 0
        for units, window in self.page_groups:
            kept = first if window is None else max(first, (start - window + 1) // size)
            pages += units * max(0, end - kept)
        return pages

    def pages_for(self, length: int) -> int:
        """The most pages that a sequence of `length` tokens needs when it grows by no more than a page at a time."""
        needed = -(-length // self.page_size)
        return sum(
            units * (needed if window is None else min(needed, -(-window // self.page_size) + 2))
            for units, window in self.page_groups
        )

    def longest_possible(self) -> int:
        """The most tokens of one sequence that the context and the KV memory can ever hold."""
        lengths = range(self.max_model_len + 1)
        return bisect_right(lengths, self.total_pages, key=self.pages_for) - 1

    def validate(self, prompt_len: int, max_tokens: int) -> None:
        """Raise `InvalidRequest` unless a prompt of this many tokens can run to `max_tokens`."""
        if prompt_len < 1:
            raise InvalidRequest("the prompt is empty; at least one token is needed")
        if max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {max_tokens}; allowed is 1 or more")
        asked = f"the prompt's {prompt_len} tokens and max_tokens {max_tokens} make {prompt_len + max_tokens}"
        if prompt_len + max_tokens > self.max_model_len:
            raise InvalidRequest(f"{asked}; the context holds at most {self.max_model_len}")
        possible = self.longest_possible() + 1  # the last token is never fed back, so it needs no KV
        if prompt_len + max_tokens > possible:
            raise InvalidRequest(f"{asked}; the KV memory holds at most {possible}")
