"""A trace through the real `Scheduler` and `Placement` (`simulate`), with the seconds of each batch from the cost model
and pages from counters: the engine's own code decides which requests are admitted, cut into chunks, preempted, and
share a prefix.

A system's seconds advance a clock of its own, so a run is a function of its arguments.

A disaggregated system has prompts on one instance and decode on another, and KV goes from the one to the other
(`Transfer`). The two run one after the other. They run together where requests come after others (`serve_sessions`),
since the end of a request on the one brings the next to the other.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System, before_first_token, power, price
from lamina.simulator.event_loop.failures import FailingInstance, Failures
from lamina.simulator.event_loop.instance import Instance, Life, Totals
from lamina.simulator.event_loop.quick_instance import DecodeCosts, QuickInstance, Unusual, is_usual
from lamina.simulator.event_loop.results import RunResult, distribution, weighted_distribution
from lamina.simulator.traces.arrivals import Arrival, Trace, split

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds that users accept: to the first token, and a token after it in the mean of a request. None: any."""

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft), ("tpot", self.tpot)):
            if value is not None and (not isinstance(value, (int, float)) or not 0 < value < math.inf):
                raise InvalidRequest(f"{name} of the SLO is {value!r:.80}; allowed are seconds above 0")

    def met(self, ttft: float, tpot: float) -> bool:
        return (self.ttft is None or ttft <= self.ttft) and (self.tpot is None or tpot <= self.tpot)


def simulate(
    system: System,
    trace: Trace,
    *,
    seed: int = 0,
    slo: Slo | None = None,
    prefill: bool = True,
    prefix_cache: bool = True,
    replicas: int = 1,
    progress: Progress | None = None,
    failures: Failures | None = None,
) -> RunResult:
    """Serve a trace by `replicas` instances of a system, which take requests in turn.

    Without `prefill` a prompt's KV is there as soon as it is admitted, at no cost: the paper's evaluation, which is of
    decode alone. With `prefix_cache` prompts whose blocks are named share them through the real prefix cache. `seed`
    is kept in the result alone: nothing here is drawn by chance. Raises InvalidRequest where the model fits nowhere, or
    where the system cannot have such `failures`.
    """
    if type(seed) is not int:
        raise InvalidRequest(f"seed is {seed!r:.80}; allowed is a whole number")
    parts, most_finished = split(trace, replicas), 0

    def report(finished: int) -> None:
        nonlocal most_finished
        most_finished = max(most_finished, finished)  # a run that begins again
        if progress is not None:
            progress("simulating", most_finished, len(trace.arrivals))

    with _without_collector():
        try:
            totals, lives = _served(system, parts, _Instances(prefill, prefix_cache, failures), report)
        except Unusual:
            totals, lives = _served(system, parts, _Instances(prefill, prefix_cache, failures, quick=False), report)
    return _result(system, trace, replicas, seed, slo or Slo(), totals, lives)


class _Instances:
    """Makes instances for a run: quick ones, where they may stand for the real scheduler."""

    def __init__(self, prefill: bool, prefix_cache: bool, failures: Failures | None = None, quick: bool = True) -> None:
        self.prefill, self.prefix_cache, self._quick = prefill, prefix_cache, quick
        self.failures = failures
        self._costs: dict[int, DecodeCosts] = {}

    def of(
        self, system: Colocated | Offloaded, trace: Trace, totals: Totals, begun: Mapping[int, Life] | None = None
    ) -> Instance | QuickInstance:
        """One instance of a system. Requests that have `begun` elsewhere have neither prompts nor prefixes here."""
        prefill, prefix_cache = (self.prefill, self.prefix_cache) if begun is None else (False, False)
        if self.failures is not None:
            return FailingInstance(system, trace, prefill, prefix_cache, totals, self.failures)
        if self._quick and is_usual(system, trace, prefix_cache):
            costs = self._costs.setdefault(id(system), DecodeCosts(system))
            return QuickInstance(system, trace, prefill, totals, begun, costs)
        return Instance(system, trace, prefill, prefix_cache, totals, begun)


def _served(
    system: System, parts: Sequence[Trace], instances: _Instances, report: Callable[[int], None]
) -> tuple[Totals, list[Life]]:
    """Each part of a trace by an instance of its own."""
    totals, lives = Totals(), list[Life]()
    done = 0

    def told(more: int) -> None:
        report(done + more)

    for part in parts:
        if isinstance(system, Disaggregated):
            if instances.failures is not None:
                instances.failures.reserved(system)
            lives += _disaggregated(system, part, instances, totals, told)
        else:
            lives += instances.of(system, part, totals).run(told)
        done += len(part.arrivals)
        told(0)
    return totals, lives


def _disaggregated(
    system: Disaggregated, trace: Trace, instances: _Instances, totals: Totals, report: Callable[[int], None]
) -> list[Life]:
    """Prompts to their first token on one instance, then decode on the other as their KV arrives, one after another.
    The first tier is the prefill instance, the last the decode instance; steps and samples are the latter's."""
    before, after = Totals(), Totals(samples=totals.samples)
    finished: list[Life] = []
    arrived = list(trace.arrivals)
    moved: dict[int, Life] = {}
    if instances.prefill and any(arrival.after is not None for arrival in arrived):
        finished = serve_sessions(system, trace, instances.prefix_cache, before, after, report)
        arrived = []
    elif instances.prefill:
        prompts = replace(trace, arrivals=tuple(replace(arrival, output=1) for arrival in trace.arrivals))
        lives = instances.of(system.prefill, prompts, before).run(lambda done: None)
        outputs = {id(short): original.output for short, original in zip(prompts.arrivals, trace.arrivals, strict=True)}
        finished = [life for life in lives if outputs[id(life.arrival)] == 1]
        arrived, transfer = [], Transfer(system, after)
        for life in sorted(lives, key=lambda life: life.last):
            prompt, output = life.arrival.prompt, outputs[id(life.arrival)]
            if output == 1:
                continue
            moved[len(arrived)] = life
            arrived.append(Arrival(transfer.arrival(prompt, life.last), prompt, output))
    if arrived:
        decoding = Trace(trace.name, tuple(arrived))
        finished += instances.of(system.decode, decoding, after, moved).run(report)
    after.busy = [sum(before.busy), after.busy[0] + after.busy[1], after.busy[2]]
    if instances.prefill:
        after.prompt_tokens, after.reused = before.prompt_tokens, before.reused
    after.rejected += before.rejected
    after.preemptions += before.preemptions
    totals.add(after)
    return finished


def _result(
    system: System, trace: Trace, replicas: int, seed: int, slo: Slo, totals: Totals, lives: Sequence[Life]
) -> RunResult:
    start = trace.arrivals[0].at
    seconds = max((life.last for life in lives), default=start) - start
    ttft = [life.first - life.at + before_first_token(system, life.arrival.prompt) for life in lives]
    tpot = [(life.last - life.first) / (life.tokens - 1) for life in lives if life.tokens > 1]
    met = sum(
        slo.met(first, (life.last - life.first) / max(1, life.tokens - 1))
        for first, life in zip(ttft, lives, strict=True)
    )
    model, attention, network = (min(1.0, busy / (seconds * replicas)) if seconds else 0.0 for busy in totals.busy)
    decoding, capacity = system.decode if isinstance(system, Disaggregated) else system, system.capacity
    # The last kind attends; where there are prompts, a model and attention apart, the model is as busy as these.
    busy = {1: (min(1.0, model + attention),), 2: (model, attention)}.get(
        len(system.devices), (model, attention, attention)
    )
    return RunResult(
        system=system.name if replicas == 1 else f"{replicas} of {system.name}",
        model=system.model.name,
        trace=trace.name,
        policy=system.policy.name,
        requests=len(trace.arrivals),
        finished=len(lives),
        prompt_tokens=totals.prompt_tokens,
        output_tokens=sum(life.tokens for life in lives),
        reused_tokens=totals.reused,
        preemptions=totals.preemptions,
        steps=totals.steps,
        seconds=seconds,
        price=price(system) * replicas,
        power=power(system, busy) * replicas,
        mean_batch=totals.decode_rows / totals.decode_seconds if totals.decode_seconds else 0.0,
        peak_batch=totals.peak,
        ttft=distribution(ttft),
        tpot=distribution(tpot),
        tbt=weighted_distribution(totals.gaps),
        goodput=met / seconds if seconds else 0.0,
        slo_share=met / len(trace.arrivals),
        model_utilisation=model,
        attention_utilisation=attention,
        network_utilisation=network,
        link_bytes=totals.link_bytes,
        seed=seed,
        rejected=totals.rejected,
        losses=totals.losses,
        recomputed_tokens=totals.recomputed,
        saturated_seconds=totals.saturated_seconds / replicas,
        saturated_tokens=totals.saturated_tokens,
        saturated_batch=totals.saturated_rows / totals.saturated_seconds if totals.saturated_seconds else 0.0,
        samples=totals.samples.kept(),
        kv_bytes_per_token=system.model.kv_bytes_per_token(decoding.kv_element),
        state_bytes=system.model.state_bytes_held,
        kv_tokens=capacity.tokens if system.model.attentions else 0,
        state_sequences=capacity.sequences if system.model.states else 0,
    )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Plans and rows are freed by their counts; the cycle collector walks them in vain, which doubled the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Transfer:
    """The way of prompts' KV from the prefill instance to the decode instance, one prompt after another. Its bytes, and
    its seconds as those of the network, are counted in `totals`."""

    def __init__(self, system: Disaggregated, totals: Totals) -> None:
        self._system, self._totals = system, totals
        self._free_at = 0.0  # when the last prompt has left

    def arrival(self, prompt: int, ready: float) -> float:
        """The second at which the KV of a prompt of so many tokens is there. It is sent from second `ready` on."""
        sent = self._system.transfer_bytes(prompt)
        start = max(ready, self._free_at)
        self._free_at = start + sent / self._system.wire
        self._totals.link_bytes += sent
        self._totals.busy[2] += self._free_at - start
        return self._free_at + self._system.link.round_trip


def serve_sessions(
    system: Disaggregated,
    trace: Trace,
    prefix_cache: bool,
    before: Totals,
    after: Totals,
    report: Callable[[int], None],
) -> list[Life]:
    """The requests that were served; `before` counts the prefill instance, `after` the decode instance and the way
    there. Prefixes are kept where prompts are computed: what was decoded elsewhere is computed again with the next
    prompt that has it."""
    finished: list[Life] = []
    lives: dict[int, Life] = {}
    transfer = Transfer(system, after)

    def computed(number: int, life: Life) -> None:
        if trace.arrivals[number].output == 1:
            ended(number, life)
            return
        lives[number] = life
        decode.offer(number, transfer.arrival(life.arrival.prompt, life.last))

    def ended(number: int, life: Life) -> None:
        finished.append(life)
        prefill.follow(number, life)

    prompts = tuple(
        replace(a, output=1, shared=min(a.shared, 0 if a.after is None else trace.arrivals[a.after].prompt))
        for a in trace.arrivals
    )
    prefill = Instance(system.prefill, replace(trace, arrivals=prompts), True, prefix_cache, before, ended=computed)
    decode = Instance(system.decode, trace, False, False, after, lives, offered=True, ended=ended)
    while any(instance.next_at < math.inf for instance in (prefill, decode)):
        min((prefill, decode), key=lambda instance: instance.next_at).step()
        report(len(finished))
    prefill.finish()
    decode.finish()
    return finished
