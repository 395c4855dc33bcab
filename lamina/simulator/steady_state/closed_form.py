"""What a system yields, without the scheduler (`estimate`): all of the trace's requests in a replay of a few sums a
request.

- The trace (`demand.py`), at the rate that is asked for, goes through one instance batch by batch (`replay`, which says
  what is left out). Of r replicas each takes every rth request. So bursts, loads that change and long prompts are those
  of the trace, and times those of each request.
- A coarse look takes windows of it: enough to sort thousands of candidates, and too kind by 6 to 12 points of what is
  in time.
- It begins with as many sequences in decode as Little's law has for the mean of the requests, with outputs half way
  through; and it ends with the last first token.
- Where prompts have instances of their own, there are three of these in a row: prompts, one after another over the
  link, decode. The wait for decode and the way to it come after the first token: TPOT has them.
- Where not all can be served the highest rate is searched for that has enough in time.

`none_meets` and `slow_link` say why systems cannot serve a demand: what they have, and what they need. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from operator import attrgetter

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import ALPHA, Load, minimum_bandwidth
from lamina.simulator.costs.systems import PAGE_SIZE, Offloaded, System, price, without_prices
from lamina.simulator.event_loop.results import ATTAINMENT
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.steady_state.service import FOREVER, Point, Service, bound, held, largest
from lamina.simulator.traces.demand import Demand

COARSE = 512
"""Requests of a coarse look."""
_TRIES = 10
"""Rates that are tried to find the best one."""
CLOSE = 0.01
"""How closely a rate, or a factor, is found, as a share of it."""
_FULL = 0.98
"""The share of what passes at most that is the highest rate, where requests may not wait for long."""
_FEWER = (0.85, 0.7, 0.5)
"""Shares of the sequences that the pace allows in the mean, which are tried as limits: bursts wait, and slow no others.
"""


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
    """Sequences at a time with which most requests are in time: the batch limit to deploy with."""
    fits: int
    """Sequences that fit into the KV."""
    tpot: float = math.inf
    ttft: float = math.inf
    """Without waiting for a place, where no TTFT is asked for."""
    share: float = 0.0
    """The share of the requests taken that is within the SLO."""
    taken: float = 0.0
    """The part of the demand's rate that is served; the rest has to go elsewhere."""
    almost: float = 0.0
    """The share of all that is asked for which is within the SLO with one replica fewer or, where the most that there
    may be do not serve it, with these. 0: they cannot keep up."""
    capacity: float = 0.0
    """The most that could be taken by all replicas that there may be, where that was looked for: of what is too little,
    and by a coarse look of what is free; else what is taken."""
    tokens_per_second: float = 0.0
    demanded: float
    needed: float = ATTAINMENT
    """The share within the SLO that is enough."""

    @property
    def goodput(self) -> float:
        """Requests a second within the SLO."""
        return self.taken * self.share

    @property
    def dollars_per_million(self) -> float:
        """Dollars for a million output tokens."""
        return cost_of_a_million(self.price, self.tokens_per_second)

    @property
    def serves(self) -> bool:
        """Whether the whole demand is served, enough of it within the SLO."""
        return self.share >= self.needed and (math.isinf(self.demanded) or self.taken >= self.demanded * (1 - 1e-9))


def cost_of_a_million(price: float, tokens_per_second: float) -> float:
    """Dollars for a million tokens, at `price` dollars an hour; infinite where there are none."""
    return price / (tokens_per_second * 3600) * 1e6 if tokens_per_second else math.inf


def estimate(
    system: System,
    replicas: int,
    demand: Demand,
    slo: Slo,
    prefill: bool = True,
    fine: bool = True,
    needed: float = ATTAINMENT,
    partly: bool = True,
) -> Estimate:
    """What up to `replicas` of a system yield: as few as serve the demand, all where it is infinite or too much. It is
    served where a share of `needed` is within the SLO. What is too little takes the part of the demand that it serves,
    if `partly`; else all of it, of which fewer are in time.

    Without `prefill`, prompts are computed elsewhere and cost nothing here. Where it is not `fine`, a few windows of
    the trace are replayed. Where nothing fits or no batch is fast enough, `capacity` is 0; `tpot` and `ttft` are then
    those of a lone sequence (infinite where not even the weights fit).
    """
    requests = len(demand.sample) if fine else min(COARSE, len(demand.sample))
    forecast = _estimate(without_prices(system), replicas, demand, slo, prefill, requests, needed, partly)
    cost = price(system)
    if forecast.serves and not cost:
        highest = _estimate(
            without_prices(system), replicas, demand.at_rate(math.inf), slo, prefill, COARSE, needed, True
        )
        forecast = replace(forecast, capacity=max(forecast.taken, highest.taken))
    return replace(forecast, price=cost * forecast.replicas)


def sequences(system: System, demand: Demand) -> int:
    """How many sequences' KV and states are held at a time, at their mean context: 0 where the longest doesn't fit.
    Raises InvalidRequest where the weights don't."""
    capacity = system.capacity
    room = capacity.tokens * system.policy.held
    if room < held(system, demand.longest):
        return 0
    by_pages = int(room / held(system, demand.context + PAGE_SIZE / 2))
    return min(system.max_sequences, system.max_batch_tokens, by_pages, capacity.sequences)


@lru_cache(maxsize=1 << 14)
def _estimate(
    system: System, replicas: int, demand: Demand, slo: Slo, prefill: bool, requests: int, needed: float, partly: bool
) -> Estimate:
    """Remembered, as prices do not change it."""
    try:
        fits = sequences(system, demand)
    except InvalidRequest:  # not even the weights
        fits = 0
    nothing = Estimate(replicas=1, price=0.0, fits=fits, demanded=demand.rate, needed=needed)
    if fits < 1:
        return nothing
    service = Service(system, demand, slo, prefill)
    pace = min(bound(slo.tpot), FOREVER)
    if not (limit := largest(fits, lambda batch: service.pace(batch) <= pace)):
        lone = service.alone(requests)
        return replace(nothing, tpot=lone.tpot, ttft=lone.ttft)
    search = _Search(service, limit, slo, requests, needed)
    count, almost = search.fewest(replicas, demand.rate)
    if count:
        point, places = search.at(demand.rate / count, count)
    elif not partly:
        if not almost:
            return nothing
        count = replicas
        point, places = search.at(demand.rate / count, count)
    else:
        count = replicas
        point, places = search.best(count, demand.rate / count)
        if not point.share:
            return replace(nothing, tpot=search.alone.tpot, ttft=search.alone.ttft)
    return Estimate(
        replicas=count,
        price=0.0,
        batch=point.batch,
        most=places,
        fits=fits,
        tpot=point.tpot,
        ttft=point.ttft,
        share=point.share,
        taken=point.rate * count,
        almost=almost,
        capacity=point.rate * count,
        tokens_per_second=point.rate * count * demand.output,
        demanded=demand.rate,
        needed=needed,
    )


class _Search:
    """A search for the rates, counts and limits with which one system does best. It remembers what it tried."""

    def __init__(self, service: Service, most: int, slo: Slo, requests: int, needed: float) -> None:
        self._service, self._limit, self._requests, self._needed = service, most, requests, needed
        self._full = 1.0 if slo.ttft is None else _FULL
        fewer = _FEWER if slo.tpot is not None and requests > COARSE else ()
        self._places = [most, *(max(1, int(most * part)) for part in fewer)]
        self._tops = [service.most(places) * self._full for places in self._places]
        self._tried: dict[tuple[float, int], tuple[Point, int]] = {}

    @cached_property
    def alone(self) -> Point:
        return self._service.alone(self._requests)

    def at(self, rate: float, replicas: int) -> tuple[Point, int]:
        """One of so many instances at that rate, and its limit of sequences at a time: the highest that keeps the SLO,
        or the one that comes closest to it."""
        if (rate, replicas) not in self._tried:
            point, limit = self._service.at(rate, self._limit, replicas, self._requests), self._limit
            for places, top in zip(self._places[1:], self._tops[1:], strict=True):
                if point.share >= self._needed or rate > top:
                    break
                other = self._service.at(rate, places, replicas, self._requests)
                if other.share < point.share:
                    break
                point, limit = other, places
            self._tried[rate, replicas] = point, limit
        return self._tried[rate, replicas]

    def fewest(self, replicas: int, rate: float) -> tuple[int, float]:
        """How many serve that rate (0: up to `replicas` do not), and the share in time of one fewer, or of all where
        they do not serve it."""
        least = max(1, math.ceil(min(rate, 1e18) / self._tops[0] * (1 - 1e-9)))  # fewer cannot keep up
        if math.isinf(rate) or least > replicas:
            return 0, 0.0
        if self._share(rate, least) >= self._needed:
            return least, 0.0
        if self.alone.share < self._needed or self._share(rate, replicas) < self._needed:
            return 0, self._share(rate, replicas)
        counts = range(least + 1, replicas)
        count = bisect_left(counts, True, key=lambda count: self._share(rate, count) >= self._needed) + least + 1
        return count, self._share(rate, count - 1)

    def best(self, replicas: int, most: float) -> tuple[Point, int]:
        """One of so many instances at the highest rate up to `most` that keeps the SLO and, where none does, at that
        with most in time; and its limit of sequences. The most that each limit passes is tried first, since a limit
        keeps bursts from slowing others only where it binds."""
        first = list(dict.fromkeys(min(top, most) for top in self._tops))
        tried: list[tuple[Point, int]] = []
        low = replace(self.alone, rate=0.0)
        for _ in range(_TRIES):
            points = sorted((point for point, _ in tried), key=attrgetter("rate"))
            lower = next((point for point in reversed(points) if point.share >= self._needed), low)
            higher = next((point for point in points if point.rate > lower.rate), None)
            if first and first[0] > lower.rate:
                rate = first.pop(0)
            elif higher is None or higher.rate <= lower.rate * (1 + CLOSE):
                break
            else:
                first.clear()
                part = 0.5
                if lower.share > self._needed > higher.share:
                    part = (lower.share - self._needed) / (lower.share - higher.share)
                rate = lower.rate + min(0.8, max(0.2, part)) * (higher.rate - lower.rate)
            tried.append(self.at(rate, replicas))
        return max(tried, key=lambda pair: (pair[0].share >= self._needed, pair[0].rate * pair[0].share))

    def _share(self, rate: float, count: int) -> float:
        return self.at(rate / count, count)[0].share


def none_meets(tried: Sequence[tuple[str, System, Estimate]], demand: Demand, slo: Slo, prefill: bool = True) -> str:
    """The reason why none of these, by name, gets a request through within the SLO."""
    limits = ", ".join(
        f"{name} {seconds * 1000:g} ms" for name, seconds in (("ttft", slo.ttft), ("tpot", slo.tpot)) if seconds
    )
    by_pace = sorted(tried, key=lambda each: (each[2].tpot, each[0]))
    for _, system, _ in by_pace:
        if isinstance(system, Offloaded) and (reason := slow_link(system, demand, slo, prefill)):
            return f"no system meets the SLO ({limits}): {reason}"
    fastest, _, forecast = by_pace[0]
    if math.isinf(forecast.tpot):
        return (
            f"no system can serve {demand.name}: its longest request has {demand.longest} tokens, whose KV fits "
            "nowhere; allowed are devices with more memory, or a policy that holds less"
        )
    return (
        f"no system meets the SLO ({limits}): the fastest, {fastest}, takes {forecast.tpot * 1000:.1f} ms "
        f"a token and {forecast.ttft:.2f} s to the first with one sequence at a time; allowed are a longer "
        "time, faster devices, or shorter prompts"
    )


def slow_link(system: Offloaded, demand: Demand, slo: Slo, prefill: bool = True) -> str:
    """The reason why a system's link is too slow; "" where a faster one would not help."""
    ideal = replace(system, link=replace(system.link, bandwidth=1e16, round_trip=0.0))
    if (
        estimate(system, 1, demand, slo, prefill).goodput
        or not (forecast := estimate(ideal, 1, demand, slo, prefill)).goodput
    ):
        return ""
    batch = max(1, forecast.most)
    cost = ideal.step(Load(batch, demand.context))
    needed = minimum_bandwidth(system.model, batch, cost.model, cost.attention)
    link, layers = system.link, system.model.attentions + system.model.states
    return (
        f"link {link.name!r} is too slow for {system.name}: it has {system.wire / 1e9:.3g} GB/s and a round trip of "
        f"{link.round_trip * 1e6:.3g} us, {layers} of which take {layers * link.round_trip * 1000:.3g} ms a token; "
        f"with {batch} sequences in decode it needs {needed / 1e9:.3g} GB/s (Lamina's minimum, slowdown {ALPHA:g})"
    )
