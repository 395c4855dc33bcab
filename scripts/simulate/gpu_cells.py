"""Cells that others measured on GPUs, in a closed loop, and what the simulator says of each.

The cells are a public sample of ai-dynamo/aiconfigurator (Apache-2.0), TTFT and TPOT in milliseconds; they are no part
of this repository. What is known of how they were measured, and what had to be assumed:

- `c` users, each of whom asks again when answered; their first requests, a share of all (`first_share`), come at once.
- Each campaign has its own client and front end, whose time before a first token is beside the engine's (`CLIENTS`).
- SGLang's cells of Qwen3-32B: all users in step, whose outputs are all of one length.
- FP8 checkpoints with vLLM and TensorRT-LLM keep KV in 8 bits: cells are there that 16 bits have no room for. SGLang's,
  and all of 16 bits, keep it in 16.
- TensorRT-LLM's cells of Llama-3.1-8B: one user fewer than there are is served at a time. Their TTFT is larger than the
  others' by the length of an answer over so many, whatever the model's parallelism.
- "64" devices of DeepSeek are one machine of eight: 8 by tensor and expert parallelism. The same numbers are listed as
  of 8 devices.
- A batch has 8192 tokens, as these engines have on such GPUs.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from simulate.closed_loop import closed_loop

from lamina.errors import InvalidRequest
from lamina.simulator.costs.hardware import Catalogue, Efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated

CELLS = (
    Path(os.environ.get("LAMINA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "measured/gpu_cells.csv"
)
CLIENTS = {
    ("vllm", "llama-3.1-70b"): 0.025, ("vllm", "llama-3.1-8b"): 0.025, ("vllm", "qwen3-32b"): 0.036,
    ("vllm", "qwen3-235b-a22b"): 0.06, ("sglang", "llama-3.1-8b"): 0.099, ("sglang", "qwen3-32b"): 0.109,
    ("sglang", "qwen3-235b-a22b"): 0.244, ("sglang", "deepseek-v3"): 0.181, ("trtllm", "llama-3.1-70b"): 0.026,
    ("trtllm", "llama-3.1-8b"): 0.03, ("trtllm", "qwen3-32b"): 0.097, ("trtllm", "qwen3-235b-a22b"): 0.144,
    ("trtllm", "deepseek-v3"): 0.263,
}  # fmt: skip
"""Seconds before a first token of an engine's cells of a model, instead of its `first_token_overhead`: least relative
errors of TTFT over the fitted half (`scripts/simulate_cells.py --clients`)."""
BATCH_TOKENS = 8192
KINDS = ("small", "dense", "sparse")
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
    def kind(self) -> str:
        """As `ModelShape.kind` has it."""
        return model(self.model).kind

    @property
    def held_out(self) -> bool:
        """Every other cell: nothing was fitted to it."""
        return self.number % 2 == 1

    @property
    def tokens_per_second(self) -> float:
        """As measured, of all users."""
        return tokens_per_second(self, self.ttft, self.tpot)

    @property
    def campaign(self) -> tuple[str, str]:
        """The cells that were measured alike: an engine's of a model."""
        return self.engine, self.model

    @property
    def first_share(self) -> float:
        """The share of users' first requests: one in seven, but in round decimal numbers those of vLLM and TensorRT-LLM
        follow a warm-up, and TensorRT-LLM's of Llama-3.1-70B are longer runs."""
        if self.campaign == ("trtllm", "llama-3.1-70b"):
            return 0.07
        return 0.0 if self.prompt % 1000 == 0 and self.engine != "sglang" else 0.14


@dataclass(frozen=True, slots=True)
class Predicted:
    """Seconds."""

    cell: Cell
    ttft: float
    tpot: float

    def ratio(self, what: str) -> float:
        """Predicted over measured, of "ttft", "tpot" or "goodput": tokens a second of all users."""
        if what == "goodput":
            return tokens_per_second(self.cell, self.ttft, self.tpot) / self.cell.tokens_per_second
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
    kv = 1.0 if cell.fp8 and cell.engine != "sglang" else 2.0
    return Colocated(
        model=shape,
        device=replace(catalogue.device(cell.device), efficiency=efficiency),
        tensor_parallel=cell.devices,
        batch_tokens=BATCH_TOKENS,
        kv_element=kv,
        max_sequences=cell.users - 1 if cell.engine == "trtllm" and cell.model == "llama-3.1-8b" else 4096,
    )


def predict(cell: Cell, catalogue: Catalogue, efficiency: Efficiency | None = None) -> Predicted:
    """By the efficiency of the cell's engine, with what is known of its campaign's client; or by one that is given."""
    if efficiency is None:
        engine = catalogue.engines[cell.engine]
        efficiency = replace(engine, first_token_overhead=CLIENTS[cell.campaign])
    whole = system(cell, catalogue, efficiency)
    in_step = cell.campaign == ("sglang", "qwen3-32b")
    result = closed_loop(
        whole,
        cell.users,
        cell.prompt,
        cell.output,
        rounds=3,
        variation=0.0 if in_step else 0.1,
        prefill_first=cell.engine == "sglang",
    )
    return Predicted(cell, result.mean_ttft(cell.first_share), result.tpot)


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


def clients(cells: Iterable[Cell], catalogue: Catalogue) -> dict[tuple[str, str], float]:
    """`CLIENTS` anew, of these cells."""
    rest: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in cells:
        alone = predict(cell, catalogue, replace(catalogue.engines[cell.engine], first_token_overhead=0.0))
        rest.setdefault(cell.campaign, []).append((cell.ttft - alone.ttft, 1 / cell.ttft))
    return {campaign: max(0.0, weighted_quantile(values, 0.5)) for campaign, values in rest.items()}


def weighted_quantile(values: Iterable[tuple[float, float]], share: float) -> float:
    """Of (value, weight): the value up to which this share of the weight is."""
    ordered = sorted(values)
    wanted = share * sum(weight for _, weight in ordered) - 1e-9
    for value, weight in ordered:
        wanted -= weight
        if wanted <= 0:
            return value
    raise InvalidRequest(f"a quantile of {len(ordered)} values was asked for; allowed are 1 or more")
