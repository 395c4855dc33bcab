"""What a system yields in the steady state, without running it: sums over the batch, and a search over the rate.

One replica has n sequences in decode, prompts of p and outputs of o tokens in the mean, M tokens a batch at most, and
L requests a second:

- A token takes t(n) = step(n, 0) / (1 - L w(n)) seconds, where w(n) = (step(n, q) - step(n, 0)) p / q is what a prompt
  adds, in batches of q = min(M - n, max(p, n p / o)) of its tokens.
- Requests share what passes, m(n) = n / (o t(n)) of them a second, so n is distributed as p(n) ~ prod L / m(k), and
  beyond the batch limit c they wait, with the ratio L / m(c): processor sharing with rates that depend on n, exact for
  Poisson arrivals and any lengths (Cohen 1979). Other arrivals spread n by their peakedness z = (1 + ca^2) / 2:
  p(n)^(1/z).
- Prefill is a G/G/1 queue with a request's work at M tokens a batch for service (`steady`).
- TTFT is both waits, the batches that the prompt takes, and half of one that runs when it arrives. Where prompts have
  instances of their own, the wait for decode and the way there come after the first token: TPOT has them.

A trace's load changes over hours, so each of its parts has a steady state of its own, and shares and times are means
over them: the pointwise stationary approximation (Green and Kolesar 1991). Where no TTFT is asked for, what is late
in one part is served in another, and the whole trace is one.

Left out, and in the event loop: prefixes that requests share, and preemption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.systems import System, price
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.steady_state.steady import FOREVER, Point, Replica, bound, largest
from lamina.simulator.traces.demand import Demand

ATTAINMENT = 0.9
"""The share of requests within the SLO that counts as meeting it: as DistServe (OSDI 2024) has it."""
TARGET = 0.95
"""The share that is planned for, since the closed form finds up to 0.1 more than the event loop on the Azure traces: it
takes the load for steady within each part, and a request's pace for the mean."""
PAGE = 32
"""Tokens a KV page of the engine; half of one is lost in the mean for each sequence."""
_RATES, _COARSE = 16, 24
"""Halvings to find a rate, and rates that are tried where none serves enough requests in time."""
_HARDLY = 1e-9
"""Requests a second at which each is alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What `replicas` of a system yield; by default one that can take no request. Rates are requests a second of all of
    them, times are seconds."""

    replicas: int
    price: float
    """Dollars an hour of all replicas."""
    batch: float = 0.0
    """Sequences in decode at a time, in each replica."""
    most: int = 0
    """Sequences that fit into the KV and the TPOT that is asked for: the batch limit to deploy with."""
    fits: int
    """Sequences that fit into the KV."""
    tpot: float = math.inf
    ttft: float = math.inf
    """Without waiting for a place, where no rate is asked for."""
    share: float = 0.0
    """The share of the requests taken that is within the SLO."""
    taken: float = 0.0
    """The part of the demand's rate that is served; the rest has to go elsewhere."""
    capacity: float = 0.0
    """The most that could be taken with `TARGET` of them within the SLO, or, where that can't be, with the most."""
    tokens_per_second: float = 0.0
    demanded: float

    @property
    def goodput(self) -> float:
        """Requests a second that are served so that `TARGET` of them are within the SLO; where that can't be, those
        within it."""
        return self.taken * (1 if self.share >= TARGET else self.share)

    @property
    def goodput_per_dollar(self) -> float:
        """Requests within the SLO for a dollar."""
        return self.goodput * 3600 / self.price if self.price else math.inf

    @property
    def dollars_per_million(self) -> float:
        """Dollars for a million output tokens."""
        return self.price / (self.tokens_per_second * 3600) * 1e6 if self.tokens_per_second else math.inf

    @property
    def serves(self) -> bool:
        """Whether the whole demand is served, `TARGET` of it within the SLO."""
        return self.share >= TARGET and (math.isinf(self.demanded) or self.taken >= self.demanded * (1 - 1e-9))


def estimate(
    system: System, replicas: int, demand: Demand, slo: Slo, prefill: bool = True, parts: bool = True
) -> Estimate:
    """What up to `replicas` of a system yield: as many as the demand's rate wants, all where it is infinite.

    Without `prefill`, prompts are computed elsewhere and cost nothing here. Without `parts` the demand's load is taken
    for steady, which is quick and never less. Where nothing fits or no batch is fast enough, `capacity` is 0; `tpot`
    and `ttft` are then those of a lone sequence (infinite where not even the weights fit).
    """
    try:
        fits = sequences(system, demand)
    except InvalidRequest:  # not even the weights
        fits = 0
    nothing = Estimate(replicas=1, price=price(system), fits=fits, demanded=demand.rate)
    if fits < 1:
        return nothing
    whole = Replica(system, demand, slo, prefill)
    most = largest(fits, lambda batch: whole.pace(batch) <= min(bound(slo.tpot), FOREVER))
    steady = not parts or not demand.parts or slo.ttft is None
    over = [whole] if steady else [Replica(system, part, slo, prefill) for part in demand.parts]

    def at(rate: float) -> Point:
        """One replica at that rate, in the mean over the parts."""
        return _mean([part.at(rate * part.relative, most) for part in over], rate)

    best = _best(at, max(part.most(most) / part.relative for part in over)) if most else None
    if best is None or not best.share:
        alone = whole.at(_HARDLY, 1)
        return replace(nothing, tpot=alone.tpot, ttft=alone.ttft)
    count = replicas
    if not math.isinf(demand.rate):
        count = max(1, min(replicas, math.ceil(demand.rate / best.rate - 1e-9)))
    taken = min(demand.rate / count, best.rate)
    found = at(taken) if taken < best.rate else best
    return Estimate(
        replicas=count,
        price=price(system) * count,
        batch=found.batch,
        most=most,
        fits=fits,
        tpot=found.tpot,
        ttft=found.ttft,
        share=found.share,
        taken=taken * count,
        capacity=best.rate * replicas,
        tokens_per_second=taken * count * demand.output,
        demanded=demand.rate,
    )


def sequences(system: System, demand: Demand) -> int:
    """How many sequences' KV and states are held at a time, at their mean context: 0 where the longest doesn't fit.
    Raises InvalidRequest where the weights don't."""
    policy, capacity = system.policy, system.capacity
    room = capacity.tokens * policy.held
    if room < policy.tokens_held(demand.longest):
        return 0
    by_pages = int(room / policy.tokens_held(demand.context + PAGE / 2))
    return min(system.max_sequences, system.max_batch_tokens, by_pages, capacity.sequences)


def _best(at: Callable[[float], Point], most: float) -> Point:
    """The highest rate up to `most` with `TARGET` in time; where there is none, the one that serves most."""
    low, high = 0.0, most
    for _ in range(_RATES):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).share >= TARGET else (low, middle)
    if low:
        return at(low)
    tried = [at(most * (part + 1) / _COARSE) for part in range(_COARSE)]
    return max(tried, key=lambda point: point.rate * point.share)


def _mean(points: Sequence[Point], rate: float) -> Point:
    """Of parts with equally many requests."""
    count = len(points)
    names = ("tpot", "ttft", "share", "batch")
    return Point(rate=rate, **{name: sum(getattr(point, name) for point in points) / count for name in names})
