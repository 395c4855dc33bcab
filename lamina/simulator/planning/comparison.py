"""Systems beside each other on one trace: built from a name, of a size that fits the model, and run. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import FULL, KvPolicy, Speculation
from lamina.simulator.costs.hardware import Catalogue, Device
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System, with_decode
from lamina.simulator.event_loop.failures import Failures
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Progress, Slo, simulate
from lamina.simulator.planning.candidates import DEGREES
from lamina.simulator.planning.inventory import MAX_COUNT, SYSTEMS
from lamina.simulator.traces.arrivals import Trace

MODEL_DEVICE, ATTENTION_DEVICE, CPU_DEVICE = "h100", "h20", "epyc-genoa"
LINK, CPU_LINK = "fhbn-400g", "ethernet-25g"
"""Between accelerators as in the Lamina paper; a CPU host of the catalogue has 37.5 Gbit/s, of which this is below."""
_ROOM = 0.25
"""The least share of the memory that may be used which the KV of a co-located system should have."""
_SPEC = re.compile(r"([a-z-]+)(?::([^+:]+?)x(\d{1,4})(?:\+([^+:]+?)x(\d{1,4}))?)?", re.ASCII)
_FORM = f"{', '.join(SYSTEMS)}, or one with its devices such as chunked:h100x4 or lamina:h100x2+h20x4"


@dataclass(frozen=True, slots=True)
class Choice:
    """What systems are built of. `lanes` and `links` are for offloaded ones."""

    model: ModelShape
    catalogue: Catalogue
    policy: KvPolicy = FULL
    lanes: int = 2
    link: str | None = None
    speculation: Speculation | None = None


def build(spec: str, choice: Choice) -> System:
    """A system by its name: one of `SYSTEMS`, alone or with its devices, "NAME:DEVICExCOUNT" or
    "NAME:DEVICExCOUNT+DEVICExCOUNT" (dense layers or prompts, then attention or decode).

    Alone, it has as many H100 as hold the weights, and for attention as many H20 (CPU hosts) as cost no more, in all,
    than the co-located system: which for the three models of the Lamina paper are its own pairs (table 5). Raises
    InvalidRequest.
    """
    match = _SPEC.fullmatch(spec.strip().lower())
    if match is None or match[1] not in SYSTEMS:
        raise InvalidRequest(f"system is {spec!r:.80}; allowed are {_FORM}")
    kind, first, a, second, b = match.groups()
    cut = kind not in ("colocated", "chunked")
    if first is not None and (second is not None) is not cut:
        raise InvalidRequest(f"system is {spec!r:.80}, which takes {'two kinds' if cut else 'one kind'} of device")
    catalogue = choice.catalogue
    if first is None:
        devices = _sized(kind, choice)
    else:
        devices = [(catalogue.device(first), _count(spec, a))]
        if second is not None:
            devices.append((catalogue.device(second), _count(spec, b)))
    system = _built(kind, devices, choice)
    return system if choice.speculation is None else with_decode(system, speculation=choice.speculation)


def compare(
    systems: Sequence[System],
    trace: Trace,
    *,
    slo: Slo | None = None,
    prefill: bool = True,
    seed: int = 0,
    assumptions: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    failures: Failures | None = None,
) -> list[RunResult]:
    """Each of the systems on the trace, in their order. `assumptions` are added to those of the results."""
    results = []
    for number, system in enumerate(systems):

        def report(what: str, done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(what, number * total + done, len(systems) * total)

        result = simulate(system, trace, seed=seed, slo=slo, prefill=prefill, progress=report, failures=failures)
        results.append(replace(result, assumptions={**result.assumptions, **(assumptions or {})}))
    return results


def assumed(reached: str, prefill: bool, trace: Trace, choice: Choice) -> dict[str, str]:
    """What a comparison takes for granted, in words; `reached`: of devices without measurements."""
    words = {"efficiency": reached}
    words["memory"] = "90 % of each device's memory is for weights and KV, as vLLM's default"
    if not prefill:
        words["prefill"] = (
            "prompts are computed elsewhere, at no cost here: decode alone, as in the Lamina paper's evaluation"
        )
    words |= chosen(choice.model, choice.speculation)
    if trace.remarks:
        words["trace"] = "; ".join(trace.remarks)
    return words


def chosen(model: ModelShape, speculation: Speculation | None) -> dict[str, str]:
    """What is assumed of packed weights and of drafts, in words."""
    words = {}
    if (packing := model.packing) is not None:
        words["weights"] = f"{packing.name}, {packing.nbytes:g} bytes each; norms and biases are floats"
    if speculation is not None:
        words["speculation"] = (
            f"up to {speculation.tokens} drafts by {speculation.name} in {speculation.proposed:.0%} of the steps, each "
            f"accepted with the chance {speculation.acceptance:g} where those before it were; none where none pay"
        )
    return words


def _built(kind: str, devices: Sequence[tuple[Device, int]], choice: Choice) -> System:
    (device, count), model, policy = devices[0], choice.model, choice.policy
    if kind in ("colocated", "chunked"):
        return Colocated(
            model=model, device=device, tensor_parallel=count, chunked_prefill=kind == "chunked", policy=policy
        )
    link = choice.catalogue.link(choice.link or (CPU_LINK if kind == "lamina-cpu" else LINK))
    other, others = devices[1]
    if kind == "disaggregated":
        first, second = (
            Colocated(model=model, device=part, tensor_parallel=part_count, chunked_prefill=False, policy=policy)
            for part, part_count in devices
        )
        return Disaggregated(prefill=first, decode=second, link=link)
    if (other.kind == "cpu") != (kind == "lamina-cpu"):
        allowed = "a CPU host" if kind == "lamina-cpu" else "an accelerator; for CPU hosts there is lamina-cpu"
        raise InvalidRequest(f"{kind} has its attention on {other.name!r}, of kind {other.kind}; allowed is {allowed}")
    return Offloaded(
        model=model,
        model_device=device,
        model_count=count,
        attention_device=other,
        attention_count=others,
        link=link,
        lanes=choice.lanes,
        shard="heads" if others <= model.kv_heads else "sequence",
        policy=policy,
    )


def _sized(kind: str, choice: Choice) -> list[tuple[Device, int]]:
    """The devices that `build` takes by default."""
    dense = choice.catalogue.device(MODEL_DEVICE)
    degree = _smallest(choice.model, dense, _ROOM)
    if kind in ("colocated", "chunked"):
        return [(dense, degree)]
    if kind == "disaggregated":
        return [(dense, degree), (dense, degree)]
    attention = choice.catalogue.device(CPU_DEVICE if kind == "lamina-cpu" else ATTENTION_DEVICE)
    alone = _smallest(choice.model, dense, 0.0)
    spare = (degree - alone) * dense.price
    return [(dense, alone), (attention, max(1, math.floor(spare / attention.price)) if attention.price else 1)]


def _smallest(model: ModelShape, device: Device, room: float) -> int:
    """The smallest degree of tensor parallelism whose memory holds the weights, and leaves that share of it."""
    for degree in DEGREES:
        if model.weight_bytes < Colocated(model=model, device=device).memory_share * degree * device.memory * (
            1 - room
        ):
            return degree
    raise InvalidRequest(
        f"model {model.name!r} has {model.weight_bytes / 1e9:.1f} GB of weights; up to {DEGREES[-1]}x {device.name} do "
        "not hold them: name devices, such as chunked:h200x8"
    )


def _count(spec: str, digits: str) -> int:
    if not 1 <= int(digits) <= MAX_COUNT:
        raise InvalidRequest(f"system {spec!r:.80} has {digits} devices; allowed are 1 to {MAX_COUNT}")
    return int(digits)
