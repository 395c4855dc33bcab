"""Which of many systems gives most for a dollar: all are estimated by the closed form, the best run through the event
loop.

`candidates.py` enumerates them, `rank` estimates and sorts, `search` simulates the best of them by `verify`. Some
differ by less than the error of the comparison: `near_ties` says which are equally good. `reasons.py` explains why one
wins. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lamina.errors import InvalidRequest
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System, with_decode
from lamina.simulator.event_loop.results import ATTAINMENT, RunResult
from lamina.simulator.event_loop.simulate import Progress, Slo, simulate
from lamina.simulator.planning.candidates import Candidate
from lamina.simulator.planning.plan_file import Prediction
from lamina.simulator.planning.run_progress import Mapped, RunProgress, one_by_one
from lamina.simulator.steady_state.closed_form import TARGET, Estimate, estimate, none_meets
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.catalogue import WINDOWS, at_rate, windows
from lamina.simulator.traces.demand import Demand

CLOSER = 60
"""Candidates that are estimated again with more of the trace, at least, the best by the first estimate. The others
follow by that one, once none of them can be the best."""
TOP = 24
"""Candidates that the event loop checks."""
WAVES = 4
"""How often it checks the next, where none of those before serves what is asked for."""
RUNGS = ((6, 0.05), (3, 0.03))
"""By what the first excerpts are shorter, and by how much their share may be less than `ATTAINMENT`."""
FLATTERY = 0.04
"""How much more of an excerpt has to be in time: a load that stays high for longer than a window is lost in it. On
azure-conv and 4 H100 near their limit 2 to 6 points more were in time of 2,400 requests than of all 19,366."""
NOISE = 0.02
"""How much shares differ between excerpts: so much less is no change."""
FINALISTS = 12
"""Candidates that are run on the longest excerpt: what could win if something were otherwise is compared with these."""
REQUESTS = 2400
"""Of the trace, for each finalist, at least."""
MOST_REQUESTS = 6000
_LIVES = 8
"""As many requests as are in decode at a time, so often: a run has to be longer than its beginning."""
_WINDOW = 100
"""Requests of each window of an excerpt, at least."""
ALMOST = 0.93
"""Of what is needed, what may be enough on a longer excerpt."""
TRIES, SLOWER, FASTER = 3, 0.88, 1.06
"""Rates that are tried, each so many times the one before."""
_MORE, _WORTH = 2, 0.005
"""Replicas more than the closed form has, at most; and a gain that is worth one."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate and what is known of it: its estimate by the closed form and, where it was checked, the `result` of
    the event loop's run at `rate` requests a second. That is the rate of the closed form, or the next lower one tried
    that kept the SLO."""

    candidate: Candidate
    estimate: Estimate
    result: RunResult | None = None
    rate: float = 0.0
    needed: float = ATTAINMENT
    """The share of requests within the SLO that is enough."""

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

    def nearly(self, part: float) -> bool:
        """Whether all that is asked for is served, this part of what is needed within the SLO."""
        full_rate = math.isinf(self.estimate.demanded) or self.rate >= self.estimate.demanded * (1 - 1e-9)
        return full_rate and self.share >= self.needed * part

    @property
    def serves(self) -> bool:
        """Whether all that is asked for is served, enough of it within the SLO."""
        return self.estimate.serves if self.result is None else self.nearly(1.0)


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
    others.

    Raises InvalidRequest where none gets a single request through within the SLO: naming the link where a faster one
    would help, with what it has and what it needs.
    """
    reports = RunProgress(progress, "ranking", len(every) + min(CLOSER, len(every)))

    def look(candidate: Candidate, fine: bool) -> Ranked:
        return Ranked(candidate, estimate(candidate.system, candidate.replicas, demand, slo, prefill, fine))

    steady = sorted(reports.over(mapped(lambda candidate: look(candidate, False), every)), key=_order)
    closer = list(reports.over(mapped(lambda entry: look(entry.candidate, True), steady[:CLOSER])))
    for entry in steady[CLOSER:]:
        if _order(min(closer, key=_order)) <= _order(entry):
            break
        closer.append(look(entry.candidate, True))
    ranked = sorted(closer, key=_order) + steady[len(closer) :]
    reports.end()
    if not ranked or not ranked[0].estimate.goodput:
        tried = [(entry.name, entry.candidate.system, entry.estimate) for entry in ranked]
        raise InvalidRequest(none_meets(tried, demand, slo, prefill))
    return ranked


def best(ranked: Sequence[Ranked], offloaded: bool) -> Ranked | None:
    """The first that offloads attention, or the first that doesn't; None where none gets a request through."""
    for entry in ranked:
        if entry.candidate.offloaded == offloaded and entry.estimate.goodput:
            return entry
    return None


def mixes(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Of each mix of devices, link and policy the best that gets a request through: others of it differ in lanes,
    shards or the batch limit alone."""
    best_of_mix: dict[object, Ranked] = {}
    for entry in ranked:
        system = entry.candidate.system
        if entry.estimate.goodput:
            best_of_mix.setdefault((type(system), system.devices, getattr(system, "link", None), system.policy), entry)
    return list(best_of_mix.values())


def top(ranked: Sequence[Ranked], count: int = TOP) -> list[Ranked]:
    """The best `count`: the best of each kind of system, then of each mix, then others that get a request through."""
    useful = mixes(ranked)
    kinds: dict[type, Ranked] = {}
    for entry in useful:
        kinds.setdefault(type(entry.candidate.system), entry)
    others = (entry for entry in ranked if entry.estimate.goodput)
    chosen: dict[int, Ranked] = {}
    for entry in chain(kinds.values(), useful, others):
        if len(chosen) == count:
            break
        chosen.setdefault(id(entry), entry)
    return [entry for entry in ranked if id(entry) in chosen]


def limited(ranked: Ranked) -> System:
    """The system with the batch limit that the closed form found for its SLO."""
    return with_decode(ranked.candidate.system, max_sequences=max(1, ranked.estimate.most))


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which the event loop runs candidates: requests, what users accept, whether prompts are computed here."""

    trace: Trace
    slo: Slo
    prefill: bool = True
    seed: int = 0


def search(
    ranked: Sequence[Ranked],
    conditions: Conditions,
    *,
    count: int = TOP,
    progress: Progress | None = None,
    mapped: Mapped = one_by_one,
) -> list[Ranked]:
    """All that were ranked: those that the event loop checked first, in its order. It checks the best `count`, and the
    next as many while none of them serves all that is asked for, though others do by the closed form."""
    checked: list[Ranked] = []
    unchecked = list(ranked)
    for _ in range(WAVES):
        chosen = top(unchecked, count)
        checked += verify(chosen, conditions, progress=progress, mapped=mapped)
        ids = {id(entry) for entry in chosen}
        unchecked = [entry for entry in unchecked if id(entry) not in ids]
        if any(entry.serves for entry in checked) or not any(entry.serves for entry in unchecked):
            break
    return sorted(checked, key=lambda entry: not entry.serves) + unchecked


def verify(
    chosen: Sequence[Ranked],
    conditions: Conditions,
    *,
    requests: int = REQUESTS,
    allowance: float = 0.0,
    progress: Progress | None = None,
    mapped: Mapped = one_by_one,
) -> list[Ranked]:
    """Simulate each at the rate that it would take, by successive halving (Jamieson and Talwalkar 2016): all of them
    on a short excerpt of the trace, the better ones on longer ones, and the last `FINALISTS` on `requests`, or on more
    where more are in decode at a time, up to `MOST_REQUESTS`. More go that far while none of them serves what is asked
    for. Sorted by goodput for a dollar, the finalists first; those that serve all with `ATTAINMENT` of it within the
    SLO come before others.

    One that does not keep the SLO gets another replica if there is one, else lower rates. `allowance`: how much less of
    the longest excerpts may be in time; then no lower rates are tried.
    """
    field = [(more, more is entry) for entry in chosen for more in (entry, *_fewer(entry))]
    rungs = [(requests // part, less) for part, less in RUNGS]
    sizes = [len(field)]
    while len(sizes) <= len(rungs) and sizes[-1] > FINALISTS:
        sizes.append(max(FINALISTS, sizes[-1] // 3))
    reports = RunProgress(progress, "simulating", sum(sizes))

    def run(some: Sequence[tuple[Ranked, bool]], length: int, less: float) -> Iterator[Ranked]:
        check = _Check(conditions, length, requests, less)
        return reports.over(mapped(lambda pair: check.of(*pair), some))

    # Each excerpt begins anew: short ones cut bursts badly, and ask for replicas that longer ones do not need.
    out: list[tuple[Ranked, tuple[Ranked, bool]]] = []
    for (length, less), keep in zip(rungs, sizes[1:], strict=False):
        tried = sorted(zip(run(field, length, less), field, strict=True), key=lambda pair: _order(pair[0], less))
        field, out = [pair for _, pair in tried[:keep]], tried[keep:] + out
    finals = list(run(field[:FINALISTS], requests, allowance))
    for pair in (*field[FINALISTS:], *(pair for entry, pair in out if entry.nearly(ALMOST))):
        if len(finals) >= FINALISTS and any(final.serves for final in finals):
            break
        finals += run([pair], requests, allowance)
    reports.end()
    results: dict[Candidate, Ranked] = {}
    finals.sort(key=lambda entry: _order(entry, allowance))
    for entry in (*finals, *(entry for entry, _ in out)):
        results.setdefault(entry.candidate, entry)
    return list(results.values())


def reachable(ranked: Ranked) -> float:
    """Requests a second within the SLO that a run at the rates tried may count, by the closed form's share. More than
    `Estimate.goodput`, which counts less where the SLO is missed."""
    forecast = ranked.estimate
    rate = min(forecast.taken * FASTER**TRIES, forecast.demanded) if forecast.share >= TARGET else forecast.taken
    return rate * forecast.share


def rerun(ranked: Ranked, conditions: Conditions, requests: int) -> Ranked:
    """What was checked, as it is, on about so many requests of the trace."""
    return _Check(conditions, requests, requests, 0.0).run(ranked, ranked.rate)


def _fewer(ranked: Ranked) -> list[Ranked]:
    """The same with a replica fewer, where that might do."""
    forecast, count = ranked.estimate, ranked.estimate.replicas - 1
    capacity = forecast.capacity / ranked.candidate.replicas
    if not count or math.isinf(forecast.demanded) or count * capacity < ALMOST * forecast.demanded:
        return []
    return [_with_replicas(ranked, count)]


def _with_replicas(ranked: Ranked, count: int) -> Ranked:
    forecast = ranked.estimate
    few = forecast.replicas / count
    return replace(
        ranked,
        estimate=replace(forecast, replicas=count, price=forecast.price / few, batch=forecast.batch * few),
        result=None,
    )


@dataclass(frozen=True, slots=True)
class _Check:
    """Runs on an excerpt of about `length` requests of a trace, where finalists get `requests`. A share counts as
    enough with `allowance` less, since excerpts differ."""

    conditions: Conditions
    length: int
    requests: int
    allowance: float

    def keeps(self, ranked: Ranked) -> bool:
        """Whether enough of it is within the SLO."""
        return ranked.share >= ranked.needed - self.allowance

    def of(self, ranked: Ranked, grows: bool) -> Ranked:
        """It at the rate that is asked for, with more replicas where that takes some and it `grows`. Where not all is
        taken, or the last excerpt says that it is too much, at the best rate that is found."""
        forecast = ranked.estimate
        if forecast.taken < forecast.demanded * (1 - 1e-9):
            return self._fastest(self.run(ranked, forecast.taken))
        best = self.run(ranked, forecast.demanded)
        limit = min(forecast.replicas + _MORE, ranked.candidate.replicas) if grows else 0
        while not self.keeps(best) and best.estimate.replicas < limit:
            more = self.run(_with_replicas(best, best.estimate.replicas + 1), forecast.demanded)
            if more.share <= best.share + _WORTH:
                break
            best = more
        return best if self.keeps(best) or self.allowance else self._fastest(best)

    def _fastest(self, best: Ranked) -> Ranked:
        """At the rate with the most goodput, of some that are near; with enough in time if that can be."""
        forecast, rate, slower = best.estimate, best.rate, not self.keeps(best)
        for _ in range(TRIES if forecast.share >= TARGET else 0):  # else no rate would do
            rate = rate * SLOWER if slower else min(rate * FASTER, forecast.demanded)
            if rate == best.rate:
                break
            other = self.run(best, rate)
            better = self.keeps(other) and (slower or other.goodput > best.goodput * (1 + _WORTH))
            if better or (slower and other.goodput > best.goodput):
                best = other
            if better == slower:
                break  # the first that keeps the SLO, or the last that is worth it
        return best

    def run(self, ranked: Ranked, rate: float) -> Ranked:
        decoding = ranked.estimate.batch * ranked.estimate.replicas
        limit = max(MOST_REQUESTS * self.length // self.requests, self.length)
        count = max(self.length, min(limit, round(_LIVES * decoding * self.length / self.requests)))
        conditions = self.conditions
        part = windows(conditions.trace, count, max(1, min(WINDOWS, count // _WINDOW)))
        result = simulate(
            limited(ranked),
            at_rate(part, rate),
            seed=conditions.seed,
            slo=conditions.slo,
            prefill=conditions.prefill,
            replicas=min(ranked.estimate.replicas, len(part.arrivals)),
        )
        needed = ATTAINMENT + (FLATTERY if len(part.arrivals) < len(conditions.trace.arrivals) else 0.0)
        return replace(ranked, result=result, rate=rate, needed=needed)


def _order(ranked: Ranked, allowance: float = 0.0) -> tuple[bool, float, float, float, str]:
    forecast = ranked.estimate
    spare = forecast.capacity / ranked.candidate.replicas * forecast.replicas
    serves = ranked.serves or (allowance > 0 and ranked.nearly(1 - allowance / ranked.needed))
    return not serves, -ranked.goodput_per_dollar, -spare, forecast.tpot, ranked.name


RATIO_ERROR = 0.10
"""How far a ratio of two systems' throughput is off. Of 252 pairs of measured cells on H100 and H200 (the public sample
of ai-dynamo/aiconfigurator, commit 095f58a51) that differ in their tensor parallel size alone, half are within 9.7 %,
and of 11 that differ in the device alone 90 % within 8.5 %. AFD-Ledger (arXiv 2608.04502) states 6.6 to 9.6 %."""


def lossless(ranked: Ranked) -> bool:
    """Whether attention sees all KV: no policy leaves any out."""
    policy = ranked.candidate.system.policy
    return policy.read == policy.held == 1 and policy.window is None


def handicap(ranked: Ranked) -> float:
    """How many times better than others a candidate has to be: one that loses something, by what errors are."""
    return 1.0 if lossless(ranked) else 1 + RATIO_ERROR


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
    return 1 / (1 + RATIO_ERROR) <= advantage(one, other) <= 1 + RATIO_ERROR


def near_ties(ranked: Sequence[Ranked]) -> tuple[Ranked, ...]:
    """The mixes that are tied with the first: those that lose nothing before those with a lossy policy, each by what
    they give for a dollar. Where the first was checked by the event loop they are, too."""
    first = ranked[0]
    ties = [
        entry
        for entry in mixes(ranked)
        if entry is not first and tied(entry, first) and (first.result is None or entry.result is not None)
    ]
    return tuple(sorted(ties, key=lambda entry: not lossless(entry)))  # sorting keeps the order among equals
