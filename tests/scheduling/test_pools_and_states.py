"""Scheduling over several pools, of KV and of states, against holders that keep them as an ideal worker would."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_world import next_token

from lamina.errors import InvalidRequest
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import Request, ScheduledSequence, SchedulerConfig
from lamina.scheduling.control_plane import ControlPlane, Step, refusal, torn
from lamina.scheduling.step_tuner import StepTuner
from lamina_protocols.messages.messages import Announced, Bound, Close, Fork, Open, Operation, Row
from lamina_protocols.messages.routes import HolderBatch

PAGE, END, EVERY = 4, 64, 8
KV = ((4, 2), (1, 1))  # heads and layers of each pool of KV
STATES = ((3, 2),)


@dataclass(eq=False)
class Record:
    """A page of KV or a record of a state, in all layers and heads of its part; `kv` says of what, by position."""

    kv: dict[int, int] = field(default_factory=dict)
    owners: int = 1


@dataclass
class Part:
    """`table` has pages of KV. Of states there are `now`, after `held` tokens, and `then`, after `before`; behind each
    so many tokens are `kept`, and `past`, as `inputs`. `whole`: `now` is written."""

    pool: int
    cells: int
    lo: int
    hi: int
    table: list[Record] = field(default_factory=list)
    held: int = 0
    before: int = 0
    now: Record | None = None
    then: Record | None = None
    kept: int = 0
    past: int = 0
    inputs: Record | None = None
    whole: bool = True

    @property
    def records(self) -> set[Record]:
        return {record for record in (*self.table, self.now, self.then, self.inputs) if record is not None}

    def starts(self) -> list[tuple[int, int, Record | None]]:
        """Where a row can start: the record's place, how many tokens behind it, and the record."""
        return [(self.held, self.kept, self.now)] * self.whole + [(self.before, self.past, self.then)]


class Store:
    """A holder with so many pages of each pool, of which those from `first_state` on keep states."""

    def __init__(self, pages: Sequence[int], layers: Sequence[int], first_state: int) -> None:
        self.total, self.free = tuple(pages), list(pages)
        self.layers, self.first_state = layers, first_state
        self.parts: dict[int, Part] = {}
        self.applied = 0

    def announce(self, batch: HolderBatch) -> Announced:
        kept = copy.deepcopy((self.free, self.parts, self.applied))
        for number, operation in enumerate(batch.operations, batch.first):
            assert number <= self.applied, "an operation was skipped"
            if number == self.applied:
                self._apply(operation)
                self.applied += 1
        starts = tuple(self._start(row) for row in batch.rows)
        lacks = any(start < row.start for start, row in zip(starts, batch.rows, strict=True))
        for row in () if lacks else batch.rows:
            self._reserve(row)
        if lacks or min(self.free) < 0:
            self.free, self.parts, self.applied = kept
            return Announced(0, 0, False, tuple(self.free), (), "short", starts=starts if lacks else ())
        floors = tuple(self.parts[row.handle].before for row in batch.rows)
        return Announced(0, 0, True, tuple(self.free), floors)

    def _start(self, row: Row) -> int:
        part = self.parts[row.handle]
        if part.pool < self.first_state:
            return row.start
        return max(0, *(min(row.start, at + kept) for at, kept, _ in part.starts() if at <= row.start))

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Open(handle, pool, heads, lo, hi):
                assert handle not in self.parts
                self.parts[handle] = Part(pool, self.layers[pool] * len(heads), lo, hi)
            case Fork(handle, parent, length):
                source = self.parts[parent]
                part = self.parts[handle] = Part(source.pool, source.cells, source.lo, source.hi)
                if source.pool >= self.first_state:
                    assert length in (source.held, source.before), "a fork where no state is"
                    part.held = part.before = length
                    part.now = source.now if length == source.held else source.then
                else:
                    part.table = source.table[: -(-max(0, min(length, source.hi) - source.lo) // PAGE)]
                for record in part.records:
                    record.owners += 1
            case Close(handle):
                part = self.parts.pop(handle)
                for record in part.records:
                    self._let_go(part, record)
            case Bound(handle, hi):
                part = self.parts[handle]
                for page in part.table[(hi - part.lo) // PAGE :]:
                    self._let_go(part, page)
                del part.table[(hi - part.lo) // PAGE :]
                part.hi = hi
            case _:
                raise AssertionError(operation)

    def _reserve(self, row: Row) -> None:
        part = self.parts[row.handle]
        if part.pool >= self.first_state:
            starts = part.starts() if row.start else []
            at, _, source = next((start for start in starts if start[0] <= row.start <= sum(start[:2])), (0, 0, None))
            for record in {part.now, part.then} - {source}:
                self._let_go(part, record)
            part.before, part.past, part.then, part.whole = at, row.start - at, source, False
            drafts = row.chooses and row.count > 1
            part.held, part.kept = (row.start, row.count) if drafts else (row.start + row.count, 0)
            part.now = source if drafts and at == row.start else self._new(part)
            if drafts and part.inputs is None:
                part.inputs = self._new(part)
        elif row.store:
            first, end = row.stored(part.lo, part.hi)
            keeps = -(-(first - part.lo) // PAGE)
            for page in part.table[keeps:]:
                self._let_go(part, page)
            del part.table[keeps:]
            if (first - part.lo) % PAGE and part.table[-1].owners > 1:
                last = part.table.pop()
                self._let_go(part, last)
                part.table.append(self._new(part))
                part.table[-1].kv = dict(last.kv)
            while len(part.table) < -(-(end - part.lo) // PAGE):
                part.table.append(self._new(part))

    def _new(self, part: Part) -> Record:
        self.free[part.pool] -= part.cells
        return Record()

    def _let_go(self, part: Part, record: Record | None) -> None:
        if record is not None:
            record.owners -= 1
            self.free[part.pool] += part.cells * (not record.owners)

    def compute(self, row: Row, kv: list[int]) -> None:
        """Read what the row reads, and store its own: `kv` has the hash of all tokens up to each position."""
        part, end = self.parts[row.handle], row.start + row.count
        if part.pool >= self.first_state:
            if part.before:
                assert part.then is not None
                assert part.then.kv == {part.before - 1: kv[part.before - 1]}, "another state"
            for at in range(part.before, row.start):
                assert part.inputs is not None
                assert part.inputs.kv[at] == kv[at], "other inputs"
            if part.kept and part.inputs is not None:
                part.inputs.kv |= {at: kv[at] for at in range(row.start, end)}
            if part.now is not part.then:
                assert part.now is not None
                assert part.now.owners == 1
                part.now.kv = {part.held - 1: kv[part.held - 1]}
            part.whole = True
            return
        for at in range(*row.stored(part.lo, part.hi)):
            page = part.table[(at - part.lo) // PAGE]
            assert page.owners == 1, "a shared page is written"
            page.kv[at] = kv[at]
        for at in range(*(row.read or (0, 0))):
            assert part.table[(at - part.lo) // PAGE].kv[at] == kv[at]


class World:
    """Holders 1, 2, ..., each with `room` times what a longest sequence takes of each pool. `drafts`: at most, of which
    some are wrong."""

    def __init__(
        self, kv: int, states: int, holders: int, room: float, shard: str = "heads", prefix_cache: bool = True,
        drafts: int = 0,
    ) -> None:  # fmt: skip
        pools = (*KV[:kv], *STATES[:states])
        records = 3 if drafts else 2
        needed = [heads * layers * (END // PAGE if at < kv else records) for at, (heads, layers) in enumerate(pools)]
        pages = tuple(int(each * room) for each in needed)
        self.stores = {n: Store(pages, [layers for _, layers in pools], kv) for n in range(1, holders + 1)}
        keeps_states = {at: layers for at, (_, layers) in enumerate(pools) if at >= kv}
        placement = Placement(
            {number: Holder(pages) for number in self.stores}, heads=(tuple(heads for heads, _ in pools),),
            page_size=PAGE, max_model_len=END, shard=shard, states=keeps_states,
        )  # fmt: skip
        groups = tuple((PageGroup(layers),) if at < kv else () for at, (_, layers) in enumerate(pools))
        snapshots = EVERY if states and prefix_cache else None
        config = SchedulerConfig(16, 8, END, PAGE, groups, prefix_cache, keeps_states, snapshots, drafts)
        self.chance, self.drafts, self.accepted = random.Random(drafts), drafts, 0
        self.control = ControlPlane(config, placement, StepTuner((1,)))
        self.samples: list[ScheduledSequence] = []
        self.refusals = self.steps = 0

    def add(self, prompt: Sequence[int], max_tokens: int = 4, n: int = 1) -> None:
        request = Request(str(len(self.samples)), tuple(prompt), max_tokens, n=n)
        self.samples += self.control.scheduler.add(request)

    def step(self, fails: bool = False) -> bool:
        """One batch, which may fail once it is accepted. Whether there was anything to do."""
        for sequence in self.control.scheduler.decoding() if self.drafts else ():
            sequence.drafts = self._guesses(sequence)
        step = self.control.plan()
        if step is None:
            return False
        self.steps += 1
        answers = {number: self.stores[number].announce(batch) for number, batch in step.batches.items()}
        assert not step.at_fault(answers), "an honest holder would be given up"
        assert not torn(answers)
        if refusal(answers) is not None:
            self.refusals += 1
            step.refused(answers)
            return True
        step.accepted(answers)
        if step.plan is not None and fails:
            step.dropped()
        elif step.plan is not None:
            self._compute(step)
            tokens = [
                next_token([*row.sequence.tokens, *row.drafts[:at]], row.sequence.sample)
                for row in step.rows
                for at in range(row.samples)
            ]
            self.accepted += len(step.recorded(tokens)) - sum(row.sample for row in step.rows)
        self.check()
        return True

    def _guesses(self, sequence: ScheduledSequence) -> tuple[int, ...]:
        tokens = list(sequence.tokens)
        for _ in range(self.chance.randint(0, self.drafts)):
            tokens.append(next_token(tokens, sequence.sample) + (self.chance.random() < 0.2))
        return tuple(tokens[len(sequence.tokens) :])

    def _compute(self, step: Step) -> None:
        for number, batch in step.batches.items():
            for route in batch.routes:
                row = step.rows[route.source]
                assert self.stores[number].parts[route.row.handle].pool == route.pool
                tokens = [*row.sequence.tokens, *step.rows[route.source].drafts][: row.start + row.count]
                hashes = accumulate(tokens, lambda before, token: hash((before, token)), initial=0)
                self.stores[number].compute(route.row, list(hashes)[1:])

    def check(self) -> None:
        scheduler = self.control.scheduler
        scheduler.check_integrity()
        most, closing = scheduler.running.most(), self.control.placement.closing
        for number, store in self.stores.items():
            for pool, (free, total) in enumerate(zip(store.free, store.total, strict=True)):
                parts = [part for part in store.parts.values() if part.pool == pool]
                cells = {id(record): part.cells for part in parts for record in part.records}
                assert free + sum(cells.values()) == total
                assert closing or total - free <= most.get((number, pool), 0), "an honest holder would be given up"

    def run(self, fails: Sequence[bool] = ()) -> None:
        for at in range(3000):
            if not self.step(at < len(fails) and fails[at]):
                break
        assert not self.control.has_work, "it does not end"
        for sequence in self.samples:
            tokens = list(sequence.request.prompt)
            while len(tokens) - len(sequence.request.prompt) < sequence.request.max_tokens:
                tokens.append(next_token(tokens, sequence.sample))
            assert sequence.tokens == tokens
        cached = self.control.scheduler.running.prefix_cache.evictable
        for number, store in self.stores.items():
            assert [free + cached.get((number, pool), 0) for pool, free in enumerate(store.free)] == list(store.total)
        self.control.scheduler.running.prefix_cache.clear()
        while self.step():
            pass
        assert all(store.free == list(store.total) and not store.parts for store in self.stores.values())


SHAPES = [(2, 0), (1, 1), (2, 1), (0, 1)]


@settings(deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    holders=st.integers(1, 3),
    room=st.sampled_from([1.0, 1.6, 4.0]),
    shard=st.sampled_from(["heads", "sequence", "heads+sequence"]),
    prefix_cache=st.booleans(),
    asked=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 2), st.integers(1, 20), st.sampled_from([1, 1, 3])),
        min_size=1,
        max_size=10,
    ),
    fails=st.lists(st.booleans(), max_size=12),
    drafts=st.sampled_from([0, 3]),
)
def test_every_pool_is_counted_and_no_plan_is_refused(
    shape: tuple[int, int],
    holders: int,
    room: float,
    shard: str,
    prefix_cache: bool,
    asked: list[tuple[int, int, int, int]],
    fails: list[bool],
    drafts: int,
) -> None:
    world = World(*shape, holders, room, shard, prefix_cache, drafts)
    for shared, own, max_tokens, n in asked:
        world.add([*range(shared), *[50 + own] * own, 60], max_tokens, n)
    world.run(fails)
    assert any(fails) or not world.refusals


def test_text_with_drafts_is_shared_at_snapshots() -> None:
    """Drafts do not step over the places where states are kept for others."""
    world = World(1, 1, 1, 8.0, drafts=3)
    world.add(range(5), 30)
    while world.step():
        pass
    assert world.accepted > 5
    world.add([*world.samples[0].tokens[:30], 40, 41], 2)
    world.run()
    assert world.samples[1].reused == 24


def test_prompts_are_shared_at_snapshots_alone() -> None:
    world = World(1, 1, 1, 8.0)
    world.add(range(29), 2)
    while world.step():
        pass
    world.add([*range(27), 40, 41], 2)
    while world.step():
        pass
    first, second = world.samples
    assert (first.reused, second.reused) == (0, 24)


def test_snapshots_in_use_give_way_before_a_sequence_does() -> None:
    """The states' pool holds the records of two sequences and little more: prompts leave snapshots there."""
    world = World(1, 1, 1, 2.4)
    for salt in range(2):
        world.add([100 * salt + at for at in range(40)], 8)
    world.run()
    assert world.control.scheduler.counters.preempted == 0
    assert world.control.scheduler.counters.evicted > 0


def test_the_scarcer_pool_says_how_many_sequences_run() -> None:
    world = World(2, 1, 1, 3.0, prefix_cache=False)
    for salt in range(6):
        world.add([100 * salt + at for at in range(5)], 3)
    most = 0
    while world.step():
        most = max(most, len(world.control.scheduler.running))
    assert most == 3


def test_a_lost_state_has_its_sequences_begin_anew() -> None:
    world = World(1, 1, 2, 4.0)
    world.add(range(20), 8)
    for _ in range(5):
        world.step()
    del world.stores[2]
    rebuilt = world.control.lost([2])
    assert (rebuilt.tokens, rebuilt.anew) == (0, 22)
    world.run()


@pytest.mark.parametrize(("states", "every"), [({1: 2}, None), ({1: 2}, 6), ({}, 8)])
def test_snapshots_that_do_not_fit_are_refused(states: dict[int, int], every: int | None) -> None:
    with pytest.raises(InvalidRequest, match="snapshot_tokens"):
        SchedulerConfig(16, 8, END, PAGE, ((PageGroup(1),), ()), states=states, snapshot_tokens=every)
