"""Every way to serve a model with what there is: mixes of devices, how many of each, shards, lanes, policies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import KvPolicy, Load, Speculation
from lamina.simulator.costs.hardware import Device
from lamina.simulator.costs.offloaded import SEQUENCE_TOKENS, best_local_share
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System, instances, price, with_decode
from lamina.simulator.planning.deployment import undeployable
from lamina.simulator.planning.inventory import Inventory

DEGREES = (1, 2, 4, 8)
"""Devices that share the dense layers: those of one machine."""
LANES = ((1, 1), (2, 1), (3, 1), (3, 2))
"""Batches in rotation where attention is elsewhere, and replicas of the weights: the paper has one fewer than lanes."""
BATCH_TOKENS = (512, 2048, 8192)
"""Tokens a batch where prompts come in chunks: fewer for an even pace, more for prompts that are soon read."""
MAX_CANDIDATES = 20_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """A system, and how many of it there could be within inventory and budget."""

    system: System
    replicas: int

    @property
    def offloaded(self) -> bool:
        return isinstance(self.system, Offloaded)


def candidates(
    model: ModelShape,
    inventory: Inventory,
    budget: float | None = None,
    prefill: bool = True,
    sequence_tokens: int = SEQUENCE_TOKENS,
    speculation: Speculation | None = None,
    made: Callable[[System], System | None] | None = None,
) -> tuple[Candidate, ...]:
    """All that fit the inventory, the devices' memory and the budget (dollars an hour; None: any). Without `prefill`
    none has devices for it, or differs from another in how it treats prompts. Memory is divided between KV and states
    for sequences of `sequence_tokens` tokens. `made` makes what is a candidate of each, or None of one that is not.

    Raises InvalidRequest where drafts cannot be verified; where there are none, naming what the model needs and what
    there is, or what the cheapest costs; and where there are more than `MAX_CANDIDATES`.
    """
    if budget is not None and not 0 < budget < math.inf:
        raise InvalidRequest(f"budget is {budget}; allowed are dollars an hour above 0")
    fitting: list[Candidate] = []
    cheapest: System | None = None
    every = _systems(model, inventory, prefill, sequence_tokens)
    for system in every if made is None else (other for original in every if (other := made(original)) is not None):
        if model.states:
            system = with_decode(system, sequence_tokens=sequence_tokens)
        if speculation is not None:
            system = with_decode(system, speculation=speculation)
        if not _allowed(system, inventory) or (count := _replicas(system, inventory)) < 1 or not fits(system):
            continue
        cost = price(system)
        if cheapest is None or cost < price(cheapest):
            cheapest = system
        if budget is not None and cost:
            count = min(count, int(budget / cost + 1e-9))
        if count:
            fitting.append(Candidate(system, count))
        if len(fitting) > MAX_CANDIDATES:
            raise InvalidRequest(
                f"there are more than {MAX_CANDIDATES} candidates; allowed are fewer devices, links or policies, or a "
                "smaller budget"
            )
    if fitting:
        return tuple(fitting)
    if cheapest is not None:
        raise InvalidRequest(
            f"budget is {budget:g} dollars an hour; the cheapest that holds {model.name!r}, {cheapest.name}, costs "
            f"{price(cheapest):.2f}"
        )
    raise InvalidRequest(_nowhere(model, inventory))


def _systems(model: ModelShape, inventory: Inventory, prefill: bool, context: int) -> Iterator[System]:
    kinds = set(inventory.systems)
    whole_prompts = "colocated" in kinds and (prefill or "chunked" not in kinds)
    chunks = BATCH_TOKENS if prefill else BATCH_TOKENS[-1:]
    for policy in inventory.policies:
        if "chunked" in kinds:
            yield from _colocated(model, inventory, policy, chunks)
        if whole_prompts:
            yield from _colocated(model, inventory, policy)
        if "disaggregated" in kinds and prefill:
            yield from _disaggregated(model, inventory, policy)
        for system in _offloaded(model, inventory, policy):
            for tokens in chunks:
                yield replace(system, batch_tokens=tokens)
            if system.lanes == 1 and _allowed(full := replace(system, local_share=1.0), inventory):
                share = _local_share(full, context)
                for tokens in chunks if share else ():
                    yield replace(system, batch_tokens=tokens, local_share=share)


def _allowed(system: System, inventory: Inventory) -> bool:
    return not (inventory.only_deployable and undeployable(system))


def _colocated(
    model: ModelShape, inventory: Inventory, policy: KvPolicy, batch_tokens: tuple[int, ...] = ()
) -> Iterator[Colocated]:
    """Co-located systems: prompts come in chunks for each of these batch limits, and whole where there are none."""
    for have in inventory.have:
        for degree in _degrees(have.device, have.count):
            system = Colocated(
                model=model, device=have.device, tensor_parallel=degree, chunked_prefill=False, policy=policy
            )
            if not batch_tokens:
                yield system
            for tokens in batch_tokens:
                yield replace(system, chunked_prefill=True, batch_tokens=tokens)


def _disaggregated(model: ModelShape, inventory: Inventory, policy: KvPolicy) -> Iterator[Disaggregated]:
    """Prompts apart; decode in one place, or with attention elsewhere again, on as many devices as a machine has."""
    instances = list(_colocated(model, inventory, policy))
    for prefill, decode, link in product(instances, instances, inventory.links):
        yield Disaggregated(prefill=prefill, decode=decode, link=link)
    for apart in _offloaded(model, inventory, policy):
        if apart.lanes == 2 and apart.attention_count in DEGREES and apart.shard == "heads":
            for prefill in instances:
                if prefill.device == apart.model_device:
                    yield Disaggregated(
                        prefill=prefill, decode=replace(apart, batch_tokens=BATCH_TOKENS[-1]), link=apart.link
                    )


def _offloaded(model: ModelShape, inventory: Inventory, policy: KvPolicy) -> Iterator[Offloaded]:
    for attention, dense in product(inventory.have, inventory.have):
        if ("lamina-cpu" if attention.device.kind == "cpu" else "lamina") not in inventory.systems:
            continue
        for degree, count in product(_degrees(dense.device, dense.count), range(1, attention.count + 1)):
            for shard, (lanes, replicas), link in product(_shards(model, count), LANES, inventory.links):
                yield Offloaded(
                    model=model,
                    model_device=dense.device,
                    attention_device=attention.device,
                    link=link,
                    model_count=degree,
                    attention_count=count,
                    model_replicas=replicas,
                    lanes=lanes,
                    shard=shard,
                    policy=policy,
                )


def _local_share(system: Offloaded, context: int) -> float:
    """The share of the KV that the model devices keep in a batch that fills half of both tiers; 0 where none pays."""
    try:
        capacity = system.capacity
        batch = max(1, min(capacity.tokens // context, capacity.sequences, system.max_sequences) // 2)
        return best_local_share(system, Load(batch, context))
    except InvalidRequest:
        return 0.0


def _degrees(device: Device, count: int) -> Iterator[int]:
    for degree in DEGREES:
        if degree <= count and (degree == 1 or device.interconnect > 0):
            yield degree


def _shards(model: ModelShape, count: int) -> tuple[str, ...]:
    """The ways to cut KV: heads where each worker gets as many, else ranges of positions too; beyond the heads those
    alone."""
    heads = model.kv_heads
    if count > heads:
        return ("sequence",)
    return ("heads",) if heads % count == 0 else ("heads", "sequence")


def _replicas(system: System, inventory: Inventory) -> int:
    """How many of a system the inventory has devices for."""
    needed: Counter[Device] = Counter()
    for device, count in system.devices:
        needed[device] += count
    return min(inventory.count(device) // count for device, count in needed.items())


def fits(system: System) -> bool:
    """Whether weights and some KV have room."""
    try:
        return all(part.capacity.tokens > 0 and part.capacity.sequences > 0 for part in instances(system))
    except InvalidRequest:
        return False


def _nowhere(model: ModelShape, inventory: Inventory) -> str:
    """What the model needs and what there is, in words."""
    have = ", ".join(
        f"{entry.count}x {entry.device.name} with {entry.device.memory / 1e9:.1f} GB each" for entry in inventory.have
    )
    degree = max(DEGREES)
    return (
        f"model {model.name!r} fits nowhere: its weights have {model.weight_bytes / 1e9:.1f} GB and a token's KV "
        f"{model.kv_bytes_per_token(2.0) / 1e6:.3f} MB; there are {have}. Allowed are devices of which up to {degree} "
        f"hold the weights in 90 % of their memory, systems that use them ({', '.join(inventory.systems)}) and, where "
        "prompts or attention are elsewhere, a link"
    )
