#!/usr/bin/env python3
"""Throughput of ways to serve on one trace; and the evaluation of Lamina's paper, beside the paper's figures.

usage: scripts/simulate_throughput.py [--model M] [--trace T] [--system S,S] [--hardware FILE] [--seed N] [--json]
                                      [--out DIR] ...
       scripts/simulate_throughput.py --published [--trace-dir FOLDER] [--count N] [--json]

The first is `lamina simulate`, with all its options (--help); without any, five systems serve 2,000 requests of
Azure's conversation trace. The second runs the three models of arXiv 2405.01814v2 on its traces, all requests there
from the start and decode alone, as the paper did, through its Lamina and vLLM systems of equal cost, at the bare
roofline; then by formula with each engine's numbers on both sides. --count takes so many requests of each trace (all:
10 minutes). Cells of KernelFlume and AFD-Ledger come first, with what had to be assumed for each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from simulate.peers import afd_rows, kernelflume_rows
from simulate.published import BATCH_GAIN, GAINS, Cell, closed_gains, compute_bound, evaluation, overlap_rows, table

from lamina.cli.main import app
from lamina.cli.terminal import ProgressBars
from lamina.errors import InvalidRequest
from lamina.simulator.costs.hardware import load
from lamina.simulator.reports.report import sentences
from lamina.simulator.traces.catalogue import FILES, file_of, trace
from lamina.simulator.traces.demand import mean_context


def record(cell: Cell) -> dict[str, object]:
    both = cell.lamina, cell.vllm
    return {
        "model": cell.model,
        "trace": cell.trace,
        "left_out": cell.left_out,
        "batch": [run.saturated_batch for run in both],
        "batch_gain": cell.batch_gain,
        "tokens_per_second": [run.saturated_tokens_per_second for run in both],
        "gain": cell.gain,
        "tbt_p50": [run.tbt.p50 for run in both],
    }


def head() -> list[str]:
    said = (
        "Lamina's evaluation (arXiv 2405.01814v2): three models, all requests there from the start, decode alone, no "
        f"SLO, both at the bare roofline. Published are gains of {GAINS[0]} to {GAINS[1]}, not by cell, and a mean "
        f"batch ratio of {BATCH_GAIN}."
    )
    names = ("model", "trace", "left out", "batch", "vLLM's", "ratio", "tokens/s", "gain")
    return [*sentences([said], 0), "", "{:11} {:26} {:>8} {:>8} {:>7} {:>6} {:>9} {:>6}".format(*names)]


def line(cell: Cell) -> str:
    note = "*" if compute_bound(cell.model, cell.trace) else ""
    return (
        f"{cell.model:11} {cell.trace:26} {cell.left_out:8} {cell.lamina.saturated_batch:8.1f} "
        f"{cell.vllm.saturated_batch:7.1f} {cell.batch_gain:6.2f} {cell.lamina.saturated_tokens_per_second:9.0f} "
        f"{cell.gain:6.2f}{note}"
    )


def tail(cells: list[Cell]) -> Iterator[str]:
    if any(compute_bound(cell.model, cell.trace) for cell in cells):
        yield "* bound by the FLOPs of two H100"
    mean = sum(cell.batch_gain for cell in cells) / len(cells)
    yield f"\nmean batch ratio {mean:.2f}; both systems with 0.9 of their memory"
    for row in overlap_rows(load()):
        yield f"{row.what}: {row.ours:.1%}, published {row.published:.1%}"


def main() -> None:
    if "--published" not in sys.argv[1:]:
        app(["simulate", *sys.argv[1:]], prog_name="scripts/simulate_throughput.py")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true")
    parser.add_argument(
        "--trace-dir", type=Path, default=None, help="where Mooncake's file is, without which it is left out"
    )
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    traces = [trace(name, args.count, args.seed, args.trace_dir) for name in FILES if file_of(name, args.trace_dir)]
    gains = closed_gains([mean_context(each.arrivals) for each in traces], load())
    peers = kernelflume_rows(load()) + afd_rows(load())
    if not args.json:
        print("KernelFlume (arXiv 2606.29207) and AFD-Ledger (arXiv 2608.04502), devices as peers.py says:")
        print(*table(peers, notes=True), "", sep="\n", flush=True)
        print(*head(), sep="\n", flush=True)
    cells = []
    with ProgressBars() as progress:
        for cell in evaluation(traces, load(), progress):
            cells.append(cell)
            if not args.json:
                progress.hide()
                print(line(cell), flush=True)
    if args.json:
        facts = {"gains": gains, "cells": [record(cell) for cell in cells], "peers": [asdict(row) for row in peers]}
        print(json.dumps(facts, indent=1))
    else:
        print(*tail(cells), "\ngains by formula, all batches full, the same numbers on both sides:", sep="\n")
        for name, values in gains.items():
            print(f"  {name}: {sum(values) / len(values):.2f} in the mean, {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    try:
        main()
    except InvalidRequest as error:
        raise SystemExit(f"error: {error}") from error
