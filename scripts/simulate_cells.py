#!/usr/bin/env python3
"""Cells measured on H100 and H200 beside what the simulator says of each engine's.

usage: scripts/simulate_cells.py [--cells FILE] [--by model|devices] [--fit ENGINE] [--clients]

First the efficiencies of each engine, which were fitted to every other cell; then, for the cells that they were fitted
to and for those held out, the median of predicted over measured and the mean absolute error. --fit fits an engine's
anew (minutes), --clients what its clients take (`CLIENTS` of simulate/gpu_cells.py). scripts/simulate_engines.py says
how far engines are apart. FILE is measured/gpu_cells.csv of LAMINA_TEST_DATA, or of ../shared/data; the cells are not
part of this repository.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from simulate import gpu_cells
from simulate.gpu_cells import CELLS, KINDS, Cell, Predicted, clients, error, grouped, middle, predict

from lamina.simulator.costs.hardware import Catalogue, Efficiency, load


def print_efficiencies(catalogue: Catalogue) -> None:
    names = [name for name in Efficiency.__dataclass_fields__ if name != "sources"]
    for name in names:
        values = [getattr(each, name) for each in catalogue.engines.values()]
        if any(value != getattr(Efficiency(), name) for value in values):
            shown = (f"{value[0][1] if isinstance(value, tuple) else value:>10.2g}" for value in values)
            print(f"{name:22}", *shown)


def row(name: str, found: Sequence[Predicted]) -> str:
    shown = f"{name:34} {len(found):5}"
    for what in ("tpot", "ttft"):
        shown += f"  {middle(found, what):6.2f} {error(found, what):5.1%}"
    return shown


def kind(cell: Cell) -> str:
    return f"{cell.engine}, {cell.kind}"


def fit(cells: Sequence[Cell], catalogue: Catalogue) -> Efficiency:
    """Least squares of log(predicted / measured) with an outlier's weight bounded (soft L1), TTFT at 0.4 of TPOT's
    weight, each number drawn to its start by a tenth of the width of its bounds."""
    import numpy as np
    from scipy.optimize import least_squares

    bounds = {
        "dense": (0.4, 0.85, 0.95),
        "attention": (0.2, 0.8, 0.95),
        "compute": (0.3, 0.65, 0.9),
        "compute_8bit": (0.2, 0.6, 0.9),
        "experts": (0.15, 0.7, 1.2),
        "experts_compute": (0.05, 0.5, 1.2),
        "collective": (0.2, 0.7, 1.0),
        "collective_latency": (2e-6, 1e-5, 6e-5),
        "layer_overhead": (2e-6, 4e-5, 1.2e-4),
        "step_overhead": (5e-4, 1e-3, 6e-3),
        "row_overhead": (0.0, 2e-5, 3e-4),
        "first_token_overhead": (0.0, 0.05, 0.3),
        "prompt_token_overhead": (0.0, 1e-5, 5e-5),
    }
    low, start, high = (np.array([each[at] for each in bounds.values()]) for at in range(3))
    first = (start - low) / (high - low)

    def efficiency(at: Sequence[float]) -> Efficiency:
        values = dict(zip(bounds, (low + (high - low) * np.asarray(at)).tolist(), strict=True))
        dense, attention = values.pop("dense"), values.pop("attention")
        return replace(Efficiency(**values), dense=((1.0, dense),), attention=((1.0, attention),))

    def missed(at: Sequence[float]) -> list[float]:
        found = [predict(cell, catalogue, efficiency(at)) for cell in cells]
        tpot = [np.log(each.ratio("tpot")) for each in found]
        ttft = [0.4 * np.log(each.ratio("ttft")) for each in found]
        return [*tpot, *ttft, *(0.1 * (np.asarray(at) - first))]

    found = least_squares(missed, first, bounds=(0, 1), loss="soft_l1", f_scale=0.1, diff_step=0.02, max_nfev=6)
    return efficiency(found.x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=CELLS)
    parser.add_argument("--by", choices=("model", "devices"))
    parser.add_argument("--fit", choices=tuple(load().engines))
    parser.add_argument("--clients", action="store_true")
    args = parser.parse_args()
    if not args.cells.is_file():
        parser.error(f"there is no file {args.cells}; name one by --cells")
    catalogue, cells = load(), gpu_cells.read(args.cells)
    if args.fit:
        found = fit([cell for cell in cells if cell.engine == args.fit and not cell.held_out], catalogue)
        print(found)
        return
    if args.clients:
        for campaign, seconds in clients([cell for cell in cells if not cell.held_out], catalogue).items():
            print(*campaign, f"{seconds:.3f}")
        return
    print(f"{len(cells)} cells of a closed loop: Llama-3.1, Qwen3 and DeepSeek on H100 and H200, no SLO\n")
    print(f"{'efficiency':22}", *(f"{name:>10}" for name in catalogue.engines))
    print_efficiencies(catalogue)
    predicted = [predict(cell, catalogue) for cell in cells]
    print(f"\n{'predicted / measured':34} cells  {'TPOT':>6} error  {'TTFT':>6} error")
    for held in (False, True):
        half = [each for each in predicted if each.cell.held_out == held]
        for name, group in grouped(half, kind).items():
            print(row(f"{name}, {'held out' if held else 'fitted'}", group))
        for name, kinds in {"dense": KINDS[:2], "experts and latents": KINDS[2:], "all": KINDS}.items():
            group = [entry for entry in half if entry.cell.kind in kinds]
            print(row(f"{name}, {'held out' if held else 'fitted'}", group))
    if args.by is not None:
        print()
        for name, group in grouped(
            predicted,
            lambda cell: f"{cell.model} {cell.engine}{f' {cell.devices} {cell.device}' * (args.by == 'devices')}",
        ).items():
            print(row(name, group))


if __name__ == "__main__":
    main()
