"""The scheduler against a plain model of a holder: the right KV in the right place, and every request ends."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamina.errors import EngineError, InvalidRequest
from lamina.scheduling.kv_shares import Layout, Pages, Share
from lamina.scheduling.request import (
    CloseSequence,
    ForkSequence,
    OpenSequence,
    PageGroup,
    Plan,
    PlannedRow,
    Request,
    SchedulerConfig,
    Sequence,
)
from lamina.scheduling.scheduler import Scheduler
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy, within


@dataclass
class Page:
    """What is stored at each position: the history that the KV was computed from, so that a wrong prefix shows."""

    kv: dict[int, int] = field(default_factory=dict)
    owners: int = 1


@dataclass
class Part:
    tables: list[list[Page | None]]  # by unit; None: behind the window


class OneHolder:
    """The layouts of a single holder with a single KV head."""

    def __init__(self, pages: int) -> None:
        self.capacity = Pages({0: pages})

    def layout(self, length: int) -> Layout:
        return (Share(0, (0,), 0, 1 << 20),)

    def layouts(self, length: int, tokens: int = 0, beside: Iterable[tuple[Layout, int]] = ()) -> tuple[Layout, ...]:
        return (self.layout(length),)

    def reads_locally(self, length: int) -> bool:
        return False

    def substitute(self, share: Share, free: Pages) -> Share | None:
        return None


Groups = tuple[tuple[int, int | str | None], ...]
STREAMING = "streaming(sink=5, recent=7)"
MIXED: Groups = ((1, None), (1, STREAMING), (1, 6))


def most(config: SchedulerConfig, length: int) -> int:
    """The most pages that a sequence needs, where there is one holder."""
    return config.pages_for(OneHolder(0).layout(length), length)[0]


class Holder:
    """Pages of one layer and head each, shared by forks, copied on write, freed behind windows; refuses when short.

    It refuses before it touches its last `hidden` pages, of which the scheduler knows nothing.
    """

    def __init__(self, config: SchedulerConfig, total_pages: int, hidden: int = 0) -> None:
        self.hidden = hidden
        self.size = config.page_size
        self.units = [group.policy or Full() for group in config.page_groups for _ in range(group.layers)]
        self.free = total_pages
        self.parts: dict[int, Part] = {}
        self.applied = 0

    def announce(self, plan: Plan) -> tuple[bool, list[int]]:
        before = copy.deepcopy((self.free, self.parts, self.applied))
        for number, operation in enumerate(plan.operations, plan.first):
            assert number <= self.applied, "an operation was skipped"
            if number == self.applied:
                self.apply(operation)
                self.applied += 1
        for row in plan.rows:
            self.cut(self.parts[row.handle], row.start)
        for row in plan.rows:
            self.reserve(self.parts[row.handle], row.start, row.start + row.count)
        if plan.rows and self.free < self.hidden:
            self.free, self.parts, self.applied = before
            return False, []
        return True, [self.floor(self.parts[row.handle]) for row in plan.rows]

    def apply(self, operation: OpenSequence | ForkSequence | CloseSequence) -> None:
        if isinstance(operation, OpenSequence):
            assert operation.handle not in self.parts
            self.parts[operation.handle] = Part([[] for _ in self.units])
        elif isinstance(operation, ForkSequence):
            parent = self.parts[operation.parent]
            assert operation.length >= self.floor(parent), "forked below the floor"
            pages = -(-operation.length // self.size)
            assert all(len(table) >= pages for table in parent.tables), "forked beyond what is held"
            self.parts[operation.handle] = Part([table[:pages] for table in parent.tables])
            for page in self.pages(self.parts[operation.handle]):
                page.owners += 1
        else:
            part = self.parts.pop(operation.handle)
            for page in self.pages(part):
                self.give_back(page)

    def cut(self, part: Part, start: int) -> None:
        for policy, table in zip(self.units, part.tables, strict=True):
            hidden = policy.seen_from(start) // self.size
            for at, page in enumerate(table):
                gone = at < hidden and at * self.size >= policy.sinks
                if page is not None and (gone or at * self.size >= start):
                    self.give_back(page)
                    table[at] = None
            del table[-(-start // self.size) :]

    def reserve(self, part: Part, start: int, end: int) -> None:
        for table in part.tables:
            assert len(table) >= -(-start // self.size), "a gap"
            if start % self.size and (page := table[start // self.size]) is not None and page.owners > 1:
                self.give_back(page)
                table[start // self.size] = Page(dict(page.kv))
                self.free -= 1
            while len(table) < -(-end // self.size):
                table.append(Page())
                self.free -= 1

    def floor(self, part: Part) -> int:
        floors = [0]
        for policy, table in zip(self.units, part.tables, strict=True):
            gone = next((at for at in range(len(table), 0, -1) if table[at - 1] is None), 0)
            if gone:
                floors.append(policy.returns_to(gone * self.size))
        return max(floors)

    def write(self, handle: int, start: int, tokens: list[int]) -> None:
        """Store KV from `start` on, attending to everything below each token as the layer does."""
        kv = list(accumulate(tokens, lambda before, token: hash((before, token)), initial=0))[1:]
        for policy, table in zip(self.units, self.parts[handle].tables, strict=True):
            for at in range(start, len(tokens)):
                page = table[at // self.size]
                assert page is not None
                assert page.owners == 1, "a shared page is written"
                page.kv[at] = kv[at]
            for key in {*range(policy.seen_from(start), len(tokens)), *range(min(policy.sinks, len(tokens)))}:
                page = table[key // self.size]
                assert page is not None, f"position {key} is gone at {start}"
                assert page.kv[key] == kv[key], f"position {key} is wrong at {start}"

    def give_back(self, page: Page) -> None:
        page.owners -= 1
        self.free += page.owners == 0

    @staticmethod
    def pages(part: Part) -> list[Page]:
        return [page for table in part.tables for page in table if page is not None]

    def check_integrity(self, total: int) -> None:
        owners: dict[int, int] = {}
        for part in self.parts.values():
            for page in self.pages(part):
                owners[id(page)] = owners.get(id(page), 0) + 1
        assert self.free == total - len(owners)
        assert all(page.owners == owners[id(page)] for part in self.parts.values() for page in self.pages(part))


def next_token(tokens: list[int], sample: int) -> int:
    """The model: one of four tokens, which depends on everything before it."""
    return hash((*tokens, sample)) % 4


class World:
    """A scheduler, its holder, and the batches between them."""

    def __init__(self, config: SchedulerConfig, total_pages: int = 64, hidden: int = 0) -> None:
        self.config = config
        self.total_pages = total_pages
        self.scheduler = Scheduler(config, OneHolder(total_pages))
        self.holder = Holder(config, total_pages, hidden)
        self.sent: list[Plan] = []  # not answered yet; answered in order
        self.running: list[Plan] = []
        self.samples: list[Sequence] = []
        self.computed_tokens = 0
        self.batches: list[Plan] = []
        self.refusals = 0

    def add(self, prompt: list[int], max_tokens: int = 4, **options: object) -> tuple[Sequence, ...]:
        request = Request(str(len(self.samples)), tuple(prompt), max_tokens, **options)  # type: ignore[arg-type]
        samples = self.scheduler.add(request)
        self.samples += samples
        return samples

    def plan(self, lanes: int = 1) -> bool:
        plan = self.scheduler.plan(lanes)
        if plan is not None:
            self.check_budgets(plan)
            self.sent.append(plan)
        return plan is not None

    def check_budgets(self, plan: Plan) -> None:
        assert sum(row.count for row in plan.rows) <= self.config.max_batch_tokens
        assert len({row.handle for row in plan.rows}) == len(plan.rows) <= self.config.max_sequences
        others = {row.sequence for other in self.sent + self.running for row in other.rows}
        assert not others & {row.sequence for row in plan.rows}
        for row in plan.rows:
            assert row.count > 0
            assert row.start == row.sequence.computed
            assert row.sample == (row.start + row.count == len(row.sequence.tokens))
        counts = [row.count for row in plan.rows]
        assert counts == sorted(counts, key=lambda count: count > 1), "decode rows come first"

    def answer(self) -> bool:
        """The holder answers the oldest announcement. Returns whether it accepted."""
        plan = self.sent.pop(0)
        accepted, floors = self.holder.announce(plan)
        if accepted:
            self.batches.append(plan)
            self.scheduler.accepted(plan, Pages({0: self.holder.free}), floors)
            if plan.rows:
                self.running.append(plan)
        else:
            self.refusals += 1
            self.scheduler.refused(plan, Pages({0: self.holder.free}))
        return accepted

    def record(self, index: int = 0) -> None:
        plan = self.running.pop(index)
        tokens = []
        for row in plan.rows:
            self.holder.write(row.handle, row.start, row.sequence.tokens[: row.start + row.count])
            if not row.sequence.sound:
                self.spoil(row)
            self.computed_tokens += row.count
            if row.sample:
                tokens.append(next_token(row.sequence.tokens, row.sequence.sample))
        outcomes = self.scheduler.record(plan, tokens)
        for outcome in outcomes:
            assert outcome.sequence.tokens[-1] == outcome.token
            assert outcome.finish_reason == outcome.sequence.finish_reason

    def drop(self, index: int = 0) -> None:
        """The batch fails half way: some of its KV is written, and is wrong."""
        plan = self.running.pop(index)
        for row in plan.rows:
            self.spoil(row)
        self.scheduler.drop(plan)

    def spoil(self, row: PlannedRow) -> None:
        for table in self.holder.parts[row.handle].tables[:1]:
            page = table[row.start // self.config.page_size]
            assert page is not None
            page.kv[row.start] = -1

    def lose(self) -> None:
        """The holder's answer to the oldest announcement never comes."""
        plan = self.sent.pop(0)
        self.holder.announce(plan)
        self.scheduler.drop(plan)

    def disagree(self) -> None:
        """The holder may accept the oldest announcement, but another refuses it."""
        plan = self.sent.pop(0)
        self.holder.announce(plan)
        self.refusals += 1
        self.scheduler.refused(plan, Pages({0: self.holder.free}))

    def forget(self) -> None:
        """The holder loses what it has stored."""
        for part in self.holder.parts.values():
            for page in self.holder.pages(part):
                page.kv = dict.fromkeys(page.kv, -1)
        self.scheduler.recompute()

    def step(self) -> bool:
        if not self.plan():
            return False
        if self.answer() and self.running:
            self.record()
        self.check_integrity()
        return True

    def finish(self, limit: int = 3000) -> None:
        while self.sent:
            self.answer()
        while self.running:
            self.record()
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            assert self.step(), "work, but no plan"
        assert not self.scheduler.has_work, "it does not end"

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        self.holder.check_integrity(self.total_pages)

    def check_end(self) -> None:
        """Everybody has the tokens that the model gives alone, and no page is lost."""
        for sequence in self.samples:
            request = sequence.request
            assert sequence.finish_reason is not None
            tokens = list(request.prompt)
            reason = None
            while len(tokens) - len(request.prompt) < request.max_tokens and reason is None:
                tokens.append(next_token(tokens, sequence.sample))
                if tokens[-1] in request.stop_token_ids and len(tokens) - len(request.prompt) > request.min_tokens:
                    reason = "stop"
            if sequence.finish_reason == "abort":
                assert tokens[: len(sequence.tokens)] == sequence.tokens
            else:
                assert sequence.tokens == tokens
                assert sequence.finish_reason == (reason or "length")
        if self.scheduler.tree is not None:
            while self.scheduler.tree.evict():
                pass
            self.finish()
        assert not self.holder.parts
        assert self.holder.free == self.total_pages


def config(**changes: object) -> SchedulerConfig:
    values: dict[str, object] = {
        "max_batch_tokens": 16,
        "max_sequences": 8,
        "max_model_len": 64,
        "page_size": 4,
        "page_groups": ((2, None),),
    }
    values |= changes
    values["page_groups"] = tuple(PageGroup(layers, keeping(what)) for layers, what in values["page_groups"])  # type: ignore[attr-defined]
    return SchedulerConfig(**values)  # type: ignore[arg-type]


def keeping(what: int | str | None) -> Policy | None:
    """A sliding window, a policy, or everything."""
    if isinstance(what, str):
        return parse(what)
    return None if what is None else within(Full(), what)


class Machine(RuleBasedStateMachine):
    """Any order of requests, answers, failures and aborts; several plans in flight; little memory."""

    @initialize(
        groups=st.sampled_from(
            [((2, None),), ((1, None), (2, 5)), ((2, 6),), ((1, 3), (1, 9)), MIXED, ((2, STREAMING),)]
        ),
        page_size=st.sampled_from([1, 3, 4]),
        max_batch_tokens=st.sampled_from([1, 3, 7, 16]),
        memory=st.sampled_from([1.0, 1.5, 3.0]),
        hidden=st.sampled_from([0, 0, 5]),
        prefix_cache=st.booleans(),
    )
    def start(
        self,
        groups: Groups,
        page_size: int,
        max_batch_tokens: int,
        memory: float,
        hidden: int,
        prefix_cache: bool,
    ) -> None:
        changes = {"page_groups": groups, "page_size": page_size, "max_batch_tokens": max_batch_tokens}
        total = int(most(config(**changes), 48) * memory) + hidden
        self.world = World(config(**changes, max_model_len=48, prefix_cache=prefix_cache), total, hidden=hidden)

    @rule(
        shared=st.integers(0, 20),
        tail=st.lists(st.integers(0, 2), max_size=8),
        max_tokens=st.integers(1, 19),
        copies=st.sampled_from([1, 1, 2, 4]),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.sampled_from([0, 0, 0, 1]),
        salt=st.sampled_from([None, None, "tenant"]),
        stops=st.sampled_from([frozenset(), frozenset({1})]),
        min_tokens=st.integers(0, 1),
    )
    def add(self, shared: int, tail: list[int], max_tokens: int, copies: int, **options: object) -> None:
        options["stop_token_ids"] = options.pop("stops")
        for _ in range(copies):
            self.world.add([at % 3 for at in range(shared)] + tail + [0], max_tokens, **options)

    @rule()
    def plan(self) -> None:
        self.world.plan()

    @precondition(lambda self: self.world.sent)
    @rule()
    def answer(self) -> None:
        self.world.answer()

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def record(self, data: st.DataObject) -> None:
        self.world.record(data.draw(st.integers(0, len(self.world.running) - 1)))

    @precondition(lambda self: self.world.running)
    @rule()
    def drop(self) -> None:
        self.world.drop()

    @precondition(lambda self: self.world.sent)
    @rule()
    def lose(self) -> None:
        self.world.lose()

    @precondition(lambda self: self.world.sent and self.world.holder.hidden)  # it may cause refusals later
    @rule()
    def disagree(self) -> None:
        self.world.disagree()

    @precondition(lambda self: not self.world.sent and not self.world.running)
    @rule()
    def forget(self) -> None:
        self.world.forget()

    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.world.plan() and self.world.sent and self.world.answer() and self.world.running:
                self.world.record()

    @precondition(lambda self: self.world.samples)
    @rule(data=st.data(), whole=st.booleans(), keep=st.booleans())
    def abort(self, data: st.DataObject, whole: bool, keep: bool) -> None:
        sequence = data.draw(st.sampled_from(self.world.samples))
        if whole:
            self.world.scheduler.abort(sequence.request.id)
        else:
            self.world.scheduler.end(sequence, "abort", keep)

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "world"):
            self.world.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()
            self.world.check_end()
            if not self.world.holder.hidden:
                assert not self.world.refusals, "it counts fewer pages than are taken, or more than come free"


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = Machine.TestCase


def prompt(length: int, salt: int = 0) -> list[int]:
    """Tokens that share no first page with those of another salt."""
    return [1000 * salt + at for at in range(length)]


def batches(world: World) -> list[list[tuple[str, int, int]]]:
    """(request, start, count) of every row, by batch."""
    return [[(row.sequence.request.id, row.start, row.count) for row in plan.rows] for plan in world.batches]


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, lamina.scheduling.scheduler; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prefill_fills_what_decoding_leaves() -> None:
    world = World(config(max_batch_tokens=8, prefix_cache=False))
    world.add(prompt(3), max_tokens=6)
    world.step()
    world.add(prompt(20, 1), max_tokens=2)
    world.finish()
    assert batches(world)[:5] == [
        [("0", 0, 3)],
        [("0", 3, 1), ("1", 0, 7)],
        [("0", 4, 1), ("1", 7, 7)],
        [("0", 5, 1), ("1", 14, 6)],
        [("0", 6, 1), ("1", 20, 1)],
    ]
    world.check_end()


def test_first_come_first_served_within_a_priority() -> None:
    world = World(config(max_sequences=1, prefix_cache=False))
    for salt, priority in enumerate([1, 1, 0, 1, 0]):
        world.add(prompt(5, salt), max_tokens=2, priority=priority)
    world.finish()
    order = list(dict.fromkeys(name for batch in batches(world) for name, _, _ in batch))
    assert order == ["2", "4", "0", "1", "3"]


@pytest.mark.parametrize("groups", [((2, None),), ((1, None), (1, 6)), MIXED])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_under_pressure_the_oldest_always_advances(groups: Groups, prefix_cache: bool) -> None:
    tight = config(page_groups=groups, prefix_cache=prefix_cache, max_sequences=16)
    world = World(tight, 40, hidden=6)
    samples = [world.add(prompt(6, salt), max_tokens=40)[0] for salt in range(16)]
    while world.scheduler.has_work:
        oldest = next((sequence for sequence in samples if sequence.finish_reason is None), None)
        before = len(world.batches)
        world.step()
        if oldest is not None and len(world.batches) > before:
            assert oldest in {row.sequence for row in world.batches[-1].rows}
    world.check_end()
    assert world.scheduler.counters.preempted > 0


def test_the_youngest_is_preempted() -> None:
    world = World(config(max_batch_tokens=32, prefix_cache=False), 24)
    samples = [world.add(prompt(length, length), max_tokens=30)[0] for length in (8, 6, 5)]  # the first runs short
    while world.scheduler.counters.preempted == 0:
        assert world.step()
    assert [sequence.preemptions for sequence in samples] == [0, 0, 1]
    world.finish()
    world.check_end()


def test_admission_leaves_what_those_running_still_need() -> None:
    world = World(config(max_batch_tokens=8), 28)  # 14 page sets
    world.add(prompt(40), max_tokens=1)
    world.plan()
    world.add(prompt(20, 1), max_tokens=1)
    assert not world.plan()
    world.finish()
    world.check_end()


def test_admission_counts_no_prefix_as_room_that_it_shares() -> None:
    world = World(config(max_batch_tokens=64), 28)
    world.add(prompt(33), max_tokens=1)  # leaves 8 page sets in the cache
    world.finish()
    world.add(prompt(14, 1), max_tokens=30)  # takes 4, and leaves 2
    world.step()
    world.add(prompt(44), max_tokens=1)  # needs 3 beside the 8, and one to grow
    world.step()
    assert batches(world)[-1] == [("1", 14, 1)]
    world.finish()
    world.check_end()


def test_preemption_does_not_thrash() -> None:
    """Each sequence grows to eight times its prompt, and all of them to thirteen times the memory."""
    world = World(config(max_sequences=64, max_batch_tokens=64), 80)
    for salt in range(40):
        world.add(prompt(6, salt), max_tokens=46)
    world.finish()
    assert 0 < world.scheduler.counters.preempted <= 2 * 40
    assert world.computed_tokens < 2 * 40 * 51
    world.check_end()


def test_a_shared_prefix_is_computed_once() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    for tail in range(6):
        world.add(prompt(40) + prompt(3, tail + 1), max_tokens=1)
    world.finish()
    assert world.computed_tokens == 40 + 6 * 3
    assert world.scheduler.counters.reused_tokens == 5 * 40
    assert [sequence.reused for sequence in world.samples] == [0] + 5 * [40]
    world.check_end()


def test_who_waits_for_a_prefix_is_overtaken() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    world.add(prompt(40), max_tokens=1)
    world.add(prompt(16) + prompt(4, 1), max_tokens=1)
    world.add(prompt(2, 2), max_tokens=1)
    world.finish()
    assert batches(world)[:2] == [[("0", 0, 40), ("2", 0, 2)], [("1", 16, 4)]]
    world.check_end()


def test_nobody_waits_for_a_less_urgent_writer() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    world.add(prompt(40), max_tokens=1, priority=1)
    world.plan()
    world.add(prompt(32) + prompt(4, 1), max_tokens=1, priority=0)
    world.add(prompt(32) + prompt(4, 2), max_tokens=1, priority=1)
    world.plan()
    world.finish()
    assert batches(world)[:3] == [[("0", 0, 40)], [("1", 0, 36)], [("2", 32, 4)]]
    world.check_end()


def test_waiters_compute_for_themselves_when_the_writer_goes() -> None:
    world = World(config(max_batch_tokens=64, max_model_len=100), 1000)
    world.add(prompt(40), max_tokens=1)
    for tail in (1, 2):
        world.add(prompt(32) + prompt(3, tail), max_tokens=1)
    world.plan()
    world.answer()
    world.scheduler.abort("0")
    world.drop()
    world.finish()
    assert world.computed_tokens == 32 + 3 + 3  # the first that waited becomes the writer
    world.check_end()


def test_after_a_lost_answer_nothing_is_forked_that_a_window_may_have_left() -> None:
    world = World(config(page_groups=((1, 4),), max_batch_tokens=11))
    world.add(prompt(30), max_tokens=1)
    world.step()
    world.plan()
    world.lose()  # at 11 the window has left all but the page from 8 on, which cannot be cut back to 8
    world.scheduler.abort("0")
    world.finish()
    world.check_end()


def test_after_a_refusal_nothing_is_forked_that_a_window_may_have_left() -> None:
    world = World(config(page_groups=((1, 4),), max_batch_tokens=11))
    world.add(prompt(30), max_tokens=1)
    world.step()
    world.plan()
    world.disagree()  # this holder has cut up to 11, as if the batch were to run
    world.scheduler.abort("0")
    world.finish()
    world.check_end()


@pytest.mark.parametrize("aborted", [False, True])
def test_kv_that_is_not_to_be_kept_never_enters_the_tree(aborted: bool) -> None:
    world = World(config())
    (spoilt,) = world.add(prompt(14), max_tokens=4)
    world.step()
    world.plan()
    world.answer()
    if aborted:
        world.scheduler.abort("0")
    world.scheduler.end(spoilt, "abort", keep=False)
    world.record()
    world.check_integrity()
    (second,) = world.add([*spoilt.tokens, 5], max_tokens=2)
    world.finish()
    assert second.reused == 12  # the prompt's whole pages, from the batch before
    world.check_end()


@pytest.mark.parametrize("waiting", [0, 1])
def test_what_a_first_batch_spoils_is_computed_again(waiting: int) -> None:
    world = World(config())
    (spoilt,) = world.add(prompt(14), max_tokens=4, n=2)[:1]
    world.plan()
    others = [world.add([*prompt(12), 5], max_tokens=2)[0] for _ in range(waiting)]
    world.plan()
    while world.sent:
        world.answer()
    world.scheduler.end(spoilt, "abort", keep=False)
    world.record()
    world.finish()
    assert [other.reused for other in others] == [12] * waiting  # from the second sample
    assert world.computed_tokens == 14 + 14 + 3 + 2 * waiting
    world.check_end()


def test_an_ended_writer_leaves_what_earlier_batches_brought() -> None:
    world = World(config(max_batch_tokens=8))
    (spoilt,) = world.add(prompt(20), max_tokens=4)
    world.plan()
    (other,) = world.add([*prompt(8), 5], max_tokens=1)  # has the tree split off 8 tokens
    world.plan()
    world.answer()
    world.record()
    assert world.scheduler.tree is not None
    assert world.scheduler.tree.match(tuple(prompt(20))).length == 8
    while not spoilt.in_flight:
        world.step()
        world.plan()
    world.scheduler.end(spoilt, "abort", keep=False)
    world.finish()
    match = world.scheduler.tree.match(tuple(prompt(20)))
    assert (match.length, match.promised, other.reused) == (8, 0, 8)
    world.check_end()


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 11])
def test_samples_share_their_prompt(prefix_cache: bool, length: int) -> None:
    world = World(config(max_sequences=4, prefix_cache=prefix_cache))
    samples = world.add(prompt(length), max_tokens=5, n=4)
    world.finish()
    assert world.computed_tokens == length + 3 + 4 * 4
    assert len({tuple(sample.tokens) for sample in samples}) > 1
    world.check_end()


@pytest.mark.parametrize("total_pages", range(20, 40, 2))
@pytest.mark.parametrize("max_batch_tokens", [1, 16])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_shared_and_copied_pages_are_counted(total_pages: int, max_batch_tokens: int, prefix_cache: bool) -> None:
    tight = config(max_batch_tokens=max_batch_tokens, prefix_cache=prefix_cache)
    world = World(dataclasses.replace(tight, max_model_len=20), total_pages)
    for salt in range(6):
        world.add(prompt(10, salt), max_tokens=10, n=3, stop_token_ids=frozenset({1}))
    world.finish()
    assert world.refusals == 0
    world.check_end()


def test_samples_go_on_when_the_first_is_ended() -> None:
    world = World(config())
    first, second = world.add(prompt(6), max_tokens=3, n=2)
    world.scheduler.end(first, "abort")
    world.finish()
    assert second.finish_reason == "length"
    world.check_end()


def test_samples_without_room_wait_like_anyone() -> None:
    world = World(config(max_sequences=2, prefix_cache=False))
    world.add(prompt(9), max_tokens=5, n=3)
    world.finish()
    assert world.computed_tokens == 9 + 1 + 9 + 3 * 4
    world.check_end()


def test_the_next_turn_of_a_chat_starts_from_the_last() -> None:
    world = World(config())
    (first,) = world.add(prompt(6), max_tokens=7)
    world.finish()
    (second,) = world.add([*first.tokens, 7, 7, 7], max_tokens=3)
    world.finish()
    assert second.reused == 12  # of 13 tokens the last was never fed back
    world.check_end()


def test_salts_keep_tenants_apart() -> None:
    world = World(config())
    for salt in ("a", "b", None):
        (sequence,) = world.add(prompt(12), max_tokens=2, salt=salt)
        world.finish()
        assert sequence.reused == 0
    (sequence,) = world.add(prompt(12), max_tokens=2, salt="a")
    world.finish()
    assert sequence.reused == 11
    world.check_end()


def test_a_full_cache_makes_room_for_requests() -> None:
    world = World(config(), 40)
    for salt in range(10):
        world.add(prompt(30, salt), max_tokens=8)
        world.finish()
    assert world.scheduler.counters.evicted > 0
    assert world.scheduler.counters.preempted == world.refusals == 0
    world.check_end()


def test_a_failed_batch_is_planned_again() -> None:
    world = World(config(max_batch_tokens=8))
    world.add(prompt(20), max_tokens=3)
    world.step()
    world.plan()
    world.answer()
    world.drop()
    world.finish()
    assert batches(world)[1] == batches(world)[2] == [("0", 8, 8)]
    world.check_end()


def test_lost_kv_is_computed_again() -> None:
    world = World(config())
    for salt in range(3):
        world.add(prompt(14, salt), max_tokens=4)
    world.step()
    world.plan()
    with pytest.raises(EngineError, match="1 plans in flight"):
        world.scheduler.recompute()
    world.answer()
    world.record()
    world.forget()
    world.finish()
    assert world.computed_tokens == 2 * 16 + 3 * 17
    world.check_end()


def test_ending_in_flight_loses_the_token_and_frees_the_kv() -> None:
    world = World(config(prefix_cache=False))
    (sequence,) = world.add(prompt(6), max_tokens=3)
    world.plan()
    world.answer()
    assert world.scheduler.abort("0") == (sequence,)
    assert world.scheduler.abort("0") == ()
    world.record()
    assert sequence.tokens == prompt(6)
    plan = world.scheduler.plan()
    assert plan is not None
    assert plan.rows == ()
    assert plan.operations == (CloseSequence(1),)
    world.sent.append(plan)
    world.finish()
    world.check_end()


def test_a_stop_token_counts_after_min_tokens_only() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    (sequence,) = scheduler.add(Request("0", (1, 2), 9, min_tokens=2, stop_token_ids=frozenset({7})))
    reasons = []
    for token in (7, 7, 7):
        plan = scheduler.plan()
        assert plan is not None
        scheduler.accepted(plan, Pages({0: 60}), [0])
        reasons += [outcome.finish_reason for outcome in scheduler.record(plan, [token])]
    assert reasons == [None, None, "stop"]
    assert sequence.tokens == [1, 2, 7, 7, 7]


@pytest.mark.parametrize("groups", [((3, None),), ((1, None), (2, 7)), ((2, 1),), ((1, 5), (1, 11)), MIXED])
@pytest.mark.parametrize("page_size", [1, 4, 5])
@pytest.mark.parametrize("total_pages", [17, 18, 40])
def test_the_longest_request_fits_alone(groups: Groups, page_size: int, total_pages: int) -> None:
    small = config(page_groups=groups, page_size=page_size, max_batch_tokens=9)
    world = World(small, total_pages)
    longest = world.scheduler.longest_possible()
    assert longest == 64 or most(small, longest) <= total_pages < most(small, longest + 1)
    for length in (longest - 3, 1):
        world.add(prompt(length, length), max_tokens=min(64, longest + 1) - length)
    world.finish()
    world.check_end()
    with pytest.raises(InvalidRequest, match=f"length is {min(64, longest + 1)} tokens"):
        world.add(prompt(longest), max_tokens=2)


def test_bad_requests_are_named() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    scheduler.add(Request("a", (1,), 1))
    for request, message in [
        (Request("b", (), 1), "empty"),
        (Request("b", (1,), 0), "max_tokens is 0"),
        (Request("b", (1,), 1, n=0), "n is 0"),
        (Request("b", (1,) * 60, 5), "length is 64 tokens"),
        (Request("a", (1,), 1), "'a' is in use"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            scheduler.add(request)
    small = Scheduler(config(page_groups=((3, None),)), OneHolder(2))
    with pytest.raises(InvalidRequest, match="length is 1 tokens"):
        small.add(Request("c", (1,), 1))


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("running", range(1, 8))
def test_newcomers_are_admitted_while_all_lanes_are_full(lanes: int, running: int) -> None:
    world = World(config(), 400)
    for at in range(running):
        world.add(prompt(4, at), max_tokens=58)
    for turn in range(40):
        if turn == 12:
            newcomer = world.add(prompt(4, 60), max_tokens=4)[0]
        while len(world.running) < lanes and world.plan(lanes):
            assert world.answer()
        world.record()
    assert newcomer.finish_reason == "length"
    assert max(len(plan.rows) for plan in world.batches[-lanes:]) <= -(-running // lanes), "no lane has all"
    world.finish()
    world.check_end()


def test_who_is_refused_alone_ends_and_the_next_has_its_turn() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    samples = [scheduler.add(Request(str(at), (at,) * 9, 3))[0] for at in range(3)]
    hopeless: list[Sequence] = []
    for _ in range(20):
        plan = scheduler.plan()
        assert plan is not None
        if hopeless == samples[:2]:
            scheduler.accepted(plan, Pages({0: 64}), [0] * len(plan.rows))
            break
        hopeless += scheduler.refused(plan, Pages({0: 64}))
        scheduler.check_integrity()
    assert [sequence.finish_reason for sequence in samples] == ["abort", "abort", None]
    assert [row.sequence for row in plan.rows] == samples[2:]


def test_answers_out_of_place_are_errors() -> None:
    scheduler = Scheduler(config(), OneHolder(64))
    scheduler.add(Request("0", (1, 2), 3))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(EngineError, match="before it was accepted"):
        scheduler.record(plan, [1])
    with pytest.raises(EngineError, match="0 floors for 1 rows"):
        scheduler.accepted(plan, Pages({0: 60}), [])
    scheduler.accepted(plan, Pages({0: 60}), [0])
    with pytest.raises(EngineError, match="not waiting for an answer"):
        scheduler.accepted(plan, Pages({0: 60}), [0])
    with pytest.raises(EngineError, match="2 tokens for 1 rows"):
        scheduler.record(plan, [1, 2])
    scheduler.record(plan, [1])
    with pytest.raises(EngineError, match="not in flight"):
        scheduler.record(plan, [1])
