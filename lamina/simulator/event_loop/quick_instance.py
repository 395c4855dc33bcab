"""One instance of a system in the event loop, at a cost a step that does not grow with the batch (`QuickInstance`).

The decisions are those of the real `Scheduler` (`instance.py` runs it) where requests share no prefixes and nothing has
states: first come, first served; decode first, then prompts in chunks; a sequence is admitted once there is room for
all its known tokens and a page for each that runs; the youngest gives way where pages are short. Such sequences differ
in three numbers alone, so those in decode are counts: when each ends, how many begin a page in each step, and the sum
of their contexts. Where windows let pages go, or holders have different heads, the real one is asked as soon as pages
could be short. `tests/simulator/test_quick_instance.py` holds the two to the same requests at the same seconds.

The seconds of a batch of decode alone are those of a mean context in the middle of 1 % (`DecodeCosts`). So the steps
to the next request that comes or ends are one sum.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from heapq import heappop, heappush

from lamina.errors import EngineError
from lamina.simulator.costs.cost_model import Load, StepCost
from lamina.simulator.costs.offloaded import UNBOUNDED
from lamina.simulator.costs.systems import PAGE_SIZE, System
from lamina.simulator.event_loop.instance import (
    BACKLOG,
    BACKLOG_TOKENS,
    Life,
    PromptRows,
    Totals,
    holders_of,
    page_groups,
)
from lamina.simulator.event_loop.results import Sampled
from lamina.simulator.traces.arrivals import Arrival, Trace

_GRID = 64
"""Mean contexts to a doubling that are told apart."""


class DecodeCosts:
    """Costs of batches of decode alone, remembered for all instances of a system."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._costs: dict[tuple[int, int], tuple[StepCost, float]] = {}

    def __call__(self, batch: int, context: int) -> StepCost:
        """The cost of a batch of so many sequences, with so many tokens in all."""
        return self.level(batch, context)[0]

    def level(self, batch: int, context: int) -> tuple[StepCost, float]:
        """That cost, and the mean context up to which it is the same."""
        place = int(math.log2(context / batch) * _GRID)
        if (level := self._costs.get((batch, place))) is None:
            cost = self._system.step(Load(batch, 2 ** ((place + 0.5) / _GRID)))
            level = self._costs[batch, place] = cost, 2 ** ((place + 1) / _GRID)
        return level


class Sequence:
    """A request in the instance. `known` tokens are to be computed before it can sample; `computed` of them were when
    step `since` began, and one more in each step after it where it decodes."""

    __slots__ = ("computed", "ends", "known", "life", "number", "output", "preempted", "prompt", "since")

    def __init__(self, number: int, arrival: Arrival, life: Life) -> None:
        self.number, self.life = number, life
        self.prompt, self.output = arrival.prompt, arrival.output
        self.known = arrival.prompt
        self.computed = self.since = self.ends = 0
        self.preempted = False

    def at(self, step: int) -> int:
        """Tokens with KV when that step begins, if it decodes."""
        return self.computed + step - self.since


def pages_of(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // PAGE_SIZE)


def limit_of(each: Sequence, left: int) -> int:
    """Tokens of its next row, where prompts have so many left of the batch."""
    ahead = each.known - each.computed
    return 1 if ahead == 1 else min(ahead, left)


def affordable(done: int, want: int, free: int) -> int:
    """How many of the next `want` tokens fit into the last page and the free ones."""
    return min(want, (pages_of(done) + free) * PAGE_SIZE - done)


class Unusual(Exception):
    """The real scheduler has to decide: a batch with more sequences than tokens, one sequence that fills the KV, or
    pages that are short and not alike."""


def is_usual(system: System, trace: Trace, prefix_cache: bool) -> bool:
    """Whether `QuickInstance` can stand for the real scheduler, as far as that is known beforehand."""
    named = prefix_cache and any(arrival.blocks for arrival in trace.arrivals)
    sessions = any(arrival.after is not None for arrival in trace.arrivals)
    return not named and not sessions and not system.model.states


class QuickInstance:
    """Stands for an `Instance`. Raises Unusual where the real scheduler must be asked; `totals` is as before then."""

    def __init__(
        self,
        system: System,
        trace: Trace,
        prefill: bool,
        totals: Totals,
        begun: Mapping[int, Life] | None = None,
        costs: Callable[[int, int], StepCost] | None = None,
    ) -> None:
        self._system, self._trace, self._prefill = system, trace, prefill
        self._into, self._totals = totals, Totals(samples=totals.samples)
        self._lives_before = begun or {}
        self._costs = costs or DecodeCosts(system)
        self._times = [arrival.at for arrival in trace.arrivals]
        self._pages = self._free = system.capacity.tokens // PAGE_SIZE
        longest = max(arrival.prompt + arrival.output for arrival in trace.arrivals)
        self._possible = min(self._pages * PAGE_SIZE, longest)
        self._budget = system.max_batch_tokens if prefill else UNBOUNDED
        self._room = system.prompt_tokens
        holders = holders_of(system)
        self._alike = holders == 1 and page_groups(system) == ((1, None),)
        self._spared = self._pages // 8 if holders > 1 else 0  # holders are not equally full
        self._fed = self._ahead = self._alive = self._step = 0
        self._waiting: list[tuple[int, Sequence]] = []  # a heap
        self._prompts: list[Sequence] = []  # with KV, and more than their last token to compute; by number
        self._running = self._decoding = self._context = 0
        self._ending: dict[int, list[Sequence]] = {}  # by the step that is their last
        self._phases = [0] * PAGE_SIZE  # of those in decode: how many begin a page in a step, by the step modulo a page
        self._late: dict[Sequence, float] = {}  # in decode, whose last token was before the last step: its second
        self._ended: list[Life] = []
        self._now = 0.0

    def run(self, report: Callable[[int], None]) -> list[Life]:
        """Serve the trace to its end. Returns the requests that were served."""
        arrivals, totals = self._trace.arrivals, self._totals
        while True:
            behind = self._feed()
            if self._fed == len(arrivals) and not self._alive:
                break
            if not (behind or self._waiting or self._prompts or self._late) and self._stride():
                continue
            rows, stalled = self._plan()
            if not rows and self._decoding == len(stalled):
                if self._fed == len(arrivals):
                    raise EngineError(f"system {self._system.name!r} cannot go on, with {self._pages} pages")
                self._now = max(self._now, arrivals[self._fed].at)
                continue
            self._advance(rows, stalled, behind)
            if totals.steps % 512 == 0:
                report(len(self._ended))
        self._into.add(totals)
        return self._ended

    def _stride(self) -> bool:
        """Take several steps of decode alone, in which no request comes or ends. False where there are none."""
        batch, step, totals = self._decoding, self._step, self._totals
        steps = totals.samples.unwanted
        if not (batch and steps > 1 and isinstance(self._costs, DecodeCosts)):
            return False
        steps = min(steps, min(end for end, sequences in self._ending.items() if sequences) - step)
        cost, high = self._costs.level(batch, self._context)
        steps = min(steps, math.ceil(high - self._context / batch))
        if self._fed < len(self._times):
            steps = min(steps, math.ceil((self._times[self._fed] - self._now) / cost.seconds))
        if steps < 2 or batch * (steps // PAGE_SIZE + 1) > self._free:
            return False
        self._free -= steps // PAGE_SIZE * batch
        self._free -= sum(self._phases[(step + offset) % PAGE_SIZE] for offset in range(steps % PAGE_SIZE))
        self._step += steps
        self._now += steps * cost.seconds
        self._context += batch * steps
        totals.samples.skip(steps)
        totals.gaps[cost.seconds] += batch * steps
        busy = steps * cost.model, steps * cost.attention, steps * cost.network
        totals.count(steps * cost.seconds, busy, steps * cost.link_bytes, batch, 0, steps)
        return True

    def _feed(self) -> int:
        """Take up the requests that have arrived, as far ahead as the scheduler looks. Returns how many are left."""
        arrivals, now = self._trace.arrivals, self._now
        while self._fed < len(arrivals) and arrivals[self._fed].at <= now:
            number, arrival = self._fed, arrivals[self._fed]
            many = self._ahead and self._ahead + arrival.prompt > BACKLOG_TOKENS
            if many or self._alive - self._running >= BACKLOG:
                return bisect_right(self._times, now) - self._fed
            self._fed += 1
            if arrival.prompt + arrival.output > self._possible + 1:
                if not self._alike:
                    raise Unusual
                self._totals.rejected += 1
                continue
            life = self._lives_before.get(number) or Life(arrival)
            heappush(self._waiting, (number, Sequence(number, arrival, life)))
            self._alive += 1
            self._ahead += arrival.prompt
            self._totals.prompt_tokens += arrival.prompt
        return 0

    def _plan(self) -> tuple[list[tuple[Sequence, int]], list[Sequence]]:
        """The rows of prompts, with their tokens, and the sequences in decode that get no page. All others decode."""
        begin = self._phases[self._step % PAGE_SIZE]
        last = sum(prompt.known - prompt.computed == 1 for prompt in self._prompts)
        if self._decoding + last >= self._budget:
            raise Unusual
        tokens = self._budget - self._decoding - last
        rows, pages, shares = [], begin, tokens
        for prompt in self._prompts:
            if count := limit_of(prompt, shares):
                rows.append((prompt, count))
                pages += pages_of(prompt.computed + count) - pages_of(prompt.computed)
                shares -= count if prompt.known - prompt.computed > 1 else 0
        if pages > self._free:
            if not self._alike:
                raise Unusual
            return self._make_room(tokens)
        self._free -= pages
        if self._waiting and shares > 0:
            self._admit(rows, shares)
        return rows, []

    def _admit(self, rows: list[tuple[Sequence, int]], left: int) -> None:
        """Give KV to those that wait, in turn, while there is room: rows of `left` tokens in all."""
        limit = self._system.max_sequences
        planned = dict(rows)
        while self._waiting and left > 0 and self._running < limit:
            newcomer = self._waiting[0][1]
            if self._running:
                spare = self._free - self._running - self._spared
                for other in self._prompts:
                    done = other.computed + planned.get(other, 0)
                    spare -= pages_of(other.known) - pages_of(done) if other.known - done > 1 else 0
                if pages_of(newcomer.known) + 1 > spare:
                    if not self._alike:
                        raise Unusual
                    return
            heappop(self._waiting)
            count = affordable(0, limit_of(newcomer, left), self._free)
            self._running += 1
            self._prompts.append(newcomer)
            self._prompts.sort(key=lambda sequence: sequence.number)
            if not count:
                return
            self._free -= pages_of(count)
            rows.append((newcomer, count))
            planned[newcomer] = count
            left -= count

    def _make_room(self, left: int) -> tuple[list[tuple[Sequence, int]], list[Sequence]]:
        """`_plan` where pages are short: they are given by number, and the youngest give way."""
        step, prompts = self._step, set(self._prompts)
        decoding = [sequence for ending in self._ending.values() for sequence in ending]
        idle = sorted([*decoding, *prompts], key=lambda sequence: sequence.number)
        rows: list[tuple[Sequence, int]] = []
        stalled: list[Sequence] = []
        short, place = False, 0
        while place < len(idle):
            sequence = idle[place]
            place += 1
            done = sequence.computed if sequence in prompts else sequence.at(step)
            want = limit_of(sequence, left) if sequence in prompts else 1
            if not want:
                continue
            while not (count := affordable(done, want, self._free)):
                if len(idle) > place:
                    self._preempt(idle.pop(), prompts)
                elif len(idle) > 1:
                    short = True
                    break
                else:
                    raise Unusual
            self._free -= pages_of(done + count) - pages_of(done)
            if sequence not in prompts:
                if not count:
                    stalled.append(sequence)
            elif count:
                rows.append((sequence, count))
                left -= count if sequence.known - sequence.computed > 1 else 0
        if not short and left > 0:
            self._admit(rows, left)
        return rows, stalled

    def _preempt(self, victim: Sequence, prompts: set[Sequence]) -> None:
        """Take its KV away; it waits, and all its tokens are computed again."""
        if victim in prompts:
            self._prompts.remove(victim)
            self._free += pages_of(victim.computed)
        else:
            done = victim.at(self._step)
            self._ending[victim.ends].remove(victim)
            self._leave(victim, done)
            self._free += pages_of(done)
            last = self._late.pop(victim, self._now)
            victim.life.tokens += done + 1 - victim.known
            victim.life.last = last
            victim.known = done + 1
        victim.computed = 0
        victim.preempted = True
        self._running -= 1
        self._totals.preemptions += 1
        heappush(self._waiting, (victim.number, victim))

    def _enter(self, each: Sequence, step: int) -> None:
        """The sequence decodes from that step on, with all its known tokens but the last computed."""
        each.computed, each.since = each.known - 1, step
        each.ends = step + each.output - (each.known - each.prompt) - 1
        self._ending.setdefault(each.ends, []).append(each)
        self._phases[(step - each.computed) % PAGE_SIZE] += 1
        self._context += each.computed
        self._decoding += 1

    def _leave(self, each: Sequence, done: int) -> None:
        self._phases[(each.since - each.computed) % PAGE_SIZE] -= 1
        self._context -= done
        self._decoding -= 1

    def _advance(self, rows: list[tuple[Sequence, int]], stalled: list[Sequence], behind: int) -> None:
        """Let the batch's time pass. Every row that samples has a token then."""
        step, before = self._step, self._now
        for sequence in stalled:  # as if it began a step later
            self._ending[sequence.ends].remove(sequence)
            self._leave(sequence, sequence.at(step))
            self._late.setdefault(sequence, before)
        decode, context = self._decoding, self._context
        seconds = self._charge(rows, decode, context, behind)
        self._now = now = before + seconds
        self._step = step + 1
        gaps = self._totals.gaps
        usual = decode
        if self._late:
            for sequence in [sequence for sequence in self._late if sequence not in stalled]:
                gaps[now - self._late.pop(sequence)] += 1
                usual -= 1
        if usual:
            gaps[now - before] += usual
        self._context += decode
        if ending := self._ending.pop(step, None):
            for sequence in sorted(ending, key=lambda sequence: sequence.number):
                self._leave(sequence, sequence.at(step + 1))
                self._end(sequence, sequence.at(step + 1))
        for sequence in stalled:
            sequence.since += 1
            sequence.ends += 1
            self._ending.setdefault(sequence.ends, []).append(sequence)
            self._phases[(sequence.since - sequence.computed) % PAGE_SIZE] += 1
            self._context += sequence.at(step + 1)
            self._decoding += 1
        for sequence, count in sorted(rows, key=lambda row: row[1] > 1) if len(rows) > 1 else rows:
            sequence.computed += count
            if sequence.computed == sequence.known:
                self._prompts.remove(sequence)
                self._sample(sequence, step + 1)

    def _sample(self, each: Sequence, step: int) -> None:
        """A sequence whose known tokens are computed has one more, and decodes unless that is its last."""
        life, now = each.life, self._now
        if each.known == each.prompt:
            self._ahead -= each.prompt
            if not life.tokens:  # else it has this one from elsewhere
                life.first = life.last = now
                life.tokens = 1
        else:
            self._totals.gaps[now - life.last] += 1
            life.tokens += 1
            life.last = now
        each.known += 1
        if each.known - each.prompt >= each.output:
            self._end(each, each.computed)
            return
        self._enter(each, step)
        if life.last != now:
            self._late[each] = life.last

    def _end(self, each: Sequence, computed: int) -> None:
        life = each.life
        if each.known - each.prompt < each.output:
            life.tokens += each.output - (each.known - each.prompt)
            life.last = self._now
        self._free += pages_of(computed)
        self._running -= 1
        self._alive -= 1
        self._ended.append(life)

    def _charge(self, rows: list[tuple[Sequence, int]], decode: int, context: int, behind: int) -> float:
        """Count a batch's cost. Returns its seconds."""
        prompts = PromptRows()
        for sequence, count in rows:
            start = sequence.computed
            if count == 1 and start >= sequence.prompt:
                decode += 1
                context += start
                continue
            if not self._prefill and not sequence.preempted:
                continue  # computed elsewhere
            # What is too long for the room beside the dense layers is read by decode's holders.
            prompts.add(start, count, sequence.prompt, 0 if sequence.prompt <= self._room else start)
        cost = StepCost(0.0)
        if prompts.tokens:
            cost = self._system.step(prompts.load(decode, context))
        elif decode:
            cost = self._costs(decode, context)
        totals, seconds = self._totals, cost.seconds
        busy = cost.model, cost.attention, cost.network
        waiting = self._alive - self._running + behind
        totals.count(seconds, busy, cost.link_bytes, decode, waiting)
        if seconds and totals.samples.due():
            shares = (min(1.0, part / seconds) for part in busy)
            totals.samples.add(Sampled(self._now, seconds, decode, prompts.tokens, self._running, waiting, *shares))
        return seconds
