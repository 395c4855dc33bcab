"""Which of many systems gives most for a dollar: all by the closed form, the best few through the event loop.

`candidates` enumerates, `rank` estimates and sorts, `verify` simulates. `reasons` explains why one wins. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Progress, Slo, simulate
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.steady_state.closed_form import ATTAINMENT, TARGET, Estimate, estimate
from lamina.simulator.steady_state.misfits import none_meets
from lamina.simulator.traces.arrivals import Trace
from lamina.simulator.traces.catalogue import at_rate, windows
from lamina.simulator.traces.demand import Demand

__all__ = ["Candidate", "Ranked", "best", "candidates", "limited", "mixes", "rank", "rivals", "top", "verify"]

CLOSER = 50
"""How many candidates are estimated part by part, at least, the best under a steady load first. The others follow by
their steady load, once none of them can be the best."""
TOP = 5
"""How many the event loop checks."""
REQUESTS = 2000
"""Of the trace, for each that is checked, at least."""
MOST_REQUESTS = 6000
_LIVES = 8
"""As many requests as are in decode at a time, so often: a run has to be longer than its beginning."""
TRIES, SLOWER = 3, 0.8


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate, its estimate by the closed form and, where it was checked, the event loop's run at `rate` requests a
    second: the rate of the closed form, or the next lower one tried that kept the SLO."""

    candidate: Candidate
    estimate: Estimate
    result: RunResult | None = None
    rate: float = 0.0

    @property
    def name(self) -> str:
        """Its system, how many of it, its batch limit where prompts are chunked, and its policy if it has one."""
        return described(self.candidate.system, self.estimate.replicas)

    @property
    def goodput(self) -> float:
        """Requests a second within the SLO: of all that arrive, the share that the event loop serves in time; else the
        closed form's."""
        if self.result is None:
            return self.estimate.goodput
        passing = self.result.finished / self.result.seconds if self.result.seconds else 0.0
        waited = self.result.saturated_seconds > self.result.seconds / 2  # it never kept up: what came out counts
        return (min(self.rate, passing) if waited else self.rate) * self.result.slo_share

    @property
    def goodput_per_dollar(self) -> float:
        """Requests within the SLO for a dollar."""
        return self.goodput * 3600 / self.estimate.price if self.estimate.price else math.inf

    @property
    def serves(self) -> bool:
        """Whether all that is asked for is served, enough of it within the SLO."""
        if self.result is None:
            return self.estimate.serves
        demanded = self.estimate.demanded
        whole = math.isinf(demanded) or self.rate >= demanded * (1 - 1e-9)
        return whole and self.result.slo_share >= ATTAINMENT


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
    said = ", ".join(words)
    return said if replicas == 1 else f"{replicas} of {said}"


def rank(
    every: Sequence[Candidate],
    demand: Demand,
    slo: Slo,
    *,
    prefill: bool = True,
    progress: Progress | None = None,
) -> list[Ranked]:
    """The candidates by what they give for a dollar, best first. Candidates that serve the whole demand come before
    others.

    Raises InvalidRequest where none gets a single request through within the SLO: naming the link where a faster one
    would help, with what it has and what it needs.
    """
    total = len(every) + min(CLOSER, len(every))

    def look(candidate: Candidate, parts: bool, done: int) -> Ranked:
        if progress is not None:
            progress("ranking", min(done, total - 1), total)
        return Ranked(candidate, estimate(candidate.system, candidate.replicas, demand, slo, prefill, parts))

    steady = sorted((look(candidate, False, done) for done, candidate in enumerate(every)), key=_order)
    closer: list[Ranked] = []
    for done, each in enumerate(steady):
        if done >= CLOSER and _order(min(closer, key=_order)) <= _order(each):
            break
        closer.append(look(each.candidate, True, len(every) + done))
    ranked = sorted(closer, key=_order) + steady[len(closer) :]
    if progress is not None:
        progress("ranking", total, total)
    if not ranked or not ranked[0].estimate.goodput:
        tried = [(each.name, each.candidate.system, each.estimate) for each in ranked]
        raise InvalidRequest(none_meets(tried, demand, slo, prefill))
    return ranked


def best(ranked: Sequence[Ranked], offloaded: bool) -> Ranked | None:
    """The first that offloads attention, or the first that doesn't; None where none gets a request through."""
    for each in ranked:
        if each.candidate.offloaded == offloaded and each.estimate.goodput:
            return each
    return None


def mixes(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Of each mix of devices, link and policy the best that gets a request through: others of it differ in lanes,
    shards or the batch limit alone."""
    found: dict[object, Ranked] = {}
    for each in ranked:
        system = each.candidate.system
        if each.estimate.goodput:
            found.setdefault((type(system), system.devices, getattr(system, "link", None), system.policy), each)
    return list(found.values())


def top(ranked: Sequence[Ranked], count: int = TOP) -> list[Ranked]:
    """The best `count` mixes, and among them the best of each kind of system."""
    useful = mixes(ranked)
    kinds: dict[type, Ranked] = {}
    for each in useful:
        kinds.setdefault(type(each.candidate.system), each)
    chosen = list(kinds.values())[:count]
    chosen += [each for each in useful if each not in chosen][: count - len(chosen)]
    return [each for each in useful if each in chosen]


def rivals(ranked: Sequence[Ranked]) -> list[Ranked]:
    """The rivals of the first: the best of each other kind of system, and of its own kind with other devices. Where the
    first was checked, they are checked too."""
    first, found = ranked[0], dict[type, Ranked]()
    for each in mixes(ranked)[1:]:
        system = each.candidate.system
        other = type(system) is not type(first.candidate.system) or system.devices != first.candidate.system.devices
        if other and (first.result is None or each.result is not None):
            found.setdefault(type(system), each)
    return list(found.values())


def limited(ranked: Ranked) -> System:
    """The system with the batch limit that the closed form found for its SLO."""
    system, most = ranked.candidate.system, max(1, ranked.estimate.most)
    if isinstance(system, Disaggregated):
        return replace(system, decode=replace(system.decode, max_sequences=most))
    return replace(system, max_sequences=most)


def verify(
    chosen: Sequence[Ranked],
    trace: Trace,
    slo: Slo,
    *,
    prefill: bool = True,
    seed: int = 0,
    requests: int = REQUESTS,
    progress: Progress | None = None,
) -> list[Ranked]:
    """Simulate each at the rate that it would take, and sort by goodput for a dollar. Candidates that serve all with
    `ATTAINMENT` of it within the SLO come first. One that doesn't keep it is tried at lower rates, `SLOWER` times each.

    Of the trace it takes `requests`, or more where more are in decode at a time: up to `MOST_REQUESTS`.
    """
    found = []
    for number, each in enumerate(chosen):

        def report(what: str, done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(what, number * total + min(done, total - 1), len(chosen) * total)

        decoding = each.estimate.batch * each.estimate.replicas
        part = windows(trace, max(requests, min(MOST_REQUESTS, round(_LIVES * decoding))))
        rate, best = each.estimate.taken, each
        for _ in range(TRIES):
            result = simulate(
                limited(each), at_rate(part, rate), seed=seed, slo=slo, prefill=prefill, progress=report,
                replicas=min(each.estimate.replicas, len(part.arrivals)),
            )  # fmt: skip
            run = replace(each, result=result, rate=rate)
            if best.result is None or run.goodput > best.goodput or result.slo_share >= ATTAINMENT:
                best = run
            if result.slo_share >= ATTAINMENT or each.estimate.share < TARGET:
                break  # or no rate would do
            rate *= SLOWER
        found.append(best)
    if progress is not None:
        progress("simulating", len(chosen), len(chosen))
    return sorted(found, key=_order)


def _order(ranked: Ranked) -> tuple[bool, float, float, float, str]:
    found = ranked.estimate
    spare = found.capacity / ranked.candidate.replicas * found.replicas
    return not ranked.serves, -ranked.goodput_per_dollar, -spare, found.tpot, ranked.name
