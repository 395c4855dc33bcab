#!/usr/bin/env python3
"""What a token costs: over contexts, for ways to serve a model; and the costs that papers print, beside ours.

usage: scripts/simulate_cost.py [--model M] [--trace T] [--system S,S] [--hardware FILE] [--efficiency typical|roofline]
                                [--seed N] [--json] [--out DIR]

Each system is full of sequences of one length, in decode alone: as many as its KV has room for, or as many as still get
a token within --tpot. With --trace the lengths are the trace's mean instead of 1K to 128K. Step-3's table 6 and the
prices, bytes and bandwidths of Lamina's paper are printed below, computed anew (simulate/published.py). --out writes
cost.json and cost.png.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_right
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulate.published import lamina_rows, step3_rows, table

from lamina.errors import InvalidRequest
from lamina.simulator.costs.cost_model import Load
from lamina.simulator.costs.hardware import load, with_efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import System, price
from lamina.simulator.planning.comparison import Choice, build
from lamina.simulator.reports.report import sentences
from lamina.simulator.traces.catalogue import trace
from lamina.simulator.traces.demand import mean_context

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
SYSTEMS = "chunked,lamina,lamina-cpu"


def full(system: System, context: float, tpot: float) -> dict[str, Any]:
    """The largest batch of sequences of so many tokens that fits and is fast enough, and what it yields."""
    most = int(min(system.kv_tokens / context, system.max_sequences))
    batch = bisect_right(range(1, most + 1), tpot, key=lambda many: system.step(Load(many, context)).seconds)
    row: dict[str, Any] = {"system": system.name, "price": price(system), "context": context, "batch": batch}
    if batch:
        seconds = system.step(Load(batch, context)).seconds
        row |= {"tpot": seconds, "tokens_per_second": batch / seconds}
        row["dollars_per_million"] = price(system) / 3600 * seconds / batch * 1e6
    return row


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'system':40} {'$/h':>7} {'context':>8} {'batch':>6} {'TPOT ms':>8} {'tokens/s':>9} {'$/M tokens':>11}")
    for row in rows:
        begin = f"{row['system']:40} {row['price']:7.2f} {row['context']:8.0f} {row['batch']:6}"
        if row["batch"]:
            print(
                f"{begin} {row['tpot'] * 1e3:8.1f} {row['tokens_per_second']:9.0f} {row['dollars_per_million']:11.3f}"
            )
        else:
            print(f"{begin} {'-':>8} {'-':>9} {'-':>11}")


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == name and row["batch"]]
        axes.plot([row["context"] for row in own], [row["dollars_per_million"] for row in own], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="$ a million tokens", title=title)
    axes.set_xticks(CONTEXTS, [f"{context // 1024}K" for context in CONTEXTS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-70b")
    parser.add_argument("--trace", default=None, help="take its mean context")
    parser.add_argument("--trace-dir", type=Path, default=None)
    parser.add_argument("--system", default=SYSTEMS)
    parser.add_argument("--hardware", type=Path, default=None)
    parser.add_argument("--efficiency", choices=("typical", "roofline"), default="typical")
    parser.add_argument("--tpot", type=float, default=0.1, help="seconds that a token may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    catalogue = load(args.hardware)
    shape = model(args.model)
    choice = Choice(shape, with_efficiency(catalogue, catalogue.efficiency(args.efficiency, shape)))
    contexts: tuple[float, ...] = CONTEXTS
    if args.trace is not None:
        contexts = (mean_context(trace(args.trace, None, args.seed, args.trace_dir).arrivals),)
    systems = [build(name, choice) for name in args.system.split(",")]
    rows = [full(system, context, args.tpot) for system in systems for context in contexts]
    published = lamina_rows(catalogue) + step3_rows(catalogue)
    facts = {"full": rows, "published": [asdict(row) for row in published]}
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        said = f"{args.model}, decode alone, a token within {args.tpot * 1e3:g} ms (no SLO for the first); "
        print(*sentences([f"{said}{catalogue.said_of(args.efficiency, shape)}"], 0), "", sep="\n")
        show(rows)
        print("\nLamina (arXiv 2405.01814v2) and Step-3 (arXiv 2507.19427):")
        print(*table(published), sep="\n")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "cost.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        draw(rows, f"{args.model}, decode, a token within {args.tpot * 1e3:.0f} ms", args.out / "cost.png")


if __name__ == "__main__":
    try:
        main()
    except InvalidRequest as error:
        raise SystemExit(f"error: {error}") from error
