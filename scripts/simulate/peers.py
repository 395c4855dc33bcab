"""Cells of two papers on splitting a model over devices, rebuilt: KernelFlume (arXiv 2606.29207), which attends
elsewhere, and AFD-Ledger (arXiv 2608.04502), which has attention with its weights on one pool of devices and the
experts on another (AFD), and compares it with both on each device (EP: attention by requests, experts dealt out).

The papers were not at hand: their numbers are from what others wrote about them, and what a cell needs beyond that is
assumed, as its note says. Nothing was fitted to a cell. All devices reach what `REACHED` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from simulate.published import Row

from lamina.simulator.costs.cost_model import Load, all_reduce_time, attention_time, rate
from lamina.simulator.costs.hardware import Catalogue, Device, Efficiency, Link, at, with_efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Offloaded

REACHED = Efficiency(
    dense=((1.0, 0.9), (64.0, 0.9), (512.0, 0.7)),
    attention=((1.0, 0.7),),
    collective=0.71,
    collective_latency=1e-5,
    layer_overhead=5e-6,
    step_overhead=3e-3,
    sources={
        "dense": "llm-analysis's defaults: 0.9 of the bandwidth, 0.7 of the FLOPs; assumed: from 64 to 512 tokens",
        "attention": "Lamina, arXiv 2405.01814v2: more than 70 % of the bandwidth even at batch 20",
        "collective": "assumed: what NCCL reaches of a line in the Lamina paper, 35.5 of 50 GB/s",
        "collective_latency": "assumed: a few launches and hops within one machine",
        "layer_overhead": "assumed: what is left of launches with CUDA graphs",
        "step_overhead": "NEO, MLSys 2025: its scheduler takes less than 3 ms an iteration",
    },
)
"""What every device of these cells reaches: published or assumed numbers, not those of one engine."""
_REPORTED = "reported"
LEDGER_ERROR = 0.096
"""The largest error of a ratio that AFD-Ledger gives for itself: two systems within it are a tie."""
USED = 0.9
"""Share of a device's memory for weights and KV."""
MICRO_BATCHES = (1, 2, 3, 4)
GRAIN = 64
"""Batches that are tried, up to what memory holds."""


def kernelflume_rows(catalogue: Catalogue) -> list[Row]:
    """Memory without weights, what a split costs over one device, and what two lanes gain."""
    known = with_efficiency(catalogue, REACHED)
    h100, fhbn, nccl = known.device("h100"), known.link("fhbn-400g"), known.link("nccl-400g")
    a6000 = Device(
        "a6000", "gpu", flops=1.548e14, memory=4.8e10, bandwidth=7.68e11, price=0.0, efficiency=REACHED
    )  # NVIDIA's RTX A6000 data sheet
    rows = []
    for count, published in ((1, 47e9), (7, 330e9)):
        held = _balanced(a6000, nccl, attention_count=count, attention_memory_share=0.98, shard="sequence")
        nbytes = held.kv_tokens * held.model.kv_bytes_per_token()
        what = f"KV in {count}x a6000 without weights"
        rows.append(Row(what, published, nbytes, "bytes", "assumed: 0.98 of the memory", _REPORTED))
    for device, link in ((h100, fhbn), (a6000, nccl)):
        split = _balanced(device, link)
        load = _even_load(split)
        whole = Colocated(model=split.model, device=device)
        about = (
            f"assumed: {load.decode:.0f} sequences of {load.context:.0f} tokens, where attention takes as long as the "
            "dense layers"
        )
        one, lanes, where = split.step(load).seconds, replace(split, lanes=2), f"{device.name} over {link.name}"
        ours = one / whole.step(load).seconds
        what = f"split step over one device's, {where}"
        rows.append(Row(what, 1.07, ours, "times", f"1.06 to 1.08; {about}", _REPORTED))
        ours = 2 * one / lanes.step(replace(load, decode=2 * load.decode)).seconds
        what = f"two lanes with a batch each over one, {where}"
        rows.append(Row(what, 1.90, ours, "times", f"1.87 to 1.94; {about}, in each lane", _REPORTED))
        what = f"two lanes with half a batch each over one, {where}"
        note = f"the other reading: one batch cut in two, so that weights are read twice; {about}, in both lanes"
        rows.append(Row(what, 1.90, one / lanes.step(load).seconds, "times", note, _REPORTED))
    return rows


def _balanced(device: Device, link: Link, **more: object) -> Offloaded:
    made = Offloaded(model=model("llama-3.1-8b"), model_device=device, attention_device=device, link=link)
    return replace(made, **more)  # type: ignore[arg-type]  # fields of it


def _even_load(split: Offloaded, context: float = 8192) -> Load:
    """The batch at which both tiers take equally long, where lanes gain most."""
    lanes = (split.lane(Load(batch, context)) for batch in range(1, 1025))
    batch = next(number for number, lane in enumerate(lanes, 1) if lane.attention >= lane.dense)
    return Load(batch, context)


def afd_rows(catalogue: Catalogue) -> list[Row]:
    """FastAFD over one machine of its baseline and over the best of its baselines; H20 with L40S over H20 alone."""
    gb200 = Device(
        "gb200", "gpu", flops=2.5e15, flops_8bit=5e15, memory=1.86e11, bandwidth=8e12, price=1.0, interconnect=9e11,
        efficiency=REACHED,
    )  # fmt: skip  # NVIDIA's GB200 NVL72 data sheet, without sparsity, of one GPU
    shape = replace(model("qwen3-235b-a22b"), element=1.0)
    over = {"one": list[float](), "best": list[float]()}
    for context in (2048, 8192, 32768):
        for tpot in (0.02, 0.03, 0.05, 0.1):
            apart = best_apart(shape, gb200, gb200, context, tpot, pools=[(16 - f, 1, f) for f in range(1, 16)])
            together = {count: best_together(shape, gb200, count, context, tpot) for count in (4, 8, 16)}
            over["one"].append(apart / together[4])
            over["best"].append(apart / max(together.values()))
    about = (
        "geometric mean of contexts of 2K, 8K and 32K at 20, 30, 50 and 100 ms a token, 16 GPUs for AFD, 8-bit "
        "weights, 16-bit KV: all assumed"
    )
    one, best = (_mean(ratios) for ratios in over.values())
    spread = [f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in over.values()]
    said = "a tie: within the error of AFD-Ledger's ratios" if abs(best - 1) <= LEDGER_ERROR else "no tie"
    what = "FastAFD, qwen3-235b-a22b on gb200: AFD over EP of one tray, four GPUs"
    again = "the same over the best EP of 4, 8 and 16 GPUs"
    rows = [
        Row(what, 1.404, one, "times", f"FastAFD says 1.35 to 1.45; here {spread[0]}, {about}", _REPORTED),
        Row(again, 0.990, best, "times", f"{said}; here {spread[1]}, {about}", _REPORTED),
    ]
    h20, l40s = (with_efficiency(catalogue, REACHED).device(name) for name in ("h20", "l40s"))
    h20, l40s = replace(h20, price=1.85), replace(l40s, price=1.08, network=1.25e10)
    return [*rows, heterogeneous(h20, l40s)]


def heterogeneous(attention: Device, experts: Device, context: float = 650, tpot: float = 0.15) -> Row:
    """Tokens a dollar of MegaScale-Infer's attention on H20 and experts on L40S, over tensor parallelism on H20."""
    shape = model("mixtral-8x22b")
    whole = 0.0
    for count in (4, 8):
        system = Colocated(
            model=shape, device=attention, tensor_parallel=count, max_sequences=1 << 20, batch_tokens=1 << 20
        )
        for batch in _batches(system.kv_tokens / context):
            seconds = system.step(Load(batch, context)).seconds
            if seconds <= tpot:
                whole = max(whole, batch / seconds / (count * attention.price))
    pools = [(nodes, count, 8) for nodes in range(1, 17) for count in (1, 2, 4, 8)]
    split = best_apart(shape, attention, experts, context, tpot, pools)
    note = (
        "assumed: MegaScale-Infer's setting, as recalled: mixtral-8x22b in 16 bits, prompts of 571 and outputs of 159 "
        "tokens, 150 ms a token, prices of 1.85 and 1.08, 100 Gbit/s for each L40S"
    )
    what = "tokens a dollar, attention on h20 and experts on l40s over all on h20"
    return Row(what, 1.823, split / whole, "times", note, _REPORTED)


@dataclass(frozen=True, slots=True)
class Layer:
    """Seconds of one layer of a batch: attention with its projections, experts, and each way between them."""

    attention: float
    experts: float
    there: float
    back: float

    @property
    def alone(self) -> float:
        return self.attention + self.experts + self.there + self.back

    def cycle(self, batches: int) -> float:
        """Of `batches` batches in rotation: what the longer pool takes for all, or one by itself (FastAFD's
        T = (Ta + Te + 2 Tc) + Tf (m L - 1) a layer)."""
        return max(self.alone, batches * max(self.attention, self.experts, self.there, self.back))


def best_together(shape: ModelShape, device: Device, count: int, context: float, tpot: float) -> float:
    """Tokens a second and dollar of attention by requests and experts dealt over the same `count` devices, one batch
    each after the other, at the best batch that is within `tpot`."""
    weights = _attention_weights(shape) + _expert_weights(shape) / count
    best = 0.0
    for batch in _batches((device.memory * USED - weights) / (shape.kv_bytes_per_token() * context)):
        layer = _layer(shape, device, device, (count, 1, count), batch, context, together=True)
        seconds = shape.layers * layer.alone + _head_time(shape, device, batch)
        if seconds <= tpot:
            best = max(best, batch / seconds / device.price)
    return best


def best_apart(
    shape: ModelShape,
    device: Device,
    others: Device,
    context: float,
    tpot: float,
    pools: Iterable[tuple[int, int, int]],
) -> float:
    """Tokens a second and dollar of the best split within `tpot`. `pools`: attention nodes, devices of each by tensor
    parallelism, and devices with experts."""
    best = 0.0
    for nodes, count, experts in pools:
        room = count * device.memory * USED - _attention_weights(shape)
        if room <= 0 or _expert_weights(shape) > experts * others.memory * USED:
            continue
        price = nodes * count * device.price + experts * others.price
        for batch in _batches(room / (shape.kv_bytes_per_token() * context)):
            for parts in MICRO_BATCHES:
                layer = _layer(shape, device, others, (nodes, count, experts), batch / parts, context)
                seconds = shape.layers * layer.cycle(parts) + _head_time(shape, device, batch / parts, count)
                if seconds <= tpot:
                    best = max(best, nodes * batch / seconds / price)
    return best


def _layer(
    shape: ModelShape,
    device: Device,
    others: Device,
    pool: tuple[int, int, int],
    batch: float,
    context: float,
    together: bool = False,
) -> Layer:
    """One layer of `batch` sequences on each attention node; `together`: experts are on the same devices."""
    nodes, count, experts = pool
    group = shape.groups[-1]
    moved, flops = group.projections * shape.element + 4 * batch * shape.hidden, 2 * group.projections * batch
    attention = _roofline(moved, flops, device, shape, batch) / count + device.efficiency.layer_overhead
    attention += attention_time(shape, device, Load(batch, context), busiest=1 / count) / shape.layers
    if count > 1:
        attention += all_reduce_time(device, count, batch * shape.hidden * shape.activation)
    tokens = nodes * batch * group.top_k / experts  # that one device with experts computes
    moved = group.experts_read(nodes * batch) * group.expert * shape.element / experts + 4 * tokens * shape.hidden
    each = tokens / (group.experts / experts)
    mlp = _roofline(moved, 2 * tokens * group.expert, others, shape, each) + others.efficiency.layer_overhead
    # A token goes to as many devices as it has experts; 8-bit there, 16-bit back, where weights have 8 bits.
    copies = min(group.top_k, experts) * (1 - 1 / experts if together else 1.0)
    sent, got = batch * copies * shape.hidden / count, nodes * batch * copies * shape.hidden / experts
    way = max(sent / _wire(device, others), got / _wire(others, device))
    latency = device.efficiency.collective_latency
    return Layer(attention, mlp, latency + way * shape.element, latency + way * shape.activation)


def _wire(device: Device, other: Device) -> float:
    """Bytes a second of a device to the other pool: within one domain of the interconnect, else by its network card."""
    inside = device.name == other.name
    return device.interconnect * device.efficiency.collective if inside else device.network


def _roofline(moved: float, flops: float, device: Device, shape: ModelShape, tokens: float) -> float:
    best = max(moved / device.bandwidth, flops / rate(device, shape.element))
    return best / at(device.efficiency.dense, max(1.0, tokens))


def _head_time(shape: ModelShape, device: Device, batch: float, count: int = 1) -> float:
    """Of the output layer, and what a step costs besides."""
    seconds = _roofline(shape.head * shape.element, 2 * shape.head * batch, device, shape, batch)
    return seconds / count + device.efficiency.step_overhead


def _attention_weights(shape: ModelShape) -> float:
    return (sum(g.layers * g.projections for g in shape.groups) + shape.head + shape.embedding) * shape.element


def _expert_weights(shape: ModelShape) -> float:
    return sum(g.layers * (g.mlp + g.experts * g.expert) for g in shape.groups) * shape.element


def _batches(most: float) -> Iterable[int]:
    """Up to what memory holds."""
    return sorted({max(1, int(most * part / GRAIN)) for part in range(1, GRAIN + 1)}) if most >= 1 else ()


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
