"""Figures of papers beside what the formulas give: the simulator's own test, and its documentation.

Each `Row` has one published number. Lamina is arXiv 2405.01814v2, Step-3 is arXiv 2507.19427. Numbers that the papers
do not print, but that follow from theirs by arithmetic, are "derived"; none of them is a time that was measured.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import Load, attention_time, dense_time, minimum_bandwidth
from lamina.simulator.costs.hardware import ROOFLINE, Catalogue, Device, Efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Offloaded, price
from lamina.simulator.event_loop.results import RunResult
from lamina.simulator.event_loop.simulate import Progress, simulate
from lamina.simulator.traces.arrivals import Trace, all_at_once

EQUAL_COST = (("llama-33b", 1, 2, 2), ("llama-65b", 2, 4, 4), ("llama-3-70b", 2, 4, 4))
"""Lamina's table 5: a model, its DOP(a, b) of H100 and H20, and how many H100 vLLM has for about as much."""
GAINS = (1.161, 1.901)
"""Lamina's throughput over vLLM's, smallest and largest over its models and traces."""
COMPUTE_BOUND = ("llama-3-70b", "azure-conv")
"""The cell of Lamina's evaluation where two H100 do the dense layers of 800 sequences: no faster than four."""
BATCH_GAIN = 2.39
OVERLAP_GAINS = {"llama-65b": 0.132, "llama-3-70b": 0.035}
"""Figure 14: how much shorter a token's time is at most with overlap, at a context of 4096."""
STEP3_COSTS = {
    "h800": (0.181, 0.716, 0.014),
    "h20-step3": (0.069, 0.248, 0.038),
    "a800": (0.120, 0.455, 0.034),
    "ascend-910b": (0.133, 0.508, 0.033),
}
"""Step-3's table 6: dollars per million tokens of Qwen3-32B; attention at 8K, at 32K, and FFN."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number as it was published and as it is here. `origin`: "printed" in the paper, "derived" from what is, or
    "reported" by others about a paper."""

    what: str
    published: float
    ours: float
    unit: str
    note: str = ""
    origin: str = "printed"

    @property
    def difference(self) -> float:
        return self.ours / self.published - 1


def table(rows: Iterable[Row], notes: bool = False) -> Iterator[str]:
    """The rows in lines of up to 100 columns; with `notes`, what each had to assume below it."""
    yield f"{'what':58} {'there':>10} {'here':>10} {'differs':>8}  origin"
    for row in rows:
        first, *more = textwrap.wrap(f"{row.what}, {row.unit}", 58)
        yield f"{first:58} {row.published:10.5g} {row.ours:10.5g} {row.difference:8.1%}  {row.origin}"
        yield from (f"  {line}" for line in more)
        if notes and row.note:
            yield from textwrap.wrap(row.note, 92, initial_indent="    ", subsequent_indent="    ")


def equal_cost(name: str, catalogue: Catalogue, reached: Efficiency = ROOFLINE) -> tuple[Offloaded, Colocated]:
    """The two systems of about equal cost that Lamina compares for a model: two lanes over FHBN, and vLLM with tensor
    parallelism. The devices of both reach the same."""
    a, b, parallel = next((a, b, parallel) for known, a, b, parallel in EQUAL_COST if known == name)
    shape, (h100, h20) = model(name), (replace(catalogue.device(each), efficiency=reached) for each in ("h100", "h20"))
    offloaded = Offloaded(
        model=shape,
        model_device=h100,
        model_count=a,
        attention_device=h20,
        attention_count=b,
        link=catalogue.link("fhbn-400g"),
        lanes=2,
    )
    return offloaded, Colocated(model=shape, device=h100, tensor_parallel=parallel)


def lamina_rows(catalogue: Catalogue) -> list[Row]:
    """Everything of Lamina's paper that follows from shapes and prices alone."""
    llama, h100, h20 = model("llama-3-70b"), catalogue.device("h100"), catalogue.device("h20")
    published = {"llama-33b": (1_597_440, 20.32, 22.12), "llama-65b": (2_621_440, 40.64, 44.24)}
    published["llama-3-70b"] = 327_680, 40.64, 44.24
    rows = []
    for name, (kv, ours, theirs) in published.items():
        offloaded, colocated = equal_cost(name, catalogue)
        rows += [
            Row(f"{name}: KV of a token", kv, model(name).kv_bytes_per_token(), "bytes", "table 3", "derived"),
            Row(f"{name}: price of {offloaded.name}", ours, price(offloaded), "$/h", "table 5"),
            Row(f"{name}: price of {colocated.name}", theirs, price(colocated), "$/h", "table 5"),
        ]
    rows.append(
        Row(
            "llama-3-70b: bytes that cross in a step of 300",
            884.7e6,
            300 * llama.exchange_bytes(),
            "bytes",
            "(2 + 2/G) e d B L",
            "derived",
        )
    )
    room = h100.memory / (8192 * llama.kv_bytes_per_token())
    rows.append(Row("llama-3-70b: requests of 8192 tokens in an H100's 80 GB", 30, room, "requests", "section 2"))
    for a, b, needs in ((1, 1, (66, 31, 18)), (2, 4, (163, 96, 62))):
        for context, need in zip((1024, 4096, 8192), needs, strict=True):
            ours = required_bandwidth(llama, h100, a, h20, b, 300, context)
            what = f"llama-3-70b: bandwidth for 300 sequences of {context}, DOP({a}, {b})"
            rows.append(Row(what, need * 1e9, ours, "bytes/s", "the formula and table 1", "derived"))
    return rows


def required_bandwidth(
    shape: ModelShape, model_device: Device, a: int, attention_device: Device, b: int, batch: int, context: float
) -> float:
    """Lamina's minimum bandwidth, bytes a second between all model and all attention devices, at the bare roofline."""
    load = Load(batch, context)
    dense = dense_time(shape, replace(model_device, efficiency=ROOFLINE), 1, load) / a  # without all-reduces
    attention = attention_time(shape, replace(attention_device, efficiency=ROOFLINE), load, busiest=1 / b)
    return minimum_bandwidth(shape, batch, dense, attention)


def overlap_rows(catalogue: Catalogue, context: int = 4096) -> list[Row]:
    """How much shorter a step is when attention begins as q arrives, at the batch where that helps most."""
    rows = []
    for name, published in OVERLAP_GAINS.items():
        offloaded = replace(equal_cost(name, catalogue)[0], lanes=1)
        in_order = replace(offloaded, overlap=False)
        loads = [Load(batch, context) for batch in range(1, max(2, offloaded.kv_tokens // context + 1))]
        best = max(1 - offloaded.step(load).seconds / in_order.step(load).seconds for load in loads)
        rows.append(Row(f"{name}: shorter step by overlap, at most", published, best, "share", "figure 14"))
    return rows


def step3_rows(catalogue: Catalogue) -> list[Row]:
    """Step-3's dollars per million tokens of Qwen3-32B, 8-bit weights and KV, and the gain of splitting them."""
    rows, costs = [], {}
    for name, (short, long, ffn) in STEP3_COSTS.items():
        device = catalogue.device(name)
        costs[name] = [step3_attention(device, 8192), step3_attention(device, 32768), step3_ffn(device)]
        for what, published, ours in zip(
            ("attention at 8K", "attention at 32K", "FFN"), (short, long, ffn), costs[name], strict=True
        ):
            rows.append(Row(f"qwen3-32b on {name}: {what}", published, ours, "$/M tokens", "table 6"))
    for at, (context, gain) in enumerate((("8K", 2.35), ("32K", 2.79))):
        together = costs["h800"][at] + costs["h800"][2]
        ours = together / (costs["h20-step3"][at] + costs["h800"][2])
        what = f"qwen3-32b at {context}: h800 alone / h20 for attention"
        rows.append(Row(what, gain, ours, "times", "table 6", "derived"))
    return rows


def step3_attention(device: Device, context: int) -> float:
    """Dollars per million tokens: the larger of KV bytes and attention FLOPs, and the projections' FLOPs, each at what
    a byte or a FLOP costs when the device does nothing else (Step-3, section 4)."""
    shape = model("qwen3-32b")
    byte, flop = step3_units(device)
    core = max(shape.kv_bytes_read(context, 1.0) * byte, shape.attention_flops(context) * flop)
    projections = 2.0 * sum(group.layers * group.projections for group in shape.groups)
    return 1e6 * (core + projections * flop)


def step3_ffn(device: Device) -> float:
    shape = model("qwen3-32b")
    return 1e6 * 2 * sum(group.layers * group.mlp for group in shape.groups) * step3_units(device)[1]


def step3_units(device: Device) -> tuple[float, float]:
    """Dollars of one byte read and of one FLOP, 8-bit where the device has them (Step-3's table 5)."""
    second = device.price / 3600
    return second / device.bandwidth, second / (device.flops_8bit or device.flops)


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one trace, both systems full, at the bare roofline: decode alone, as Lamina's evaluation has it."""

    model: str
    trace: str
    left_out: int
    """Requests of which not two fit into the smaller system."""
    lamina: RunResult
    vllm: RunResult

    @property
    def gain(self) -> float:
        return self.lamina.saturated_tokens_per_second / self.vllm.saturated_tokens_per_second

    @property
    def batch_gain(self) -> float:
        return self.lamina.saturated_batch / self.vllm.saturated_batch


def evaluation(traces: Iterable[Trace], catalogue: Catalogue, progress: Progress | None = None) -> Iterator[Cell]:
    """Lamina's evaluation: each of its models on each trace."""
    traces = list(traces)
    for name, *_ in EQUAL_COST:
        for trace in traces:
            yield cell(name, trace, catalogue, progress)


def cell(name: str, trace: Trace, catalogue: Catalogue, progress: Progress | None = None) -> Cell:
    """Run the requests of a trace, all there from the start, through both systems. Their steady states are compared."""
    systems = equal_cost(name, catalogue)
    most = min(system.kv_tokens for system in systems) // 2
    fitting = tuple(arrival for arrival in trace.arrivals if arrival.prompt + arrival.output <= most)
    full = all_at_once(Trace(trace.name, fitting))
    runs = [simulate(system, full, prefill=False, prefix_cache=False, progress=progress) for system in systems]
    for run in runs:
        if not run.saturated_tokens:
            raise InvalidRequest(
                f"{len(fitting)} requests of {trace.name} do not fill {run.system}; allowed are traces of more requests"
            )
    return Cell(name, trace.name, len(trace.arrivals) - len(fitting), *runs)


def closed_gain(name: str, catalogue: Catalogue, context: float, reached: Efficiency = ROOFLINE) -> float:
    """The gain of a full Lamina over a full vLLM where every sequence has `context` tokens."""
    rates = []
    for system in equal_cost(name, catalogue, reached):
        batch = max(1.0, system.kv_tokens / context)
        rates.append(batch / system.step(Load(batch, context)).seconds)
    return rates[0] / rates[1]


def closed_gains(contexts: Iterable[float], catalogue: Catalogue) -> dict[str, list[float]]:
    """The gain of each model at each of these contexts, at the bare roofline and with each engine's numbers, which both
    systems reach."""
    contexts = list(contexts)
    return {
        name: [closed_gain(known, catalogue, context, reached) for known, *_ in EQUAL_COST for context in contexts]
        for name, reached in {"bare roofline": ROOFLINE, **catalogue.engines}.items()
    }


def compute_bound(name: str, trace: str) -> bool:
    return name == COMPUTE_BOUND[0] and trace.startswith(COMPUTE_BOUND[1])
