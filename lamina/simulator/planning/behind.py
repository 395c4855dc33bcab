"""Whether Lamina's attention workers pay behind another engine (`weigh`): the best of the systems that its plugin can
be, beside that engine alone on the same GPUs, and on any that there are.

With workers the engine keeps no KV, waits for each layer's attention, and has its prompts attended there too. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import FULL, Load
from lamina.simulator.costs.systems import Colocated, Offloaded, System
from lamina.simulator.event_loop.simulate import Progress
from lamina.simulator.planning.candidates import Candidate, candidates
from lamina.simulator.planning.event_runs import EventRuns, settled
from lamina.simulator.planning.inventory import Have, Inventory
from lamina.simulator.planning.plan import PlanRequest
from lamina.simulator.planning.planner import Ranked, advantage, looked_at, rank, ratio_error
from lamina.simulator.planning.run_progress import Mapped, one_by_one
from lamina.simulator.traces.demand import Demand

ENGINES = {"vllm": "vLLM"}
"""Engines that attention workers can be behind, with their names in words. Their efficiencies have these names too."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to serve, and what it does of the demand."""

    ranked: Ranked
    demand: Demand

    @property
    def replicas(self) -> int:
        return self.ranked.estimate.replicas

    @property
    def name(self) -> str:
        name = self.ranked.candidate.system.name
        return name if self.replicas == 1 else f"{self.replicas} of {name}"

    @property
    def gpus(self) -> str:
        device, count = self.ranked.candidate.system.devices[0]
        return f"{count * self.replicas}x {device.name}"

    @property
    def figures(self) -> dict[str, float]:
        """Numbers of all replicas, but for the batch and its step, which are one's. Times are seconds."""
        system, predicted, forecast = self.ranked.candidate.system, self.ranked.predicted, self.ranked.estimate
        load = Load(max(1, round(predicted.batch)), self.demand.context)
        step = system.step(load)
        return {
            "dollars_per_hour": forecast.price,
            "kv_tokens": system.capacity.tokens * self.replicas,
            "requests": forecast.fits * self.replicas,
            "batch": load.decode,
            "step": step.seconds,
            "dense": step.model,
            "attention": step.attention,
            "wire": max(0.0, step.seconds - step.model - step.attention),
            "tpot": predicted.tpot,
            "ttft": predicted.ttft,
            "share": predicted.slo_share,
            "requests_per_second": predicted.requests_per_second,
            "tokens_per_second": predicted.tokens_per_second,
            "dollars_per_million": predicted.dollars_per_million,
        }


@dataclass(frozen=True, slots=True)
class Weighed:
    """The best with workers; the engine alone on the same GPUs; and alone on any that there are, where that is another
    way and gets a request through."""

    engine: str
    workers: Way
    alone: Way
    elsewhere: Way | None

    @property
    def ways(self) -> dict[str, Way]:
        """All, by what they are."""
        ways = {"with workers": self.workers, "alone, same GPUs": self.alone}
        return ways if self.elsewhere is None else {**ways, "alone, any GPUs": self.elsewhere}

    @property
    def take(self) -> Way:
        """What gives most for a dollar, of what serves all if something does. Workers have to be better than the engine
        alone by more than what such a comparison is off by."""
        best = self.alone
        for way, needed in ((self.elsewhere, 1.0), (self.workers, 1 + ratio_error(best.ranked))):
            if way is not None:
                gain = way.ranked.serves, advantage(way.ranked, best.ranked)
                best = way if gain > (best.ranked.serves, needed) else best
        return best

    @property
    def answer(self) -> str:
        """What to take and why, in plain words."""
        workers, alone, take = self.workers, self.alone, self.take
        if take is workers:
            return f"Take the workers: {self._gained()}."
        name = ENGINES[self.engine] if take is alone else take.name
        serves = "it serves all" if take.ranked.serves else "it does not serve all, and nor do the workers"
        room = "" if alone.ranked.estimate.fits else f"; {alone.gpus} have no room for the longest request"
        if not workers.ranked.goodput:
            lost = "with the workers no request is within the SLO"
        elif take.ranked.serves and not workers.ranked.serves:
            lost = "with the workers not all is served"
        else:
            gain = advantage(workers.ranked, take.ranked)
            lost = f"the workers give {gain:.2f} times the requests for a dollar"
            lost += ", a tie within the error of such a comparison" if gain >= 1 else ""
        return f"Take {name} alone: {serves}, and {lost}{room}."

    def _gained(self) -> str:
        """What the workers do that the engine alone on these GPUs does not."""
        workers, alone, gpus = self.workers, self.alone, self.alone.gpus
        if not alone.ranked.estimate.fits:
            return (
                f"the model fits {gpus}, its contexts do not. The longest request has {workers.demand.longest:,} "
                f"tokens, beside the weights there is room for {alone.figures['kv_tokens']:,}, and the workers have "
                f"room for {workers.figures['kv_tokens']:,}"
            )
        if not alone.ranked.goodput:
            return f"alone on {gpus} no request is within the SLO"
        rates = f"{workers.ranked.goodput:.3g} requests/s within the SLO, {gpus} alone {alone.ranked.goodput:.3g}"
        return f"they serve {rates}, {advantage(workers.ranked, alone.ranked):.2f} times as many for a dollar"


def weigh(
    asked: PlanRequest,
    engine: str,
    *,
    check: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    mapped: Mapped = one_by_one,
) -> Weighed:
    """The engine with workers beside it alone. Without `check` by the event loop formulas are believed. Raises
    InvalidRequest for an engine or a model that workers cannot serve, where nothing fits, and where nothing meets the
    SLO."""
    check_engine(engine)
    _check_model(asked, engine)
    load, slo, prefill = asked.demand, asked.slo, asked.prefill
    loop = EventRuns(asked.trace, load, slo, prefill, seed, mapped) if check else None

    def possible(inventory: Inventory) -> tuple[Candidate, ...]:
        tokens = max(1, round(load.context))
        return candidates(
            asked.model,
            inventory,
            asked.budget,
            prefill,
            tokens,
            asked.speculation,
            lambda system: made(system, engine),
        )

    def best(some: Sequence[Ranked]) -> Way:
        """Of some in their order; where none gets a request through, what has most room."""
        if not (useful := [entry for entry in some if entry.estimate.goodput]):
            return Way(max(some, key=lambda entry: entry.candidate.system.capacity.tokens), load)
        return Way(settled(useful, loop, progress)[0], load)

    every = possible(replace(asked.inventory, systems=("chunked", "lamina", "lamina-cpu"), only_deployable=False))
    if not any(candidate.offloaded for candidate in every):
        raise InvalidRequest(
            f"no devices here can be attention workers of {asked.model.name!r} behind {engine}; needed are GPUs that "
            "hold the weights, a link, and machines whose number divides that of the KV heads"
        )
    ranked = rank(every, load, slo, prefill=prefill, progress=progress, mapped=mapped)
    workers = best([entry for entry in ranked if entry.candidate.offloaded])
    device, count = workers.ranked.candidate.system.devices[0]
    on_same_gpus = [
        looked_at(entry, load, slo, prefill)
        for entry in possible(Inventory((Have(device, count * workers.replicas),), systems=("chunked",)))
    ]
    alone = best(sorted(on_same_gpus, key=lambda entry: (not entry.serves, -entry.goodput_per_dollar)))
    others = [entry for entry in ranked if not entry.candidate.offloaded and entry.estimate.goodput]
    elsewhere = best(others) if others else None
    return Weighed(engine, workers, alone, elsewhere if elsewhere and elsewhere.name != alone.name else None)


def check_engine(engine: str) -> None:
    """Raise InvalidRequest for an engine that workers cannot be behind."""
    if engine not in ENGINES:
        raise InvalidRequest(f"behind is {engine!r:.80}; allowed are {', '.join(ENGINES)}")


def _check_model(asked: PlanRequest, engine: str) -> None:
    model, drafts = asked.model, asked.speculation
    refused = {
        "layers with states": bool(model.states),
        "latents": any(group.prompt_score_flops for group in model.groups),
        "layers that choose tokens": any(group.choice for group in model.groups),
        "a draft model": drafts is not None and drafts.draft is not None,
    }
    if reasons := [name for name, present in refused.items() if present]:
        raise InvalidRequest(
            f"model {model.name!r} has {', '.join(reasons)}; allowed behind {engine} are models with plain KV alone"
        )


def made(system: System, engine: str) -> System | None:
    """The system as the engine is, alone or with workers; None where it is neither."""
    device, count = system.devices[0]
    name = f"{ENGINES[engine]} on {count}x {device.name}"
    if device.kind != "gpu":
        return None
    if isinstance(system, Colocated):
        return replace(system, label=name) if system.chunked_prefill and system.policy == FULL else None
    if not isinstance(system, Offloaded) or system.shard != "heads" or system.local_share or system.lanes > 1:
        return None
    few, many = sorted((count, system.attention_count))
    if system.model.kv_heads % many or many % few:  # a rank has several machines, or a machine workers of several ranks
        return None
    policy = system.policy
    name += f", KV on {system.attention_count}x {system.attention_device.name}"
    name += "" if policy == FULL else f", {policy.name}"
    return replace(system, behind=True, overlap=False, policy=replace(policy, held=1.0), label=name)
