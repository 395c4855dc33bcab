"""One instance of a system in the event loop (`Instance`): requests come in, the real `Scheduler` and `Placement`
decide, pages are counted, and the clock moves by what the cost model says of each batch.

`Life` is what becomes of one request. `PromptRows` are sums over the prompts of a batch, `Totals` sums over the batches
of an instance.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from heapq import heappop, heappush

from lamina.errors import EngineError, InvalidRequest
from lamina.kv.kv_shares import Pages
from lamina.kv.pages import PageGroup
from lamina.kv.placement import Holder, Placement
from lamina.kv.request import SNAPSHOT_TOKENS, Plan, Request, ScheduledSequence, SchedulerConfig
from lamina.scheduling.control_plane import ControlPlane, Step, refusal
from lamina.simulator.costs.cost_model import Load, StepCost
from lamina.simulator.costs.offloaded import UNBOUNDED
from lamina.simulator.costs.shapes import STATE_RECORDS
from lamina.simulator.costs.systems import PAGE_SIZE, Offloaded, System, kept_window
from lamina.simulator.event_loop.counters import Groups, HolderCounter, PageCounter, RecordCounter, Window
from lamina.simulator.event_loop.results import Sampled, Samples
from lamina.simulator.traces.arrivals import Arrival, Trace, tokens
from lamina_protocols.messages.messages import Announced


@dataclass(slots=True)
class Life:
    """One request: when it arrived (`at`), had its first and its last token, and how many it has."""

    arrival: Arrival
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    at: float = -1.0

    def __post_init__(self) -> None:
        if self.at < 0:  # it did not wait for another
            self.at = self.arrival.at


@dataclass(slots=True)
class PromptRows:
    """The rows of prompts in one batch, added up: see `Load` for the sums."""

    tokens: int = 0
    pairs: float = 0.0
    keys: float = 0.0
    prefix_tokens: int = 0
    prefix_pairs: float = 0.0
    prompts: int = 0

    def add(self, start: int, count: int, prompt: int, elsewhere: int) -> None:
        """A row of `count` tokens from `start` on, of a prompt of so many; `elsewhere` of those before it are read
        where decode reads."""
        self.tokens += count
        self.prompts += start + count >= prompt
        self.pairs += count * (start - elsewhere + (count + 1) / 2)
        self.keys += start - elsewhere + count
        if elsewhere:
            self.prefix_tokens += count
            self.prefix_pairs += count * elsewhere

    def load(self, decode: int, context: int) -> Load:
        """The batch with so many sequences in decode besides, which have so many tokens in all."""
        return Load(
            decode,
            context / decode if decode else 0.0,
            self.tokens,
            self.pairs,
            self.keys,
            self.prefix_tokens,
            self.prefix_pairs,
            self.prompts,
        )


@dataclass(slots=True)
class Totals:
    """Sums over the steps of one instance or several. `busy`: seconds of model tier, attention and network; `gaps`: how
    often each time between two tokens of a sequence came; `losses`: of workers; `recomputed`: tokens whose KV went with
    them and was not elsewhere."""

    steps: int = 0
    busy: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    decode_seconds: float = 0.0
    decode_rows: float = 0.0
    peak: int = 0
    link_bytes: float = 0.0
    saturated_seconds: float = 0.0
    saturated_tokens: int = 0
    saturated_rows: float = 0.0
    reused: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    rejected: int = 0
    losses: int = 0
    recomputed: int = 0
    gaps: Counter[float] = field(default_factory=Counter)
    samples: Samples = field(default_factory=Samples)

    def count(
        self,
        seconds: float,
        busy: tuple[float, float, float],
        link_bytes: float,
        decode: int,
        waiting: int,
        steps: int = 1,
    ) -> None:
        """A batch of so many seconds, with so many sequences in decode while others wait; or `steps` of them, while
        none waits."""
        self.steps += steps
        for tier, part in enumerate(busy):
            self.busy[tier] += part
        self.link_bytes += link_bytes
        if decode:
            self.peak = max(self.peak, decode)
            self.decode_seconds += seconds
            self.decode_rows += seconds * decode
        if waiting > 0:
            self.saturated_seconds += seconds
            self.saturated_tokens += decode
            self.saturated_rows += seconds * decode

    def add(self, other: Totals) -> None:
        """All but the samples."""
        for item in fields(self):
            mine, more = getattr(self, item.name), getattr(other, item.name)
            if item.name == "peak":
                self.peak = max(mine, more)
            elif item.name == "gaps":
                self.gaps.update(other.gaps)
            elif item.name == "busy":
                self.busy = [a + b for a, b in zip(mine, more, strict=True)]
            elif item.name != "samples":
                setattr(self, item.name, mine + more)


BACKLOG, BACKLOG_TOKENS = 64, 1 << 22
"""Requests, and tokens of their prompts, that the scheduler is given ahead of those it has admitted; the others wait in
the trace, in order."""


class Instance:
    """One instance of a system on its part of the trace.

    Without `prefill` a prompt takes no time up to its first token. Such a request may have `begun` elsewhere: then that
    token is not counted again. Requests come as the trace says, or as they are `offered`. `ended` gets the number and
    the life of each request that has ended. By default it is `follow`, which brings its followers to this instance.
    `pooled`: one holder stands for all, also where heads do not divide evenly among them.
    """

    def __init__(
        self,
        system: System,
        trace: Trace,
        prefill: bool,
        prefix_cache: bool,
        totals: Totals,
        begun: Mapping[int, Life] | None = None,
        *,
        offered: bool = False,
        ended: Callable[[int, Life], None] | None = None,
        pooled: bool = False,
    ) -> None:
        self._system, self._trace, self._prefill = system, trace, prefill
        self._totals = totals
        self._lives_before = {} if begun is None else begun  # by the number of its arrival
        arrivals = trace.arrivals
        self._due = [] if offered else [(a.at, number) for number, a in enumerate(arrivals) if a.after is None]
        self._arrived: deque[int] = deque()  # that the scheduler was not given yet
        self._followers: dict[int, list[int]] = {}  # by the number of the one they come after
        for number, arrival in enumerate(arrivals):
            if arrival.after is not None:
                self._followers.setdefault(arrival.after, []).append(number)
        self._shared: dict[int, tuple[int, ...]] = {}  # of those to come: tokens of the one before that they begin with
        self._when: dict[int, float] = {}  # by the number of an offered request: when it comes
        self._on_end = ended or self.follow
        self._ahead = 0  # prompt tokens of the arrivals that have no token yet
        self._named = prefix_cache and any(arrival.blocks or arrival.shared for arrival in arrivals)
        longest = max(arrival.prompt + arrival.output for arrival in arrivals)
        self._blank = (0,) * 0 if self._named else (0,) * max(arrival.prompt for arrival in arrivals)
        holders, groups = 1 if pooled else holders_of(system), page_groups(system)
        if not system.capacity.sequences:
            raise InvalidRequest(
                f"system {system.name!r} has no room for one sequence's states; allowed is more memory"
            )
        counts, pages = _pools(system, holders)
        states = {1: 1} if system.model.states else {}
        self._counters = {number: _counter(system, pages) for number in range(holders)}
        self._pages = sum(pages) * holders
        placement = Placement(
            {number: Holder(tuple(pages)) for number in range(holders)},
            heads=(tuple(counts),),
            page_size=PAGE_SIZE,
            max_model_len=longest,
            states=states,
        )
        config = SchedulerConfig(
            max_batch_tokens=system.max_batch_tokens if prefill else UNBOUNDED,
            max_sequences=system.max_sequences,
            max_model_len=longest,
            page_size=PAGE_SIZE,
            page_groups=(tuple(PageGroup(*group) for group in groups), *((),) * bool(states)),
            prefix_cache=self._named,
            states=states,
            snapshot_tokens=SNAPSHOT_TOKENS if states and self._named else None,
        )
        self._control = ControlPlane(config, placement)
        self._scheduler = self._control.scheduler
        self._lives: dict[ScheduledSequence, Life] = {}
        self._ended: list[Life] = []
        self._now = 0.0
        self.slower = 1.0
        """Times its own seconds that each batch takes."""

    @property
    def now(self) -> float:
        """When the last batch ended, in seconds."""
        return self._now

    @property
    def contexts(self) -> list[int]:
        """Tokens with KV of each sequence that runs."""
        return [sequence.computed for sequence in self._scheduler.running]

    def pause(self, seconds: float) -> None:
        """Nothing runs for so long."""
        self._now += seconds

    def resize(self, system: System) -> bool:
        """Go on as another system, with more memory for KV or with less, of an instance that is `pooled`. False, and
        nothing is changed, where less would not hold what is there."""
        (counter,), holder = self._counters.values(), self._control.placement.holders[0]
        _, pages = _pools(system, 1)
        more = tuple(new - old for new, old in zip(pages, holder.pages, strict=True))
        if any(free + change < 0 for free, change in zip(counter.free, more, strict=True)):
            return False
        counter.grow(more)
        holder.pages = tuple(pages)
        self._scheduler.joined(Pages.of(0, more))
        self._system, self._pages = system, sum(pages)
        return True

    def lose_kv(self) -> int:
        """All KV is gone, and what runs begins anew. Returns how many tokens had it."""
        for number, holder in self._control.placement.holders.items():
            self._counters[number] = _counter(self._system, holder.pages)
        return self._control.emptied(list(self._counters))

    def run(self, report: Callable[[int], None]) -> list[Life]:
        """Serve the trace to its end. Returns the requests that were served."""
        while self.step():
            if self._totals.steps % 64 == 0:
                report(len(self._ended))
        return self.finish()

    def step(self) -> bool:
        """Run the next batch, or let the time of the next arrival come. False where there is nothing to do."""
        self._feed()
        step = self._control.plan() if self._scheduler.has_work else None
        if step is None:
            if self._due:
                self._now = max(self._now, self._due[0][0])
            elif self._lives:
                raise EngineError(f"system {self._system.name!r} cannot go on, with {self._pages} pages")
            return bool(self._due)
        if self._accept(step) and step.plan is not None:
            before = self._now
            self._advance(step.plan)
            self._record(step, before)
        return True

    def finish(self) -> list[Life]:
        """Count what the scheduler has counted. Returns the requests that were served."""
        self._totals.reused += self._scheduler.counters.reused_tokens
        self._totals.preemptions += self._scheduler.counters.preempted
        return self._ended

    @property
    def next_at(self) -> float:
        """When the next batch can begin, in seconds; infinite where nothing is to do."""
        if self._lives or self._arrived:
            return self._now
        return max(self._now, self._due[0][0]) if self._due else math.inf

    def offer(self, number: int, at: float) -> None:
        """The trace's request of that number comes at that second."""
        self._when[number] = at
        heappush(self._due, (at, number))

    def follow(self, number: int, life: Life) -> None:
        """Offer the followers of a request that has ended to this instance."""
        for after in self._followers.get(number, ()):
            arrival = self._trace.arrivals[after]
            self.offer(after, max(arrival.at, life.last + arrival.gap))

    def _feed(self) -> None:
        """Give the scheduler the requests that have arrived, as far ahead as it looks."""
        arrivals, scheduler, arrived = self._trace.arrivals, self._scheduler, self._arrived
        while self._due and self._due[0][0] <= self._now:
            arrived.append(heappop(self._due)[1])
        while arrived:
            number = arrived[0]
            arrival = arrivals[number]
            many = self._ahead and self._ahead + arrival.prompt > BACKLOG_TOKENS
            if many or len(self._lives) - len(scheduler.running) >= BACKLOG:
                return
            arrived.popleft()
            shared = self._shared.pop(number, ())
            prompt = tokens(arrival, number, shared) if self._named else self._blank[: arrival.prompt]
            try:
                (sequence,) = scheduler.add(Request(str(number), prompt, arrival.output))
            except InvalidRequest:  # it fits nowhere, as a server would say
                self._reject(number)
                continue
            self._lives[sequence] = self._lives_before.get(number) or Life(
                arrival, at=self._when.get(number, arrival.at)
            )
            self._ahead += arrival.prompt
            self._totals.prompt_tokens += arrival.prompt

    def _reject(self, number: int) -> None:
        """A request, and all that were to come after it."""
        self._totals.rejected += 1
        for after in self._followers.get(number, ()):
            self._reject(after)

    def _accept(self, step: Step) -> bool:
        """Announce the step to the holders. Whether all accept."""
        answers: dict[int, Announced] = {}
        for number, batch in step.batches.items():
            counter = self._counters[number]
            floors = counter.take(batch)
            answers[number] = Announced(0, 0, floors is not None, counter.free, tuple(floors or ()))
        if refusal(answers) is None:
            step.accepted(answers)
            return True
        for hopeless in step.refused(answers):
            del self._lives[hopeless]
            self._ahead -= len(hopeless.request.prompt)
            self._reject(int(hopeless.request.id))
        return False

    def _advance(self, plan: Plan) -> None:
        """Let the batch's time pass."""
        decode = context = 0
        rows, room = PromptRows(), self._system.prompt_tokens
        for row in plan.rows:
            start, count, sequence = row.start, row.count, row.sequence
            prompt = len(sequence.request.prompt)
            if count == 1 and start >= prompt:
                decode += 1
                context += start
                continue
            if not self._prefill and not sequence.preemptions:
                continue  # computed elsewhere
            # Past a hit, and where a prompt is too long for the room beside the dense layers, decode's holders read.
            rows.add(start, count, prompt, sequence.reused if prompt <= room else start)
        cost = StepCost(0.0)
        if decode or rows.tokens:
            cost = self._system.step(rows.load(decode, context))
        self._count(cost, decode, rows.tokens)
        self._now += cost.seconds * self.slower

    def _count(self, cost: StepCost, decode: int, prefill: int) -> None:
        totals, seconds, running = self._totals, cost.seconds, len(self._scheduler.running)
        waiting = len(self._lives) - running + len(self._arrived)
        totals.count(seconds, (cost.model, cost.attention, cost.network), cost.link_bytes, decode, waiting)
        if seconds and totals.samples.due():
            shares = (min(1.0, busy / seconds) for busy in (cost.model, cost.attention, cost.network))
            totals.samples.add(Sampled(self._now, seconds, decode, prefill, running, waiting, *shares))

    def _record(self, step: Step, before: float) -> None:
        """Every row that samples has a token now."""
        now, lives, gaps = self._now, self._lives, self._totals.gaps
        sampled = [-1 - row.sequence.arrival for row in step.rows if row.sample]
        usual = 0
        for sequence, _, reason in step.recorded(sampled):
            life = lives[sequence]
            if len(sequence.tokens) == len(sequence.request.prompt) + 1:
                self._ahead -= len(sequence.request.prompt)
                if not life.tokens:  # else it has this one from elsewhere
                    life.first = life.last = now
                    life.tokens = 1
            else:
                if life.last == before:
                    usual += 1
                else:
                    gaps[now - life.last] += 1
                life.tokens += 1
                life.last = now
            if reason is not None:
                del lives[sequence]
                self._ended.append(life)
                self._leave(sequence, life)
        if usual:
            gaps[now - before] += usual

    def _leave(self, sequence: ScheduledSequence, life: Life) -> None:
        """A request has ended: others may come after it, and begin with its tokens."""
        number = int(sequence.request.id)
        for after in self._followers.get(number, ()):
            if self._named and (shared := self._trace.arrivals[after].shared):
                self._shared[after] = tuple(sequence.tokens[:shared])
        self._on_end(number, life)


def _pools(system: System, holders: int) -> tuple[list[int], list[int]]:
    """Heads of all holders and pages of each holder, by pool: KV, and states where the model has any. Equal holders are
    one that stands for all, as if there were one head; so are layers that keep alike, and all layers with states."""
    heads, capacity = system.model.kv_heads if holders > 1 else 1, system.capacity
    layers = sum(count for count, _ in page_groups(system))
    counts, pages = [heads], [capacity.tokens // PAGE_SIZE * heads * layers // holders]
    if system.model.states:
        counts.append(system.model.state_heads if holders > 1 else 1)
        pages.append(STATE_RECORDS * capacity.sequences * counts[1] // holders)
    return counts, pages


def _counter(system: System, pages: Sequence[int]) -> HolderCounter:
    return HolderCounter(
        [PageCounter(pages[0], PAGE_SIZE, page_groups(system)), *(RecordCounter(count, 1) for count in pages[1:])]
    )


def holders_of(system: System) -> int:
    """How many holders of KV must be told apart: 1 where all of them have the same of each sequence. Where KV is kept
    beside the weights too, sequences move between the two as the engine moves them, so they are one pool."""
    if not isinstance(system, Offloaded) or system.shard != "heads" or system.local_share:
        return 1
    return system.attention_count if system.model.kv_heads % system.attention_count else 1


def page_groups(system: System) -> Groups:
    """What the model's layers keep under the policy's window."""
    layers: Counter[int | None] = Counter()
    for group in system.model.groups:
        if group.attends:
            layers[kept_window(system, group.window)] += group.layers
    if set(layers) <= {None}:
        return ((1, None),)  # all alike: one layer stands for all
    return tuple((count, None if window is None else Window(window)) for window, count in layers.items())
