"""A scheduler and the holders it plans for, without tensors: what is planned is carried out on lists of tokens."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamina.kv import kv_shares
from lamina.kv.kv_shares import Layout, Pages, Share
from lamina.kv.pages import PageGroup
from lamina.kv.request import Plan, PlannedRow, Request, ScheduledSequence, SchedulerConfig
from lamina.scheduling.scheduler import Scheduler
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import Policy, within


@dataclass
class Page:
    """A page of KV: at each position the history from which it was computed, so that a wrong prefix shows."""

    kv: dict[int, int] = field(default_factory=dict)
    owners: int = 1


@dataclass
class Part:
    tables: list[list[Page | None]]  # by unit; None: behind the window
    stored: int = 0  # tokens


class Open(NamedTuple):
    handle: int


class Fork(NamedTuple):
    handle: int
    parent: int
    length: int


class Close(NamedTuple):
    handle: int


Operation = Open | Fork | Close


class OneHolder:
    """The layouts of a single holder with a single KV head, and the operations that wait for it, numbered from `first`
    on, each with the pages that it frees."""

    def __init__(self, pages: int) -> None:
        self.capacity = self.pages = Pages({(0, 0): pages})
        self.waiting: list[tuple[Operation, int]] = []
        self.first = 0
        self.handles: set[int] = set()
        self.last = 0

    @property
    def closing(self) -> Pages:
        return Pages({(0, 0): sum(freed for _, freed in self.waiting)})

    def open(self, layout: Layout) -> int:
        self.last += 1
        self.handles.add(self.last)
        self.waiting.append((Open(self.last), 0))
        return self.last

    def fork(self, parent: int, length: int, policy: str | None = None) -> int:
        assert parent in self.handles
        self.last += 1
        self.handles.add(self.last)
        self.waiting.append((Fork(self.last, parent, length), 0))
        return self.last

    def close(self, handle: int, freed: Pages) -> None:
        self.handles.remove(handle)
        self.waiting.append((Close(handle), freed.get((0, 0), 0)))

    def hosts(self, share: Share) -> list[int]:
        return []

    def grows(self, share: Share) -> bool:
        return False

    def grow(self, handle: int, handovers: Sequence[kv_shares.Handover]) -> None:
        raise AssertionError("there is no other holder")

    def replace(self, handle: int, lost: int, shares: Layout, source: int | None = None, length: int = 0) -> None:
        raise AssertionError("there is no other holder")

    def check_integrity(self, handles: Sequence[int]) -> None:
        assert sorted(handles) == sorted(self.handles)

    def accepted(self, upto: int) -> None:
        """The holder has applied the operations below this number."""
        done = max(0, upto - self.first)
        del self.waiting[:done]
        self.first += done

    def layout(self, length: int) -> Layout:
        return (Share(0, (0,), 0, 1 << 20),)

    def layouts(self, length: int, tokens: int = 0, beside: Iterable[tuple[Layout, int]] = ()) -> tuple[Layout, ...]:
        return (self.layout(length),)

    def opened(self, layout: Layout) -> None:
        pass

    def local_copy(self, layout: Layout, lo: int) -> Layout:
        return ()

    def open_beside(self, shares: Layout) -> tuple[kv_shares.Part, ...]:
        raise AssertionError("there is no local pool")

    def close_parts(self, parts: Iterable[kv_shares.Part], freed: Pages) -> None:
        raise AssertionError("there is no local pool")

    def substitute(self, share: Share, free: Pages) -> Share | None:
        return None


Groups = tuple[tuple[int, int | str | None], ...]


STREAMING = "streaming(sink=5, recent=7)"
SHARDED = "sharded(block=12, local=1, stride=2, offset=1)"


MIXED: Groups = ((1, None), (1, STREAMING), (1, 6))


def most(config: SchedulerConfig, length: int) -> int:
    """The most pages that a sequence needs, where there is one holder."""
    return config.pages_for(OneHolder(0).layout(length), length)[0, 0]


class Holder:
    """Pages of one layer and head each, shared by forks, copied on write, freed behind windows; refuses when short.

    It refuses before it touches its last `hidden` pages, which the scheduler does not count, and rows that start above
    what is stored; then `starts` says where they can start at most.
    """

    def __init__(self, config: SchedulerConfig, total_pages: int, hidden: int = 0) -> None:
        self.hidden = hidden
        self.size = config.page_size
        self.units = [group.policy or Full() for group in config.page_groups[0] for _ in range(group.layers)]
        self.free = total_pages
        self.parts: dict[int, Part] = {}
        self.applied = 0
        self.starts: list[int] = []

    def announce(self, sent: Sent) -> tuple[bool, list[int]]:
        before, plan = copy.deepcopy((self.free, self.parts, self.applied)), sent.plan
        for number, operation in enumerate(sent.operations, sent.first):
            assert number <= self.applied, "an operation was skipped"
            if number == self.applied:
                self.apply(operation)
                self.applied += 1
        self.starts = [min(row.start, self.parts[row.handle].stored) for row in plan.rows]
        if self.starts != [row.start for row in plan.rows]:
            self.free, self.parts, self.applied = before
            return False, []
        for row in plan.rows:
            self.cut(self.parts[row.handle], row.start)
        for row in plan.rows:
            self.reserve(self.parts[row.handle], row.start, row.start + row.count)
        if plan.rows and self.free < self.hidden:
            self.free, self.parts, self.applied = before
            return False, []
        return True, [self.floor(self.parts[row.handle]) for row in plan.rows]

    def apply(self, operation: Operation) -> None:
        if isinstance(operation, Open):
            assert operation.handle not in self.parts
            self.parts[operation.handle] = Part([[] for _ in self.units])
        elif isinstance(operation, Fork):
            parent = self.parts[operation.parent]
            assert operation.length >= self.floor(parent), "forked below the floor"
            pages = -(-operation.length // self.size)
            assert all(len(table) >= pages for table in parent.tables), "forked beyond what is held"
            self.parts[operation.handle] = Part(
                [table[:pages] for table in parent.tables], min(parent.stored, operation.length)
            )
            for page in self.pages(self.parts[operation.handle]):
                page.owners += 1
        else:
            part = self.parts.pop(operation.handle)
            for page in self.pages(part):
                self.give_back(page)

    def cut(self, part: Part, start: int) -> None:
        part.stored = min(part.stored, start)
        for policy, table in zip(self.units, part.tables, strict=True):
            hidden = policy.seen_from(start) // self.size
            for at, page in enumerate(table):
                gone = at < hidden and not policy.staying(at, at + 1, self.size)
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
        self.parts[handle].stored = len(tokens)
        kv = list(accumulate(tokens, lambda before, token: hash((before, token)), initial=0))[1:]
        for policy, table in zip(self.units, self.parts[handle].tables, strict=True):
            for at in range(start, len(tokens)):
                page = table[at // self.size]
                assert page is not None
                assert page.owners == 1, "a shared page is written"
                page.kv[at] = kv[at]
            seen = set(range(policy.seen_from(start), len(tokens)))
            stay = [at for at in range(len(table)) if policy.staying(at, at + 1, self.size)]
            for key in seen.union(*(range(at * self.size, min((at + 1) * self.size, len(tokens))) for at in stay)):
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


class Sent(NamedTuple):
    """What is announced: operations, numbered from `first` on, and a plan (or one without rows)."""

    plan: Plan
    first: int
    operations: tuple[Operation, ...]


class World:
    """A scheduler, its holder, and the batches between them."""

    def __init__(self, config: SchedulerConfig, total_pages: int = 64, hidden: int = 0) -> None:
        self.config = config
        self.total_pages = total_pages
        self.layouts = OneHolder(total_pages)
        self.scheduler = Scheduler(config, self.layouts)
        self.holder = Holder(config, total_pages, hidden)
        self.sent: list[Sent] = []  # not answered yet; answered in order
        self.running: list[Plan] = []
        self.samples: list[ScheduledSequence] = []
        self.computed_tokens = 0
        self.batches: list[Plan] = []
        self.refusals = 0
        self.chance = random.Random(total_pages)  # of drafts
        self.accepted = 0

    def add(self, prompt: list[int], max_tokens: int = 4, **options: object) -> tuple[ScheduledSequence, ...]:
        request = Request(str(len(self.samples)), tuple(prompt), max_tokens, **options)  # type: ignore[arg-type]
        samples = self.scheduler.add(request)
        self.samples += samples
        return samples

    def propose(self) -> None:
        """Drafts for the sequences that decode, of which any number of the first ones are right."""
        for sequence in self.scheduler.decoding() if self.config.max_drafts else ():
            tokens, right = list(sequence.tokens), self.chance.randrange(5)
            for number in range(self.chance.randrange(5)):
                tokens.append((next_token(tokens, sequence.sample) + (number >= right)) % 4)
            sequence.drafts = tuple(tokens[len(sequence.tokens) :])

    def plan(self, lanes: int = 1) -> bool:
        self.propose()
        plan = self.scheduler.plan(lanes)
        if plan is not None:
            self.check_budgets(plan)
        elif self.sent or self.running or not self.layouts.waiting:
            return False
        self.sent.append(self.announcement(plan))
        return True

    def announcement(self, plan: Plan | None) -> Sent:
        operations = tuple(operation for operation, _ in self.layouts.waiting)
        return Sent(plan or Plan(()), self.layouts.first, operations)

    def flush(self) -> None:
        """Have all operations applied."""
        sent = self.announcement(None)
        assert self.holder.announce(sent)[0]
        self.layouts.accepted(sent.first + len(sent.operations))
        self.scheduler.ledger.update_free(Pages({(0, 0): self.holder.free}))

    def check_budgets(self, plan: Plan) -> None:
        assert sum(row.count for row in plan.rows) <= self.config.max_batch_tokens
        assert len({row.handle for row in plan.rows}) == len(plan.rows) <= self.config.max_sequences
        others = {row.sequence for other in [*(sent.plan for sent in self.sent), *self.running] for row in other.rows}
        assert not others & {row.sequence for row in plan.rows}
        for row in plan.rows:
            assert row.count > 0
            assert row.start == row.sequence.computed
            assert row.sample == (row.start + row.known == len(row.sequence.tokens))
            assert len(row.drafts) <= (self.config.max_drafts if row.decodes else 0)
            assert row.start + row.count <= row.sequence.longest
        counts = [row.known for row in plan.rows]
        assert counts == sorted(counts, key=lambda count: count > 1), "decode rows come first"

    def answer(self) -> bool:
        """The holder answers the oldest announcement. Returns whether it accepted."""
        sent = self.sent.pop(0)
        plan = sent.plan
        accepted, floors = self.holder.announce(sent)
        if accepted:
            self.layouts.accepted(sent.first + len(sent.operations))
        if accepted and not plan.rows:
            self.scheduler.ledger.update_free(Pages({(0, 0): self.holder.free}))
        elif accepted:
            self.batches.append(plan)
            self.scheduler.accepted(plan, Pages({(0, 0): self.holder.free}), floors)
            self.running.append(plan)
        elif self.holder.starts != [row.start for row in plan.rows]:
            self.scheduler.torn(plan, Pages({(0, 0): self.holder.free}), [0] * len(plan.rows), self.holder.starts)
        else:
            self.refusals += 1
            self.scheduler.refused(plan, Pages({(0, 0): self.holder.free}), {(0, 0)})
        return accepted

    def record(self, index: int = 0, lost: int = 0) -> None:
        """A batch is complete. The KV of its first `lost` rows does not reach the holder."""
        plan = self.running.pop(index)
        tokens = []
        for at, row in enumerate(plan.rows):
            if at < lost:
                self.spoil(row)
            else:
                self.holder.write(row.handle, row.start, [*row.sequence.tokens[: row.start + row.known], *row.drafts])
            if not row.sequence.sound:
                self.spoil(row)
            self.computed_tokens += row.count
            tokens += [
                next_token([*row.sequence.tokens, *row.drafts[:drafts]], row.sequence.sample)
                for drafts in range(row.samples)
            ]
        before = {row.sequence: len(row.sequence.tokens) for row in plan.rows}
        outcomes = self.scheduler.record(plan, tokens)
        self.accepted += len(outcomes) - len({outcome.sequence for outcome in outcomes})
        for sequence, tokens_before in before.items():
            own = [outcome for outcome in outcomes if outcome.sequence is sequence]
            assert sequence.tokens[tokens_before:] == [outcome.token for outcome in own]
            assert all(outcome.finish_reason is None for outcome in own[:-1])
            assert not own or own[-1].finish_reason == sequence.finish_reason

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
        sent = self.sent.pop(0)
        self.holder.announce(sent)
        if sent.plan.rows:
            self.scheduler.drop(sent.plan)

    def disagree(self) -> None:
        """The holder may accept the oldest announcement, but another refuses it."""
        sent = self.sent.pop(0)
        self.holder.announce(sent)
        if sent.plan.rows:
            self.refusals += 1
            self.scheduler.refused(sent.plan, Pages({(0, 0): self.holder.free}), {(0, 0)})

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
        parts = [part for handle, part in self.holder.parts.items() if handle in self.layouts.handles]
        taken = len({id(page) for part in parts for page in self.holder.pages(part)})
        assert taken <= self.scheduler.running.most().get((0, 0), 0), "an honest holder would be given up"

    def check_end(self) -> None:
        """Every sample has the tokens that the model gives it alone, and no page is lost."""
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
        self.flush()
        if self.scheduler.config.prefix_cache:
            cached = self.scheduler.running.prefix_cache.evictable.get((0, 0), 0)
            assert self.holder.free + cached == self.total_pages, f"{self.holder.free} free and {cached} cached"
            while self.scheduler.running.prefix_cache.evict({(0, 0)}):
                pass
            self.finish()
        self.flush()
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
    values["page_groups"] = (tuple(PageGroup(layers, keeping(what)) for layers, what in values["page_groups"]),)  # type: ignore[attr-defined]
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
            [
                ((2, None),),
                ((1, None), (2, 5)),
                ((2, 6),),
                ((1, 3), (1, 9)),
                MIXED,
                ((2, STREAMING),),
                ((1, SHARDED), (1, None)),
            ]
        ),
        page_size=st.sampled_from([1, 3, 4]),
        max_batch_tokens=st.sampled_from([1, 3, 7, 16]),
        memory=st.sampled_from([1.0, 1.5, 3.0]),
        hidden=st.sampled_from([0, 0, 5]),
        prefix_cache=st.booleans(),
        max_drafts=st.sampled_from([0, 2, 4]),
    )
    def start(
        self,
        groups: Groups,
        page_size: int,
        max_batch_tokens: int,
        memory: float,
        hidden: int,
        prefix_cache: bool,
        max_drafts: int,
    ) -> None:
        changes = {"page_groups": groups, "page_size": page_size, "max_batch_tokens": max_batch_tokens}
        changes["max_drafts"] = max_drafts
        total = int(most(config(**changes), 48) * memory) + hidden
        self.world = World(config(**changes, max_model_len=48, prefix_cache=prefix_cache), total, hidden=hidden)

    @rule(
        shared=st.integers(0, 20),
        tail=st.lists(st.integers(0, 2), max_size=8),
        max_tokens=st.integers(1, 19),
        copies=st.sampled_from([1, 1, 2, 4]),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.sampled_from([0, 0, 0, 1]),
        salt=st.sampled_from([None, None, "salt"]),
        tenant=st.sampled_from(["", "", "a", "b"]),
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
        self.world.record(
            data.draw(st.integers(0, len(self.world.running) - 1)), data.draw(st.sampled_from([0, 0, 1, 9]))
        )

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


def prompt(length: int, salt: int = 0) -> list[int]:
    """Tokens that share no first page with those of another salt."""
    return [1000 * salt + at for at in range(length)]


def batches(world: World) -> list[list[tuple[str, int, int]]]:
    """(request, start, count) of every row, by batch."""
    return [[(row.sequence.request.id, row.start, row.count) for row in plan.rows] for plan in world.batches]
