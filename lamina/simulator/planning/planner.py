"""Which of many systems gives most for a dollar: all are estimated by the closed form, coarsely, and the best of them
again with all of the trace (`rank`).

`candidates.py` enumerates them, `event_runs.py` has the event loop confirm what is close. Some differ by less than the
error of the comparison: `near_ties` says which are equally good. `reasons.py` explains why one wins. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lamina.errors import InvalidRequest
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System, with_decode
from lamina.simulator.costs.uncertainty import RATIO_ERROR
from lamina.simulator.event_loop.results import ATTAINMENT, RunResult
from lamina.simulator.event_loop.simulate import Progress, Slo
from lamina.simulator.planning.candidates import Candidate
from lamina.simulator.planning.plan_file import Prediction
from lamina.simulator.planning.run_progress import Mapped, RunProgress, one_by_one
from lamina.simulator.steady_state.closed_form import Estimate, estimate, none_meets
from lamina.simulator.traces.demand import Demand

CLOSER = 60
"""Candidates that are estimated with all of the trace, at least, the best by the coarse look. The others follow by that
one, once none of them can be the best."""
MARGIN = 0.015
"""How far the share in time may be off where all of the trace is replayed: of 17 systems near their limit on two traces
1.2 points at most, 0.3 in the mean."""

NAMED_FROM, NEARLY_ALL = 0.5, 0.99
"""The least share in time of what is named although it has too few, and of what has more than the winner."""
CHOSEN = 12
"""Mixes of devices, the best, that are looked at further."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate and what is known of it: its estimate by the closed form, with all of the trace where it was looked
    at `closely`, and the `result` of the event loop where it ran, at `rate` requests a second."""

    candidate: Candidate
    estimate: Estimate
    closely: bool = False
    result: RunResult | None = None
    rate: float = 0.0

    @property
    def name(self) -> str:
        """Its system, its number of replicas, its batch limit where prompts are chunked, and its policy if any."""
        return described(self.candidate.system, self.estimate.replicas)

    @property
    def goodput(self) -> float:
        """Requests a second within the SLO: of all that arrive, the share that the event loop serves in time; else the
        closed form's."""
        if self.result is None:
            return self.estimate.goodput
        passing = self.result.finished / self.result.seconds if self.result.seconds else 0.0
        waited = self.result.mostly_full  # it never kept up: what came out counts
        return (min(self.rate, passing) if waited else self.rate) * self.result.slo_share

    @property
    def goodput_per_dollar(self) -> float:
        """Requests within the SLO for a dollar."""
        return self.goodput * 3600 / self.estimate.price if self.estimate.price else math.inf

    @property
    def share(self) -> float:
        """Of the requests taken, those within the SLO."""
        return self.estimate.share if self.result is None else self.result.slo_share

    @property
    def predicted(self) -> Prediction:
        """What all replicas yield: by the event loop where it ran, else by the closed form."""
        if self.result is None:
            return Prediction(
                source="closed form",
                requests_per_second=self.estimate.taken,
                tokens_per_second=self.estimate.tokens_per_second,
                tpot=self.estimate.tpot,
                ttft=self.estimate.ttft,
                slo_share=self.estimate.share,
                batch=self.estimate.batch,
                dollars_per_hour=self.estimate.price,
                dollars_per_million=self.estimate.dollars_per_million,
            )
        return Prediction(
            source="event loop",
            requests_per_second=self.goodput,
            tokens_per_second=self.result.tokens_per_second,
            tpot=self.result.tpot.mean,
            ttft=self.result.ttft.mean,
            slo_share=self.result.slo_share,
            batch=self.result.mean_batch,
            dollars_per_hour=self.result.price,
            dollars_per_million=self.result.dollars_per_million,
        )

    @property
    def serves(self) -> bool:
        """Whether all that is asked for is served, enough of it within the SLO."""
        full_rate = math.isinf(self.estimate.demanded) or self.rate >= self.estimate.demanded * (1 - 1e-9)
        return self.estimate.serves if self.result is None else full_rate and self.share >= ATTAINMENT

    @property
    def close(self) -> bool:
        """Whether a run may say otherwise of what it serves than the replay of all requests."""
        forecast = self.estimate
        near = forecast.serves and forecast.share < ATTAINMENT + MARGIN and not math.isinf(forecast.demanded)
        return near or ATTAINMENT - MARGIN <= forecast.almost < ATTAINMENT

    @property
    def nearly(self) -> bool:
        """Whether one replica fewer, or these where they do not serve all, have enough in time to be named."""
        return self.estimate.almost >= NAMED_FROM

    @property
    def hoped(self) -> Ranked:
        """As it stands; or with one replica fewer, or as serving all, where a run may find that this is so."""
        forecast = self.estimate
        if self.result is not None or not ATTAINMENT - MARGIN <= forecast.almost < ATTAINMENT:
            return self
        fewer = with_replicas(self, forecast.replicas - forecast.serves).estimate
        least = ATTAINMENT - MARGIN
        hoped = replace(fewer, taken=forecast.demanded, share=forecast.almost, almost=0.0, needed=least)
        return replace(self, estimate=hoped)

    @property
    def hoped_price(self) -> float:
        """Dollars an hour of that."""
        forecast = self.estimate
        return forecast.price * (1 - forecast.serves / forecast.replicas)


def with_replicas(ranked: Ranked, count: int) -> Ranked:
    """It with so many replicas, before any run."""
    forecast = ranked.estimate
    few = forecast.replicas / count
    changed = replace(forecast, replicas=count, price=forecast.price / few, batch=forecast.batch * few)
    return replace(ranked, estimate=changed, result=None)


def described(system: System, replicas: int = 1) -> str:
    """A system in words, unique among the candidates."""
    words = [system.name]
    if isinstance(system, Offloaded) and system.attention_count > 1:
        words.append(f"by {system.shard}")
    if isinstance(system, (Disaggregated, Offloaded)):
        words.append(system.link.name)
    if isinstance(system, Offloaded) or (isinstance(system, Colocated) and system.chunked_prefill):
        words.append(f"{system.batch_tokens} tokens a batch")
    if system.policy.name != "full":
        words.append(system.policy.name)
    text = ", ".join(words)
    return text if replicas == 1 else f"{replicas} of {text}"


def rank(
    every: Sequence[Candidate],
    demand: Demand,
    slo: Slo,
    *,
    prefill: bool = True,
    progress: Progress | None = None,
    mapped: Mapped = one_by_one,
) -> list[Ranked]:
    """The candidates by what they give for a dollar, best first. Candidates that serve the whole demand come before
    others. What part of it the others could take is looked for where none serves it.

    Raises InvalidRequest where none gets a single request through within the SLO: naming the link where a faster one
    would help, with what it has and what it needs.
    """

    def ranking(partly: bool) -> list[Ranked]:
        reports = RunProgress(progress, "ranking", len(every) + min(CLOSER, len(every)))

        def looks(some: Sequence[Candidate], fine: bool) -> Iterator[Ranked]:
            def forecast(candidate: Candidate) -> Estimate:
                return looked_at(candidate, demand, slo, prefill, partly, fine).estimate

            # The first of them here: so processes that are forked off have the compiled replay.
            forecasts = reports.over(chain(map(forecast, some[:1]), mapped(forecast, some[1:])))
            return (Ranked(*pair, closely=fine) for pair in zip(some, forecasts, strict=True))

        steady = sorted(looks(every, fine=False), key=_order)
        closer: list[Ranked] = []
        while len(closer) < len(steady) and (
            not closer or _order(min(closer, key=_order)) > _order(steady[len(closer)])
        ):
            closer += looks([entry.candidate for entry in steady[len(closer) : len(closer) + CLOSER]], fine=True)
        reports.end()
        return sorted(closer, key=_order) + steady[len(closer) :]

    ranked = ranking(endless := math.isinf(demand.rate))
    if not endless and not ranked[0].serves:
        ranked = ranking(True)
    if not ranked[0].estimate.goodput:
        tried = [(entry.name, entry.candidate.system, entry.estimate) for entry in ranked]
        raise InvalidRequest(none_meets(tried, demand, slo, prefill))
    return ranked


def looked_at(
    candidate: Candidate, demand: Demand, slo: Slo, prefill: bool = True, partly: bool = True, fine: bool = True
) -> Ranked:
    """The candidate by the closed form: with all of the trace, if `fine`."""
    system, count = candidate.system, candidate.replicas
    return Ranked(candidate, estimate(system, count, demand, slo, prefill, fine, partly=partly), closely=fine)


def cheaper(ranked: Sequence[Ranked], demand: Demand, slo: Slo, prefill: bool = True) -> list[Ranked]:
    """The best on the other side of the limit: what costs less than the first, which serves all, but has too few in
    time. Each has more than whatever costs less; the first has most."""
    first, chosen = ranked[0], list[Ranked]()
    if not first.serves or math.isinf(demand.rate):
        return chosen
    bound = first.estimate.price * (1 - 1e-9)
    near = [entry for entry in ranked if entry.nearly and entry.hoped_price < bound]
    near = sorted(near, key=lambda entry: -entry.estimate.almost)[:CLOSER]
    looks = [
        entry if entry.closely else looked_at(entry.candidate, demand, slo, prefill, partly=False) for entry in near
    ]
    for entry in sorted(looks, key=lambda entry: (-entry.estimate.almost, entry.hoped_price)):
        if entry.nearly and entry.estimate.almost < ATTAINMENT and entry.hoped_price < bound:
            fewer = Candidate(entry.candidate.system, entry.estimate.replicas - entry.estimate.serves)
            chosen.append(looked_at(fewer, demand, slo, prefill, partly=False))
            bound = entry.hoped_price
    return chosen


def surer(ranked: Sequence[Ranked], demand: Demand, slo: Slo, prefill: bool = True) -> Ranked | None:
    """The cheapest of the best mixes that has nearly all in time, where the first, which serves all, has not."""
    cheapest = None
    if ranked[0].serves and ranked[0].share < NEARLY_ALL and not math.isinf(demand.rate):
        for entry in mixes(ranked)[:CHOSEN]:
            system, count = entry.candidate.system, entry.candidate.replicas
            more = estimate(system, count, demand, slo, prefill, needed=NEARLY_ALL, partly=False)
            if more.serves and (cheapest is None or more.price < cheapest.estimate.price):
                cheapest = Ranked(entry.candidate, more, closely=True)
    return cheapest


def mix(system: System) -> tuple[object, ...]:
    """Its devices, link and policy. Systems of one mix differ in lanes, shards or the batch limit alone."""
    return type(system), system.devices, getattr(system, "link", None), system.policy


def mixes(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Of each mix the best that gets a request through."""
    best_of_mix: dict[object, Ranked] = {}
    for entry in ranked:
        if entry.estimate.goodput:
            best_of_mix.setdefault(mix(entry.candidate.system), entry)
    return list(best_of_mix.values())


def limited(ranked: Ranked) -> System:
    """The system with the batch limit that the closed form found for its SLO."""
    return with_decode(ranked.candidate.system, max_sequences=max(1, ranked.estimate.most))


def _order(ranked: Ranked) -> tuple[bool, float, float, float, str]:
    forecast = ranked.estimate
    return not ranked.serves, -ranked.goodput_per_dollar, -forecast.capacity, forecast.tpot, ranked.name


def ratio_error(ranked: Ranked) -> float:
    """How far a ratio of its throughput to another system's is off."""
    return RATIO_ERROR[ranked.candidate.system.model.kind]


def lossless(ranked: Ranked) -> bool:
    """Whether attention sees all KV: no policy leaves any out."""
    policy = ranked.candidate.system.policy
    return policy.read == policy.held == 1 and policy.window is None


def handicap(ranked: Ranked) -> float:
    """How many times better than others a candidate has to be: one that loses something, by what errors are."""
    return 1.0 if lossless(ranked) else 1 + ratio_error(ranked)


def worth(ranked: Ranked) -> float:
    """Requests within the SLO for a dollar, divided by its handicap."""
    return ranked.goodput * 3600 / max(ranked.estimate.price, 1e-12) / handicap(ranked)


def advantage(one: Ranked, other: Ranked) -> float:
    """How many times the requests for a dollar that `one` gives, of those of `other`. Where both are free: of the
    requests a second that they could take. 0 where only the other is free."""
    if one.estimate.price and other.estimate.price:
        mine, theirs = one.goodput_per_dollar, other.goodput_per_dollar
    elif one.estimate.price or other.estimate.price:
        return 0.0 if one.estimate.price else math.inf
    else:
        mine, theirs = one.estimate.capacity, other.estimate.capacity
    return mine / theirs if theirs else math.inf


def tied(one: Ranked, other: Ranked) -> bool:
    """Whether the two differ by no more than the error of such a comparison: both serve all, or neither does."""
    if one.serves != other.serves:
        return False
    within = 1 + ratio_error(one)
    return 1 / within <= advantage(one, other) <= within


def near_ties(ranked: Sequence[Ranked]) -> tuple[Ranked, ...]:
    """The mixes that are tied with the first: those that lose nothing before those with a lossy policy, each by what
    they give for a dollar."""
    first = ranked[0]
    ties = [entry for entry in mixes(ranked) if entry is not first and tied(entry, first)]
    return tuple(sorted(ties, key=lambda entry: not lossless(entry)))  # sorting keeps the order among equals
