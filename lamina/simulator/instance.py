"""One instance of a system in the event loop: requests come in, the real `Scheduler` and `Placement` decide, pages are
counted, and the clock moves by what the cost model says of each batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from lamina.errors import InvalidRequest
from lamina.placement import Holder, Placement
from lamina.request import PageGroup, Plan, Request, SchedulerConfig, Sequence
from lamina.scheduler import Scheduler
from lamina.shares import Pages
from lamina.simulator.cost_model import Load, kv_heads
from lamina.simulator.page_counter import PageCounter
from lamina.simulator.results import Sampled
from lamina.simulator.statistics import Gaps, Samples
from lamina.simulator.systems import StepCost, System
from lamina.simulator.traces import Arrival, Trace, tokens

PAGE_SIZE = 16
"""Tokens a page, vLLM's default."""
BACKLOG = 64
"""Requests that the scheduler is given ahead of those it has admitted; the others wait in the trace, in order."""
UNLIMITED = 1 << 40
"""Tokens a batch, where prefill takes no time."""


@dataclass(slots=True)
class Life:
    """One request: when it arrived, had its first and its last token, and how many it has."""

    arrival: Arrival
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    preempted: bool = False


@dataclass(slots=True)
class Totals:
    """Sums over the steps of one instance or several. `busy`: seconds of model tier, attention and network."""

    steps: int = 0
    busy: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0
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

    def add(self, other: Totals) -> None:
        for item in fields(self):
            mine, more = getattr(self, item.name), getattr(other, item.name)
            if item.name == "peak":
                self.peak = max(mine, more)
            elif item.name == "busy":
                self.busy = [a + b for a, b in zip(mine, more, strict=True)]
            else:
                setattr(self, item.name, mine + more)


class Instance:
    """One instance of a system on its part of the trace."""

    def __init__(
        self,
        system: System,
        trace: Trace,
        prefill: bool,
        prefix_cache: bool,
        totals: Totals,
        gaps: Gaps,
        samples: Samples,
    ) -> None:
        self._system, self._trace, self._prefill = system, trace, prefill
        self._totals, self._gaps, self._samples = totals, gaps, samples
        self._named = prefix_cache and any(arrival.blocks for arrival in trace.arrivals)
        longest = max(arrival.prompt + arrival.output for arrival in trace.arrivals)
        holders = system.holders
        heads = kv_heads(system.model) if holders > 1 else 1  # equal holders are one that stands for all
        pages = system.kv_tokens * heads // (holders * PAGE_SIZE)
        self._counters = {number: PageCounter(pages, PAGE_SIZE) for number in range(holders)}
        self._pages = pages * holders
        self._placement = Placement(
            {number: Holder(pages) for number in range(holders)},
            heads=heads, page_size=PAGE_SIZE, max_model_len=longest, layers=1,
        )  # fmt: skip
        config = SchedulerConfig(
            max_batch_tokens=system.max_batch_tokens if prefill else UNLIMITED,
            max_sequences=system.max_sequences, max_model_len=longest, page_size=PAGE_SIZE,
            page_groups=(PageGroup(1),), prefix_cache=self._named,
        )  # fmt: skip
        self._scheduler = Scheduler(config, self._placement)
        self._lives: dict[Sequence, Life] = {}
        self._ended: list[Life] = []
        self._now = 0.0

    def run(self, report: Callable[[int], None]) -> list[Life]:
        """Serve the trace to its end. Returns the requests that were served."""
        coming, scheduler = deque(enumerate(self._trace.arrivals)), self._scheduler
        while coming or scheduler.has_work:
            self._feed(coming)
            plan = scheduler.plan()
            if plan is None:
                if not coming:
                    raise InvalidRequest(f"system {self._system.name!r} cannot go on: it has {self._pages} pages")
                self._now = max(self._now, coming[0][1].at)
                continue
            if self._accept(plan) and plan.rows:
                before = self._now
                self._advance(plan)
                self._record(plan, before)
                if self._totals.steps % 64 == 0:
                    report(len(self._ended))
        self._totals.reused += scheduler.counters.reused_tokens
        self._totals.preemptions += scheduler.counters.preempted
        self._totals.seconds += self._now - self._trace.arrivals[0].at
        return self._ended

    def _feed(self, coming: deque[tuple[int, Arrival]]) -> None:
        while coming and coming[0][1].at <= self._now and len(self._lives) - self._scheduler.running < BACKLOG:
            number, arrival = coming.popleft()
            prompt = tokens(arrival, number) if self._named else (0,) * arrival.prompt
            try:
                (sequence,) = self._scheduler.add(Request(str(number), prompt, arrival.output))
            except InvalidRequest:  # it fits nowhere, as a server would say
                self._totals.rejected += 1
                continue
            self._lives[sequence] = Life(arrival)
            self._totals.prompt_tokens += arrival.prompt

    def _accept(self, plan: Plan) -> bool:
        """Tell the holders, and the scheduler what they said."""
        shares = self._placement.place(plan)
        taken = {number: self._counters[number].take(share) for number, share in shares.items()}
        for number, share in shares.items():
            if taken[number]:
                self._placement.holders[number].accepted(share)
        free = Pages({number: self._counters[number].free for number in shares})
        if all(taken.values()):
            self._scheduler.accepted(plan, free, [0] * len(plan.rows))
            return True
        self._scheduler.refused(plan, free)
        return False

    def _advance(self, plan: Plan) -> None:
        """Let the batch's time pass."""
        decode = context = prefill = 0
        pairs = 0.0
        for row in plan.rows:
            if row.count == 1 and row.start:
                decode += 1
                context += row.start
            elif self._prefill:
                prefill += row.count
                pairs += row.count * (row.start + (row.count + 1) / 2)
        cost = StepCost(0.0)
        if decode or prefill:
            cost = self._system.step(Load(decode, context / decode if decode else 0.0, prefill, pairs))
        self._count(cost, decode, prefill)
        self._now += cost.seconds

    def _count(self, cost: StepCost, decode: int, prefill: int) -> None:
        totals, seconds, running = self._totals, cost.seconds, self._scheduler.running
        waiting = len(self._lives) - running
        totals.steps += 1
        for tier, busy in enumerate((cost.model, cost.attention, cost.network)):
            totals.busy[tier] += busy
        totals.link_bytes += cost.link_bytes
        totals.peak = max(totals.peak, decode)
        if decode:
            totals.decode_seconds += seconds
            totals.decode_rows += seconds * decode
        if waiting > 0:
            totals.saturated_seconds += seconds
            totals.saturated_tokens += decode
            totals.saturated_rows += seconds * decode
        if seconds and self._samples.due():
            free = sum(counter.free for counter in self._counters.values())
            shares = (min(1.0, busy / seconds) for busy in (cost.model, cost.attention, cost.network))
            self._samples.add(
                Sampled(self._now, seconds, decode, prefill, running, waiting, 1 - free / self._pages, *shares)
            )

    def _record(self, plan: Plan, before: float) -> None:
        """Every row that samples has a token now."""
        now, lives, gaps = self._now, self._lives, self._gaps
        sampled = [-1 - row.sequence.arrival for row in plan.rows if row.sample]
        self._placement.recorded(plan)
        usual = 0
        for sequence, _, reason in self._scheduler.record(plan, sampled):
            life = lives[sequence]
            if not life.tokens:
                life.first = now
            elif life.last == before:
                usual += 1
            else:
                gaps.add(now - life.last, 1)
            life.tokens += 1
            life.last = now
            if reason is not None:
                del lives[sequence]
                self._ended.append(life)
        if usual:
            gaps.add(now - before, usual)
