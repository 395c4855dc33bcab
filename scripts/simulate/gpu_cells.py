"""Cells that others measured on GPUs, in a closed loop, and what the simulator says of each.

The cells are a public sample of ai-dynamo/aiconfigurator (Apache-2.0), TTFT and TPOT in milliseconds; they are no part
of this repository. What is known of how they were measured, and what had to be assumed:

- `c` users, each of whom asks again when answered. Lengths of prompts in powers of two: a run of about eight requests a
  user, the first of which come all at once (`FIRST`); in round decimal numbers: after a warm-up.
- SGLang's cells of Qwen3-32B: all users in step, whose outputs are all of one length.
- FP8 checkpoints with vLLM and TensorRT-LLM keep KV in 8 bits but for latents: cells are there that 16 bits have no
  room for. SGLang's, and all of 16 bits, keep it in 16.
- TensorRT-LLM's cells of Llama-3.1-8B: one user fewer than there are is served at a time. Their TTFT is larger than the
  others' by the length of an answer over so many, whatever the model's parallelism.
- "64" devices of DeepSeek are one machine of eight: 8 by tensor and expert parallelism. The same numbers are listed as
  of 8 devices.
- A batch has 8192 tokens, as these engines have on such GPUs.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from simulate.closed_loop import closed_loop

from lamina.simulator.costs.hardware import Catalogue, Efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated
from lamina.simulator.costs.uncertainty import sparse

FIRST = 0.14
"""The share of users' first requests in a run without a warm-up."""
BATCH_TOKENS = 8192
FITTED = 13
"""Numbers of an engine's efficiency that are fitted to its cells."""
MODELS = {
    "Llama-3.1-70B": "llama-3.1-70b",
    "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "DeepSeek-V3": "deepseek-v3",
    "DeepSeek-R1": "deepseek-v3",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: `ttft` and `tpot` are means in seconds. `number`: its row in the file, from 0."""

    number: int
    model: str
    device: str
    engine: str
    fp8: bool
    devices: int
    prompt: int
    output: int
    users: int
    ttft: float
    tpot: float

    @property
    def dense(self) -> bool:
        """Without experts or latents."""
        return not sparse(model(self.model))

    @property
    def held_out(self) -> bool:
        """Every other cell: nothing was fitted to it."""
        return self.number % 2 == 1


@dataclass(frozen=True, slots=True)
class Predicted:
    """Seconds."""

    cell: Cell
    ttft: float
    tpot: float

    def ratio(self, what: str) -> float:
        """Predicted over measured, of "ttft" or "tpot"."""
        return float(getattr(self, what) / getattr(self.cell, what))


def read(path: Path) -> list[Cell]:
    """The cells of a file."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [
            Cell(
                number,
                MODELS[row["model"].split("/")[-1]],
                row["system"].split("_")[0],
                row["backend"],
                row["fp8"] == "True",
                min(8, int(row["tp"])),
                int(row["isl"]),
                int(row["osl"]),
                int(row["c"]),
                float(row["ttft"]) / 1e3,
                float(row["tpot"]) / 1e3,
            )
            for number, row in enumerate(csv.DictReader(lines))
        ]


def system(cell: Cell, catalogue: Catalogue, efficiency: Efficiency) -> Colocated:
    """What was measured, as the simulator has it."""
    shape = model(cell.model)
    if cell.fp8:
        shape = replace(shape, element=1.0)
    kv = 1.0 if cell.fp8 and cell.engine != "sglang" and cell.model != "deepseek-v3" else 2.0
    return Colocated(
        model=shape,
        device=replace(catalogue.device(cell.device), efficiency=efficiency),
        tensor_parallel=cell.devices,
        batch_tokens=BATCH_TOKENS,
        kv_element=kv,
        max_sequences=cell.users - 1 if cell.engine == "trtllm" and cell.model == "llama-3.1-8b" else 4096,
    )


def predict(cell: Cell, catalogue: Catalogue, efficiency: Efficiency | None = None) -> Predicted:
    """By the efficiency of the cell's engine unless another is given."""
    whole = system(cell, catalogue, efficiency or catalogue.engines[cell.engine])
    in_step = cell.engine == "sglang" and cell.model == "qwen3-32b"
    found = closed_loop(
        whole,
        cell.users,
        cell.prompt,
        cell.output,
        rounds=3,
        variation=0.0 if in_step else 0.1,
        prefill_first=cell.engine == "sglang",
    )
    warm = cell.prompt % 1000 == 0
    return Predicted(cell, found.mean_ttft(0.0 if warm else FIRST), found.tpot)


def error(found: Iterable[Predicted], what: str) -> float:
    """The mean absolute error of these cells, as a share of what was measured."""
    return fmean(abs(each.ratio(what) - 1) for each in found)


def middle(found: Iterable[Predicted], what: str) -> float:
    """The median of predicted over measured."""
    return median(each.ratio(what) for each in found)


def grouped(found: Sequence[Predicted], key: Callable[[Cell], str]) -> dict[str, list[Predicted]]:
    """The cells by what `key` says of each, in the order of their names."""
    groups: dict[str, list[Predicted]] = {}
    for each in found:
        groups.setdefault(key(each.cell), []).append(each)
    return dict(sorted(groups.items()))


def tokens_per_second(cell: Cell, ttft: float, tpot: float) -> float:
    """Of all users together: each has one request under way at any time."""
    return cell.users * cell.output / (ttft + (cell.output - 1) * tpot)


def factors(found: Sequence[Predicted], what: str) -> tuple[float, float]:
    """Measured over predicted without the 3 % of cells at either end, so that 90 % of others lie between: widened by
    sqrt(1 + p / n) in logarithms, since p numbers were fitted to these n cells. `what` is "tpot", "ttft" or
    "goodput"."""
    ratios = sorted(1 / _ratio(each, what) for each in found)
    beyond = int(0.03 * len(ratios))
    wider = math.sqrt(1 + FITTED / len(ratios))
    return min(1.0, ratios[beyond]) ** wider, max(1.0, ratios[-1 - beyond]) ** wider


def _ratio(found: Predicted, what: str) -> float:
    if what != "goodput":
        return found.ratio(what)
    cell = found.cell
    return tokens_per_second(cell, found.ttft, found.tpot) / tokens_per_second(cell, cell.ttft, cell.tpot)


def holds(found: Sequence[Predicted], what: str, within: tuple[float, float]) -> float:
    """The share of cells whose measured number lies between these factors times the predicted one."""
    low, high = within
    return fmean(low <= 1 / _ratio(each, what) <= high for each in found)
