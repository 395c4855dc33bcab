#!/usr/bin/env python3
"""Decode steps as the cost model predicts them from a calibration of this machine, beside steps that were measured.

usage: scripts/simulate/check.py [--calibration this-machine.toml] [--model smollm2-135m] [--rounds 3]
                                  [--json] [--out DIR] [WORKERS:BATCHxCONTEXT ...]

Without --calibration this machine is calibrated first, as `lamina calibrate-hardware` does; nothing is fitted here.
A cell is a decode step of BATCH sequences of CONTEXT tokens, in one process (0:4x64) or with attention workers on this
machine, over the local channel and in one lane (2:4x64). All engines share this machine's cores, so for the cost model
the attention workers share one device with the dense layers, and nothing overlaps.

Engines run in processes of their own, one at a time; all cells are measured once a round, and a step is the median
over the rounds of the median gap between two tokens, while all sequences decode. Beside each cell stand the read
bandwidth right before and after it, and what other processes took of the cores before it: a machine that is busy or in
another state than when it was calibrated is not the one that was predicted. The cells that the calibration is fitted to
are measured too, and count for nothing. --out writes check.json and check.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from lamina.errors import LaminaError
from lamina.measure.hardware import calibrate
from lamina.measure.hardware.busy import busy
from lamina.measure.hardware.child import Child
from lamina.measure.hardware.decode_steps import TOKENS
from lamina.measure.hardware.hardware_calibration import BYTES, FITTED, NAME
from lamina.models.resolve import resolve
from lamina.simulator.costs import hardware
from lamina.simulator.costs.cost_model import Load, StepCost
from lamina.simulator.costs.hardware import Catalogue
from lamina.simulator.costs.model_configs import from_folder
from lamina.simulator.costs.shapes import ModelShape
from lamina.simulator.costs.systems import Colocated, Offloaded
from lamina.system.machine import native_dtype, this_machine

CELLS = (
    "0:4x64", "0:1x1024", "0:8x512", "0:16x1024", "0:4x2048", "0:1x7000",
    "1:2x1024", "1:16x256", "1:4x2048",
    "2:1x512", "2:8x512", "2:2x4096",
)  # fmt: skip
LINK = "local-channel"
EACH, MEAN = 0.15, 0.08  # what a prediction may be off
READ = 1 << 28  # bytes of a reading of the bandwidth


@dataclass(frozen=True)
class Cell:
    """`workers`: attention workers, 0 for one process. `counts`: whether the calibration is not fitted to it."""

    workers: int
    batch: int
    context: int
    counts: bool = True

    @classmethod
    def parse(cls, words: str) -> Cell:
        workers, _, shape = words.partition(":")
        batch, _, context = shape.partition("x")
        cell = cls(int(workers), int(batch), int(context))
        return replace(cell, counts=cell.workers > 0 or (cell.batch, cell.context) not in FITTED)

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"

    @property
    def where(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)}" if self.workers else "in process"


@dataclass(frozen=True)
class Row:
    """One cell: milliseconds a step, and what the prediction is made of. `context`: tokens that each sequence read, in
    the mean; `low` and `high`: of the medians of the rounds."""

    workers: int
    batch: int
    context: float
    counts: bool
    measured: float
    low: float
    high: float
    predicted: float
    dense: float
    attention: float
    exchange: float
    bandwidth: tuple[float, float]
    busy: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def predict(cell: Cell, context: float, model: ModelShape, known: Catalogue) -> StepCost:
    """A decode step of that cell, from the calibration alone."""
    device = known.device(NAME)
    system: Colocated | Offloaded
    if cell.workers:
        system = Offloaded(
            model=model,
            model_device=device,
            attention_device=device,
            link=known.link(LINK),
            overlap=False,
            workers=cell.workers,
            kv_element=model.element,
        )
    else:
        system = Colocated(model=model, device=device, kv_element=model.element)
    return system.step(Load(cell.batch, context))


def measure(cells: Iterable[Cell], model: str, rounds: int) -> dict[Cell, list[dict[str, Any]]]:
    """For each cell what each round gave, with the machine's state around it. One engine is up at a time."""
    found: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
    with Child("reading", {"size": READ}) as reading:
        for number in range(rounds):
            for workers in sorted({cell.workers for cell in found}):
                many: dict[str, Any] = {}
                if workers:
                    many = {"attention_workers": workers, "local_share": 0, "lanes": 1, "query_first": "never"}
                kept = {"device": "cpu", "weights": native_dtype(this_machine())[0]}
                with Child("engine", {"model": model, **kept, **many}) as engine:
                    engine.ask("step", batch=1, context=16, tokens=16)  # warms up
                    for cell in found:
                        if cell.workers != workers:
                            continue
                        say(f"round {number + 1} of {rounds}: {cell} {cell.where}")
                        used, before = busy(), reading.ask("read")
                        shape = {"batch": cell.batch, "context": cell.context, "tokens": TOKENS}
                        run = engine.ask("step", **shape, seed=number)
                        found[cell].append({**run, "bandwidth": (before, reading.ask("read")), "busy": used})
    return found


def row(cell: Cell, runs: list[dict[str, Any]], model: ModelShape, known: Catalogue) -> Row:
    context = statistics.fmean(run["context"] for run in runs)
    cost = predict(cell, context, model, known)
    steps = [run["seconds"] * 1e3 for run in runs]
    rates = [rate / 1e9 for run in runs for rate in run["bandwidth"]]
    return Row(
        workers=cell.workers,
        batch=cell.batch,
        context=context,
        counts=cell.counts,
        measured=statistics.median(steps),
        low=min(steps),
        high=max(steps),
        predicted=cost.seconds * 1e3,
        dense=cost.model * 1e3,
        attention=cost.attention * 1e3,
        exchange=max(0.0, cost.seconds - cost.model - cost.attention) * 1e3,
        bandwidth=(min(rates), max(rates)),
        busy=max(run["busy"] for run in runs),
    )


def show(rows: dict[Cell, Row], rate: float) -> None:
    print(f"calibrated at {rate / 1e9:.1f} GB/s; ms a decode step")
    print(
        f"{'where':>10} {'cell':>8} {'measured':>9} {'of rounds':>13} {'predicted':>9} {'error':>7}   "
        f"{'dense':>6} {'attention':>9} {'exchange':>8} {'GB/s':>11} {'others':>6}"
    )
    for cell, r in rows.items():
        error = f"{r.error:+7.1%}" if r.counts else " fitted"
        print(
            f"{cell.where:>10} {cell!s:>8} {r.measured:9.2f} {r.low:6.2f}-{r.high:6.2f} {r.predicted:9.2f} {error}   "
            f"{r.dense:6.2f} {r.attention:9.2f} {r.exchange:8.2f} {r.bandwidth[0]:5.1f}-{r.bandwidth[1]:5.1f} "
            f"{r.busy:6.0%}"
        )


def verdict(rows: Iterable[Row]) -> dict[str, Any]:
    """What was asked, and what it is."""
    errors = [abs(r.error) for r in rows if r.counts]
    mean, worst = statistics.fmean(errors), max(errors)
    return {"cells": len(errors), "mean": mean, "worst": worst, "met": worst <= EACH and mean <= MEAN}


def draw(rows: dict[Cell, Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    values = [value for r in rows.values() for value in (r.measured, r.predicted)]
    ends = [min(values) * 0.85, max(values) * 1.18]
    axes.fill_between(ends, [(1 - EACH) * x for x in ends], [(1 + EACH) * x for x in ends], alpha=0.15, lw=0)
    axes.plot(ends, ends, lw=0.8, color="grey")
    for workers in sorted({cell.workers for cell in rows}):
        own = {cell: r for cell, r in rows.items() if cell.workers == workers}
        marker, label = "osD^v"[workers % 5], next(iter(own)).where
        axes.scatter(
            [r.measured for r in own.values()], [r.predicted for r in own.values()], marker=marker, label=label
        )
        for cell, r in own.items():
            name = f"{cell}" if r.counts else f"{cell} (fitted)"
            axes.annotate(name, (r.measured, r.predicted), textcoords="offset points", xytext=(5, -9), fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, ms", ylabel="predicted, ms")
    axes.set_title(f"Decode steps, with ±{EACH:.0%}")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def say(text: str) -> None:
    """On one line that the next one covers."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="WORKERS:BATCHxCONTEXT", help=f"default: {' '.join(CELLS)}")
    parser.add_argument("--calibration", type=Path, help="what `lamina calibrate-hardware` wrote")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="a folder for check.json, check.png and the calibration, if made here")
    args = parser.parse_args()
    folder = resolve(args.model)
    if args.calibration is None:
        made = calibrate(
            args.model, lambda what, done, total: say(f"{what} {done} of {total}"), date=date.today().isoformat()
        )
        say("")
        for remark in made.remarks:
            print(f"beware: {remark}", file=sys.stderr)
        known = hardware.loads(made.dumps())
    else:
        made, known = None, hardware.load(args.calibration)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        if made is not None:
            (args.out / "this-machine.toml").write_text(made.dumps())
    model = replace(from_folder(folder), element=BYTES[native_dtype(this_machine())[0]])
    fitted = [f"0:{batch}x{context}" for batch, context in FITTED]
    cells = [Cell.parse(words) for words in (*fitted, *(args.cells or CELLS))]
    found = measure(dict.fromkeys(cells), str(folder), args.rounds)
    say("")
    rows = {cell: row(cell, runs, model, known) for cell, runs in found.items()}
    said = verdict(rows.values())
    table = {"calibration": known.device(NAME).sources, **said, "rows": [asdict(r) for r in rows.values()]}
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        show(rows, known.device(NAME).bandwidth)
        print(
            f"{said['cells']} cells, besides the fitted {' and '.join(map(str, cells[: len(FITTED)]))}: "
            f"{said['mean']:.1%} off on average (asked {MEAN:.0%}), at most {said['worst']:.1%} (asked {EACH:.0%}): "
            f"{'met' if said['met'] else 'missed'}"
        )
    if args.out is not None:
        (args.out / "check.json").write_text(json.dumps(table, indent=1) + "\n")
        draw(rows, args.out / "check.png")


if __name__ == "__main__":
    try:
        main()
    except LaminaError as error:
        raise SystemExit(f"error: {error}") from error
