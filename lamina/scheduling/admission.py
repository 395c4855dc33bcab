"""Which waiting sequence gets KV next (`Admission`), and how much of a batch each tenant gets (`FairShare`). Pure.

A sequence gets KV once there is room for all that it has and will have. It is the first of its tenant by order; among
tenants of one priority, the tenant with the least KV comes first.

A batch ends for all of its rows together, so a tenant that asks for little waits for what the others put beside it.
While several tenants have work, a batch takes at most `BESIDE` times as long as a batch of the tenant alone that asks
for least. Its tokens are dealt max-min fairly: each tenant gets an even share, and what it does not need goes to the
others. Callers give the seconds of batches.

A batch cannot be stopped, so the next request waits for the batch under way. A tenant that had work in the last
`REMEMBERED` batches may come back. While there is such a tenant, a batch takes at most `BEFORE` times as long as one of
a single token.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Container, Mapping
from itertools import chain, islice

from lamina.errors import EngineError
from lamina.kv.kv_shares import NO_PAGES, Layout, Pages, under
from lamina.kv.placement import Placement
from lamina.kv.prefix_nodes import Match
from lamina.kv.request import ScheduledSequence, SchedulerConfig
from lamina.kv.running import RunningSequences, order_of

BESIDE = 1.5
BEFORE = 2.0
REMEMBERED = 1024
_KNEE = 16  # tokens that take as long as a batch's fixed part, where nothing was measured near
_WEIGHT = 0.2  # of the newest measurement

_POLICIES = 64  # for which the longest sequence is known at a time


class Admission:
    """The queues. Sequences that wait for a prefix to be computed are in the prefix tree instead."""

    def __init__(self, config: SchedulerConfig, placement: Placement, running: RunningSequences) -> None:
        self._config = config
        self._placement = placement
        self._running = running
        self._waiting: dict[str, list[ScheduledSequence]] = {}  # by tenant, in order; no finished ones
        self._short: dict[str, tuple[ScheduledSequence, tuple[Pages, ...], int]] = {}
        """By tenant: the first, the pages it needs, and how many prefixes had been entered then."""
        self._longest_before_loss: dict[str, int] = {}  # by policy
        self._expected: Placement | None = None  # with all holders that may join
        self._longest_expected: dict[str, int] = {}  # by policy
        self._stranded: dict[ScheduledSequence, None] = {}
        self._longest: tuple[Pages, dict[str, int]] = NO_PAGES, {}
        """The holders' pages, and the longest sequence that they allow, by policy."""

    @property
    def stranded(self) -> tuple[ScheduledSequence, ...]:
        """The sequences that wait for a holder to join, since the present ones can never keep them."""
        return tuple(self._stranded)

    @property
    def queued_tokens(self) -> int:
        """The known tokens of all sequences that wait for room, stranded ones included."""
        return sum(len(sequence.tokens) for sequence in chain(*self._waiting.values(), self._stranded))

    def longest_possible(self, policy: str = "") -> int:
        """The most tokens of one sequence that the context and the holders' memory can ever hold under a policy. Raises
        what `SchedulerConfig.policy` raises."""
        self._config.policy(policy)
        context, capacity = self._config.max_model_len, self._placement.capacity
        if not capacity:  # there is no holder at present
            return context
        if capacity != self._longest[0] or len(self._longest[1]) >= _POLICIES:
            self._longest = capacity, {}
        longest = self._longest[1]
        if policy not in longest:
            longest[policy] = self._longest_at(self._placement, policy)
        return longest[policy]

    def most_hoped(self, policy: str = "") -> int:
        """As `longest_possible`, once lost holders have come back, and all expected ones have joined."""
        present = max(self.longest_possible(policy), self._longest_before_loss.get(policy, 0))
        expected = self._longest_expected
        if self._expected is None:
            return present
        if policy not in expected:
            if len(expected) >= _POLICIES:
                expected.clear()
            expected[policy] = self._longest_at(self._expected, policy)
        return max(present, expected[policy])

    def expect(self, most: Placement) -> None:
        """More holders join where they are wanted, up to these. What fits there is waited for."""
        self._expected = most

    def losing(self) -> None:
        """Holders are about to be lost: what fits now is waited for."""
        if self._placement.capacity:
            policies = islice({"": 0} | self._longest[1] | self._longest_before_loss, _POLICIES)
            self._longest_before_loss = {policy: self.most_hoped(policy) for policy in policies}

    def left(self) -> None:
        self._longest_before_loss.clear()

    def _longest_at(self, placement: Placement, policy: str) -> int:
        context = self._config.max_model_len

        def fits(length: int) -> bool:
            every = (under(layout, policy) for layout in placement.layouts(length))
            return any(placement.capacity.covers(self._config.pages_for(layout, length)) for layout in every)

        if fits(context):  # usual, and much sooner known than by a search
            return context
        return bisect_right(range(1, context + 1), False, key=lambda length: not fits(length))

    def _holds(self, layout: Layout, length: int) -> bool:
        """Whether `length` tokens could ever be kept in this layout."""
        return self._placement.capacity.covers(self._config.pages_for(layout, length))

    def queue(self, sequence: ScheduledSequence) -> None:
        """Have a sequence without KV wait for its turn, unless it has ended."""
        if sequence.finish_reason is None:
            insort(self._waiting.setdefault(sequence.request.tenant, []), sequence, key=order_of)

    def forget(self, sequence: ScheduledSequence) -> None:
        """A sequence has ended, which may wait here."""
        self._stranded.pop(sequence, None)
        queue = self._waiting.get(sequence.request.tenant, [])
        index = bisect_left(queue, sequence.order, key=order_of)
        if index < len(queue) and queue[index] is sequence:
            del queue[index]

    def give_back(self, sequence: ScheduledSequence) -> None:
        """Take an idle sequence's KV away. It waits until it fits whole, and is computed again."""
        self._running.close(sequence)
        self.queue(sequence)

    def preempt(self, sequence: ScheduledSequence) -> None:
        """Give an idle sequence's KV back, since others need the pages."""
        sequence.preemptions += 1
        self._running.counters.preempted += 1
        self.give_back(sequence)

    def look_again(self) -> None:
        """Forget what the first sequences were short of: holders have gone."""
        self._short.clear()

    def joined(self) -> None:
        """A holder has joined, which may keep stranded sequences."""
        self.look_again()
        for sequence in self._stranded:
            self.queue(sequence)
        self._stranded.clear()

    def wanted(self) -> dict[str, int]:
        """About how many tokens the waiting sequences have of each tenant that can be admitted any."""
        first = [sequence for sequence in self._first() if not self._full(sequence) and not self._still_short(sequence)]
        return {
            sequence.request.tenant: len(sequence.tokens) * len(self._waiting[sequence.request.tenant])
            for sequence in first
        }

    def _first(self) -> list[ScheduledSequence]:
        """The first waiting sequence of each tenant."""
        self._waiting = {tenant: queue for tenant, queue in self._waiting.items() if queue}
        return [queue[0] for queue in self._waiting.values()]

    def reclaim(self) -> None:
        """Preempt idle sequences for tenants that wait for pages, of tenants that have more KV and keep as much."""
        for tenant, (sequence, alternatives, _) in self._short.items():
            queue = self._waiting.get(tenant)
            if queue and queue[0] is sequence and self._still_short(sequence):
                victims = (self._victims(sequence, needed) for needed in alternatives)
                for victim in next((alternative for alternative in victims if alternative), []):
                    self.preempt(victim)

    def _victims(self, sequence: ScheduledSequence, needed: Pages) -> list[ScheduledSequence]:
        """The youngest sequences whose preemption makes room for one that needs these pages; none where that takes more
        than its tenant's share."""
        running, tenant, victims = self._running, sequence.request.tenant, []
        room, tokens = running.headroom(), running.tokens_by_tenant()
        for candidate in reversed(running.sequences):
            least = tokens[tenant] + len(sequence.tokens) + len(candidate.tokens)
            less_urgent = candidate.request.priority >= sequence.request.priority and not candidate.in_flight
            if candidate.request.tenant != tenant and less_urgent and tokens[candidate.request.tenant] >= least:
                victims.append(candidate)
                tokens[candidate.request.tenant] -= len(candidate.tokens)
                room += running.own_pages(candidate, candidate.layout)
                if room.covers(needed):
                    return victims
        return []

    def admit(self, tenants: Container[str]) -> ScheduledSequence | None:
        """Give KV to the first waiting sequence of one of these tenants, if it fits. It overtakes sequences that wait
        for a prefix, and those of tenants that have more KV."""
        tokens = self._running.tokens_by_tenant()
        first = [sequence for sequence in self._first() if sequence.request.tenant in tenants]
        first.sort(key=lambda sequence: (sequence.request.priority, tokens[sequence.request.tenant], sequence.order))
        return next(
            (admitted for sequence in first if (admitted := self._admit(self._waiting[sequence.request.tenant]))), None
        )

    def _admit(self, waiting: list[ScheduledSequence]) -> ScheduledSequence | None:
        running, prefix_cache = self._running, self._running.prefix_cache
        while waiting:
            sequence = waiting[0]
            if self._full(sequence) or self._still_short(sequence):
                return None  # without a search of the prefix tree in every step
            match = prefix_cache.match(tuple(sequence.tokens), sequence.request.salt, sequence.request.policy)
            if not sequence.may_skip(max(match.length, match.promised)):
                match = Match()
            if self._worth_waiting(sequence, match):
                prefix_cache.wait(sequence, match)
                del waiting[0]
                continue
            places = self._places(sequence, match)
            if not places:
                if not self._placement.capacity:
                    return None
                self._stranded[waiting.pop(0)] = None
                continue
            place = self._with_room(sequence, places)
            if place is None:
                return None
            layout, match = place
            del waiting[0]
            if self._config.prefix_cache and sequence.preemptions == 0:
                running.counters.looked_up_tokens += len(sequence.tokens)
                running.counters.found_tokens += match.length
            running.open(sequence, layout, match.node, match.length)
            return sequence
        return None

    def admit_siblings(self, first: ScheduledSequence) -> None:
        """Fork the other samples off the first, whose prompt is computed. Samples without room join the queue."""
        running, length = self._running, len(first.request.prompt) - 1
        for sibling in first.siblings:
            waiting = self._waiting.get(sibling.request.tenant)
            turn = not waiting or sibling.order < waiting[0].order
            room = running.headroom().covers(running.needed(sibling, first.layout, None, length))
            forks = length > 0 and self._config.forks_at(first, length)
            if sibling.finish_reason is None and forks and turn and room and not self._full(sibling):
                running.fork(sibling, first, length)
            else:
                self.queue(sibling)
        first.siblings = []

    def _full(self, sequence: ScheduledSequence) -> bool:
        """Whether a sequence's tenant has all the running sequences that it may have."""
        running = sum(other.request.tenant == sequence.request.tenant for other in self._running)
        return running >= self._config.max_sequences

    def _still_short(self, sequence: ScheduledSequence) -> bool:
        """Whether a sequence that was short of pages before still is."""
        short_sequence, alternatives, entered = self._short.get(sequence.request.tenant, (None, (), 0))
        if (
            sequence is not short_sequence
            or not self._running.sequences
            or entered != self._running.prefix_cache.events.entered
        ):
            return False
        room = self._running.headroom()
        return not any(room.covers(needed) for needed in alternatives)

    def _worth_waiting(self, sequence: ScheduledSequence, match: Match) -> bool:
        """Whether a prefix that is being computed saves a page or more, and its writer comes first in order.

        A later writer may wait for sequences that this one must not wait for.
        """
        writer = match.pending.writer if match.pending is not None else None
        gain = match.promised - match.length
        return writer is not None and writer.order < sequence.order and gain >= self._config.page_size

    def _places(self, sequence: ScheduledSequence, match: Match) -> list[tuple[Layout, Match]]:
        """Where the sequence could run to its end, and what it would share of the prefix tree there; the best first. A
        prefix that was found is used where it is, unless only other holders have room."""
        others = ((other.layout, len(other.tokens)) for other in self._running)
        policy, tokens = sequence.request.policy, len(sequence.tokens)
        layouts = [under(layout, policy) for layout in self._placement.layouts(sequence.longest, tokens, others)]
        anew = [(layout, Match()) for layout in layouts if self._holds(layout, sequence.longest)]
        match_layout = () if match.node is None else under(match.node.layout, policy)
        if not match_layout or not self._holds(match_layout, sequence.longest):
            return anew
        holders = {share.holder for share in match_layout}
        return [
            (match_layout, match),
            *((layout, no_match) for layout, no_match in anew if holders.isdisjoint(share.holder for share in layout)),
        ]

    def _with_room(
        self, sequence: ScheduledSequence, places: list[tuple[Layout, Match]]
    ) -> tuple[Layout, Match] | None:
        """The first place that has the room now. A sequence that is alone always fits."""
        running = self._running
        alone = not running.sequences
        room = NO_PAGES if alone else running.headroom()
        alternatives = tuple(running.needed(sequence, layout, match.node, match.length) for layout, match in places)
        for place, needed in zip(places, alternatives, strict=True):
            if room.covers(needed):
                return place
        if alone:
            return places[0]
        self._short[sequence.request.tenant] = sequence, alternatives, running.prefix_cache.events.entered
        return None

    def check_integrity(self) -> None:
        """Raise EngineError if a waiting sequence has KV."""
        for sequence in chain.from_iterable(self._waiting.values()):
            has_kv = sequence.computed or self._running.prefix_cache.knows(sequence)
            if sequence.handle is not None or has_kv:
                raise EngineError(f"sample {sequence.sample} of request {sequence.request.id} waits, but has KV")


class FairShare:
    """Deals the tokens of batches to tenants, and knows how long batches take."""

    def __init__(self) -> None:
        self._batches = 0
        self._last_batches: dict[str, int] = {}  # by tenant: the last batch for which it had work
        self._measured: dict[int, tuple[float, float]] = {}  # tokens and seconds of batches, by the tokens' bit length

    def took(self, tokens: int, seconds: float) -> None:
        """A batch of so many tokens took so many seconds."""
        measured = self._measured.get(tokens.bit_length(), (tokens, seconds))
        mean = [old + _WEIGHT * (new - old) for old, new in zip(measured, (tokens, seconds), strict=True)]
        self._measured[tokens.bit_length()] = mean[0], mean[1]

    def deal(self, wanted: Mapping[str, int], most: int) -> dict[str, int] | None:
        """How many of at most `most` tokens each tenant gets of what it wants, one or more; None where it is alone and
        has been for a while, so that it gets what it likes."""
        self._batches += 1
        self._last_batches |= dict.fromkeys(wanted, self._batches)
        forgotten = self._batches - REMEMBERED
        self._last_batches = {tenant: batch for tenant, batch in self._last_batches.items() if batch > forgotten}
        if len(self._last_batches) < 2 or not wanted:
            return None
        limit = BESIDE * self._seconds(min(wanted.values())) if len(wanted) > 1 else float("inf")
        if len(self._last_batches) > len(wanted):
            limit = min(limit, BEFORE * self._seconds(1))
        return even(wanted, self._within(limit, most))

    def _within(self, seconds: float, most: int) -> int:
        """How many tokens, of at most `most`, a batch can have that is to take so long."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._seconds(middle) <= seconds else (low, middle - 1)
        return low

    def _seconds(self, tokens: int) -> float:
        """How long a batch takes, by the measured ones that are nearest in size."""
        if not self._measured:
            return float(_KNEE + tokens)
        near = min(self._measured, key=lambda bits: (abs(bits - tokens.bit_length()), bits))
        mean, seconds = self._measured[near]
        return seconds * (_KNEE + tokens) / (_KNEE + mean)


def even(wanted: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` dealt max-min fairly: a tenant gets no more than it wants, and less only where the others get at most one
    more. Each tenant gets one, even where there are fewer."""
    dealt: dict[str, int] = {}
    for tenants_left, tenant in zip(
        range(len(wanted), 0, -1), sorted(wanted, key=lambda name: wanted[name]), strict=True
    ):
        dealt[tenant] = max(1, min(wanted[tenant], total // tenants_left))
        total -= dealt[tenant]
    return dealt
