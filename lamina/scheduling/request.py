"""The nouns of scheduling: a request, one sample of it, what one batch does, and the limits of a batch.

Plain ints, tuples and lists.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lamina.errors import ContextTooLong, InvalidRequest
from lamina.scheduling.kv_shares import Layout, Pages, Share

if TYPE_CHECKING:
    from lamina.completions import FinishReason


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and when its samples end. The submitter sets every field once.

    `stop_token_ids` includes the model's end-of-text tokens, unless they are to be ignored. A lower `priority` is more
    urgent. Requests share prefixes only with requests of the same `salt`.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    n: int = 1
    priority: int = 0
    salt: Hashable = None


@dataclass(slots=True)
class Rebuild:
    """A lost part of a sequence that is computed again: positions [at, end) are still to be done.

    The shares `missing` store it. `planned` is `at` plus the tokens of the row in flight. With a `source` the rebuild
    waits until that sequence's share is whole up to `length`, and forks it. `lost` is the number of the lost holder.
    """

    missing: Layout
    at: int
    end: int
    planned: int
    source: ScheduledSequence | None = None
    source_handle: int | None = None
    length: int = 0
    lost: int = 0


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """One sample of a request. Only the scheduler and its prefix cache write to it.

    `tokens` are prompt, then output; the first `computed` of them have KV in the holders, under `handle` (None without
    KV: the sample waits, or has ended). The last token's KV is computed when the token is fed.
    """

    request: Request
    sample: int
    arrival: int
    tokens: list[int]
    computed: int = 0
    handle: int | None = None
    planned: int = 0  # `computed` plus the tokens of its row in flight
    finish_reason: FinishReason | None = None
    reused: int = 0  # tokens of its prompt that came from a fork instead of a prefill
    preemptions: int = 0
    sound: bool = True  # whether its KV may enter the prefix cache
    layout: Layout = ()  # the shares of its KV, while it has KV
    rebuild: Rebuild | None = None  # what must be computed again before it can go on

    # For the count of pages.
    floor: int = 0  # the lowest length to which its KV can be cut or forked, by the holders' answers
    shared: dict[Share, int] = field(default_factory=dict)  # tokens of a share that are in pages others may have too
    copies: bool = False  # whether its next write may fall into a shared page, which the holder copies first
    siblings: list[ScheduledSequence] = field(default_factory=list)  # samples that wait for this one's prompt

    order: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = (self.request.priority, self.arrival, self.sample)

    @property
    def in_flight(self) -> bool:
        """Whether a plan that is neither recorded nor undone has a row of it."""
        return self.planned > self.computed or (self.rebuild is not None and self.rebuild.planned > self.rebuild.at)

    def share(self, length: int, shares: Layout | None = None) -> None:
        """Its first `length` tokens, in these shares or all, are in pages now that others may have too."""
        for share in self.layout if shares is None else shares:
            self.shared[share] = max(length, self.shared.get(share, 0))

    def relocate(self, layout: Layout) -> None:
        """It is in this layout now; no other has pages of the shares that are new."""
        self.layout = layout
        self.shared = {share: length for share, length in self.shared.items() if share in layout}

    @property
    def next(self) -> int:
        """The position where its next row begins."""
        return self.computed if self.rebuild is None else self.rebuild.at

    @property
    def left(self) -> int:
        """How many known tokens are to be computed, or computed again, before it can sample (or go on)."""
        return len(self.tokens) - self.computed if self.rebuild is None else self.rebuild.end - self.rebuild.at

    @property
    def longest(self) -> int:
        """The most tokens that will ever have KV: the last one is never fed back."""
        return len(self.request.prompt) + self.request.max_tokens - 1

    def ends_with(self, token: int) -> FinishReason | None:
        """Why the sequence ends with `token`, its last; None where it goes on."""
        generated = len(self.tokens) - len(self.request.prompt)
        if token in self.request.stop_token_ids and generated > self.request.min_tokens:
            return "stop"
        return "length" if generated >= self.request.max_tokens else None


class RetainedKv(NamedTuple):
    """KV of a sequence that holders kept from the previous engine: of its first `computed` tokens, under `handle`."""

    handle: int
    layout: Layout
    computed: int
    floor: int


@dataclass(frozen=True, slots=True)
class OpenSequence:
    """Create `handle`, empty, in the holders that `layout` names."""

    handle: int
    layout: Layout


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


@dataclass(frozen=True, slots=True)
class ReplaceShares:
    """Create `shares` in the place of the lost holder's part of `handle`: empty, or as the first `length` tokens of the
    same shares of `source`."""

    handle: int
    lost: int
    shares: Layout
    source: int | None = None
    length: int = 0


SequenceOperation = OpenSequence | ForkSequence | CloseSequence | ReplaceShares


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """Compute `count` tokens of `sequence` from position `start` on, and sample after them if `sample`. In a `rebuild`
    row they were computed before, and only the missing shares store them."""

    sequence: ScheduledSequence
    handle: int
    start: int
    count: int
    sample: bool
    rebuild: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One batch: every operation that is not accepted yet, numbered from `first`, then the rows, if any."""

    first: int
    operations: tuple[SequenceOperation, ...]
    rows: tuple[PlannedRow, ...]


class Outcome(NamedTuple):
    """One sampled token, and why the sequence ended with it, if it did."""

    sequence: ScheduledSequence
    token: int
    finish_reason: FinishReason | None


class Retention(Protocol):
    """Which tokens of a sequence are kept; `lamina_workers.policies.policy.Policy` implements it."""

    @property
    def sinks(self) -> int:
        """How many of the first tokens are kept."""

    def seen_from(self, start: int) -> int:
        """The lowest position above the sinks that queries at `start` or later see. What lies below is freed with a row
        at `start`."""

    def kept_from(self, start: int) -> int:
        """The lowest position above the sinks that a sequence of floor `start` keeps: means may stand for what is
        seen."""


class PageGroup(NamedTuple):
    """Layers whose KV heads `heads` (None: all) keep what `policy` says (None: everything)."""

    layers: int
    policy: Retention | None = None
    heads: frozenset[int] | None = None

    def cells(self, heads: tuple[int, ...]) -> int:
        """How many of these heads, over all layers, belong to the group."""
        return self.layers * (len(heads) if self.heads is None else len(self.heads.intersection(heads)))

    def kept(self, first: int, end: int, floor: int, start: int, size: int) -> int:
        """How many of the pages [first, end) of a head a sequence of that floor keeps, once a row at `start` has
        come."""
        if self.policy is None:
            return max(0, end - first)
        sinks = min(end, -(-self.policy.sinks // size))
        window = max(first, sinks, self.policy.kept_from(floor) // size, self.policy.seen_from(start) // size)
        return max(0, sinks - first) + max(0, end - window)

    def most(self, first: int, needed: int, length: int, size: int) -> int:
        """The most of `needed` pages from `first` on that a head has at a time, while its sequence grows page by page
        to `length` tokens."""
        if self.policy is None:
            return needed
        sinks, window = -(-self.policy.sinks // size), length - self.policy.seen_from(length) + 1
        return min(needed, max(0, sinks - first) + -(-window // size) + 2)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a batch, and what a token costs. Raises InvalidRequest for a limit below 1.

    `page_groups` says what the model's layers and KV heads keep. A page is `page_size` tokens of one layer and one KV
    head.
    """

    max_batch_tokens: int
    max_sequences: int
    max_model_len: int
    page_size: int
    page_groups: tuple[PageGroup, ...]
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences", "max_model_len", "page_size"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; allowed is 1 or more")

    @property
    def unbounded(self) -> bool:
        """Whether every head keeps everything."""
        return all(group.policy is None for group in self.page_groups)

    def page_set(self, layout: Layout, position: int) -> Pages:
        """The pages of the `page_size` tokens from `position` on: one in every layer and KV head."""
        pages = Pages()
        for share in layout:
            if share.lo <= position < share.hi:
                cells = sum(group.cells(share.heads) for group in self.page_groups)
                pages[share.holder] = pages.get(share.holder, 0) + cells
        return pages

    def held(self, layout: Layout, lo: int, hi: int, floor: int, start: int = 0) -> Pages:
        """The pages between positions lo and hi that a sequence of that floor keeps, once a row at `start` has come.

        The page into which `lo` falls is not counted, that of `hi` is. A share that stores the row has freed every page
        that no query at `start` or later sees.
        """
        size = self.page_size
        pages = Pages()
        for share in layout:
            first, end = -(-max(lo, share.lo) // size), -(-min(hi, share.hi) // size)
            if end <= first:
                continue
            at = min(floor, share.hi), min(start, share.hi)
            kept = sum(group.cells(share.heads) * group.kept(first, end, *at, size) for group in self.page_groups)
            pages[share.holder] = pages.get(share.holder, 0) + kept
        return pages

    def pages_for(self, layout: Layout, length: int, shared: int = 0) -> Pages:
        """The most pages that a sequence of `length` tokens needs when it grows by at most a page at a time and shares
        its first `shared` tokens, which are whole pages, with others."""
        size = self.page_size
        pages = Pages()
        for share in layout:
            needed = -(-(min(length, share.hi) - max(share.lo, shared)) // size)
            if needed <= 0:
                continue
            first = max(share.lo, shared) // size
            most = sum(group.cells(share.heads) * group.most(first, needed, length, size) for group in self.page_groups)
            pages[share.holder] = pages.get(share.holder, 0) + most
        return pages


def check_length(prompt_len: int, max_tokens: int, context: int, possible: int) -> None:
    """Raise InvalidRequest unless a prompt and `max_tokens` further tokens fit into the context and into the KV memory,
    which holds `possible` tokens of one sequence."""
    if prompt_len < 1:
        raise InvalidRequest("the prompt is empty; at least one token is needed")
    if max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {max_tokens}; allowed is 1 or more")
    if prompt_len + max_tokens > context:
        raise ContextTooLong(context, prompt_len, max_tokens)
    if prompt_len + max_tokens > possible + 1:  # the last token is never fed back, so it needs no KV
        raise ContextTooLong(possible + 1, prompt_len, max_tokens, "the KV memory holds no more")
