"""A control plane over real scheduling and placement, and pools in memory that answer it: no tensors, no engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from scheduler_world import next_token

from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Outcome, Request, ScheduledSequence, SchedulerConfig
from lamina.scheduling.control_plane import ControlPlane, Rebuilt, Step, refusal
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.messages.messages import Announced, Bound, Close, Fork, Open, Row
from lamina_protocols.messages.routes import HolderBatch

PAGE, LAYERS, END = 4, 2, 64
LOCAL = 10  # the number of the pool in the model worker's process


@dataclass
class Page:
    """What is stored at each position: the hash of all tokens up to it. So a page of another prefix shows."""

    kv: dict[int, int] = field(default_factory=dict)
    owners: int = 1


@dataclass
class Part:
    """A part of a sequence: its heads share one table of pages."""

    heads: tuple[int, ...]
    lo: int
    hi: int
    table: list[Page]


class Pool:
    """A holder with so many pages, of one layer and head each. Forks share pages, which are copied on write."""

    def __init__(self, pages: int) -> None:
        self.total = self.free = pages
        self.parts: dict[int, Part] = {}
        self.applied = 0
        self.refuses = False  # the next announcement, whatever it is

    def announce(self, batch: HolderBatch) -> Announced:
        before = copy.deepcopy((self.free, self.parts, self.applied))
        for number, operation in enumerate(batch.operations, batch.first):
            assert number <= self.applied, "an operation was skipped"
            if number == self.applied:
                self._apply(operation)
                self.applied += 1
        for row in batch.rows:
            if row.store:
                self._reserve(row)
        refused, self.refuses = self.free < 0 or self.refuses, False
        if refused:
            self.free, self.parts, self.applied = before
        return Announced(0, 0, not refused, (self.free,), (0,) * len(batch.rows), "no room" if refused else "")

    def _apply(self, operation: object) -> None:
        match operation:
            case Open(handle, _, heads, lo, hi):
                assert handle not in self.parts
                self.parts[handle] = Part(heads, lo, hi, [])
            case Fork(handle, parent, length):
                source = self.parts[parent]
                table = source.table[: -(-max(0, min(length, source.hi) - source.lo) // PAGE)]
                for page in table:
                    page.owners += 1
                self.parts[handle] = Part(source.heads, source.lo, source.hi, table)
            case Close(handle):
                part = self.parts.pop(handle)
                for page in part.table:
                    self._let_go(part, page)
            case Bound(handle, hi):
                part = self.parts[handle]
                assert part.lo < hi <= part.hi
                kept = (hi - part.lo) // PAGE
                for page in part.table[kept:]:
                    self._let_go(part, page)
                del part.table[kept:]
                part.hi = hi
            case _:
                raise AssertionError(operation)

    def _reserve(self, row: Row) -> None:
        part = self.parts[row.handle]
        first, end = row.stored(part.lo, part.hi)
        kept = -(-(first - part.lo) // PAGE)
        assert kept <= len(part.table), "a gap"
        for page in part.table[kept:]:
            self._let_go(part, page)
        del part.table[kept:]
        if (first - part.lo) % PAGE and (last := part.table[-1]).owners > 1:
            self._let_go(part, last)
            part.table[-1] = Page(dict(last.kv))
            self._take(part)
        while len(part.table) < -(-(end - part.lo) // PAGE):
            part.table.append(Page())
            self._take(part)

    def _take(self, part: Part) -> None:
        self.free -= LAYERS * len(part.heads)

    def _let_go(self, part: Part, page: Page) -> None:
        page.owners -= 1
        if not page.owners:
            self.free += LAYERS * len(part.heads)


class World:
    """An engine without tensors: it plans, has the pools answer, and computes.

    Pools 1, 2, ... keep sequences. `local` gives pages to the pool beside the model, which keeps sequences too
    where it is a `tier`.
    """

    def __init__(
        self,
        pages: tuple[int, ...] = (400,),
        *,
        local: int = 0,
        tier: bool = False,
        shard: str = "heads",
        lanes: int = 1,
        batch: int = 16,
        prefix_cache: bool = False,
    ) -> None:
        sizes = dict(enumerate(pages, 1)) | ({LOCAL: local} if local else {})
        self.pools = {number: Pool(size) for number, size in sizes.items()}
        self._shard, self._lanes, self._local_tier = shard, lanes, tier
        self._config = SchedulerConfig(batch, 8, END, PAGE, ((PageGroup(LAYERS),),), prefix_cache)
        self.control = self.engine()
        self.samples: list[ScheduledSequence] = []
        self.in_flight: list[Step] = []
        self.given_up: list[int] = []
        self.said = dict(sizes)  # pages that each pool has left, as it said last
        self.plans: list[list[tuple[str, int, int]]] = []  # request, start and count of each row, by accepted step

    def engine(self) -> ControlPlane:
        """A control plane over these pools, which knows nothing yet."""
        holders = {number: Holder((pool.total,), fused=number == LOCAL) for number, pool in self.pools.items()}
        placement = Placement(
            holders, heads=((4,),), page_size=PAGE, max_model_len=END, shard=self._shard,
            local_pools=(LOCAL,) if LOCAL in holders else (), local_tier=self._local_tier,
        )  # fmt: skip
        return ControlPlane(self._config, placement, StepTuner((self._lanes,)))

    def add(self, prompt: list[int], max_tokens: int = 4, n: int = 1) -> tuple[ScheduledSequence, ...]:
        samples = self.control.scheduler.add(Request(str(len(self.samples)), tuple(prompt), max_tokens, n=n))
        self.samples += samples
        return samples

    def announce(self, step: Step) -> dict[int, Announced]:
        return {number: self.pools[number].announce(batch) for number, batch in step.batches.items()}

    def begin(self) -> bool:
        """Plan a step and have the pools answer. Whether there was one."""
        step = self.control.plan(alone=not self.in_flight)
        if step is None:
            return False
        answers = self.announce(step)
        if guilty := step.at_fault(answers):
            self.give_up(step, guilty)  # the other answers are not read
            return True
        self.said |= {number: answer.free_pages[0] for number, answer in answers.items()}
        if refusal(answers) is not None:
            step.refused(answers)
            return True
        step.accepted(answers)
        self.plans.append([(row.sequence.request.id, row.start, row.count) for row in step.rows])
        if step.rows:
            self.in_flight.append(step)
        return True

    def give_up(self, step: Step, guilty: Iterable[int]) -> None:
        """These pools have contradicted the books too often."""
        for each in (*self.in_flight, step):
            each.dropped()
        self.in_flight.clear()
        for number in guilty:
            self.given_up.append(number)
            if number != LOCAL:
                self.lose(number)

    def finish(self, at: int = 0) -> list[Outcome]:
        """Compute a step that was accepted: every row reads what its tokens need, and stores its own."""
        step = self.in_flight.pop(at)
        plan = step.plan
        assert plan is not None
        for source in range(len(plan.rows)):
            self._attend(step, source)
        tokens = [next_token(row.sequence.tokens, row.sequence.sample) for row in plan.rows if row.sample]
        return step.recorded(tokens)

    def _attend(self, step: Step, source: int) -> None:
        row = step.rows[source]
        tokens = row.sequence.tokens[: row.start + row.count]
        kv = list(accumulate(tokens, lambda before, token: hash((before, token)), initial=0))[1:]
        read: dict[int, list[int]] = {head: [] for head in range(4)}
        for number, batch in step.batches.items():
            for route in batch.routes:
                if route.source != source:
                    continue
                part = self.pools[number].parts[route.row.handle]
                if route.row.store:
                    for position in range(*route.stored):
                        page = part.table[(position - part.lo) // PAGE]
                        assert page.owners == 1, "a shared page is written"
                        page.kv[position] = kv[position]
                for position in range(*(route.row.read or (0, 0))):
                    assert part.table[(position - part.lo) // PAGE].kv[position] == kv[position]
                for head in route.heads:
                    read[head] += range(route.row.read[0], min(route.row.read[1], row.start)) if route.row.read else ()
        assert all(sorted(positions) == list(range(row.start)) for positions in read.values())

    def lose(self, number: int) -> Rebuilt:
        """A pool is gone. No step may be in flight."""
        del self.pools[number], self.said[number]
        return self.control.lost([number])

    def empty(self, number: int) -> int:
        """A pool has lost all that it had, and goes on."""
        self.pools[number] = Pool(self.pools[number].total)
        self.said[number] = self.pools[number].total
        return self.control.emptied([number])

    def run(self, limit: int = 2000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            begun = self.begin()
            if self.in_flight:
                self.finish()
            elif not begun:
                break
        assert not self.control.has_work, "it does not end"

    def check(self) -> None:
        """What the control plane believes of pages is what the pools said."""
        control = self.control
        control.scheduler.check_integrity()
        assert all(control.scheduler.ledger.free.get((number, 0), 0) == pages for number, pages in self.said.items())

    def check_end(self, restarted: bool = False) -> None:
        """Every sample has the tokens that the model gives it alone, and no page is kept. One that was `restarted` may
        count too few cached pages: it does not know which pages its predecessor's sequences share."""
        for sequence in self.samples:
            tokens = list(sequence.request.prompt)
            while len(tokens) - len(sequence.request.prompt) < sequence.request.max_tokens:
                tokens.append(next_token(tokens, sequence.sample))
            if sequence.finish_reason == "abort":
                tokens = tokens[: len(sequence.tokens)]
            assert sequence.tokens == tokens
        cached = self.control.scheduler.running.prefix_cache.evictable
        for number, pool in self.pools.items():
            kept = cached.get((number, 0), 0)
            other = pool.total - pool.free - kept
            assert other >= 0 if restarted else other == 0, f"pool {number}: {pool.free} free of {pool.total}"
        self.control.scheduler.running.prefix_cache.clear()
        self.run()
        assert all(pool.free == pool.total and not pool.parts for pool in self.pools.values())
