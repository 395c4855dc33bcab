"""One replica of a system in the steady state: what a batch takes, how many requests pass, how long they wait.

`closed_form` has the formulas, and calls this with one rate after another.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.systems import Disaggregated, System
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.traces.demand import Demand, mean_and_variation

FOREVER = 1e9
"""Seconds that no token takes, unless prefill can't keep up."""
_WHOLE = 16_384
"""Tokens of prefill that a batch is counted with at most, where nothing cuts prompts up."""
_ANCHORS = 12
"""Batches whose seconds are computed; those between them are interpolated."""
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Point:
    """One replica at some rate or batch."""

    tpot: float
    rate: float
    ttft: float
    share: float
    batch: float = 0.0


def largest(most: int, passes: Callable[[int], bool]) -> int:
    """The largest batch up to `most` that passes, where all smaller ones do; 0: not even one sequence."""
    return bisect_right(range(1, most + 1), False, key=lambda batch: not passes(batch))


class Replica:
    """One replica under one demand. Remembers each batch's times."""

    def __init__(self, system: System, demand: Demand, slo: Slo, prefill: bool) -> None:
        self._system, self._demand, self._slo, self._prefill = system, demand, slo, prefill
        self._apart = system if isinstance(system, Disaggregated) and prefill else None
        self._steps: dict[tuple[int, int], float] = {}
        self._limits: dict[int, int] = {}
        self._grids: dict[int, tuple[_Floats, _Floats, _Floats]] = {}
        self._long_tokens, self._long_pairs = self._too_long() if self._here else (0.0, 0.0)
        self._prefills, self._sendings = self._beforehand()

    @property
    def relative(self) -> float:
        return self._demand.relative

    def pace(self, batch: int) -> float:
        """Seconds from token to token with that mean batch; infinite where prefill can't keep up."""
        if not batch:
            return self._step(1, 0)
        if not self._here:
            return self._step(batch, 0)
        arriving = batch * self._demand.prompt / self._demand.output  # prompt tokens a batch, in the mean
        return (
            math.inf
            if arriving > self._chunk(batch)
            else self._step(batch, 0) + batch / self._demand.output * self._added(batch)
        )

    def most(self, batch: int) -> float:
        """Requests a second that pass with that batch, or the largest below it that is possible."""
        batch = self._possible(batch)
        return batch / (self._demand.output * self.pace(batch))

    def at(self, rate: float, most: int) -> Point:
        """With so many requests a second, and room for `most` in decode; without a share where that is too much."""
        demand, slo = self._demand, self._slo
        most = self._possible(most)
        if not most:
            return Point(math.inf, rate, math.inf, 0.0)
        count, alone, added = self._grid(most)
        free = 1 - rate * added
        passing = count * free / (demand.output * alone)
        if free.min() <= 0 or rate >= passing[-1] * (1 + 1e-9):
            return Point(self.pace(most), rate, math.inf, 0.0)
        spread = (1 + demand.gap_variation) / 2
        weights = np.concatenate(([0.0], np.cumsum(np.log(rate / passing)))) / spread
        chance = np.exp(weights - weights.max())
        ratio = min(1 - 1e-9, math.pow(rate / passing[-1], 1 / spread))
        beyond = float(chance[-1]) * ratio / (1 - ratio)
        total = float(chance.sum()) + beyond
        decoding = count * chance[1:]
        decoding[-1] += most * beyond
        batch = float(decoding.sum()) / total
        room = Wait(beyond / (1 - ratio) / total / rate, (float(chance[-1]) + beyond) / total)
        pace = batch / (rate * demand.output)
        within = float(decoding[alone / free <= bound(slo.tpot) * (1 + 1e-9)].sum()) / float(decoding.sum())
        before, after, first, late = [room], list[Wait](), [1.5 * pace] * len(demand.prompts), 0.0
        if self._apart is not None:
            service, variation = mean_and_variation(self._prefills)
            late, sent = mean_and_variation(self._sendings)
            before = [queue(rate, service, demand.gap_variation, variation)]
            after = [room, queue(rate, late, demand.gap_variation, sent)]
            first = list(self._prefills)
        elif self._here:
            whole = min(most, math.ceil(batch))
            service = demand.prompt * self._step(whole, self._room(whole)) / self._room(whole)
            before = [room, queue(rate, service, demand.gap_variation, demand.prompt_variation)]
            first = [pace / 2 + self._alone(whole, prompt) for prompt in demand.prompts]
        if any(math.isinf(wait.seconds) for wait in (*before, *after)):
            return Point(pace, rate, math.inf, 0.0)
        share = within * sum(in_time(before, bound(slo.ttft) - each) for each in first) / len(first)
        share *= in_time(after, (bound(slo.tpot) - pace) * demand.output - late)
        waiting = sum(wait.seconds for wait in before) if self._slo.ttft is not None else 0.0
        ttft = waiting + sum(first) / len(first)
        tpot = pace + (late + sum(wait.seconds for wait in after)) / demand.output
        return Point(tpot, rate, ttft, share, batch)

    def _possible(self, most: int) -> int:
        """The largest batch up to `most` beside which prefill can keep up."""
        if most not in self._limits:
            self._limits[most] = largest(most, lambda batch: self.pace(batch) <= FOREVER)
        return self._limits[most]

    @property
    def _here(self) -> bool:
        """Whether prompts are computed between decode's batches."""
        return self._prefill and self._apart is None

    def _grid(self, most: int) -> tuple[_Floats, _Floats, _Floats]:
        """For 1 to `most` in decode: how many, seconds of a batch without prefill, and seconds that a prompt adds."""
        if most not in self._grids:
            count = np.arange(1, most + 1, dtype=np.float64)
            anchors = sorted({max(1, round(most ** (part / (_ANCHORS - 1)))) for part in range(_ANCHORS)})
            alone = np.interp(count, anchors, [self._step(batch, 0) for batch in anchors])
            added = np.interp(count, anchors, [self._added(batch) if self._here else 0.0 for batch in anchors])
            self._grids[most] = count, alone, added
        return self._grids[most]

    def _added(self, batch: int) -> float:
        """Seconds that a prompt adds to others' batches; infinite where they have no room."""
        chunk = self._chunk(batch)
        if chunk < 1:
            return math.inf
        return (self._step(batch, chunk) - self._step(batch, 0)) * self._demand.prompt / chunk

    def _chunk(self, batch: int) -> int:
        """Tokens of prefill in a batch that has some."""
        prompt = self._demand.prompt
        return min(self._room(batch), math.ceil(max(prompt, batch * prompt / self._demand.output)))

    def _room(self, batch: int) -> int:
        """Tokens of prefill that a batch has room for."""
        bound = max(_WHOLE, math.ceil(4 * self._demand.prompt))
        return max(0, min(self._system.max_batch_tokens - batch, bound))

    def _alone(self, batch: int, prompt: float) -> float:
        """Seconds of the batches that a prompt takes; the last one's straight between an empty and a full one's."""
        room = self._room(batch)
        whole, rest = divmod(prompt, room)
        empty, full = self._step(batch, 0), self._step(batch, room)
        return whole * full + (empty + (full - empty) * rest / room if rest else 0.0)

    def _step(self, batch: int, tokens: int) -> float:
        if (batch, tokens) not in self._steps:
            self._steps[batch, tokens] = self._system.step(self._load(batch, tokens)).seconds
        return self._steps[batch, tokens]

    def _load(self, batch: int, tokens: int) -> Load:
        """A batch with so many tokens of prefill, of prompts as they are in the mean: each token is of one with
        E[p^2] / E[p] tokens, and half of those come before it."""
        if not tokens:
            return Load(batch, self._demand.context)
        rows = max(1.0, tokens / self._demand.prompt)
        before, chunk = self._demand.prompt_pairs / self._demand.prompt, tokens / rows
        long, pairs = self._long_tokens, tokens * before
        elsewhere = max(0.0, self._long_pairs * pairs - long * tokens * chunk / 2)
        keys = rows * (before + chunk / 2) * (1 - long) + long * tokens
        ends = tokens / self._demand.prompt
        return Load(batch, self._demand.context, tokens, pairs - elsewhere, keys, long * tokens, elsewhere, ends)

    def _too_long(self) -> tuple[float, float]:
        """Of all prompts' tokens, and of their query-key pairs, the shares of prompts whose past does not fit beside
        the dense layers."""
        prompts = self._demand.prompts
        long = [prompt for prompt in prompts if prompt > self._system.prompt_tokens]
        pairs = sum(prompt**2 for prompt in long) / sum(prompt**2 for prompt in prompts)
        return sum(long) / sum(prompts), pairs

    def _beforehand(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Where prompts have an instance of their own: its seconds for each of the demand's, and the link's."""
        if self._apart is None:
            return (), ()
        prompts = [math.ceil(prompt) for prompt in self._demand.prompts]
        link, prefill = self._apart.link, self._apart.prefill
        return (
            tuple(prefill.step(Load(0, 0.0, each, each**2 / 2, each, prompts=1)).seconds for each in prompts),
            tuple(link.round_trip + self._apart.transfer_bytes(each) / self._apart.wire for each in prompts),
        )


def bound(seconds: float | None) -> float:
    """What an SLO allows: no bound is infinite."""
    return math.inf if seconds is None else seconds


@dataclass(frozen=True, slots=True)
class Wait:
    """Mean seconds over all, and the share that waits at all."""

    seconds: float
    share: float


def queue(rate: float, service: float, arrivals: float, services: float) -> Wait:
    """One server, `rate` a second with `service` seconds each: Kingman's formula (1961), which is Pollaczek and
    Khinchine's for Poisson arrivals. The last two are squared coefficients of variation, of the times between arrivals
    and of service. Infinite where it can't keep up."""
    busy = rate * service
    if busy >= 1:
        return Wait(math.inf, 1.0)
    return Wait((arrivals + services) / 2 * busy / (1 - busy) * service, busy)


def in_time(waits: Sequence[Wait], left: float) -> float:
    """The share that waits no longer than `left` seconds in all of them: 1 - P exp(-t P / W) for the share P that waits
    and the mean W, as it is for an M/M/1 queue."""
    if left < 0:
        return 0.0
    seconds, waiting = sum(wait.seconds for wait in waits), 1 - math.prod(1 - wait.share for wait in waits)
    if math.isinf(left) or seconds <= 0:
        return 1.0
    return 0.0 if math.isinf(seconds) else 1 - waiting * math.exp(-left * waiting / seconds)
