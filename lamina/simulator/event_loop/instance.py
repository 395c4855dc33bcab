"""One instance of a system in the event loop: requests come in, the real `Scheduler` and `Placement` decide, pages are
counted, and the clock moves by what the cost model says of each batch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from lamina.errors import EngineError, InvalidRequest
from lamina.scheduling.control_plane import ControlPlane, Step, refusal
from lamina.scheduling.holder import Holder
from lamina.scheduling.page_groups import PageGroup
from lamina.scheduling.placement import Placement
from lamina.scheduling.request import SNAPSHOT_TOKENS, Plan, Request, ScheduledSequence, SchedulerConfig
from lamina.simulator.costs.cost_model import Load, StepCost, kv_heads
from lamina.simulator.costs.mixers import STATE_RECORDS
from lamina.simulator.costs.systems import PAGE_SIZE, Offloaded, System
from lamina.simulator.event_loop.holder_counter import HolderCounter
from lamina.simulator.event_loop.page_counter import Groups, PageCounter, Window
from lamina.simulator.event_loop.record_counter import RecordCounter
from lamina.simulator.event_loop.results import Sampled
from lamina.simulator.event_loop.statistics import Samples
from lamina.simulator.traces.arrivals import Arrival, Trace, tokens
from lamina_protocols.messages import Announced

BACKLOG, BACKLOG_TOKENS = 64, 1 << 22
"""Requests, and tokens of their prompts, that the scheduler is given ahead of those it has admitted; the others wait in
the trace, in order."""
UNLIMITED = 1 << 40
"""Tokens a batch, where prefill takes no time."""


@dataclass(slots=True)
class Life:
    """One request: when it arrived, had its first and its last token, and how many it has."""

    arrival: Arrival
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


@dataclass(slots=True)
class Totals:
    """Sums over the steps of one instance or several. `busy`: seconds of model tier, attention and network; `gaps`: how
    often each time between two tokens of a sequence came."""

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
    gaps: Counter[float] = field(default_factory=Counter)
    samples: Samples = field(default_factory=Samples)

    def add(self, other: Totals) -> None:
        """All but the samples."""
        for item in fields(self):
            mine, more = getattr(self, item.name), getattr(other, item.name)
            if item.name == "peak":
                self.peak = max(mine, more)
            elif item.name == "busy":
                self.busy = [a + b for a, b in zip(mine, more, strict=True)]
            elif item.name != "samples":
                setattr(self, item.name, mine + more)


class Instance:
    """One instance of a system on its part of the trace.

    Without `prefill` a prompt takes no time up to its first token. Such a request may have `begun` elsewhere: then that
    token is not counted again.
    """

    def __init__(
        self,
        system: System,
        trace: Trace,
        prefill: bool,
        prefix_cache: bool,
        totals: Totals,
        begun: Mapping[int, Life] | None = None,
    ) -> None:
        self._system, self._trace, self._prefill = system, trace, prefill
        self._totals = totals
        self._begun = begun or {}  # by the number of its arrival
        self._times = [arrival.at for arrival in trace.arrivals]
        self._fed = 0  # arrivals that the scheduler was given
        self._ahead = 0  # prompt tokens of the arrivals that have no token yet
        self._named = prefix_cache and any(arrival.blocks for arrival in trace.arrivals)
        longest = max(arrival.prompt + arrival.output for arrival in trace.arrivals)
        self._blank = (0,) * 0 if self._named else (0,) * max(arrival.prompt for arrival in trace.arrivals)
        holders = holders_of(system)
        heads = kv_heads(system.model) if holders > 1 else 1  # equal holders are one that stands for all
        groups = page_groups(system)
        layers = sum(count for count, _ in groups)
        capacity = system.capacity
        if not capacity.sequences:
            raise InvalidRequest(
                f"system {system.name!r} has no room for one sequence's states; allowed is more memory"
            )
        pages = [capacity.tokens // PAGE_SIZE * heads * layers // holders]
        counts, states = [heads], dict[int, int]()
        if system.model.states:  # whose layers go together, and whose heads do where all holders are alike
            counts.append(system.model.state_heads if holders > 1 else 1)
            pages.append(STATE_RECORDS * capacity.sequences * counts[1] // holders)
            states = {1: 1}
        self._counters = {
            number: HolderCounter(
                [PageCounter(pages[0], PAGE_SIZE, groups), *(RecordCounter(pages[pool], 1) for pool in states)]
            )
            for number in range(holders)
        }
        self._pages = sum(pages) * holders
        placement = Placement(
            {number: Holder(tuple(pages)) for number in range(holders)},
            heads=(tuple(counts),), page_size=PAGE_SIZE, max_model_len=longest, states=states,
        )  # fmt: skip
        config = SchedulerConfig(
            max_batch_tokens=system.max_batch_tokens if prefill else UNLIMITED,
            max_sequences=system.max_sequences, max_model_len=longest, page_size=PAGE_SIZE,
            page_groups=(tuple(PageGroup(*group) for group in groups), *((),) * bool(states)),
            prefix_cache=self._named, states=states,
            snapshot_tokens=SNAPSHOT_TOKENS if states and self._named else None,
        )  # fmt: skip
        self._control = ControlPlane(config, placement)
        self._scheduler = self._control.scheduler
        self._lives: dict[ScheduledSequence, Life] = {}
        self._ended: list[Life] = []
        self._now = 0.0

    def run(self, report: Callable[[int], None]) -> list[Life]:
        """Serve the trace to its end. Returns the requests that were served."""
        arrivals, scheduler = self._trace.arrivals, self._scheduler
        while True:
            self._feed()
            if self._fed == len(arrivals) and not scheduler.has_work:
                break
            step = self._control.plan()
            if step is None:
                if self._fed == len(arrivals):
                    raise EngineError(f"system {self._system.name!r} cannot go on, with {self._pages} pages")
                self._now = max(self._now, arrivals[self._fed].at)
                continue
            if self._accept(step) and step.plan is not None:
                before = self._now
                self._advance(step.plan)
                self._record(step.plan, before)
                if self._totals.steps % 64 == 0:
                    report(len(self._ended))
        self._totals.reused += scheduler.counters.reused_tokens
        self._totals.preemptions += scheduler.counters.preempted
        return self._ended

    def _feed(self) -> None:
        """Give the scheduler the requests that have arrived, as far ahead as it looks."""
        arrivals, scheduler = self._trace.arrivals, self._scheduler
        while self._fed < len(arrivals) and arrivals[self._fed].at <= self._now:
            number, arrival = self._fed, arrivals[self._fed]
            many = self._ahead and self._ahead + arrival.prompt > BACKLOG_TOKENS
            if many or len(self._lives) - len(scheduler.running) >= BACKLOG:
                return
            self._fed += 1
            prompt = tokens(arrival, number) if self._named else self._blank[: arrival.prompt]
            try:
                (sequence,) = scheduler.add(Request(str(number), prompt, arrival.output))
            except InvalidRequest:  # it fits nowhere, as a server would say
                self._totals.rejected += 1
                continue
            self._lives[sequence] = self._begun.get(number) or Life(arrival)
            self._ahead += arrival.prompt
            self._totals.prompt_tokens += arrival.prompt

    def _accept(self, step: Step) -> bool:
        """Announce the step to the holders. Whether all accept."""
        answers: dict[int, Announced] = {}
        for number, batch in step.batches.items():
            counter = self._counters[number]
            floors = counter.take(batch)
            answers[number] = Announced(0, 0, floors is not None, counter.free, tuple(floors or ()))
        if refusal(answers) is None:
            self._control.accepted(step, answers)
            return True
        for hopeless in self._control.refused(step, answers):
            del self._lives[hopeless]
            self._ahead -= len(hopeless.request.prompt)
            self._totals.rejected += 1
        return False

    def _advance(self, plan: Plan) -> None:
        """Let the batch's time pass."""
        decode = context = tokens = prefix_tokens = prompts = 0
        pairs = keys = prefix_pairs = 0.0
        room = self._system.prompt_tokens
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
            elsewhere = sequence.reused if prompt <= room else start
            tokens += count
            prompts += start + count >= prompt
            pairs += count * (start - elsewhere + (count + 1) / 2)
            keys += start - elsewhere + count
            if elsewhere:
                prefix_tokens += count
                prefix_pairs += count * elsewhere
        cost = StepCost(0.0)
        if decode or tokens:
            mean = context / decode if decode else 0.0
            cost = self._system.step(Load(decode, mean, tokens, pairs, keys, prefix_tokens, prefix_pairs, prompts))
        self._count(cost, decode, tokens)
        self._now += cost.seconds

    def _count(self, cost: StepCost, decode: int, prefill: int) -> None:
        totals, seconds, running = self._totals, cost.seconds, len(self._scheduler.running)
        waiting = len(self._lives) - running + bisect_right(self._times, self._now) - self._fed
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
        if seconds and totals.samples.due():
            free = sum(sum(counter.free) for counter in self._counters.values())
            shares = (min(1.0, busy / seconds) for busy in (cost.model, cost.attention, cost.network))
            totals.samples.add(
                Sampled(self._now, seconds, decode, prefill, running, waiting, 1 - free / self._pages, *shares)
            )

    def _record(self, plan: Plan, before: float) -> None:
        """Every row that samples has a token now."""
        now, lives, gaps = self._now, self._lives, self._totals.gaps
        sampled = [-1 - row.sequence.arrival for row in plan.rows if row.sample]
        usual = 0
        for sequence, _, reason in self._control.recorded(plan, sampled):
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
        if usual:
            gaps[now - before] += usual


def holders_of(system: System) -> int:
    """How many holders of KV must be told apart: 1 where all of them have the same of each sequence. Where KV is kept
    beside the weights too, sequences move between the two as the engine moves them, so they are one pool."""
    if not isinstance(system, Offloaded) or system.shard != "heads" or system.local_share:
        return 1
    return system.attention_count if kv_heads(system.model) % system.attention_count else 1


def page_groups(system: System) -> Groups:
    """What the model's layers keep under the policy's window."""
    layers: Counter[int | None] = Counter()
    for group in system.model.groups:
        windows = [window for window in (group.window, system.policy.window) if window is not None]
        if group.attends:
            layers[min(windows, default=None)] += group.layers
    if set(layers) <= {None}:
        return ((1, None),)  # all alike: one layer stands for all
    return tuple((count, None if window is None else Window(window)) for window, count in layers.items())
