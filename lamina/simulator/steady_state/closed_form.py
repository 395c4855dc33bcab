"""What a system yields, without the scheduler (`estimate`): the trace's own requests in a replay of a few sums a
request.

- A sample of the trace (`demand.py`), in its order and at the rate that is asked for, goes through one instance batch
  by batch (`replay`): first come, first served, with a limit of sequences, of tokens of KV and of tokens a batch. Of r
  replicas one takes every rth request. So bursts, loads that change and long prompts are those of the trace, times are
  those of each request, and at low rates each meets an empty instance.
- Batches take what the cost model says, interpolated (`Batches`).
- It begins with as many sequences in decode as Little's law has for the mean of the requests, with outputs half way
  through; and it ends with the last first token. So a short excerpt stands for a long run.
- Where prompts have instances of their own, there are three of these in a row: prompts, one after another over the
  link, decode. The wait for decode and the way to it come after the first token: TPOT has them.
- The highest rate is searched for where the requests taken count most: those at `TARGET` within the SLO in full, fewer
  the more the share falls short. Both grow smoothly with what the SLO allows.

Left out, and in the event loop: prefixes that requests share, and preemption.

`none_meets` and `slow_link` say why systems cannot serve a demand: what they have, and what they need. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import ALPHA, Load, minimum_bandwidth
from lamina.simulator.costs.systems import Offloaded, System, price, without_prices
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.steady_state.service import FOREVER, PAGE, Point, Service, bound, held, largest
from lamina.simulator.traces.demand import Demand

TARGET = 0.94
"""The share that is planned for: four points more than `ATTAINMENT`, since a sample of the trace is not the trace."""
STEEPNESS = 8
"""The power of share / `TARGET` that requests count with, below it."""
COARSE, FINE = 512, 2000
"""Requests of the sample that a rate is tried with."""
_TRIES, _SPARE = {COARSE: 8, FINE: 12}, 3
"""Rates that are tried to find the best one, and to find what there is to spare."""
_CLOSE = 0.02
"""How closely the best rate is found, as a share of it."""
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
    capacity: float = 0.0
    """The most that could be taken by all replicas that there may be, as far as it was looked for."""
    tokens_per_second: float = 0.0
    demanded: float

    @property
    def goodput(self) -> float:
        """Requests a second that count: all that are taken, where `TARGET` of them are within the SLO; else fewer, by
        how much is missing (`STEEPNESS`), so that no small change of anything makes a large one of this."""
        return self.taken * credit(self.share)

    @property
    def goodput_per_dollar(self) -> float:
        """Requests that count for a dollar."""
        return self.goodput * 3600 / self.price if self.price else math.inf

    @property
    def dollars_per_million(self) -> float:
        """Dollars for a million output tokens."""
        return cost_of_a_million(self.price, self.tokens_per_second)

    @property
    def serves(self) -> bool:
        """Whether the whole demand is served, `TARGET` of it within the SLO."""
        return self.share >= TARGET and (math.isinf(self.demanded) or self.taken >= self.demanded * (1 - 1e-9))


def cost_of_a_million(price: float, tokens_per_second: float) -> float:
    """Dollars for a million tokens, at `price` dollars an hour; infinite where there are none."""
    return price / (tokens_per_second * 3600) * 1e6 if tokens_per_second else math.inf


def credit(share: float) -> float:
    """What a request counts where so many are within the SLO."""
    return math.pow(min(1.0, share / TARGET), STEEPNESS)


def estimate(
    system: System, replicas: int, demand: Demand, slo: Slo, prefill: bool = True, fine: bool = True
) -> Estimate:
    """What up to `replicas` of a system yield: as few as serve the demand, all where it is infinite or too much.

    Without `prefill`, prompts are computed elsewhere and cost nothing here. Where it is not `fine`, fewer requests of
    the trace are replayed, at fewer rates. Where nothing fits or no batch is fast enough, `capacity` is 0; `tpot` and
    `ttft` are then those of a lone sequence (infinite where not even the weights fit).
    """
    forecast = _estimate(without_prices(system), replicas, demand, slo, prefill, FINE if fine else COARSE)
    return replace(forecast, price=price(system) * forecast.replicas)


def sequences(system: System, demand: Demand) -> int:
    """How many sequences' KV and states are held at a time, at their mean context: 0 where the longest doesn't fit.
    Raises InvalidRequest where the weights don't."""
    capacity = system.capacity
    room = capacity.tokens * system.policy.held
    if room < held(system, demand.longest):
        return 0
    by_pages = int(room / held(system, demand.context + PAGE / 2))
    return min(system.max_sequences, system.max_batch_tokens, by_pages, capacity.sequences)


@lru_cache(maxsize=1 << 14)
def _estimate(system: System, replicas: int, demand: Demand, slo: Slo, prefill: bool, requests: int) -> Estimate:
    """Remembered, as prices do not change it."""
    try:
        fits = sequences(system, demand)
    except InvalidRequest:  # not even the weights
        fits = 0
    nothing = Estimate(replicas=1, price=0.0, fits=fits, demanded=demand.rate)
    if fits < 1:
        return nothing
    service = Service(system, demand, slo, prefill)
    pace = min(bound(slo.tpot), FOREVER)
    if not (limit := largest(fits, lambda batch: service.pace(batch) <= pace)):
        lone = service.alone(requests)
        return replace(nothing, tpot=lone.tpot, ttft=lone.ttft)
    search = _Search(service, limit, slo, requests)
    if count := search.fewest(replicas, demand.rate):
        point, places = search.at(demand.rate / count, count)
        highest = search.best(count, point, _SPARE)
    else:
        count, alone = replicas, search.alone
        highest = search.best(count, alone, _TRIES[requests], demand.rate / count) if alone.share else 0.0
        if not highest:
            return replace(nothing, tpot=alone.tpot, ttft=alone.ttft)
        point, places = search.at(highest, count)
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
        capacity=highest * replicas,
        tokens_per_second=point.rate * count * demand.output,
        demanded=demand.rate,
    )


class _Search:
    """A search for the rates, counts and limits with which one system does best. It remembers what it tried."""

    def __init__(self, service: Service, most: int, slo: Slo, requests: int) -> None:
        self._service, self._limit, self._requests = service, most, requests
        self._full = 1.0 if slo.ttft is None else _FULL
        fewer = _FEWER if slo.tpot is not None and requests == FINE else ()
        self._places = [most, *(max(1, int(most * part)) for part in fewer)]
        self._tops = [service.most(places) * self._full for places in self._places]
        self._tried: dict[tuple[float, int], tuple[Point, int]] = {}

    @cached_property
    def alone(self) -> Point:
        return self._service.alone(self._requests)

    def at(self, rate: float, replicas: int) -> tuple[Point, int]:
        """One of so many instances at that rate, and its limit of sequences at a time: the highest that keeps `TARGET`,
        or the one that comes closest to it."""
        if (rate, replicas) not in self._tried:
            point, limit = self._service.at(rate, self._limit, replicas, self._requests), self._limit
            for places, top in zip(self._places[1:], self._tops[1:], strict=True):
                if point.share >= TARGET or rate > top:
                    break
                other = self._service.at(rate, places, replicas, self._requests)
                if other.share < point.share:
                    break
                point, limit = other, places
            self._tried[rate, replicas] = point, limit
        return self._tried[rate, replicas]

    def fewest(self, replicas: int, rate: float) -> int:
        """How many serve that rate, `TARGET` in time: 0 where up to `replicas` do not."""
        least = self._least(rate)
        if math.isinf(rate) or least > replicas:
            return 0
        if self._serves(rate, least):
            return least
        if self.alone.share < TARGET or not self._serves(rate, replicas):
            return 0
        return bisect_right(range(least + 1, replicas), False, key=lambda count: self._serves(rate, count)) + least + 1

    def best(self, replicas: int, low: Point, tries: int, most: float = math.inf) -> float:
        """The rate from that of `low` up to `most` at which the requests of one of so many count most.

        The most that each limit passes is tried first, since a limit keeps bursts from slowing others only where it
        binds. Then, as the share mostly falls with the rate, no request counts much more between two rates than at the
        lower one: where that leaves most to be found is tried next.
        """
        tried, best = [low], low
        first = list(dict.fromkeys(min(top, most) for top in self._tops))
        for _ in range(tries):
            if first and first[0] > _counts(best):
                rate = first.pop(0)
            else:
                first.clear()
                if len(tried) == 1:
                    break  # that of `low` is all that passes
                below, above = max(pairwise(tried), key=lambda each: each[1].rate * credit(each[0].share))
                if above.rate * credit(below.share) <= _counts(best) * (1 + _CLOSE):
                    break
                part = 0.5
                if below.share > TARGET > above.share:
                    part = (below.share - TARGET) / (below.share - above.share)
                rate = below.rate + min(0.8, max(0.2, part)) * (above.rate - below.rate)
            insort(tried, self.at(rate, replicas)[0], key=lambda each: each.rate)
            best = max(tried, key=_counts)
        return best.rate

    def _least(self, rate: float) -> int:
        """Fewer cannot keep up."""
        return max(1, math.ceil(min(rate, 1e18) / self._tops[0] * (1 - 1e-9)))

    def _serves(self, rate: float, count: int) -> bool:
        return self.at(rate / count, count)[0].share >= TARGET


def _counts(point: Point) -> float:
    return point.rate * credit(point.share)


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
