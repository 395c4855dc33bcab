"""The nouns of scheduling: a request, one sample of it, what one batch does, and the limits of a batch.

Plain ints, tuples and lists.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lamina.errors import ContextTooLong, InvalidRequest
from lamina.kv.kv_shares import Layout, Pages, Part
from lamina.kv.pages import PageGroup, PolicyKv, Runs
from lamina.kv.redundancy import NONE, Redundancy

if TYPE_CHECKING:
    from lamina.completions import FinishReason


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and when its samples end. The submitter sets every field once.

    `stop_token_ids` includes the model's end-of-text tokens, unless they are to be ignored. A lower `priority` is more
    urgent. Requests share prefixes only with requests of the same `salt`. Tenants get equal shares. `policy` is one of
    KV, "" the engine's own. With `max_tokens` 0 its samples end where the prompt is computed.

    The prompt's tokens from `scored_from` on are scored: the log probability of each token that follows, or with
    `pooled` the sum of their hidden states. So they are computed even where a prefix is cached.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    n: int = 1
    priority: int = 0
    salt: Hashable = None
    tenant: str = ""
    policy: str = ""
    scored_from: int | None = None
    pooled: bool = False

    @property
    def scored_to(self) -> int:
        """Behind the last position that is scored: of the prompt's last token no other token follows in it."""
        return len(self.prompt) - (not self.pooled)


@dataclass(slots=True)
class Rebuild:
    """A lost part of a sequence that is computed again: positions [at, end) are still to be done.

    The shares `missing` store it. `planned` is `at` plus the tokens of the row in flight. With a `source` the rebuild
    waits until that sequence's share is whole up to `length`, and forks it. `lost` is the number of the lost holder. It
    waits as well while shares are `read` back.
    """

    missing: Layout
    at: int
    end: int
    planned: int
    source: ScheduledSequence | None = None
    source_handle: int | None = None
    length: int = 0
    lost: int = 0
    read: Layout = ()


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
    turn: int = 0  # the number of the last plan with a row of it
    held: bool = False  # whether what may follow its last token is not known yet, so it cannot sample
    finish_reason: FinishReason | None = None
    reused: int = 0  # tokens of its prompt that came from a fork instead of a prefill
    preemptions: int = 0
    sound: bool = True  # whether its KV may enter the prefix cache
    exact: int = 0  # how many of its first tokens have KV, or will, that no choice of its policy has changed, at least
    layout: Layout = ()  # the shares of its KV, while it has KV
    rebuild: Rebuild | None = None  # what must be computed again before it can go on
    local_copy: tuple[Part, ...] = ()  # what its rows read and store besides, while its prompt or a rebuild is computed
    copied: int = 0  # up to where the copy has KV, with that of a row in flight
    drafts: tuple[int, ...] = ()  # guesses of the tokens that follow, for its next row; the engine sets them
    scored: int | None = None  # up to where the prompt's tokens that are to be scored are; None: none are

    # For the count of pages.
    floor: int = 0  # the lowest length to which its KV can be cut or forked, by the holders' answers
    stored: int = 0  # up to where holders surely have pages of it, which may be beyond `computed`: of rejected drafts
    runs: Runs = field(default_factory=dict)  # by share, the pages that it shares with none
    copies: bool = False  # whether its next write may fall into a shared page, which the holder copies first
    siblings: list[ScheduledSequence] = field(default_factory=list)  # samples that wait for this one's prompt
    forked: set[int] = field(default_factory=set)  # lengths whose states it may share with others
    records: tuple[int, int] = (0, 0)  # lengths whose states it surely has, the older one first: equal where one alone
    keeps_inputs: bool = False  # whether it has pages for the inputs of tokens that follow its states

    order: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = (self.request.priority, self.arrival, self.sample)

    @property
    def in_flight(self) -> bool:
        """Whether a plan that is neither recorded nor undone has a row of it."""
        return self.planned > self.computed or (self.rebuild is not None and self.rebuild.planned > self.rebuild.at)

    @property
    def idle(self) -> bool:
        """Whether a plan may have a row of it."""
        return not (self.in_flight or (self.held and self.left == 1))

    @property
    def next(self) -> int:
        """The position where its next row begins."""
        return self.computed if self.rebuild is None else self.rebuild.at

    @property
    def decodes(self) -> bool:
        """Whether it goes on with its last known token."""
        return self.left == 1 and self.rebuild is None and self.finish_reason is None

    @property
    def left(self) -> int:
        """How many known tokens are to be computed, or computed again, before it can sample (or go on)."""
        return len(self.tokens) - self.computed if self.rebuild is None else self.rebuild.end - self.rebuild.at

    @property
    def own_records(self) -> int:
        """How many pages of each of its states are there and certainly shared with none, once its row in flight is
        stored: records, and one of inputs."""
        lengths = set(self.records)
        if self.planned > self.computed:  # with drafts its states will be those before it
            lengths = {self.records[1], self.computed if self.planned > len(self.tokens) else self.planned}
        return len(lengths - self.forked - {0}) + self.keeps_inputs

    @property
    def takes_records(self) -> bool:
        """Whether its next row takes a record more of each of its states: there is no older one of its own that it
        could give up."""
        older, last = self.records
        return not 0 < older < last or older in self.forked

    @property
    def longest(self) -> int:
        """The most tokens that will ever have KV: the last one is never fed back."""
        return len(self.request.prompt) + max(1, self.request.max_tokens) - 1

    def may_skip(self, length: int) -> bool:
        """Whether nothing but KV is wanted of its first `length` tokens: what is scored is computed."""
        return self.scored is None or min(length, self.request.scored_to) <= self.scored

    def ends_with(self, token: int | None) -> FinishReason | None:
        """Why the sequence ends with `token`, its last (None: it has got none); None where it goes on."""
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
class PlannedRow:
    """Compute `count` tokens of `sequence` from position `start` on, and sample after them if `sample`. In a `rebuild`
    row they were computed before, and only the missing shares store them.

    The last of them may be `drafts`: then a token is sampled after each draft too, which verifies the next one."""

    sequence: ScheduledSequence
    handle: int
    start: int
    count: int
    sample: bool
    rebuild: bool = False
    drafts: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        """How many of its tokens are known to be the sequence's: all but the drafts."""
        return self.count - len(self.drafts)

    @property
    def decodes(self) -> bool:
        """Whether it goes on after the last known token: a row of decode, with or without drafts, or a prompt's last
        token alone."""
        return self.sample and self.known == 1

    @property
    def samples(self) -> int:
        """How many tokens are sampled."""
        return 1 + len(self.drafts) if self.sample else 0

    @property
    def scored(self) -> range:
        """The positions of its prompt that are scored with it: mostly none."""
        scored = self.sequence.scored
        if scored is None or self.rebuild:
            return range(0)
        return range(max(self.start, scored), min(self.start + self.known, self.sequence.request.scored_to))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One batch: its rows, at least one."""

    rows: tuple[PlannedRow, ...]

    @property
    def scored(self) -> list[PlannedRow]:
        """The rows with tokens of prompts that are scored. Once the plan is recorded, there are none."""
        return [row for row in self.rows if row.scored]


class Outcome(NamedTuple):
    """One new token of a sequence, and why the sequence ended with it, if it did. None where it ends without one."""

    sequence: ScheduledSequence
    token: int | None
    finish_reason: FinishReason | None


SNAPSHOT_TOKENS = 1024
"""How far apart states are kept for prefixes: they are as large as the KV of many tokens."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a batch, and what a token costs. Raises InvalidRequest for a limit below 1.

    `page_groups` says what the layers and KV heads of each pool keep. A page is `page_size` tokens of one layer and one
    KV head. A pool of states has no groups; `states` has such pools, with the number of their layers. A page there is
    one record: the state of one layer and head after some tokens. A sequence has two of each, with drafts a page of the
    latest inputs besides, and can be forked only where it has a record. So that prefixes can be shared, prompts are
    computed up to each multiple of `snapshot_tokens` tokens, where the prefix cache keeps the states; None without
    states or prefix cache. A row has `max_drafts` drafts at most. A batch has `max_parts` rows of parts at all holders
    together, and `frame_tokens` tokens at each, once for every part of a sequence there: no frame carries more.
    `pools`: the model gives hidden states to requests that are `pooled`. `of_policy` knows the policies that
    requests may name, and raises a LaminaError for others; without it there are none but the engine's own, "".
    """

    max_batch_tokens: int
    max_sequences: int
    max_model_len: int
    page_size: int
    page_groups: tuple[tuple[PageGroup, ...], ...]
    prefix_cache: bool = True
    states: Mapping[int, int] = field(default_factory=dict)
    snapshot_tokens: int | None = None
    max_drafts: int = 0
    pools: bool = True
    of_policy: Callable[[str], PolicyKv] | None = None
    redundancy: Redundancy = NONE
    max_parts: int = 1 << 12
    frame_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences", "max_model_len", "page_size"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; allowed is 1 or more")
        if self.max_drafts < 0:
            raise InvalidRequest(f"max_drafts is {self.max_drafts}; allowed is 0 or more")
        every = self.snapshot_tokens
        if (every is None) != (not (self.states and self.prefix_cache)) or (every or 0) % self.page_size:
            raise InvalidRequest(
                f"snapshot_tokens is {every}; allowed are multiples of the page size {self.page_size} with states and "
                "prefix cache, else None"
            )

    def policy(self, text: str) -> PolicyKv:
        """What is kept under a policy that a request names. Raises a LaminaError where that cannot be served."""
        if self.of_policy is not None:
            return self.of_policy(text)
        if text:
            raise InvalidRequest(f"policy is {text!r:.80}; allowed with this engine is none")
        return PolicyKv("", self.page_groups)

    def groups(self, policy: str) -> tuple[tuple[PageGroup, ...], ...]:
        """What is kept under a policy, by pool."""
        return self.policy(policy).groups if policy else self.page_groups

    def unbounded(self, policy: str) -> bool:
        """Whether every head keeps everything."""
        return not self.states and all(group.policy is None for groups in self.groups(policy) for group in groups)

    def forks_at(self, sequence: ScheduledSequence, length: int) -> bool:
        """Whether the first `length` tokens of a sequence can be forked."""
        return length in sequence.records if self.states else length >= sequence.floor

    def chunk(self, sequence: ScheduledSequence, most: int) -> int:
        """How many of a sequence's next `most` tokens one row has: it ends where states are kept for others."""
        start, last = sequence.next, len(sequence.request.prompt) - 1
        count = most
        if self.snapshot_tokens is not None:
            count = min(count, self.snapshot_tokens - start % self.snapshot_tokens)
        if self.states and sequence.siblings and start < last:
            count = min(count, last - start)
        return count

    @property
    def record_pages(self) -> int:
        """The most pages that a sequence has of each state."""
        return 3 if self.max_drafts else 2

    def records(self, layout: Layout, times: int = 1) -> Pages:
        """So many records of every state."""
        pages = Pages()
        for share in layout:
            if times and (layers := self.states.get(share.pool)):
                pages[share.at] = pages.get(share.at, 0) + times * layers * len(share.heads)
        return pages

    def page_set(self, layout: Layout, position: int) -> Pages:
        """The pages of the `page_size` tokens from `position` on: one in every layer and KV head. None of states."""
        pages = Pages()
        for share in layout:
            if share.lo <= position < share.hi:
                cells = sum(group.cells(share.heads) for group in self.groups(share.policy)[share.pool])
                if cells:
                    pages[share.at] = pages.get(share.at, 0) + cells
        return pages

    def held(self, layout: Layout, lo: int, hi: int, floor: int, start: int = 0) -> Pages:
        """The pages between positions lo and hi that a sequence of that floor keeps, once a row at `start` has come.

        The page into which `lo` falls is not counted, that of `hi` is. A share that stores the row has freed every page
        that no query at `start` or later sees. States are not counted.
        """
        size = self.page_size
        pages = Pages()
        for share in layout:
            first, end = -(-max(lo, share.lo) // size), -(-min(hi, share.hi) // size)
            if end <= first:
                continue
            bounds = min(floor, share.hi), min(start, share.hi)
            groups = self.groups(share.policy)[share.pool]
            pages_of_share = sum(group.cells(share.heads) * group.kept(first, end, *bounds, size) for group in groups)
            if groups:
                pages[share.at] = pages.get(share.at, 0) + pages_of_share
        return pages

    def pages_for(self, layout: Layout, length: int, shared: int = 0) -> Pages:
        """The most pages that a sequence of `length` tokens needs when it grows by at most a page at a time and shares
        its first `shared` tokens, which are whole pages, with others."""
        size = self.page_size
        pages = self.records(layout, self.record_pages) if self.states else Pages()
        for share in layout:
            needed = -(-(min(length, share.hi) - max(share.lo, shared)) // size)
            if needed <= 0:
                continue
            first = max(share.lo, shared) // size
            groups = self.groups(share.policy)[share.pool]
            pages_of_share = sum(group.cells(share.heads) * group.most(first, needed, length, size) for group in groups)
            if groups:
                pages[share.at] = pages.get(share.at, 0) + pages_of_share
        return pages


def check_length(prompt_len: int, max_tokens: int, context: int, possible: int) -> None:
    """Raise InvalidRequest unless a prompt and `max_tokens` further tokens fit into the context and into the KV memory,
    which holds `possible` tokens of one sequence."""
    if prompt_len < 1:
        raise InvalidRequest("the prompt is empty; at least one token is needed")
    if max_tokens < 0:
        raise InvalidRequest(f"max_tokens is {max_tokens}; allowed is 0 or more")
    if prompt_len + max_tokens > context:
        raise ContextTooLong(context, prompt_len, max_tokens)
    if prompt_len + max(1, max_tokens) > possible + 1:  # the last token is never fed back, so it needs no KV
        raise ContextTooLong(possible + 1, prompt_len, max_tokens, "the KV memory holds no more")


class FrameRoom:
    """What the frames of one batch can still carry, by its config's `max_parts` and `frame_tokens`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._parts, self._tokens = config.max_parts, config.frame_tokens
        self._spare = config.frame_tokens // config.max_batch_tokens  # times that all of a batch may go to one holder

    def limit(self, layout: Layout, count: int) -> int:
        """How many of `count` tokens of a new row there is room for."""
        return self.further(layout, count) if len(layout) <= self._parts else 0

    def further(self, layout: Layout, count: int) -> int:
        """How many of `count` tokens more there is room for in a row of the batch."""
        return min(count, self._tokens // self._times(layout))

    def take(self, layout: Layout, count: int) -> None:
        """A row of these tokens is in the batch."""
        self._parts -= len(layout)
        self.extend(layout, count)

    def extend(self, layout: Layout, count: int) -> None:
        """A row of the batch has these tokens more."""
        self._tokens -= count * self._times(layout)

    def _times(self, layout: Layout) -> int:
        """How often a token goes to one holder, at most."""
        return len(layout) if len(layout) <= self._spare else 1 + len(layout) - len({share.at for share in layout})
