"""Decode steps of an engine in this process: how long, how many tokens and bytes a second, beside what memory gives.

`decode_steps` measures a step, `simulator.costs.models` gives the bytes that it must read. The rate at which memory can
be read is measured in the same run, by another process that is idle while the engine computes, and between all its
measurements.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lamina.config import EngineConfig
from lamina.measure.hardware.decode_steps import Measured, measure_in_turn
from lamina.models.weight_memory import WeightMemory, weight_memory
from lamina.simulator.costs.model_configs import from_folder
from lamina.simulator.costs.packing import Packing
from lamina.simulator.costs.shapes import ModelShape
from lamina.system.machine import Machine, native_dtype, this_machine
from lamina.system.progress import Progress

if TYPE_CHECKING:
    from lamina.llm import LLM

SCHEMA = "lamina.bench.decode"
VERSION = 1
READ = 1 << 29
"""Bytes that the reading process goes through."""
_ELEMENT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "float8_e4m3fn": 1.0}

Read = Callable[[], float]
"""Bytes of memory that this machine reads in a second, now."""


@dataclass(frozen=True, slots=True)
class Row:
    """`batch` sequences after prompts of `context` tokens. `step_ms` and `p99_ms` are milliseconds a decode step,
    medians over the rounds; `step_bytes` is what a step reads, `roofline_ms` how long reading that takes at best.
    `tokens_per_step`: of a sequence, above 1 where drafts were accepted. What a draft model reads is not counted."""

    batch: int
    context: int
    step_ms: float
    p99_ms: float
    tokens_per_second: float
    step_bytes: float
    bytes_per_second: float
    memory_bytes_per_second: float
    prefill_tokens_per_second: float
    tokens_per_step: float = 1.0

    @property
    def roofline_ms(self) -> float:
        return self.step_bytes / self.memory_bytes_per_second * 1e3

    @property
    def of_roofline(self) -> float:
        """The share of the reading rate that the step reaches; above 1 where caches keep some of what it reads."""
        return self.bytes_per_second / self.memory_bytes_per_second


@dataclass(frozen=True, slots=True)
class Result:
    """All rows of a run, and what ran: `options` are those given to `LLM`, `dtype` and `kv_dtype` what they mean.
    `weight_bytes`: of a matrix's weight in the mean, where they are packed; 0: they are of `dtype`."""

    model: str
    options: Mapping[str, Any]
    dtype: str
    kv_dtype: str
    steps: int
    rounds: int
    rows: tuple[Row, ...]
    weight_bytes: float = 0.0


def bench(
    model: str,
    options: Mapping[str, Any],
    cells: Sequence[tuple[int, int]],
    *,
    steps: int = 48,
    rounds: int = 3,
    progress: Progress | None = None,
    read: Read | None = None,
) -> Result:
    """Load a model and measure each (batch, context) in turn, `rounds` times. `read`: None measures here.

    Prompts are random tokens, and there is no prefix cache. Raises what `LLM` and `measure` raise.
    """
    from lamina.llm import LLM  # which loads torch

    config = EngineConfig(**options)
    dtype, kv_dtype = dtypes(config, this_machine())
    with contextlib.ExitStack() as stack:
        reading = read or stack.enter_context(_reading(config.device))
        llm = stack.enter_context(LLM(model, progress=progress, **{**options, "prefix_cache": False}))
        shape = kept_as(from_folder(llm.model_path), weight_memory(llm.model_path), config)
        measured: dict[tuple[int, int], list[tuple[Measured, float]]] = {}
        drafts = config.speculate is not None
        for cell, run in measure_in_turn(llm, cells, steps, rounds, progress, drafts):
            measured.setdefault(cell, []).append((run, reading()))
        kv_shares = {
            context: _kept(llm, context) if config.policy not in (None, "full") else 1.0 for _, context in cells
        }
    weight, element = _ELEMENT[dtype], _ELEMENT[kv_dtype]
    rows = tuple(
        row(context, runs, step_bytes(shape, runs[0][0], weight, element, kv_shares[context]))
        for (_, context), runs in measured.items()
    )
    packed = shape.packing.nbytes if shape.packing is not None else 0.0
    return Result(model, dict(options), dtype, kv_dtype, steps, rounds, rows, packed)


def kept_as(shape: ModelShape, memory: WeightMemory, config: EngineConfig) -> ModelShape:
    """The shape with the mean bytes of its matrices' weights, where the engine keeps them packed."""
    way = config.quantize or ("packed" if config.weights in ("auto", "packed") else "")
    if way not in memory.ways or _on_gpu(config.device):
        return shape
    floats = 2 * (shape.parameters - shape.packable)
    return replace(shape, packing=Packing(way, (memory.ways[way] - floats) / shape.packable))


def step_bytes(shape: ModelShape, run: Measured, weight: float, element: float, kept: float = 1.0) -> float:
    """What one step reads: all weights but the input table, and the share `kept` of each sequence's KV. `weight` and
    `element` are bytes of a weight that is not packed and of an element of the KV."""
    weights = replace(shape, element=weight).weights_read(run.batch * run.tokens)
    return weights + run.batch * shape.kv_bytes_read(run.context, element) * kept


def row(context: int, runs: Sequence[tuple[Measured, float]], nbytes: float) -> Row:
    """The medians of several measurements of a cell, each with the reading rate beside it."""
    first = runs[0][0]
    step = statistics.median(run.seconds for run, _ in runs)
    tokens = statistics.median(run.tokens for run, _ in runs)
    return Row(
        batch=first.batch,
        context=context,
        step_ms=step * 1e3,
        p99_ms=statistics.median(run.p99 for run, _ in runs) * 1e3,
        tokens_per_second=first.batch * tokens / step,
        step_bytes=nbytes,
        bytes_per_second=nbytes / step,
        memory_bytes_per_second=statistics.median(rate for _, rate in runs),
        prefill_tokens_per_second=first.batch * context / statistics.median(run.first for run, _ in runs),
        tokens_per_step=tokens,
    )


def dtypes(config: EngineConfig, machine: Machine) -> tuple[str, str]:
    """Of weights and of the KV, with "auto" resolved as the engine does."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if _on_gpu(config.device) else native_dtype(machine)[0]
    return dtype, dtype if config.kv_dtype == "auto" else config.kv_dtype


def table(found: Result) -> str:
    """One line a cell, under a heading."""
    memory = statistics.median(cell_row.memory_bytes_per_second for cell_row in found.rows)
    heading = ("batch", "context", "tok/s", "ms/step", "p99", "MB/step", "GB/s", "of memory", "prefill tok/s")
    lines: list[tuple[str, ...]] = [heading]
    lines += [
        (
            str(cell_row.batch),
            str(cell_row.context),
            f"{cell_row.tokens_per_second:.1f}",
            f"{cell_row.step_ms:.2f}",
            f"{cell_row.p99_ms:.2f}",
            f"{cell_row.step_bytes / 1e6:.0f}",
            f"{cell_row.bytes_per_second / 1e9:.1f}",
            f"{cell_row.of_roofline:.0%}",
            f"{cell_row.prefill_tokens_per_second:.0f}",
        )
        for cell_row in found.rows
    ]
    if any(cell_row.tokens_per_step > 1 for cell_row in found.rows):
        tokens = ["tok/step", *(f"{cell_row.tokens_per_step:.2f}" for cell_row in found.rows)]
        lines = [(*line, more) for line, more in zip(lines, tokens, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    packed = f", weights packed in {found.weight_bytes:.3g} bytes each" if found.weight_bytes else ""
    about = f"{found.model} in {found.dtype}{packed}, KV in {found.kv_dtype}; memory gives {memory / 1e9:.1f} GB/s"
    return "\n".join([about, *aligned]) + "\n"


def record(found: Result) -> dict[str, Any]:
    """The result as JSON has it."""
    return {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "model": found.model,
        "options": {
            name: value if isinstance(value, (int, float)) else str(value) for name, value in found.options.items()
        },
        "dtype": found.dtype,
        "kv_dtype": found.kv_dtype,
        "weight_bytes": found.weight_bytes,
        "steps": found.steps,
        "rounds": found.rounds,
        "rows": [
            {**asdict(cell), "roofline_ms": cell.roofline_ms, "of_roofline": cell.of_roofline} for cell in found.rows
        ],
    }


def _kept(llm: LLM, context: int) -> float:
    """The share of the KV that a policy lets a step read, by the engine's own count. Of a prompt that repeats itself:
    what is read depends on lengths, hardly on words."""
    done = llm.generate([[7] * context], max_tokens=8, ignore_eos=True, temperature=0)
    stats: Mapping[str, float] = (done[0] if isinstance(done, list) else done).stats
    return stats.get("kv_read", 1.0)


@contextlib.contextmanager
def _reading(device: str | Sequence[str]) -> Iterator[Read]:
    if _on_gpu(device):
        import torch

        from lamina.measure.hardware.reading import Bandwidth

        yield Bandwidth(1 << 30, torch.device("cuda"), 1).settled
        return
    from lamina.measure.hardware.child import Child

    with Child("reading", {"size": READ}) as child:

        def read() -> float:
            return float(child.ask("read"))

        yield read


def _on_gpu(device: str | Sequence[str]) -> bool:
    name = device if isinstance(device, str) else device[0]
    if name != "auto":
        return name.startswith("cuda")
    import torch

    return torch.cuda.is_available()
