#!/usr/bin/env python3
"""Derives lamina/simulator/traces/trace_figures.toml from the published traces.

usage: scripts/simulate/trace_figures.py FOLDER > lamina/simulator/traces/trace_figures.toml

FOLDER has their files, named as in `lamina.simulator.traces.catalogue.FILES`. Their sources are below.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.errors import InvalidRequest
from lamina.simulator.traces.arrivals import Trace, blocks_of, step_of
from lamina.simulator.traces.catalogue import FILES, file_of
from lamina.simulator.traces.figures import LEVELS, Figures, Floats, Quantiles, Sharing, minutes_of
from lamina.simulator.traces.files import read

AZURE = "Azure LLM inference trace 2023 (Splitwise, ISCA 2024), github.com/Azure/AzurePublicDataset"
MOONCAKE = "Mooncake, FAST'25 release, conversation trace, github.com/kvcache-ai/Mooncake"
SOURCES = {
    "azure-conv": (AZURE, "CC-BY 4.0"),
    "azure-code": (AZURE, "CC-BY 4.0"),
    "mooncake-conversation": (MOONCAKE, "Apache-2.0"),
}
WIDTH = 116


def derive(folder: Path) -> str:
    """The file's text. Raises InvalidRequest, also where a trace is missing."""
    levels = ", ".join(f"{100 * level:g}" for level in LEVELS)
    lines = [
        "# Derived by scripts/simulate/trace_figures.py from the traces that are named; what each number means says",
        "# lamina/simulator/traces/figures.py. Tokens and seconds. Lists are the quantiles at these percentages:",
        *wrapped(levels, "# "),
    ]
    for name in FILES:
        path = file_of(name, folder)
        if path is None:
            raise SystemExit(f"{folder} has none of {', '.join(FILES[name])}")
        figures = measure(read(path, name), *SOURCES[name])
        lines += ["", f"[{name}]", *table(figures)]
        if figures.sharing:
            lines += ["", f"[{name}.sharing]", *table(figures.sharing)]
    return "\n".join(lines) + "\n"


def measure(trace: Trace, source: str, licence: str) -> Figures:
    """The figures of a trace, to 6 digits. Raises InvalidRequest where it is too short for them."""
    if len(trace.arrivals) < 2 or not trace.seconds:
        raise InvalidRequest(f"{trace.name} has one moment; figures need requests at different times")
    prompt, output, gaps = lengths_of(trace, "prompt"), lengths_of(trace, "output"), gaps_of(trace)
    step, at = step_of(trace), times_of(trace)
    counts, part = minutes_of(at)
    local = np.ones(len(at))  # of each request: the rate over the trace's
    for _ in range(3):  # what varies about a load is chance, and a load is what is left without chance
        dispersion = step_variation(at, step, local) if step else variation(gaps * local[1:])
        load = load_of(counts, dispersion**2)
        local = load[np.minimum(at // part, len(load) - 1).astype(int)]
    return Figures(
        name=trace.name,
        source=source,
        licence=licence,
        count=len(trace.arrivals),
        seconds=rounded(trace.seconds),
        prompt_mean=rounded(prompt.mean()),
        output_mean=rounded(output.mean()),
        prompt=quantiles_of(prompt),
        output=quantiles_of(output),
        context=rounded(float((output * (prompt + output / 2)).sum() / output.sum())),
        rank_correlation=rounded(rank_correlation(prompt, output)),
        gap_cv=rounded(variation(gaps)),
        minute_cv=rounded(float(counts.std() / counts.mean())),
        load=tuple(rounded(value) for value in load) if len(set(load)) > 1 else (),
        gaps=None if step else quantiles_of(gaps * local[1:]),
        step=rounded(step),
        step_cv=rounded(step_variation(at, step, local)) if step else 0.0,
        sharing=sharing_of(trace, prompt) if all(arrival.blocks for arrival in trace.arrivals) else None,
    )


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's: of ranks, where equal values share their mean rank. 0 where either is constant."""
    ranks = [ranks_of(values) for values in (x, y)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if all(rank.std() for rank in ranks) else 0.0


def ranks_of(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def sharing_of(trace: Trace, prompt: Floats) -> Sharing:
    shared, lags = shared_blocks(trace)
    columns = zip(*(arrival.blocks for arrival in trace.arrivals), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    blocks = np.array([blocks_of(arrival.prompt) for arrival in trace.arrivals])
    beyond = np.maximum(np.array(shared) - common, 0)
    depth = beyond / np.maximum(blocks - common, 1)
    return Sharing(
        common=common,
        depth=quantiles_of(depth),
        correlation=rounded(rank_correlation(prompt, depth)),
        lag=quantiles_of(np.array(lags)[beyond > 0] if beyond.any() else np.zeros(1)),
        reused=rounded(sum(shared) / int(blocks.sum())),
    )


def shared_blocks(trace: Trace) -> tuple[list[int], list[float]]:
    """Of each prompt, how many of its first blocks earlier prompts had, and how many seconds ago the last one came
    that had them all (0 where none did)."""
    last: dict[int, float] = {}
    shared, lags = [], []
    for arrival in trace.arrivals:
        count = next((n for n, block in enumerate(arrival.blocks) if block not in last), len(arrival.blocks))
        shared.append(count)
        lags.append(arrival.at - last[arrival.blocks[count - 1]] if count else 0.0)
        last.update(dict.fromkeys(arrival.blocks, arrival.at))
    return shared, lags


def lengths_of(trace: Trace, name: str) -> Floats:
    return np.array([getattr(arrival, name) for arrival in trace.arrivals], np.float64)


def times_of(trace: Trace) -> Floats:
    return np.array([arrival.at for arrival in trace.arrivals], np.float64) - trace.arrivals[0].at


def gaps_of(trace: Trace) -> Floats:
    return np.diff(np.array([arrival.at for arrival in trace.arrivals], np.float64))


def load_of(counts: NDArray[np.int64], dispersion: float) -> Floats:
    """The rate of equal parts over the whole's, of counts of requests in them. Of the counts' variance, what requests
    that come by chance would have is left out: `dispersion` / mean, of the squared mean. All 1 where that is all."""
    share = counts / counts.mean()
    slow = 1 - dispersion / counts.mean() / max(share.var(), 1e-12)
    return 1 + (share - 1) * math.sqrt(max(0.0, slow))


def step_variation(at: Floats, step: float, local: Floats) -> float:
    """The root of variance / mean of how many arrive in each step, with those in which none does. The variance is about
    what is expected there: `local` is each request's rate over the whole's."""
    numbers = np.rint(at / step).astype(int)
    counts = np.bincount(numbers)
    rates = np.bincount(numbers, local) / np.maximum(counts, 1)
    expected = counts.mean() * np.where(counts, rates, 1.0)
    return math.sqrt(float(((counts - expected) ** 2).mean() / counts.mean()))


def variation(gaps: Floats) -> float:
    return float(gaps.std() / gaps.mean()) if gaps.size and gaps.mean() else 0.0


def quantiles_of(values: Floats) -> Quantiles:
    return Quantiles(LEVELS, tuple(rounded(value) for value in np.quantile(values, LEVELS)))


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def table(figures: Any) -> list[str]:
    """A line for each field that is not left at nothing; the name is the table's own."""
    lines = []
    for field in fields(figures):
        value = getattr(figures, field.name)
        if isinstance(value, Quantiles):
            lines += [f"{field.name} = [", *wrapped(", ".join(map(number, value.values)) + ",", "    "), "]"]
        elif isinstance(value, tuple) and value:
            lines += [f"{field.name} = [", *wrapped(", ".join(map(number, value)) + ",", "    "), "]"]
        elif isinstance(value, str) and field.name != "name":
            lines.append(f'{field.name} = "{value}"')
        elif isinstance(value, (int, float)) and value:
            lines.append(f"{field.name} = {value!r}")
    return lines


def number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def wrapped(text: str, indent: str) -> list[str]:
    lines = [indent]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 1 > WIDTH:
            lines.append(indent)
        lines[-1] += word if lines[-1] == indent else f" {word}"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    sys.stdout.write(derive(parser.parse_args().folder))


if __name__ == "__main__":
    main()
